"""Rotation of features by position (RoPE, arXiv 2104.09864), along one axis or several.

With A axes (one for sequences, two for images: row and column) the channels are cut into A equal
sections; section a is rotated by the position along axis a, its first half against its second.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


class Rotation(NamedTuple):
    """Cosines and sines of the angles, [N, A, E / (2 A)], or [B, N, A, E / (2 A)] row by row."""

    cos: Array
    sin: Array


def rope_frequencies(width: int, axes: int = 1, base: float = 10000.0) -> np.ndarray:
    """base^(-i / K), i = 0 .. K-1, with K = width / (2 axes) pairs per axis; float64.

    Raises:
        ValueError: the width is not divisible by 2 axes.
    """
    pairs = width // (2 * axes)
    if not pairs or width % (2 * axes):
        raise ValueError(
            f"RoPE along {axes} axes rotates pairs in {axes} sections: width={width} is not "
            f"divisible by {2 * axes}"
        )
    return base ** -(np.arange(pairs) / pairs)


def rope_rotation(positions: Array, frequencies: np.ndarray, axes: int = 1) -> Rotation:
    """Angles position * frequency, in at least float32.

    Args:
        positions: [N] or [B, N] (one axis); [N, A] or [B, N, A] (several).
        frequencies: [K] per axis, see `rope_frequencies`.
        axes: A.

    Raises:
        ValueError: several axes, and the positions' last axis is not A long.
    """
    positions = jnp.asarray(positions)
    if axes == 1:
        positions = positions[..., None]
    if positions.ndim not in (2, 3) or positions.shape[-1] != axes:
        wanted = "[N] or [B, N]" if axes == 1 else f"[N, {axes}] or [B, N, {axes}]"
        shape = positions.shape[:-1] if axes == 1 else positions.shape
        raise ValueError(f"positions have shape {shape}, expected {wanted}")
    dtype = jnp.promote_types(positions.dtype, jnp.float32)
    angles = positions.astype(dtype)[..., None] * jnp.asarray(frequencies, dtype)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Array, rotation: Rotation) -> Array:
    """x [B, N, E] rotated, pair (x1, x2) to (x1 cos - x2 sin, x2 cos + x1 sin).

    In the dtype to which x and the angles promote.
    """
    cos, sin = rotation
    axes, pairs = cos.shape[-2:]
    halves = x.reshape(*x.shape[:2], axes, 2, pairs)
    first, second = halves[..., 0, :], halves[..., 1, :]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-2)
    return turned.reshape(x.shape)
