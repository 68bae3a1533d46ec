"""Runs of DiT from images or latents to samples: whole, interrupted, evaluated, drawn from."""

import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import lintime
from lintime.model.convert.autoencoder_kl import autoencoder_shapes
from lintime.model.nets.autoencoder_kl import AutoencoderKLConfig
from lintime.model.nets.dit import DiTConfig
from lintime.model.processes.gaussian import GaussianDiffusion
from lintime.model.sampling.classes import row_keys
from lintime.train import loop
from lintime.train.arrays import encode_arrays
from lintime.train.errors import UserError
from lintime.train.evaluate import make_evaluator
from lintime.train.finish import finish
from lintime.train.override import apply_overrides
from lintime.train.prepare.encoding import encode_data
from lintime.train.samples.pictures import to_uint8
from lintime.train.schema import DiffusionSample, LatentData, Run
from lintime.train.tasks.table import make_task
from lintime.train.validate import validate
from tests import autoencoder_vectors as vectors
from tests.tiny import assert_close, assert_same, quick, read_lines, refused, saved_state, values
from tests.tiny_diffusion import dit_run, latent_run, stopped_after
from tests.tiny_images import CLASSES, SIZE, write_images

ONE = {"devices": jax.devices()[:1]}
KINDS = {"gaussian": {}, "flow": {"flow": True}}


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "noise.npz")


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """{kind: (run, folder)} of uninterrupted runs."""
    made = {}
    for kind, options in KINDS.items():
        run = dit_run(images, "checkpoint.every=1", **options)
        folder = tmp_path_factory.mktemp(kind) / "run"
        validate(run)
        assert loop.train(run, folder, **ONE).stopped is None
        made[kind] = run, folder
    return made


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole["gaussian"][1], tmp_path / "copy"))


def pngs(folder: Path, pattern="*.png") -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "samples").glob(pattern)}


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_its_figures(kind, whole):
    run, folder = whole[kind]
    lines = read_lines(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    parts = {"mse", "vb"} if kind == "gaussian" else {"mse"}
    names = lines[0].keys() - {"step", "images", "lr", "grad_norm", "loss", "time"}
    assert parts <= names | {"mse"} and np.isfinite(values(lines, "loss")).all()
    assert lines[-1].keys() - {"step", "time"} == {"val_loss", *(f"val_{n}" for n in names)}
    if kind == "gaussian":
        assert lines[0]["loss"] == pytest.approx(lines[0]["mse"] + lines[0]["vb"], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_in_the_middle_continues_bit_for_bit(kind, whole, tmp_path, monkeypatch):
    run, folder = whole[kind]
    with stopped_after(2, monkeypatch):
        result = loop.train(run, tmp_path / "run", **ONE)
    assert (result.stopped, result.step) == ("SIGTERM", 2)
    early = saved_state(run, tmp_path / "run")
    loop.train(run, tmp_path / "run", **ONE)
    assert read_lines(tmp_path / "run") == read_lines(folder)
    state = saved_state(run, folder)
    assert_same(saved_state(run, tmp_path / "run"), state)
    moved = jax.tree.map(lambda a, b: np.any(a != b), early.params, state.params)
    assert all(jax.tree.leaves(moved))  # every parameter learns


def test_the_average_is_what_is_validated_and_loaded(whole):
    run, folder = whole["gaussian"]
    states = [saved_state(run, folder, step) for step in (1, 2)]
    expected = jax.tree.map(lambda e, p: 0.5 * e + 0.5 * p, states[0].ema, states[1].params)
    assert_close(states[1].ema, expected, rtol=1e-6, atol=1e-7)
    loaded, plain = lintime.load(folder), lintime.load(folder, ema=False)
    state = saved_state(run, folder)
    assert_same(jax.tree.map(np.asarray, loaded.params), state.ema)
    assert_same(jax.tree.map(np.asarray, plain.params), state.params)


def test_validation_is_the_same_at_every_call_but_for_the_weights(whole):
    run, folder = whole["gaussian"]
    task, state = make_task(run), saved_state(run, folder)
    data = loop.open_split(run, "validation", folder, None)
    mesh = loop.make_mesh(run.mesh, ONE["devices"])
    evaluate = make_evaluator(task, data, mesh, run.batch_size, 1)
    first = evaluate(state)
    assert evaluate(state) == first
    assert first["loss"] == pytest.approx(read_lines(folder)[-1]["val_loss"], rel=1e-6)
    assert evaluate(state.replace(ema=state.params))["loss"] != first["loss"]
    # class dropout is of training
    batch = data.batch(0, np.arange(run.batch_size)) | {"step": np.int32(0)}
    never = make_task(apply_overrides(run, ["net.class_dropout=0.99"]))
    a, b = (jax.jit(t.evaluate)(state.ema, {}, batch)["loss"] for t in (task, never))
    assert float(a) == float(b)


def test_classes_are_dropped_in_training(images):
    task = make_task(dit_run(images, "net.class_dropout=0.999999", flow=True))
    params = task.init(jax.random.key(0))["params"]
    params = jax.tree.map(lambda a: a + 0.05, params)  # at initialisation no class matters
    batch = {"images": jnp.ones((4, SIZE, SIZE, 3)), "valid": jnp.ones(4, bool), "step": 0}

    def losses(labels):
        rows = batch | {"labels": labels}
        training = task.loss(params, {}, {}, rows, jax.random.key(1))[0]
        return training, task.evaluate(params, {}, rows)["loss"]

    losses = jax.jit(losses)
    (one, seen), (other, seen_other) = losses(jnp.arange(4)), losses(3 - jnp.arange(4))
    assert one == other and seen != seen_other


@pytest.mark.parametrize("mixer", ["pom", pytest.param("mamba2", marks=pytest.mark.slow)])
def test_other_mixers_of_tokens(mixer, images, tmp_path):
    run = dit_run(images, f"net.mixer={mixer}", "steps=2", flow=True)
    validate(run)
    loop.train(run, tmp_path / "run", **ONE)
    assert np.isfinite(values(read_lines(tmp_path / "run"), "loss")).all()
    assert lintime.load(tmp_path / "run").generate([0, 3]).shape == (2, SIZE, SIZE, 3)


# ---------------------------------------------------------------- commands


def test_what_is_printed_at_the_end(whole, copy, capsys):
    run, _ = whole["gaussian"]
    result = loop.Result(copy, 4, {"loss": 1.0, "mse": 0.5})
    finish(run, result, ["lintime", "train", "x.py", "--run", str(copy)])
    out = capsys.readouterr().out
    assert "validation after 4 updates:\n  loss 1, mse 0.5" in out
    assert f"4 images: {copy}/samples/step00000004-seed0.png" in out
    assert "your own images" in out and "x.py data.path=FOLDER --run runs/mine" in out
    assert f"sample --run {copy} --seed 1\n" in out and f"eval --run {copy}\n" in out
    assert "x.py steps=8 --run" in out and "budget" not in out


def test_sample_writes_what_is_asked_for_again_the_same(cli, copy):
    words = ("sample", "--run", copy, "sample.count=5", "sample.classes=3,1", "--seed", 7,
             "sample.guidance=2", "sample.files=true", "sample.npz=true")  # fmt: skip
    out = cli(*words, "sample.rows=2")
    stem = "step00000004-seed7-guidance2-classes3,1-count5"
    drawn = pngs(copy)
    assert f"5 images: {copy}/samples/{stem}.png" in out
    singles = sorted(pngs(copy, "*-class?.png"))
    assert singles == [f"{stem}-{i:05d}-class{c}.png" for i, c in enumerate([3, 1, 3, 1, 3])]
    with np.load(copy / f"samples/{stem}.npz") as file:
        assert file["arr_0"].shape == (5, SIZE, SIZE, 3) and file["arr_1"].tolist() == [
            3,
            1,
            3,
            1,
            3,
        ]
    cli(*words, "sample.rows=2")
    assert pngs(copy) == drawn
    shutil.rmtree(copy / "samples")
    cli(*words, "sample.rows=3")
    assert pngs(copy) == drawn  # an image does not depend on how many are drawn at a time
    loaded = lintime.load(copy)
    rest = loaded.generate([1, 3], seed=7, start=3, guidance=2.0)
    for image, name in zip(rest, singles[3:]):
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(drawn[name]))))
    other = loaded.generate([1, 3], seed=8, start=3, guidance=2.0)
    assert np.any(other != rest) and np.any(loaded.generate([1, 3], seed=7, start=3) != rest)


def test_eval_repeats_the_validation_and_draws(cli, whole, copy):
    last = read_lines(copy)[-1]
    out = cli("eval", "--run", copy)
    found = dict(line.split() for line in out.splitlines()[1:] if len(line.split()) == 2)
    assert float(found["loss"]) == pytest.approx(last["val_loss"], rel=1e-4)
    assert float(found["vb"]) == pytest.approx(last["val_vb"], rel=1e-4)
    assert "set eval.samples=N eval.inception=FILE" in out
    assert cli("eval", "--run", copy) == out
    assert "no Inception weights were given" in cli("eval", "--run", copy, "eval.samples=3")


def test_mistakes_are_one_line(cli, copy):
    sample = lambda *words: cli.refused("sample", "--run", copy, *words)
    assert f"class {CLASSES} is out of range; this model has classes 0..3" in sample(
        f"sample.classes=0,{CLASSES}"
    )
    assert "method='sde'; Gaussian diffusion has ddpm" in sample("sample.method=sde")
    assert "give (low, high)" in sample("sample.guidance_interval=0.5")
    assert "guidance_channels=4, but images have 3" in sample("sample.guidance_channels=4")
    assert "several patch sizes" in sample("--budget", "0.6")
    assert "sample.top_k" in sample("sample.top_k=3")
    assert "net.num_classes is part of the trained run" in sample("net.num_classes=9")


@pytest.mark.parametrize(
    "override, words",
    [
        ("net.num_classes=3", "net.num_classes=3, .* 4 classes; set net.num_classes=4"),
        ("data.size=16", "data.size=16 .* set net.input_size=16 net.in_channels=3"),
        ("net.patch_size=3", "net.input_size=8 is not divisible by net.patch_size=3"),
        ("net.learn_sigma=false", "net.learn_sigma=False do not go .* net.learn_sigma=true"),
        ("net.d_model=18", "net.d_model=18 is not divisible by 4"),
        ("process.timesteps=4", "process.timesteps=4: "),
        (f"sample.classes={CLASSES}", f"class {CLASSES} is out of range"),
        ("sample.steps=2000", "2000"),
    ],
)
def test_what_does_not_go_together_is_said_first(override, words, images, tmp_path):
    def train():
        run = dit_run(images, override)
        validate(run)
        loop.train(run, tmp_path / "run", **ONE)

    refused(words, train)
    assert not (tmp_path / "run").exists()


def test_guidance_needs_a_null_class(images):
    never = ("net.class_dropout=0",)
    validate(dit_run(images, *never))
    refused("sample.guidance=2 needs .*class_dropout", validate,
            dit_run(images, *never, "sample.guidance=2"))  # fmt: skip


# ---------------------------------------------------------------- latents


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    """A random autoencoder in the published layout, 8x8 pixels to 4x4x2."""
    return write_autoencoder(tmp_path_factory.mktemp("vae"))


def write_autoencoder(folder: Path, change: float = 0.0, scaling_factor: float = 0.5) -> Path:
    config = AutoencoderKLConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, latent_channels=2)
    shapes = autoencoder_shapes(config).items()
    arrays = {name: vectors.array(name, shape) + change for name, shape in shapes}
    folder.mkdir(exist_ok=True)
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(encode_arrays(arrays, "safetensors"))
    settings = {"_class_name": "AutoencoderKL", "norm_num_groups": 32}
    settings["scaling_factor"] = scaling_factor
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def latents(images, autoencoder, tmp_path_factory):
    run, folder = latent_run(images, autoencoder), tmp_path_factory.mktemp("latents") / "run"
    validate(run)
    result = loop.train(run, folder, **ONE)
    return run, folder, result


def test_latents_from_images_to_samples(latents, capsys):
    run, folder, result = latents
    assert json.loads((folder / "latents/latents.json").read_text())["grid"] == [4, 4]
    finish(run, result, ["lintime", "train", "x.py", "--run", str(folder)])
    out = capsys.readouterr().out
    assert "data.images.path=FOLDER_OF_CLASS_FOLDERS --run runs/mine" in out
    loaded = lintime.load(folder)
    drawn = loaded.generate([0, 3], seed=5)
    assert drawn.shape == (2, SIZE, SIZE, 3) and drawn.dtype == np.uint8
    # what is decoded is what was drawn, divided by the scaling factor
    keys = row_keys(jax.random.key(5), 2, 0)
    x = loaded.sampler(run.sample)(loaded.variables, keys, jnp.asarray([0, 3]), guidance=None)
    assert x.shape == (2, 4, 4, 2)
    np.testing.assert_array_equal(to_uint8(loaded.autoencoder.decode(x / 0.5)), drawn)


def test_latents_continue_and_are_evaluated(cli, latents, autoencoder, tmp_path, monkeypatch):
    run, folder, _ = latents
    with stopped_after(2, monkeypatch):
        loop.train(run, tmp_path / "run", **ONE)
    loop.train(run, tmp_path / "run", **ONE)
    assert read_lines(tmp_path / "run") == read_lines(folder)
    assert_same(saved_state(run, tmp_path / "run"), saved_state(run, folder))
    out = cli("eval", "--run", folder, "eval.samples=2")
    found = dict(line.split() for line in out.splitlines()[1:] if len(line.split()) == 2)
    assert float(found["loss"]) == pytest.approx(read_lines(folder)[-1]["val_loss"], rel=1e-4)
    assert "says how latents are made" in cli.refused("eval", "--run", folder, "data.images.size=9")


def test_latents_of_another_autoencoder(cli, latents, images, tmp_path):
    run, folder, _ = latents
    other = write_autoencoder(tmp_path / "other", change=1e-3)
    line = cli.refused("sample", "--run", folder, f"data.autoencoder={other}")
    assert "is not the autoencoder whose latents" in line
    assert "nowhere does not exist" in cli.refused(
        "sample", "--run", folder, "data.autoencoder=nowhere"
    )
    there = f"data.path={folder / 'latents'}"
    out = tmp_path / "run"
    refused("is not the autoencoder whose latents .*latents holds", loop.train,
            latent_run(images, other, there), out, **ONE)  # fmt: skip
    assert not out.exists()
    loop.train(latent_run(images, other), tmp_path / "second", **ONE)
    line = cli.refused("eval", "--run", folder, f"data.path={tmp_path / 'second/latents'}",
                       f"data.autoencoder={other}")  # fmt: skip
    assert "latents" in line and "trained on" in line


def test_latents_alone_are_trained_on_but_not_drawn(cli, latents, images, tmp_path, capfd):
    run, folder, _ = latents
    alone = latent_run(images, "", f"data.path={folder / 'latents'}")
    validate(alone)
    result = loop.train(alone, tmp_path / "run", **ONE)
    assert read_lines(tmp_path / "run") == read_lines(folder)
    finish(alone, result, ["lintime", "train", "x.py"])
    out = capfd.readouterr().out
    assert "no sample: data.autoencoder names nothing" in out
    assert "--seed 1 data.autoencoder=DIR_OR_FILE" in out
    assert "name their autoencoder with data.autoencoder" in cli.refused(
        "sample", "--run", tmp_path / "run"
    )
    cli("sample", "--run", tmp_path / "run", f"data.autoencoder={run.data.autoencoder}")


@pytest.mark.parametrize(
    "override, words",
    [
        ("data.scaling_factor=0.18215", "scaling_factor=0.18215, .* set data.scaling_factor=0.5"),
        ("net.input_size=8", r"\(8, 8, 2\), these have \(4, 4, 2\); set net.input_size=4"),
        ("net.in_channels=4", r"\(4, 4, 4\), these have \(4, 4, 2\); set .*net.in_channels=2"),
        ("data.images.size=9", "data.images.size=9 is not divisible by 2"),
    ],
)
def test_latents_that_do_not_fit_are_not_made(override, words, images, autoencoder, tmp_path):
    run = latent_run(images, autoencoder, override)
    refused(words, loop.train, run, tmp_path / "run", **ONE)
    assert not (tmp_path / "run").exists()


def test_latents_of_nowhere_cannot_be_trained_on():
    parts = {"process": GaussianDiffusion(), "data": LatentData(), "sample": DiffusionSample()}
    run = Run(net=DiTConfig(), **parts)
    validate(run)  # it may be a converted model, to draw from
    with pytest.raises(UserError, match="nothing says what to train on"):
        encode_data(run, ".")
