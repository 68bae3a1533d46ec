"""The scan as `lax.associative_scan`: log-depth, works everywhere, gradient in closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .pairs import Parts, accumulator, cast, combine, conj, mul, with_gradient


def neighbour(z: Parts, edge: Parts, reverse: bool) -> Parts:
    """z at the step before, which for the first step is `edge` [B, D]; `reverse`: at the one after.

    Time runs backwards when `reverse`, so that is the step before in both cases.
    """
    if reverse:
        return tuple(
            jnp.concatenate([p[:, 1:], e[:, None].astype(p.dtype)], axis=1)
            for p, e in zip(z, edge, strict=True)
        )
    return tuple(
        jnp.concatenate([e[:, None].astype(p.dtype), p[:, :-1]], axis=1)
        for p, e in zip(z, edge, strict=True)
    )


def _scan(a: Parts, x: Parts, start: Parts, reverse: bool) -> Parts:
    """All h_t, in the dtype of the operands; `start` is the state before the first step."""
    first = x[0].shape[1] - 1 if reverse else 0
    enter = mul(tuple(part[:, first] for part in a), start)
    x = tuple(part.at[:, first].add(e) for part, e in zip(x, enter, strict=True))
    return lax.associative_scan(combine, (a, x), axis=1, reverse=reverse)[1]


def _last(h: Parts, reverse: bool) -> Parts:
    return tuple(part[:, 0] if reverse else part[:, -1] for part in h)


def scan_forward(a, x, state, reverse):
    """Forward pass, as `pairs.with_gradient` takes it."""
    acc = state[0].dtype
    h = _scan(cast(a, acc), cast(x, acc), state, reverse)
    return cast(h, x[0].dtype), _last(h, reverse)


def scan_backward(a, h, state, ct, ct_last, reverse):
    """Backward pass, as `pairs.with_gradient` takes it."""
    acc = state[0].dtype
    wide = conj(cast(a, acc))
    zero = jax.tree.map(jnp.zeros_like, state)
    # g_t = ct_t + conj(a_{t+1}) g_{t+1} runs against time; what enters it is the last state's ct.
    one = (jnp.ones_like(state[0]), *zero[1:])
    g = _scan(neighbour(wide, one, not reverse), cast(ct, acc), ct_last, not reverse)
    before = neighbour(cast(h, acc), state, reverse)
    first = -1 if reverse else 0
    dstate = mul(tuple(part[:, first] for part in wide), tuple(part[:, first] for part in g))
    return cast(mul(g, conj(before)), a[0].dtype), cast(g, h[0].dtype), dstate


def reduce_steps(a: Parts, x: Parts, reverse: bool) -> tuple[Parts, Parts]:
    """All steps as one: the product of a and the last state from zero, [B, D] each."""
    while a[0].shape[1] > 1:
        if a[0].shape[1] % 2:  # one step more that changes nothing
            pad = lambda z, value: jnp.pad(z, ((0, 0), (0, 1), (0, 0)), constant_values=value)
            a = tuple(pad(part, 1 - i) for i, part in enumerate(a))
            x = tuple(pad(part, 0) for part in x)
        even, odd = (tuple(tuple(p[:, i::2] for p in z) for z in (a, x)) for i in (0, 1))
        a, x = combine(odd, even) if reverse else combine(even, odd)
    return tuple(p[:, 0] for p in a), tuple(p[:, 0] for p in x)


def scan_summary(a: Parts, x: Parts, reverse: bool, *, adjoint: bool) -> tuple[Parts, Parts]:
    """All steps as one: the product of the decays, and the last state from zero; [B, D] each.

    `adjoint`: of the steps s = conj(a) (x + s) instead of h = a h + x.
    """
    acc = accumulator(*a, *x)
    a, x = cast(a, acc), cast(x, acc)
    return (
        reduce_steps(conj(a), mul(conj(a), x), reverse) if adjoint else reduce_steps(a, x, reverse)
    )


_differentiable = with_gradient(scan_forward, scan_backward)


def linear_scan_xla(a: Parts, x: Parts, state: Parts, reverse: bool) -> tuple[Parts, Parts]:
    """h_t = a_t h_{t-1} + x_t, tuples of one (real) or two (re, im) parts.

    Args:
        a, x: [B, T, ...] decays and inputs; with one part they may also be complex arrays.
        state: [B, ...] state before the first step, in the accumulator dtype.
        reverse: time runs from T - 1 down to 0.

    Returns:
        h in x's dtype, and the state after the last step.
    """
    return _differentiable(a, x, state, reverse)
