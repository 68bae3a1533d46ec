"""Small things that every op over a time axis does: padding, masking by length, turning around.

Arrays are [B, T, ...]; `lengths` [B] counts the valid tokens of each row, the rest is padding on
the right that may hold anything, NaN included.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def spread(mask: Array, x: Array) -> Array:
    """`mask` [B, T] with trailing axes of size 1, so that it broadcasts against x [B, T, ...]."""
    return mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))


def valid_mask(lengths: Array, t_len: int) -> Array:
    """[B, T] bool: which tokens are within their row's length."""
    return jnp.arange(t_len) < lengths[:, None]


def fill_invalid(x: Array, lengths: Array | None, value: float = 0) -> Array:
    """x [B, T, ...] with `value` past each row's length; x itself if `lengths` is None.

    By selection, not multiplication: what stood there (NaN, say) is gone, and gets no gradient.
    """
    if lengths is None:
        return x
    return jnp.where(spread(valid_mask(lengths, x.shape[1]), x), x, jnp.asarray(value, x.dtype))


def pad_time(x: Array, multiple: int, value: float = 0) -> Array:
    """x [B, T, ...] padded on the right with `value` to a multiple of `multiple` steps."""
    missing = -x.shape[1] % multiple
    if not missing:
        return x
    widths = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=value)


def flip_time(tree: Any) -> Any:
    """Every array [B, T, ...] of a pytree in reverse order of time."""
    return jax.tree.map(lambda x: jnp.flip(x, axis=1), tree)


def resets_from_segments(
    segment_ids: Array, before: Array | None = None, *, reverse: bool = False
) -> Array:
    """[B, T] bool: True where the id differs from the one at the step before.

    Args:
        segment_ids: [B, T] ids of documents.
        before: [B] id at the step before the first one; None lets the first step continue.
        reverse: time runs from the right, so the step before is the one on the right.
    """
    if reverse:
        return flip_time(resets_from_segments(flip_time(segment_ids), before))
    first = segment_ids[:, :1] if before is None else before[:, None]
    return segment_ids != jnp.concatenate([first, segment_ids[:, :-1]], axis=1)


def last_segment(segment_ids: Array, before: Array, lengths: Array | None = None) -> Array:
    """[B] id of each row's last valid token; `before` [B] where there is none, and its dtype."""
    count = jnp.full_like(before, segment_ids.shape[1]) if lengths is None else lengths
    newest = jnp.take_along_axis(segment_ids, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    return jnp.where(count > 0, newest.astype(before.dtype), before)


def join_chunks(
    decays: Array, lasts: Array, start: Array, *, reverse: bool = False
) -> tuple[Array, Array]:
    """States between chunks of time that were scanned each alone: s_{i+1} = decays_i s_i + lasts_i.

    Args:
        decays, lasts: [B, chunks, ...], broadcasting: a chunk's whole decay, its last state from 0.
        start: [B, ...] the state before the first chunk (the last one, if `reverse`).

    Returns:
        the states entering the chunks [B, chunks, ...], and the last state [B, ...].
    """

    def advance(state, chunk):
        decay, last = chunk
        return decay * state + last, state

    first = lambda x: jnp.moveaxis(x, 1, 0)
    # Unrolled, a few chunks are one fusion instead of a loop of small kernels.
    last, entering = lax.scan(
        advance, start, (first(decays), first(lasts)), reverse=reverse, unroll=16
    )
    return jnp.moveaxis(entering, 0, 1), last
