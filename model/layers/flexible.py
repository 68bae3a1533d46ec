"""Flexible patch (de-)embeddings: one set of weights at an underlying patch, projected to others.

A patch embedding is linear in the pixels of a patch and a de-embedding gives them; so weights for a
patch of another size follow from a fixed linear resize of pixels (FlexiViT, arXiv 2212.08013,
section 3.4; FlexiDiT, arXiv 2502.20126). All matrices are made on the host in float64. Patches have
any number of axes: (rows, columns) of an image, (frames, rows, columns) of a video.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

METHODS = ("area", "bilinear")


def resize_1d(old: int, new: int, method: str = "area") -> np.ndarray:
    """[new, old] float64: the linear map that resizes a line of `old` pixels to `new`.

    Args:
        method: "area": the mean of the old pixels under a new one, weighted by overlap (block means
            when shrinking by a whole factor, copies when growing by one). "bilinear": interpolation
            between the two nearest pixel centres, edges repeated, without antialiasing.

    Raises:
        ValueError: an unknown method, or a size below 1.
    """
    if min(old, new) < 1:
        raise ValueError(f"resizing {old} pixels to {new}: both must be at least 1")
    if method not in METHODS:
        raise ValueError(f"resize={method!r}; choose one of {', '.join(METHODS)}")
    if old == new:
        return np.eye(old)
    i, j = np.arange(new, dtype=np.float64)[:, None], np.arange(old, dtype=np.float64)[None]
    if method == "area":
        overlap = np.minimum((i + 1) * old / new, j + 1) - np.maximum(i * old / new, j)
        return np.maximum(overlap, 0) * new / old
    centre = np.clip((i + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(1 - np.abs(centre - j), 0)  # a tent reaches the two pixels around it


def resize_matrix(old: Sequence[int], new: Sequence[int], method: str = "area") -> np.ndarray:
    """B [prod(new), prod(old)] float64: `resize_1d` along every axis, as a Kronecker product.

    Pixels are numbered with the last axis fastest.

    Raises:
        ValueError: `old` and `new` have different numbers of axes, or as `resize_1d`.
    """
    if len(old) != len(new):
        raise ValueError(f"patches {tuple(old)} and {tuple(new)} have different numbers of axes")
    parts = [resize_1d(a, b, method) for a, b in zip(old, new)]
    return functools.reduce(np.kron, parts, np.ones((1, 1)))


def embedding_projection(
    underlying: Sequence[int], patch: Sequence[int], method: str = "area"
) -> np.ndarray:
    """E = pinv(B^T) [prod(patch), prod(underlying)] float64, B of `resize_matrix`.

    Kernels w' = E w embed a resized patch as w embeds the patch, as nearly as the sizes allow:
    B^T w' is nearest to w. Shrinking by area it sums pixels of the kernel where B averages them, so
    tokens keep their scale.
    """
    return np.linalg.pinv(resize_matrix(underlying, patch, method).T)


def deembedding_projection(
    underlying: Sequence[int], patch: Sequence[int], method: str = "area"
) -> np.ndarray:
    """D = B [prod(patch), prod(underlying)] float64: predicted pixels are resized as pixels are, so
    that a prediction of unit variance noise keeps its scale."""
    return resize_matrix(underlying, patch, method)


def resize_embedding(
    kernel, old: Sequence[int], new: Sequence[int], method: str = "bilinear"
) -> Array | np.ndarray:
    """FlexiViT's resize of a patch embedding: pinv(B^T) over the pixels, for each channel and unit.

    Args:
        kernel: [prod(old) C, D], rows (pixel, channel), channel fastest. old, new: patches.

    Returns:
        [prod(new) C, D], of the kernel's dtype: numpy for numpy, else on the device.
    """
    return _over_pixels(embedding_projection(old, new, method), kernel, rows=True)


def resize_deembedding(
    kernel, old: Sequence[int], new: Sequence[int], method: str = "area"
) -> Array | np.ndarray:
    """Resizes a de-embedding: B over the pixels, for each unit and channel.

    Args:
        kernel: [.., prod(old) C], columns (pixel, channel), channel fastest: a kernel or a bias.

    Returns:
        [.., prod(new) C], of the kernel's dtype.
    """
    return _over_pixels(deembedding_projection(old, new, method), kernel, rows=False)


def lift_embedding(kernel, underlying: Sequence[int], patch: Sequence[int], method: str = "area"):
    """Kernel [prod(underlying) C, D] at the underlying patch that `resize_embedding` takes back to
    `kernel` [prod(patch) C, D] exactly: pinv(E), as E pinv(E) = 1 where the patch is no larger."""
    matrix = np.linalg.pinv(embedding_projection(underlying, patch, method))
    return _over_pixels(matrix, kernel, rows=True)


def lift_deembedding(kernel, underlying: Sequence[int], patch: Sequence[int], method: str = "area"):
    """Kernel or bias [.., prod(underlying) C] that `resize_deembedding` takes back to `kernel`
    [.., prod(patch) C] exactly: pinv(D)."""
    matrix = np.linalg.pinv(deembedding_projection(underlying, patch, method))
    return _over_pixels(matrix, kernel, rows=False)


def _over_pixels(matrix: np.ndarray, kernel, *, rows: bool):
    """Applies [new, old] to the pixels of the first (rows) or last axis of a kernel."""
    new, old = matrix.shape
    axis = 0 if rows else kernel.ndim - 1
    if kernel.shape[axis] % old:
        raise ValueError(
            f"a kernel of shape {tuple(kernel.shape)} has no {old} pixels along axis {axis}"
        )
    if np.array_equal(matrix, np.eye(old)):
        return kernel
    split = (*kernel.shape[:axis], old, kernel.shape[axis] // old, *kernel.shape[axis + 1 :])
    shape = (*kernel.shape[:axis], -1, *kernel.shape[axis + 1 :])
    pattern = "qp,pc...->qc..." if rows else "qp,...pc->...qc"
    if isinstance(kernel, np.ndarray):
        mapped = np.einsum(pattern, matrix, kernel.reshape(split).astype(np.float64))
        return mapped.reshape(shape).astype(kernel.dtype)
    matrix = jnp.asarray(matrix, kernel.dtype)
    mapped = jnp.einsum(pattern, matrix, kernel.reshape(split), precision=lax.Precision.HIGHEST)
    return mapped.reshape(shape)
