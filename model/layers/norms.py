"""Normalisation layers."""

from __future__ import annotations

import flax.linen as nn
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
        affine: learn gain `g` and bias `b` of the width of x.
    """

    affine: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = rms_normalise(x)
        if self.affine:
            gain = self.param("g", nn.initializers.ones, (x.shape[-1],))
            bias = self.param("b", nn.initializers.zeros, (x.shape[-1],))
            y = y * gain + bias
        return y.astype(x.dtype)
