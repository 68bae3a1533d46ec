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

from ...kernels_pallas.matmul import matmul
from ...kernels_pallas.vq_attention import nearest_code
from ..layers.mlp import uniform_fan_in
from ..partition import constrain

GROUPS = 32  # of every group norm
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


def check_channels(config: VQTokenizerConfig) -> None:
    """Whether there are levels, and group norms divide their channels.

    Raises:
        ValueError: with the numbers.
    """
    c = config
    if not c.ch_mult or min(c.ch_mult) < 1:
        raise ValueError(f"ch_mult={c.ch_mult}: give a whole number of at least 1 for each level")
    if odd := sorted({c.ch * m for m in (1, *c.ch_mult) if c.ch * m % GROUPS}):
        raise ValueError(
            f"ch={c.ch} and ch_mult={c.ch_mult} give levels of {odd} channels; all must be "
            f"multiples of {GROUPS}, the groups of the norms"
        )


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


# ---------------------------------------------------------------- layers


def conv(
    features: int, kernel: int, dtype, name: str | None, *, stride: int = 1, padding=None
) -> nn.Conv:
    """A convolution with bias; zero padding keeps the size unless `padding` is given."""
    padding = ((kernel // 2, kernel // 2),) * 2 if padding is None else padding
    return nn.Conv(
        features, (kernel, kernel), (stride, stride), padding=padding, dtype=dtype,
        kernel_init=uniform_fan_in, name=name,
    )  # fmt: skip


def group_norm(name: str) -> nn.GroupNorm:
    """Group norm, in at least float32 whatever comes in (its parameters are float32)."""
    return nn.GroupNorm(GROUPS, epsilon=1e-6, use_fast_variance=False, name=name)


on_batch = lambda x: constrain(x, "batch", None, None, None)


class ResnetBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1 convolution on the shortcut where
    the channels differ.
    """

    features: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = conv(self.features, 3, self.dtype, "conv1")(nn.silu(group_norm("norm1")(x)))
        h = nn.silu(group_norm("norm2")(h))
        h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(h)
        h = conv(self.features, 3, self.dtype, "conv2")(h)
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, self.dtype, "nin_shortcut")(x)
        return on_batch(x + h)


class AttnBlock(nn.Module):
    """x + proj_out(softmax(q k^T / sqrt(c)) v): one head over all positions."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        h = group_norm("norm")(x).astype(self.dtype)
        project = lambda name: conv(channels, 1, self.dtype, name)(h).reshape(batch, -1, channels)
        q, k, v = project("q"), project("k"), project("v")
        weights = nn.softmax(matmul("bqc,bkc->bqk", q, k) * channels**-0.5)
        h = matmul("bqk,bkc->bqc", weights.astype(self.dtype), v).astype(self.dtype)
        h = conv(channels, 1, self.dtype, "proj_out")(h.reshape(x.shape))
        return on_batch(x + h)


class Downsample(nn.Module):
    """3x3 convolution of stride 2 after one row and column of zeros on the right and bottom."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        halve = conv(x.shape[-1], 3, self.dtype, "conv", stride=2, padding=((0, 1), (0, 1)))
        return on_batch(halve(x))


class Upsample(nn.Module):
    """Every pixel four times, then a 3x3 convolution."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return on_batch(conv(x.shape[-1], 3, self.dtype, "conv")(x))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if asked for, then a resize."""

    features: int
    blocks: int
    attention: bool
    resize: str  # "downsample", "upsample" or ""
    block: type[nn.Module]  # ResnetBlock, rematerialised or not
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.blocks):
            x = self.block(self.features, self.dropout, self.dtype, name=f"res_{i}")(x)
            if self.attention:
                x = AttnBlock(self.dtype, name=f"attn_{i}")(x)
        if self.resize:
            resize = {"downsample": Downsample, "upsample": Upsample}[self.resize]
            x = resize(self.dtype, name=self.resize)(x)
        return x


def _middle(x: Array, block: type[nn.Module], dropout: float, dtype) -> Array:
    """Residual block, attention, residual block."""
    x = block(x.shape[-1], dropout, dtype, name="mid_0")(x)
    x = AttnBlock(dtype, name="mid_1")(x)
    return block(x.shape[-1], dropout, dtype, name="mid_2")(x)


class Encoder(nn.Module):
    """Images [B, H, W, C] -> [B, h, w, z_channels]."""

    config: VQTokenizerConfig
    block: type[nn.Module]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, last = self.config, len(self.config.ch_mult) - 1
        x = conv(c.ch, 3, self.dtype, "conv_in")(x)
        for i, multiple in enumerate(c.ch_mult):
            x = Level(
                c.ch * multiple, c.num_res_blocks, attention=i == last,
                resize="" if i == last else "downsample", block=self.block, dropout=c.dropout,
                dtype=self.dtype, name=f"conv_blocks_{i}",
            )(x)  # fmt: skip
        x = _middle(x, self.block, c.dropout, self.dtype)
        return conv(c.z_channels, 3, self.dtype, "conv_out")(nn.silu(group_norm("norm_out")(x)))


class Decoder(nn.Module):
    """[B, h, w, z_channels] -> images [B, H, W, C] in at least float32, and the input of the last
    convolution [B, H, W, ch]. conv_blocks_0 has the lowest resolution.
    """

    config: VQTokenizerConfig
    block: type[nn.Module]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        c, last = self.config, len(self.config.ch_mult) - 1
        x = conv(c.ch * c.ch_mult[-1], 3, self.dtype, "conv_in")(x)
        x = _middle(x, self.block, c.dropout, self.dtype)
        for i, multiple in enumerate(reversed(c.ch_mult)):
            x = Level(
                c.ch * multiple, c.num_res_blocks + 1, attention=i == 0,
                resize="" if i == last else "upsample", block=self.block, dropout=c.dropout,
                dtype=self.dtype, name=f"conv_blocks_{i}",
            )(x)  # fmt: skip
        features = nn.silu(group_norm("norm_out")(x)).astype(self.dtype)
        # In float32, the dtype of its parameters: bfloat16 would round pixels to 1/4 of a level.
        return conv(c.out_channels, 3, None, "conv_out")(features), features


def last_convolution(params, features: Array) -> Array:
    """Images from `TokenizerOutput.features`, as a function of the tokenizer's parameters.

    The adaptive weight of adversarial training is a ratio of gradients of this layer's kernel.
    """
    params = params["decoder"]["conv_out"]
    return conv(params["bias"].size, 3, None, None).apply({"params": params}, features)


def _is_matmul(primitive, *_, **__) -> bool:
    """Rematerialisation policy: keep what convolutions and matmuls computed."""
    return primitive.name in ("conv_general_dilated", "dot_general")


REMAT_POLICIES = {"full": None, "dots": _is_matmul}


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
        block = ResnetBlock
        if self.remat != "none":
            block = nn.remat(ResnetBlock, policy=REMAT_POLICIES[self.remat])
        self.encoder = Encoder(c, block, self.dtype)
        self.decoder = Decoder(c, block, self.dtype)
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
        c, shape = self.config, images.shape
        if len(shape) != 4 or shape[3] != c.in_channels:
            raise ValueError(f"images have shape {shape}, expected [B, H, W, {c.in_channels}]")
        if shape[1] % c.downsample or shape[2] % c.downsample or 0 in shape:
            raise ValueError(
                f"images of {shape[1]}x{shape[2]} pixels cannot be cut into tokens of "
                f"{c.downsample}x{c.downsample}; resize or crop them to multiples of {c.downsample}"
            )
        return self._matched(self.quant_conv(self.encoder(on_batch(images))))

    def _matched(self, vectors: Array) -> Array:
        """Latents or codes in the form in which they are compared and decoded."""
        return l2_normalise(vectors) if self.config.l2_norm else vectors

    def _decode(self, z_q: Array) -> tuple[Array, Array]:
        recon, features = self.decoder(self.post_quant_conv(z_q))
        return on_batch(recon), features
