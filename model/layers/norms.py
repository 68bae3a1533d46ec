"""Normalisation layers."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax


def rms_normalise(x: Array, epsilon: float = 1e-6) -> Array:
    """x / sqrt(mean(x^2) + epsilon) over the last axis, in at least float32 (returned in that
    dtype).
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
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
        [..., D] in x's dtype; everything in between is at least float32.

    Raises:
        ValueError: group_size does not divide D.
    """
    width = x.shape[-1]
    group_size = group_size or width
    if width % group_size:
        raise ValueError(f"group_size={group_size} does not divide the width {width}")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = x.astype(wide)
    gate = None if z is None else nn.silu(z.astype(wide))
    if gate is not None and not norm_before_gate:
        y = y * gate
    groups = y.reshape(*y.shape[:-1], width // group_size, group_size)
    y = rms_normalise(groups, epsilon).reshape(y.shape) * gain
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.astype(x.dtype)


class GatedRMSNorm(nn.Module):
    """`gated_rms_norm` with a learned gain `g` (init 1); attributes as its arguments."""

    group_size: int | None = None
    norm_before_gate: bool = False
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, z: Array | None = None) -> Array:
        gain = self.param("g", nn.initializers.ones, (x.shape[-1],))
        norm = functools.partial(
            gated_rms_norm, group_size=self.group_size, norm_before_gate=self.norm_before_gate,
            epsilon=self.epsilon,
        )  # fmt: skip
        # The backward pass computes the float32 values in between anew: they are many, it is cheap.
        return jax.checkpoint(norm, prevent_cse=False)(x, gain, z)
