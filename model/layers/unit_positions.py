"""Fixed position tables of coordinates from 0 to 1 (PoM's image and video models, arXiv
2411.12663)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WAVES = ("harmonic", "shifted")


def unit_positions(d_model: int, grid: Sequence[int], waves: str = "shifted") -> np.ndarray:
    """Sines and cosines of every axis side by side, of coordinates u evenly from 0 to 1.

        images: [column (d/2), row (d/2)];  videos: [time (d/2), column (d/4), row (d/4)]
        "harmonic": [sin(pi f u), cos(pi f u)],         f = 1, 3, 5, ..
        "shifted":  [sin(pi f u + f), cos(pi f u + f)], f evenly from 1/2 to 2

    Harmonics of a wide net are finer than the tokens of a usual grid can tell apart; weights need
    the waves that they were trained with.

    Args:
        d_model: d, a multiple of 4, of videos of 8. grid: (rows, columns), or (times, rows,
            columns) of tokens.

    Returns:
        [tokens, d] float64, the last axis of the grid fastest.

    Raises:
        ValueError: a width that cannot be shared out, or unknown waves.
    """
    least = 4 if len(grid) == 2 else 8
    if d_model % least:
        raise ValueError(f"d_model={d_model}; the position table needs a multiple of {least}")
    if waves not in WAVES:
        raise ValueError(f"waves={waves!r}; choose {' or '.join(WAVES)}")
    units = [np.linspace(0, 1, n) for n in grid]
    *time, row, column = (u.reshape(-1, 1) for u in np.meshgrid(*units, indexing="ij"))
    share = d_model // (4 if time else 2)
    parts = [unit_waves(u, d_model // 2, waves) for u in time]
    parts += [unit_waves(column, share, waves), unit_waves(row, share, waves)]
    return np.concatenate(parts, axis=1)


def unit_waves(u, width: int, waves: str = "shifted", xp=np):
    """[n, width] of coordinates u [n, 1]: one axis of `unit_positions`; xp: numpy or jax.numpy."""
    count = width // 2
    if waves == "harmonic":
        f, shift = 2.0 * np.arange(count) + 1, 0.0
    else:
        f = shift = np.linspace(0.5, 2, count)
    angles = np.pi * u * f + shift
    return xp.concatenate([xp.sin(angles), xp.cos(angles)], axis=1)
