"""Labelled images: decoding, crops, purity of batches."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from lintime.train.data.batches import pick, row_uniforms
from lintime.train.data.crops import center_crop, resize_shorter, to_unit, views_of
from lintime.train.data.image_files import decode_image
from lintime.train.data.image_sources import find_images
from lintime.train.errors import UserError
from lintime.train.schema import ImageData
from tests.pictures import assert_same, class_folders, data, encoded, opened, picture


@pytest.fixture
def folder(tmp_path):
    return class_folders(tmp_path / "images")


# ---------------------------------------------------------------- decoding


def test_every_format_and_mode_becomes_rgb():
    pixels = picture()
    image = Image.fromarray(pixels)
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        np.testing.assert_array_equal(decode_image(encoded(image, kind), "x"), pixels)
    smooth = Image.fromarray(np.full((20, 24, 3), (200, 80, 30), np.uint8))
    cmyk = encoded(smooth.convert("CMYK"), "JPEG", quality=95)
    for file in (encoded(smooth, "JPEG", quality=95), encoded(smooth, "WEBP"), cmyk):
        got = decode_image(file, "x")
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
    np.testing.assert_array_equal(resize_shorter(small, 4, "lanczos"), small)


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
