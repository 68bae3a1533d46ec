"""VQ tokenizer of images (VQ-f16 of LlamaGen, arXiv 2406.06525, section 2.2; used by AiM).

image -> encoder (convolutions, /16) -> nearest of 16384 unit vectors -> ids in raster order
ids -> unit vectors -> decoder -> image
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from ...kernels_pallas.vq_attention import nearest_code
from ..layers.image_coder import (
    Decoder,
    Encoder,
    check_channels,
    check_images,
    conv,
    on_batch,
    residual_block,
)
from ..layers.mlp import uniform_fan_in

MAX_DISTANCES = 2**25  # entries of a piece of the distance matrix: 128 MiB in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQTokenizerConfig:
    """Convolutional VQ autoencoder; the defaults are VQ-f16.

    Attributes:
        ch: channels of the first level; ch_mult: channels of each level as multiples of it. Every
            level but the last halves the resolution.
        num_res_blocks: residual blocks per level (the decoder has one more).
        z_channels: channels between encoder and quantiser.
        codebook_size, codebook_dim: V codes of that width.
        l2_norm: match and decode unit vectors; False takes latents and codes as they are.
        in_channels, out_channels: of images.
        dropout: in residual blocks.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8
    l2_norm: bool = True
    in_channels: int = 3
    out_channels: int = 3
    dropout: float = 0.0

    @property
    def downsample(self) -> int:
        """Pixels per token along a side."""
        return 2 ** (len(self.ch_mult) - 1)


class TokenizerOutput(NamedTuple):
    """What `VQTokenizer` computes of images [B, H, W, C]; h, w = H, W / downsample.

    Attributes:
        recon: [B, H, W, C] float32, not clamped.
        codes: [B, h, w] int32.
        z: [B, h, w, D] float32 latents as they are matched (of unit length with `l2_norm`).
        z_q: [B, h, w, D] float32 codes as they are decoded, differentiable in the codebook (the
            decoder saw z + stop(z_q - z)).
        codebook: [V, D] float32 all codes as they are matched, differentiable.
        features: [B, H, W, ch] input of the decoder's last convolution.
    """

    recon: Array
    codes: Array
    z: Array
    z_q: Array
    codebook: Array
    features: Array


# ---------------------------------------------------------------- quantiser


def l2_normalise(x: Array, epsilon: float = 1e-12) -> Array:
    """x / max(|x|, epsilon) over the last axis, in at least float32; its gradient is finite at
    0.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    tiny = square <= epsilon**2
    return x / jnp.where(tiny, epsilon, jnp.sqrt(jnp.where(tiny, 1.0, square)))


def position_blocks(z: Array, codebook_size: int, max_distances: int) -> Array:
    """Latents [B, P, D] in pieces [n, B, p, D] with B * p * V <= max_distances where p > 1.

    Positions are cut, never rows, so that a batch sharded over devices stays where it is. The last
    piece is filled up with zeros. One position of all rows is the least (V distances per image).
    """
    batch, positions, width = z.shape
    most = max(1, max_distances // max(1, batch * codebook_size))
    pieces = -(-positions // most)
    size = -(-positions // pieces)
    z = jnp.pad(z, ((0, 0), (0, pieces * size - positions), (0, 0)))
    return jnp.moveaxis(z.reshape(batch, pieces, size, width), 1, 0)


def nearest_codes(z: Array, codebook: Array, *, max_distances: int = MAX_DISTANCES) -> Array:
    """argmin_j |z - e_j|^2, the first of equals; float32 at the highest matmul precision.

    Args:
        z: [B, h, w, D]; codebook: [V, D]; both as they are matched.
        max_distances: bound on the distances that are held at a time.

    Returns:
        [B, h, w] int32, without gradient.
    """
    batch, height, width, _ = z.shape
    pieces = position_blocks(z.reshape(batch, height * width, -1), len(codebook), max_distances)
    find = lambda piece: nearest_code(piece[:, None], codebook[None])[:, 0]
    codes = find(pieces[0])[None] if len(pieces) == 1 else lax.map(find, pieces)
    codes = jnp.moveaxis(codes, 0, 1).reshape(batch, -1)
    return codes[:, : height * width].reshape(batch, height, width)


def init_codebook(key: Array, shape: tuple[int, int], dtype=jnp.float32) -> Array:
    """U(-1/V, 1/V), rows [V, D] normalised."""
    limit = 1 / shape[0]
    return l2_normalise(jax.random.uniform(key, shape, dtype, -limit, limit))


# ---------------------------------------------------------------- net


def last_convolution(params, features: Array) -> Array:
    """Images from `TokenizerOutput.features`, as a function of the tokenizer's parameters.

    The adaptive weight of adversarial training is a ratio of gradients of this layer's kernel.
    """
    params = params["decoder"]["conv_out"]
    return conv(params["bias"].size, 3, None, None).apply({"params": params}, features)


class VQTokenizer(nn.Module):
    """The tokenizer; random parameters are PyTorch's initial ones with biases 0.

    Attributes:
        config: sizes.
        dtype: of convolutions and attention. Norms, latents, distances and the images that come
            out are float32 whatever it is, so that codes do not depend on it more than they must.
        remat: what the backward pass recomputes in each residual block: "none", "full", or "dots"
            (all but convolutions).
    """

    config: VQTokenizerConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    def setup(self):
        c = self.config
        check_channels(c)
        common = dict(
            ch=c.ch, ch_mult=c.ch_mult, num_res_blocks=c.num_res_blocks, attention=True,
            block=residual_block(self.remat), dropout=c.dropout, dtype=self.dtype,
        )  # fmt: skip
        self.encoder = Encoder(features=c.z_channels, **common)
        self.decoder = Decoder(features=c.out_channels, **common)
        # In float32 (the dtype of its parameters), for the codes depend on it.
        self.quant_conv = nn.Conv(
            c.codebook_dim, (1, 1), kernel_init=uniform_fan_in, precision=lax.Precision.HIGHEST
        )
        self.post_quant_conv = conv(c.z_channels, 1, self.dtype, None)
        self.codebook = self.param("codebook", init_codebook, (c.codebook_size, c.codebook_dim))

    def __call__(self, images: Array) -> TokenizerOutput:
        """Images [B, H, W, C] in [-1, 1], encoded and decoded; see `TokenizerOutput`.

        Dropout acts iff the rng "dropout" is given.

        Raises:
            ValueError: a side that is no multiple of `config.downsample`, or other channels.
        """
        z = self.latents(images)
        codebook = self._matched(self.codebook)
        codes = nearest_codes(z, codebook)
        z_q = jnp.take(codebook, codes, axis=0)
        recon, features = self._decode(z + lax.stop_gradient(z_q - z))
        return TokenizerOutput(recon, codes, z, z_q, codebook, features)

    def encode(self, images: Array) -> Array:
        """Codes [B, h, w] int32 of images [B, H, W, C] in [-1, 1]; errors as of `__call__`."""
        return nearest_codes(self.latents(images), self._matched(self.codebook))

    def decode(self, codes: Array) -> Array:
        """Images [B, H, W, C] float32, not clamped, of codes [B, h, w]; ids beyond the codebook
        give NaN.
        """
        return self._decode(jnp.take(self._matched(self.codebook), codes, axis=0))[0]

    def latents(self, images: Array) -> Array:
        """[B, h, w, D] float32 as they are matched with codes; errors as of `__call__`."""
        check_images(images, self.config.in_channels, self.config.downsample, "tokens")
        return self._matched(self.quant_conv(self.encoder(on_batch(images))))

    def _matched(self, vectors: Array) -> Array:
        """Latents or codes in the form in which they are compared and decoded."""
        return l2_normalise(vectors) if self.config.l2_norm else vectors

    def _decode(self, z_q: Array) -> tuple[Array, Array]:
        recon, features = self.decoder(self.post_quant_conv(z_q))
        return on_batch(recon), features
