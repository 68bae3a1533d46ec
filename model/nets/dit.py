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
import numpy as np
from jax import Array, lax

from ...kernels_pallas.compat import vary
from ...kernels_pallas.matmul import matmul
from ..layers.conditioning import (
    ModulationHead,
    gated_add,
    modulated_layer_norm,
    timestep_features,
)
from ..layers.patches import Patch, patch_pixels, patchify, unpatchify
from ..layers.positions import sincos_positions
from ..mixers.bidirectional import Bidirectional
from ..mixers.full_attention import FullAttention
from ..partition import constrain
from . import mamba_lm

EPSILON = 1e-6  # of the layer norms
TIME_FEATURES = 256
MIXINGS = ("full", "factorised")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """DiT; the defaults are DiT-XL/2 for 256 x 256 images.

    Attributes:
        input_size: side of the (latent) image. in_channels: C.
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
        num_classes: K; class id K is the null class, for guidance.
        class_dropout: probability that a row trains on the null class; 0: there is no null class.
        learn_sigma: twice as many output channels: the second half for the variance.
        mixer: "attention", or the sum of both directions of "mamba2" or "mamba1".
        d_state, d_conv, .., chunk, use_bias, conv_bias: of Mamba mixers, as in `MambaConfig`.
        residual_in_fp32: keep the residual stream in float32 whatever the compute dtype.
    """

    input_size: int = 32
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


def make_mixer(config: DiTConfig, dtype=jnp.float32, **module):
    """The mixer of a config; `module` goes to the Flax module (name, parent).

    Raises:
        ValueError: an unknown kind of mixer, or of mixing.
    """
    if config.mixing not in MIXINGS[: 1 + (config.frames > 0)]:
        raise ValueError(
            f"mixing={config.mixing!r}; choose full or, for videos (frames > 0), factorised"
        )
    if config.mixer == "attention":
        return FullAttention(config.d_model, config.n_head, dtype, **module)
    if config.mixer not in ("mamba1", "mamba2"):
        raise ValueError(f"mixer={config.mixer!r}; choose attention, mamba2 or mamba1")
    return Bidirectional(mamba_lm.make_mixer(config, dtype, parent=None), **module)


def position_table(config: DiTConfig):
    """The net's position table [T, D] float64 (numpy): a constant, not a parameter."""
    side = config.patch_size / (config.base_patch or config.patch_size)
    time = config.patch_frames / (config.base_patch_frames or config.patch_frames)
    scale = (time, side, side) if config.frames else side
    return sincos_positions(config.d_model, config.grid, scale=scale)


class TimeEmbedder(nn.Module):
    """W2 silu(W1 features(t)) with biases, in at least float32."""

    features: int

    @nn.compact
    def __call__(self, t: Array) -> Array:
        """[B, features] of t [B]."""
        dense = lambda name: nn.Dense(
            self.features, kernel_init=nn.initializers.normal(0.02), name=name
        )
        h = timestep_features(t, TIME_FEATURES)
        self.sow("intermediates", "features", h)
        return dense("fc2")(nn.silu(dense("fc1")(h)))


class Mlp(nn.Module):
    """W2 gelu(W1 x) with biases; the GELU is the tanh form, in at least float32."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, d] in `dtype`."""
        init = nn.initializers.xavier_uniform()
        product, bias = _Projection(self.hidden, init, self.dtype, name="fc1")(x)
        product = constrain(product, "batch", "seq", "features")
        fc2 = nn.Dense(x.shape[-1], kernel_init=init, dtype=self.dtype, name="fc2")
        return fc2(_gelu(*vary((product, bias), (product, bias))))


class _Projection(nn.Module):
    """x W and b of an `nn.Dense`, whose sum is left to the caller."""

    features: int
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype)), bias


@jax.custom_vjp
def _gelu(x, bias):
    """gelu(x + bias) in x's dtype, in between at least float32; of all that only x is kept for the
    backward pass."""
    return nn.gelu(_widen(x) + bias, approximate=True).astype(x.dtype)


def _gelu_bwd(operands, dy):
    # The barrier keeps XLA from finding the tanh of the forward pass again, kept in float32.
    x, bias, dy = lax.optimization_barrier((*operands, dy))
    _, pull = jax.vjp(lambda a: nn.gelu(a, approximate=True), _widen(x) + bias)
    dx = pull(_widen(dy))[0].astype(x.dtype)
    # The sum is a reduction in x's dtype, as that of a dense layer's bias: XLA fuses it, whereas
    # for a wide one it would write the wide gradient.
    axes = tuple(range(x.ndim - 1))
    return dx, lax.reduce(dx, np.zeros((), dx.dtype), lax.add, axes).astype(bias.dtype)


_gelu.defvjp(lambda x, bias: (_gelu(x, bias), (x, bias)), _gelu_bwd)


def _widen(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Block(nn.Module):
    """r + gate1 mixer(norm(r) (1 + scale1) + shift1), then the same with an MLP (adaLN-Zero)."""

    config: DiTConfig
    dtype: jnp.dtype

    def setup(self):
        c = self.config
        self.modulation = ModulationHead(6)  # float32: few rows, and it scales all tokens
        name = "attn" if c.mixer == "attention" else "mixer"
        setattr(self, name, make_mixer(c, self.dtype))
        self.mlp = Mlp(c.d_intermediate, self.dtype)

    def conditioning(self, c: Array, _):
        """c [B, D] as it is, and the block's vectors [B, 6 D]. In scan form."""
        return c, constrain(self.modulation(c, flat=True), "batch", None)

    def __call__(self, r: Array, inputs):
        """New residual stream [B, T, D] (and None), from the block's vectors [B, 6 D], or with
        factorised mixing from them and the block's number. In scan form."""
        vectors, number = inputs if self.config.mixing == "factorised" else (inputs, None)
        # Each is said to follow the rows: left to itself XLA's partitioner takes rows of other
        # devices for some of them on meshes of data, fsdp and tensor (jax 0.10 to 0.12).
        by_row = lambda v: constrain(v[:, None], "batch", None, None)
        vectors = jnp.split(vectors, 6, axis=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = (by_row(v) for v in vectors)
        y = self._mix(modulated_layer_norm(r, shift1, scale1, EPSILON, self.dtype), number)
        self.sow("intermediates", "mixed", y)
        r = constrain(gated_add(r, gate1.astype(r.dtype), y), "batch", "seq", None)
        y = self.mlp(modulated_layer_norm(r, shift2, scale2, EPSILON, self.dtype))
        self.sow("intermediates", "mlp_out", y)
        r = constrain(gated_add(r, gate2.astype(r.dtype), y), "batch", "seq", None)
        self.sow("intermediates", "out", r)
        return r, None

    def _mix(self, h: Array, number: Array | None) -> Array:
        """The mixer's [B, T, D]; block `number` mixes within frames (even) or along time (odd)."""
        mixer_of = lambda block: block.attn if self.config.mixer == "attention" else block.mixer
        if number is None:
            return mixer_of(self)(h)[0]
        times = self.config.grid[0]
        h = h.reshape(h.shape[0], times, -1, h.shape[-1])

        def within(block, h):
            rows = h.reshape(-1, *h.shape[2:])
            return mixer_of(block)(rows)[0].reshape(h.shape)

        def along(block, h):
            return jnp.swapaxes(within(block, jnp.swapaxes(h, 1, 2)), 1, 2)

        # A branch, for the loop over blocks has one body; parameters of both are the same.
        y = nn.cond(number % 2 == 1, along, within, self, h)
        return y.reshape(y.shape[0], -1, y.shape[-1])


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
        block = Block
        if self.remat != "none":
            policy = mamba_lm.REMAT_POLICIES[self.remat]
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=0,
            length=c.n_layer,
            unroll=c.n_layer if self.unroll else 1,
            methods=["__call__", "conditioning"],
        )(c, self.dtype)
        self.x_embedder = nn.Dense(c.d_model, kernel_init=nn.initializers.xavier_uniform())
        self.t_embedder = TimeEmbedder(c.d_model)
        self.y_embedder = nn.Embed(
            c.num_classes + (c.class_dropout > 0), c.d_model,
            embedding_init=nn.initializers.normal(0.02),
        )  # fmt: skip
        self.final = Final(patch_pixels(c.patch) * c.out_channels)

    def __call__(
        self, x: Array, t: Array, labels: Array, *, drop: Array | None = None
    ) -> tuple[Array, dict]:
        """What the process asks for (noise, velocity, ..) at every pixel.

        Args:
            x: [B, input_size, input_size, C] noisy images, or [B, frames, ..] noisy videos.
            t: [B] int or float time, in the units the net is trained with.
            labels: [B] int32 class ids in 0..num_classes (the null class).
            drop: [B] bool: rows to take the null class, whatever their label. None: each row with
                probability class_dropout if an rng "dropout" is given, else none.

        Returns:
            [B, .., out_channels] float32, the other sizes as those of x, and {} (no auxiliary
            losses).

        Raises:
            ValueError: images of another shape, or `drop` for a net without a null class.
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
        condition = constrain(self.condition(t, labels, drop=drop), "batch", None)
        _, vectors = self.blocks.conditioning(condition, None)
        if c.mixing == "factorised":
            vectors = vectors, jnp.arange(c.n_layer)
        r, _ = self.blocks(r, vectors)
        tokens = constrain(self.final(r, condition), "batch", "seq", None)
        self.sow("intermediates", "tokens", tokens)
        out = unpatchify(tokens, c.patch, grid)
        return constrain(out, "batch", *(None,) * (out.ndim - 1)), {}

    def condition(self, t: Array, labels: Array, *, drop: Array | None = None) -> Array:
        """[B, D]: what time and class contribute; arguments as of the call."""
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
        return time + label
