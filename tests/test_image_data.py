"""Labelled images: sources, decoding, crops, purity of batches, and what bad input says."""

import io
import json
import pickle
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from lintime.train.data import image_arrays, image_files, open_image_data, write_array_records
from lintime.train.data.batches import pick, row_uniforms
from lintime.train.data.crops import center_crop, resize_shorter, to_unit, views_of
from lintime.train.data.image_arrays import Member, open_array
from lintime.train.data.image_files import decode_image
from lintime.train.data.image_sources import find_image_splits, find_images, hold_out
from lintime.train.errors import UserError
from lintime.train.schema import ImageData

RNG = np.random.default_rng(0)


def picture(height=20, width=24):
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def opened(config, split="train", seed=3, batch_size=4):
    return open_image_data(config, split=split, seed=seed, batch_size=batch_size)


def data(path, **fields):
    return ImageData(**{"path": str(path), "size": 16, "validation_fraction": 0.25} | fields)


def refused(config, words, split="train"):
    with pytest.raises(UserError, match=words) as error:
        opened(config, split).batch(0, range(4))
    assert "\n" not in str(error.value)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def class_folders(root, classes=("ant", "bee", "cat"), count=5):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(picture(20 + i, 24)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return class_folders(tmp_path / "images")


# ---------------------------------------------------------------- decoding


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_every_format_and_mode_becomes_rgb():
    pixels = picture()
    image = Image.fromarray(pixels)
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        np.testing.assert_array_equal(decode_image(encoded(image, kind), "x"), pixels)
    smooth = Image.fromarray(np.full((20, 24, 3), (200, 80, 30), np.uint8))
    cmyk = encoded(smooth.convert("CMYK"), "JPEG", quality=95)
    for data in (encoded(smooth, "JPEG", quality=95), encoded(smooth, "WEBP"), cmyk):
        got = decode_image(data, "x")
        assert got.shape == (20, 24, 3) and got.dtype == np.uint8
        assert abs(got.astype(int) - (200, 80, 30)).max() < 12
    grey = encoded(image.convert("L"), "PNG")
    np.testing.assert_array_equal(
        decode_image(grey, "x"), np.repeat(np.asarray(image.convert("L"))[..., None], 3, 2)
    )
    deep = Image.fromarray((np.arange(480, dtype=np.uint16) * 130).reshape(20, 24))
    np.testing.assert_array_equal(
        decode_image(encoded(deep, "PNG"), "x")[..., 1], np.asarray(deep) >> 8
    )
    palette = image.quantize(16)
    np.testing.assert_array_equal(
        decode_image(encoded(palette, "PNG"), "x"), np.asarray(palette.convert("RGB"))
    )
    first, second = Image.new("L", (9, 9), 10), Image.new("L", (9, 9), 200)
    gif = encoded(first, "GIF", save_all=True, append_images=[second])
    assert (decode_image(gif, "x") == 10).all()


def test_transparency_lies_on_white():
    image = np.zeros((4, 4, 4), np.uint8)
    image[0] = (10, 20, 30, 255)
    got = decode_image(encoded(Image.fromarray(image), "PNG"), "x")
    assert (got[0] == (10, 20, 30)).all() and (got[1:] == 255).all()


def test_exif_orientation_is_applied():
    pixels = picture(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    got = decode_image(encoded(Image.fromarray(pixels), "PNG", exif=exif), "x")
    np.testing.assert_array_equal(got, np.rot90(pixels, -1))


# ---------------------------------------------------------------- crops


def adm_center_crop(pixels, size):
    """ADM's preprocessing, from its description."""
    image = Image.fromarray(pixels)
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(20, 24), (65, 131), (300, 47), (16, 16), (8, 11), (33, 32)])
def test_bicubic_centre_crop_is_that_of_adm(shape):
    pixels = picture(*shape)
    got = center_crop(resize_shorter(pixels, 16, "bicubic"), 16)
    np.testing.assert_array_equal(got, adm_center_crop(pixels, 16))


def test_other_filters_resize_in_one_step():
    pixels = picture(67, 131)
    got = resize_shorter(pixels, 16, "lanczos")
    expected = Image.fromarray(pixels).resize((int(16 * 131 / 67), 16), Image.LANCZOS)
    np.testing.assert_array_equal(got, np.asarray(expected))
    small = picture(4, 4)
    np.testing.assert_array_equal(
        resize_shorter(small, 8, "nearest"), small.repeat(2, 0).repeat(2, 1)
    )
    assert resize_shorter(small, 4, "lanczos") is not None and np.array_equal(
        resize_shorter(small, 4, "lanczos"), small
    )


def test_ten_crop_by_hand():
    square = np.arange(25, dtype=np.uint8).reshape(5, 5, 1).repeat(3, 2)
    views = views_of(square, resize=5 / 3, size=3, filter="bicubic", views="ten")
    assert views.shape == (10, 3, 3, 3) and views.dtype == np.uint8
    assert views[:, 0, 0, 0].tolist() == [0, 2, 10, 12, 6, 4, 2, 14, 12, 8]
    assert views[:, 2, 2, 0].tolist() == [12, 14, 22, 24, 18, 12, 10, 22, 20, 16]
    flip = views_of(square, resize=5 / 3, size=3, filter="bicubic", views="flip")
    np.testing.assert_array_equal(flip, [views[4], views[4][:, ::-1]])
    centre = views_of(square, resize=5 / 3, size=3, filter="bicubic", views="center")
    np.testing.assert_array_equal(centre, views[4:5])


def test_views_are_cut_from_a_centred_square():
    pixels = picture(90, 200)
    wide = views_of(pixels, resize=1.1, size=20, filter="bicubic", views="ten")
    square = adm_center_crop(pixels, 22)
    np.testing.assert_array_equal(wide[0], square[:20, :20])
    np.testing.assert_array_equal(wide[8], square[2:, ::-1][:, 2:])


def test_scaling():
    got = to_unit(np.array([0, 255, 51], np.uint8))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [-1, 1, 51 / 127.5 - 1], atol=1e-7)


def test_random_numbers_depend_on_seed_step_and_row_only():
    whole = row_uniforms(5, 7, np.arange(50), 4)
    np.testing.assert_array_equal(row_uniforms(5, 7, np.array([49, 3, 0]), 4), whole[[49, 3, 0]])
    assert row_uniforms(5, 7, np.array([], int), 4).shape == (0, 4)
    assert (0 <= whole).all() and (whole < 1).all() and abs(whole.mean() - 0.5) < 0.07
    others = [row_uniforms(6, 7, np.arange(50), 4), row_uniforms(5, 8, np.arange(50), 4)]
    assert len(np.unique(np.concatenate([whole, *others]))) == 600
    assert row_uniforms(-1, 2**40, np.array([0]), 1).shape == (1, 1)
    # Written down once: a run continued by another version must see the same crops.
    np.testing.assert_allclose(row_uniforms(0, 0, np.array([0]), 2)[0], FIRST_DRAWS, atol=1e-9)
    assert [pick(u, 3) for u in (0.0, 0.34, 0.999999999)] == [0, 1, 2]


FIRST_DRAWS = [0.011546754286331562, 0.24154919656271812]


# ---------------------------------------------------------------- batches


def test_training_batch(folder):
    batch = opened(data(folder)).batch(0, range(4))
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "images": ((4, 16, 16, 3), "float32"),
        "labels": ((4,), "int32"),
        "valid": ((4,), "bool"),
    }
    assert batch["valid"].all() and abs(batch["images"]).max() <= 1


@pytest.mark.parametrize("fields", [{}, {"flip": True, "resize_max": 2.0, "filter": "bicubic"}])
def test_batch_is_a_pure_function(folder, fields):
    config = data(folder, **fields)
    dataset = opened(config)
    ninth = dataset.batch(9, range(4))
    dataset.batch(2, range(4))
    assert_same(ninth, dataset.batch(9, range(4)))
    assert_same(ninth, opened(config).batch(9, range(4)))
    rows = {name: value[[3, 1]] for name, value in ninth.items()}
    assert_same(rows, dataset.batch(9, [3, 1]))  # another process's share
    assert (opened(config, seed=4).batch(9, range(4))["images"] != ninth["images"]).any()
    copy = pickle.loads(pickle.dumps(dataset.batches))
    assert_same(copy.read(9, np.arange(4)), ninth)
    for step, got in enumerate(dataset.iterate(7, [0, 2], stop=10), 7):
        assert_same(got, dataset.batch(step, [0, 2]))


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_errors(folder):
    direct, workers = opened(data(folder)), opened(data(folder, workers=2))
    assert direct.fingerprint == workers.fingerprint
    expected = [direct.batch(step, [0, 2]) for step in range(3, 8)]
    batches = workers.iterate(3, [0, 2], stop=1000)
    for want in expected:
        assert_same(next(batches), want)
    for path in folder.glob("*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot read the image .*png"):
        list(batches)


def test_crops_flips_and_scales_vary_and_come_from_the_image(tmp_path):
    image = np.zeros((40, 40, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(40) * 6, np.arange(40)[:, None] * 6
    np.save(tmp_path / "one.npy", np.stack([image, image]))
    base = data(tmp_path / "one.npy", size=32, resize=1.25, validation_fraction=0.0)

    def seen(**fields):
        config = ImageData(**{**vars(base), **fields})
        batches = [opened(config, batch_size=16).batch(s, range(16))["images"] for s in range(4)]
        images = np.round((np.concatenate(batches) + 1) * 127.5).astype(int)
        mirrored = images[:, 0, 1, 0] < images[:, 0, 0, 0]
        images[mirrored] = images[mirrored, :, ::-1]
        return images, mirrored

    images, mirrored = seen(crop="center")
    assert not mirrored.any() and (images == image[4:36, 4:36]).all()
    images, mirrored = seen()  # at 1.25 * 32 = 40 pixels nothing is resized: 9 x 9 places
    places = {(int(i[0, 0, 1]) // 6, int(i[0, 0, 0]) // 6) for i in images}
    assert not mirrored.any() and len(places) > 25
    assert {p[0] for p in places} == {p[1] for p in places} == set(range(9))
    for i in images:
        top, left = i[0, 0, 1] // 6, i[0, 0, 0] // 6
        np.testing.assert_array_equal(i, image[top : top + 32, left : left + 32])
    _, mirrored = seen(flip=True)
    assert 0.25 < mirrored.mean() < 0.75
    images, _ = seen(resize=1.0, resize_max=1.25)  # 32..40 pixels, the steepest slope at 32
    slopes = np.round(6 * 40 / ((images[:, 0, 16, 0] - images[:, 0, 8, 0]) / 8)).astype(int)
    assert slopes.min() <= 33 and slopes.max() >= 39


def test_an_epoch_visits_every_image_once(folder):
    dataset = opened(data(folder, crop="center"), batch_size=1)
    n = dataset.num_images
    epochs = [[dataset.batch(e * n + i, [0])["images"].tobytes() for i in range(n)] for e in (0, 1)]
    assert len(set(epochs[0])) == n and set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


def test_evaluation_is_in_order_with_invalid_rows_at_the_end(folder):
    config = data(folder, flip=True, resize_max=2.0, size=16)
    dataset = opened(config, "validation", batch_size=3)
    images = find_images(config, "validation")
    assert dataset.num_batches == 2 and dataset.num_images == len(images) == 4
    batches = list(dataset.iterate(0, range(3)))
    joined = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    assert joined["valid"].tolist() == [True] * 4 + [False] * 2
    assert not joined["images"][4:].any() and not joined["labels"][4:].any()
    for i in range(4):
        pixels, label = images.read(i)
        expected = to_unit(center_crop(resize_shorter(pixels, 18, "lanczos"), 16))
        np.testing.assert_array_equal(joined["images"][i], expected)
        assert joined["labels"][i] == label
    with pytest.raises(IndexError):
        dataset.batch(2, range(3))


def test_fingerprint_tells_data_and_plan_apart(folder):
    base = opened(data(folder)).fingerprint
    assert json.loads(json.dumps(base)) == base == opened(data(folder)).fingerprint
    changes = [
        *({"size": 17}, {"crop": "center"}, {"resize": 1.3}, {"resize_max": 2.0}),
        *({"filter": "bicubic"}, {"flip": True}, {"shuffle": False}, {"validation_fraction": 0.5}),
    ]
    prints = [opened(data(folder, **fields)).fingerprint for fields in changes]
    prints += [
        opened(data(folder), seed=4).fingerprint,
        opened(data(folder), batch_size=2).fingerprint,
    ]
    prints += [opened(data(folder), "validation").fingerprint]
    Image.fromarray(picture(30, 40)).save(folder / "ant" / "0.png")
    prints += [opened(data(folder)).fingerprint]
    (folder / "bee" / "0.png").rename(folder / "bee" / "zero.png")
    prints += [opened(data(folder)).fingerprint]
    texts = {json.dumps(p, sort_keys=True) for p in [*prints, base]}
    assert len(texts) == len(prints) + 1
    again = opened(data(folder, workers=1)).fingerprint
    assert again == prints[-1]  # how it is read does not count


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


def test_large_folders_are_sampled(monkeypatch, folder):
    images = find_images(data(folder, validation_fraction=0.0), "train").images
    before = images.fingerprint
    monkeypatch.setattr(image_files, "_SIZED_FILES", 2)
    assert images.fingerprint["content"] != before["content"]
