"""The gated feed-forward layer of JiT (arXiv 2511.13720)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ..partition import constrain


class SwiGLU(nn.Module):
    """W2 (silu(a) b) with [a | b] = W1 x, with biases (arXiv 2002.05202, section 2).

    Attributes:
        hidden: width of a and of b.
        dtype: of the matmuls; silu is computed in at least float32.
    """

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[.., d] in `dtype`, from x [.., d]."""
        dense = lambda n, name: nn.Dense(
            n, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype, name=name
        )
        a, b = jnp.split(dense(2 * self.hidden, "fc1")(x), 2, axis=-1)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        h = (nn.silu(a.astype(wide)) * b.astype(wide)).astype(self.dtype)
        if h.ndim == 3:
            h = constrain(h, "batch", "seq", "features")
        return dense(x.shape[-1], "fc2")(h)
