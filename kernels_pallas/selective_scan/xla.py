"""Selective scan chunk by chunk, in XLA operations.

Within a chunk of Q steps the states [B, Q, D, N] come from the linear scan's XLA form; between
chunks only the last state [B, D, N] is kept, and the backward pass computes a chunk's states again.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from .. import dispatch
from ..compat import vary
from ..linear_scan.xla import linear_scan_xla
from ..time_axis import flip_time, pad_time, spread
from .reference import per_channel, read, step_size

# States of one chunk, in elements: at most this many, between 16 and 256 steps. Few enough for its
# cache on a CPU, where that is two to three times as fast as 256 steps at once.
CHUNK_ELEMENTS = 2**26
CHUNK_ELEMENTS_CPU = 2**19


def chunk_length(batch: int, t_len: int, width: int, states: int) -> int:
    """Steps per chunk: a power of two in 16..256, or the whole sequence if that is shorter."""
    on_cpu = dispatch.current_device().startswith("cpu")
    most = CHUNK_ELEMENTS_CPU if on_cpu else CHUNK_ELEMENTS
    fits = most // max(batch * width * states, 1)
    return min(t_len, max(16, min(256, 1 << max(fits, 1).bit_length() - 1)))


def selective_scan_xla(
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
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """See `selective_scan`; `chunk` steps at a time (None: chosen by size), with the same result.

    B, C are [B, T, G, N] or [D, N]. Extra memory: the states of one chunk, and one state per chunk
    for the backward pass.
    """
    batch, t_len, width = u.shape
    chunk = min(chunk, t_len) if chunk else chunk_length(batch, t_len, width, A.shape[1])
    wide = jnp.promote_types(u.dtype, jnp.float32)
    widen = lambda x: None if x is None else x.astype(jnp.promote_types(x.dtype, wide))
    constants = vary(tuple(widen(x) for x in (A, D, delta_bias)), u)
    fixed = vary(tuple(widen(x) if x.ndim == 2 else None for x in (B, C)), u)
    moving = (u, delta, z, resets, *(x if x.ndim == 4 else None for x in (B, C)))
    moving = tuple(None if x is None else pad_time(x, chunk) for x in moving)
    moving = vary(flip_time(moving) if reverse else moving, u)
    valid = jnp.arange(moving[0].shape[1]) < t_len  # padding takes no step
    valid = (valid[::-1] if reverse else valid).reshape(-1, chunk)
    by_chunk = lambda x: jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def advance(h, constants, fixed, moving, valid):
        A, D, delta_bias = constants
        u, delta, z, resets, *varying = moving
        B, C = (
            m[None, None] if v is None else per_channel(widen(v), width)
            for m, v in zip(fixed, varying, strict=True)
        )
        x = u.astype(wide)
        dt = jnp.where(valid[:, None], step_size(delta, delta_bias, softplus), 0)
        decay = jnp.exp(dt[..., None] * A)
        if resets is not None:
            decay = jnp.where(spread(resets, decay), 0, decay)
        drive = (dt * x)[..., None] * B + jnp.zeros_like(decay)
        (h,), _ = linear_scan_xla((decay,), (drive,), (h,), False)
        y = read(C, h)
        if D is not None:
            y = y + D * x
        if z is not None:
            y = y * jax.nn.silu(z.astype(wide))
        return h[:, -1], y.astype(u.dtype)

    xs = (jax.tree.map(by_chunk, moving), vary(valid, u))
    state, out = lax.scan(lambda h, x: advance(h, constants, fixed, *x), state, xs)
    out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, width)
    out = flip_time(out) if reverse else out
    return out[:, :t_len], state
