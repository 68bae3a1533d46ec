"""The recurrent state of VQ attention: an uncompressed window of M keys and a compressed cache of S
codes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class VQState(NamedTuple):
    """State after `offset` tokens; its size does not depend on how many tokens came before.

    The window holds the positions offset-M .. offset-1 in order (slots before position 0 are
    empty); every older key has been absorbed into the cache.

    Attributes:
        offset: [B] int32, tokens seen so far.
        codes: [B, h, M] int32, code of each window key; S marks an empty slot.
        keys: [B, h, M, K], quantised window keys.
        values: [B, h, M, V], window values.
        segments: [B, M] int32, document ids of the window; 0 in empty slots.
        mean: [B, h, S, V] float32, mean value per code over the absorbed keys.
        count: [B, h, S] float32, absorbed keys per code (exact up to 2**24).
        cache_segment: [B] int32, document id of the newest absorbed key.
    """

    offset: Array
    codes: Array
    keys: Array
    values: Array
    segments: Array
    mean: Array
    count: Array
    cache_segment: Array


def init_state(
    batch: int, kv_heads: int, mem_len: int, n_code: int, d_k: int, d_v: int, dtype=jnp.float32
) -> VQState:
    """The state before the first token: empty window, empty cache.

    Args:
        batch, kv_heads, mem_len, n_code, d_k, d_v: sizes B, h, M, S, K, V.
        dtype: of window keys and values; means and counts are at least float32.
    """
    acc = jnp.promote_types(dtype, jnp.float32)
    return VQState(
        offset=jnp.zeros((batch,), jnp.int32),
        codes=jnp.full((batch, kv_heads, mem_len), n_code, jnp.int32),
        keys=jnp.zeros((batch, kv_heads, mem_len, d_k), dtype),
        values=jnp.zeros((batch, kv_heads, mem_len, d_v), dtype),
        segments=jnp.zeros((batch, mem_len), jnp.int32),
        mean=jnp.zeros((batch, kv_heads, n_code, d_v), acc),
        count=jnp.zeros((batch, kv_heads, n_code), acc),
        cache_segment=jnp.zeros((batch,), jnp.int32),
    )
