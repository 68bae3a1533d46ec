"""Where labelled images come from, how they are divided, and what each kind of bad input says."""

import pickle
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from lintime.train.data import image_arrays, image_files, write_array_records
from lintime.train.data.image_arrays import Member, open_array
from lintime.train.data.image_sources import find_image_splits, find_images, hold_out
from lintime.train.errors import UserError
from lintime.train.schema import ImageData
from tests.pictures import RNG, assert_same, class_folders, data, encoded, opened, picture, refused

pytestmark = pytest.mark.host


@pytest.fixture
def folder(tmp_path):
    return class_folders(tmp_path / "images")


# ---------------------------------------------------------------- class folders


def test_class_folders(folder):
    Image.fromarray(picture()).convert("RGB").save(folder / "cat" / "UP.JPEG")
    (folder / "cat" / "deep").mkdir()
    Image.fromarray(picture()).save(folder / "cat" / "deep" / "a.bmp")
    for hidden in (".git/x.png", "ant/.x.png", "ant/notes.txt"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"no image")
    splits = find_image_splits(data(folder, validation_fraction=0.0))
    assert list(splits) == ["train"] and splits["train"].class_names == ("ant", "bee", "cat")
    images = splits["train"].images
    assert images.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 7
    assert images.paths[-2:] == ["cat/UP.JPEG", "cat/deep/a.bmp"]
    dataset = opened(data(folder))
    assert (dataset.num_classes, dataset.class_names) == (3, ("ant", "bee", "cat"))
    assert dataset.description == "13 images of 3 classes"


@pytest.mark.parametrize("name", ["val", "validation"])
def test_folders_of_splits(tmp_path, name):
    class_folders(tmp_path / "train")
    class_folders(tmp_path / name, ("cat", "ant"), 2)
    splits = find_image_splits(data(tmp_path))
    assert {k: len(v) for k, v in splits.items()} == {"train": 15, "validation": 4}
    assert splits["validation"].labels.tolist() == [0, 0, 2, 2]
    assert len(find_images(data(tmp_path), "test")) == 4
    class_folders(tmp_path / "test", ("bee",), 1)
    assert find_images(data(tmp_path), "test").labels.tolist() == [1]
    class_folders(tmp_path / "test", ("dog",), 1)
    refused(data(tmp_path), "class folder dog, which the training images do not have", "test")


def test_bad_folders(tmp_path, folder):
    refused(data(tmp_path / "none"), "none' does not exist .*builtin:digits")
    (tmp_path / "empty").mkdir()
    refused(data(tmp_path / "empty"), "holds no class folders; put the images into one sub-folder")
    refused(data(folder / "ant"), "holds 5 images but no class folders")
    refused(data(folder / "ant" / "0.png"), "0.png is neither .*give the folder")
    (folder / "dog").mkdir()
    refused(data(folder), r"class folder .*dog holds no images .*\.png.*add some or remove it")


@pytest.mark.parametrize("content", [b"", b"not an image", "torn"])
def test_unreadable_image_stops_with_its_name(folder, content):
    whole = encoded(Image.fromarray(picture(60, 60)), "PNG")
    bad = folder / "cat" / "bad.png"
    bad.write_bytes(whole[: len(whole) // 2] if content == "torn" else content)
    dataset = opened(
        data(folder, validation_fraction=0.0), batch_size=16
    )  # opens: another is first
    for read in (
        lambda: dataset.batch(0, range(16)),
        lambda: list(dataset.iterate(0, range(16), 1)),
    ):
        with pytest.raises(UserError, match="cannot read the image .*cat/bad.png: ") as error:
            read()
        assert "\n" not in str(error.value)


def test_tiny_image(folder):
    Image.fromarray(picture(3, 90)).save(folder / "cat" / "flat.png")
    config = data(folder, size=32, validation_fraction=0.0)
    with pytest.raises(
        UserError, match=r"flat.png has 90 x 3 pixels, less than 1/8 of size=32; .*24"
    ):
        opened(config, batch_size=16).batch(0, range(16))
    smaller = data(folder, size=24, validation_fraction=0.0)  # 3 * 8 = 24: enlarged
    assert opened(smaller, batch_size=16).batch(0, range(16))["valid"].all()
    refused(data("builtin:digits", size=256), "8 x 8 pixels, less than 1/8 of size=256")


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"size": 0}, "size=0"),
        ({"crop": "left"}, "crop='left' is unknown; use one of random, center"),
        ({"filter": "box"}, "filter='box' is unknown; use one of lanczos"),
        ({"resize": 0.9}, "resize=0.9 makes images smaller than"),
        ({"resize": 1.5, "resize_max": 1.2}, "resize_max=1.2 is less than"),
        ({"workers": -1}, "workers=-1"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
    ],
)
def test_wrong_numbers_say_what_to_set(folder, fields, words):
    refused(data(folder, **fields), words)


def test_empty_validation_and_batch_size(folder):
    refused(data(folder, validation_fraction=0.0), "leaves no validation images", "validation")
    with pytest.raises(UserError, match="batch_size=0"):
        opened(data(folder), batch_size=0)
    with pytest.raises(ValueError, match="split='dev'"):
        opened(data(folder), "dev")


@pytest.mark.parametrize("sizes", [(178, 182, 177), (5,) * 10, (1, 1, 40), (1, 1), (2,), (1,)])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5])
def test_hold_out_is_stratified(sizes, fraction):
    class Images:
        class_names = ()
        labels = np.repeat(np.arange(len(sizes)), sizes)

        def __len__(self):
            return len(self.labels)

        def identity(self, i):
            return f"{i}.png"

    train, held_out = hold_out(Images(), fraction)
    count = sum(sizes)
    assert sorted([*train.indices, *held_out.indices]) == list(range(count))
    wanted = max(1, round(fraction * count)) if fraction and count > 1 else 0
    assert len(held_out) == wanted
    shares = np.bincount(held_out.labels, minlength=len(sizes))
    assert (abs(shares - np.array(sizes) * wanted / count) <= 1.5).all()
    if wanted <= count - len(sizes):
        assert set(train.labels) == set(range(len(sizes)))  # no class lost its last image


# ---------------------------------------------------------------- arrays


def test_npz_and_npy(tmp_path):
    images, labels = RNG.integers(0, 256, (12, 18, 20, 3), np.uint8), np.arange(12) % 3
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    np.savez_compressed(tmp_path / "b.npz", labels=labels.astype(np.uint8)[:, None], x=images)
    np.savez(tmp_path / "c.npz", images, labels, class_names=["x", "y", "z"])
    np.save(tmp_path / "d.npy", images)
    np.save(tmp_path / "d.labels.npy", labels)
    expected = opened(data(tmp_path / "a.npz")).batch(5, range(4))
    for name in ("b.npz", "c.npz", "d.npy"):
        dataset = opened(data(tmp_path / name))
        assert dataset.num_classes == 3 and dataset.num_images == 9
        assert_same(dataset.batch(5, range(4)), expected)
        copy = pickle.loads(pickle.dumps(dataset.batches))
        assert len(pickle.dumps(dataset.batches)) < 5000  # not the pixels
        assert_same(copy.read(5, np.arange(4)), expected)
    assert opened(data(tmp_path / "c.npz")).class_names == ("x", "y", "z")
    assert opened(data(tmp_path / "a.npz")).class_names == ("0", "1", "2")
    mapped = open_array(Member(str(tmp_path / "a.npz"), "images"))
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, images)
    assert isinstance(open_array(Member(str(tmp_path / "d.npy"))), np.memmap)


def test_grey_arrays_and_arrays_without_labels(tmp_path):
    grey = RNG.integers(0, 256, (8, 16, 16), np.uint8)
    np.save(tmp_path / "g.npy", grey)
    np.save(tmp_path / "h.npy", grey[..., None])
    batches = []
    for name in ("g.npy", "h.npy"):
        dataset = opened(data(tmp_path / name, resize=1.0, shuffle=False, crop="center"))
        assert dataset.num_classes == 1 and dataset.description == "6 images of 1 class"
        batches.append(dataset.batch(0, range(4)))
    assert_same(*batches)
    assert (np.ptp(batches[0]["images"], axis=3) == 0).all() and not batches[0]["labels"].any()


def test_folder_of_arrays_divided_by_name(tmp_path):
    for name, count in (("train_0", 6), ("train_1", 4), ("val", 3), ("test", 2)):
        images = RNG.integers(0, 256, (count, 16, 16, 3), np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(count))
    splits = find_image_splits(data(tmp_path))
    assert {k: len(v) for k, v in splits.items()} == {"train": 10, "validation": 3, "test": 2}
    assert splits["train"].read(7)[1] == 1 and "image 1 of" in splits["train"].name(7)
    assert splits["test"].class_names == splits["train"].class_names == tuple("012345")
    np.savez(tmp_path / "val.npz", images=images, labels=[0, 6])
    refused(data(tmp_path), r"labels from 0 to 6, but class ids are 0 to 5 \(6 classes\)")
    np.savez(tmp_path / "val.npz", images=images)
    assert len(find_image_splits(data(tmp_path))["validation"]) == 2
    np.savez(tmp_path / "train_1.npz", images=images)
    refused(data(tmp_path), "train_1.npz has no labels, but other files have")
    (tmp_path / "more.array_record").write_bytes(b"")
    refused(data(tmp_path), "holds both")


def test_bad_arrays(tmp_path):
    images = RNG.integers(0, 256, (6, 16, 16, 3), np.uint8)

    def saved(**arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        return data(tmp_path / "x.npz")

    refused(saved(images=images / 255), r"float64 array of shape \(6, 16, 16, 3\); images must be")
    refused(saved(images=images.transpose(0, 3, 1, 2)), "must be uint8")
    refused(saved(images=images, labels=np.arange(5)), "has 6 images but 5 labels")
    refused(saved(images=images, labels=np.arange(6) - 1), "labels from -1 to 4")
    refused(saved(images=images, labels=np.arange(6) / 2), "must be integers")
    refused(saved(images=images, labels=np.eye(6, dtype=int)), "must be integers")
    refused(saved(images=images, labels=np.int64(1)), "must be integers")
    refused(
        saved(images=images, labels=np.arange(6), class_names=["a", "b"]), r"0 to 1 \(2 classes\)"
    )
    refused(saved(a=images, b=images), "should hold one uint8 array 'images' .* a uint8")
    refused(saved(labels=np.arange(6)), "holds labels int64")
    refused(saved(images=images[:0]), "holds no images")
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    refused(data(tmp_path / "o.npy"), "cannot read .*o.npy")
    (tmp_path / "torn.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:200])
    refused(data(tmp_path / "torn.npz"), "cannot read .*torn.npz")
    (tmp_path / "none.npy").write_bytes(b"")
    refused(data(tmp_path / "none.npy"), "is empty")


# ---------------------------------------------------------------- ArrayRecord


def test_array_record_round_trip(tmp_path):
    images = [picture(18, 20 + i) for i in range(9)]
    path = tmp_path / "r" / "train-00000-of-00002.array_record"
    assert write_array_records(path, images[:6], [0, 1, 2] * 2, ["a", "b", "c"]) == 6
    (tmp_path / "x.png").write_bytes(encoded(Image.fromarray(images[6]), "PNG"))
    others = [tmp_path / "x.png", encoded(Image.fromarray(images[7]), "PNG")]
    second = tmp_path / "r" / "train.array_record-00001-of-00002"
    assert write_array_records(second, others, [0, 1], "abc") == 2
    write_array_records(tmp_path / "r" / "val.array_record", images[8:], [2], "abc")
    splits = find_image_splits(data(tmp_path / "r"))
    assert {k: len(v) for k, v in splits.items()} == {"train": 8, "validation": 1}
    train = splits["train"]
    assert train.class_names == ("a", "b", "c")
    order = [*range(6), 6, 7]
    for i, k in enumerate(order):
        pixels, label = train.read(i)
        np.testing.assert_array_equal(pixels, images[k])
        assert label == k % 3
    dataset = opened(data(tmp_path / "r"))
    assert dataset.description == "8 images of 3 classes"
    copy = pickle.loads(pickle.dumps(dataset.batches))
    assert_same(copy.read(2, np.arange(4)), dataset.batch(2, range(4)))
    globbed = opened(data(tmp_path / "r" / "train*"))  # no validation file: held out
    assert globbed.num_images == 6
    assert opened(data(tmp_path / "r" / "train*"), "validation").num_images == 2


def test_bad_records(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    path = tmp_path / "a.array_record"
    with pytest.raises(UserError, match="image 1 has the label 3, but there are 2 classes"):
        write_array_records(path, [picture()] * 2, [0, 3], ["a", "b"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="name the file"):
        write_array_records(tmp_path / "a.tfrecord", [], [], ["a"])
    write_array_records(path, [picture()] * 6, [0, 1] * 3, ["a", "b"])
    with pytest.raises(UserError, match="classes.json names other classes"):
        write_array_records(path, [picture()], [0], ["a"])
    (tmp_path / "classes.json").write_text('["a"]')
    with pytest.raises(UserError, match=r"label 1, but classes.json names 1 classes \(0 to 0\)"):
        opened(data(tmp_path, validation_fraction=0.0), batch_size=6).batch(0, range(6))
    (tmp_path / "classes.json").unlink()
    refused(data(path), "classes.json is missing or is not a JSON list")
    (tmp_path / "classes.json").write_text('["a"]')
    writer = ArrayRecordWriter(str(path), "group_size:1")
    writer.write(struct.pack("<i", 0) + b"no image")
    writer.close()
    refused(data(tmp_path), "cannot read the image record 0 of")
    path.write_bytes(b"something else")
    refused(data(tmp_path), "as ArrayRecord files")


# ---------------------------------------------------------------- built in


def test_builtin_digits():
    dataset = opened(ImageData(path="builtin:digits", size=16))
    assert dataset.description == "1,707 images of 10 classes"
    assert dataset.class_names == tuple("0123456789")
    pixels, label = find_images(ImageData(path="builtin:digits"), "train").images.read(0)
    assert label == 0 and pixels.shape == (8, 8, 3) and pixels.max() == 239  # level 15 of 16
    held_out = opened(ImageData(path="builtin:digits", size=16), "validation", batch_size=90)
    labels = held_out.batch(0, range(90))["labels"]
    assert np.bincount(labels).tolist() == [9] * 10


def test_builtin_photos():
    config = ImageData(path="builtin:photos", size=32)
    train, held_out = (find_images(config, split) for split in ("train", "validation"))
    assert train.class_names == ("china", "flower")
    assert len(train) == 950 and np.bincount(train.labels).tolist() == [475, 475]
    assert min(t[2] for t in held_out.tiles) >= max(t[2] + t[3] for t in train.tiles)  # columns
    assert train.read(949)[0].shape == held_out.read(0)[0].shape == (128, 128, 3)
    batch = opened(config).batch(3, range(4))
    assert batch["images"].std() > 0.1


def test_without_scikit_learn(monkeypatch):
    image_arrays._builtin.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    refused(ImageData(size=16), r"pip install 'lintime\[image\]'")
    refused(ImageData(path="builtin:cats"), "built-in images are builtin:digits and builtin:photos")


def test_a_division_stays_when_images_come(folder):
    config = data(folder, validation_fraction=0.2)
    before = find_images(config, "validation")
    names = {before.name(i) for i in range(len(before))}
    for name in ("ant", "bee", "cat"):
        for i in range(5):
            Image.fromarray(picture()).save(folder / name / f"a{i}.png")
    after = find_images(config, "validation")
    assert len(names) == 3 and len(after) == 6
    assert names < {after.name(i) for i in range(6)}


def test_hash_of_some_images(folder):
    train = find_images(data(folder), "train")
    whole, part = train.hash_of(range(6)), train.hash_of(range(3))
    assert whole == train.hash_of(range(6)) != part
    path = train.name(5)
    Image.fromarray(picture(50, 50)).save(path)
    assert train.hash_of(range(6)) != whole and train.hash_of(range(3)) == part
    digits = find_images(ImageData(path="builtin:digits"), "train")
    assert digits.hash_of([0, 1]) != digits.hash_of([0, 2])


def test_large_folders_are_sampled(monkeypatch, folder):
    images = find_images(data(folder, validation_fraction=0.0), "train").images
    before = images.fingerprint
    monkeypatch.setattr(image_files, "_SIZED_FILES", 2)
    assert images.fingerprint["content"] != before["content"]
