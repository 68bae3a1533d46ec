"""The read of the dual form as batched matrix products of K heads at once.

The weights of K heads times the inputs of K heads give K^2 products of heads and tokens, of which K
are wanted: the matrix units have nothing better to do while the cache is read, and the form that
computes only what is wanted, a matrix-vector product for each row and head, is twice slower.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from .cache import DualCache
from .reference import wide


def ssd_decode_xla(cache: DualCache, C: Array, index: Array) -> Array:
    """See `ssd_decode`; weights and products are rounded to x's dtype, sums are float32."""
    sizes, dtype = cache.sizes, cache.x.dtype
    acc = wide(dtype)
    rows, blocks, per = (sizes[k] for k in "RJK")
    scores = jnp.sum(cache.B.astype(acc) * C.astype(acc)[:, None], axis=-1)  # [R, S, G]
    scores = jnp.repeat(scores, blocks // sizes["G"], axis=2).swapaxes(1, 2)
    weights = jnp.exp(cache.cs.reshape(rows, blocks, 1, per) + cache.scale) * scores[..., None]
    valid = (jnp.arange(sizes["S"]) <= index)[:, None]
    weights = jnp.where(valid, weights, 0).astype(dtype)
    # No selection on x: XLA would write a selected copy of the whole cache to memory.
    square = jnp.einsum("rjsk,rjsc->rjkc", weights, cache.x, preferred_element_type=dtype)
    square = square.reshape(rows, blocks, per, per, -1)
    own = jnp.eye(per, dtype=bool)[..., None]
    y = jnp.sum(jnp.where(own, square.astype(acc), 0), axis=3)
    return y.reshape(rows, sizes["H"], -1)
