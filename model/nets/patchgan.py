"""PatchGAN discriminator of images (arXiv 1611.07004, section 3.2.2), as LlamaGen trains VQ
tokenizers with.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from ..partition import constrain

EPSILON, MOMENTUM = 1e-5, 0.1
MAX_MULTIPLE = 8  # of the channels

normal = nn.initializers.normal(0.02)


def _around_one(key: Array, shape, dtype=jnp.float32) -> Array:
    """N(1, 0.02)."""
    return 1 + normal(key, shape, dtype)


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last, in at least float32, returned in x's dtype.

        mean, var over rows and pixels;  y = (x - mean) / sqrt(var + 1e-5) * scale + bias

    If the collection `batch_stats` is mutable, the statistics are the batch's (biased variance),
    and the running ones move by a tenth to them (unbiased variance); otherwise the running ones
    are used. Under a batch that is sharded over devices by jit the statistics are of the whole
    batch, for the means are over the global array; inside a `shard_map` they would be local.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1:]
        scale = self.param("scale", _around_one, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        mean = self.variable("batch_stats", "mean", jnp.zeros, width)
        var = self.variable("batch_stats", "var", jnp.ones, width)
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.is_mutable_collection("batch_stats"):
            axes = tuple(range(x.ndim - 1))
            now, spread = jnp.mean(y, axes), jnp.var(y, axes)
            if not self.is_initializing():
                count = x.size // width[0]
                unbiased = spread * (count / max(count - 1, 1))
                move = lambda old, new: old + MOMENTUM * (lax.stop_gradient(new) - old)
                mean.value, var.value = move(mean.value, now), move(var.value, unbiased)
        else:
            now, spread = mean.value, var.value
        return ((y - now) * lax.rsqrt(spread + EPSILON) * scale + bias).astype(x.dtype)


class PatchGAN(nn.Module):
    """Logits of patches: positive = real. 4x4 convolutions with padding 1 and LeakyReLU(0.2).

    One of stride 2, `layers` with batch norm (all but the last of stride 2), and one to the
    logits. Batch norm: see `BatchNorm`. As a pure function, with batch statistics:

        logits, new = net.apply({"params": p, "batch_stats": s}, images, mutable=["batch_stats"])

    Attributes:
        features: channels after the first convolution; they double up to 8 times that.
        layers: convolutions with batch norm.
        dtype: of the convolutions; logits are float32.
    """

    features: int = 64
    layers: int = 3
    dtype: jnp.dtype = jnp.float32

    @property
    def least_size(self) -> int:
        """Smallest side of an image that leaves a logit."""
        return 3 * 2**self.layers

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Logits [B, H / 2^layers - 2, W / 2^layers - 2, 1] float32 of images [B, H, W, C].

        Raises:
            ValueError: images too small to leave a logit, or no layers.
        """
        height, width = images.shape[1:3]
        if self.layers < 1:
            raise ValueError(f"a discriminator of {self.layers} layers; it needs at least 1")
        if min(height, width) < self.least_size:
            raise ValueError(
                f"images of {height}x{width} pixels are too small for a discriminator of "
                f"{self.layers} layers, which needs {self.least_size}; use fewer (disc_layers)"
            )
        conv = lambda features, stride, name, bias=False: nn.Conv(
            features, (4, 4), (stride, stride), padding=1, use_bias=bias, dtype=self.dtype,
            kernel_init=normal, name=name,
        )  # fmt: skip
        relu = lambda h: constrain(jax.nn.leaky_relu(h, 0.2), "batch", None, None, None)
        x = relu(conv(self.features, 2, "conv_0", bias=True)(images))
        for i in range(1, self.layers + 1):
            features = self.features * min(2**i, MAX_MULTIPLE)
            x = conv(features, 1 if i == self.layers else 2, f"conv_{i}")(x)
            x = relu(BatchNorm(name=f"norm_{i}")(x))
        return conv(1, 1, f"conv_{self.layers + 1}", bias=True)(x).astype(jnp.float32)
