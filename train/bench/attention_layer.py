"""The attention layer that `lintime bench pom` compares with."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ...kernels_pallas import dispatch
from ...model.layers.parted_dense import PartedDense


class AttentionLayer(nn.Module):
    """softmax(q k^T / sqrt(K)) v between two matmuls, `qkv` [d, 3 d] and `proj` [d, d] with
    biases; cuDNN's flash attention on GPUs in 16 bit.

    Attributes:
        features: d. num_heads: H = d / K. causal: token t sees the tokens up to t. dtype: of all.
    """

    features: int
    num_heads: int
    causal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, dict]:
        """x [B, T, d] -> y [B, T, d], {}."""
        init = nn.initializers.xavier_uniform()
        parts = PartedDense((self.features,) * 3, True, init, self.dtype, name="qkv")(x)
        shape = (*x.shape[:2], self.num_heads, self.features // self.num_heads)
        fused = dispatch.current_device().startswith("gpu") and self.dtype.itemsize == 2
        fused = fused and x.shape[1] % 2 == 0
        y = jax.nn.dot_product_attention(
            *(part.reshape(shape) for part in parts), is_causal=self.causal,
            implementation="cudnn" if fused else "xla",
        )  # fmt: skip
        dense = nn.Dense(self.features, kernel_init=init, dtype=self.dtype, name="proj")
        return dense(y.reshape(x.shape)), {}
