"""Fixed position tables of image tokens."""

from __future__ import annotations

import numpy as np


def sincos_positions(d_model: int, grid: tuple[int, int], *, scale: float = 1.0) -> np.ndarray:
    """Two-dimensional sines and cosines (DiT, arXiv 2212.09748, section 3.2; ViT's fixed table).

        [sin(c w), cos(c w), sin(r w), cos(r w)],  w_k = 10000^(-k / (d/4)),  k = 0 .. d/4 - 1

    for the token in row r and column c: the column comes first.

    Args:
        d_model: width d, a multiple of 4.
        grid: (rows, columns) of tokens.
        scale: size of a patch in units of the coordinates. Index i lies at (i + 1/2) scale - 1/2,
            the centre of its patch: integers for 1.

    Returns:
        [rows columns, d] float64, in raster order.

    Raises:
        ValueError: d_model is not a multiple of 4.
    """
    if d_model % 4:
        raise ValueError(f"d_model={d_model}; the position table needs a multiple of 4")
    quarter = d_model // 4
    frequencies = 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
    centres = lambda n: (np.arange(n, dtype=np.float64) + 0.5) * scale - 0.5
    row, column = (a.reshape(-1, 1) for a in np.meshgrid(*map(centres, grid), indexing="ij"))
    waves = lambda at: [np.sin(at * frequencies), np.cos(at * frequencies)]
    return np.concatenate([*waves(column), *waves(row)], axis=1)
