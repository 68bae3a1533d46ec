"""From logits to tokens: temperature, top-k and nucleus filters, and the draw.

Everything acts on the last axis, of size V. Temperature, k and p are ordinary (traced) numbers,
either one for all rows or one per row, so that changing them compiles nothing anew.
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
