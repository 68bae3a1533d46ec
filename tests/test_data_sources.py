"""Where documents come from, how they are divided, and what each kind of bad input says."""

import os

import numpy as np
import pytest

from lintime.train.data import open_data
from lintime.train.data.builtin import python_docs
from lintime.train.data.sources import find_documents, resolve_format, split_by_hash
from lintime.train.errors import UserError
from lintime.train.schema import Data

pytestmark = pytest.mark.host


def documents(config, split, tmp_path):
    found = find_documents(config, split, cache=tmp_path / "cache")
    return [found.read(i, 0, int(n)).tobytes() for i, n in enumerate(found.lengths)]


def opened(config, split="train", batch_size=2, cache="unused"):
    return open_data(config, split=split, seed=0, batch_size=batch_size, cache=cache)


def refused(config, words, split="train", cache="unused"):
    with pytest.raises(UserError, match=words) as error:
        opened(config, split, cache=cache)
    assert "\n" not in str(error.value)


def test_builtin_documents():
    segments = python_docs()
    names = [s.name for s in segments]
    assert len(set(names)) == len(names) > 200
    assert {"topics/lambda", "lib/json/decoder.py", "lib/argparse.py"} < set(names)
    assert not [n for n in names if "/test/" in n or "sysconfigdata" in n]
    total = sum(s.stop for s in segments)
    held_out = split_by_hash(segments, 0.05, "validation")
    training = split_by_hash(segments, 0.05, "train")
    assert 5e6 < total < 2e7
    assert 0.02 < sum(s.stop for s in held_out) / total < 0.1
    assert sorted(held_out + training) == sorted(segments)
    assert {s.name.split("/")[0] for s in held_out} == {"topics", "lib"}


def test_builtin_validation_text_is_not_in_training():
    training = b"\n".join(s.source for s in split_by_hash(python_docs(), 0.05, "train"))
    held_out = split_by_hash(python_docs(), 0.05, "validation")
    lines = [line for s in held_out for line in s.source.split(b"\n") if len(line) >= 70]
    seen = set(training.split(b"\n"))
    assert sum(line in seen for line in lines) < 0.05 * len(lines)


def test_builtin_reads_files_that_are_not_utf8(tmp_path, monkeypatch):
    (tmp_path / "argparse.py").write_bytes(b"# \xff\xfe latin\n")
    (tmp_path / "not_of_the_library.py").write_bytes(b"x")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    segments = python_docs.__wrapped__()
    assert [s.source for s in segments if s.name.startswith("lib/")] == [b"# \xff\xfe latin\n"]


def test_default_config_opens():
    data = opened(Data(), "validation")
    assert data.num_bytes > 10**5 and data.vocab.size == 259


def test_hash_split_is_stable():
    """A document stays on its side when others come or go (a changed rule would mix old splits)."""
    from lintime.train.data.documents import Segment

    segments = [Segment(f"{i}.txt", b"x", 0, 1) for i in range(1000)]
    held_out = {s.name for s in split_by_hash(segments, 0.1, "validation")}
    assert 70 < len(held_out) < 130
    fewer = {s.name for s in split_by_hash(segments[:500], 0.1, "validation")}
    assert fewer == {n for n in held_out if int(n[:-4]) < 500}
    assert sorted(held_out)[:3] == ["1.txt", "104.txt", "133.txt"]


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_two_documents_always_give_both_sides(fraction):
    from lintime.train.data.documents import Segment

    segments = [Segment(name, b"x", 0, 1) for name in ("a.txt", "b.txt")]
    sides = [split_by_hash(segments, fraction, split) for split in ("train", "validation")]
    assert [len(side) for side in sides] == [1, 1] and sides[0] != sides[1]


def test_single_file_is_cut_between_characters(tmp_path):
    path = tmp_path / "book.md"
    path.write_bytes("naïve €uro 日本語 ".encode() * 20)
    whole = path.read_bytes()
    for fraction in np.linspace(0.05, 0.5, 40):
        config = Data(path=str(path), validation_fraction=float(fraction))
        (training,), (held_out,) = (documents(config, s, tmp_path) for s in ("train", "validation"))
        assert training + held_out == whole
        assert abs(len(held_out) - fraction * len(whole)) <= 3.5
        training.decode(), held_out.decode()


def test_any_bytes_are_data(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 2000, dtype=np.uint8).tobytes() + b"\x80" * 9
    (tmp_path / "raw.bin").write_bytes(data)
    config = Data(path=str(tmp_path / "raw.bin"), sequence_len=50, shuffle=False)
    tokens = [opened(config, batch_size=1).batch(i, [0])["targets"] for i in range(30)]
    assert (np.concatenate(tokens).ravel() - 3).astype(np.uint8).tobytes() == data[:1500]


def test_directory_and_glob(tmp_path):
    for name in ("b.txt", "a/x.txt", "a/y.md", ".git/z.txt", "a/.hidden.txt", "empty.txt"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(b"" if name == "empty.txt" else name.encode())
    everything = {"validation_fraction": 0}
    config = Data(path=str(tmp_path / "d"), **everything)
    assert documents(config, "train", tmp_path) == [b"a/x.txt", b"b.txt"]
    config = Data(path=str(tmp_path / "d"), pattern="**/*.md", **everything)
    assert documents(config, "train", tmp_path) == [b"a/y.md"]
    config = Data(path=str(tmp_path / "d" / "**" / "*.*"), **everything)
    assert documents(config, "train", tmp_path) == [b"a/x.txt", b"a/y.md", b"b.txt"]


def test_more_files_than_stay_mapped(tmp_path):
    for i in range(100):
        (tmp_path / f"{i:03d}.txt").write_bytes(b"%03d" % i * 4)
    config = Data(path=str(tmp_path), validation_fraction=0, sequence_len=10, shuffle=False)
    data = opened(config, batch_size=1)
    tokens = np.concatenate([data.batch(i, [0])["targets"][0] for i in range(data.num_sequences)])
    assert data.vocab.decode(tokens) == b"".join(b"%03d" % i * 4 for i in range(100))


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    assert opened(Data(path="~/a.txt", sequence_len=8)).num_bytes == 95


@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_enwik8_split(tmp_path, name):
    path = tmp_path / name
    with open(path, "wb") as file:  # sparse: takes no space
        file.truncate(100_000_000)
        for position, mark in (
            (0, b"A"),
            (89_999_999, b"BC"),
            (94_999_999, b"DE"),
            (99_999_999, b"F"),
        ):
            file.seek(position)
            file.write(mark)
    config = Data(path=str(path), sequence_len=1_000_000, append_eos=True)
    sizes, ends = [], []
    for split in ("train", "validation", "test"):
        data = opened(config, split, batch_size=1)
        sizes.append(data.num_tokens)
        stream = data.batches.stream
        ends.append(
            data.vocab.decode(
                [stream.read(0, 1)[0], stream.read(data.num_tokens - 1, data.num_tokens)[0]]
            )
        )
        assert data.fingerprint["append_eos"] is False
    assert sizes == [90_000_000, 5_000_000, 5_000_000]
    assert ends == [b"AB", b"CD", b"EF"]
    assert opened(config, "validation", batch_size=2).num_batches == 3


def test_enwik8_format_needs_the_raw_file(tmp_path):
    (tmp_path / "enwik8").write_bytes(b"x" * 1000)
    assert resolve_format(Data(path=str(tmp_path / "enwik8"))) == "text"
    refused(
        Data(path=str(tmp_path / "enwik8"), format="enwik8"), "100,000,000 bytes, .*1,000 bytes"
    )
    refused(Data(path=str(tmp_path), format="enwik8"), "a folder")


def test_pg19_folders(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "d" / split).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "d" / split / f"{i}.txt").write_text(f"{split} {i}")
    config = Data(path=str(tmp_path / "d"))
    assert resolve_format(config) == "pg19"
    assert documents(config, "train", tmp_path) == [b"train 0", b"train 1", b"train 2"]
    assert documents(config, "validation", tmp_path) == [b"val 0", b"val 1", b"val 2"]
    assert documents(config, "test", tmp_path) == [b"val 0", b"val 1", b"val 2"]
    (tmp_path / "d" / "test").mkdir()
    (tmp_path / "d" / "test" / "t.txt").write_text("last")
    assert documents(config, "test", tmp_path) == [b"last"]
    (tmp_path / "only" / "train").mkdir(parents=True)
    refused(Data(path=str(tmp_path / "only"), format="pg19"), "matches|holds no files")
    refused(Data(path=str(tmp_path / "only"), format="pg19"), "validation/ or val/", "validation")


# --- images


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (10, 2, 2, 3), dtype=np.uint8)


def planar(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


@pytest.mark.parametrize("layout", ["hwc.npy", "planar.npy", "hwc.npz", "planar.npz", "data.npz"])
def test_image_layouts(tmp_path, images, layout):
    array = planar(images) if "planar" in layout else images
    path = tmp_path / layout
    if layout.endswith(".npy"):
        np.save(path, array)
    elif layout == "data.npz":  # the layout of the downsampled ImageNet files
        np.savez(path, data=planar(images), labels=np.arange(10), mean=np.zeros(12))
    else:
        np.savez_compressed(path, faces=array, labels=np.arange(10))
    config = Data(path=str(path), sequence_len=12, validation_fraction=0.2, shuffle=False)
    for _ in range(2):  # the second time from the cache
        data = opened(config, batch_size=8, cache=tmp_path / "cache")
        want = images.reshape(10, 12).astype(np.int32) + 3
        batch = data.batch(0, range(8))
        np.testing.assert_array_equal(batch["targets"], want[:8])
        np.testing.assert_array_equal(batch["inputs"][:, 0], 1)
        assert (batch["segment_ids"] == 1).all()
        held_out = opened(config, "validation", batch_size=2, cache=tmp_path / "cache")
        np.testing.assert_array_equal(held_out.batch(0, range(2))["targets"], want[8:])
        assert held_out.num_batches == 1


def test_image_folder(tmp_path, images):
    np.save(tmp_path / "train_1.npy", images[:3])
    np.save(tmp_path / "train_2.npy", planar(images[3:6]))
    np.save(tmp_path / "val.npy", images[6:8])
    config = Data(path=str(tmp_path), sequence_len=12)
    assert documents(config, "train", tmp_path) == [i.tobytes() for i in images[:6]]
    assert documents(config, "validation", tmp_path) == [i.tobytes() for i in images[6:8]]
    assert documents(config, "test", tmp_path) == [i.tobytes() for i in images[6:8]]
    np.save(tmp_path / "test.npy", images[8:])
    assert documents(config, "test", tmp_path) == [i.tobytes() for i in images[8:]]
    os.remove(tmp_path / "val.npy")
    config = Data(path=str(tmp_path), sequence_len=12, validation_fraction=0.5)
    assert documents(config, "train", tmp_path) == [i.tobytes() for i in images[:3]]
    assert documents(config, "validation", tmp_path) == [i.tobytes() for i in images[3:6]]


def test_wrong_images(tmp_path, images):
    def saved(name, array):
        np.save(tmp_path / name, array)
        return Data(path=str(tmp_path / name), sequence_len=12)

    good = saved("a.npy", images)
    refused(Data(path=good.path, sequence_len=64), r"12 tokens each; set data.sequence_len=12")
    refused(Data(path=good.path, sequence_len=12, vocab="a.model"), "set data.vocab=bytes")
    refused(
        Data(path=good.path, sequence_len=12, validation_fraction=0), "no validation", "validation"
    )
    refused(saved("float.npy", images / 255), "float64 array .* must be uint8")
    refused(saved("gray.npy", images[..., 0]), "must be uint8")
    refused(saved("flat.npy", images.reshape(10, 12)[:, :11]), "must be uint8")
    np.savez(tmp_path / "labels.npz", labels=np.arange(3), more=np.arange(4))
    refused(Data(path=str(tmp_path / "labels.npz"), sequence_len=12), "holds labels, more")
    (tmp_path / "torn.npz").write_bytes((tmp_path / "labels.npz").read_bytes()[:300])
    refused(Data(path=str(tmp_path / "torn.npz"), sequence_len=12), "not a complete .npz")
    (tmp_path / "torn.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:200])
    refused(Data(path=str(tmp_path / "torn.npy"), sequence_len=12), "cannot read .*torn.npy")
    (tmp_path / "none.npy").write_bytes(b"")
    refused(Data(path=str(tmp_path / "none.npy"), sequence_len=12), "is empty")
    (tmp_path / "e").mkdir()
    refused(Data(path=str(tmp_path / "e"), sequence_len=12, format="images"), "no .npy or .npz")
    np.save(tmp_path / "e" / "a.npy", images)
    np.save(tmp_path / "e" / "b.npy", images[:, :1, :1])
    refused(Data(path=str(tmp_path / "e"), sequence_len=12), "keep one size")
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], object), allow_pickle=True)
    refused(Data(path=str(tmp_path / "pickled.npy"), sequence_len=12), "cannot read|must be uint8")


# --- bad input


def test_missing_and_empty(tmp_path):
    refused(Data(path=str(tmp_path / "none.txt")), "none.txt' does not exist")
    refused(Data(path=str(tmp_path / "*.txt")), "matches no file")
    refused(Data(path="builtin:moby-dick"), "'builtin:python-docs'")
    refused(Data(path="x", format="tfrecord"), "tfrecord' is unknown; use one of auto, text")
    refused(Data(path=str(tmp_path)), "holds no files")
    (tmp_path / "empty.txt").write_bytes(b"")
    refused(Data(path=str(tmp_path / "empty.txt")), r"empty.txt is empty \(0 bytes\)")
    refused(Data(path=str(tmp_path)), "are empty|is empty")
    (tmp_path / "short.txt").write_bytes(b"hello")
    refused(Data(path=str(tmp_path / "short.txt")), "6 tokens, less than one sequence .*at most 6")
    refused(
        Data(path=str(tmp_path / "short.txt"), validation_fraction=0), "leaves no", "validation"
    )


def test_pattern_without_match_names_what_is_there(tmp_path):
    for name in ("a.md", "b.md", "c.py", "LICENSE"):
        (tmp_path / name).write_bytes(b"x")
    refused(Data(path=str(tmp_path)), r"holds 2 \.md, 1 .*example '\*\*/\*\.md'")
    for pattern in ("/abs/*.txt", ""):
        refused(Data(path=str(tmp_path), pattern=pattern), "not a file name pattern")


def test_compressed_file_is_refused(tmp_path):
    (tmp_path / "enwik8.zip").write_bytes(b"PK")
    refused(Data(path=str(tmp_path / "enwik8.zip")), "is compressed; unpack")


def test_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"x" * 99)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root
    refused(
        Data(path=str(tmp_path / "a.txt"), sequence_len=8), "permission denied; make it readable"
    )


def test_file_that_shrank(tmp_path):
    from lintime.train.data import documents as module

    (tmp_path / "a.txt").write_bytes(b"x" * 99)
    data = opened(Data(path=str(tmp_path / "a.txt"), sequence_len=8))
    module.map_bytes.cache_clear()
    (tmp_path / "a.txt").write_bytes(b"x")
    with pytest.raises(UserError, match="has become shorter"):
        data.batch(0, range(2))
