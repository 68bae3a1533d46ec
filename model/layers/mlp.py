"""Feed-forward layers."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from .norms import RMSNorm

fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # +-1/sqrt(fan_in)


class SquaredReLUMLP(nn.Module):
    """W2 relu(W1 norm(x))^2 without biases (Transformer-VQ's MLP for its mqa and mha head types).

    Attributes:
        hidden: inner width.
        norm_affine: gain and bias in the input norm.
        dtype: of the matmuls.
    """

    hidden: int
    norm_affine: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = lambda n, name: nn.Dense(
            n, use_bias=False, kernel_init=fan_in, dtype=self.dtype, name=name
        )
        h = RMSNorm(self.norm_affine, name="norm")(x)
        h = jnp.square(nn.relu(dense(self.hidden, "up")(h)))
        return dense(x.shape[-1], "down")(h)


class GatedMLP(nn.Module):
    """W2 (y silu(gate)) with [y | gate] = W1 x, without biases (the MLP of Mamba language models).

    Attributes:
        hidden: inner width, rounded up to a multiple of `multiple_of`.
        multiple_of: see above.
        out_scale: factor on the initial W2.
        dtype: of the matmuls.
    """

    hidden: int
    multiple_of: int = 128
    out_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = -(-self.hidden // self.multiple_of) * self.multiple_of
        dense = lambda n, name, init: nn.Dense(
            n, use_bias=False, kernel_init=init, dtype=self.dtype, name=name
        )
        y, gate = jnp.split(dense(2 * hidden, "fc1", uniform_fan_in)(x), 2, axis=-1)
        scaled = lambda *a: self.out_scale * uniform_fan_in(*a)
        return dense(x.shape[-1], "fc2", scaled)(y * nn.silu(gate))
