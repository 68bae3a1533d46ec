"""The definition: a weighted sum over the tokens so far."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from .cache import DualCache


def wide(dtype):
    """float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def ssd_decode_reference(cache: DualCache, C: Array, index: Array) -> Array:
    """See `ssd_decode`; everything in at least float32."""
    sizes, acc = cache.sizes, wide(cache.x.dtype)
    x = cache.x.astype(acc).reshape(*cache.scale.shape, sizes["P"])
    B, C = cache.B.astype(acc), C.astype(acc)
    per_group = sizes["J"] // sizes["G"]
    scores = jnp.repeat(jnp.sum(B * C[:, None], axis=-1), per_group, axis=2)  # [R, S, J]
    cs = cache.cs.reshape(sizes["R"], sizes["J"], 1, sizes["K"])
    weights = jnp.exp(cs + cache.scale) * scores.swapaxes(1, 2)[..., None]
    valid = (jnp.arange(sizes["S"]) <= index)[:, None]
    y = jnp.where(valid[..., None], weights[..., None] * x, 0)  # by selection: it may be NaN
    return jnp.sum(y, axis=2).reshape(sizes["R"], sizes["H"], sizes["P"])
