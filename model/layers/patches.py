"""Images as sequences of patches, and back."""

from __future__ import annotations

from jax import Array


def patchify(x: Array, patch: int) -> Array:
    """Tokens of square patches, in raster order.

    Args:
        x: [B, H, W, C]. patch: side p of a patch.

    Returns:
        [B, (H/p) (W/p), p p C] in x's dtype; a patch is flattened (row, column, channel), the
        channel fastest.

    Raises:
        ValueError: p does not divide H and W.
    """
    batch, height, width, channels = x.shape
    if height % patch or width % patch:
        raise ValueError(f"patches of {patch} do not divide an image of {height} x {width}")
    rows, columns = height // patch, width // patch
    x = x.reshape(batch, rows, patch, columns, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def unpatchify(tokens: Array, patch: int, grid: tuple[int, int]) -> Array:
    """Inverse of `patchify`.

    Args:
        tokens: [B, h w, p p C]. patch: side p. grid: (h, w), patches per column and row.

    Returns:
        [B, h p, w p, C].

    Raises:
        ValueError: another number of tokens, or a width that is no multiple of p p.
    """
    batch, length, width = tokens.shape
    rows, columns = grid
    if length != rows * columns or width % patch**2:
        raise ValueError(
            f"{length} tokens of width {width} are no grid of {rows} x {columns} patches of {patch}"
        )
    x = tokens.reshape(batch, rows, columns, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * patch, columns * patch, -1)
