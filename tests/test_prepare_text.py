"""`lintime prepare text`: captions found, features stored once, resuming, refusals."""

import argparse
import json

import numpy as np
import pytest
from PIL import Image

from lintime.train.data.image_sources import find_image_splits
from lintime.train.data.text_features import TextFeatures
from lintime.train.encoders.text import TextEncoding
from lintime.train.errors import UserError
from lintime.train.prepare import command as prepare
from lintime.train.prepare.text import prepare_text, read_captions
from lintime.train.schema import ImageData


class Letters:
    """Feature t of a text is its letter t, twice."""

    length, width, pooled_width = 6, 2, 3

    def __init__(self, fingerprint="letters", fail_at=None):
        self.fingerprint, self.fail_at, self.calls = fingerprint, fail_at, []

    def encode(self, texts):
        self.calls.append(len(texts))
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        features = np.zeros((len(texts), 6, 2), np.float32)
        for i, text in enumerate(texts):
            features[i, : len(text)] = np.frombuffer(text.encode(), np.uint8)[:, None]
        mask = np.arange(6) < np.array([[len(text)] for text in texts])
        return TextEncoding(features, mask, features.sum((1, 2))[:, None].repeat(3, 1))


@pytest.fixture
def images(tmp_path):
    for name, count in (("train", 7), ("val", 2)):
        for i in range(count):
            folder = tmp_path / "images" / name / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(f"{name[0]}{i}\n")
    return ImageData(path=str(tmp_path / "images"))


def make(images, out, encoder, **kw):
    return prepare_text(images, encoder, out, batch_size=2, shard_size=3, say=lambda _: None, **kw)


def test_features_in_the_order_of_the_images(images, tmp_path):
    encoder = Letters()
    info = make(images, tmp_path / "out", encoder)
    assert info.splits == {"train": 7, "validation": 2} and set(encoder.calls) == {2}
    splits = find_image_splits(images)
    for split, found in splits.items():
        held = TextFeatures(tmp_path / "out", split)
        captions = read_captions(found, images.path)
        order = np.arange(len(found))[::-1]
        rows, want = held.rows(order), encoder.encode([captions[i] for i in order])
        assert len(held) == len(found) and rows.features.dtype == np.float32
        for got, wanted in zip(rows, want, strict=True):
            np.testing.assert_array_equal(got, wanted)
        pixel = [int(found.read(i)[0][0, 0, 0]) for i in range(len(found))]
        assert captions == [f"{split[0]}{i}" for i in pixel]


def test_an_interrupted_run_continues_and_a_finished_one_is_left(images, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    make(images, whole, Letters())
    with pytest.raises(KeyboardInterrupt):
        make(images, out, Letters(fail_at=4))
    with pytest.raises(UserError, match="not a complete folder of features"):
        TextFeatures(out, "train")
    encoder = Letters()
    make(images, out, encoder)
    assert len(encoder.calls) == 4  # of 6 batches two were whole in the first shard
    for path in sorted(whole.glob("*.npy")):
        np.testing.assert_array_equal(np.load(path), np.load(out / path.name))
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in out.iterdir())
    again = Letters()
    make(images, out, again)
    assert not again.calls
    (out / "train-00001.text.npy").write_bytes(b"x")
    with pytest.raises(UserError, match="shard 1 of train in .* is damaged"):
        TextFeatures(out, "train")
    make(images, out, again)
    assert len(again.calls) == 2


def test_captions_of_a_table(images, tmp_path):
    train = find_image_splits(images)["train"]
    names = [f"train/{'ab'[i % 2]}/{i}.png" for i in range(7)]
    rows = [{"file": n, "caption": f'the "{n}", of two'} for n in names]
    jsonl, table = tmp_path / "c.jsonl", tmp_path / "c.csv"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    quoted = lambda text: '"' + text.replace('"', '""') + '"'
    lines = [f"{row['file']},{quoted(row['caption'])}" for row in rows]
    table.write_text("\n".join(["file,caption", *lines]))
    got = read_captions(train, images.path, jsonl)
    assert sorted(got) == sorted(row["caption"] for row in rows)
    assert read_captions(train, images.path, table) == got
    jsonl.write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match="no caption for 6 of 7 images, the first is train/"):
        read_captions(train, images.path, jsonl)
    jsonl.write_text('{"file": "x"}')
    with pytest.raises(UserError, match="KeyError.*every row needs file and caption"):
        read_captions(train, images.path, jsonl)


def test_refusals(images, tmp_path):
    out = tmp_path / "out"
    make(images, out, Letters())
    with pytest.raises(UserError, match="holds features made with encoder=letters"):
        make(images, out, Letters("others"))
    (tmp_path / "images" / "train" / "a" / "0.txt").write_text("new")
    with pytest.raises(UserError, match="holds features made with other captions"):
        make(images, out, Letters())
    (tmp_path / "images" / "train" / "a" / "0.txt").unlink()
    with pytest.raises(UserError, match="no caption for .*0.png.*--captions"):
        make(images, tmp_path / "new", Letters())
    (tmp_path / "images" / "train" / "a" / "0.txt").write_text("t0")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UserError, match="exists and is not a folder of features"):
        make(images, tmp_path / "full", Letters())


def test_features_beyond_float16_are_refused(images, tmp_path):
    class Loud(Letters):
        def encode(self, texts):
            return super().encode(texts)._replace(features=np.full((len(texts), 6, 2), 1e6))

    with pytest.raises(UserError, match="not finite in float16"):
        make(images, tmp_path / "out", Loud())


def test_command(images, tmp_path, monkeypatch, capsys):
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    monkeypatch.setattr("lintime.train.encoders.text.load_text_encoder", lambda *a, **k: Letters())
    words = ["text", images.path, "--encoder", "clip", "--out", str(tmp_path / "out")]
    prepare.run_command(parser.parse_args(words))
    assert "net.context_dim=2 net.context_length=6" in capsys.readouterr().out
    assert len(TextFeatures(tmp_path / "out", "train")) == 7
