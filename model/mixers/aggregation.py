"""Means over the tokens of a context, for mixers whose context is a sum: all forms of masks.

With p [B, N, E] and weights w the result is a_m = sum_n w_mn p_n / sum_n w_mn, in at least float32;
a row whose weights are all zero gives 0, in value and gradient. Causal and block-causal means cost
as much as reading p. Sources: arXiv 2411.12663 and 2604.06129.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Mask = Array | str | None  # "causal", weights [B, N], or weights per query [B or 1, M, N]
Frames = int | Sequence[int]  # number of frames of equal length, or the length of every frame


class MeanState(NamedTuple):
    """What a stream has seen.

    Attributes:
        mean: [B, 1, E], at least float32. count: [B], the sum of the weights so far.
    """

    mean: Array
    count: Array


def frame_lengths(frames: Frames, tokens: int) -> tuple[int, ...]:
    """Tokens of every frame.

    Raises:
        ValueError: they do not add up to `tokens`, or a frame has none.
    """
    if isinstance(frames, int):
        if frames < 1 or tokens % frames:
            raise ValueError(f"{tokens} tokens are no {frames} frames of equal length")
        return (tokens // frames,) * frames
    lengths = tuple(int(n) for n in frames)
    if sum(lengths) != tokens or min(lengths, default=0) < 1:
        raise ValueError(f"frames of {lengths} tokens are not the {tokens} tokens")
    return lengths


def aggregate(p: Array, mask: Mask = None, *, frames: Frames | None = None) -> Array:
    """Means of p over the tokens that each query sees.

    Args:
        p: [B, N, E].
        mask: None: all see all tokens, Q = 1; "causal": token m sees 0..m, Q = N; [B, N] bool, int
            or float weights, Q = 1; [B or 1, M, N], weights of every query, Q = M (which costs
            M N E). Masks are constants: no gradient. Tokens of weight zero may hold anything where
            the mask is [B, N].
        frames: block-causal: tokens of frame f see the frames 0..f, Q = number of frames. Goes with
            no mask, or with one [B, N].

    Returns:
        [B, Q, E] in at least float32.

    Raises:
        ValueError: a mask of another shape or name, or frames with a mask per query.
    """
    p = _wide(p)
    if isinstance(mask, str):
        if mask != "causal" or frames is not None:
            raise ValueError(f"mask={mask!r}; the only name is 'causal', and it takes no frames")
        seen = jnp.arange(1, p.shape[1] + 1, dtype=p.dtype)
        return jnp.cumsum(p, axis=1) / seen[:, None]
    if mask is None and frames is None:
        return jnp.mean(p, axis=1, keepdims=True)
    weights = None if mask is None else lax.stop_gradient(jnp.asarray(mask).astype(p.dtype))
    if weights is not None and weights.ndim == 3:
        return _per_query(p, weights, frames)
    if weights is not None and weights.shape != p.shape[:2]:
        raise ValueError(f"a mask of shape {weights.shape} for context tokens {p.shape[:2]}")
    if weights is not None:
        p = jnp.where(weights[..., None] != 0, p * weights[..., None], 0)
    lengths = frame_lengths(1 if frames is None else frames, p.shape[1])
    sums = jnp.cumsum(_frame_sums(p, lengths), axis=1)
    if weights is None:
        counts = jnp.cumsum(jnp.asarray(lengths, p.dtype))[None]
    else:
        counts = jnp.cumsum(_frame_sums(weights[..., None], lengths)[..., 0], axis=1)
    return _divide(sums, counts[..., None])


def rows_of_tokens(rows: Array, tokens: int, frames: Frames | None) -> Array:
    """The row that every token reads, [B, 1 or tokens, E], from what `aggregate` gives."""
    if frames is None:
        return rows
    lengths = frame_lengths(frames, tokens)
    if len(lengths) == 1:
        return rows
    return jnp.repeat(rows, np.asarray(lengths), axis=1, total_repeat_length=tokens)


def init_mean(batch: int, width: int, dtype=jnp.float32) -> MeanState:
    """Nothing seen."""
    return MeanState(jnp.zeros((batch, 1, width), dtype), jnp.zeros((batch,), dtype))


def extend_mean(
    state: MeanState, p: Array, mask: Array | None = None, *, count_chunks: bool = False
) -> MeanState:
    """The state after the tokens p [B, N, E], weighted by mask [B, N].

    count_chunks: the published rule, which averages the means of chunks whatever their length.
    """
    p = _wide(p)
    if mask is None:
        mean, count = jnp.mean(p, axis=1, keepdims=True), jnp.full(p.shape[:1], p.shape[1], p.dtype)
    else:
        mean = aggregate(p, mask)
        count = jnp.sum(lax.stop_gradient(mask).astype(p.dtype), axis=1)
    count = jnp.ones_like(count) if count_chunks else count
    return merge_means(state, MeanState(mean, count))


def merge_means(a: MeanState, b: MeanState) -> MeanState:
    """The state of a and b together; associative."""
    count = a.count + b.count
    share = _divide(b.count, count)[:, None, None]
    return MeanState(a.mean + share * (b.mean - a.mean), count)


def block_causal_mask(lengths: Sequence[int]) -> np.ndarray:
    """[1, N, N] float32: the quadratic form of `frames`, for checks."""
    frame = np.repeat(np.arange(len(lengths)), lengths)
    return np.float32(frame[None, :] <= frame[:, None])[None]


def _per_query(p: Array, weights: Array, frames: Frames | None) -> Array:
    if frames is not None:
        raise ValueError("frames go with a mask [B, N], not with one per query")
    if weights.shape[0] not in (1, p.shape[0]) or weights.shape[2] != p.shape[1]:
        raise ValueError(f"a mask of shape {weights.shape} for context tokens {p.shape[:2]}")
    weights = jnp.broadcast_to(weights, (p.shape[0], *weights.shape[1:]))
    sums = jnp.einsum("bmn,bne->bme", weights, p, precision=lax.Precision.HIGHEST)
    return _divide(sums, jnp.sum(weights, axis=2, keepdims=True))


def _frame_sums(p: Array, lengths: tuple[int, ...]) -> Array:
    """[B, F, E]: sums over the tokens of every frame."""
    if len(set(lengths)) == 1:
        return jnp.sum(p.reshape(p.shape[0], len(lengths), -1, p.shape[-1]), axis=2)
    ends = np.cumsum(lengths)[:-1].tolist()
    return jnp.stack([jnp.sum(part, axis=1) for part in jnp.split(p, ends, axis=1)], axis=1)


def _divide(sums: Array, counts: Array) -> Array:
    """sums / counts, and 0 where the count is 0: without NaN in the gradient either."""
    seen = counts > 0
    return jnp.where(seen, sums / jnp.where(seen, counts, 1), 0)


def _wide(p: Array) -> Array:
    return p.astype(jnp.promote_types(p.dtype, jnp.float32))
