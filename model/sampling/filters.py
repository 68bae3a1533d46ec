"""From logits to tokens: temperature, top-k and nucleus filters, and the draw.

Everything acts on the last axis, of size V. Temperature, k and p are ordinary (traced) numbers,
either one for all rows or one per row, so that changing them compiles nothing anew.

There are two conventions. `top_k_filter`, `nucleus_filter`, `filter_logits` and `draw` are those of
text: exactly k entries, a slack of 1e-4 in p. `keep_top_k`, `keep_nucleus` and `keep_likely` are
those of image tokens: all entries that tie with the k-th, no slack; they take thresholds from one
sort of the values, without the order of the entries.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

DROPPED = -1e10  # what a filter writes in place of a dropped logit


def _ranks(order: Array) -> Array:
    """Place of each entry in the order that `argsort` gave: the inverse permutation."""
    return jnp.argsort(order, axis=-1)


def _per_row(x: Array | float | int, dtype) -> Array:
    """A number, or one per row [...], with an axis of size 1 for V."""
    return jnp.asarray(x, dtype)[..., None]


def top_k_filter(logits: Array, k: Array | int) -> Array:
    """Keep the k largest entries; of equal ones the lower index first, so k = 1 keeps the argmax.

    Args:
        logits: [..., V] float.
        k: int or [...] int; 0 keeps everything.

    Returns:
        [..., V]: kept entries unchanged, dropped ones -1e10.
    """
    k = _per_row(k, jnp.int32)
    rank = _ranks(jnp.argsort(logits, axis=-1, stable=True, descending=True))
    return jnp.where((rank < k) | (k <= 0), logits, DROPPED)


def nucleus_filter(log_probs: Array, p: Array | float) -> Array:
    """Keep the smallest set of largest entries whose probability reaches p (arXiv 1904.09751).

    In ascending stable order an entry is kept if the cumulative probability up to and including it
    exceeds 1 - (p - 1e-4); the largest is always kept. Of equal entries the later index is the
    larger one.

    Args:
        log_probs: [..., V] float, normalised or not.
        p: float or [...] float. Even p = 1 drops a tail of probability 1e-4: leave the filter out
            for none.

    Returns:
        [..., V]: kept entries unchanged, dropped ones -1e10. The cumulative sum is float32.
    """
    order = jnp.argsort(log_probs, axis=-1, stable=True)
    probs = jax.nn.softmax(log_probs.astype(jnp.float32), axis=-1)
    reached = jnp.cumsum(jnp.take_along_axis(probs, order, axis=-1), axis=-1)
    rank = _ranks(order)
    keep = jnp.take_along_axis(reached, rank, axis=-1) > 1.0 - (_per_row(p, jnp.float32) - 1e-4)
    return jnp.where(keep | (rank == log_probs.shape[-1] - 1), log_probs, DROPPED)


def filter_logits(
    logits: Array,
    *,
    temperature: Array | float = 1.0,
    top_k: Array | int = 0,
    top_p: Array | float = 1.0,
) -> Array:
    """Log-probabilities after temperature, then top-k, then nucleus; each can be switched off.

    Args:
        logits: [..., V] float.
        temperature: divides the logits; 0 stands for a greedy choice, which the draw makes, and
            changes nothing here.
        top_k: 0 is off. top_p: 1 is off.

    Returns:
        [..., V] float32, dropped entries -1e10 (not renormalised).
    """
    temperature = _per_row(temperature, jnp.float32)
    scaled = logits.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1.0)
    out = jax.nn.log_softmax(scaled, axis=-1)
    top_k, top_p = jnp.asarray(top_k, jnp.int32), jnp.asarray(top_p, jnp.float32)

    def nucleus(x):
        return jnp.where((top_p < 1)[..., None], nucleus_filter(x, top_p), x)

    # The filters sort, which costs more than a small net: skip them where no row asks for them.
    out = lax.cond(jnp.any(top_k > 0), lambda x: top_k_filter(x, top_k), lambda x: x, out)
    return lax.cond(jnp.any(top_p < 1), nucleus, lambda x: x, out)


def draw(
    keys: Array,
    logits: Array,
    *,
    temperature: Array | float = 1.0,
    top_k: Array | int = 0,
    top_p: Array | float = 1.0,
) -> Array:
    """One token per row: the argmax where temperature is 0, else a draw from the filtered
    distribution.

    Args:
        keys: [B] PRNG keys, one per row, so that a row's draw does not depend on its neighbours.
        logits: [B, V] float.
        temperature, top_k, top_p: as in `filter_logits`; numbers, or one per row [B].

    Returns:
        [B] int32.
    """
    kept = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = jax.vmap(jax.random.categorical)(keys, kept)
    greedy = jnp.argmax(logits, axis=-1)
    return jnp.where(jnp.asarray(temperature) > 0, drawn, greedy).astype(jnp.int32)


def _ascending(logits: Array) -> tuple[Array, Array]:
    """The logits and, for the filters below, their values sorted: both [..., V] float32.

    The barrier keeps XLA from computing the logits anew, rounded otherwise, where they are compared
    with a threshold that is one of the sorted values. Whole numbers in the order of the logits
    sort faster than these, on a CPU more than twice as fast.
    """
    logits = lax.optimization_barrier(logits.astype(jnp.float32))
    flip = lambda bits: jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # its own inverse
    bits = lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.int32)  # -0 is 0
    ordered = jnp.sort(flip(bits), axis=-1, stable=False)
    return logits, lax.bitcast_convert_type(flip(ordered), jnp.float32)


def _at(x: Array, place: Array) -> Array:
    """x [..., V] at one place per row [..., 1], or at one for all [1]: [..., 1]."""
    return jnp.take_along_axis(x, jnp.broadcast_to(place, (*x.shape[:-1], 1)), axis=-1)


def _passing(values: Array, limit: Array) -> Array:
    """The first place where the running sum of values >= 0 exceeds a limit; the last if none does.

    The sums of about sqrt(V) blocks tell in which block that is, and only that block is summed
    entry by entry: a running sum of the whole row takes many passes on an accelerator.

    Args:
        values: [..., V]. limit: [..., 1] of the same dtype.

    Returns:
        [..., 1] int32.
    """
    size = values.shape[-1]
    width = math.isqrt(size - 1) + 1
    pad = [(0, 0)] * (values.ndim - 1) + [(0, -size % width)]
    blocks = jnp.pad(values, pad).reshape(*values.shape[:-1], -1, width)

    def place(x, limit):
        index = jnp.arange(x.shape[-1])
        sums = jnp.sum(jnp.where(index <= index[:, None], x[..., None, :], 0), axis=-1)
        return jnp.sum(sums <= limit, axis=-1, keepdims=True, dtype=jnp.int32)

    sums = jnp.sum(blocks, axis=-1)
    block = jnp.minimum(place(sums, limit), sums.shape[-1] - 1)
    before = jnp.sum(jnp.where(jnp.arange(sums.shape[-1]) < block, sums, 0), -1, keepdims=True)
    inside = jnp.take_along_axis(blocks, block[..., None], axis=-2)[..., 0, :]
    return jnp.minimum(block * width + place(inside, limit - before), size - 1)


def _top_k(x: Array, ascending: Array, k: Array | int) -> Array:
    """`keep_top_k` of x, whose sorted values are given, or of some of its entries."""
    size, k = ascending.shape[-1], _per_row(k, jnp.int32)
    kth = _at(ascending, size - jnp.where(k > 0, jnp.minimum(k, size), size))
    return jnp.where(x >= kth, x, DROPPED)


def _nucleus(x: Array, ascending: Array, p: Array | float) -> Array:
    """`keep_nucleus` of x, whose sorted values are given."""
    p = _per_row(p, jnp.float32)
    probs = jnp.exp(ascending - ascending[..., -1:])  # times their sum
    first = _passing(probs, (1.0 - p) * jnp.sum(probs, axis=-1, keepdims=True))
    least = _at(ascending, first)
    # Of the entries equal to the least one kept, those of lower index go first.
    equal = x == least
    gone = first - jnp.sum(ascending < least, axis=-1, keepdims=True, dtype=jnp.int32)
    stays = jnp.arange(x.shape[-1]) >= _passing(equal.astype(jnp.int32), gone)
    return jnp.where((x > least) | (equal & stays) | (p >= 1), x, DROPPED)


def keep_top_k(logits: Array, k: Array | int) -> Array:
    """Drop what is below the k-th largest entry; entries equal to it are all kept.

    Args:
        logits: [..., V] float32.
        k: int or [...] int; 0 keeps everything, as does k >= V.

    Returns:
        [..., V]: kept entries unchanged, dropped ones -1e10.
    """
    return _top_k(*_ascending(logits), k)


def keep_nucleus(logits: Array, p: Array | float) -> Array:
    """Drop the least likely entries as long as their total probability is at most 1 - p.

    In ascending stable order an entry is dropped if the cumulative probability up to and including
    it is <= 1 - p; the last, which is the most likely, is always kept.

    Args:
        logits: [..., V] float32, normalised or not; a filter may have dropped some before.
        p: float or [...] float in (0, 1]; 1 keeps everything.

    Returns:
        [..., V]: kept entries unchanged, dropped ones -1e10. Probabilities are float32.
    """
    return _nucleus(*_ascending(logits), p)


def keep_likely(
    logits: Array,
    *,
    temperature: Array | float = 1.0,
    top_k: Array | int | None = None,
    top_p: Array | float | None = None,
) -> Array:
    """Logits after temperature, then `keep_top_k`, then `keep_nucleus` (arXiv 2408.12245's code).

    Args:
        logits: [..., V] float.
        temperature: divides the logits; 0 stands for a greedy choice, which is not made here, and
            changes nothing.
        top_k, top_p: as in the filters; None leaves a filter out of the program.

    Returns:
        [..., V] float32, dropped entries -1e10 (not normalised).
    """
    temperature = _per_row(temperature, jnp.float32)
    out = logits.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1.0)
    if top_k is None and top_p is None:
        return out
    out, ascending = _ascending(out)  # one sort for both
    if top_k is not None:
        out, ascending = (_top_k(x, ascending, top_k) for x in (out, ascending))
    return out if top_p is None else _nucleus(out, ascending, top_p)
