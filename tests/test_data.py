"""Batches: packing, purity, continuation across updates, row subsets, prefetching, fingerprints."""

import gzip
import json
import pickle

import numpy as np
import pytest

from lintime.train.data import (
    evaluation_batches,
    gzip_bits_per_byte,
    image_tokens,
    open_data,
    pack_documents,
    raw_validation_bytes,
)
from lintime.train.data.stream import ArrayTokens, TokenStream
from lintime.train.errors import UserError
from lintime.train.schema import Data

FIELDS = ("inputs", "targets", "mask", "segment_ids")


@pytest.fixture
def folder(tmp_path):
    """30 documents of 20..310 bytes, each made of its own letter pair."""
    rng = np.random.default_rng(0)
    for i in range(30):
        data = rng.integers(97, 123, 20 + 10 * i, dtype=np.uint8).tobytes()
        (tmp_path / "docs" / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "docs" / f"{i % 3}" / f"{i:02d}.txt").write_bytes(data)
    return tmp_path / "docs"


def text(folder, **fields):
    return Data(**{"path": str(folder), "sequence_len": 32, "validation_fraction": 0.3} | fields)


def opened(config, split="train", seed=3, batch_size=4):
    return open_data(config, split=split, seed=seed, batch_size=batch_size)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_packing_by_hand():
    documents = [np.array([5, 6, 7]), np.array([8]), np.array([], int), np.array([9, 10])]
    packed = pack_documents(documents, 4, append_eos=True)
    expected = {
        "targets": [[5, 6, 7, 1], [8, 1, 1, 9], [10, 1, 0, 0]],
        "inputs": [[1, 5, 6, 7], [1, 8, 1, 1], [1, 10, 1, 0]],
        "segment_ids": [[1, 1, 1, 1], [1, 1, 2, 3], [1, 1, 2, 2]],
        "mask": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]],
    }
    assert_same(packed, {k: np.array(v, np.int32) for k, v in expected.items()})
    joined = pack_documents(documents, 4, append_eos=False)
    np.testing.assert_array_equal(joined["targets"], [[5, 6, 7, 8], [9, 10, 0, 0]])
    dropped = pack_documents(documents, 4, append_eos=False, drop_remainder=True)
    np.testing.assert_array_equal(dropped["targets"], [[5, 6, 7, 8]])
    assert pack_documents(documents[1:2], 4, append_eos=True, drop_remainder=True)[
        "targets"
    ].shape == (0, 4)


def test_last_evaluation_batch_is_filled_with_zero_rows():
    packed = pack_documents([np.arange(3, 13)], 4, append_eos=False)
    batches = evaluation_batches(packed, 2)
    for name in FIELDS:
        assert batches[name].shape == (2, 2, 4) and batches[name].dtype == np.int32
        np.testing.assert_array_equal(batches[name].reshape(4, 4)[:3], packed[name])
        assert not batches[name][1, 1].any()  # inputs too: no EOS, no document
    np.testing.assert_array_equal(batches["mask"][1, 0], [1, 1, 0, 0])


def test_image_tokens_are_row_major_bytes():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    np.testing.assert_array_equal(image_tokens(image), np.arange(12) * 20 + 3)


@pytest.mark.parametrize("append_eos", [True, False])
def test_random_access_equals_concatenation(append_eos):
    rng = np.random.default_rng(1)
    documents = [rng.integers(3, 99, n) for n in (4, 1, 0, 17, 3, 0)]
    tail = [1] if append_eos else []
    flat = np.concatenate([[*d, *tail] for d in documents]).astype(np.int32)
    stream = TokenStream(ArrayTokens(documents), append_eos=append_eos)
    assert len(stream) == len(flat)
    for start in range(len(flat) + 2):
        for stop in range(start, len(flat) + 4):
            want = np.zeros(stop - start, np.int32)
            want[: max(0, min(stop, len(flat)) - start)] = flat[start:stop]
            np.testing.assert_array_equal(stream.read(start, stop), want)


def test_training_stream_is_the_documents(folder):
    """Unshuffled training batches spell out the training documents, in order, EOS after each."""
    data = opened(text(folder, shuffle=False))
    raw = [data.documents.read(i, 0, n).tobytes() for i, n in enumerate(data.documents.lengths)]
    tokens = np.concatenate([[*(b + 3 for b in document), 1] for document in raw])
    count = len(tokens) // 32
    assert data.num_sequences == count and data.num_batches is None
    steps = -(-count // 4)
    targets = np.concatenate([data.batch(i, range(4))["targets"] for i in range(steps)])
    np.testing.assert_array_equal(targets[:count].ravel(), tokens[: count * 32])
    np.testing.assert_array_equal(targets[count:], targets[: len(targets) - count])  # epoch 2


def test_batch_is_a_pure_function(folder):
    data = opened(text(folder))
    ninth = data.batch(9, range(4))
    data.batch(2, range(4))
    assert_same(ninth, data.batch(9, range(4)))
    assert_same(ninth, opened(text(folder)).batch(9, range(4)))
    other = opened(text(folder), seed=4).batch(9, range(4))
    assert (other["targets"] != ninth["targets"]).any()
    for name in FIELDS:
        assert ninth[name].shape == (4, 32) and ninth[name].dtype == np.int32
    assert ninth["start"].dtype == bool and ninth["start"].shape == (4,)


def test_an_epoch_visits_every_sequence_once_and_the_next_in_another_order(folder):
    data = opened(text(folder), batch_size=1)
    n = data.num_sequences
    epochs = [[data.batch(e * n + i, [0])["targets"].tobytes() for i in range(n)] for e in (0, 1)]
    assert len(set(epochs[0])) == n and set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


def test_rows_of_processes_make_the_whole_batch(folder):
    """However the rows are shared out, the global batch is the same, without overlap."""
    data = opened(text(folder, update_len=8), batch_size=6)
    for step in (0, 5, 21):
        whole = data.batch(step, range(6))
        for shares in ([range(3), range(3, 6)], [[5, 0], [2, 1], [4, 3]], [[], range(6)]):
            rows = np.concatenate([np.asarray(share, int) for share in shares])
            parts = [data.batch(step, share) for share in shares]
            joined = {name: np.concatenate([part[name] for part in parts]) for name in whole}
            assert_same({k: v[rows] for k, v in whole.items()}, joined)


def test_update_continues_the_previous_one(folder):
    """T/U updates side by side are the T-long sequences: tokens, documents and all."""
    whole, parts = opened(text(folder)), opened(text(folder, update_len=8))
    assert parts.updates_per_sequence == 4 and whole.updates_per_sequence == 1
    for group in range(12):
        sequence = whole.batch(group, range(4))
        updates = [parts.batch(4 * group + k, range(4)) for k in range(4)]
        for name in FIELDS:
            joined = np.concatenate([u[name] for u in updates], axis=1)
            np.testing.assert_array_equal(joined, sequence[name], err_msg=name)
        assert [u["start"].tolist() for u in updates] == [[True] * 4] + [[False] * 4] * 3
    assert max(whole.batch(g, range(4))["segment_ids"].max() for g in range(12)) > 1


def test_iterate_resumes_anywhere(folder):
    data = opened(text(folder, update_len=16))
    direct = [data.batch(step, [1, 3]) for step in range(12)]
    for start in (0, 1, 7):
        batches = list(data.iterate(start, [1, 3], stop=12))
        assert len(batches) == 12 - start
        for got, want in zip(batches, direct[start:], strict=True):
            assert_same(got, want)
    endless = data.iterate(10**6, [0])
    assert_same(next(endless), data.batch(10**6, [0]))
    endless.close()
    assert list(data.iterate(5, [0], stop=5)) == []


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(folder):
    direct = opened(text(folder, update_len=16))
    workers = opened(text(folder, update_len=16, workers=2))
    assert workers.fingerprint == direct.fingerprint
    for start in (0, 5):
        batches = list(workers.iterate(start, [0, 2], stop=9))
        assert len(batches) == 9 - start
        for step, got in enumerate(batches, start):
            assert_same(got, direct.batch(step, [0, 2]))


def test_reader_pickles(folder):
    data = opened(text(folder))
    copy = pickle.loads(pickle.dumps(data.batches))
    assert_same(copy.read(5, np.arange(4)), data.batch(5, range(4)))


def test_evaluation_visits_everything_once(folder):
    config = text(folder, update_len=8)
    data = opened(config, "validation", batch_size=4)
    assert data.updates_per_sequence == 1
    batches = list(data.iterate(0, range(4)))
    assert len(batches) == data.num_batches == -(-data.num_sequences // 4)
    raw = [data.documents.read(i, 0, n) for i, n in enumerate(data.documents.lengths)]
    packed = pack_documents([r.astype(np.int32) + 3 for r in raw], 32, append_eos=True)
    want = evaluation_batches(packed, 4)
    for name in FIELDS:
        np.testing.assert_array_equal(np.stack([b[name] for b in batches]), want[name])
    assert all(b["start"].all() for b in batches)
    assert sum(int(b["mask"].sum()) for b in batches) == data.num_tokens
    with pytest.raises(IndexError, match="outside"):
        data.batch(data.num_batches, range(4))
    test = opened(config, "test", batch_size=4)  # no test split: the validation one
    assert test.fingerprint["content"] == data.fingerprint["content"]


def test_raw_bytes_are_those_that_the_evaluation_predicts(folder):
    data = opened(text(folder), "validation")
    raw = b"".join(
        data.documents.read(i, 0, n).tobytes() for i, n in enumerate(data.documents.lengths)
    )
    assert raw_validation_bytes(data) == raw and len(raw) == data.num_bytes
    first = data.batch(0, range(4))["targets"].ravel()
    assert raw_validation_bytes(data, 1) == data.vocab.decode(first)
    assert raw_validation_bytes(data, 10**6) == raw
    assert gzip_bits_per_byte(raw) == 8 * len(gzip.compress(raw, 9)) / len(raw)
    assert gzip_bits_per_byte(b"") == 0


def test_rows_outside_the_batch_are_refused(folder):
    data = opened(text(folder))
    for rows in ([4], [-1]):
        with pytest.raises(ValueError, match="outside the batch of 4"):
            data.batch(0, rows)
        with pytest.raises(ValueError, match="outside the batch of 4"):
            next(data.iterate(0, rows))
    with pytest.raises(IndexError):
        data.batch(-1, [0])


def test_fewer_sequences_than_rows_repeat(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(65, 91)) * 3)
    data = opened(Data(path=str(tmp_path / "a.txt"), sequence_len=32), batch_size=8)
    assert data.num_sequences == 2
    targets = data.batch(0, range(8))["targets"]
    assert len(np.unique(targets, axis=0)) == 2 and targets.all()


def test_fingerprint_tells_data_and_plan_apart(folder):
    config = text(folder)
    base = opened(config).fingerprint
    assert json.loads(json.dumps(base)) == base == opened(config).fingerprint
    changes = [
        opened(text(folder, sequence_len=16)),
        opened(text(folder, update_len=16)),
        opened(text(folder, append_eos=False)),
        opened(text(folder, shuffle=False)),
        opened(config, seed=4),
        opened(config, batch_size=2),
        opened(config, split="validation"),
    ]
    prints = [json.dumps(data.fingerprint, sort_keys=True) for data in changes]
    assert len({*prints, json.dumps(base, sort_keys=True)}) == len(changes) + 1
    assert opened(text(folder, workers=2)).fingerprint == base  # how it is read does not count
    first = opened(config).documents.segments[0].source
    with open(first, "r+b") as file:  # one byte of one document
        file.write(b"#")
    assert opened(config).fingerprint["content"] != base["content"]


def test_large_content_is_sampled(monkeypatch, folder):
    from lintime.train.data import documents

    data = opened(text(folder)).documents
    exact = documents.content_hash(data)
    monkeypatch.setattr(documents, "FULL_HASH_BYTES", 100)
    sampled = documents.content_hash(data)
    assert sampled != exact and sampled == documents.content_hash(data)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"sequence_len": 0}, "sequence_len=0"),
        ({"update_len": 5}, "update_len=5 does not divide data.sequence_len=32"),
        ({"update_len": 64}, "does not divide"),
        ({"workers": -1}, "workers=-1"),
        ({"sequence_len": 10**6}, "set data.sequence_len to at most"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
    ],
)
def test_wrong_numbers_say_what_to_set(folder, fields, words):
    with pytest.raises(UserError, match=words) as error:
        opened(text(folder, **fields))
    assert "\n" not in str(error.value)


def test_batch_size_must_be_positive(folder):
    with pytest.raises(UserError, match="batch_size=0"):
        opened(text(folder), batch_size=0)


def test_validation_shorter_than_a_sequence_is_padded(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    data = opened(Data(path=str(tmp_path / "a.txt"), sequence_len=64), "validation", batch_size=2)
    batch = data.batch(0, range(2))
    assert data.num_batches == 1 and batch["mask"].sum() == 6  # five bytes and EOS
