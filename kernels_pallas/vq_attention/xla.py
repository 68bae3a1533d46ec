"""VQ attention in linear time as plain XLA operations: block scores, and a prefix over blocks for
the cache.

Keys are numbered as in the reference: the M window keys first, then the T present ones. While the
block that starts at query rL is processed, the cache holds exactly the keys c < rL and the window
the keys rL .. rL+M+L-1, for every M (longer or shorter than L, or zero). So the keys leave the
window in blocks of L, block g of the numbering being absorbed between query blocks g and g+1:

    n_r = n_in + sum_{g<r} b_g        mean_r = (n_in mean_in + sum_{g<r} y_g) / max(n_r, 1)

with b_g, y_g the counts and value sums per code of key block g. `cache_prefix` computes this in one
of three orders of the same arithmetic.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..matmul import matmul
from .state import VQState

NEGATIVE = -1e30
REDUCTIONS = ("serial", "associative", "matmul")


def skew(x: Array, length: int) -> Array:
    """Turn columns counted from the diagonal into absolute columns: out[i, j] = x[i, j - i], 0
    elsewhere.

    Args:
        x: [..., L, m].
        length: number W of output columns, at least L + m - 1.

    Returns:
        [..., L, W]. Built by padding and reshaping, so it needs no gather and no mask.
    """
    *lead, rows, columns = x.shape
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, 0), (0, length + 1 - columns)])
    flat = x.reshape(*lead, rows * (length + 1))[..., : rows * length]
    return flat.reshape(*lead, rows, length)


def log_count(count: Array) -> Array:
    """log n, the score bias of a code that stands for n keys; -1e30 where n = 0."""
    return jnp.where(count > 0, jnp.log(jnp.maximum(count, 1)), NEGATIVE)


def window_mask(block_len: int, mem_len: int, first: Array | int, locality: bool) -> Array:
    """Which of the M+L window slots query i may see: causal, not before slot `first`, and within M
    if local.

    Returns:
        [..., L, M+L] bool; leading axes are those of `first`.
    """
    i = jnp.arange(block_len)[:, None]
    j = jnp.arange(mem_len + block_len)[None, :]
    keep = (j <= i + mem_len) & (j >= jnp.asarray(first)[..., None, None])
    return keep & (j >= i) if locality else keep


def block_summaries(codes: Array, values: Array, n_code: int) -> tuple[Array, Array]:
    """Counts [B, h, R, S] and value sums [B, h, R, S, V] per code, of blocks of L keys.

    Args:
        codes: [B, h, R, L]; S marks a key that counts nowhere.
        values: [B, h, R, L, V].
    """
    assigned = jax.nn.one_hot(codes, n_code, dtype=values.dtype)
    sums = matmul("bhrls,bhrlv->bhrsv", assigned, values)
    return jnp.sum(assigned.astype(sums.dtype), axis=-2), sums


def cache_prefix(
    count: Array, mean: Array, segment: Array, counts: Array, sums: Array, segments: Array,
    *, reduction: str, mask_segments: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """Caches before block 0, 1, .., R: the running merge of the incoming cache with R block
    summaries.

    Args:
        count, mean, segment: incoming cache [B, h, S], [B, h, S, V], [B].
        counts, sums, segments: block summaries [B, h, R, S], [B, h, R, S, V], and the document id
            of the newest key of each block [B, R].
        reduction: "serial" (a scan), "associative" (a parallel scan of the pairs (n, mean) under
            (n1,m1)+(n2,m2) = (n1+n2, (n1 m1 + n2 m2)/(n1+n2))), or "matmul" (one triangular
            matmul).
        mask_segments: a merge drops what belongs to an older document.

    Returns:
        counts [B, h, R+1, S] and means [B, h, R+1, S, V] of the caches.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}; choose one of {', '.join(REDUCTIONS)}")
    counts = jnp.concatenate([count[:, :, None], counts], axis=2)
    segments = jnp.concatenate([segment[:, None], segments], axis=1)
    if reduction == "matmul":
        sums = jnp.concatenate([(count[..., None] * mean)[:, :, None], sums], axis=2)
        size = segments.shape[1]
        reach = jnp.tril(jnp.ones((size, size), sums.dtype))
        if mask_segments:
            reach = reach * (segments[:, :, None] == segments[:, None, :]).astype(sums.dtype)
            prefix = lambda a: jnp.einsum("brg,bhg...->bhr...", reach, a, precision="highest")
        else:
            prefix = lambda a: jnp.einsum("rg,bhg...->bhr...", reach, a, precision="highest")
        counts, sums = prefix(counts), prefix(sums)
        return counts, sums / jnp.maximum(counts, 1)[..., None]

    means = sums / jnp.maximum(counts[:, :, 1:], 1)[..., None]
    means = jnp.concatenate([mean[:, :, None], means], axis=2)

    def merge(a, b):  # elements lead with the block axis
        (seg_a, n_a, mean_a), (seg_b, n_b, mean_b) = a, b
        if mask_segments:
            same = (seg_a == seg_b)[..., None, None]
            n_a = jnp.where(same, n_a, 0)
            mean_a = jnp.where(same[..., None], mean_a, 0)
        n = n_a + n_b
        total = jnp.maximum(n, 1)
        return seg_b, n, (n_a / total)[..., None] * mean_a + (n_b / total)[..., None] * mean_b

    elements = tuple(jnp.moveaxis(a, ax, 0) for a, ax in ((segments, 1), (counts, 2), (means, 2)))
    if reduction == "serial":
        first = tuple(a[0] for a in elements)
        rest = tuple(a[1:] for a in elements)

        def advance(carry, block):
            carry = merge(carry, block)
            return carry, carry[1:]

        _, (counts, means) = lax.scan(advance, first, rest)
        counts, means = (jnp.concatenate([a[None], b]) for a, b in zip(first[1:], (counts, means)))
    else:
        _, counts, means = lax.associative_scan(merge, elements)
    return jnp.moveaxis(counts, 0, 2), jnp.moveaxis(means, 0, 2)


def _window_frames(x: Array, mem: int, block: int, n_block: int) -> Array:
    """[..., M + R*L, *] -> [..., R, M, *]: for each block the M entries before it. Axis -2 is
    cut.
    """
    x = x[..., : mem + (n_block - 1) * block, :]
    if mem % block == 0:  # shifted copies of whole blocks
        span = mem // block
        if span == 0:
            return jnp.zeros((*x.shape[:-2], n_block, 0, x.shape[-1]), x.dtype)
        whole = x.reshape(*x.shape[:-2], span + n_block - 1, block, x.shape[-1])
        return jnp.concatenate([whole[..., i : i + n_block, :, :] for i in range(span)], axis=-2)
    index = jnp.arange(n_block)[:, None] * block + jnp.arange(mem)
    return jnp.take(x, index, axis=-2)


def vq_attention_xla(
    q, k, codes, v, codebook, *, content_bias, position_bias, rel, state: VQState, segment_ids,
    lengths, block_len, use_cache, grad_through_cache, mask_segments, reduction,
) -> tuple[Array, VQState]:  # fmt: skip
    """Arguments as in `vq_attention`; matmul inputs keep their dtype, scores and softmax are
    float32.
    """
    dtype = q.dtype
    acc = jnp.promote_types(dtype, jnp.float32)
    batch, heads, t_len, d_k = q.shape
    kv_heads, n_code, mem, d_v = k.shape[1], codebook.shape[1], rel.shape[1] - 1, v.shape[-1]
    block = min(block_len, t_len)
    n_block = -(-t_len // block)
    tail = n_block * block - t_len
    ragged = lengths is not None
    if ragged:  # padding may hold anything, NaN included
        valid = (jnp.arange(t_len) < lengths[:, None])[:, None, :, None]
        q, k, v = (jnp.where(valid, a, 0) for a in (q, k, v))
    used = lengths if ragged else jnp.full((batch,), t_len, jnp.int32)

    def pad(a, axis, value=0):
        widths = [(0, tail if i == axis else 0) for i in range(a.ndim)]
        return jnp.pad(a, widths, constant_values=value)

    stop = (lambda a: a) if grad_through_cache else lax.stop_gradient
    z = jnp.concatenate([state.codes, pad(codes, 2, n_code)], axis=2)
    keys = jnp.concatenate([state.keys.astype(dtype), pad(k.astype(dtype), 2)], axis=2)
    values = jnp.concatenate([state.values.astype(dtype), pad(v.astype(dtype), 2)], axis=2)
    segment = jnp.concatenate([state.segments, pad(segment_ids, 1)], axis=1)
    if ragged or tail:  # padding belongs to the last document
        end = jnp.maximum(mem + used - 1, 0)[:, None]
        is_token = jnp.arange(segment.shape[1]) <= end
        segment = jnp.where(is_token, segment, jnp.take_along_axis(segment, end, axis=1))

    # The cache before each block, and after the last key.
    n_keys = n_block * block
    leaving = jnp.where(jnp.arange(n_keys) < used[:, None, None], z[:, :, :n_keys], n_code)
    leaving_segment = segment[:, :n_keys].reshape(batch, n_block, block)
    newest = leaving_segment[:, :, -1]
    last = jnp.clip(used - 1 - jnp.arange(n_block)[:, None] * block, 0, block - 1).T  # [B, R]
    if ragged or tail:
        newest = jnp.take_along_axis(leaving_segment, last[..., None], axis=2)[..., 0]
    by_block = leaving.reshape(batch, kv_heads, n_block, block)
    if mask_segments:
        by_block = jnp.where((leaving_segment == newest[..., None])[:, None], by_block, n_code)
    counts, sums = block_summaries(
        by_block,
        stop(values[:, :, :n_keys]).reshape(batch, kv_heads, n_block, block, d_v),
        n_code,
    )
    counts, means = cache_prefix(
        state.count.astype(acc), stop(state.mean).astype(acc), state.cache_segment,
        counts, sums, newest, reduction=reduction, mask_segments=mask_segments,
    )  # fmt: skip

    # Scores of the three key groups; one maximum and one normaliser over all of them.
    group = heads // kv_heads
    width = mem + block

    def with_bias(
        bias,
    ):  # [B, h, R, G, L, K]: the heads of a group share keys, so they lie together
        x = (q.astype(acc) + bias.astype(acc)[None, :, None, :]).astype(dtype)
        return jnp.moveaxis(pad(x, 2).reshape(batch, kv_heads, group, n_block, block, d_k), 2, 3)

    def window(a):  # [B, h, M + R*L, *] -> [B, h, R, W, *]
        older = stop(_window_frames(a, mem, block, n_block))
        own = a[:, :, mem:].reshape(batch, kv_heads, n_block, block, a.shape[-1])
        return jnp.concatenate([older, own], axis=3)

    qc = with_bias(content_bias)
    scores = matmul("bhrgik,bhrjk->bhrgij", qc, window(keys))
    # Position bias by column m = j - i, i.e. distance M - m: one column for the far end (distance
    # M), apart so that the matmul has an even width, and M columns for distances M-1 .. 0.
    qp = with_bias(position_bias)
    far = jnp.einsum("bhrgik,hk->bhrgi", qp, rel[:, -1].astype(dtype), preferred_element_type=acc)
    near = matmul("bhrgik,hmk->bhrgim", qp, rel[:, -2::-1].astype(dtype))
    scores = scores + skew(jnp.concatenate([far[..., None], near], axis=-1), width)
    first = jnp.maximum(mem - state.offset[:, None] - jnp.arange(n_block) * block, 0)  # [B, R]
    keep = window_mask(block, mem, first, locality=not use_cache)[:, None, :, None]
    if mask_segments:
        seg_q = segment[:, mem:].reshape(batch, n_block, block)
        seg_k = jnp.concatenate(
            [_window_frames(segment[..., None], mem, block, n_block)[..., 0], seg_q], axis=2
        )
        keep &= (seg_q[..., :, None] == seg_k[..., None, :])[:, None, :, None]
    scores = jnp.where(keep, scores, NEGATIVE)
    top = jnp.max(scores, axis=-1, keepdims=True)
    if use_cache:
        constant = lax.stop_gradient(codebook).astype(dtype)
        cache_scores = matmul("bhrgik,hsk->bhrgis", qc, constant)
        cache_scores += log_count(counts[:, :, :n_block, None, None])
        if mask_segments:
            cache_segment = jnp.concatenate([state.cache_segment[:, None], newest[:, :-1]], axis=1)
            same = seg_q == cache_segment[..., None]
            cache_scores = jnp.where(same[:, None, :, None, :, None], cache_scores, NEGATIVE)
        top = jnp.maximum(top, jnp.max(cache_scores, axis=-1, keepdims=True))
    top = lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = matmul("bhrgij,bhrjv->bhrgiv", weights.astype(dtype), window(values))
    if use_cache:
        weights = jnp.exp(cache_scores - top)
        total += jnp.sum(weights, axis=-1, keepdims=True)
        out += matmul(
            "bhrgis,bhrsv->bhrgiv", weights.astype(dtype), means[:, :, :n_block].astype(dtype)
        )
    out = jnp.moveaxis((out / total).astype(dtype), 3, 2)
    out = out.reshape(batch, heads, n_block * block, d_v)[:, :, :t_len]
    if ragged:
        out = jnp.where(valid, out, 0)

    def newest_window(a, axis):
        if not ragged:
            return lax.slice_in_dim(a, t_len, t_len + mem, axis=axis)
        cut = lambda row, n: lax.dynamic_slice_in_dim(row, n, mem, axis=axis - 1)
        return jax.vmap(cut)(a, used)

    new_state = VQState(
        offset=state.offset + used,
        codes=newest_window(z, 2),
        keys=stop(newest_window(keys, 2)).astype(state.keys.dtype),
        values=stop(newest_window(values, 2)).astype(state.values.dtype),
        segments=newest_window(segment, 1),
        mean=stop(means[:, :, -1]).astype(state.mean.dtype),
        count=counts[:, :, -1].astype(state.count.dtype),
        cache_segment=jnp.where(used > 0, newest[:, -1], state.cache_segment),
    )
    return out, new_state
