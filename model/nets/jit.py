"""JiT: a transformer that predicts clean images from noisy pixels (arXiv 2511.13720), with the
polynomial mixer in two-dimensional RoPE in place of attention (arXiv 2604.06129).

    config = jit_config("B", input_size=256, patch_size=16)

The process is flow matching that learns the data (`jit_process`); t in [0, 1] is given to the net
as it is, and 1 is the clean image.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ...kernels_pallas.matmul import matmul
from ..layers.conditioning import ModulatedRMSNorm, ModulationHead, gated_add
from ..layers.patches import SquareImages, patchify, unpatchify
from ..layers.positions import sincos_positions
from ..layers.swiglu import SwiGLU
from ..mixers.pom import PolynomialMixer
from ..partition import constrain
from ..processes.flow import FlowMatching
from . import mamba_lm
from .dit import EPSILON, TimeEmbedder

# Published sizes: blocks, width, heads, width of the patches' bottleneck, first block with context.
SIZES = {"B": (12, 768, 12, 128, 4), "L": (24, 1024, 16, 128, 8), "H": (32, 1280, 16, 256, 10)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JiTConfig(SquareImages):
    """JiT; the defaults are JiT-B/16 for 256 x 256 images.

    Attributes:
        input_size: side of the image. in_channels: C.
        patch_size: p, which divides input_size.
        bottleneck: width through which the pixels of a patch enter.
        d_model: residual width D. n_layer: blocks. n_head: heads of the mixer's gate, with which it
            turns by position: divisible by 4, or at most 1 for a gate of every channel.
        degree, expand, groups: of the mixer, see `PolynomialMixer`.
        rope_base: of its rotation.
        mlp_ratio: the hidden width of the gated MLP is int(2/3 int(mlp_ratio D)).
        num_classes: K; class id K is the null class, for guidance.
        class_dropout: probability that a row trains on the null class; 0: there is none.
        context_tokens: tokens that tell the class, each its embedding and a learned place, before
            the others; 0: none.
        context_start: the block, counted from 0, from which on they are there.
    """

    input_size: int = 256
    patch_size: int = 16
    in_channels: int = 3
    bottleneck: int = 128
    d_model: int = 768
    n_layer: int = 12
    n_head: int = 12
    degree: int = 3
    expand: int = 1
    groups: int = 1
    rope_base: float = 10000.0
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    class_dropout: float = 0.1
    context_tokens: int = 32
    context_start: int = 4

    @property
    def d_intermediate(self) -> int:
        """Hidden width of the gated MLP."""
        return int(int(self.d_model * self.mlp_ratio) * 2 / 3)

    @property
    def plain_blocks(self) -> int:
        """Blocks without context tokens."""
        return self.context_start if self.context_tokens else self.n_layer


def jit_config(size: str, *, input_size: int = 256, patch_size: int = 16, **changes) -> JiTConfig:
    """The published net of a size, "B", "L" or "H"; other fields by name.

    Raises:
        ValueError: no such size.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r}; choose one of {', '.join(SIZES)}")
    depth, width, heads, bottleneck, start = SIZES[size]
    fields = {
        "n_layer": depth, "d_model": width, "n_head": heads, "bottleneck": bottleneck,
        "context_start": start,
    }  # fmt: skip
    return JiTConfig(input_size=input_size, patch_size=patch_size, **(fields | changes))


def jit_process(input_size: int = 256) -> FlowMatching:
    """The process JiT is trained with: the data are learned by their velocity's error, at times
    sigmoid(-0.8 + 0.8 n), with noise that grows with images of more than 256 pixels (2 at 512;
    arXiv 2511.13720, section 4)."""
    return FlowMatching(
        predict="data", times="logit_normal", time_mean=-0.8, time_std=0.8,
        noise_scale=max(1.0, input_size / 256),
    )  # fmt: skip


def check_jit(config: JiTConfig) -> None:
    """Raises ValueError unless the fields fit together."""
    c = config
    _ = c.grid
    if c.context_tokens < 0 or not 0 <= c.context_start <= c.n_layer:
        raise ValueError(
            f"context_tokens={c.context_tokens} from block context_start={c.context_start} on, "
            f"but the blocks are 0..{c.n_layer - 1}"
        )
    if c.context_tokens and c.context_start == c.n_layer:
        raise ValueError(
            f"context_start={c.context_start} is behind the last block; set context_tokens=0"
        )
    if c.num_classes < 1:
        raise ValueError(f"num_classes={c.num_classes}; the net needs classes")
    make_mixer(c, parent=None).sizes()


def make_mixer(config: JiTConfig, dtype=jnp.float32, **module) -> PolynomialMixer:
    """The mixer of a block; `module` goes to the Flax module (name, parent)."""
    return PolynomialMixer(
        config.d_model, degree=config.degree, expand=config.expand, heads=config.n_head,
        groups=config.groups, rope="2d", rope_base=config.rope_base,
        kernel_init=nn.initializers.xavier_uniform(), dtype=dtype, **module,
    )  # fmt: skip


def token_positions(config: JiTConfig, context: bool) -> np.ndarray:
    """[T, 2] rows and columns of the patches; with `context` those of the context tokens before
    them, all (0, 0)."""
    h, w = config.grid
    at = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), axis=-1).reshape(-1, 2)
    return np.concatenate([np.zeros((config.context_tokens, 2), at.dtype), at]) if context else at


class Block(nn.Module):
    """r + gate1 mixer(norm(r) (1 + scale1) + shift1), then the same with a gated MLP; RMS norms
    with gains."""

    config: JiTConfig
    dtype: jnp.dtype

    def setup(self):
        c = self.config
        self.modulation = ModulationHead(6)  # float32: few rows, and it scales all tokens
        self.norm1 = ModulatedRMSNorm(EPSILON, self.dtype)
        self.norm2 = ModulatedRMSNorm(EPSILON, self.dtype)
        self.mixer = make_mixer(c, self.dtype)
        self.mlp = SwiGLU(c.d_intermediate, self.dtype)

    def conditioning(self, c: Array, *_):
        """c [B, D] as it is, and the block's vectors [B, 6 D]. In scan form."""
        return c, constrain(self.modulation(c, flat=True), "batch", None)

    def __call__(self, r: Array, vectors: Array, positions: Array):
        """New residual stream [B, T, D] (and None), from what `conditioning` gives and positions
        [T, 2]. In scan form."""
        # Each is said to follow the rows: see model/nets/dit.py.
        by_row = lambda v: constrain(v[:, None], "batch", None, None)
        vectors = [by_row(v) for v in jnp.split(vectors, 6, axis=-1)]
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        h = self.norm1(r, shift1, scale1)
        self.sow("intermediates", "mixer_in", h)
        y, _ = self.mixer(h, positions=positions)
        self.sow("intermediates", "mixed", y)
        r = constrain(gated_add(r, gate1.astype(r.dtype), y), "batch", "seq", None)
        self.sow("intermediates", "after_mixer", r)
        y = self.mlp(self.norm2(r, shift2, scale2))
        r = constrain(gated_add(r, gate2.astype(r.dtype), y), "batch", "seq", None)
        self.sow("intermediates", "out", r)
        return r, None


class PatchEmbedder(nn.Module):
    """W2 W1 x + b of the pixels x of a patch, through few channels."""

    bottleneck: int
    features: int

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        init = nn.initializers.xavier_uniform()
        h = nn.Dense(self.bottleneck, use_bias=False, kernel_init=init, name="reduce")(patches)
        return nn.Dense(self.features, kernel_init=init, name="expand")(h)


class Final(nn.Module):
    """W (norm(r) (1 + scale) + shift) + b in at least float32; modulation, W and b start at 0."""

    features: int

    @nn.compact
    def __call__(self, r: Array, c: Array) -> Array:
        """[B, T, features] from the residual stream [B, T, D] and the condition [B, D]."""
        vectors = jnp.split(ModulationHead(2, name="modulation")(c, flat=True), 2, axis=-1)
        shift, scale = (constrain(v[:, None], "batch", None, None) for v in vectors)
        wide = jnp.promote_types(r.dtype, jnp.float32)
        h = ModulatedRMSNorm(EPSILON, wide, name="norm")(r, shift, scale)
        zeros = nn.initializers.zeros
        kernel = self.param("kernel", zeros, (r.shape[-1], self.features))
        return matmul("btd,dk->btk", h, kernel) + self.param("bias", zeros, (self.features,))


class JiT(nn.Module):
    """The clean image that a noisy one is taken for; parameters of blocks are stacked on axis 0:
    "blocks" those without context tokens, "context_blocks" the others.

    The collection "intermediates", if asked for, holds what the blocks make.

    Attributes:
        config: sizes and switches.
        dtype: of the blocks' matmuls. Embeddings, modulation, norms, polynomials, residual stream
            and last layer are float32.
        remat: "none", "full" or "dots": what the backward pass recomputes per block.
        unroll: compile every block on its own instead of one in a loop: faster, and slower to
            compile.
    """

    config: JiTConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unroll: bool = False

    def setup(self):
        c = self.config
        check_jit(c)
        if c.plain_blocks:
            self.blocks = self._stack(c.plain_blocks)
        if c.n_layer > c.plain_blocks:
            self.context_blocks = self._stack(c.n_layer - c.plain_blocks)
            self.context_positions = self.param(
                "context_positions", nn.initializers.normal(0.02), (c.context_tokens, c.d_model)
            )
        self.x_embedder = PatchEmbedder(c.bottleneck, c.d_model)
        self.t_embedder = TimeEmbedder(c.d_model)
        self.y_embedder = nn.Embed(
            c.num_classes + (c.class_dropout > 0), c.d_model,
            embedding_init=nn.initializers.normal(0.02),
        )  # fmt: skip
        self.final = Final(c.patch_size**2 * c.out_channels)

    def _stack(self, length: int):
        block = Block
        if self.remat != "none":
            policy = mamba_lm.REMAT_POLICIES[self.remat]
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        return nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=length,
            unroll=length if self.unroll else 1,
            methods=["__call__", "conditioning"],
        )(self.config, self.dtype)

    def __call__(
        self, x: Array, t: Array, labels: Array, *, drop: Array | None = None
    ) -> tuple[Array, dict]:
        """The clean image.

        Args:
            x: [B, input_size, input_size, C] noisy images.
            t: [B] time in [0, 1], 1 is clean.
            labels: [B] int32 class ids in 0..num_classes (the null class).
            drop: [B] bool: rows to take the null class, whatever their label. None: each row with
                probability class_dropout if an rng "dropout" is given, else none.

        Returns:
            [B, input_size, input_size, C] float32, and {} (no auxiliary losses).

        Raises:
            ValueError: images of another shape, or `drop` for a net without a null class.
        """
        c = self.config
        if x.shape[1:] != c.shape:
            raise ValueError(
                f"images of shape {x.shape[1:]}; the net has input_size={c.input_size} and "
                f"in_channels={c.in_channels}"
            )
        r = self.x_embedder(
            patchify(x.astype(jnp.promote_types(x.dtype, jnp.float32)), c.patch_size)
        )
        self.sow("intermediates", "patches", r)
        r = r + jnp.asarray(sincos_positions(c.d_model, c.grid), r.dtype)
        r = constrain(r, "batch", "seq", None)
        time, label = self.condition(t, labels, drop=drop)
        condition, label = (constrain(v, "batch", None) for v in (time + label, label))
        if c.plain_blocks:
            r = self._run(self.blocks, r, condition, token_positions(c, False))
        if c.n_layer > c.plain_blocks:
            first = label[:, None] + self.context_positions
            r = constrain(jnp.concatenate([first.astype(r.dtype), r], axis=1), "batch", "seq", None)
            r = self._run(self.context_blocks, r, condition, token_positions(c, True))
            r = r[:, c.context_tokens :]
        tokens = constrain(self.final(r, condition), "batch", "seq", None)
        out = unpatchify(tokens, c.patch_size, c.grid)
        return constrain(out, "batch", None, None, None), {}

    def _run(self, blocks, r: Array, condition: Array, positions: np.ndarray) -> Array:
        _, vectors = blocks.conditioning(condition, None, None)
        return blocks(r, vectors, jnp.asarray(positions))[0]

    def condition(
        self, t: Array, labels: Array, *, drop: Array | None = None
    ) -> tuple[Array, Array]:
        """What time [B, D] and class [B, D] contribute; arguments as of the call."""
        c = self.config
        if drop is not None and not c.class_dropout:
            raise ValueError("class_dropout=0: the net has no null class to drop labels to")
        if drop is None and c.class_dropout and self.has_rng("dropout"):
            drop = jax.random.bernoulli(self.make_rng("dropout"), c.class_dropout, labels.shape)
        if drop is not None:
            labels = jnp.where(drop, c.num_classes, labels)
        time, label = self.t_embedder(t), self.y_embedder(labels)
        self.sow("intermediates", "time", time)
        self.sow("intermediates", "label", label)
        return time, label
