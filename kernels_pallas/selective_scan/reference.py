"""Selective scan by its definition: one step after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..softplus import softplus


def step_size(delta: Array, delta_bias: Array | None, use_softplus: bool) -> Array:
    """dt = softplus(delta + delta_bias), or the sum itself, in at least float32."""
    wide = jnp.promote_types(delta.dtype, jnp.float32)
    raw = delta.astype(wide)
    if delta_bias is not None:
        raw = raw + delta_bias.astype(wide)
    return softplus(raw) if use_softplus else raw


def per_channel(x: Array, width: int) -> Array:
    """B or C by channel: [..., G, N] -> [..., D, N]; channel d is in group d // (D/G)."""
    return jnp.repeat(x, width // x.shape[-2], axis=-2)


def read(C: Array, h: Array) -> Array:
    """sum_n C[n] h[n] over the last axis; 2 Re(...) of it if h is complex."""
    y = jnp.sum(C * h, axis=-1)
    return 2 * y.real if jnp.iscomplexobj(y) else y


def selective_scan_step(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    *,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    state: Array,
) -> tuple[Array, Array]:
    """One step of the selective scan: h = exp(dt A) h + dt B x; y = (sum_n C h + D x) silu(z).

    Args:
        x, dt, z: [B, D] (z may be None); dt is raw.
        A: [D, N] negative, real or complex.
        B, C: [B, N], or [B, G, N] with channel d in group d // (D/G). Matrices [D, N] that are
            constant over time are D groups: broadcast them to [B, D, N].
        D, dt_bias: [D] or None.
        dt_softplus: whether dt is softplus(dt + dt_bias).
        state: [B, D, N].

    Returns:
        y [B, D] in x's dtype and the new state in the dtype of `state`; the arithmetic is in at
        least float32.
    """
    width = x.shape[-1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    widen = lambda m: m.astype(jnp.promote_types(m.dtype, wide))
    grouped = lambda m: per_channel(widen(m) if m.ndim == 3 else widen(m)[:, None], width)
    B, C, skip = grouped(B), grouped(C), x.astype(wide)
    dt = step_size(dt, dt_bias, dt_softplus)
    h = jnp.exp(dt[..., None] * widen(A)) * widen(state) + (dt * skip)[..., None] * B
    y = read(C, h)
    if D is not None:
        y = y + D.astype(wide) * skip
    if z is not None:
        y = y * jax.nn.silu(z.astype(wide))
    return y.astype(x.dtype), h.astype(state.dtype)


def selective_scan_reference(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    z: Array | None,
    *,
    delta_bias: Array | None,
    softplus: bool,
    state: Array,
    resets: Array | None,
    reverse: bool,
) -> tuple[Array, Array]:
    """The definition; see `selective_scan`. B, C are [B, T, G, N] or [D, N]."""
    first = lambda x: None if x is None else jnp.moveaxis(x, 1, 0)  # time leads
    moving = [first(x) for x in (u, delta, z, resets)]
    moving += [first(x) if x.ndim == 4 else None for x in (B, C)]

    def advance(h, step):
        u, delta, z, reset, b, c = step
        fixed = lambda moved, x: jnp.broadcast_to(x, h.shape) if moved is None else moved
        if reset is not None:
            h = jnp.where(reset[:, None, None], 0, h)
        y, h = selective_scan_step(
            u, delta, A, fixed(b, B), fixed(c, C), D, z,
            dt_bias=delta_bias, dt_softplus=softplus, state=h,
        )  # fmt: skip
        return h, y

    state, out = lax.scan(advance, state, tuple(moving), reverse=reverse)
    return jnp.moveaxis(out, 0, 1), state
