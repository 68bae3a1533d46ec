"""The definition: one step after the other."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from .pairs import Parts, accumulator, add, cast, mul


def linear_scan_reference(a: Parts, x: Parts, state: Parts, reverse: bool) -> tuple[Parts, Parts]:
    """h_t = a_t h_{t-1} + x_t by a loop over time; arguments as for `linear_scan_xla`."""

    def step(h, now):
        h = add(mul(now[0], h), now[1])
        return h, h

    steps = [cast([jnp.moveaxis(part, 1, 0) for part in z], accumulator(*a, *x)) for z in (a, x)]
    last, h = lax.scan(step, state, steps, reverse=reverse)
    return tuple(jnp.moveaxis(part, 0, 1).astype(x[0].dtype) for part in h), last
