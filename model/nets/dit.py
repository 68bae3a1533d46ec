"""DiT: a transformer over the patches of a noisy image, by time and class (arXiv 2212.09748).

The same net serves diffusion (t counts steps, as the process was defined: 0..999) and flow matching
(SiT, arXiv 2401.08740: t in [0, 1], as it is). With `frames` it takes videos: patches have frames,
rows and columns, and nothing else changes (Latte, arXiv 2401.03048).
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ...kernels_pallas.matmul import matmul
from ..layers.conditioning import ModulationHead, TimeEmbedder, modulated_layer_norm
from ..layers.context import NULLS, ContextEmbedder
from ..layers.patches import Patch, patch_pixels, patchify, unpatchify
from ..partition import constrain
from . import mamba_lm
from .dit_block import (
    EPSILON,
    MIXINGS as MIXINGS,
    ROPES as ROPES,
    Block,
    make_mixer as make_mixer,
    position_table,
)

CONTEXTS = ("none", "cross", "joint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """DiT; the defaults are DiT-XL/2 for 256 x 256 images.

    Attributes:
        input_size: side of the (latent) image. in_channels: C.
        base_size: the input size over whose range positions are stretched, that of the images the
            weights were trained on: interpolation; 0 means input_size.
        patch_size: p, which divides input_size.
        base_patch: the patch in whose units positions count; 0 means patch_size.
        frames: F of a video; 0: the net takes images.
        patch_frames: frames of a patch of a video, which divide `frames`.
        base_patch_frames: as base_patch, along time; 0 means patch_frames.
        mixing: which tokens of a video the mixer of a block sees: "full": all of them;
            "factorised": in the first, third, .. block those of one frame, in the others those of
            one place at all times (Latte's variant 1).
        d_model: residual width D. n_layer: blocks. n_head: heads of the attention.
        mlp_ratio: hidden width of the MLP in units of D.
        num_classes: K; class id K is the null class, for guidance. 0, with a context: no classes,
            labels are not read.
        class_dropout: probability that a row trains on the null class, and on the null context; 0:
            there are none.
        learn_sigma: twice as many output channels: the second half for the variance.
        mixer: "attention"; "pom", gated means of polynomials (arXiv 2604.06129) with n_head gates;
            or the sum of both directions of "mamba2" or "mamba1".
        context: how features of a text enter the blocks. "none"; "cross": r + attention(r, context)
            after the mixer (PixArt, arXiv 2310.00426, section 2.3), zero at the start; "joint": the
            context is a second stream of tokens with weights of its own, mixed in one attention
            (MM-DiT, arXiv 2403.03206, section 4; takes mixer="attention").
        context_dim: width of the features. context_length: their tokens S.
        null_context: the context of dropped rows: "learned" features, or "zero".
        degree: of the polynomials of "pom". expand, ngroups, use_bias: of "pom" as well, see
            `PolynomialMixer`.
        rope: "2d" turns features and gates of "pom" by row and column: images only.
        d_state, d_conv, .., chunk, use_bias, conv_bias: of Mamba mixers, as in `MambaConfig`.
        residual_in_fp32: keep the residual stream in float32 whatever the compute dtype.
    """

    input_size: int = 32
    base_size: int = 0
    patch_size: int = 2
    base_patch: int = 0
    frames: int = 0
    patch_frames: int = 1
    base_patch_frames: int = 0
    mixing: str = "full"
    in_channels: int = 4
    d_model: int = 1152
    n_layer: int = 28
    n_head: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    class_dropout: float = 0.1
    learn_sigma: bool = True
    mixer: str = "attention"
    context: str = "none"
    context_dim: int = 0
    context_length: int = 0
    null_context: str = "learned"
    degree: int = 2
    rope: str = "none"
    d_state: int = 0
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0
    headdim: int = 64
    ngroups: int = 1
    d_ssm: int = 0
    rmsnorm: bool = True
    norm_before_gate: bool = False
    D_has_hdim: bool = False
    dt_limit: tuple[float, ...] = ()
    chunk: int = 128
    use_bias: bool = False
    conv_bias: bool = True
    residual_in_fp32: bool = True

    @property
    def out_channels(self) -> int:
        """Channels of the output: C, or 2 C with learn_sigma."""
        return (1 + self.learn_sigma) * self.in_channels

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an input without its batch axis: (H, W, C), or (F, H, W, C)."""
        time = (self.frames,) if self.frames else ()
        return (*time, self.input_size, self.input_size, self.in_channels)

    @property
    def patch(self) -> Patch:
        """patch_size p for images, (patch_frames, p, p) for videos."""
        p = self.patch_size
        return (self.patch_frames, p, p) if self.frames else p

    def with_patch(self, patch: Patch) -> DiTConfig:
        """The net of another patch, with positions counted as in this one.

        Raises:
            ValueError: it is no patch of a square image, or of a video with square frames.
        """
        new = {"base_patch": self.base_patch or self.patch_size}
        if not self.frames:
            if not isinstance(patch, int):
                raise ValueError(f"patch {patch}: that of an image is one number, its side")
            return dataclasses.replace(self, patch_size=patch, **new)
        if isinstance(patch, int) or len(patch) != 3 or patch[1] != patch[2]:
            raise ValueError(f"patch {patch}: that of a video is (frames, side, side)")
        new |= {"base_patch_frames": self.base_patch_frames or self.patch_frames}
        return dataclasses.replace(self, patch_frames=patch[0], patch_size=patch[1], **new)

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along every axis: (h, w), or (f, h, w).

        Raises:
            ValueError: patch_size does not divide input_size, or patch_frames frames.
        """
        if self.patch_size < 1 or self.input_size % self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size} does not divide input_size={self.input_size}"
            )
        if self.frames and (self.patch_frames < 1 or self.frames % self.patch_frames):
            raise ValueError(
                f"patch_frames={self.patch_frames} does not divide frames={self.frames}"
            )
        time = (self.frames // self.patch_frames,) if self.frames else ()
        return (*time, *(self.input_size // self.patch_size,) * 2)

    @property
    def tokens(self) -> int:
        """T, tokens of an image or a video."""
        return math.prod(self.grid)

    @property
    def d_intermediate(self) -> int:
        """Hidden width of the MLP."""
        return int(self.mlp_ratio * self.d_model)


def check_context(config: DiTConfig) -> None:
    """Raises ValueError unless the fields about the context fit together."""
    c = config
    if c.context not in CONTEXTS:
        raise ValueError(f"context={c.context!r}; choose one of {', '.join(CONTEXTS)}")
    if c.null_context not in NULLS:
        raise ValueError(f"null_context={c.null_context!r}; choose learned or zero")
    sizes = f"context_dim={c.context_dim} and context_length={c.context_length}"
    if c.context == "none":
        if c.context_dim or c.context_length:
            raise ValueError(f"{sizes} without a context; set context=cross or joint")
        if c.num_classes < 1:
            raise ValueError(f"num_classes={c.num_classes}; a net without a context needs classes")
    elif c.context_dim < 1 or c.context_length < 1:
        raise ValueError(f"context={c.context} with {sizes}; both must be at least 1")
    if c.context == "joint" and c.mixer != "attention":
        raise ValueError(f"context=joint takes mixer=attention, not {c.mixer}; or context=cross")
    if c.context == "joint" and c.mixing != "full":
        raise ValueError(f"context=joint takes mixing=full, not {c.mixing}; or context=cross")


class Final(nn.Module):
    """W (norm(r) (1 + scale) + shift) + b in at least float32; all of it starts at zero."""

    features: int

    @nn.compact
    def __call__(self, r: Array, c: Array) -> Array:
        """[B, T, features] from the residual stream [B, T, D] and the condition [B, D]."""
        vectors = jnp.split(ModulationHead(2, name="modulation")(c, flat=True), 2, axis=-1)
        shift, scale = (constrain(v[:, None], "batch", None, None) for v in vectors)
        wide = jnp.promote_types(r.dtype, jnp.float32)
        h = modulated_layer_norm(r, shift, scale, EPSILON, wide)
        zeros = nn.initializers.zeros
        kernel = self.param("kernel", zeros, (r.shape[-1], self.features))
        return matmul("btd,dk->btk", h, kernel) + self.param("bias", zeros, (self.features,))


class DiT(nn.Module):
    """Prediction for a noisy image; parameters of all blocks are stacked on axis 0.

    The collection "intermediates", if asked for, holds what the blocks make.

    Attributes:
        config: sizes and switches.
        dtype: of the blocks' matmuls. Embeddings, modulation, statistics of the norms and the last
            layer are float32.
        remat: "none", "full" or "dots": what the backward pass recomputes per block.
        unroll: compile every block on its own instead of one in a loop: faster, and slower to
            compile.
    """

    config: DiTConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unroll: bool = False

    def setup(self):
        c = self.config
        check_context(c)
        block = Block
        if self.remat != "none":
            policy = mamba_lm.REMAT_POLICIES[self.remat]
            block = nn.remat(Block, prevent_cse=False, policy=policy, methods=["__call__", "alone"])
        loop = {
            "variable_axes": {"params": 0, "intermediates": 0},
            "split_rngs": {"params": True},
            "length": c.n_layer,
            "unroll": c.n_layer if self.unroll else 1,
        }
        shared = (0, 0, nn.broadcast, nn.broadcast)
        loops = {"__call__": shared, "conditioning": shared, "alone": (0, *shared)}
        methods = {name: {**loop, "in_axes": axes} for name, axes in loops.items()}
        self.blocks = nn.scan(block, methods=methods)(c, self.dtype)
        self.x_embedder = nn.Dense(c.d_model, kernel_init=nn.initializers.xavier_uniform())
        self.t_embedder = TimeEmbedder(c.d_model)
        if c.num_classes:
            self.y_embedder = nn.Embed(
                c.num_classes + (c.class_dropout > 0), c.d_model,
                embedding_init=nn.initializers.normal(0.02),
            )  # fmt: skip
        if c.context != "none":
            self.context_embedder = ContextEmbedder(
                c.d_model, c.context_length, c.context_dim,
                c.null_context if c.class_dropout else "", self.dtype,
            )  # fmt: skip
        self.final = Final(patch_pixels(c.patch) * c.out_channels)

    def __call__(
        self,
        x: Array,
        t: Array,
        labels: Array,
        *,
        drop: Array | None = None,
        context: Array | None = None,
        context_mask: Array | None = None,
    ) -> tuple[Array, dict]:
        """What the process asks for (noise, velocity, ..) at every pixel.

        Args:
            x: [B, input_size, input_size, C] noisy images, or [B, frames, ..] noisy videos.
            t: [B] int or float time, in the units the net is trained with.
            labels: [B] int32 class ids in 0..num_classes (the null class).
            drop: [B] bool: rows to take the null class, whatever their label, and the null context.
                None: each row with probability class_dropout if an rng "dropout" is given, else
                none.
            context: [B, S, context_dim] features of a text, for nets that read one. None: the null
                context for all rows.
            context_mask: [B, S] tokens that belong to the text, at least one per row; None: all.

        Returns:
            [B, .., out_channels] float32, the other sizes as those of x, and {} (no auxiliary
            losses).

        Raises:
            ValueError: images or context of another shape, a context for a net that reads none, or
                `drop` (or no context) for a net without a null class (or null context).
        """
        c, grid = self.config, self.config.grid
        if x.shape[1:] != c.shape:
            frames = f"frames={c.frames}, " if c.frames else ""
            raise ValueError(
                f"{'videos' if c.frames else 'images'} of shape {x.shape[1:]}; the net has "
                f"{frames}input_size={c.input_size} and in_channels={c.in_channels}"
            )
        patches = patchify(x.astype(jnp.promote_types(x.dtype, jnp.float32)), c.patch)
        r = self.x_embedder(patches)
        self.sow("intermediates", "patches", r)
        r = r + jnp.asarray(position_table(c), r.dtype)
        r = r.astype(r.dtype if c.residual_in_fp32 else self.dtype)
        r = constrain(r, "batch", "seq", None)
        self.sow("intermediates", "embedded", r)
        condition, vectors, context, context_mask = self._told(
            t, labels, drop, context, context_mask
        )
        numbers = jnp.arange(c.n_layer)
        if c.context == "joint":
            streams = r, context.astype(r.dtype)
            (r, _), _ = self.blocks(streams, vectors, numbers, None, context_mask)
        else:
            r, _ = self.blocks(r, vectors, numbers, context, context_mask)
        tokens = constrain(self.final(r, condition), "batch", "seq", None)
        self.sow("intermediates", "tokens", tokens)
        out = unpatchify(tokens, c.patch, grid)
        return constrain(out, "batch", *(None,) * (out.ndim - 1)), {}

    def each_block(
        self,
        inputs: Array,
        t: Array,
        labels: Array,
        *,
        drop: Array | None = None,
        context: Array | None = None,
        context_mask: Array | None = None,
    ) -> Array:
        """Every block's output [n_layer, B, T, D] from an input of its own.

        Args:
            inputs: [n_layer, B, T, D] residual streams. The others are as of the call.

        Raises:
            ValueError: as of the call; a joint context, whose blocks have two streams.
        """
        c = self.config
        if c.context == "joint":
            raise ValueError("context=joint: blocks of two streams have no input of their own")
        _, vectors, context, context_mask = self._told(t, labels, drop, context, context_mask)
        numbers = jnp.arange(c.n_layer)
        return self.blocks.alone(None, inputs, vectors, numbers, context, context_mask)[1]

    def _told(self, t, labels, drop, context, context_mask):
        """What blocks are told: the condition [B, D], their vectors, context and its mask."""
        if drop is None:
            drop = self._draw_drop(t.shape)
        condition = constrain(self.condition(t, labels, drop=drop), "batch", None)
        if self.config.context != "none":
            context, context_mask = self.context_embedder(context, context_mask, drop, len(t))
        elif context is not None or context_mask is not None:
            raise ValueError("context=none: the net reads no context")
        _, vectors = self.blocks.conditioning(condition, None, None, None, None)
        return condition, vectors, context, context_mask

    def condition(self, t: Array, labels: Array, *, drop: Array | None = None) -> Array:
        """[B, D]: what time and class contribute; arguments as of the call."""
        c = self.config
        if drop is not None and not c.class_dropout:
            raise ValueError("class_dropout=0: the net has no null class to drop labels to")
        time = self.t_embedder(t)
        self.sow("intermediates", "time", time)
        if not c.num_classes:
            return time
        drop = self._draw_drop(labels.shape) if drop is None else drop
        if drop is not None:
            labels = jnp.where(drop, c.num_classes, labels)
        label = self.y_embedder(labels)
        self.sow("intermediates", "label", label)
        return time + label

    def _draw_drop(self, shape: tuple[int, ...]) -> Array | None:
        """Rows that an rng "dropout" drops; None without one, or where there is nothing to drop
        to."""
        rate = self.config.class_dropout
        if not rate or not self.has_rng("dropout"):
            return None
        return jax.random.bernoulli(self.make_rng("dropout"), rate, shape)
