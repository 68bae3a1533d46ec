"""Codes folders: batches, views, purity, and what a folder that does not fit says."""

import dataclasses
import json
import pickle

import numpy as np
import pytest

from lintime.train.data import open_code_data
from lintime.train.data.codes import CodesInfo
from lintime.train.data.encoded import has_shard, write_shard
from lintime.train.errors import UserError
from lintime.train.schema import CodeData

INFO = CodesInfo(
    tokenizer="abc", codebook_size=500, grid=(2, 3), size=16, filter="bicubic", views="flip",
    resizes=(1.1, 1.05), class_names=("x", "y", "z"), source={}, shard_size=4,
    splits={"train": 10, "validation": 5},
)  # fmt: skip


def code(split, image, view):
    """Six codes that tell where they come from."""
    return np.array([split == "train", image // 10, image % 10, view, 300, 499])


def write(folder, info=INFO):
    for split in info.splits:
        for shard in info.shards(split):
            images = range(*info.shard_range(split, shard))
            codes = [[code(split, i, v) for v in range(info.num_views(split))] for i in images]
            write_shard(folder, info, split, shard, codes, [i % 3 for i in images])
    (folder / "codes.json").write_text(info.to_json())
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "codes")


def opened(folder, split="train", seed=3, batch_size=4, **fields):
    return open_code_data(CodeData(**fields), folder, split=split, seed=seed, batch_size=batch_size)


def refused(folder, words, split="train", **fields):
    with pytest.raises(UserError, match=words) as error:
        opened(folder, split, **fields)
    assert "\n" not in str(error.value)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_what_a_folder_says(folder):
    data = opened(folder)
    assert (data.tokenizer, data.codebook_size, data.grid, data.num_tokens) == (
        "abc",
        500,
        (2, 3),
        6,
    )
    assert (data.num_images, data.num_classes, data.class_names) == (10, 3, ("x", "y", "z"))
    assert data.description == "10 images of 3 classes, 4 views of 2x3 codes"
    assert opened(folder, "validation").description.endswith("one view of 2x3 codes")
    assert CodesInfo.read(folder / "codes.json") == INFO
    names = sorted(p.name for p in folder.iterdir())
    assert names == sorted(
        ["codes.json"]
        + [f"train-0000{i}.{kind}" for i in range(3) for kind in ("codes.npy", "labels.npz")]
        + [f"validation-0000{i}.{kind}" for i in range(2) for kind in ("codes.npy", "labels.npz")]
    )
    assert np.load(folder / "train-00002.codes.npy").shape == (2, 4, 6)


@pytest.mark.parametrize("size, dtype", [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_stored_type_holds_every_code(tmp_path, size, dtype):
    info = dataclasses.replace(INFO, codebook_size=size, splits={"train": 1})
    write_shard(tmp_path, info, "train", 0, np.full((1, 4, 6), size - 1), [2])
    stored = np.load(info.shard_files(tmp_path, "train", 0)[0])
    assert stored.dtype == dtype and (stored == size - 1).all()


def test_training_draws_every_view_of_every_image(folder):
    data = opened(folder, batch_size=5)
    batches = [data.batch(step, range(5)) for step in range(160)]
    codes = np.concatenate([b["codes"] for b in batches])
    labels = np.concatenate([b["labels"] for b in batches])
    assert codes.dtype == labels.dtype == np.int32 and all(b["valid"].all() for b in batches)
    images, views = codes[:, 1] * 10 + codes[:, 2], codes[:, 3]
    np.testing.assert_array_equal(codes, [code("train", i, v) for i, v in zip(images, views)])
    np.testing.assert_array_equal(labels, images % 3)
    assert (np.bincount(images) == 80).all()  # 80 epochs, each image once in each
    counts = np.zeros((10, 4), int)
    np.add.at(counts, (images, views), 1)
    assert counts.min() >= 6 and abs(counts.sum(0) - 200).max() < 45


def test_batch_is_a_pure_function(folder):
    data = opened(folder)
    ninth = data.batch(9, range(4))
    data.batch(2, range(4))
    assert_same(ninth, data.batch(9, range(4)))
    assert_same(ninth, opened(folder).batch(9, range(4)))
    for step in range(9):  # another process's share
        whole = data.batch(step, range(4))
        assert_same({k: v[[3, 1]] for k, v in whole.items()}, data.batch(step, [3, 1]))
    assert (opened(folder, seed=4).batch(9, range(4))["codes"] != ninth["codes"]).any()
    assert_same(pickle.loads(pickle.dumps(data.batches)).read(9, np.arange(4)), ninth)
    for step, got in enumerate(data.iterate(7, [0, 2], stop=10), 7):
        assert_same(got, data.batch(step, [0, 2]))


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(folder):
    direct, workers = opened(folder), opened(folder, workers=2)
    assert direct.fingerprint == workers.fingerprint
    for step, got in enumerate(workers.iterate(3, [0, 2], stop=9), 3):
        assert_same(got, direct.batch(step, [0, 2]))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_is_in_order_with_invalid_rows_at_the_end(folder, split):
    data = opened(folder, split, batch_size=3)
    batches = list(data.iterate(0, range(3)))
    assert len(batches) == data.num_batches == 2 and data.num_images == 5
    joined = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    assert joined["valid"].tolist() == [True] * 5 + [False]
    np.testing.assert_array_equal(joined["codes"][:5], [code("validation", i, 0) for i in range(5)])
    assert joined["labels"].tolist() == [0, 1, 2, 0, 1, 0] and not joined["codes"][5].any()


def test_a_test_split_of_its_own(tmp_path):
    info = dataclasses.replace(INFO, splits={"train": 2, "validation": 2, "test": 1})
    data = opened(write(tmp_path, info), "test", batch_size=1)
    assert data.num_images == 1 and data.fingerprint["split"] == "test"


def test_fingerprint_tells_codes_and_plan_apart(folder):
    base = opened(folder).fingerprint
    assert json.loads(json.dumps(base)) == base == opened(folder).fingerprint
    others = [
        opened(folder, seed=4), opened(folder, batch_size=2), opened(folder, shuffle=False),
        opened(folder, "validation"),
    ]  # fmt: skip
    prints = [data.fingerprint for data in others]
    path = folder / "train-00001.codes.npy"
    codes = np.load(path)
    codes[1, 2, 3] += 1
    np.save(path, codes)
    prints.append(opened(folder).fingerprint)
    (folder / "codes.json").write_text(dataclasses.replace(INFO, tokenizer="abd").to_json())
    prints.append(opened(folder).fingerprint)
    assert len({json.dumps(p) for p in [*prints, base]}) == len(prints) + 1


def test_folders_that_do_not_fit(tmp_path, folder):
    refused(tmp_path / "none", "none is not a folder of codes .* `lintime prepare codes")
    (folder / "codes.json").rename(folder / "codes.unfinished.json")
    refused(folder, "are not complete; run the same `lintime prepare codes` command")
    for text, words in (
        ("{", "codes.json is damaged"),
        ("[]", "codes.json is damaged"),
        ('{"format": 1}', "codes.json is damaged"),
        (dataclasses.replace(INFO, format=2).to_json(), "has format 2, this version reads 1"),
    ):
        (folder / "codes.json").write_text(text)
        refused(folder, words)
    only_training = dataclasses.replace(INFO, splits={"train": 10})
    (folder / "codes.json").write_text(only_training.to_json())
    assert opened(folder).num_images == 10
    for split in ("validation", "test"):
        refused(folder, r"holds no validation codes \(it has train\)", split)
    refused(folder, "workers=-1", workers=-1)
    with pytest.raises(UserError, match="batch_size=0"):
        opened(folder, batch_size=0)


def test_missing_and_torn_shards(folder):
    assert all(has_shard(folder, INFO, "train", shard) for shard in range(3))
    path = folder / "train-00001.labels.npz"
    labels = path.read_bytes()
    assert has_shard(folder, INFO, "train", 1, "") and not has_shard(folder, INFO, "train", 1, "h")
    for content in (labels[:-4], b"", None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert not has_shard(folder, INFO, "train", 1)
        refused(folder, "train-00001.codes.npy or its labels are missing or damaged; run")
    path.write_bytes(labels)
    np.save(folder / "train-00002.codes.npy", np.zeros((2, 4, 7), np.uint16))
    refused(folder, "train-00002")
