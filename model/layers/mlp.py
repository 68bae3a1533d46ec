"""Feed-forward layers."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from .norms import RMSNorm

fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


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
