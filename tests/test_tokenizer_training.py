"""Stage 1 as a training task: discriminator, LPIPS, micro-batches, averages, precision, meshes."""

import dataclasses
import functools
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from lintime.model.convert.lpips import LINEAR, lpips_shapes
from lintime.train import loop
from lintime.train.checkpoint import Checkpoints, save_inference
from lintime.train.config_files import save_config
from lintime.train.loaded.load import load
from lintime.train.mesh import make_mesh, put_batch, state_shardings
from lintime.train.override import apply_overrides
from lintime.train.schema import Mesh, Precision
from lintime.train.step import init_state, make_train_step
from lintime.train.tasks.table import make_task
from lintime.train.tasks.tokenizer import lpips_weights
from lintime.train.validate import validate
from tests.golden.quick import quick_jit
from tests.tiny import (
    abstract_state,
    assert_close,
    assert_same,
    quick,
    read_lines,
    refused,
    saved_state,
    values,
)
from tests.tiny_images import aim_run, tokenizer_run, write_images

ONE = {"devices": jax.devices()[:1]}
GAN = (
    "process.disc_weight=0.5", "process.disc_start=2", "process.disc_layers=1",
    "process.disc_features=8", "process.entropy_weight=0.1",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "noise.npz")


@pytest.fixture(scope="module")
def gan(images, tmp_path_factory):
    """Four updates with a discriminator from the third on, every state kept: run, folder."""
    overrides = (*GAN, "steps=4", "checkpoint.every=1", "checkpoint.keep=9", "ema.decay=0.9")
    run = tokenizer_run(images, *overrides, "optim.warmup=0")
    folder = tmp_path_factory.mktemp("gan") / "run"
    loop.train(run, folder, **ONE)
    return run, folder


# ---------------------------------------------------------------- the discriminator


def moved(a, b) -> bool:
    same = jax.tree.map(np.array_equal, a, b)
    return not all(jax.tree.leaves(same))


def test_the_discriminator_learns_from_its_start_on(gan):
    run, folder = gan
    lines = read_lines(folder)[:4]
    assert all(np.isfinite(v) for line in lines for v in line.values())
    assert [line["disc_weight"] for line in lines] == [0, 0, 0.5, 0.5]
    assert {"gen", "disc", "logits_real", "logits_fake", "entropy"} <= lines[0].keys()
    reader, abstract = Checkpoints(folder), abstract_state(run)
    states = [jax.device_get(reader.restore(abstract, n)) for n in (1, 2, 3, 4)]
    judges = [s.params["discriminator"] for s in states]
    assert_same(judges[1], judges[0])  # moments of zero gradients are zero, and so are the updates
    assert moved(judges[2], judges[1]) and moved(judges[3], judges[2])
    for a, b in zip(states, states[1:]):
        assert moved(a.params["tokenizer"], b.params["tokenizer"])
        assert moved(a.stats["discriminator"], b.stats["discriminator"])


@pytest.mark.slow
def test_each_of_the_two_is_blind_to_the_other(images, gan):
    """Before its start the discriminator changes nothing of the tokenizer; nor does what it has
    learned change the tokenizer's gradient norm, which each has of its own."""
    run, folder = gan
    alone = apply_overrides(run, ["process.disc_weight=0", "checkpoint.every=0"])
    alone_folder = folder.with_name("alone")
    loop.train(alone, alone_folder, **ONE)
    first = [values(read_lines(f), "generator_loss")[:2] for f in (folder, alone_folder)]
    np.testing.assert_allclose(*first, rtol=1e-5)
    a, b = values(read_lines(folder), "rec")[3], values(read_lines(alone_folder), "rec")[3]
    assert a != pytest.approx(b, rel=1e-6)  # its third update was an adversarial one


@pytest.mark.slow
def test_a_stopped_run_with_a_discriminator_continues_bit_for_bit(gan, tmp_path, monkeypatch):
    run, folder = gan
    original = loop.put_batch

    def put_batch(batch, step, *rest):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "put_batch", put_batch)
        assert loop.train(run, tmp_path / "run", **ONE).step == 2
    loop.train(run, tmp_path / "run", **ONE)
    assert read_lines(tmp_path / "run") == read_lines(folder)
    state = saved_state(run, folder)
    assert_same(saved_state(run, tmp_path / "run"), state)
    loaded = load(tmp_path / "run")  # inference reads the averaged tokenizer alone
    assert_same(jax.tree.map(np.asarray, loaded.params["tokenizer"]), state.ema["tokenizer"])


@pytest.mark.slow
def test_a_converted_tokenizer_gets_a_fresh_discriminator(gan, tmp_path, monkeypatch, capsys):
    """Its own parameters are taken, those of the discriminator are a new run's."""
    run, folder = gan
    alone = tokenizer_run(run.data.path)
    trained = saved_state(run, folder)
    save_config(alone, tmp_path / "converted/config.json")
    weights = {"params": {"tokenizer": trained.params["tokenizer"]}, "stats": {}}
    save_inference(tmp_path / "converted", weights)
    source = tmp_path / "converted"
    tuned = dataclasses.replace(run, init_from=str(source), steps=1)
    started, original = [], loop.start_from

    def start_from(*arguments):
        state, new = original(*arguments)
        started.append(jax.device_get(state))
        return state, new

    monkeypatch.setattr(loop, "start_from", start_from)
    loop.train(tuned, tmp_path / "tuned", **ONE)
    assert f"init_from={source}: it has no discriminator, which starts fresh" in (
        "".join(capsys.readouterr())
    )
    fresh, (state,) = first_state(tuned), started
    assert_same(state.params["tokenizer"], weights["params"]["tokenizer"])
    assert moved(state.params["tokenizer"], fresh.params["tokenizer"])
    assert_same(state.params["discriminator"], fresh.params["discriminator"])
    assert_same(state.stats, fresh.stats)
    assert_same(state.ema, state.params)
    refused(
        "init_from=.*converted: .* is from another model: params/tokenizer/",
        loop.train, apply_overrides(tuned, ["net.ch=64"]), tmp_path / "other", **ONE,
    )  # fmt: skip


@functools.cache
def first_state(run):
    task = make_task(run)
    return jax.device_get(quick_jit(lambda k: init_state(task, run, k))(jax.random.key(run.seed)))


def one_update(run, batch, devices=1, steps=1):
    """State and metrics of some updates from the same batch."""
    plain = apply_overrides(run, ["optim.accumulate=1"])
    plain = dataclasses.replace(plain, mesh=Mesh(), precision=Precision())
    mesh = make_mesh(run.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        state = jax.device_put(first_state(plain))
        state = jax.device_put(state, state_shardings(state, mesh))
        update = quick_jit(make_train_step(make_task(run), run))
        for number in range(steps):
            state, metrics = update(state, put_batch(batch, number, mesh, run.batch_size))
    return jax.device_get((state, metrics))


def some_images(rows=8, size=8):
    noise = np.random.default_rng(0).uniform(-1, 1, (rows, size, size, 3)).astype(np.float32)
    return {"images": noise, "labels": np.zeros(rows, np.int32), "valid": np.ones(rows, bool)}


@pytest.mark.slow
def test_micro_batches_move_statistics_no_further_than_one_batch():
    run = tokenizer_run("", *GAN, "optim.warmup=0", "process.disc_start=0")
    batch = some_images(1) | {"labels": np.zeros(1, np.int32)}
    batch = {name: np.repeat(array, 8, axis=0) for name, array in batch.items()}
    whole, _ = one_update(run, batch)
    parts, metrics = one_update(apply_overrides(run, ["optim.accumulate=4"]), batch)
    assert np.isfinite(metrics["loss"])
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=1e-4)
    jax.tree.map(near, parts.stats, whole.stats)  # unbiased variances differ a little


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_batch():
    run = tokenizer_run("", "optim.warmup=0", "optim.clip=0")
    whole, one = one_update(run, some_images())
    parts, two = one_update(apply_overrides(run, ["optim.accumulate=2"]), some_images())
    for name in ("loss", "rec", "grad_norm", "codebook_usage"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)
    moments = lambda state: [a for a in jax.tree.leaves(state.opt) if np.ndim(a)]
    assert_close(moments(parts), moments(whole), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("gan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_eight_devices_train_like_one(gan):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    # the programs of one device are those of the tests beside this one
    options = (*GAN, "process.disc_start=0") if gan else ("optim.clip=0",)
    run = tokenizer_run("", *options, "optim.warmup=0")
    one, a = one_update(run, some_images(), 1)
    eight, b = one_update(run, some_images(), 8)
    for name in a:
        np.testing.assert_allclose(b[name], a[name], rtol=1e-4, atol=1e-6, err_msg=name)
    moments = lambda state: [a for a in jax.tree.leaves(state.opt) if np.ndim(a)]
    assert_close(moments(eight), moments(one), rtol=2e-3, atol=2e-6)
    assert_close(eight.stats, one.stats)


@pytest.mark.slow
def test_bfloat16_and_fixed_settings():
    run = tokenizer_run("", *GAN, "optim.warmup=0", "process.disc_start=0")
    low = apply_overrides(run, ["precision.compute=bfloat16", "precision.remat=full"])
    validate(low)
    _, a = one_update(run, some_images(), steps=2)
    state, b = one_update(low, some_images(), steps=2)
    assert b["loss"] == pytest.approx(a["loss"], rel=0.1) and b["loss"] != a["loss"]
    assert {a.dtype.name for a in jax.tree.leaves(state.params)} == {"float32"}
    more = ["process.adaptive_weight=true", "process.gen_loss=non_saturating"]
    for optimizer, override in zip(("lion", "adafactor"), more):
        changed = apply_overrides(run, [f"optim.name={optimizer}", override])
        _, c = one_update(changed, some_images())
        assert c["ok"] and np.isfinite(c["grad_norm"]) and np.isfinite(c["loss"])
        assert c["adaptive_weight"] not in (0, 1) or override != more[0]


# ---------------------------------------------------------------- LPIPS


@pytest.fixture(scope="module")
def lpips(tmp_path_factory) -> str:
    """VGG16 and the linear weights, random, in two files."""
    folder, rng = tmp_path_factory.mktemp("lpips"), np.random.default_rng(0)
    draw = lambda s: np.float32(rng.uniform(-1, 1, s) / np.sqrt(max(np.prod(s[1:]), 100)))
    arrays = {name: draw(shape) for name, shape in lpips_shapes().items()}
    linear = {name: np.abs(arrays.pop(name)) for name in LINEAR}
    np.savez(folder / "vgg16.npz", **arrays)
    np.savez(folder / "linear.npz", **linear)
    return f"{folder}/vgg16.npz,{folder}/linear.npz"


def test_lpips_without_weights_is_one_line(images, lpips, tmp_path):
    run = tokenizer_run(images, "process.perceptual_weight=1", "data.size=16")
    refused("process.lpips=FILE .*or process.perceptual_weight=0", validate, run)
    refused("process.lpips=FILE", validate, aim_run(images, "stages.0.process.perceptual_weight=1"))
    named = lambda files: dataclasses.replace(
        run, process=dataclasses.replace(run.process, lpips=files)
    )
    train = lambda files: loop.train(named(files), tmp_path / "run", **ONE)
    refused("none.pth does not exist", train, "none.pth")
    refused("process.lpips=.*no linear weights of LPIPS", train, lpips.split(",")[0])
    run = apply_overrides(run, ["data.size=8"])
    refused("data.size=8 is too small for LPIPS, which needs 16", train, lpips)
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.slow
def test_lpips_trains_and_continues(lpips, tmp_path):
    images = write_images(tmp_path / "noise.npz", size=16)
    run = tokenizer_run(
        images, "process.perceptual_weight=1", f"process.lpips={lpips}", "data.size=16",
        "batch_size=2", "steps=2", "checkpoint.every=1",
    )  # fmt: skip
    validate(run)
    loop.train(run, tmp_path / "run", **ONE)
    lines = read_lines(tmp_path / "run")
    assert all(line["perceptual"] > 0 for line in lines[:2])
    newest, state = tmp_path / "run/checkpoints/2", saved_state(run, tmp_path / "run")
    assert (newest / "params").is_dir() and not (newest / "stats").exists()
    assert not state.stats  # 58 MB that their own file holds already
    shutil.rmtree(newest)
    loop.train(run, tmp_path / "run", **ONE)
    assert read_lines(tmp_path / "run") == lines
    assert_same(saved_state(run, tmp_path / "run"), state)
    assert load(tmp_path / "run").stats == {}  # nobody needs VGG to use the tokenizer
    linear = lpips.split(",")[1]
    with np.load(linear) as file:
        arrays = dict(file)
    try:
        np.savez(linear, **{name: 2 * a for name, a in arrays.items()})
        lpips_weights.cache_clear()
        more = dataclasses.replace(run, steps=3)
        refused("lpips weights are not those .*restore", loop.train, more, tmp_path / "run", **ONE)
    finally:
        np.savez(linear, **arrays)
        lpips_weights.cache_clear()
    assert read_lines(tmp_path / "run") == lines


def test_images_too_small_for_the_discriminator(images, tmp_path):
    run = tokenizer_run(images, "process.disc_weight=0.5")
    refused(
        "data.size=8 is too small for a discriminator of process.disc_layers=3, which needs 24",
        loop.train, run, tmp_path / "run", **ONE,
    )  # fmt: skip


# ---------------------------------------------------------------- stage 2 on meshes


def some_codes(rows=8):
    rng = np.random.default_rng(1)
    draw = lambda high, shape: rng.integers(0, high, shape).astype(np.int32)
    return {"codes": draw(8, (rows, 16)), "labels": draw(4, rows), "valid": np.ones(rows, bool)}


WIDE = ("net.d_model=64", "net.d_intermediate=64", "optim.warmup=0", "optim.clip=0")
DROPS = ("net.token_drop=0.1", "net.mixer_drop=0.1", "net.mlp_drop=0.1")


@pytest.fixture(scope="module")
def on_one_device():
    return one_update(aim_run("", *WIDE, *DROPS), some_codes())


@pytest.mark.parametrize(
    "mesh",
    [("mesh.data=8",), ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")],
    ids=["data", "mixed"],
)
def test_aim_trains_alike_on_any_mesh(mesh, on_one_device):
    """On the mixed mesh the partitioner once took the MLP's modulation from other rows."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    one, a = on_one_device
    many, b = one_update(aim_run("", *WIDE, *DROPS, *mesh), some_codes(), 8)
    for name in ("loss", "bits_per_token", "grad_norm"):
        assert b[name] == pytest.approx(a[name], rel=1e-4)
    moments = lambda state: [a for a in jax.tree.leaves(state.opt) if np.ndim(a)]
    assert_close(moments(many), moments(one), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_unrolled_and_recomputed_layers_are_the_same(on_one_device):
    one, a = on_one_device
    for override in ("precision.unroll=true", "precision.remat=full", "precision.remat=dots"):
        other, b = one_update(aim_run("", *WIDE, *DROPS, override), some_codes())
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), override
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4), override


def test_dropouts_are_honoured(on_one_device):
    _, dropped = on_one_device
    _, plain = one_update(aim_run("", *WIDE, "net.class_dropout=0"), some_codes())
    assert dropped["loss"] != pytest.approx(plain["loss"], rel=1e-6)
