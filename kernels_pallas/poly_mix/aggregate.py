"""Means of features over the tokens that a query sees: the forms of masks, each at linear cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .. import dispatch
from ..time_axis import spread
from .state import PolyState, reciprocal

BLOCK = 8  # rows of a block of `prefix_sums`


def runs(frames: Sequence[int]) -> list[tuple[int, int]]:
    """Lengths of frames as runs (length, how many in a row have it)."""
    return [(length, len(list(group))) for length, group in itertools.groupby(frames)]


def frame_sums(x: Array, frames: Sequence[int]) -> Array:
    """x [B, N, ...] summed within frames of these lengths: [B, F, ...]."""
    sums, start = [], 0
    for length, count in runs(frames):
        part = lax.slice_in_dim(x, start, start := start + length * count, axis=1)
        sums.append(jnp.sum(part.reshape(x.shape[0], count, length, *x.shape[2:]), axis=2))
    return sums[0] if len(sums) == 1 else jnp.concatenate(sums, axis=1)


def prefix_sums(x: Array) -> Array:
    """Sums of x [B, N, ...] up to each row.

    On GPUs within blocks of a few rows term by term, which XLA computes from x where it is needed
    (the scan of the blocks is small), where its own form of long scans goes over all several times.
    """
    n = x.shape[1]
    if n == 1:
        return x
    if n % BLOCK or n == BLOCK or not dispatch.current_device().startswith("gpu"):
        return jnp.cumsum(x, axis=1)
    parts = x.reshape(x.shape[0], n // BLOCK, BLOCK, *x.shape[2:])
    local = [parts[:, :, 0]]
    for i in range(1, BLOCK):
        local.append(local[-1] + parts[:, :, i])
    before = jnp.cumsum(local[-1], axis=1)[:, :-1]
    before = jnp.pad(before, ((0, 0), (1, 0), *((0, 0),) * (x.ndim - 2)))
    return (jnp.stack(local, axis=2) + before[:, :, None]).reshape(x.shape)


def repeat_frames(rows: Array, frames: Sequence[int]) -> Array:
    """One row per frame [B, F, ...] as one per token [B, N, ...]."""
    parts, start = [], 0
    for length, count in runs(frames):
        part = lax.slice_in_dim(rows, start, start := start + count, axis=1)
        shape = (rows.shape[0], count, length, *rows.shape[2:])
        part = jnp.broadcast_to(part[:, :, None], shape)
        parts.append(part.reshape(rows.shape[0], count * length, *rows.shape[2:]))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def seen_tokens(weights: Array | None, query_weights: Array | None) -> Array | None:
    """[B or 1, N] bool: which tokens any query sees; None for all."""
    if query_weights is not None:
        return jnp.any(query_weights != 0, axis=1)
    return None if weights is None else weights != 0


def select_seen(x: Array, seen: Array | None) -> Array:
    """x [B, N, E] with 0 for tokens that no query sees: what stands there may be NaN."""
    return x if seen is None else jnp.where(spread(seen, x), x, 0)


def aggregate(
    p: Array,
    *,
    weights: Array | None = None,
    causal: bool = False,
    frames: Sequence[int] | None = None,
    query_weights: Array | None = None,
    state: PolyState | None = None,
) -> tuple[Array, PolyState | None]:
    """a_r = sum of w_n p_n / sum of w_n over the tokens n that row r sees.

    Linear in N in all forms but the last; sums and counts in at least float32. Weights and counts
    are constants: they have no gradient.

    Args:
        p: [B, N, E] features of the tokens (arXiv 2604.06129; for 2411.12663, its products).
        weights: [B, N] or [1, N] weight of each token, bool, integer or float; None means 1. What
            stands at tokens of weight 0 may be NaN.
        causal: row n sees the tokens up to n: R = N rows.
        frames: lengths of the frames that the tokens come in: row f sees frames 0 .. f, R = F.
        query_weights: [B, M, N] or [1, M, N] weight of token n for query m: R = M rows, at a cost
            of M N E. Alone, without any of the other arguments.
        state: what was seen before the first token, by every row.

    Returns:
        rows [B, R, E], R = 1 without causal, frames and query_weights; rows that see no weight are
        0. And the state after the last token (None with query_weights). Both in p's dtype, at least
        float32.

    Raises:
        ValueError: arguments that do not belong together, or frames that do not add up to N.
    """
    check_form(p, causal, frames, query_weights, weights, state)
    acc = jnp.promote_types(p.dtype, jnp.float32)
    p = select_seen(p, seen_tokens(weights, query_weights)).astype(acc)
    if query_weights is not None:
        w = lax.stop_gradient(query_weights.astype(acc))
        matrix, spec = (w[0], "mn,bne->bme") if w.shape[0] == 1 else (w, "bmn,bne->bme")
        rows = jnp.einsum(spec, matrix, p, precision=lax.Precision.HIGHEST)
        return rows * reciprocal(jnp.sum(w, axis=2))[..., None], None
    batch, n, _ = p.shape
    frames = (n,) if frames is None and not causal else frames
    count = counts(n, weights, causal, frames, acc)
    if weights is not None:
        p = spread(lax.stop_gradient(weights.astype(acc)), p) * p
    sums = p if causal else frame_sums(p, frames)
    return rows_from_sums(prefix_sums(sums), count, state)


def counts(n: int, weights: Array | None, causal: bool, frames, dtype) -> Array:
    """Sums of the weights that each row sees, without those of a state, [B, R] or [1, R], as
    constants; see `aggregate`."""
    frames = (n,) if frames is None and not causal else frames
    if weights is None:
        ends = np.arange(1, n + 1) if causal else np.cumsum(frames)
        return jnp.asarray(ends[None], dtype)
    w = lax.stop_gradient(weights.astype(dtype))
    return jnp.cumsum(w if causal else frame_sums(w, frames), axis=1)


def rows_from_sums(sums: Array, count: Array, state: PolyState | None) -> tuple[Array, PolyState]:
    """Rows and state of `aggregate`.

    Args:
        sums: [B, R, E] weighted sums of what each row sees, without the state.
        count: [B or 1, R] sums of those weights.
    """
    if state is not None:
        before = lax.stop_gradient(state.count)[:, None]
        count = before + count
        share = reciprocal(count)[..., None]
        rows = share * sums + (share * before[..., None]) * state.mean[:, None]
    else:
        rows = sums * reciprocal(count)[..., None]
    last = jnp.broadcast_to(count[:, -1], (sums.shape[0],))
    return rows, PolyState(rows[:, -1], last)


def check_form(p, causal, frames, query_weights, weights, state) -> None:
    """Raises ValueError unless the arguments of `aggregate` belong together."""
    batch, n = p.shape[:2]
    if causal and frames is not None:
        raise ValueError("causal and frames are two masks; give one (causal is frames of 1)")
    if frames is not None and (min(frames, default=0) < 1 or sum(frames) != n):
        raise ValueError(f"frames {tuple(frames)} are not lengths that add up to N={n}")
    if query_weights is not None:
        if causal or frames is not None or weights is not None or state is not None:
            raise ValueError(
                "query_weights say all: no causal, frames, weights or state beside them"
            )
        shape = query_weights.shape
        if len(shape) != 3 or shape[0] not in (1, batch) or shape[2] != n:
            raise ValueError(f"query_weights has shape {shape}, expected [{batch} or 1, M, {n}]")
    if weights is not None and weights.shape not in ((batch, n), (1, n)):
        raise ValueError(f"weights has shape {weights.shape}, expected {(batch, n)}")
