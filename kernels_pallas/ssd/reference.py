"""SSD as its recurrence, step by step: the definition every implementation is held to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from ..compat import vary
from .prepare import wide


def step(state: Array, x: Array, dt: Array, a: Array, B: Array, C: Array, D: Array | None):
    """One step: S = exp(a) S + dt x (outer) B;  y = S C + D x. Everything float32 or float64.

    state [B, H, P, N], x [B, H, P], dt and a [B, H], B and C [B, G, N], D [H, P] or [H, 1] or None.
    Returns (S, y).
    """
    heads = lambda v: jnp.repeat(v, x.shape[1] // v.shape[1], axis=1)  # head h: group h // (H/G)
    drive = (dt[..., None] * x)[..., None] * heads(B)[..., None, :]
    state = jnp.exp(a)[..., None, None] * state + drive
    y = jnp.sum(state * heads(C)[..., None, :], axis=-1)
    return state, y if D is None else y + D * x


def ssd_reference(x, dt, a, B, C, D, state, resets, *, chunk, out_dtype) -> tuple[Array, Array]:
    """See `prepare`; a `lax.scan` over time in at least float32 (float64 for float64 inputs)."""
    del chunk
    acc = wide(x.dtype)
    if state is None:
        state = jnp.zeros((*x[:, 0].shape, B.shape[-1]), acc)
        state = vary(state, x)
    if resets is None:
        resets = jnp.zeros(x.shape[:2], bool)

    def advance(state, inputs):
        x, dt, a, B, C, reset = inputs
        state = jnp.where(reset[:, None, None, None], 0, state)
        return step(state, x.astype(acc), dt, a, B.astype(acc), C.astype(acc), D)

    over_time = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (x, dt, a, B, C, resets))
    state, y = jax.lax.scan(advance, state, over_time)
    return jnp.moveaxis(y, 0, 1).astype(out_dtype), state
