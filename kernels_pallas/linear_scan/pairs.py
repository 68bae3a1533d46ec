"""Arithmetic on numbers held as tuples of real arrays: (re,), a real number, or (re, im).

Also the adjoint of the recurrence, which every implementation shares.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

Parts = tuple[Array, ...]


def add(a: Parts, b: Parts) -> Parts:
    """a + b."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def mul(a: Parts, b: Parts) -> Parts:
    """a * b, as complex numbers if there are two parts."""
    if len(a) == 1:
        return (a[0] * b[0],)
    return (a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0])


def conj(a: Parts) -> Parts:
    """The complex conjugate."""
    return a if len(a) == 1 else (a[0], -a[1])


def cast(a: Parts, dtype) -> Parts:
    """Every part in `dtype`."""
    return tuple(x.astype(dtype) for x in a)


def accumulator(*parts: Array):
    """The dtype of states and sums: that of the operands, at least float32."""
    return jnp.promote_types(jnp.result_type(*parts), jnp.float32)


def combine(first: tuple[Parts, Parts], second: tuple[Parts, Parts]) -> tuple[Parts, Parts]:
    """The two steps (decay, input), `first` then `second`, as one: associative."""
    (a, x), (b, y) = first, second
    return mul(a, b), add(mul(b, x), y)


def with_gradient(forward: Callable, backward: Callable) -> Callable:
    """A differentiable scan(a, x, state, reverse) -> (h, last state) of two functions.

    Written for time that runs forwards,

        g_t = ct_t + conj(a_{t+1}) g_{t+1},   dx_t = g_t,   da_t = g_t conj(h_{t-1}),
        dstate = conj(a_1) g_1

    with the last state's cotangent added to ct_T. What is kept for the backward pass is a, h (in
    the dtype of the output) and the initial state.

    Args:
        forward: (a, x, state, reverse) -> (h, last state); all of them `Parts`, h in x's dtype,
            states in the accumulator dtype.
        backward: (a, h, state, ct, ct_last, reverse) -> (da, dx, dstate): `ct` like h, `ct_last`
            like the state, da in a's dtype, dx in h's.
    """

    def rule_forward(a, x, state, reverse):
        h, last = forward(a, x, state, reverse)
        return (h, last), (a, h, state)

    def rule_backward(reverse, saved, cotangents):
        a, h, state = saved
        return backward(a, h, state, *cotangents, reverse)

    scan = jax.custom_vjp(forward, nondiff_argnums=(3,))
    scan.defvjp(rule_forward, rule_backward)
    return scan
