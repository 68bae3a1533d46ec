"""The polynomial mixer by XLA: Horner's rule, one pass each way, sums instead of mask matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from .aggregate import aggregate, seen_tokens, select_seen
from .operands import Operands
from .reference import activation
from .rope import rotate


def horner(a: Array, coeff: Array) -> Array:
    """c_1 + c_2 a + ... + c_k a^(k-1), coeff [E, k]."""
    value = coeff[:, -1]
    for j in range(coeff.shape[1] - 2, -1, -1):
        value = value * a + coeff[:, j]
    return value


def polynomial(h: Array, coeff: Array, seen: Array | None = None) -> Array:
    """sum_j coeff[:, j-1] act(h)^j per channel, in coeff's dtype (arXiv 2604.06129).

    Args:
        h: [B, N, E]. coeff: [E, k], varying over the same mesh axes as h.
        seen: [B or 1, N] bool; False where h may be NaN, which then counts as 0. None means all.

    Nothing but the arguments is kept for the backward pass, which reads h once and writes dh in its
    dtype.
    """
    return _polynomial(h, coeff, seen)


@jax.custom_vjp
def _polynomial(h, coeff, seen):
    a = activation(select_seen(h, seen).astype(coeff.dtype))
    return a * horner(a, coeff)


def _backward(operands, dp):
    h, coeff, seen = operands
    wide = select_seen(h, seen).astype(coeff.dtype)
    a = activation(wide)
    slope = jnp.where(wide < -10, 0, jnp.where(wide < 0, 0.01, jnp.where(wide > 6, 0, 1)))
    degree = coeff.shape[1]
    dh = dp * slope * horner(a, coeff * jnp.arange(1, degree + 1, dtype=coeff.dtype))
    sums, term = [], dp
    for _ in range(degree):
        term = term * a
        sums.append(jnp.sum(term, axis=(0, 1)))
    return select_seen(dh, seen).astype(h.dtype), jnp.stack(sums, axis=1), None


_polynomial.defvjp(lambda *operands: (_polynomial(*operands), operands), _backward)


def poly_mix_xla(operands: Operands, causal: bool, frames, out_dtype):
    """Rows [B, R, E] in `out_dtype` and the state (None with query_weights) of `poly_mix`."""
    h, coeff, weights, rotation, state, query_weights = operands
    p = polynomial(h, coeff, seen_tokens(weights, query_weights))
    if rotation is not None:
        p = rotate(p, rotation)
    rows, last = aggregate(
        p, weights=weights, causal=causal, frames=frames, query_weights=query_weights, state=state
    )
    return rows.astype(out_dtype), last
