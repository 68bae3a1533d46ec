"""CLIP: a text and an image transformer into one space (arXiv 2103.00020, section 2.4).

Both towers are pre-norm transformers. The text's is causal; what stands at the end-of-text token is
the whole text. The image's reads patches and a class token; what stands at that is the image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..layers.parted_dense import PartedDense
from ..partition import constrain

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels in [0, 1], by channel
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
LEGACY_EOS = 2  # what older published configs say instead of the true id


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), the GELU of the first CLIP weights."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """What both towers have.

    Attributes:
        d_model: width D. n_layer: layers. n_head: heads of D / n_head channels.
        d_ff: hidden width of the MLPs.
        act: "quick_gelu" or "gelu" (the exact one).
        epsilon: of the layer norms.
    """

    d_model: int
    n_layer: int
    n_head: int
    d_ff: int
    act: str = "quick_gelu"
    epsilon: float = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTextConfig(TowerConfig):
    """The text tower; the defaults are those of ViT-L/14.

    Attributes:
        vocab_size: token ids. length: positions, the longest text.
        eos: id of the end-of-text token, where the text is pooled. 2 means, as in the older
            published configs, the largest id of each row, which the end-of-text token has there.
    """

    d_model: int = 768
    n_layer: int = 12
    n_head: int = 12
    d_ff: int = 3072
    vocab_size: int = 49408
    length: int = 77
    eos: int = 49407


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipVisionConfig(TowerConfig):
    """The image tower; the defaults are those of ViT-L/14.

    Attributes:
        image_size: side of the square images. patch_size: side of a patch, which divides it.
    """

    d_model: int = 1024
    n_layer: int = 24
    n_head: int = 16
    d_ff: int = 4096
    image_size: int = 224
    patch_size: int = 14

    @property
    def tokens(self) -> int:
        """Patches and the class token.

        Raises:
            ValueError: patch_size does not divide image_size.
        """
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size} does not divide image_size={self.image_size}"
            )
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Both towers, or one.

    Attributes:
        text, vision: None: there is no such tower.
        projection: width of the common space; 0: no projections, pooled states are as they are.
    """

    text: ClipTextConfig | None = ClipTextConfig()
    vision: ClipVisionConfig | None = ClipVisionConfig()
    projection: int = 768


class TextFeatures(NamedTuple):
    """Of texts: states [B, T, D] after the last norm, and pooled [B, projection or D], float32."""

    states: Array
    pooled: Array


def end_of_text(ids: Array, eos: int) -> Array:
    """[B] positions at which texts are pooled: the first `eos` of each row, or the first of its
    largest id for eos=2. A row without any is pooled at 0.
    """
    return jnp.argmax(ids if eos == LEGACY_EOS else ids == eos, axis=-1)


def normalise_pixels(images: Array) -> Array:
    """Images [.., 3] in [-1, 1] as the image tower was trained on them: mean 0 and deviation 1 over
    its data.
    """
    mean, std = (np.asarray(a, np.float32) for a in (PIXEL_MEAN, PIXEL_STD))
    return ((images.astype(jnp.float32) + 1) / 2 - mean) / std


class _Layer(nn.Module):
    """r + attention(norm(r)), then the same with an MLP. In scan form."""

    config: TowerConfig
    causal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, r: Array, _):
        c = self.config
        dense = lambda n, name: nn.Dense(n, dtype=self.dtype, kernel_init=_NORMAL, name=name)
        batch, length, width = r.shape
        h = _norm(c, "norm1")(r)
        qkv = PartedDense((width,) * 3, True, _NORMAL, self.dtype, name="qkv")(h)
        heads = (batch, length, c.n_head, width // c.n_head)
        q, k, v = (constrain(a.reshape(heads), "batch", "seq", "heads", None) for a in qkv)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)  # float32 softmax
        y = dense(width, "proj")(y.reshape(r.shape))
        r = constrain(r + y.astype(r.dtype), "batch", "seq", None)
        h = dense(c.d_ff, "fc1")(_norm(c, "norm2")(r))
        h = ACTIVATIONS[c.act](h.astype(jnp.float32))
        y = dense(width, "fc2")(h)
        return constrain(r + y.astype(r.dtype), "batch", "seq", None), None


_NORMAL = nn.initializers.normal(0.02)


def _norm(config: TowerConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.epsilon, use_fast_variance=False, name=name)


def _layers(config: TowerConfig, causal: bool, dtype) -> nn.Module:
    """The stack of layers; parameters on axis 0.

    Raises:
        ValueError: n_head does not divide the width, or an unknown activation.
    """
    if config.d_model % config.n_head:
        raise ValueError(f"n_head={config.n_head} does not divide d_model={config.d_model}")
    if config.act not in ACTIVATIONS:
        raise ValueError(f"act={config.act!r}; choose one of {', '.join(ACTIVATIONS)}")
    stack = nn.scan(
        _Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=config.n_layer
    )
    return stack(config, causal, dtype, name="layers")


class ClipText(nn.Module):
    """The text tower.

    Attributes:
        config: sizes. projection: see ClipConfig.
        dtype: of the matmuls; norms, softmax, activations and the residual stream are float32.
    """

    config: ClipTextConfig
    projection: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Array) -> TextFeatures:
        """Features of token ids [B, T] int32, T at most `length`. No token depends on those after
        it, so padding on the right reaches nothing that stands before it.

        Raises:
            ValueError: more tokens than positions.
        """
        c = self.config
        if ids.shape[-1] > c.length:
            raise ValueError(f"texts of {ids.shape[-1]} tokens; the net has length={c.length}")
        positions = self.param("positions", _NORMAL, (c.length, c.d_model))
        r = nn.Embed(c.vocab_size, c.d_model, embedding_init=_NORMAL, name="tokens")(ids)
        r = constrain(r + positions[: ids.shape[-1]], "batch", "seq", None)
        r, _ = _layers(c, True, self.dtype)(r, None)
        states = _norm(c, "final_norm")(r)
        at = end_of_text(ids, c.eos)[:, None, None]
        pooled = jnp.take_along_axis(states, at, axis=1)[:, 0]
        return TextFeatures(states, _project(pooled, self.projection))


class ClipVision(nn.Module):
    """The image tower; attributes as of ClipText."""

    config: ClipVisionConfig
    projection: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """[B, projection or D] float32 of images [B, image_size, image_size, 3] in [-1, 1].

        Raises:
            ValueError: images of another shape.
        """
        c = self.config
        side, patch = c.image_size, (c.patch_size,) * 2
        if images.shape[1:] != (side, side, 3):
            raise ValueError(f"images of shape {images.shape[1:]}; the net takes {side}x{side}x3")
        x = nn.Conv(
            c.d_model, patch, patch, "VALID", use_bias=False, dtype=self.dtype,
            kernel_init=_NORMAL, name="patches",
        )(normalise_pixels(images))  # fmt: skip
        x = x.reshape(x.shape[0], -1, c.d_model).astype(jnp.float32)
        first = self.param("class_token", _NORMAL, (c.d_model,))
        first = jnp.broadcast_to(first, (x.shape[0], 1, c.d_model))
        r = jnp.concatenate([first, x], axis=1)
        r = r + self.param("positions", _NORMAL, (c.tokens, c.d_model))
        r = constrain(_norm(c, "first_norm")(r), "batch", "seq", None)
        r, _ = _layers(c, False, self.dtype)(r, None)
        return _project(_norm(c, "final_norm")(r[:, 0]), self.projection)


def _project(pooled: Array, width: int) -> Array:
    """Into the common space, in float32: a row per text or image costs nothing."""
    if not width:
        return pooled
    return nn.Dense(width, use_bias=False, kernel_init=_NORMAL, name="projection")(pooled)


class Clip(nn.Module):
    """Both towers, or one; `init` and the call need both.

    Attributes:
        config: sizes.
        dtype: of the towers' matmuls.
    """

    config: ClipConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        if c.text:
            self.text = ClipText(c.text, c.projection, self.dtype)
        if c.vision:
            self.vision = ClipVision(c.vision, c.projection, self.dtype)
        if c.text and c.vision:
            self.logit_scale = self.param(
                "logit_scale", nn.initializers.constant(np.log(1 / 0.07)), ()
            )

    def __call__(self, ids: Array, images: Array) -> Array:
        """exp(logit_scale) cos(image, text) of every image and text, [images, texts] float32."""
        text, image = unit(self.encode_text(ids).pooled), unit(self.encode_image(images))
        return jnp.exp(self.logit_scale) * image @ text.T

    def encode_text(self, ids: Array) -> TextFeatures:
        """See `ClipText`."""
        return self.text(ids)

    def encode_image(self, images: Array) -> Array:
        """See `ClipVision`."""
        return self.vision(images)

    def encode(self, ids: Array | None, images: Array | None):
        """(features of texts or None, of images or None): what the towers that are there give."""
        text = None if ids is None else self.encode_text(ids)
        return text, None if images is None else self.encode_image(images)


def unit(x: Array) -> Array:
    """x / |x| over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
