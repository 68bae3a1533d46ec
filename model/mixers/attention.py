"""Quadratic causal attention: the baselines of the linear-time mixers, with a key-value cache."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ...kernels_pallas.vq_attention import skew

NEGATIVE = -1e30


class DenseState(NamedTuple):
    """Key-value cache of `max_length` slots; grows with the context, unlike VQState.

    Attributes:
        offset: [B] int32 tokens seen; keys [B, h, N, K]; values [B, h, N, V]; segments [B, N]
            int32.
    """

    offset: Array
    keys: Array
    values: Array
    segments: Array


def init_dense_state(
    batch: int, kv_heads: int, max_length: int, d_k: int, d_v: int, dtype
) -> DenseState:
    """An empty cache of `max_length` slots. Writing past its end is the caller's error."""
    return DenseState(
        offset=jnp.zeros((batch,), jnp.int32),
        keys=jnp.zeros((batch, kv_heads, max_length, d_k), dtype),
        values=jnp.zeros((batch, kv_heads, max_length, d_v), dtype),
        segments=jnp.zeros((batch, max_length), jnp.int32),
    )


def dense_attention(
    q: Array, k: Array, v: Array, *, content_bias: Array, position_bias: Array, rel: Array | None,
    state: DenseState | None = None, segment_ids: Array | None = None, lengths: Array | None = None,
    mask_segments: bool = False,
) -> tuple[Array, DenseState | None]:  # fmt: skip
    """Causal softmax attention with Transformer-XL position bias at every distance, scores in full.

    s(t,j) = (q_t + u) . k_j + (q_t + v) . rho_{t-j}, o = softmax(s) v. Sizes and scaling as
    `vq_attention`.

    Args:
        rel: [h, N, K] table by distance 0..N-1 with N the number of keys (T, or the slots of the
            state), or None for no position bias.
        state: cache to continue; `lengths` [B] valid tokens per row.

    Returns:
        out [B, H, T, V] and the new state (None without one).
    """
    dtype = q.dtype
    acc = jnp.promote_types(dtype, jnp.float32)
    batch, heads, t_len, d_k = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    if lengths is not None:
        valid = (jnp.arange(t_len) < lengths[:, None])[:, None, :, None]
        q, k, v = (jnp.where(valid, a, 0) for a in (q, k, v))
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, t_len), jnp.int32)
    if state is None:
        keys, values, segments, start = k, v, segment_ids, jnp.zeros((batch,), jnp.int32)
    else:
        put = lax.dynamic_update_slice_in_dim
        write = jax.vmap(put, in_axes=(0, 0, 0, None))
        start = state.offset
        keys = write(state.keys, k.astype(state.keys.dtype), start, 1)
        values = write(state.values, v.astype(state.values.dtype), start, 1)
        segments = write(state.segments, segment_ids, start, 0)
        used = lengths if lengths is not None else t_len
        state = DenseState(state.offset + used, keys, values, segments)
    n_keys = keys.shape[2]
    grouped = lambda a: a.reshape(batch, kv_heads, group, t_len, -1)
    biased = lambda b: grouped((q.astype(acc) + b.astype(acc)[None, :, None]).astype(dtype))
    dot = lambda spec, a, b: jnp.einsum(spec, a, b.astype(dtype), preferred_element_type=acc)
    scores = dot("bhgik,bhjk->bhgij", biased(content_bias), keys)
    position = start[:, None] + jnp.arange(t_len)  # [B, T]
    distance = position[:, :, None] - jnp.arange(n_keys)  # [B, T, N]
    if rel is not None:
        by_distance = dot("bhgik,hdk->bhgid", biased(position_bias), rel)
        if state is None:  # key j is N-1-(i-j) places after the far end: a skew, no gather
            scores = scores + skew(by_distance[..., ::-1], 2 * t_len - 1)[..., t_len - 1 :]
        else:
            at = jnp.clip(distance, 0, n_keys - 1)[:, None, None]
            scores += jnp.take_along_axis(by_distance, jnp.broadcast_to(at, scores.shape), axis=-1)
    keep = distance >= 0
    if mask_segments:
        keep &= segment_ids[:, :, None] == segments[:, None, :]
    weights = jax.nn.softmax(jnp.where(keep[:, None, None], scores, NEGATIVE), axis=-1)
    out = dot("bhgij,bhjv->bhgiv", weights.astype(dtype), values)
    out = out.astype(dtype).reshape(batch, heads, t_len, -1)
    return (out if lengths is None else jnp.where(valid, out, 0)), state


def flash_attention(q: Array, k: Array, v: Array, *, segment_ids: Array | None = None) -> Array:
    """Causal attention through `jax.nn.dot_product_attention`: cuDNN flash on GPU in 16-bit, XLA
    elsewhere.

    Fused attention needs values as wide as keys, so wider values are cut into V/K heads that share
    q and k.

    Args:
        q: [B, H, T, K]; k: [B, h, T, K]; v: [B, h, T, V] with V a multiple of K.
        segment_ids: mask between documents where given (through a dense mask, XLA only).

    Returns:
        [B, H, T, V] in q's dtype. Scores are not scaled: q and k come scaled.
    """
    batch, heads, t_len, d_k = q.shape
    kv_heads, d_v = k.shape[1], v.shape[-1]
    if d_v % d_k:
        raise ValueError(f"fused attention needs d_v={d_v} to be a multiple of d_k={d_k}")
    parts, group = d_v // d_k, heads // kv_heads
    to_bthd = lambda a: jnp.moveaxis(a, 1, 2)
    # Query heads are laid out (h, part, group), key-value heads (h, part).
    q = jnp.broadcast_to(
        q.reshape(batch, kv_heads, 1, group, t_len, d_k),
        (batch, kv_heads, parts, group, t_len, d_k),
    ).reshape(batch, kv_heads * parts * group, t_len, d_k)
    k = jnp.repeat(k, parts, axis=1)
    v = jnp.moveaxis(v.reshape(batch, kv_heads, t_len, parts, d_k), 3, 2)
    v = v.reshape(batch, kv_heads * parts, t_len, d_k)
    fused = jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16)
    mask = None
    if segment_ids is not None:
        mask, fused = (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]), False
    out = jax.nn.dot_product_attention(
        to_bthd(q), to_bthd(k.astype(q.dtype)), to_bthd(v.astype(q.dtype)), mask=mask, scale=1.0,
        is_causal=True, implementation="cudnn" if fused else "xla",
    )  # fmt: skip
    out = jnp.moveaxis(out, 2, 1).reshape(batch, kv_heads, parts, group, t_len, d_k)
    return jnp.moveaxis(out, 2, 4).reshape(batch, heads, t_len, d_v)
