"""From logits to tokens: temperature, top-k and nucleus filters, and the draw.

Everything acts on the last axis, of size V. Temperature, k and p are ordinary (traced) numbers,
either one for all rows or one per row, so that changing them compiles nothing anew.

There are two conventions. `top_k_filter`, `nucleus_filter`, `filter_logits` and `draw` are those of
text: exactly k entries, a slack of 1e-4 in p. `keep_top_k`, `keep_nucleus` and `keep_likely` are
those of image tokens: all entries that tie with the k-th, no slack; they find thresholds without a
sort.
"""

from __future__ import annotations

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


DIGIT = 4  # bits of a threshold found per pass over the logits


def _ordered(x: Array) -> Array:
    """uint32 keys in the order of the float32 numbers x; -0 and 0 are equal."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x).astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _least(reached, shape: tuple[int, ...], bits: int) -> Array:
    """The least number t of `bits` bits with reached(t), digit by digit.

    Args:
        reached: [..., D] uint32 candidates -> bool, which must not fall as t rises; taken as true
            at the largest t.
        shape: of the result.
    """
    t = jnp.zeros(shape, jnp.uint32)
    digits = jnp.arange(2**DIGIT - 1, dtype=jnp.uint32)
    for low in reversed(range(0, bits, DIGIT)):
        # The last number with each digit, the digits below being all ones.
        last = t[..., None] | (digits << low) | jnp.uint32((1 << low) - 1)
        digit = jnp.sum(~reached(last), axis=-1, dtype=jnp.uint32)
        t = t | (digit << low)
    return t


def _total(values: Array, chosen: Array) -> Array:
    """Sums over V of values [..., V] where chosen [..., D, V]: [..., D]."""
    return jnp.sum(jnp.where(chosen, values[..., None, :], 0), axis=-1)


def keep_top_k(logits: Array, k: Array | int) -> Array:
    """Drop what is below the k-th largest entry; entries equal to it are all kept.

    Args:
        logits: [..., V] float32.
        k: int or [...] int; 0 keeps everything, as does k >= V.

    Returns:
        [..., V]: kept entries unchanged, dropped ones -1e10.
    """
    keys, k = _ordered(logits), _per_row(k, jnp.int32)
    one = jnp.ones_like(keys, jnp.int32)
    # The k-th largest is the least number that fewer than k entries exceed.
    exceed = lambda t: _total(one, keys[..., None, :] > t[..., None])
    kth = _least(lambda t: exceed(t) < k, keys.shape[:-1], 32)
    return jnp.where((keys >= kth[..., None]) | (k <= 0), logits, DROPPED)


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
    size, rows = logits.shape[-1], logits.shape[:-1]
    keys, p = _ordered(logits), _per_row(p, jnp.float32)
    probs, tail = jax.nn.softmax(logits.astype(jnp.float32), axis=-1), 1.0 - p
    upto = lambda t: _total(probs, keys[..., None, :] <= t[..., None])
    least = _least(lambda t: upto(t) > tail, rows, 32)[..., None]
    # Where rounding keeps even the sum of all from exceeding 1 - p, the largest is what remains.
    least = jnp.minimum(least, jnp.max(keys, axis=-1, keepdims=True))
    # Of the entries equal to the least one kept, those of lower index go first.
    equal, index = keys == least, jnp.arange(size, dtype=jnp.uint32)
    below = jnp.sum(jnp.where(keys < least, probs, 0), axis=-1, keepdims=True)
    each = jnp.max(jnp.where(equal, probs, 0), axis=-1, keepdims=True)
    ties = lambda j: _total(equal.astype(jnp.int32), index <= j[..., None])
    first = _least(lambda j: below + each * ties(j) > tail, rows, (size - 1).bit_length())
    last = jnp.max(jnp.where(equal, index, 0), axis=-1)
    first = jnp.minimum(first, last)[..., None]
    keep = (keys > least) | (equal & (index >= first)) | (p >= 1)
    return jnp.where(keep, logits, DROPPED)


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
    out = out if top_k is None else keep_top_k(out, top_k)
    return out if top_p is None else keep_nucleus(out, top_p)
