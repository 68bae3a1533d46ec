"""`lintime flexify`: a DiT run into a FlexiDiT run."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lintime.model.convert.dit import dit_to_reference
from lintime.model.convert.flexidit import flexidit_config_from_fields, flexidit_fields
from lintime.model.nets.dit import DiT, DiTConfig
from lintime.model.nets.flexidit import FlexiDiTConfig, init_params, mode_params
from lintime.model.processes.flexible import FlexibleFlow
from lintime.model.processes.gaussian import GaussianDiffusion
from lintime.train.checkpoint import restore_inference, save_inference
from lintime.train.cli import main
from lintime.train.config_files import read_config, save_config
from lintime.train.convert.flexify import flexify_run, parse_sizes
from lintime.train.errors import UserError
from lintime.train.loaded.load import load
from lintime.train.schema import DiffusionSample, ImageData, Run
from lintime.train.tasks.flexible import split_base

NET = DiTConfig(
    input_size=8, patch_size=2, in_channels=3, d_model=16, n_layer=2, n_head=2, num_classes=3
)


@pytest.fixture(scope="module")
def dit_params():
    x, one = np.zeros((1, 8, 8, 3), np.float32), np.zeros((1,), np.int32)
    draw = np.random.default_rng(0)
    init = jax.eval_shape(DiT(NET).init, jax.random.key(0), x, one, one)["params"]
    return jax.tree.map(lambda a: np.float32(0.1 * draw.normal(size=a.shape)), init)


@pytest.fixture(scope="module")
def source(dit_params, tmp_path_factory):
    """Run directory of a DiT."""
    folder = tmp_path_factory.mktemp("runs") / "dit"
    run = Run(
        net=NET, process=GaussianDiffusion(), data=ImageData(path="builtin:digits", size=8),
        sample=DiffusionSample(steps=4), init_from="elsewhere",
    )  # fmt: skip
    save_inference(folder, {"params": dit_params})
    save_config(run, folder / "config.json")
    return folder


def weights(folder):
    net = read_config(folder / "config.json").net
    abstract = split_base(jax.eval_shape(lambda: init_params(net, jax.random.key(0))))
    restored = restore_inference(folder, abstract)
    return net, {**restored["params"], **restored["stats"]}


@pytest.mark.parametrize("variant", ["shared", "lora"])
def test_the_run_is_what_it_was_at_its_own_patch_size(source, dit_params, variant, tmp_path):
    out = tmp_path / "flexi"
    words = ["--patch-sizes", "2,4,8", "--variant", variant, "--out", str(out), "net.rank=3"]
    assert main(["flexify", str(source), *words]) == 0
    net, params = weights(out)
    assert net == FlexiDiTConfig(base=NET, patch_sizes=(2, 4, 8), variant=variant, rank=3)
    own = mode_params(net, params, 2)
    check = np.testing.assert_array_equal if variant == "lora" else almost
    jax.tree.map(check, own, dit_params)
    saved = read_config(out / "config.json")
    assert saved.init_from == "" and saved.sample.steps == 4
    terms = (0.0, 1.0) if variant == "lora" else (1.0, 0.0)
    assert (saved.process.denoise, saved.process.distill) == terms
    assert saved.process.variance == "learned_range"


def test_it_can_be_loaded_and_drawn_from(source, tmp_path):
    flexify_run(source, tmp_path / "x", patch_sizes=(2, 4))
    loaded = load(tmp_path / "x")
    assert sorted(loaded.modes) == [2, 4]
    drawn = loaded.drawer(dataclasses.replace(loaded.config.sample, budgets=(0.7,)))
    keys = jax.random.split(jax.random.key(0), 2)
    assert drawn(keys, np.array([0, 1], np.int32)).shape == (2, 8, 8, 3)


def almost(a, b):
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_published_weights(dit_params, suffix, tmp_path):
    file = tmp_path / f"DiT{suffix}"
    flat = {n: np.ascontiguousarray(a) for n, a in dit_to_reference(dit_params, NET).items()}
    if suffix == ".pt":
        torch = pytest.importorskip("torch")
        torch.save({"ema": {n: torch.from_numpy(a) for n, a in flat.items()}}, file)
    else:
        save_file(flat, file)
    out = tmp_path / "flexi"
    words = ["--patch-sizes", "2,4", "--variant", "lora", "--out", str(out), "net.base.n_head=2"]
    assert main(["flexify", str(file), *words]) == 0
    net, params = weights(out)
    assert net.base == NET
    jax.tree.map(np.testing.assert_array_equal, mode_params(net, params, 2), dit_params)


def test_it_says_what_modes_cost(source, tmp_path, capsys):
    main(["flexify", str(source), "--patch-sizes", "2,4", "--out", str(tmp_path / "x")])
    out = capsys.readouterr().out
    assert "patch size 2: " in out and "100.0%" in out and "patch size 4: " in out
    assert f"init_from={tmp_path / 'x'}" in out


def test_the_seed_draws_the_adapters(source, tmp_path):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        flexify_run(source, out, patch_sizes=(2, 4), variant="lora", seed=seed)
        found.append(weights(out)[1]["modes"]["p4"]["lora"]["mlp"]["fc1"]["A"])
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


def test_saved_configs_keep_the_kind(source, tmp_path):
    flexify_run(source, tmp_path / "x", patch_sizes=(2,))
    assert json.loads((tmp_path / "x" / "config.json").read_text())["net"]["kind"] == "flexidit"


@pytest.mark.parametrize(
    "sizes, overrides, message",
    [
        ((4, 8), (), "lack 2, the patch size of the base; add it"),
        ((2, 3), (), "patch size 3 does not divide input_size=8; 1, 2, 4, 8 do"),
        ((2, 4), ("net.base.n_layer=3",), "cannot be changed; leave out net.base.n_layer=3"),
        ((2, 4), ("net.variant=lora", "net.targets=attn.key"), "no kernel attn.key in a block"),
        ((2, 4), ("net.resize=cubic",), "choose one of area, bilinear"),
    ],
)
def test_errors_of_the_net(source, sizes, overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        flexify_run(source, tmp_path / "x", patch_sizes=sizes, overrides=overrides)
    assert not (tmp_path / "x").exists()


def test_errors_of_the_source(source, tmp_path):
    flexify_run(source, tmp_path / "x", patch_sizes=(2, 4))
    with pytest.raises(UserError, match="flexible already, with patch sizes 2, 4"):
        flexify_run(tmp_path / "x", tmp_path / "y", patch_sizes=(2, 4))
    with pytest.raises(UserError, match="exists already"):
        flexify_run(source, tmp_path / "x", patch_sizes=(2, 4))
    with pytest.raises(UserError, match="does not exist"):
        flexify_run(tmp_path / "none", tmp_path / "y", patch_sizes=(2, 4))


def test_a_run_of_another_net_is_refused(source, tmp_path):
    run = read_config(source / "config.json")
    from lintime.model.nets.mamba_lm import MambaConfig

    save_inference(tmp_path / "m", {"params": {"a": np.zeros(1, np.float32)}})
    save_config(dataclasses.replace(run, net=MambaConfig()), tmp_path / "m" / "config.json")
    with pytest.raises(UserError, match="is no DiT"):
        flexify_run(tmp_path / "m", tmp_path / "y", patch_sizes=(2, 4))


def test_patch_sizes_as_text():
    assert parse_sizes("2,4, 8") == (2, 4, 8)
    with pytest.raises(UserError, match="whole numbers separated by commas"):
        parse_sizes("2;4")


@pytest.mark.parametrize("variant", ["shared", "lora"])
def test_a_file_and_a_run_again(source, variant, tmp_path, capsys):
    """`convert` to a file and back, from its config.json, or from shapes and what they lack."""
    flexi, files = tmp_path / "flexi", tmp_path / "files"
    told = ["net.rank=3", "net.targets=attn.qkv,mlp.fc2"] if variant == "lora" else []
    flexify_run(source, flexi, patch_sizes=(2, 4), variant=variant, overrides=told)
    net, before = weights(flexi)
    assert main(["convert", "--run", str(flexi), "--to", "safetensors", "--out", str(files)]) == 0
    assert "in the flexidit layout" in capsys.readouterr().out
    flat = load_file(files / "model.safetensors")
    assert {"shared": "patch_size_embed.4", "lora": "modes.4.lora.blocks.1.mlp.fc2.B"}[
        variant
    ] in flat
    assert main(["convert", "--from", str(files), "--out", str(tmp_path / "again")]) == 0
    again, after = weights(tmp_path / "again")
    assert again == net and "lintime sample --run" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, after, before)
    process = read_config(tmp_path / "again/config.json").process
    assert process == read_config(flexi / "config.json").process
    # as one file, with its JSON beside it
    one = tmp_path / "one.safetensors"
    assert main(["convert", "--run", str(flexi), "--to", "safetensors", "--out", str(one)]) == 0
    assert main(["convert", "--from", str(one), "--out", str(tmp_path / "third")]) == 0
    assert weights(tmp_path / "third")[0] == net
    capsys.readouterr()
    # without the config.json
    bare, more = ["--from", str(files / "model.safetensors")], ["net.base.n_head=2"]
    (files / "config.json").unlink()
    if variant == "shared":
        assert main(["convert", *bare, "--out", str(tmp_path / "x"), *more]) == 2
        assert "do not tell net.base.patch_size; give it" in capsys.readouterr().err
        more += ["net.base.patch_size=2"]
    else:
        assert main(["convert", *bare, "--out", str(tmp_path / "x")]) == 2
        assert "do not tell net.base.n_head" in capsys.readouterr().err
    out = tmp_path / "told"
    assert main(["convert", *bare, "--out", str(out), "--layout", "flexisit", *more]) == 0
    net, own = dataclasses.replace(net, underlying=4 if variant == "shared" else 0), weights(out)
    assert own[0] == net
    jax.tree.map(np.testing.assert_array_equal, own[1], before)
    assert isinstance(read_config(out / "config.json").process, FlexibleFlow)
    # it is no DiT
    assert main(["flexify", str(out), "--patch-sizes", "2,4", "--out", str(tmp_path / "y")]) == 2
    assert "is flexible already" in capsys.readouterr().err


def test_fields_of_the_file():
    config = FlexiDiTConfig(base=NET, variant="lora", alpha=8)
    fields = json.loads(json.dumps(flexidit_fields(config)))
    assert flexidit_config_from_fields(fields) == config
    for change, words in (
        ({"rank": "3"}, "rank='3', expected a value of type int"),
        ({"patch_sizes": 4}, "expected a value of type tuple"),
        ({"levels": 4}, "levels is not known"),
        ({"patch_sizes": [4]}, "lack 2"),
    ):
        with pytest.raises(ValueError, match=words):
            flexidit_config_from_fields(fields | change)
