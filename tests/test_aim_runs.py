"""Runs of AiM from images to samples: whole, interrupted, continued, and with faults."""

import dataclasses
import json
import os
import shutil
import signal
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import lintime
from lintime.train import loop
from lintime.train.cli import main
from lintime.train.config_files import from_json, to_json
from lintime.train.convert.command import convert, export
from lintime.train.encoders.tokenizer import load_tokenizer
from lintime.train.override import apply_overrides
from lintime.train.prepare import encode
from lintime.train.validate import validate
from tests.tiny import assert_same, quick, read_lines, refused, saved_state
from tests.tiny_images import CLASSES, SIZE, aim_run, tokenizer_run, write_images

ONE = {"devices": jax.devices()[:1]}


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "noise.npz")


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """An uninterrupted pipeline: run, folder."""
    run, folder = aim_run(images, "ema.decay=0.5"), tmp_path_factory.mktemp("whole") / "run"
    assert loop.train(run, folder, **ONE).stopped is None
    return run, folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole[1], tmp_path / "copy"))


def same_run(a, b, run) -> None:
    """Weights, codes and metric lines of both stages, bit for bit."""
    for part, of in (("", run), ("stages/0", run.stages[0])):
        assert read_lines(a / part) == read_lines(b / part)
        assert_same(saved_state(of, a / part), saved_state(of, b / part))
    codes = lambda folder: {p.name: p.read_bytes() for p in (folder / "codes").glob("*.npy")}
    assert codes(a) == codes(b) and codes(a)


# ---------------------------------------------------------------- the pipeline


def test_the_whole_pipeline_leaves_both_stages(whole):
    run, folder = whole
    first, second = read_lines(folder / "stages/0"), read_lines(folder)
    assert [line["step"] for line in first] == [1, 2, 3, 3]
    assert [line["step"] for line in second] == [1, 2, 3, 4, 4]
    assert {"loss", "rec", "vq", "commit", "codebook_usage", "grad_norm"} <= first[0].keys()
    assert {"val_loss", "val_psnr", "val_codebook_perplexity"} <= first[-1].keys()
    assert {"loss", "bits_per_token", "images"} <= second[0].keys()
    assert second[-1]["val_bits_per_token"] == pytest.approx(second[-1]["val_loss"] / np.log(2))
    info = json.loads((folder / "codes/codes.json").read_text())
    assert info["tokenizer"] == load_tokenizer(folder / "stages/0").fingerprint
    assert (info["grid"], info["views"], len(info["class_names"])) == ([4, 4], "flip", CLASSES)


def test_the_same_pipeline_again_trains_nothing(whole, copy, monkeypatch):
    run, folder = whole
    monkeypatch.setattr(encode, "_encode_shard", None)
    assert loop.train(run, copy, **ONE).step == 4
    same_run(copy, folder, run)


def stopped_at(step, stage, monkeypatch) -> None:
    """The process receives SIGTERM when update `step` of a stage is handed out."""
    original, seen = loop.put_batch, []

    def put_batch(batch, number, *rest):
        if number == step and (("images" in batch) == (stage == 0)) and not seen:
            seen.append(number)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, number, *rest)

    monkeypatch.setattr(loop, "put_batch", put_batch)


@pytest.mark.slow
def test_a_pipeline_stopped_everywhere_continues_bit_for_bit(whole, tmp_path, monkeypatch):
    run, folder = whole
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopped_at(1, 0, patch)
        result = loop.train(run, out, **ONE)
    assert (result.stopped, result.step, result.where) == ("SIGTERM", 2, "stage 0")
    assert not (out / "codes").exists() and not (out / "config.json").exists()

    original = encode.write_shard

    def fail(folder, info, split, shard, *rest):
        if split == "validation":
            raise KeyboardInterrupt
        original(folder, info, split, shard, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "write_shard", fail)
        with pytest.raises(KeyboardInterrupt):
            loop.train(run, out, **ONE)
    assert not (out / "codes/codes.json").exists() and not (out / "config.json").exists()

    with monkeypatch.context() as patch:
        stopped_at(1, 1, patch)
        result = loop.train(run, out, **ONE)
    assert (result.stopped, result.step, result.where) == ("SIGTERM", 2, "")
    loop.train(run, out, **ONE)
    same_run(out, folder, run)


def test_a_changed_stage_is_refused_by_name(whole, copy):
    run, folder = whole
    changed = apply_overrides(run, ["stages.0.optim.learning_rate=0.5"])
    refused(r"stages\.0\.optim.learning_rate \(0.01 -> 0.5\)", loop.train, changed, copy, **ONE)
    (copy / "config.json").unlink()  # as if it had been stopped before the second stage
    refused(r"optim.learning_rate \(0.01 -> 0.5\)", loop.train, changed, copy, **ONE)
    same_run(copy, folder, run)


def test_another_first_stage_does_not_meet_the_old_codes(whole, copy, other_tokenizer):
    run, _ = whole
    shutil.rmtree(copy / "stages/0/checkpoints")
    shutil.copytree(other_tokenizer / "checkpoints/1", copy / "stages/0/checkpoints/3")
    refused("codes holds codes made with another tokenizer", loop.train, run, copy, **ONE)


def test_saved_and_overridden_stages():
    run = apply_overrides(aim_run("x.npz"), ["stages.0.steps=9", "stages.0.net.ch=64"])
    assert (run.stages[0].steps, run.stages[0].net.ch, run.steps) == (9, 64, 4)
    assert from_json(json.loads(json.dumps(to_json(run)))) == run
    refused("there are 1 stages", apply_overrides, run, ["stages.1.steps=9"])
    refused("did you mean", apply_overrides, run, ["stages.0.step=9"])
    refused(
        "stages.*takes no|batch_size=0", validate, apply_overrides(run, ["stages.0.batch_size=0"])
    )


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    "override, words",
    [
        ("net.vocab_size=4", "net.vocab_size=4 .* set net.vocab_size=8"),
        ("net.num_tokens=15", "net.num_tokens=15 .* set net.num_tokens=16"),
        ("net.num_tokens=64", "net.num_tokens=64 .* set net.num_tokens=16"),
        ("data.images.size=9", "data.images.size=9 .*multiple of 2, .*; set data.images.size=8"),
        ("data.tokenizer=stage:1", "data.tokenizer=stage:1: this run has 1 stages"),
        ("init_from=stage:2", "init_from=stage:2: this run has 1 stages"),
        ("data.resizes=1.0,1.0", "data.resizes"),
    ],
)
def test_what_a_stage_does_not_fit_is_said_before_it_is_trained(override, words, images, tmp_path):
    def train():
        run = aim_run(images, override)
        validate(run)
        loop.train(run, tmp_path / "run", **ONE)

    refused(words, train)
    assert not (tmp_path / "run").exists()


def test_too_many_classes(whole, copy):
    run, _ = whole
    (copy / "config.json").unlink()
    shutil.rmtree(copy / "checkpoints")
    few = apply_overrides(run, ["net.num_classes=3"])
    refused("net.num_classes=3 .* set net.num_classes=4", loop.train, few, copy, **ONE)


def test_bad_images(tmp_path, images, copy):
    folder, out = tmp_path / "folder", tmp_path / "run"
    train = lambda path: loop.train(aim_run(path), out, **ONE)
    refused("none.npz", train, tmp_path / "none.npz")
    for name in ("", "a", "b"):
        (folder / name).mkdir(exist_ok=True)
        for i in range(8):
            pixels = np.full((8, 8, 3), 9 * i, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
        if not name:
            refused("8 images but no class folders", train, folder)
            assert not out.exists()
    for i in range(8):
        (folder / f"{i}.png").unlink()
        whole = (folder / f"b/{i}.png").read_bytes()
        (folder / f"b/{i}.png").write_bytes(whole[:40])
    refused(r"cannot read the image .*b/\d.png", train, folder)
    shutil.rmtree(out)
    np.savez(images.with_name("thin.npz"), images=np.zeros((20, 8, 8, 3), np.uint8)[:, :, :0])
    refused("thin.npz", train, images.with_name("thin.npz"))


def test_images_too_small_for_the_size_asked_for(whole, copy, tmp_path):
    """Images are enlarged, but not by more than 8."""
    run, _ = whole
    path = tmp_path / "tiny.npz"
    np.savez(path, images=np.zeros((20, 2, 40, 3), np.uint8), labels=np.arange(20) % 4)
    large = elsewhere(
        run, f"data.images.path={path}", "data.images.size=32", "net.num_tokens=256",
        f"data.tokenizer={copy / 'stages/0'}",
    )  # fmt: skip
    refused("40 x 2 pixels, less than 1/8 of size=32", loop.train, large, tmp_path / "run", **ONE)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"data": "images"}, "AiMConfig needs data=CodeData.*it has ImageData"),
        ({"process": "stage"}, "AiMConfig needs process=Autoregressive.*AdversarialReconstruction"),
        ({"net": "stage"}, "VQTokenizerConfig needs data=ImageData.*it has CodeData"),
    ],
)
def test_kinds_that_do_not_go_together(change, words, images):
    run = aim_run(images)
    parts = {"images": run.data.images, "stage": None}
    ((field, value),) = change.items()
    part = parts[value] or getattr(run.stages[0], field)
    refused(words, validate, dataclasses.replace(run, **{field: part}))


# ---------------------------------------------------------------- codes made elsewhere


@pytest.fixture(scope="module")
def other_tokenizer(images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "tokenizer"
    loop.train(tokenizer_run(images, "seed=1", "steps=1"), folder, **ONE)
    return folder


def elsewhere(run, *overrides):
    return apply_overrides(dataclasses.replace(run, stages=()), overrides)


def test_codes_of_another_tokenizer_are_refused(whole, other_tokenizer, tmp_path):
    run, folder = whole
    codes, right = f"data.path={folder / 'codes'}", f"data.tokenizer={folder / 'stages/0'}"
    out = tmp_path / "run"
    wrong = elsewhere(run, codes, f"data.tokenizer={other_tokenizer}")
    refused("is not the tokenizer whose codes .*codes holds", loop.train, wrong, out, **ONE)
    refused("stage:0: this run has 0 stages", loop.train, elsewhere(run, codes), out, **ONE)
    assert not out.exists()
    loop.train(elsewhere(run, codes, right), out, **ONE)
    assert read_lines(out) == read_lines(folder)
    assert not (out / "codes").exists() and not (out / "stages").exists()
    # codes alone can be trained on, but not drawn
    alone = elsewhere(run, codes, "data.tokenizer=")
    assert loop.train(alone, tmp_path / "alone", **ONE).step == 4
    refused(
        "trained on codes alone; name .* data.tokenizer",
        lambda: lintime.load(tmp_path / "alone").tokenizer,
    )


def test_a_tokenizer_that_moved(copy, other_tokenizer, tmp_path):
    moved = tmp_path / "moved"
    (copy / "stages/0").rename(moved)
    refused("stages/0", lambda: lintime.load(copy).tokenizer)
    there = lintime.load(copy, tokenizer=str(moved))
    refused("0 classes", there.generate, [])
    refused("0 rows", there.generate, [1], rows=0)
    assert there.generate([1], seed=3).shape == (1, SIZE, SIZE, 3)
    refused(
        "is not the tokenizer whose codes",
        lintime.load(copy, tokenizer=str(other_tokenizer)).generate,
        [1],
    )


# ---------------------------------------------------------------- mixers and hubs


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["attention", "mamba1"])
def test_other_mixers_train_through_the_same_config(mixer, whole, tmp_path):
    run, folder = whole
    codes, tokenizer = f"data.path={folder / 'codes'}", f"data.tokenizer={folder / 'stages/0'}"
    run = elsewhere(run, codes, tokenizer, f"net.mixer={mixer}", "net.d_intermediate=16")
    validate(run)
    loop.train(run, tmp_path / "run", **ONE)
    lines = read_lines(tmp_path / "run")
    assert np.isfinite([line["loss"] for line in lines[:-1]]).all() and len(lines) == 5
    assert lintime.load(tmp_path / "run").generate([0, 3], guidance=2.0).shape[0] == 2


@pytest.fixture(scope="module")
def hub(whole, tmp_path_factory) -> Path:
    """The trained pipeline as a folder of the hub's layout."""
    pytest.importorskip("safetensors")
    out = tmp_path_factory.mktemp("hub") / "aim-tiny"
    layout, weights, _ = export(whole[1], out, file_format="safetensors")
    assert layout == "aim-hub" and weights == out / "model.safetensors"
    return out


@pytest.mark.slow
def test_from_the_hubs_layout_and_back(whole, hub, tmp_path):
    ours = lintime.load(whole[1])
    read = lintime.load(hub)
    assert_same(read.params, ours.params)
    assert_same(read.tokenizer.params["tokenizer"], ours.tokenizer.params["tokenizer"])
    assert read.config.net.position_offset == 1  # as the published code samples
    assert read.grid == (4, 4) and read.config.sample.top_k == 600
    drawn = read.generate([0, 3], seed=5, guidance=2.0, top_k=4)
    run = convert(hub, tmp_path / "run")
    again = lintime.load(run)
    np.testing.assert_array_equal(again.generate([0, 3], seed=5, guidance=2.0, top_k=4), drawn)
    assert main(["sample", "--run", str(run), "sample.count=2", "sample.top_k=4"]) == 0
    assert len(list((run / "samples").glob("*.png"))) == 1
    export(run, tmp_path / "back", file_format="npz")
    back = lintime.load(tmp_path / "back")
    assert_same(back.params, ours.params)
    assert_same(back.tokenizer.params, again.tokenizer.params)


def test_a_model_by_its_name_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(r"some/aim-tiny is not a directory here.*lintime\[hub\]", lintime.load, "some/aim-tiny")
    asked = []
    fake = types.ModuleType("huggingface_hub")
    fake.snapshot_download = lambda name, **options: asked.append((name, options)) or str(hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    read = lintime.load("some/aim-tiny")
    assert asked[0][0] == "some/aim-tiny" and "*.safetensors" in asked[0][1]["allow_patterns"]
    assert read.generate([2]).shape == (1, SIZE, SIZE, 3)

    def offline(name, **options):
        raise ConnectionError("no route\nto host")

    fake.snapshot_download = offline
    refused(
        r"cannot fetch some/aim-tiny from the hub \(ConnectionError: no route to host\)",
        lintime.load, "some/aim-tiny",
    )  # fmt: skip
