"""Normalisation layers."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from ...kernels_pallas.compat import vary


def rms_normalise(x: Array, epsilon: float = 1e-6) -> Array:
    """x / sqrt(mean(x^2) + epsilon) over the last axis, in at least float32 (returned in that
    dtype).
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * lax.rsqrt(epsilon + jnp.mean(jnp.square(x), axis=-1, keepdims=True))


def layer_normalise(x: Array, epsilon: float = 1e-6) -> Array:
    """(x - mean(x)) / sqrt(var(x) + epsilon) over the last axis with the biased variance, in at
    least float32 (returned in that dtype).
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * lax.rsqrt(epsilon + jnp.mean(jnp.square(x), axis=-1, keepdims=True))


class RMSNorm(nn.Module):
    """RMS norm with optional gain (init 1) and bias (init 0); computed in float32, returned in x's
    dtype.

    Attributes:
        affine: learn gain `g` of the width of x, and with `bias` also `b`.
        bias: see above.
        epsilon: added to the mean square.
    """

    affine: bool = True
    bias: bool = True
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = rms_normalise(x, self.epsilon)
        if self.affine:
            y = y * self.param("g", nn.initializers.ones, (x.shape[-1],))
            if self.bias:
                y = y + self.param("b", nn.initializers.zeros, (x.shape[-1],))
        return y.astype(x.dtype)


def gated_rms_norm(
    x: Array,
    gain: Array,
    z: Array | None = None,
    *,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    epsilon: float = 1e-5,
) -> Array:
    """RMS norm over groups of channels with a SiLU gate (Mamba-2, arXiv 2405.21060, section 7).

        norm_before_gate=False:  y = rms(x silu(z)) gain        True:  y = rms(x) gain silu(z)

    Args:
        x: [..., D]. gain: [D]. z: [..., D] gate, or None for none.
        group_size: channels that share one root mean square; None means D.

    Returns:
        [..., D] in x's dtype; everything in between is at least float32, and none of it is kept
        for the backward pass.

    Raises:
        ValueError: group_size does not divide D.
    """
    width = x.shape[-1]
    group_size = group_size or width
    if width % group_size:
        raise ValueError(f"group_size={group_size} does not divide the width {width}")
    if z is not None and not norm_before_gate:
        return _gate_then_norm(group_size, epsilon, *vary((x, gain, z), (x, gain, z)))

    def norm(x, gain, z):
        y = _in_groups(_widen(x), group_size)
        y = _join(rms_normalise(y, epsilon)) * gain
        return (y if z is None else y * nn.silu(_widen(z))).astype(x.dtype)

    return jax.checkpoint(norm, prevent_cse=False)(x, gain, z)


def _widen(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _in_groups(x, group_size):
    return x.reshape(*x.shape[:-1], -1, group_size)


def _join(groups):
    return groups.reshape(*groups.shape[:-2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gate_then_norm(group_size, epsilon, x, gain, z):
    return _gate_then_norm_fwd(group_size, epsilon, x, gain, z)[0]


def _gate_then_norm_fwd(group_size, epsilon, x, gain, z):
    gated = lambda x, z: _in_groups(_widen(x) * nn.silu(_widen(z)), group_size)
    scale = lax.rsqrt(epsilon + jnp.mean(jnp.square(gated(x, z)), axis=-1, keepdims=True))
    # Behind a barrier all is made anew, for else it would go through memory, in float32.
    y = (_join(gated(*lax.optimization_barrier((x, z))) * scale) * gain).astype(x.dtype)
    return y, (x, gain, z, scale, y)


def _gate_then_norm_bwd(group_size, epsilon, residuals, dy):
    """With t = x silu(z), y = t scale gain: dt = scale (dy gain - scale t mean(dy y)) ."""
    x, gain, z, scale, y = residuals
    groups = functools.partial(_in_groups, group_size=group_size)
    # Each barrier begins a pass that makes its float32 values anew: none goes through memory.
    y, dy = lax.optimization_barrier((y, dy))
    mean = jnp.mean(groups(_widen(dy) * _widen(y)), axis=-1, keepdims=True)

    x, z, dy, mean = lax.optimization_barrier((x, z, dy, mean))
    normed = groups(_widen(x) * nn.silu(_widen(z))) * scale
    dgain = jnp.sum(_widen(dy) * _join(normed), axis=tuple(range(x.ndim - 1)))

    x, z, dy, mean, dgain = lax.optimization_barrier((x, z, dy, mean, dgain))
    x_wide, z_wide = _widen(x), _widen(z)
    s = nn.sigmoid(z_wide)
    gate = z_wide * s
    normed = groups(x_wide * gate) * scale
    dt = _join(scale * (groups(_widen(dy) * gain) - normed * mean))
    dz = dt * x_wide * (s + gate * (1 - s))
    dx, dz = lax.optimization_barrier(((dt * gate).astype(x.dtype), dz.astype(z.dtype)))
    return dx, dgain.astype(gain.dtype), dz


_gate_then_norm.defvjp(_gate_then_norm_fwd, _gate_then_norm_bwd)


class GatedRMSNorm(nn.Module):
    """`gated_rms_norm` with a learned gain `g` (init 1); attributes as its arguments."""

    group_size: int | None = None
    norm_before_gate: bool = False
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, z: Array | None = None) -> Array:
        gain = self.param("g", nn.initializers.ones, (x.shape[-1],))
        return gated_rms_norm(
            x, gain, z, group_size=self.group_size, norm_before_gate=self.norm_before_gate,
            epsilon=self.epsilon,
        )  # fmt: skip
