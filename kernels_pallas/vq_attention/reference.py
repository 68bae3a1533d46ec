"""VQ attention by its definition: dense softmax attention over quantised keys, O(T^2). The truth
for tests.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from .state import VQState


def vq_attention_reference(
    q, k, codes, v, codebook, *, content_bias, position_bias, rel, state: VQState, segment_ids,
    lengths, block_len, use_cache, grad_through_cache, mask_segments, reduction,
) -> tuple[Array, VQState]:  # fmt: skip
    """Arguments as in `vq_attention`. `reduction` only orders the arithmetic, so it changes nothing
    here.

    Keys are numbered c = 0 .. M+T-1: the M of the window, then the T present ones; query t sits at
    M+t and block b starts at query index b. A key c < b is read from the cache, i.e. as the current
    codeword of its code (a constant); a younger key is read as it stands, with its straight-through
    gradient.
    """
    del reduction
    acc = jnp.promote_types(q.dtype, jnp.float32)
    heads, n_code, mem = q.shape[1], codebook.shape[1], rel.shape[1] - 1
    t_len = q.shape[2]
    q, k, v = (a.astype(acc) for a in (q, k, v))
    codebook = lax.stop_gradient(codebook.astype(acc))
    spread = lambda a: jnp.repeat(a, heads // a.shape[1], axis=1)  # kv heads -> query heads

    z = jnp.concatenate([state.codes, codes], axis=2)
    key = jnp.concatenate([state.keys.astype(acc), k], axis=2)
    value = jnp.concatenate([state.values.astype(acc), v], axis=2)
    segment = jnp.concatenate([state.segments, segment_ids], axis=1)
    in_use = jnp.arange(mem + t_len) < mem + lengths[:, None]  # [B, N]: not padding
    key, value = (jnp.where(in_use[:, None, :, None], a, 0) for a in (key, value))
    q = jnp.where((jnp.arange(t_len) < lengths[:, None])[:, None, :, None], q, 0)

    t, c = jnp.arange(t_len)[:, None], jnp.arange(mem + t_len)[None, :]
    block = t // block_len * block_len
    distance = mem + t - c
    absorbed, older_block = c < block, c < block + mem
    visible = (distance >= 0) & (c >= mem - state.offset[:, None, None])  # [B, T, N]
    if not use_cache:
        visible &= distance <= mem
    if mask_segments:
        visible &= segment_ids[:, :, None] == segment[:, None, :]
    visible = visible[:, None]

    as_code = jnp.take_along_axis(codebook[None], jnp.minimum(z, n_code - 1)[..., None], axis=2)
    qc = q + content_bias.astype(acc)[None, :, None, :]
    qp = q + position_bias.astype(acc)[None, :, None, :]
    dots = lambda a: jnp.einsum("bhtk,bhnk->bhtn", qc, spread(a), precision=lax.Precision.HIGHEST)
    fixed_key = key if grad_through_cache else lax.stop_gradient(key)
    scores = jnp.where(absorbed, dots(as_code), jnp.where(older_block, dots(fixed_key), dots(key)))
    by_distance = jnp.einsum(
        "bhtk,hdk->bhtd", qp, jnp.repeat(rel.astype(acc), heads // rel.shape[0], axis=0),
        precision=lax.Precision.HIGHEST,
    )  # fmt: skip
    at_distance = jnp.broadcast_to(jnp.clip(distance, 0, mem), scores.shape)
    bias = jnp.take_along_axis(by_distance, at_distance, axis=-1)
    scores = scores + jnp.where((distance >= 0) & (distance <= mem), bias, 0)
    scores = jnp.where(visible, scores, -jnp.inf)

    cache_scores = dots(jnp.broadcast_to(codebook, (q.shape[0], *codebook.shape)))
    count = spread(state.count)[:, :, None, :]
    reachable = (count > 0) & use_cache
    if mask_segments:
        reachable &= (segment_ids == state.cache_segment[:, None])[:, None, :, None]
    cache_scores = jnp.where(reachable, cache_scores + jnp.log(jnp.maximum(count, 1)), -jnp.inf)

    both = jnp.concatenate([cache_scores, scores], axis=-1)
    weights = jnp.exp(both - lax.stop_gradient(jnp.max(both, axis=-1, keepdims=True)))
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    w_cache, w_keys = weights[..., :n_code], weights[..., n_code:]
    mix = lambda w, a: jnp.einsum("bhtn,bhnv->bhtv", w, a, precision=lax.Precision.HIGHEST)
    mean = state.mean if grad_through_cache else lax.stop_gradient(state.mean)
    fixed_value = value if grad_through_cache else lax.stop_gradient(value)
    out = mix(w_cache, spread(mean.astype(acc)))
    out += mix(jnp.where(older_block, w_keys, 0), spread(fixed_value))
    out += mix(jnp.where(older_block, 0, w_keys), spread(value))
    out = jnp.where((jnp.arange(t_len) < lengths[:, None])[:, None, :, None], out, 0)
    new_state = _absorb(state, z, key, value, segment, lengths, n_code, mask_segments)
    if not grad_through_cache:
        new_state = VQState(*(lax.stop_gradient(a) for a in new_state))
    return out, new_state


def _absorb(state, z, key, value, segment, lengths, n_code, mask_segments) -> VQState:
    """Move the oldest `lengths` keys of [window | present] into the cache; the next M are the new
    window.
    """
    acc, mem = key.dtype, state.codes.shape[2]
    index = jnp.arange(z.shape[2])
    leaving = (index < lengths[:, None])[:, None] & (z < n_code)  # [B, h, N]
    newest = jnp.take_along_axis(segment, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
    newest = jnp.where(lengths > 0, newest, state.cache_segment)
    count, mean = state.count.astype(acc), state.mean.astype(acc)
    if mask_segments:
        leaving &= (segment == newest[:, None])[:, None]
        same = (newest == state.cache_segment)[:, None, None]
        count, mean = jnp.where(same, count, 0), jnp.where(same[..., None], mean, 0)
    onehot = (z[..., None] == jnp.arange(n_code)) * leaving[..., None].astype(acc)
    new_count = count + onehot.sum(2)
    sums = count[..., None] * mean + jnp.einsum(
        "bhns,bhnv->bhsv", onehot, value, precision="highest"
    )
    keep = lengths[:, None] + jnp.arange(mem)
    take = lambda a, i: jnp.take_along_axis(a, i, axis=-1 if a.ndim < 4 else 2)
    return VQState(
        offset=state.offset + lengths,
        codes=take(z, jnp.broadcast_to(keep[:, None], (*z.shape[:2], mem))),
        keys=take(key, keep[:, None, :, None]).astype(state.keys.dtype),
        values=take(value, keep[:, None, :, None]).astype(state.values.dtype),
        segments=take(segment, keep),
        mean=(sums / jnp.maximum(new_count, 1)[..., None]).astype(state.mean.dtype),
        count=new_count.astype(state.count.dtype),
        cache_segment=newest,
    )
