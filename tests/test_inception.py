"""The FID Inception network: shapes of the published architecture, and torchvision's numbers."""

import pathlib
import zlib

import jax
import numpy as np
import pytest

from lintime.model.nets import inception
from tests import inception_vectors

# (stage, output of a 299x299 image, trainable parameters, convolutions): arXiv 1512.00567, table 1,
# with the channel numbers of the released network; a convolution has one scale and bias a channel.
STAGES = [
    ("Conv2d_1a_3x3", (149, 149, 32), 928, 1),
    ("Conv2d_2a_3x3", (147, 147, 32), 9_280, 1),
    ("Conv2d_2b_3x3", (147, 147, 64), 18_560, 1),
    ("MaxPool_1", (73, 73, 64), 0, 0),
    ("Conv2d_3b_1x1", (73, 73, 80), 5_280, 1),
    ("Conv2d_4a_3x3", (71, 71, 192), 138_624, 1),
    ("MaxPool_2", (35, 35, 192), 0, 0),
    ("Mixed_5b", (35, 35, 256), 255_904, 7),
    ("Mixed_5c", (35, 35, 288), 277_472, 7),
    ("Mixed_5d", (35, 35, 288), 285_152, 7),
    ("Mixed_6a", (17, 17, 768), 1_153_280, 4),
    ("Mixed_6b", (17, 17, 768), 1_297_408, 10),
    ("Mixed_6c", (17, 17, 768), 1_691_008, 10),
    ("Mixed_6d", (17, 17, 768), 1_691_008, 10),
    ("Mixed_6e", (17, 17, 768), 2_141_952, 10),
    ("Mixed_7a", (8, 8, 1280), 1_698_304, 6),
    ("Mixed_7b", (8, 8, 2048), 5_044_608, 9),
    ("Mixed_7c", (8, 8, 2048), 6_076_800, 9),
    ("pool", (2048,), 0, 0),
    ("logits", (1008,), 0, 0),
]
CLASSIFIER = 2048 * 1008 + 1008
TOTAL = 23_850_960


@pytest.fixture(scope="module")
def arrays():
    return inception_vectors.published_arrays()


@pytest.fixture(scope="module")
def params(arrays):
    return inception.inception_from_reference(arrays)


def test_published_names_and_shapes():
    shapes = inception.reference_shapes()
    assert len(shapes) == 94 * 5 + 2
    text = "\n".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
    assert zlib.crc32(text.encode()) == 662_074_295  # the same text made of torchvision's module
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_6b.branch7x7_2.conv.weight"] == (128, 128, 1, 7)
    assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)
    assert shapes["fc.weight"] == (1008, 2048)


def test_stages_of_the_published_architecture(params):
    images = jax.ShapeDtypeStruct((5, 64, 96, 3), np.uint8)
    stages = jax.eval_shape(inception.inception_stages, params, images)
    trainable = {n: s for n, s in inception.reference_shapes().items() if "running" not in n}
    total = CLASSIFIER
    for name, shape, size, convs in STAGES:
        assert stages[name].shape == (5, *shape), name
        assert stages[name].dtype == np.float32, name
        own = {n: s for n, s in trainable.items() if n.split(".")[0] == name}
        assert sum(int(np.prod(s)) for s in own.values()) == size, name
        assert sum(n.endswith("conv.weight") for n in own) == convs, name
        total += size
    assert total == TOTAL
    features = jax.eval_shape(inception.inception_features, params, images)
    shapes = jax.tree.map(lambda a: a.shape[1:], features)
    assert shapes == inception.InceptionFeatures((2048,), (17, 17, 7), (1008,), (1008,))


def test_numbers_of_another_implementation(params):
    """Every stage against torchvision in float64 with the same weights and images."""
    path = pathlib.Path(__file__).with_name("inception_vectors.npz")
    with np.load(path, allow_pickle=False) as file:
        wanted = {name: file[name] for name in file.files}

    def both(params, images):
        stages = inception.inception_stages(params, images)
        return stages, inception.inception_features(params, images)

    stages, features = jax.device_get(jax.jit(both)(params, inception_vectors.images()))
    for name in ("pool", "logits"):
        np.testing.assert_array_equal(stages[name], getattr(features, name))
        scale = wanted[name].std()
        np.testing.assert_allclose(stages[name] / scale, wanted[name] / scale, atol=3e-5)
    scale = wanted["spatial"].std()
    np.testing.assert_allclose(features.spatial[:1] / scale, wanted["spatial"] / scale, atol=3e-5)
    biased = features.score_logits + params["fc"]["bias"]
    np.testing.assert_allclose(biased, features.logits, rtol=1e-5, atol=1e-4)
    seen = 0
    for name, expected in wanted.items():
        if name in ("pool", "logits", "spatial"):
            continue
        got, scale = inception_vectors.summary(stages[name]), expected[:, 1].mean()
        np.testing.assert_allclose(got / scale, expected / scale, atol=3e-5, err_msg=name)
        seen += 1
    assert seen == len(stages) - 3


def test_resize_is_that_of_tensorflow_1():
    def pixel(row, i):  # the definition, for one output pixel
        at = i * len(row) / 299
        low = int(at)
        high = min(low + 1, len(row) - 1)
        return row[low] + (row[high] - row[low]) * (at - low)

    for size in (1, 2, 32, 256, 299, 500):
        row = np.random.default_rng(size).uniform(0, 255, size)
        wanted = [pixel(row, i) for i in range(299)]
        matrix = inception.resize_matrix(size)
        assert matrix.shape == (299, size) and matrix.dtype == np.float32
        np.testing.assert_allclose(matrix @ row, wanted, atol=1e-4)
    np.testing.assert_array_equal(inception.resize_matrix(299), np.eye(299))
    flat = inception.inception_input(np.full((1, 20, 30, 3), 192, np.uint8))
    np.testing.assert_allclose(flat, 0.5, atol=1e-6)
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\], got shape \(1, 3, 8, 8\)"):
        inception.inception_input(np.zeros((1, 3, 8, 8), np.uint8))


def test_pools():
    x = np.random.default_rng(0).normal(-5, 1, (2, 6, 7, 3)).astype(np.float32)
    average, biggest = np.zeros_like(x), np.zeros_like(x)
    for i in range(6):
        for j in range(7):
            window = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            average[:, i, j], biggest[:, i, j] = window.mean((1, 2)), window.max((1, 2))
    np.testing.assert_allclose(inception.average_pool(x), average, rtol=1e-5)
    np.testing.assert_array_equal(inception.max_pool(x, 1, "SAME"), biggest)
    np.testing.assert_array_equal(
        inception.max_pool(x, 2, "VALID"), biggest[:, 1:-1:2, 1:-1:2], strict=True
    )


def test_batch_normalisation_is_folded(arrays, params):
    name, x = "Mixed_5b.branch1x1", np.linspace(-2, 2, 64)
    g, b, m, v = (
        arrays[f"{name}.bn.{part}"].astype(np.float64)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    wanted = (x - m) / np.sqrt(v + 1e-3) * g + b
    np.testing.assert_allclose(x * params[name]["scale"] + params[name]["bias"], wanted, atol=1e-6)
    assert params[name]["kernel"].shape == (1, 1, 192, 64)


def test_other_weights_are_refused(arrays):
    def message(flat):
        with pytest.raises(ValueError) as caught:
            inception.inception_from_reference(flat)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
        return str(caught.value)

    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros(())}
    inception.inception_from_reference(arrays | counters)
    first = "Conv2d_1a_3x3.conv.weight"
    assert f"1 missing ({first})" in message({n: a for n, a in arrays.items() if n != first})
    assert "472 missing" in message({})
    assert "1 unknown (AuxLogits.fc.weight)" in message(
        arrays | {"AuxLogits.fc.weight": np.zeros(1)}
    )
    text = message(arrays | {"fc.weight": np.zeros((1000, 2048)), "fc.bias": np.zeros(1000)})
    assert "fc.weight has shape (1000, 2048), expected (1008, 2048)" in text
    assert inception.PUBLISHED in text
