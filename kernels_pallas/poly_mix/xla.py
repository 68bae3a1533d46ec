"""The polynomial mixer by XLA: Horner's rule, one pass each way, sums instead of mask matrices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from .. import dispatch
from ..compat import row_major
from ..time_axis import spread
from .aggregate import (
    aggregate,
    counts,
    frame_sums,
    repeat_frames,
    rows_from_sums,
    seen_tokens,
    select_seen,
)
from .operands import Operands
from .rope import rotate


def activation(h: Array) -> Array:
    """clamp(leaky_relu(h, 0.01), -0.1, 6) without selections, which XLA may write to memory; its
    gradient is `slope`, not that of the minima."""
    return jnp.minimum(jnp.maximum(jnp.maximum(h, 0.01 * h), -0.1), 6)


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


def slope(wide: Array) -> Array:
    """The derivative of `activation` at h, in h's dtype, NaN not included."""
    middle = jnp.where(wide < 0, 0.01, jnp.ones((), wide.dtype))
    return jnp.where((wide < -10) | (wide > 6), 0, middle)


def derivative(wide: Array, coeff: Array) -> Array:
    """The derivative of the polynomial by h, for h in coeff's dtype."""
    degrees = jnp.arange(1, coeff.shape[1] + 1, dtype=coeff.dtype)
    return slope(wide) * horner(activation(wide), coeff * degrees)


def _backward(operands, dp):
    h, coeff, seen = operands
    wide = select_seen(h, seen).astype(coeff.dtype)
    a, dh = activation(wide), dp * derivative(wide, coeff)
    sums, term = [], dp
    for _ in range(coeff.shape[1]):
        term = term * a
        sums.append(jnp.sum(term, axis=(0, 1)))
    return select_seen(dh, seen).astype(h.dtype), jnp.stack(sums, axis=1), None


_polynomial.defvjp(lambda *operands: (_polynomial(*operands), operands), _backward)


def moments(h: Array, degree: int, weights: Array | None, frames, dtype) -> Array:
    """sum of w_n act(h_n)^j over the tokens of each frame, j = 1 .. degree: [B, F, E, degree]."""
    wide = select_seen(h, seen_tokens(weights, None)).astype(dtype)
    a = activation(wide)
    terms = [a if weights is None else spread(weights, a) * a]
    for _ in range(degree - 1):
        terms.append(terms[-1] * a)
    sums = frame_sums(jnp.stack(terms, axis=2), frames)  # one reduction, so one pass over h
    return jnp.moveaxis(sums, 2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def weighted_sums(h, coeff, weights, frames, kernels=None):
    """sum of w_n p(h_n) over the tokens of each frame [B, F, E], by the sums of the powers.

    With these the gradient of the coefficients needs no other look at h, and that of h is one pass
    that reads h and writes dh.

    Args:
        frames: their lengths. kernels: for one frame, functions that do the two passes, `moments`
            and `change`, or None.
    """
    if kernels:
        return _weighted_sums(h, coeff, weights, frames, kernels)[0]
    p = _polynomial(h, coeff, seen_tokens(weights, None))
    return frame_sums(p if weights is None else spread(weights, p) * p, frames)


def _weighted_sums(h, coeff, weights, frames, kernels):
    powers = (kernels or (moments,))[0](h, coeff.shape[1], weights, frames, coeff.dtype)
    return jnp.sum(powers * coeff, axis=-1), (h, coeff, weights, powers)


def _weighted_sums_backward(frames, kernels, saved, ct):
    h, coeff, weights, powers = saved
    dcoeff = jnp.sum(ct[..., None] * powers, axis=(0, 1))
    if kernels:
        return kernels[1](h, coeff, weights, ct, None), dcoeff, None
    ct = ct if ct.shape[1] == 1 else repeat_frames(ct, frames)
    return change(h, coeff, weights, ct, None), dcoeff, None


def change(h: Array, coeff: Array, weights: Array | None, ct: Array, beside: Array | None) -> Array:
    """The gradient of h [B, N, E] from that of the weighted sums of its polynomials, ct [B, 1, E]
    (or [B, N, E]); `beside` [B, N, S] follows it in the same rows, [B, N, E + S]."""
    dp = ct if weights is None else spread(weights, ct) * ct
    seen = seen_tokens(weights, None)
    dh = select_seen(dp * derivative(select_seen(h, seen).astype(coeff.dtype), coeff), seen)
    dh = dh.astype(h.dtype)
    return dh if beside is None else jnp.concatenate([dh, beside], axis=-1)


weighted_sums.defvjp(_weighted_sums, _weighted_sums_backward)


def few_rows(n: int, rows: int, degree: int) -> bool:
    """Whether the sums of the powers are few enough to be kept for the backward pass."""
    return 4 * rows * degree <= n or rows == 1


def poly_mix_xla(operands: Operands, causal: bool, frames, out_dtype):
    """Rows [B, R, E] in `out_dtype` and the state (None with query_weights) of `poly_mix`."""
    h, coeff, weights, rotation, state, query_weights = operands
    n, by_frame = h.shape[1], (h.shape[1],) if frames is None else frames
    if dispatch.current_device().startswith("gpu"):
        h = row_major(h)
    plain = rotation is None and query_weights is None and not causal
    if plain and few_rows(n, len(by_frame), coeff.shape[1]):
        sums = weighted_sums(h, coeff, weights, by_frame)
        sums = sums if sums.shape[1] == 1 else jnp.cumsum(sums, axis=1)
        count = counts(n, weights, False, by_frame, coeff.dtype)
        rows, last = rows_from_sums(sums, count, state)
        return rows.astype(out_dtype), last
    p = polynomial(h, coeff, seen_tokens(weights, query_weights))
    if rotation is not None:
        p = rotate(p, rotation)
    rows, last = aggregate(
        p, weights=weights, causal=causal, frames=frames, query_weights=query_weights, state=state
    )
    return rows.astype(out_dtype), last
