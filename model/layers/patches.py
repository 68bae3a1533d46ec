"""Images and videos as sequences of patches, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jax import Array

Patch = int | tuple[int, ...]  # p for images: (p, p); (frames, rows, columns) for videos


def patch_sides(patch: Patch) -> tuple[int, ...]:
    """A patch along every axis: (p, p) for the p of an image."""
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def patch_pixels(patch: Patch) -> int:
    """Pixels of a patch: p p, or frames x rows x columns."""
    return math.prod(patch_sides(patch))


def patch_name(patch: Patch) -> str:
    """ "4", or "2x4x4": as it is written on the command line and in parameter names."""
    return "x".join(map(str, (patch,) if isinstance(patch, int) else patch))


def patchify(x: Array, patch: Patch) -> Array:
    """Tokens of patches, the last axis fastest: in raster order, frame by frame.

    Args:
        x: [B, H, W, C], or [B, F, H, W, C]. patch: side p of a square patch, or its sides.

    Returns:
        [B, T, P C] in x's dtype, P the pixels of a patch, which is flattened (frame, row, column,
        channel), the channel fastest.

    Raises:
        ValueError: the patch does not divide the sizes, or has another number of axes.
    """
    sides, (batch, *sizes, channels) = patch_sides(patch), x.shape
    if len(sides) != len(sizes) or any(n % p for n, p in zip(sizes, sides)):
        shape = " x ".join(map(str, sizes))
        kind = "an image" if len(sizes) == 2 else "a video"
        raise ValueError(f"patches of {patch_name(patch)} do not divide {kind} of {shape}")
    grid, axes = [n // p for n, p in zip(sizes, sides)], len(sides)
    x = x.reshape(batch, *(n for pair in zip(grid, sides) for n in pair), channels)
    order = (0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return x.transpose(order).reshape(batch, math.prod(grid), math.prod(sides) * channels)


def unpatchify(tokens: Array, patch: Patch, grid: Sequence[int]) -> Array:
    """Inverse of `patchify`.

    Args:
        tokens: [B, T, P C]. patch: as there. grid: patches along every axis: (h, w) or (f, h, w).

    Returns:
        [B, h p, w p, C], or [B, f p_t, h p_h, w p_w, C].

    Raises:
        ValueError: another number of tokens, or a width that is no multiple of P.
    """
    sides, (batch, length, width) = patch_sides(patch), tokens.shape
    axes = len(sides)
    if len(grid) != axes or length != math.prod(grid) or width % math.prod(sides):
        raise ValueError(
            f"{length} tokens of width {width} are no grid of {' x '.join(map(str, grid))} patches "
            f"of {patch_name(patch)}"
        )
    x = tokens.reshape(batch, *grid, *sides, -1)
    order = (0, *(k for i in range(axes) for k in (1 + i, 1 + axes + i)), 2 * axes + 1)
    return x.transpose(order).reshape(batch, *(n * p for n, p in zip(grid, sides)), -1)


class SquareImages:
    """What follows from the fields input_size, patch_size and in_channels of a net's config.

    For nets of square images by class, which read neither texts nor videos.
    """

    context, frames = "none", 0  # not fields

    @property
    def out_channels(self) -> int:
        """Channels of the output: C."""
        return self.in_channels

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        return (self.input_size, self.input_size, self.in_channels)

    @property
    def patch(self) -> int:
        """p."""
        return self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (h, w) of an image.

        Raises:
            ValueError: patch_size does not divide input_size.
        """
        if self.patch_size < 1 or self.input_size % self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size} does not divide input_size={self.input_size}"
            )
        return (self.input_size // self.patch_size,) * 2

    @property
    def tokens(self) -> int:
        """T, patches of an image."""
        return math.prod(self.grid)
