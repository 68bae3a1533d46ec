"""LPIPS: distance of two images in the features of VGG16 (arXiv 1801.03924; VGG: 1409.1556)."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ..partition import constrain

# Convolutions per stage and their channels; a stage ends where a feature map is taken, and all but
# the first begin with 2x2 max pooling.
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
CHANNELS = tuple(channels for _, channels in STAGES)
# Mean and deviation of ImageNet's RGB, moved from [0, 1] to [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SMALLEST = 16  # pixels: four times halved


def scale_pixels(images: Array) -> Array:
    """(x - shift) / scale per channel of RGB images [..., 3] in [-1, 1]."""
    return (images - jnp.asarray(SHIFT, images.dtype)) / jnp.asarray(SCALE, images.dtype)


class VGG16Features(nn.Module):
    """Features after relu1_2, 2_2, 3_3, 4_3 and 5_3 of scaled pixels, in float32."""

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        features = []
        for stage, (convolutions, channels) in enumerate(STAGES, 1):
            if stage > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for i in range(1, convolutions + 1):
                x = nn.relu(nn.Conv(channels, (3, 3), padding=1, name=f"conv{stage}_{i}")(x))
                x = constrain(x, "batch", None, None, None)
            features.append(x)
        return features


def _unit(x: Array) -> Array:
    """x / (|x| + 1e-10) over channels; its gradient is finite where all channels are 0."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x / (norm + 1e-10)


def lpips_head(features_a: Sequence[Array], features_b: Sequence[Array], weights) -> Array:
    """sum_k mean_pixels sum_c w_kc (unit(a_k) - unit(b_k))_c^2.

    Args:
        features_a, features_b: [B, H_k, W_k, C_k] per level k.
        weights: [C_k] per level.

    Returns:
        [B].
    """
    distance = 0.0
    for a, b, w in zip(features_a, features_b, weights, strict=True):
        distance += jnp.mean(jnp.square(_unit(a) - _unit(b)) @ w, axis=(1, 2))
    return distance


class LPIPS(nn.Module):
    """Distance of images [B, H, W, 3] in [-1, 1]: [B] float32, without dropout.

    Parameters come from `convert.lpips`; random ones measure nothing.
    """

    @nn.compact
    def __call__(self, a: Array, b: Array) -> Array:
        """Distances [B] of a[i] and b[i].

        Raises:
            ValueError: fewer than 16 pixels a side, or other than 3 channels.
        """
        if a.shape != b.shape or a.shape[3] != 3 or min(a.shape[1:3]) < SMALLEST:
            raise ValueError(
                f"LPIPS of images {a.shape} and {b.shape}: it compares RGB images of one size, at "
                f"least {SMALLEST} pixels a side; set perceptual_weight=0 for others"
            )
        vgg = VGG16Features(name="vgg")
        wide = lambda x: scale_pixels(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        weights = [
            self.param(f"lin{k}", nn.initializers.ones, (channels,))
            for k, channels in enumerate(CHANNELS)
        ]
        return lpips_head(vgg(wide(a)), vgg(wide(b)), weights)
