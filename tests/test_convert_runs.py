"""Checkpoint files of every kind become run directories, and runs become files."""

import dataclasses
import json

import numpy as np
import pytest

from lintime.model.convert import transformer_vq as layouts
from lintime.model.convert.names import flatten, nest
from lintime.train.config_files import read_config
from lintime.train.convert import command as command
from lintime.train.errors import UserError
from lintime.train.schema import Data, Run
from tests.conversion import (
    MAIN,
    OPTIMIZED,
    assert_same,
    cli,
    main_shapes,
    optimized_shapes,
    random_arrays,
    restored,
)

pytestmark = pytest.mark.host


def write_safetensors(path, flat):
    pytest.importorskip("safetensors.numpy").save_file(flat, path)


def write_npz(path, flat):
    with open(path, "wb") as file:
        np.savez(file, **flat)


def write_msgpack(path, flat):
    from flax import serialization

    state = {"step": 7, "params": nest(flat), "opt_state": {"0": {"count": np.int32(7)}}}
    path.write_bytes(serialization.msgpack_serialize(state))


def write_orbax(path, flat, inside="default"):
    import orbax.checkpoint as ocp

    state = {"step": np.int32(7), "params": nest(flat), "opt_state": {"m": np.ones(3)}}
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save((path / inside).absolute(), state)


def write_first_orbax(path, flat):
    """One zarr folder per array and a msgpack file that names them, without metadata."""
    import orbax.checkpoint as ocp
    from flax import serialization

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)
    ocp.Checkpointer(handler).save(path.absolute(), {"params": nest(flat)})
    for file in path.glob("_*"):
        file.unlink()
    names = {n: f"PLACEHOLDER://params.{n.replace('/', '.')}" for n in flat}
    aggregate = {"params": nest(names), "step": 7}
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize(aggregate))


@pytest.mark.parametrize(
    "write, name, source",
    [
        (write_safetensors, "weights.safetensors", None),
        (write_npz, "weights.npz", None),
        (write_msgpack, "checkpoint_7", "."),
        (write_orbax, "state_7", "."),
        (write_first_orbax, "state_7", "state_7"),
    ],
)
def test_every_kind_of_file_becomes_a_run(tmp_path, write, name, source):
    flat = random_arrays(main_shapes(MAIN))
    folder = tmp_path / "theirs"
    folder.mkdir()
    write(folder / name, flat)
    out = command.convert(folder / (source or name), tmp_path / "run", reference=MAIN)
    run, variables = restored(out)
    assert run.net == layouts.config_from_reference(MAIN)
    assert (run.data.sequence_len, run.data.update_len, run.batch_size) == (64, 16, 2)
    assert run.sample.top_p == 0.9
    assert_same(flatten(variables), flatten(layouts.from_reference_main(flat)))


def test_the_newest_checkpoint_of_a_folder_is_taken(tmp_path):
    flat = random_arrays(main_shapes(MAIN))
    for step in (900, 1000):
        write_msgpack(tmp_path / f"checkpoint_{step}", {n: a + step for n, a in flat.items()})
    write_msgpack(tmp_path / "validation_loss_lm_per_token_2000", {"x": np.zeros(2)})
    got = command.read_arrays(tmp_path)
    np.testing.assert_array_equal(got["out_ln/g"], flat["out_ln/g"] + 1000)


def test_what_arrays_do_not_tell_is_asked_for(tmp_path):
    write_npz(tmp_path / "w.npz", random_arrays(optimized_shapes(OPTIMIZED | {"e_tie": 1})))
    make = lambda *overrides: command.convert(
        tmp_path / "w.npz", tmp_path / "r", overrides=overrides
    )
    with pytest.raises(UserError, match=r"block_len .*logit_scale .there: e_scale.*out_norm"):
        make("net.pe_lam=1000")
    with pytest.raises(UserError, match="net.d_model is 8 in the checkpoint, 16 in the config"):
        make("net.block_len=4", "net.logit_scale=0.5", "net.out_norm=true", "net.d_model=16")
    make("net.block_len=4", "net.logit_scale=0.5", "net.out_norm=true", "net.pe_lam=1000")
    net = restored(tmp_path / "r")[0].net
    assert (net.mem_len, net.logit_scale, net.out_norm, net.pe_lam) == (4, 0.5, True, 1000)
    assert (net.scale_on, net.tied_bias, net.norm_affine) == ("features", False, False)
    with pytest.raises(UserError, match="exists already"):
        make("net.block_len=4")


def test_bad_sources_give_one_line(tmp_path):
    flat = random_arrays(main_shapes(MAIN))
    write_msgpack(tmp_path / "checkpoint_7", flat)
    whole = (tmp_path / "checkpoint_7").read_bytes()
    write_npz(tmp_path / "other.npz", {"encoder/kernel": np.zeros((2, 2), np.float32)})
    np.savez(tmp_path / "pickled.npz", x=np.array([{"a": 1}], dtype=object))
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name, pattern in {
        "nowhere": "does not exist",
        "other.npz": "not a Transformer-VQ checkpoint",
        "pickled.npz": "cannot read",
        "cut": "cannot read",
        "cut.safetensors": "cannot read",
        "text": "cannot read|holds no parameters",
        "empty": "holds no checkpoint",
    }.items():
        with pytest.raises(UserError, match=pattern) as caught:
            command.convert(tmp_path / name, tmp_path / "run", reference=MAIN)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="lacks c_beta"):
        reference = {n: v for n, v in MAIN.items() if n != "c_beta"}
        command.convert(tmp_path / "checkpoint_7", tmp_path / "run", reference=reference)
    with pytest.raises(UserError, match="32000 token ids, bytes have 259"):
        cfg = MAIN | {"n_vocab": 32000}
        write_npz(tmp_path / "pg19.npz", random_arrays(main_shapes(cfg)))
        command.convert(tmp_path / "pg19.npz", tmp_path / "run", reference=cfg)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_export_and_back_through_the_command(tmp_path, suffix, capsys):
    if suffix == "safetensors":
        pytest.importorskip("safetensors.numpy")
    flat = random_arrays(main_shapes(MAIN))
    write_npz(tmp_path / "w.npz", flat)
    (tmp_path / "cfg.json").write_text(json.dumps(MAIN))
    cli("--from", tmp_path / "w.npz", "--config", tmp_path / "cfg.json", "--out", tmp_path / "a")
    file = tmp_path / f"a.{suffix}"
    cli("--run", tmp_path / "a", "--to", suffix, "--out", file)
    assert_same(command.read_arrays(file), flat)
    again = ("--config", tmp_path / "a.json", "data.path=x.txt")
    cli("--from", file, "--out", tmp_path / "b", *again)
    assert (
        read_config(tmp_path / "b/config.json").net == read_config(tmp_path / "a/config.json").net
    )
    assert f"lintime eval --run {tmp_path / 'b'}" in capsys.readouterr().out
    with pytest.raises(UserError, match="is a lintime run already"):
        command.convert(tmp_path / "a", tmp_path / "c")


def test_a_lintime_config_may_describe_the_net(tmp_path):
    write_npz(tmp_path / "w.npz", random_arrays(main_shapes(MAIN)))
    run = Run(net=layouts.config_from_reference(MAIN), data=Data(path="x.txt"))
    out = command.convert(tmp_path / "w.npz", tmp_path / "run", config=run)
    assert restored(out)[0] == run
    other = dataclasses.replace(run, net=dataclasses.replace(run.net, tie_embeddings=False))
    with pytest.raises(UserError, match="net.tie_embeddings is True in the checkpoint"):
        command.convert(tmp_path / "w.npz", tmp_path / "run2", config=other)
