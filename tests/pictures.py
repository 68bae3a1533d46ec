"""Small images, class folders and checks shared by the tests of image data."""

import io

import numpy as np
import pytest
from PIL import Image

from lintime.train.data import open_image_data
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


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
