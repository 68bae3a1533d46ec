"""Convolutional encoder and decoder of images (VQGAN, arXiv 2012.09841; latent diffusion, arXiv
2112.10752): levels of residual blocks, each level but the last halving the resolution.

The VQ tokenizer and the KL autoencoder differ in where attention is and in what lies between.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ...kernels_pallas.matmul import matmul
from ..partition import constrain
from .mlp import uniform_fan_in

GROUPS = 32  # of every group norm


def check_channels(config) -> None:
    """Whether there are levels, and group norms divide their channels.

    Args:
        config: has `ch` and `ch_mult`; see VQTokenizerConfig.

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


def check_images(images: Array, channels: int, downsample: int, what: str) -> None:
    """Whether images are [B, H, W, channels] with sides that are multiples of `downsample`.

    Args:
        what: an image is cut into, such as "tokens".

    Raises:
        ValueError: with the numbers.
    """
    shape = images.shape
    if len(shape) != 4 or shape[3] != channels:
        raise ValueError(f"images have shape {shape}, expected [B, H, W, {channels}]")
    if shape[1] % downsample or shape[2] % downsample or 0 in shape:
        raise ValueError(
            f"images of {shape[1]}x{shape[2]} pixels cannot be cut into {what} of "
            f"{downsample}x{downsample}; resize or crop them to multiples of {downsample}"
        )


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
    """Images [B, H, W, C] -> [B, h, w, features].

    Attributes:
        ch, ch_mult, num_res_blocks, dropout: see VQTokenizerConfig.
        features: channels that come out.
        attention: whether the residual blocks of the last level are followed by attention too, not
            only those in the middle.
        block: ResnetBlock, rematerialised or not; see `residual_block`.
        dtype: of convolutions and attention.
    """

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    features: int
    attention: bool
    block: type[nn.Module]
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        last = len(self.ch_mult) - 1
        x = conv(self.ch, 3, self.dtype, "conv_in")(x)
        for i, multiple in enumerate(self.ch_mult):
            x = Level(
                self.ch * multiple, self.num_res_blocks, attention=self.attention and i == last,
                resize="" if i == last else "downsample", block=self.block, dropout=self.dropout,
                dtype=self.dtype, name=f"conv_blocks_{i}",
            )(x)  # fmt: skip
        x = _middle(x, self.block, self.dropout, self.dtype)
        return conv(self.features, 3, self.dtype, "conv_out")(nn.silu(group_norm("norm_out")(x)))


class Decoder(nn.Module):
    """[B, h, w, C] -> images [B, H, W, features] in at least float32, and the input of the last
    convolution [B, H, W, ch]. conv_blocks_0 has the lowest resolution and one more residual block
    than the encoder's. Attributes as of `Encoder`.
    """

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    features: int
    attention: bool
    block: type[nn.Module]
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        last = len(self.ch_mult) - 1
        x = conv(self.ch * self.ch_mult[-1], 3, self.dtype, "conv_in")(x)
        x = _middle(x, self.block, self.dropout, self.dtype)
        for i, multiple in enumerate(reversed(self.ch_mult)):
            x = Level(
                self.ch * multiple, self.num_res_blocks + 1, attention=self.attention and i == 0,
                resize="" if i == last else "upsample", block=self.block, dropout=self.dropout,
                dtype=self.dtype, name=f"conv_blocks_{i}",
            )(x)  # fmt: skip
        features = nn.silu(group_norm("norm_out")(x)).astype(self.dtype)
        # In float32, the dtype of its parameters: bfloat16 would round pixels to 1/4 of a level.
        return conv(self.features, 3, None, "conv_out")(features), features


def _is_matmul(primitive, *_, **__) -> bool:
    """Rematerialisation policy: keep what convolutions and matmuls computed."""
    return primitive.name in ("conv_general_dilated", "dot_general")


REMAT_POLICIES = {"full": None, "dots": _is_matmul}


def residual_block(remat: str) -> type[nn.Module]:
    """ResnetBlock; its backward pass recomputes nothing ("none"), all ("full"), or all but
    convolutions ("dots").
    """
    return ResnetBlock if remat == "none" else nn.remat(ResnetBlock, policy=REMAT_POLICIES[remat])
