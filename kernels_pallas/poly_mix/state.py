"""What an aggregation remembers of the tokens it has read: their mean and their number."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array


class PolyState(NamedTuple):
    """Mean and weight of all tokens so far; the size does not depend on how many there were.

    Attributes:
        mean: [B, E] weighted mean of the features, float32; 0 where there was no token.
        count: [B] sum of the weights (the number of tokens, where none were given), float32.
    """

    mean: Array
    count: Array


def init_state(batch: int, width: int, dtype: Any = jnp.float32) -> PolyState:
    """The state before the first token: mean [batch, width] and count [batch], all zero."""
    return PolyState(jnp.zeros((batch, width), dtype), jnp.zeros((batch,), dtype))


def reciprocal(count: Array) -> Array:
    """1 / count where count > 0, else 0: rows that see nothing are 0, their gradients too."""
    return jnp.where(count > 0, 1 / jnp.where(count > 0, count, 1), 0)


def merge_states(first: PolyState, second: PolyState) -> PolyState:
    """The state after the tokens of both, n = n1 + n2 and mean = (n1 mean1 + n2 mean2) / n.

    Associative: streams may be built by `lax.associative_scan` over states of pieces, and joined
    over devices.
    """
    count = first.count + second.count
    share = reciprocal(count)
    of = lambda state: (state.count * share)[..., None] * state.mean
    return PolyState(of(first) + of(second), count)
