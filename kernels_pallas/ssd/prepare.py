"""What every implementation of SSD shares: activation of dt, the gate, cutting time into chunks.

An implementation gets time steps that are activated already and zero in the padding:

    core(x, dt, a, B, C, D, state, resets, *, chunk, out_dtype) -> (y, state)

x [B, T, H, P], dt and a = dt A [B, T, H] float32, B and C [B, T, G, N], D [H, P] or [H, 1] float32
or None, state [B, H, P, N] float32 or None, resets [B, T] bool or None. A step with dt = a = 0
leaves the state as it is, so that padding needs nothing else. A gets its gradient through `a`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from ..compat import vary
from ..softplus import softplus
from ..time_axis import fill_invalid


def unable(x: Array, n: int) -> dict[str, str | None]:
    """What the kernels do not take of x [B, T, H, P] and n states, as `dispatch.resolve` wants."""
    p, problem = x.shape[-1], None
    if x.dtype != jnp.bfloat16:
        problem = f"x of {x.dtype} (it must be bfloat16)"
    elif p % 64 or n % 64 or p * n > 8192:
        problem = f"head width P={p} with N={n} states (multiples of 64, P N <= 8192)"
    return {"pallas_gpu": problem}


def wide(dtype):
    """float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def activate(
    dt: Array,
    dt_bias: Array | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    lengths: Array | None = None,
) -> Array:
    """clamp(softplus(dt + dt_bias), *dt_limit) in at least float32; dt [B, T, H] or [B, H].

    The gradient of a clamped step is 0. Steps past `lengths` are 0 (after the activation).
    """
    dt = fill_invalid(dt, lengths).astype(wide(dt.dtype))
    if dt_bias is not None:
        dt = dt + dt_bias.astype(dt.dtype)
    if dt_softplus:
        dt = softplus(dt)
    low, high = dt_limit
    dt = jnp.where(dt < low, jnp.asarray(low, dt.dtype), dt)
    if math.isfinite(high):
        dt = jnp.where(dt > high, jnp.asarray(high, dt.dtype), dt)
    return fill_invalid(dt, lengths)


def gate(y: Array, z: Array) -> Array:
    """y silu(z) in the dtype of z, rounded once; keeps y in that dtype for the gradient of z."""
    return _gate(*vary((y, z), (y, z)))


def _gate_parts(z):
    z = z.astype(wide(z.dtype))
    s = jax.nn.sigmoid(z)
    return z * s, s * (1 + z * (1 - s))


@jax.custom_vjp
def _gate(y, z):
    return (y * _gate_parts(z)[0]).astype(z.dtype)


def _gate_fwd(y, z):
    # An empty array carries the dtype of y to the backward pass.
    return _gate(y, z), (y.astype(z.dtype), z, jnp.zeros((0,), y.dtype))


def _gate_bwd(residuals, ct):
    y, z, like = residuals
    value, slope = _gate_parts(z)
    dy = (ct * value).astype(like.dtype)
    return dy, (ct * y.astype(slope.dtype) * slope).astype(z.dtype)


_gate.defvjp(_gate_fwd, _gate_bwd)


def cut(x: Array, chunk: int) -> Array:
    """[B, T, ...] -> [B, chunks, chunk, ...]; T must be a multiple of chunk."""
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:])


def join(x: Array, t_len: int) -> Array:
    """[B, chunks, chunk, ...] -> [B, T, ...], without the padding at the end."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t_len]
