"""Runs of DiH and its video net, whose times are noise levels: trained, stopped, drawn from."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lintime
from lintime.model.convert.dih import dih_config_from_fields, dih_fields
from lintime.model.nets.dih import DiHConfig
from lintime.model.nets.text_video_dih import TextVideoDiHConfig
from lintime.model.processes.noise_levels import NoiseLevels
from lintime.model.sampling.classes import row_keys
from lintime.train import loop
from lintime.train.arrays import encode_arrays, read_arrays
from lintime.train.errors import UserError
from lintime.train.override import apply_overrides
from lintime.train.schema import EMA, LevelSample, Run, VideoData
from lintime.train.step import decay_at
from lintime.train.validate import validate
from tests.tiny import assert_same, quick, read_lines, saved_state, values, write_config
from tests.tiny_diffusion import DRAWN, KEPT, image_data, stopped_after
from tests.tiny_images import CLASSES, COMMON, SIZE, write_images

ONE = {"devices": jax.devices()[:1]}
NET = DiHConfig(
    input_size=SIZE, in_channels=3, d_model=16, n_layer=2, expand=1, num_classes=CLASSES
)
VIDEO_NET = TextVideoDiHConfig(
    frames=4, input_size=SIZE, input_width=0, in_channels=3, d_model=16, n_layer=2, expand=1,
    context_dim=8, num_classes=CLASSES, block_causal=True,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "noise.npz")


def dih_run(images, *overrides: str) -> Run:
    run = Run(
        net=NET, process=NoiseLevels(), data=image_data(images), steps=4,
        sample=LevelSample(**DRAWN), **COMMON | KEPT,
    )  # fmt: skip
    return apply_overrides(run, overrides)


def video_run(path, *overrides: str) -> Run:
    data = VideoData(path=str(path), size=SIZE, frames=4, validation_fraction=0.2)
    sample = LevelSample(stream=True, **DRAWN)
    run = dataclasses.replace(dih_run(""), net=VIDEO_NET, data=data, sample=sample, steps=2)
    return apply_overrides(run, overrides)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory) -> tuple[Run, Path]:
    run = dih_run(images)
    folder = tmp_path_factory.mktemp("dih") / "run"
    validate(run)
    assert loop.train(run, folder, **ONE).stopped is None
    return run, folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("videos")
    labels = np.arange(40) % CLASSES
    noise = np.random.default_rng(0).integers(0, 64, (40, 4, SIZE, SIZE, 3))
    pixels = (noise + 48 * labels[:, None, None, None, None]).astype(np.uint8)
    np.savez(folder / "noise.npz", videos=pixels, labels=labels)
    run = video_run(folder / "noise.npz")
    validate(run)
    loop.train(run, folder / "run", **ONE)
    return run, folder / "run"


# ---------------------------------------------------------------- training


def test_a_run_stopped_in_the_middle_continues_bit_for_bit(whole, tmp_path, monkeypatch):
    run, folder = whole
    lines = read_lines(folder)
    assert np.isfinite(values(lines, "loss")).all() and lines[-1]["val_mse"] > 0
    with stopped_after(2, monkeypatch):
        assert loop.train(run, tmp_path / "run", **ONE).step == 2
    early = saved_state(run, tmp_path / "run")
    loop.train(run, tmp_path / "run", **ONE)
    assert read_lines(tmp_path / "run") == lines
    state = saved_state(run, folder)
    assert_same(saved_state(run, tmp_path / "run"), state)
    moved = jax.tree.map(lambda a, b: np.any(a != b), early.params, state.params)
    assert all(jax.tree.leaves(moved))  # every parameter learns


def test_averages_that_begin_late_and_are_made_at_times():
    ema = EMA(decay=0.9, interval=2, start=4, power=2 / 3)
    found = [float(decay_at(ema, jnp.int32(k))) for k in range(10)]
    assert found[1::2] == [1.0] * 5 and found[0:5:2] == [0.0] * 3
    np.testing.assert_allclose(found[6::2], 1 - np.array([3.0, 5.0]) ** (-2 / 3), rtol=1e-6)
    assert decay_at(ema, jnp.int32(10**6)) == np.float32(0.9)
    late = EMA(decay=0.5, start=3)
    assert [float(decay_at(late, jnp.int32(k))) for k in range(5)] == [0, 0, 0, 0.5, 0.5]
    assert decay_at(EMA(decay=0.7), jnp.int32(5)) == 0.7


# ---------------------------------------------------------------- commands


def test_train_sample_and_eval_of_the_command_line(cli, images, tmp_path):
    config = write_config(dih_run(images, "steps=2", "process.predict=eps",
                                  "sample.method=dpm", "sample.clip=true"), tmp_path)  # fmt: skip
    folder = tmp_path / "run"
    assert "4 images" in cli("train", config, "--run", folder)
    words = ("sample", "--run", folder, "sample.guidance=2", "--seed", 3)
    for more in (
        (), ("sample.published=homm",), ("sample.noise_schedule=sigmoid",),
        ("sample.method=ddpm", "sample.clip=false"),
    ):  # fmt: skip
        assert f"4 images: {folder}/samples" in cli(*words, *more)
    drawn = {p.read_bytes() for p in (folder / "samples").glob("*seed3*.png")}
    assert len(drawn) == 4
    assert "loss" in cli("eval", "--run", folder)
    assert "method='heun'" in cli.refused(*words, "sample.method=heun")


def test_published_steps_are_another_number(whole):
    _, folder = whole
    loaded = lintime.load(folder)
    draw = lambda **told: loaded.generate([0, 3], method="euler", **told)
    own = draw()
    assert own.shape == (2, SIZE, SIZE, 3)
    assert (own != draw(published="homm")).any()
    np.testing.assert_array_equal(own, draw())


def test_videos_are_drawn_frame_by_frame(videos):
    run, folder = videos
    loaded = lintime.load(folder)
    params = jax.tree.map(lambda a: a + 0.05, loaded.params)  # so that classes and frames matter
    keys, labels = row_keys(jax.random.key(0), 2, 0), jnp.asarray([1, 3])
    for guidance in (1.0, 2.0):
        told = {"guidance": None if guidance == 1.0 else guidance}
        settings = dataclasses.replace(run.sample, guidance=guidance)
        stream = loaded.sampler(settings)({"params": params}, keys, labels, **told)
        once = dataclasses.replace(settings, stream=False)
        want = loaded.sampler(once)({"params": params}, keys, labels, **told)
        np.testing.assert_allclose(stream, want, rtol=1e-4, atol=1e-4)
    other = loaded.sampler(settings)({"params": params}, keys, labels[::-1], **told)
    assert np.abs(stream - other).max() > 1e-3
    assert loaded.generate([2], frames=8).shape == (1, 8, SIZE, SIZE, 3)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "override, words",
    [
        ("process.timesteps=500", "are the same thing; set net.timesteps=500"),
        ("sample.method=ddim", "there are for predict='velocity': euler, heun"),
        ("sample.eta=1", "sample.eta=1.0 would be ignored"),
        ("sample.clip_to=2", "set sample.clip=true"),
        ("sample.stream=true", "are of videos"),
        ("net.d_model=18", "net.d_model=18 is not divisible by 4"),
        ("net.positions=x", "harmonic, shifted, learned"),
        ("net.mixer=pom", "hom or attention"),
        ("net.input_size=16", "set net.input_size=8"),
        ("net.class_dropout=0 sample.guidance=2", "net.class_dropout=0"),
        ("net.resize_by_count=true", "with positions=harmonic"),
        ("net.num_classes=0 net.class_dropout=0 sample.guidance=1", "no class is left"),
        ("net.mlp_ratio=0.001", "net.mlp_ratio=0.001 leaves the MLP no channel of net.d_model"),
        ("ema.decay=0 ema.interval=2", "without ema.decay there is no average"),
    ],
)
def test_what_does_not_fit_is_refused(override, words):
    with pytest.raises(UserError, match=words):
        validate(dih_run("", *override.split()))


@pytest.mark.parametrize(
    "override, words",
    [
        ("net.block_causal=false", "frames of this net see later ones"),
        ("sample.frames=3", "set sample.frames=4"),
        ("sample.stream=false sample.frames=8", "set sample.stream=true"),
        ("sample.guidance_interval=0,0.5", "a stream guides all channels"),
        ("net.num_classes=0", "the net reads the features of texts.*set net.num_classes"),
        ("net.context_dim=0", "set net.context_dim="),
        ("net.input_width=16", "8 x 16 and 3; set .* net.input_width=0"),
        ("net.frames=6", "set net.frames=4"),
    ],
)
def test_videos_that_do_not_fit_are_refused(override, words):
    with pytest.raises(UserError, match=words):
        validate(video_run("", *override.split()))


# ---------------------------------------------------------------- published files


def test_published_files_both_ways(whole, cli, tmp_path):
    run, folder = whole
    said = cli("convert", "--run", folder, "--to", "safetensors", "--out", tmp_path / "dih")
    assert "in the dih layout" in said and f"--config {folder / 'config.json'}" in said
    net = (f"net.{name}={getattr(NET, name)}" for name in ("degree", "input_size"))
    back = tmp_path / "back"
    pixels = ("--config", folder / "config.json")
    assert f"sample --run {back}" in cli(
        "convert", "--from", tmp_path / "dih", *pixels, "--out", back
    )
    assert_same(lintime.load(back).params, lintime.load(folder).params)
    # a training checkpoint, whose average is taken, without its config
    arrays = read_arrays(tmp_path / "dih")
    (tmp_path / "dih/config.json").unlink()
    kept = {f"ema.ema_model.{n}": a for n, a in arrays.items()}
    kept |= {f"model._orig_mod.{n}": a + 1 for n, a in arrays.items()}
    kept |= {"ema.step": np.zeros(1, np.float32), "vae.x.weight": np.zeros(3, np.float32)}
    file = tmp_path / "trained.safetensors"
    file.write_bytes(encode_arrays(kept, "safetensors"))
    cli("convert", "--from", file, "--out", tmp_path / "average", *net)
    loaded = lintime.load(tmp_path / "average")
    assert loaded.config.net == run.net and loaded.config.process == NoiseLevels()
    assert_same(loaded.params, lintime.load(folder).params)
    assert "multiple of 5 x 16" in cli.refused(
        "convert", "--from", file, "--out", tmp_path / "wrong", "net.degree=5"
    )


@pytest.mark.parametrize("model", ["DiH-S/4", "DiH++-XL/2", "DiT-XL/2"])
def test_hyperparameters_both_ways(model):
    config = dih_config_from_fields({"model": model, "im_size": 64, "class_dropout": 0.0})
    assert dih_config_from_fields(dih_fields(config)) == config


def test_what_the_layout_cannot_say_is_refused():
    with pytest.raises(ValueError, match="net.clamp=9.0, the layout has 0.0"):
        dih_fields(dataclasses.replace(NET, clamp=9.0))
