"""Means within the documents of packed rows, at linear cost.

Tokens are put in the order of their ids, which leaves documents where they are if the ids do not
fall along the row; documents then lie in one piece, and sums within them are a scan that begins
anew with each. No matrix of tokens by tokens, whatever the ids.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .. import dispatch
from ..compat import vary
from .aggregate import select_seen
from .operands import Operands, prepare
from .reference import poly_mix_reference
from .rope import Rotation, rotate
from .state import reciprocal
from .xla import polynomial


class _Order(NamedTuple):
    """Where the tokens go, [B, T] each.

    Attributes:
        order: token at each place; place: of each token. starts, ends: bool, whether a document
            starts, ends at a place; last: place at which the document of a place ends.
    """

    order: Array
    place: Array
    starts: Array
    ends: Array
    last: Array


def _arrange(ids: Array) -> _Order:
    order = jnp.argsort(ids, axis=1, stable=True)
    ids = jnp.take_along_axis(ids, order, axis=1)
    edge = jnp.ones_like(ids[:, :1], bool)
    changes = ids[:, 1:] != ids[:, :-1]
    starts, ends = jnp.concatenate([edge, changes], 1), jnp.concatenate([changes, edge], 1)
    places = lax.broadcasted_iota(jnp.int32, ids.shape, 1)
    last = lax.cummin(jnp.where(ends, places, ids.shape[1]), axis=1, reverse=True)
    return _Order(order, jnp.argsort(order, axis=1), starts, ends, last)


def _take(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index[..., None], axis=1, mode="promise_in_bounds")


def _scan(x: Array, begin: Array, reverse: bool) -> Array:
    """Running sums of x [B, T, E] that begin anew where `begin` [B, T] says."""

    def join(first, second):
        (begun, before), (begins, now) = first, second
        return begun | begins, now + jnp.where(begins, 0, before)

    return lax.associative_scan(join, (begin[..., None], x), reverse=reverse, axis=1)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(causal: bool, x: Array, at: _Order) -> Array:
    running = _scan(_take(x, at.order), at.starts, reverse=False)
    return _take(running, at.place if causal else jnp.take_along_axis(at.last, at.place, axis=1))


def _sums_rule(causal, at, ct):
    if not causal:  # who sees whom is symmetric
        return _sums(causal, ct, at), None
    return _take(_scan(_take(ct, at.order), at.ends, reverse=True), at.place), None


_sums.defvjp(lambda causal, x, at: (_sums(causal, x, at), at), _sums_rule)


def segment_means(
    p: Array, segment_ids: Array, *, weights: Array | None = None, causal: bool = False
) -> Array:
    """a_t = sum of w_n p_n / sum of w_n over the tokens n of token t's document.

    Time and memory linear in T but for the sorting of the ids (T log T, without E), for ids in any
    order: documents may lie in several pieces. Weights are constants.

    Args:
        p: [B, T, E] features.
        segment_ids: [B, T] (or [1, T]) integers; tokens with the same number are one document.
        weights: [B, T] or [1, T]; None means 1. What stands at tokens of weight 0 may be NaN.
        causal: only tokens up to t.

    Returns:
        [B, T, E] in at least float32; 0 where a token sees no weight.

    Raises:
        ValueError: ids or weights of other shapes.
    """
    shape = p.shape[:2]
    for name, array in (("segment_ids", segment_ids), ("weights", weights)):
        if array is not None and array.shape not in (shape, (1, shape[1])):
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    acc = jnp.promote_types(p.dtype, jnp.float32)
    w = jnp.ones((1, shape[1]), acc) if weights is None else weights
    w = jnp.broadcast_to(lax.stop_gradient(w.astype(acc)), shape)
    p = select_seen(p, None if weights is None else w != 0).astype(acc) * w[..., None]
    p, w, at = vary((p, w, _arrange(jnp.broadcast_to(segment_ids, shape))), (p, segment_ids))
    return _sums(causal, p, at) * reciprocal(_sums(causal, w[..., None], at))


def _by_matrix(operands: Operands, segment_ids: Array, causal: bool) -> Array:
    """The definition: weights [B, T, T]."""
    sees = segment_ids[:, :, None] == segment_ids[:, None, :]
    sees = (jnp.tril(sees) if causal else sees).astype(operands.coeff.dtype)
    weights = operands.weights
    matrix = sees if weights is None else sees * weights[:, None]
    operands = operands._replace(weights=None, query_weights=matrix)
    return poly_mix_reference(operands, False, None, operands.coeff.dtype)[0]


def _by_scan(operands: Operands, segment_ids: Array, causal: bool) -> Array:
    weights = operands.weights
    p = polynomial(operands.h, operands.coeff, None if weights is None else weights != 0)
    p = p if operands.rotation is None else rotate(p, operands.rotation)
    return segment_means(p, segment_ids, weights=weights, causal=causal)


IMPLEMENTATIONS = {"reference": _by_matrix, "xla": _by_scan}


def poly_mix_segments(
    h: Array,
    coeff: Array,
    segment_ids: Array,
    *,
    weights: Array | None = None,
    causal: bool = False,
    rotation: Rotation | None = None,
    dtype: Any = None,
    implementation: str | None = None,
) -> Array:
    """`poly_mix` within documents: row t [B, T, E] sees its own, or if `causal` that up to t.

    At the cost of `segment_means` (as "reference", by a matrix). Arguments as for it and for
    `poly_mix`; there are no kernels.
    """
    operands = prepare(h, coeff, weights, rotation, None, None, causal, None)
    name = dispatch.resolve("poly_mix", implementation, IMPLEMENTATIONS)
    rows = IMPLEMENTATIONS[name](operands, segment_ids, causal)
    return rows.astype(h.dtype if dtype is None else dtype)
