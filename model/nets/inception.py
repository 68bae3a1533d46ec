"""The Inception-v3 network behind FID, Inception score and precision/recall; inference only.

It is the classifier in the TensorFlow graph of 2015-12-05 (`classify_image_graph_def.pb`, 1008
classes), whose weights are published for PyTorch as `pt_inception-2015-12-05-6726825d.pth`. It has
the blocks of Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (arXiv
1512.00567, figures 5 to 7 and 10) and differs from the Inception-v3 of torchvision in three ways:

- average pools inside the blocks divide by the number of pixels in the window, not by 9;
- the pooled branch of the last block, Mixed_7c, takes the maximum;
- 1008 classes and no auxiliary classifier.

The graph names its blocks mixed, mixed_1 .. mixed_10; here they are called Mixed_5b, 5c, 5d, 6a,
6b, 6c, 6d, 6e, 7a, 7b, 7c in that order, as in the published file. Batch normalisation (eps 1e-3)
is folded into a scale and a bias per channel when weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

CLASSES = 1008
SIZE = 299
BATCH_NORM_EPSILON = 1e-3
SPATIAL_CHANNELS = 7  # 7 * 17 * 17 = 2023 values, about as many as the 2048 of the pool
PUBLISHED = "pt_inception-2015-12-05-6726825d.pth"

Params = dict[str, dict[str, Any]]


class Conv(NamedTuple):
    """One convolution with batch normalisation and ReLU; kernel is (height, width)."""

    name: str
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"  # for odd kernels at stride 1 the same as padding by (k - 1) / 2


def _block_a(name: str, c: int, pooled: int) -> list[Conv]:
    """35x35 (figure 5 of the paper); the second branch is the 5x5."""
    return [
        Conv(f"{name}.branch1x1", c, 64, (1, 1)),
        Conv(f"{name}.branch5x5_1", c, 48, (1, 1)),
        Conv(f"{name}.branch5x5_2", 48, 64, (5, 5)),
        Conv(f"{name}.branch3x3dbl_1", c, 64, (1, 1)),
        Conv(f"{name}.branch3x3dbl_2", 64, 96, (3, 3)),
        Conv(f"{name}.branch3x3dbl_3", 96, 96, (3, 3)),
        Conv(f"{name}.branch_pool", c, pooled, (1, 1)),
    ]


def _block_b(name: str, c: int) -> list[Conv]:
    """35x35 to 17x17 (figure 10)."""
    return [
        Conv(f"{name}.branch3x3", c, 384, (3, 3), 2, "VALID"),
        Conv(f"{name}.branch3x3dbl_1", c, 64, (1, 1)),
        Conv(f"{name}.branch3x3dbl_2", 64, 96, (3, 3)),
        Conv(f"{name}.branch3x3dbl_3", 96, 96, (3, 3), 2, "VALID"),
    ]


def _block_c(name: str, c: int, inner: int) -> list[Conv]:
    """17x17 with factorised 7x7 (figure 6)."""
    return [
        Conv(f"{name}.branch1x1", c, 192, (1, 1)),
        Conv(f"{name}.branch7x7_1", c, inner, (1, 1)),
        Conv(f"{name}.branch7x7_2", inner, inner, (1, 7)),
        Conv(f"{name}.branch7x7_3", inner, 192, (7, 1)),
        Conv(f"{name}.branch7x7dbl_1", c, inner, (1, 1)),
        Conv(f"{name}.branch7x7dbl_2", inner, inner, (7, 1)),
        Conv(f"{name}.branch7x7dbl_3", inner, inner, (1, 7)),
        Conv(f"{name}.branch7x7dbl_4", inner, inner, (7, 1)),
        Conv(f"{name}.branch7x7dbl_5", inner, 192, (1, 7)),
        Conv(f"{name}.branch_pool", c, 192, (1, 1)),
    ]


def _block_d(name: str, c: int) -> list[Conv]:
    """17x17 to 8x8."""
    return [
        Conv(f"{name}.branch3x3_1", c, 192, (1, 1)),
        Conv(f"{name}.branch3x3_2", 192, 320, (3, 3), 2, "VALID"),
        Conv(f"{name}.branch7x7x3_1", c, 192, (1, 1)),
        Conv(f"{name}.branch7x7x3_2", 192, 192, (1, 7)),
        Conv(f"{name}.branch7x7x3_3", 192, 192, (7, 1)),
        Conv(f"{name}.branch7x7x3_4", 192, 192, (3, 3), 2, "VALID"),
    ]


def _block_e(name: str, c: int) -> list[Conv]:
    """8x8 with branches that fork once more (figure 7)."""
    return [
        Conv(f"{name}.branch1x1", c, 320, (1, 1)),
        Conv(f"{name}.branch3x3_1", c, 384, (1, 1)),
        Conv(f"{name}.branch3x3_2a", 384, 384, (1, 3)),
        Conv(f"{name}.branch3x3_2b", 384, 384, (3, 1)),
        Conv(f"{name}.branch3x3dbl_1", c, 448, (1, 1)),
        Conv(f"{name}.branch3x3dbl_2", 448, 384, (3, 3)),
        Conv(f"{name}.branch3x3dbl_3a", 384, 384, (1, 3)),
        Conv(f"{name}.branch3x3dbl_3b", 384, 384, (3, 1)),
        Conv(f"{name}.branch_pool", c, 192, (1, 1)),
    ]


CONVS: dict[str, Conv] = {
    conv.name: conv
    for conv in [
        Conv("Conv2d_1a_3x3", 3, 32, (3, 3), 2, "VALID"),
        Conv("Conv2d_2a_3x3", 32, 32, (3, 3), 1, "VALID"),
        Conv("Conv2d_2b_3x3", 32, 64, (3, 3)),
        Conv("Conv2d_3b_1x1", 64, 80, (1, 1)),
        Conv("Conv2d_4a_3x3", 80, 192, (3, 3), 1, "VALID"),
        *_block_a("Mixed_5b", 192, 32),
        *_block_a("Mixed_5c", 256, 64),
        *_block_a("Mixed_5d", 288, 64),
        *_block_b("Mixed_6a", 288),
        *_block_c("Mixed_6b", 768, 128),
        *_block_c("Mixed_6c", 768, 160),
        *_block_c("Mixed_6d", 768, 160),
        *_block_c("Mixed_6e", 768, 192),
        *_block_d("Mixed_7a", 768),
        *_block_e("Mixed_7b", 1280),
        *_block_e("Mixed_7c", 2048),
    ]
}


class InceptionFeatures(NamedTuple):
    """What the metrics read, float32.

    Attributes:
        pool: [B, 2048] mean over the last 8x8 map (`pool_3` of the graph): FID, precision, recall.
        spatial: [B, 17, 17, 7] the first channels of the 1x1 branch of Mixed_6d after its ReLU
            (`mixed_6/conv` of the graph): sFID. Flattened it has the order of the published
            statistics, channels fastest.
        logits: [B, 1008] of the classifier.
        score_logits: [B, 1008] the same without the bias: published Inception scores multiply by
            the weights only.
    """

    pool: Array
    spatial: Array
    logits: Array
    score_logits: Array


def resize_matrix(size: int, target: int = SIZE) -> np.ndarray:
    """[target, size] float32 weights of TensorFlow 1's bilinear resize along one axis.

    Output pixel i reads position i * size / target (align_corners and half_pixel_centers both
    off: the corners of the first pixels coincide), between the pixels below and above it; past
    the last pixel the last one is repeated. There is no smoothing when an image shrinks.
    """
    position = np.arange(target) * (size / target)
    below = np.floor(position).astype(int)
    fraction = position - below
    matrix = np.zeros((target, size))
    rows = np.arange(target)
    np.add.at(matrix, (rows, below), 1 - fraction)
    np.add.at(matrix, (rows, np.minimum(below + 1, size - 1)), fraction)
    return matrix.astype(np.float32)


def inception_input(images: Array) -> Array:
    """Images [B, H, W, 3] with values 0..255 (uint8 or float) as the network wants them:
    float32 [B, 299, 299, 3], resized as by `resize_matrix`, then (x - 128) / 128.

    Raises:
        ValueError: not [B, H, W, 3].
    """
    if images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"Inception reads images [B, H, W, 3], got shape {tuple(images.shape)}")
    x = images.astype(jnp.float32)
    rows, columns = resize_matrix(x.shape[1]), resize_matrix(x.shape[2])
    highest = lax.Precision.HIGHEST
    x = jnp.einsum("jw,bhwc->bhjc", columns, x, precision=highest)
    x = jnp.einsum("ih,bhjc->bijc", rows, x, precision=highest)
    return (x - 128) / 128


def inception_stages(params: Params, images: Array) -> dict[str, Array]:
    """Outputs of all stages, [B, h, w, c] float32, under the names of the published file and
    "input", "MaxPool_1", "MaxPool_2"; also "pool", "score_logits" and "logits" (see
    `InceptionFeatures`). Under jit those not used cost nothing.

    Args:
        params: of `inception_from_reference`.
        images: [B, H, W, 3], values 0..255.

    Convolutions run at full float32 precision on every device.
    """

    def conv(name: str, x: Array) -> Array:
        weights, spec = params[name], CONVS[name]
        y = lax.conv_general_dilated(
            x,
            weights["kernel"],
            (spec.stride, spec.stride),
            spec.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST,
        )
        return jnp.maximum(y * weights["scale"] + weights["bias"], 0)

    def chain(x: Array, *names: str) -> Array:
        for name in names:
            x = conv(name, x)
        return x

    def block_a(n: str, x: Array) -> list[Array]:
        return [
            conv(f"{n}.branch1x1", x),
            chain(x, f"{n}.branch5x5_1", f"{n}.branch5x5_2"),
            chain(x, *(f"{n}.branch3x3dbl_{i}" for i in (1, 2, 3))),
            conv(f"{n}.branch_pool", average_pool(x)),
        ]

    def block_b(n: str, x: Array) -> list[Array]:
        return [
            conv(f"{n}.branch3x3", x),
            chain(x, *(f"{n}.branch3x3dbl_{i}" for i in (1, 2, 3))),
            max_pool(x, 2, "VALID"),
        ]

    def block_c(n: str, x: Array) -> list[Array]:
        return [
            conv(f"{n}.branch1x1", x),
            chain(x, *(f"{n}.branch7x7_{i}" for i in (1, 2, 3))),
            chain(x, *(f"{n}.branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))),
            conv(f"{n}.branch_pool", average_pool(x)),
        ]

    def block_d(n: str, x: Array) -> list[Array]:
        return [
            chain(x, f"{n}.branch3x3_1", f"{n}.branch3x3_2"),
            chain(x, *(f"{n}.branch7x7x3_{i}" for i in (1, 2, 3, 4))),
            max_pool(x, 2, "VALID"),
        ]

    def block_e(n: str, x: Array) -> list[Array]:
        single = conv(f"{n}.branch3x3_1", x)
        double = chain(x, f"{n}.branch3x3dbl_1", f"{n}.branch3x3dbl_2")
        # The published graph has a maximum in its last block only, though the paper has none.
        pooled = max_pool(x, 1, "SAME") if n == "Mixed_7c" else average_pool(x)
        return [
            conv(f"{n}.branch1x1", x),
            *(conv(f"{n}.branch3x3_{i}", single) for i in ("2a", "2b")),
            *(conv(f"{n}.branch3x3dbl_{i}", double) for i in ("3a", "3b")),
            conv(f"{n}.branch_pool", pooled),
        ]

    out = {"input": inception_input(images)}
    x = out["input"]
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"):
        out[name] = x = conv(name, x)
    out["MaxPool_1"] = x = max_pool(x, 2, "VALID")
    for name in ("Conv2d_3b_1x1", "Conv2d_4a_3x3"):
        out[name] = x = conv(name, x)
    out["MaxPool_2"] = x = max_pool(x, 2, "VALID")
    blocks = (
        (block_a, ("Mixed_5b", "Mixed_5c", "Mixed_5d")),
        (block_b, ("Mixed_6a",)),
        (block_c, ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e")),
        (block_d, ("Mixed_7a",)),
        (block_e, ("Mixed_7b", "Mixed_7c")),
    )
    for block, names in blocks:
        for name in names:
            out[name] = x = jnp.concatenate(block(name, x), -1)
    out["pool"] = jnp.mean(x, (1, 2))
    kernel, highest = params["fc"]["kernel"], lax.Precision.HIGHEST
    out["score_logits"] = jnp.matmul(out["pool"], kernel, precision=highest)
    out["logits"] = out["score_logits"] + params["fc"]["bias"]
    return out


def inception_features(params: Params, images: Array) -> InceptionFeatures:
    """The outputs that the metrics use; arguments as for `inception_stages`."""
    stages = inception_stages(params, images)
    return InceptionFeatures(
        pool=stages["pool"],
        # The 1x1 branch comes first in its block, so its channels are the block's first ones.
        spatial=stages["Mixed_6d"][..., :SPATIAL_CHANNELS],
        logits=stages["logits"],
        score_logits=stages["score_logits"],
    )


def max_pool(x: Array, stride: int, padding: str) -> Array:
    """Maximum over 3x3 windows; padding never wins."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def average_pool(x: Array) -> Array:
    """Mean over the pixels of 3x3 windows at stride 1 that lie within the image."""

    def window_sum(y):
        return lax.reduce_window(y, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return window_sum(x) / window_sum(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def reference_shapes() -> dict[str, tuple[int, ...]]:
    """{name: shape} of all arrays in the published file: 94 convolutions without bias, each with
    batch normalisation, and the classifier."""
    shapes: dict[str, tuple[int, ...]] = {}
    for conv in CONVS.values():
        shapes[f"{conv.name}.conv.weight"] = (conv.outputs, conv.inputs, *conv.kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{conv.name}.bn.{part}"] = (conv.outputs,)
    return shapes | {"fc.weight": (CLASSES, 2048), "fc.bias": (CLASSES,)}


def inception_from_reference(flat: Mapping[str, Any]) -> Params:
    """Parameters from the arrays of the published file.

    Args:
        flat: {name: array} with the names and shapes of `reference_shapes`; counters of batches
            (`*.num_batches_tracked`), which newer PyTorch writes, are ignored.

    Returns:
        {convolution: {"kernel" [kh, kw, in, out], "scale" [out], "bias" [out]}} and "fc" with
        "kernel" [2048, 1008], "bias" [1008]; float32. With the batch normalisation's weight g,
        bias b, running mean m and variance v: scale = g / sqrt(v + 1e-3), bias = b - m scale.

    Raises:
        ValueError: arrays are missing, unknown or of another shape.
    """
    flat = {n: a for n, a in flat.items() if not n.endswith(".num_batches_tracked")}
    wanted = reference_shapes()
    faults = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ..' * (len(names) > 3)})"
        for what, names in (
            ("missing", wanted.keys() - flat.keys()),
            ("unknown", flat.keys() - wanted.keys()),
        )
        if names
    ]
    faults += [
        f"{name} has shape {tuple(flat[name].shape)}, expected {shape}"
        for name, shape in wanted.items()
        if name in flat and tuple(flat[name].shape) != shape
    ][:3]
    if faults:
        raise ValueError(
            f"not the Inception weights that FID is defined by: {'; '.join(faults)}; "
            f"the published file is {PUBLISHED} (torchvision's own weights are another network)"
        )
    arrays = {name: np.asarray(flat[name], np.float64) for name in wanted}
    params: Params = {}
    for name in CONVS:
        bn = {part: arrays[f"{name}.bn.{part}"] for part in ("weight", "bias")}
        scale = bn["weight"] / np.sqrt(arrays[f"{name}.bn.running_var"] + BATCH_NORM_EPSILON)
        params[name] = {
            "kernel": arrays[f"{name}.conv.weight"].transpose(2, 3, 1, 0),
            "scale": scale,
            "bias": bn["bias"] - arrays[f"{name}.bn.running_mean"] * scale,
        }
    params["fc"] = {"kernel": arrays["fc.weight"].T, "bias": arrays["fc.bias"]}
    return {
        name: {part: np.ascontiguousarray(a, np.float32) for part, a in parts.items()}
        for name, parts in params.items()
    }
