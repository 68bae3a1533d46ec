"""Encoding images into codes: what is written, resuming, processes, refusals, the command."""

import argparse
import hashlib
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lintime.train.data import open_code_data
from lintime.train.data.crops import to_unit, views_of
from lintime.train.data.image_sources import find_image_splits
from lintime.train.errors import UserError
from lintime.train.prepare import command as prepare, encode
from lintime.train.prepare.command import prepare_codes
from lintime.train.schema import CodeData, ImageData

SIZE = 8


class Patches:
    """Code = how bright a patch of 4 x 4 pixels is, in 1,000 levels."""

    codebook_size, downsample = 1000, 4

    def __init__(self, fingerprint="patches", fail_at=None):
        self.fingerprint, self.fail_at, self.calls, self.shardings = fingerprint, fail_at, 0, set()
        self._encode = jax.jit(self.definition)

    @staticmethod
    def definition(images):
        b, s, _, _ = images.shape
        means = images.reshape(b, s // 4, 4, s // 4, 4, 3).mean((2, 4, 5))
        return jnp.clip(jnp.floor((means + 1) * 500), 0, 999).astype(jnp.int32)

    def encode(self, images):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.shardings.add((images.shape, images.dtype.name, len(images.sharding.device_set)))
        return self._encode(images)


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 11), ("val", 5)):
        for i in range(count):
            folder = tmp_path / "images" / name / "abc"[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (20, 18 + i, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return ImageData(path=str(tmp_path / "images"), size=SIZE, filter="bicubic")


def run(images, out, tokenizer=None, **options):
    options = {"resizes": (1.5, 1.25), "batch_size": 24, "shard_size": 3} | options
    lines = []
    info = prepare_codes(images, tokenizer or Patches(), out, say=lines.append, **options)
    return info, lines


def contents(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def refused(images, out, words, tokenizer=None, **options):
    before = contents(out) if out.is_dir() else None
    with pytest.raises(UserError, match=words) as error:
        run(images, out, tokenizer, **options)
    assert "\n" not in str(error.value)
    assert (contents(out) if out.is_dir() else None) == before  # nothing lost


@pytest.mark.parametrize("views", ["center", "flip", "ten"])
def test_codes_are_those_of_the_crops(images, tmp_path, views):
    tokenizer = Patches()
    info, lines = run(images, tmp_path / "out", tokenizer, views=views)
    assert info.splits == {"train": 11, "validation": 5} and info.grid == (2, 2)
    assert info.tokenizer == "patches" and info.class_names == ("a", "b", "c")
    assert lines[0].startswith("encoding 16 images of 3 classes (11 train + 5 validation), ")
    assert lines[1].endswith("crops of a training image")
    # one shape for all, on all devices
    assert tokenizer.shardings == {((24, SIZE, SIZE, 3), "float32", jax.device_count())}
    for split, found in find_image_splits(images).items():
        resizes, kind = ((1.5, 1.25), views) if split == "train" else ((1.5,), "center")
        stored = [
            [np.load(path) for path in info.shard_files(tmp_path / "out", split, shard)]
            for shard in info.shards(split)
        ]
        codes = np.concatenate([codes for codes, _ in stored])
        labels = np.concatenate([archive["labels"] for _, archive in stored])
        assert codes.dtype == np.uint16
        np.testing.assert_array_equal(labels, found.labels)
        for i in range(len(found)):
            pixels, _ = found.read(i)
            common = dict(size=SIZE, filter="bicubic", views=kind)
            crops = np.concatenate([views_of(pixels, resize=r, **common) for r in resizes])
            expected = np.asarray(Patches.definition(to_unit(crops))).reshape(len(crops), 4)
            np.testing.assert_array_equal(codes[i], expected)


def test_training_on_what_was_prepared(images, tmp_path):
    run(images, tmp_path / "out")
    data = open_code_data(CodeData(), tmp_path / "out", split="train", seed=0, batch_size=4)
    assert data.description == "11 images of 3 classes, 20 views of 2x2 codes"
    assert data.batch(0, range(4))["codes"].shape == (4, 4) and data.tokenizer == "patches"


@pytest.mark.parametrize("batch_size", [1, 16, 1000])
def test_batch_size_changes_nothing(images, tmp_path, batch_size):
    run(images, tmp_path / "a")
    run(images, tmp_path / "b", batch_size=batch_size)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_interrupted_run_continues_and_a_finished_one_is_left(images, tmp_path):
    whole, out = Patches(), tmp_path / "out"
    run(images, tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        run(images, out, Patches(fail_at=8))  # 3 images of 20 crops are 3 batches of 24
    assert "codes.json" not in contents(out) and "codes.unfinished.json" in contents(out)
    with pytest.raises(UserError, match="not complete"):
        open_code_data(CodeData(), out, split="train", seed=0, batch_size=4)
    rest = Patches()
    (out / ".train-00003.codes.npy.123.tmp").write_bytes(b"half")  # of a process that was killed
    _, lines = run(images, out, rest, shard_size=5)  # the folder's own shard size holds
    assert "continuing: 2 of 6 shards are there" in lines[0]
    assert rest.calls == whole.calls - 6
    (out / ".train-00003.codes.npy.123.tmp").unlink()
    assert contents(out) == contents(tmp_path / "whole")
    idle = Patches()
    info, lines = run(images, out, idle)
    assert idle.calls == 0 and lines == [
        f"{out} already holds the codes of 16 images of 3 classes (11 train + 5 validation), 20 "
        "crops of a training image"
    ]
    (out / "train-00001.labels.npz").unlink()  # lost: made again
    run(images, out, rest)
    assert contents(out) == contents(tmp_path / "whole")


def test_processes_share_the_shards(images, tmp_path, monkeypatch):
    run(images, tmp_path / "one")
    out, barriers = tmp_path / "two", []

    def meet(name, failure=None):
        barriers.append(name)
        if failure:
            raise failure

    monkeypatch.setattr(encode, "_barrier", meet)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    _, lines = run(images, out)
    assert lines == [] and barriers == ["looked", "plan", "shards", "complete", "done"]
    names = {n.split(".")[0] for n in contents(out)}
    assert names == {"train-00001", "train-00003", "validation-00001"}
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    (out / "codes.unfinished.json").write_text((tmp_path / "one" / "codes.json").read_text())
    _, lines = run(images, out)
    assert len(lines) == 2 and contents(out) == contents(tmp_path / "one")
    # folders that the processes do not share
    with pytest.raises(UserError, match="train-00001.codes.npy is not there .* shared file system"):
        run(images, tmp_path / "three")
    assert "codes.json" not in contents(tmp_path / "three")


def test_other_tokenizer_images_and_settings_are_refused(images, tmp_path):
    out = tmp_path / "out"
    run(images, out)
    other = Patches("others")
    refused(
        images, out, "made with another tokenizer .fingerprint patches, this one has others", other
    )
    refused(images, out, r"made with views=ten \(here flip\); give another --out", views="flip")
    refused(images, out, r"made with resizes=\[1.5, 1.25\] \(here \[1.5\]\)", resizes=(1.5,))
    refused(ImageData(**{**vars(images), "filter": "lanczos"}), out, "made with filter=bicubic")
    pixels = np.zeros((9, 9, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "val" / "a" / "new.png")
    refused(images, out, "made with other images")
    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path / "begun", Patches(fail_at=2))
    refused(images, tmp_path / "begun", "another tokenizer", other)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    refused(images, tmp_path / "full", "exists and is not a folder of codes")


def test_wrong_settings(images, tmp_path):
    out = tmp_path / "out"
    size = ImageData(**{**vars(images), "size": 10})
    refused(size, out, "size=10 is not divisible by 4, .*; set size=8")
    refused(images, out, "views='two' is unknown; use one of center, flip, ten", views="two")
    for resizes in ((), (0.9,), (1.1, 1.1)):
        refused(images, out, "resizes=.*at least 1, e.g. 1.1", resizes=resizes)
    refused(images, out, "batch=0", batch_size=0)
    assert not out.exists()


def test_a_bad_image_stops_and_what_is_done_is_kept(images, tmp_path):
    out, bad = tmp_path / "out", tmp_path / "images" / "train" / "c" / "02.png"
    good = bad.read_bytes()  # image 8 of 11: in the third shard
    bad.write_bytes(good[:60])
    for _ in range(2):
        with pytest.raises(UserError, match="cannot read the image .*train/c/02.png"):
            run(images, out)
        assert sum("codes.npy" in name for name in contents(out)) == 2
    bad.write_bytes(good)  # names and numbers are the same, a size is not
    tokenizer = Patches()
    _, lines = run(images, out, tokenizer)
    assert "2 of 6 shards are there" in lines[0] and tokenizer.calls == 3 + 2 + 2
    run(images, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_images_that_change_before_the_end(images, tmp_path):
    """An image goes: shards before it stay, shards behind it are made again."""
    out, path = tmp_path / "out", tmp_path / "images" / "train" / "b" / "01.png"  # image 4 of 11
    with pytest.raises(KeyboardInterrupt):
        run(images, out, Patches(fail_at=11))  # three shards are done
    gone = path.read_bytes()
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        run(images, out, Patches(fail_at=1))
    assert sum("codes.npy" in name for name in contents(out)) == 1  # no stale shard stays
    _, lines = run(images, out)
    assert "1 of 6 shards are there" in lines[0]
    run(images, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    path.write_bytes(gone)
    refused(images, out, "made with other images")  # a finished folder is not touched
    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path / "begun", Patches(fail_at=5))
    for name in ("train", "val"):
        for file in (tmp_path / "images" / name).glob("*/*"):
            file.rename(file.with_stem(file.stem + "x"))
    refused(images, tmp_path / "begun", "made with other images")  # not one shard would stay


def test_tiny_image_is_named(images, tmp_path):
    tiny = tmp_path / "images" / "train" / "b" / "tiny.png"
    Image.fromarray(np.zeros((40, 3, 3), np.uint8)).save(tiny)
    with pytest.raises(UserError, match="tiny.png has 3 x 40 pixels, less than 1/8 of size=32"):
        run(ImageData(**{**vars(images), "size": 32}), tmp_path / "out")


@pytest.mark.parametrize("value, words", [(1000, "gave codes 1000"), (-1, "gave codes -1")])
def test_codes_out_of_range_are_a_bug(images, tmp_path, value, words):
    broken = Patches()
    broken._encode = lambda x: jnp.full((len(x), 2, 2), value)
    with pytest.raises(ValueError, match=words):
        run(images, tmp_path / "out", broken)
    broken._encode = lambda x: jnp.zeros((len(x), 4, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"not 0..999 of \(2, 2\)"):
        run(images, tmp_path / "out", broken)


def test_command(images, tmp_path, monkeypatch, capsys):
    loaded = []
    module = types.ModuleType("lintime.train.encoders.tokenizer")
    module.load_tokenizer = lambda path: loaded.append(path) or Patches()
    monkeypatch.setitem(sys.modules, "lintime.train.encoders.tokenizer", module)
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    out = tmp_path / "out"
    words = ["codes", images.path, "--tokenizer", "vq.pt", "--out", str(out), "--size", "8"]
    words += ["--views", "flip", "--resizes", "1.5", "--batch", "16"]
    prepare.run_command(parser.parse_args(words))
    assert loaded == ["vq.pt"]
    saved = json.loads((out / "codes.json").read_text())
    assert (saved["views"], saved["resizes"], saved["filter"]) == ("flip", [1.5], "bicubic")
    assert f"data.path={out} data.tokenizer=vq.pt" in capsys.readouterr().out
    defaults = parser.parse_args([*words[:6]])
    assert (defaults.size, defaults.views, defaults.resizes) == (256, "ten", [1.1, 1.05])
