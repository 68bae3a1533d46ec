"""Position and token embeddings."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def sinusoids(positions: Array, width: int, lam: float, dtype=jnp.float32) -> Array:
    """[sin(p f_0) .. sin(p f_{w/2-1}), cos(p f_0) ..] with f_i = lam^(-2i/w).

    Args:
        positions: [...] integer or float positions.
        width: w, even.
        lam: largest wavelength over 2 pi.

    Returns:
        [..., w] in `dtype`.
    """
    if width % 2:
        raise ValueError(f"sinusoids need an even width, got {width}")
    frequencies = jnp.asarray(lam, dtype) ** (-jnp.arange(0, width, 2, dtype=dtype) / width)
    angles = positions.astype(dtype)[..., None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
