"""`lintime prepare text`: captions found, features stored once, resuming, refusals."""

import argparse
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from lintime.train.data.image_sources import find_image_splits
from lintime.train.data.open import open_split
from lintime.train.data.text_features import TextFeatures
from lintime.train.encoders.text import TextEncoding
from lintime.train.errors import UserError
from lintime.train.prepare import command as prepare
from lintime.train.prepare.text import prepare_text, read_captions
from lintime.train.schema import ImageData, Run


class Letters:
    """Feature t of a text is its letter t, twice."""

    length, width, pooled_width, path = 6, 2, 3, None

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
        rows, want = held.rows(order), encoder.encode([captions[i][0] for i in order])
        assert len(held) == len(found) and rows.features.dtype == np.float16
        assert held.captions(order) == [captions[i][0] for i in order]
        for got, wanted in zip(rows, want, strict=True):
            np.testing.assert_array_equal(got, wanted)
        pixel = [int(found.read(i)[0][0, 0, 0]) for i in range(len(found))]
        assert captions == [(f"{split[0]}{i}",) for i in pixel]


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
    rows = [{"file": n, "caption": f'the "{n}",\u2028of two'} for n in names]
    jsonl, table = tmp_path / "c.jsonl", tmp_path / "c.csv"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    jsonl.write_text("".join(lines), encoding="utf-8")
    quoted = lambda text: '"' + text.replace('"', '""') + '"'
    lines = [f"{row['file']},{quoted(row['caption'])}" for row in rows]
    table.write_text("\n".join(["file,caption", *lines]), encoding="utf-8-sig")
    got = read_captions(train, images.path, jsonl)
    assert sorted(got) == sorted((row["caption"],) for row in rows)
    assert read_captions(train, images.path, table) == got
    more = {"file": names[0], "caption": "again"}
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in [*rows, more]))
    assert sorted(read_captions(train, images.path, jsonl)) == sorted(
        (row["caption"], "again") if row is rows[0] else (row["caption"],) for row in rows
    )
    jsonl.write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match="no caption for 6 of 7 images, the first is train/"):
        read_captions(train, images.path, jsonl)
    jsonl.write_text('{"file": "x"}')
    with pytest.raises(UserError, match="KeyError.*every row needs file and caption"):
        read_captions(train, images.path, jsonl)
    with pytest.raises(UserError, match="name a .jsonl or .csv file with --captions"):
        read_captions(train, images.path, tmp_path / "none.csv")


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


def test_several_captions_of_an_image(images, tmp_path):
    folder = tmp_path / "images" / "train"
    for i in (0, 3, 6):
        (folder / "ab"[i % 2] / f"{i}.txt").write_text(f"t{i}\n\nu{i}\n v{i} \n")
    info = make(images, tmp_path / "out", Letters())
    assert info.splits == {"train": 13, "validation": 2} and info.images["train"] == 7
    held = TextFeatures(tmp_path / "out", "train")
    first = held.captions(np.arange(7))
    assert sorted(first) == [f"t{i}" for i in range(7)]
    letters = lambda uniforms: [chr(int(row[0, 0])) for row in held.rows(range(7), uniforms)[0]]
    assert letters(None) == letters(np.zeros(7)) == ["t"] * 7
    several = [caption in ("t0", "t3", "t6") for caption in first]
    assert letters(np.full(7, 0.5)) == ["u" if more else "t" for more in several]
    assert letters(np.full(7, 0.99)) == ["v" if more else "t" for more in several]
    data = dataclasses.replace(
        images, size=4, resize=1.0, crop="center", text=str(tmp_path / "out")
    )
    run = Run(net=None, data=data, batch_size=4)
    train, again = (open_split(run, "train", tmp_path) for _ in range(2))
    rows = np.arange(4)
    drawn = set()
    for step in range(30):
        batch, same = train.batch(step, rows), again.batch(step, rows[::-1])
        np.testing.assert_array_equal(batch["context"], same["context"][::-1])
        numbers = np.rint((batch["images"][:, 0, 0, 0] + 1) * 127.5).astype(int)
        texts = [bytes(t[:, 0].astype(np.uint8)).rstrip(b"\0").decode() for t in batch["context"]]
        assert [int(text[1:]) for text in texts] == list(numbers)
        assert (batch["context_mask"].sum(1) == 2).all()
        drawn |= set(texts)
    assert drawn == {f"t{i}" for i in range(7)} | {f"{c}{i}" for c in "uv" for i in (0, 3, 6)}
    batch = open_split(run, "validation", tmp_path).batch(0, rows)
    assert (batch["context"][:2] != 0).any((1, 2)).all() and not batch["context"][2:].any()
    assert {"text_encoder": "letters", "text_length": 6}.items() <= train.fingerprint.items()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "a" / "9.png")
    with pytest.raises(UserError, match="7 other train images than the 8 train images of this"):
        open_split(run, "train", tmp_path)


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
    with pytest.raises(UserError, match="IMAGES='nowhere' does not exist"):
        prepare.run_command(parser.parse_args(["text", "nowhere", *words[2:]]))
