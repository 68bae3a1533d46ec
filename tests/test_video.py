"""Videos: patches, positions and mixing of the net, data, FlexiDiT's modes, runs and animations."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import lintime
from lintime.model.layers.patches import patchify
from lintime.model.layers.positions import sincos_positions
from lintime.model.nets.dit import DiT, DiTConfig, position_table
from lintime.model.nets.flexidit import (
    FlexiDiTConfig,
    check_config,
    flexify,
    mode_config,
    mode_flops,
    mode_params,
)
from lintime.model.sampling.budget import dit_flops, plan
from lintime.train import loop
from lintime.train.cli import main
from lintime.train.config_files import from_json, to_json
from lintime.train.convert.flexify import flexify_run
from lintime.train.data.videos import MovingDigits, bounce, open_video_data
from lintime.train.override import apply_overrides
from lintime.train.samples.pictures import picture_grid, save_mp4, save_picture
from lintime.train.schema import VideoData
from lintime.train.validate import validate
from tests.tiny import assert_same, quick, read_lines, refused, saved_state
from tests.tiny_diffusion import stopped_after, video_run
from tests.tiny_dit import compiled, make_config, random_params, some_inputs

ONE = {"devices": jax.devices()[:1]}
VIDEO = make_config(frames=4, patch_frames=2, base_patch=2, base_patch_frames=2)
close = dict(rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Noise: 20 videos of six frames of 8x8 pixels, four classes."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("clips") / "noise.npz"
    videos = rng.integers(0, 256, (20, 6, 8, 8, 3), dtype=np.uint8)
    np.savez(path, videos=videos, labels=np.arange(20) % 4)
    return path


# ---------------------------------------------------------------- the net


def test_positions_add_the_time_to_those_of_the_place():
    table = sincos_positions(8, (3, 2, 2), scale=(2.0, 1.0, 1.0)).reshape(3, 4, 8)
    place, w = sincos_positions(8, (2, 2)), 10000.0 ** (-np.arange(4) / 4)
    for k, u in enumerate((0.5, 2.5, 4.5)):  # centres of pairs of frames
        time = np.concatenate([np.sin(u * w), np.cos(u * w)])
        np.testing.assert_allclose(table[k], place + time, rtol=1e-14)


def test_a_weak_mode_counts_positions_in_patches_of_the_base():
    weak = VIDEO.with_patch((4, 4, 4))
    assert (weak.patch, weak.grid, weak.tokens) == ((4, 4, 4), (1, 2, 2), 4)
    wanted = sincos_positions(16, (1, 2, 2), scale=2.0)
    np.testing.assert_array_equal(position_table(weak), wanted)


def test_one_frame_with_full_mixing_is_an_image_but_for_the_time():
    """The same parameters see a video of one frame as an image, once its time is taken off."""
    image = make_config()
    video = dataclasses.replace(image, frames=1)
    params = random_params(image)
    x, t, labels = some_inputs(image)
    time = jnp.asarray(position_table(video) - position_table(image), jnp.float32)
    assert np.ptp(np.asarray(time), axis=0).max() < 1e-6  # one time: the same for all tokens
    bias = params["x_embedder"]["bias"] - time[0]
    moved = {**params, "x_embedder": {**params["x_embedder"], "bias": bias}}
    out = compiled(DiT(video))(moved, x[:, None], t, labels)
    assert out.shape == (2, 1, 8, 8, 6)
    np.testing.assert_allclose(out[:, 0], compiled(DiT(image))(params, x, t, labels), **close)


@pytest.mark.parametrize("mixer", ["attention", "pom"])
@pytest.mark.parametrize("layers", [1, 2])
def test_what_factorised_blocks_see(layers, mixer):
    """One block: only its own time. Two: the place along time as well, so everything."""
    config = dataclasses.replace(VIDEO, mixing="factorised", n_layer=layers, mixer=mixer)
    params, (x, t, labels) = random_params(config), some_inputs(config)
    run = compiled(DiT(config))
    out = run(params, x, t, labels)
    changed = run(params, x.at[:, 2:, 0, 0].add(1.0), t, labels)
    moved = np.abs(np.asarray(changed - out)).max(axis=(0, 2, 3, 4)) > 1e-6
    assert moved.tolist() == [layers == 2] * 2 + [True] * 2
    full = compiled(DiT(dataclasses.replace(config, mixing="full")))
    again = full(params, x.at[:, 2:, 0, 0].add(1.0), t, labels)
    assert np.abs(np.asarray(again - full(params, x, t, labels)))[:, :2].max() > 1e-6


def test_factorised_mixing_is_attention_within_and_along_by_hand():
    """The second block attends along time: block-diagonal attention gives the same."""
    config = dataclasses.replace(VIDEO, mixing="factorised")
    params, (x, t, labels) = random_params(config), some_inputs(config)
    unrolled = compiled(DiT(config, unroll=True, remat="full"))
    _, kept = compiled(DiT(config), collect=True)(params, x, t, labels)
    blocks = kept["blocks"]
    from lintime.model.layers.conditioning import modulated_layer_norm
    from lintime.model.mixers.full_attention import FullAttention

    r = jnp.asarray(blocks["out"][0][0])  # after the first block
    own = jax.tree.map(lambda a: a[1], params["blocks"])
    c = kept["time"][0] + kept["label"][0]
    vectors = jax.nn.silu(c) @ own["modulation"]["kernel"] + own["modulation"]["bias"]
    shift, scale = jnp.split(vectors, 6, axis=-1)[:2]
    h = modulated_layer_norm(r, shift[:, None], scale[:, None], 1e-6, jnp.float32)
    places = jnp.tile(jnp.arange(16), 2)  # tokens are numbered frame by frame
    ids = jnp.broadcast_to(places, h.shape[:2])
    y, _ = FullAttention(16, 2).apply({"params": own["attn"]}, h, segment_ids=ids)
    np.testing.assert_allclose(blocks["mixed"][0][1], y, **close)
    np.testing.assert_allclose(
        unrolled(params, x, t, labels), compiled(DiT(config))(params, x, t, labels), **close
    )


def test_what_cannot_be():
    with pytest.raises(ValueError, match="patch_frames=3 does not divide frames=4"):
        print(DiTConfig(frames=4, patch_frames=3).grid)
    with pytest.raises(ValueError, match=r"videos of shape \(4, 8, 8, 3\); the net has frames=2,"):
        DiT(make_config(frames=2)).init(jax.random.key(0), *some_inputs(VIDEO))
    with pytest.raises(ValueError, match="mixing='factorised'; choose full or, for videos"):
        DiT(make_config(mixing="factorised")).init(jax.random.key(0), *some_inputs(make_config()))
    with pytest.raises(ValueError, match="that of a video is"):
        VIDEO.with_patch(4)


# ---------------------------------------------------------------- modes

SIZES = ((2, 2, 2), (1, 4, 4), (4, 4, 4))
FLEXIBLE = FlexiDiTConfig(base=VIDEO, patch_sizes=SIZES, rank=2)


@pytest.mark.parametrize("variant", ["shared", "lora"])
def test_modes_of_videos(variant):
    config = dataclasses.replace(FLEXIBLE, variant=variant)
    dit = random_params(VIDEO)
    params = flexify(config, dit, jax.random.key(0))
    assert config.star == (4, 4, 4) and config.weak == (4, 4, 4)
    at_base = mode_params(config, params, (2, 2, 2))
    if variant == "lora":
        assert_same(jax.tree.map(np.asarray, at_base), jax.tree.map(np.asarray, dit))
        assert sorted(params["modes"]) == ["p1x4x4", "p4x4x4"]
    else:
        assert sorted(params["patch_size_embed"]) == ["p1x4x4", "p4x4x4"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), at_base, dit)
    # A token of 4x4x4 is that of the video shrunk to half of its frames, rows and columns.
    x = some_inputs(VIDEO)[0]
    own = mode_params(config, params, (4, 4, 4))["x_embedder"]["kernel"]
    shrunk = x.reshape(2, 2, 2, 4, 2, 4, 2, 3).mean(axis=(2, 4, 6))
    fine = patchify(shrunk, (2, 2, 2)) @ dit["x_embedder"]["kernel"]
    np.testing.assert_allclose(patchify(x, (4, 4, 4)) @ own, fine, **close)
    out = compiled(DiT(mode_config(config, (1, 4, 4))))(
        mode_params(config, params, (1, 4, 4)), *some_inputs(VIDEO)
    )
    assert out.shape == (2, 4, 8, 8, 6) and np.isfinite(out).all()


def test_costs_of_modes_and_budgets():
    costs = mode_flops(FLEXIBLE)
    n, d = 32, 16
    blocks = 2 * (8 * n * d * d + 2 * n * n * d + 6 * d * d)
    ends = 4 * 8 * 8 * (3 + 6) * d + 2 * d * d + 256 * d + d * d
    assert costs[2, 2, 2] == blocks + ends
    factorised = dit_flops(dataclasses.replace(VIDEO, mixing="factorised"))
    assert costs[2, 2, 2] - factorised == 2 * 2 * n * n * d - 2 * n * 16 * d - 2 * n * 2 * d
    segments = plan(10, costs, powerful=(2, 2, 2), weak=(4, 4, 4), budget=0.7)
    assert [s.mode for s in segments] == [(4, 4, 4), (2, 2, 2)]
    with pytest.raises(ValueError, match="patch size 4x4x4 throughout costs"):
        plan(10, costs, powerful=(2, 2, 2), weak=(4, 4, 4), budget=0.01)


@pytest.mark.parametrize(
    "sizes, words",
    [
        ((2, 4), "the base takes videos, whose patches are .* written 2x4x4"),
        (((1, 4, 4), (4, 4, 4)), r"patch_sizes=\(1x4x4, 4x4x4\) lack 2x2x2, the patch size"),
        (((2, 2, 2), (3, 2, 2)), "patch size 3x2x2 does not divide frames=4; 1, 2, 4 do"),
        (((2, 2, 2), (2, 2, 4)), "side, side"),
    ],
)
def test_modes_that_cannot_be(sizes, words):
    with pytest.raises(ValueError, match=words):
        check_config(dataclasses.replace(FLEXIBLE, patch_sizes=sizes))
    with pytest.raises(ValueError, match="the base takes images, whose patches are one number"):
        check_config(FlexiDiTConfig(base=make_config(), patch_sizes=(2, (1, 4, 4))))


# ---------------------------------------------------------------- data


def test_digits_move_and_bounce():
    at = bounce(np.array([-1.0, 0.0, 3.0, 5.0, 9.0]), 4.0)
    assert at.tolist() == [1.0, 0.0, 3.0, 3.0, 1.0]
    digits = MovingDigits(16)
    clip, label = digits.clip(3, 30, 1, np.array([0.5, 0.5, 1.0, 0.1]))
    digit, wanted = digits.read(3)
    assert clip.shape == (30, 16, 16, 3) and label == wanted
    assert (clip.sum(axis=(1, 2, 3)) == digit.sum()).all()  # the whole digit, always
    places = {tuple(np.argwhere(frame[..., 0])[0]) for frame in clip}
    assert len(places) > 8
    assert MovingDigits(32).clip(0, 1, 1, np.zeros(4))[0][0, :16, :16].any()
    refused("no room to move", MovingDigits, 8)


def opened(split="train", seed=1, rows=4, **changes):
    config = VideoData(**({"path": "builtin:moving_digits", "frames": 3} | changes))
    return open_video_data(config, split=split, seed=seed, batch_size=rows)


def test_batches_are_functions_of_seed_step_and_row():
    data = opened()
    whole = data.batch(5, range(4))
    assert whole["videos"].shape == (4, 3, 16, 16, 3) and whole["videos"].dtype == np.float32
    some = data.batch(5, [2, 0])
    for name, value in whole.items():
        np.testing.assert_array_equal(some[name], value[[2, 0]])
    assert np.any(opened(seed=2).batch(5, range(4))["videos"] != whole["videos"])
    assert data.description == "1,707 videos of 10 classes"
    # the videos of validation do not depend on the batch size
    few = opened("validation").batch(1, [1])["videos"]
    np.testing.assert_array_equal(few[0], opened("validation", rows=8).batch(0, [5])["videos"][0])


def test_arrays_of_videos(clips, tmp_path):
    there = {"path": str(clips), "size": 8, "validation_fraction": 0.2}
    data, videos = opened("validation", **there), np.load(clips)["videos"]
    batch = data.batch(0, range(4))
    source = data.batches.videos
    for k in range(4):  # the middle three of six frames
        clip = videos[source.indices[k]][2:5].astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(batch["videos"][k], clip, atol=1e-6)
    assert batch["labels"].tolist() == [int(i) % 4 for i in source.indices[:4]]
    assert opened(**there | {"size": 4}).batch(0, [0])["videos"].shape == (1, 3, 4, 4, 3)
    strided = opened("validation", **there | {"stride": 2}).batch(0, [0])["videos"]
    assert strided.shape[1] == 3
    refused("has 6 frames, data.frames=7 data.stride=1 take 7", opened, **there | {"frames": 7})
    np.save(tmp_path / "grey.npy", np.zeros((4, 3, 8, 8), np.uint8))
    refused(r"videos must be uint8 \[N, F, H, W, 3\]", opened, path=str(tmp_path))
    refused("no .npy or .npz file there", opened, path=str(tmp_path / "nothing"))
    refused("built-in videos are builtin:moving_digits", opened, path="builtin:digits")


# ---------------------------------------------------------------- pictures


def test_animations(tmp_path):
    videos = np.random.default_rng(0).integers(0, 256, (3, 4, 8, 8, 3), dtype=np.uint8)
    grid = picture_grid(videos, 3)
    assert grid.shape[0] == 4 and grid.shape[1:] == picture_grid(videos[:, 0], 3).shape
    path = save_picture(grid, tmp_path / "grid.of")
    assert path.name == "grid.of.gif"
    image = Image.open(io.BytesIO(path.read_bytes()))
    assert image.n_frames == 4 and image.size == grid.shape[2:0:-1]
    assert image.info["duration"] == 120 and image.info["loop"] == 0
    made = save_mp4(grid, tmp_path / "grid")
    assert made is None or made.stat().st_size > 100


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory):
    run, folder = video_run(clips), tmp_path_factory.mktemp("video") / "run"
    validate(run)
    loop.train(run, folder, **ONE)
    return run, folder


def test_a_run_of_videos(whole, tmp_path, monkeypatch, capfd):
    run, folder = whole
    assert "videos" in read_lines(folder)[0]
    with stopped_after(2, monkeypatch):
        loop.train(run, tmp_path / "run", **ONE)
    loop.train(run, tmp_path / "run", **ONE)
    assert read_lines(tmp_path / "run") == read_lines(folder)
    assert_same(saved_state(run, tmp_path / "run"), saved_state(run, folder))
    drawn = lintime.load(folder).generate([0, 3], seed=5)
    assert drawn.shape == (2, 4, 8, 8, 3) and drawn.dtype == np.uint8
    capfd.readouterr()
    words = ["sample", "--run", str(tmp_path / "run"), "sample.count=2", "sample.files=true"]
    assert main(words) == 0
    out = capfd.readouterr().out
    assert "2 videos: " in out and ("no MP4: " in out or "as MP4: " in out)
    made = sorted(p.name for p in (tmp_path / "run/samples").glob("*.gif"))
    assert len(made) == 3 and made[0].endswith("-00000-class0.gif")


@pytest.mark.parametrize("variant", ["shared", "lora"])
def test_a_flexible_run_of_videos(variant, clips, whole, tmp_path, capfd):
    sizes = "1x4x4,2x2x2,4x4x4"
    run = video_run(
        clips, f"init_from={whole[1]}", f"net.patch_sizes={sizes}", "sample.budgets=1,0.6",
        flexible=True, variant=variant,
    )  # fmt: skip
    assert run.net.patch_sizes == ((1, 4, 4), (2, 2, 2), (4, 4, 4))
    assert from_json(to_json(run)) == run
    validate(run)
    folder = tmp_path / "run"
    loop.train(run, folder, **ONE)
    last = read_lines(folder)[-1]
    assert {f"val_loss_p{p}" for p in sizes.split(",")} < last.keys()
    assert {"patch_size", "patch_frames"} < read_lines(folder)[0].keys()
    capfd.readouterr()
    assert main(["sample", "--run", str(folder), "sample.weak=1x4x4", "sample.count=2"]) == 0
    out = capfd.readouterr().out
    assert "budget 0.6: 3x p1x4x4, " in out and "GFLOPs a video" in out
    assert {p.suffix for p in (folder / "samples").iterdir()} >= {".png", ".gif"}


def test_a_dit_of_videos_becomes_flexible(whole, tmp_path, capfd):
    words = ["flexify", str(whole[1]), "--patch-sizes", "2x2x2,4x4x4", "--out"]
    assert main([*words, str(tmp_path / "flexi")]) == 0
    out = capfd.readouterr().out
    assert "patch size 2x2x2 is the DiT as it was" in out and "patch size 4x4x4: " in out
    loaded, plain = lintime.load(tmp_path / "flexi"), lintime.load(whole[1])
    apart = loaded.generate([1], seed=3).astype(int) - plain.generate([1], seed=3)
    assert np.abs(apart).max() <= 1
    refused("the base takes videos", flexify_run, whole[1], tmp_path / "no", patch_sizes=(2, 4))


@pytest.mark.parametrize(
    "override, words",
    [
        ("data.frames=2", "data.frames=2 frames .* set net.frames=2 net.input_size=8"),
        ("net.patch_frames=3", "net.frames=4 is not divisible by net.patch_frames=3"),
        ("net.mixing=ful", "net.mixing=ful: choose one of full, factorised"),
        ("sample.npz=true", "sample.npz=True is about images"),
    ],
)
def test_what_does_not_go_together(override, words, clips):
    refused(words, lambda: validate(video_run(clips, override)))


def test_images_and_videos_are_not_mixed_up(clips):
    run = video_run(clips)
    net = dataclasses.replace(run.net, frames=0, patch_frames=1, mixing="full")
    refused("the net takes no frames", validate, dataclasses.replace(run, net=net))
    late = dataclasses.replace(net, patch_frames=2)
    refused("would be ignored: the net takes images", validate, dataclasses.replace(run, net=late))
    refused("net.patch_sizes: expected", apply_overrides,
            video_run(clips, flexible=True), ["net.patch_sizes=2x4"])  # fmt: skip
