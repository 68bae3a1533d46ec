"""Autoencoder with a KL-regularised latent (latent diffusion, arXiv 2112.10752, appendix G): the
one of Stable Diffusion (f8, 4 channels), in whose latents DiT is trained (arXiv 2212.09748).

image -> encoder (convolutions, /8) -> mean and log variance of a normal distribution per position
latent -> decoder -> image

Latents are never scaled here: a diffusion model sees `scaling_factor` times a draw of
`sample_posterior`, and what it makes is divided by the factor before `decode`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ..layers.image_coder import (
    Decoder,
    Encoder,
    check_channels,
    check_images,
    conv,
    on_batch,
    residual_block,
)

LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig:
    """Convolutional autoencoder with a normal posterior; the defaults are Stable Diffusion's.

    Attributes:
        ch: channels of the first level; ch_mult: channels of each level as multiples of it. Every
            level but the last halves the resolution.
        num_res_blocks: residual blocks per level (the decoder has one more).
        latent_channels: of mean, log variance and latent.
        scaling_factor: by which a diffusion model multiplies latents, about 1 / their standard
            deviation; nothing here multiplies.
        in_channels, out_channels: of images.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 4
    scaling_factor: float = 0.18215
    in_channels: int = 3
    out_channels: int = 3

    @property
    def downsample(self) -> int:
        """Pixels per latent position along a side."""
        return 2 ** (len(self.ch_mult) - 1)


class Posterior(NamedTuple):
    """Mean and log variance [B, h, w, latent_channels] float32 of independent normals."""

    mean: Array
    logvar: Array


def sample_posterior(mean: Array, logvar: Array, noise: Array) -> Array:
    """mean + exp(logvar / 2) noise, not scaled: a draw where `noise` is standard normal.

    Args:
        mean, logvar, noise: of one shape; computed in at least float32.
    """
    wide = lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32))
    return wide(mean) + jnp.exp(0.5 * wide(logvar)) * wide(noise)


class AutoencoderKL(nn.Module):
    """The autoencoder; random parameters are PyTorch's initial ones with biases 0.

    Attributes:
        config: sizes.
        dtype: of convolutions and attention. Norms, moments and images that come out are float32
            whatever it is.
        remat: what the backward pass recomputes in each residual block: "none", "full", or "dots"
            (all but convolutions).
    """

    config: AutoencoderKLConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    def setup(self):
        c = self.config
        check_channels(c)
        common = dict(
            ch=c.ch, ch_mult=c.ch_mult, num_res_blocks=c.num_res_blocks, attention=False,
            block=residual_block(self.remat), dropout=0.0, dtype=self.dtype,
        )  # fmt: skip
        self.encoder = Encoder(features=2 * c.latent_channels, **common)
        self.decoder = Decoder(features=c.out_channels, **common)
        self.quant_conv = conv(2 * c.latent_channels, 1, None, None)
        self.post_quant_conv = conv(c.latent_channels, 1, None, None)

    def __call__(self, images: Array) -> tuple[Array, Posterior]:
        """Images [B, H, W, C] in [-1, 1] -> (images decoded from the posterior's mean, posterior).

        Raises:
            ValueError: a side that is no multiple of `config.downsample`, or other channels.
        """
        posterior = self.encode(images)
        return self.decode(posterior.mean), posterior

    def encode(self, images: Array) -> Posterior:
        """Posterior of images [B, H, W, C] in [-1, 1], the log variance clamped to [-30, 20];
        errors as of `__call__`.
        """
        check_images(images, self.config.in_channels, self.config.downsample, "latents")
        moments = self.quant_conv(self.encoder(on_batch(images)))
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Posterior(on_batch(mean), on_batch(jnp.clip(logvar, *LOGVAR_RANGE)))

    def decode(self, latents: Array) -> Array:
        """Images [B, H, W, C] float32, about in [-1, 1] but not clamped, of latents [B, h, w,
        latent_channels] that are not scaled.

        Raises:
            ValueError: latents of another shape.
        """
        if latents.ndim != 4 or latents.shape[-1] != self.config.latent_channels:
            raise ValueError(
                f"latents have shape {latents.shape}, expected [B, h, w, "
                f"{self.config.latent_channels}]"
            )
        images, _ = self.decoder(self.post_quant_conv(on_batch(latents)))
        return on_batch(images.astype(jnp.float32))
