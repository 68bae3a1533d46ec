"""Fixed position tables of image and video tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def coordinates(grid: Sequence[int], *, scale: float | Sequence[float] = 1.0) -> np.ndarray:
    """[tokens, axes] float64: where the tokens of a grid lie, the last axis fastest.

    Args:
        grid: tokens along every axis. scale: size of a patch in units of the coordinates, one
            number or one per axis. Index i lies at (i + 1/2) scale - 1/2, the centre of its patch:
            integers for 1.
    """
    scales = np.broadcast_to(np.asarray(scale, np.float64), len(grid))
    centres = [(np.arange(n, dtype=np.float64) + 0.5) * s - 0.5 for n, s in zip(grid, scales)]
    return np.stack([a.reshape(-1) for a in np.meshgrid(*centres, indexing="ij")], axis=1)


def sincos_positions(
    d_model: int, grid: Sequence[int], *, scale: float | Sequence[float] = 1.0
) -> np.ndarray:
    """Two-dimensional sines and cosines (DiT, arXiv 2212.09748, section 3.2; ViT's fixed table).

        [sin(c w), cos(c w), sin(r w), cos(r w)],  w_k = 10000^(-k / (d/4)),  k = 0 .. d/4 - 1

    for the token in row r and column c: the column comes first. Tokens of videos add the one-
    dimensional table of their time u (Latte, arXiv 2401.03048, section 3.3),

        [sin(u v), cos(u v)],  v_k = 10000^(-k / (d/2)),  k = 0 .. d/2 - 1.

    Args:
        d_model: width d, a multiple of 4.
        grid: (rows, columns) of tokens, or (times, rows, columns).
        scale: size of a patch, see `coordinates`.

    Returns:
        [tokens, d] float64, the last axis of the grid fastest.

    Raises:
        ValueError: d_model is not a multiple of 4.
    """
    if d_model % 4:
        raise ValueError(f"d_model={d_model}; the position table needs a multiple of 4")
    *time, row, column = np.split(coordinates(grid, scale=scale), len(grid), axis=1)
    table = np.concatenate([_waves(column, d_model // 4), _waves(row, d_model // 4)], axis=1)
    return table + sum(_waves(u, d_model // 2) for u in time) if time else table


def _waves(at: np.ndarray, count: int) -> np.ndarray:
    """[n, 2 count]: sines and cosines of [n, 1] coordinates at `count` frequencies."""
    frequencies = 10000.0 ** (-np.arange(count, dtype=np.float64) / count)
    return np.concatenate([np.sin(at * frequencies), np.cos(at * frequencies)], axis=1)
