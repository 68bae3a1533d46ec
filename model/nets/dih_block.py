"""Block, time embedding and last layer of PoM's diffusion models (arXiv 2411.12663)."""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ...kernels_pallas.matmul import matmul
from ..layers.conditioning import gated_add, modulated_layer_norm
from ..layers.mlp import GeluMLP
from ..mixers.full_attention import FullAttention
from ..mixers.hom import HigherOrderMixer
from ..partition import constrain
from .mamba_lm import REMAT_POLICIES

EPSILON = 1e-6  # of the layer norms


class BlockConfig(Protocol):
    """What a block wants to know of a net's config."""

    d_model: int
    d_intermediate: int
    mixer: str
    degree: int
    expand: int
    n_head: int


def time_frequencies(width: int, timesteps: int) -> np.ndarray:
    """T^(-2 i / d), i = 0 .. d/2 - 1, of times 0..T: float64."""
    return float(timesteps) ** (-np.arange(0, width, 2, dtype=np.float64) / width)


class DiHTimeEmbedder(nn.Module):
    """W2 silu(W1 [cos(t f), sin(t f)]) with biases, hidden width 4 d, in at least float32.

    The collection "constants", if given, has the frequencies f [d/2] to take, e.g. those of a
    published file: a rounding of them is 3e-5 in the angles of t = 1000.

    Attributes:
        features: d, which is also the number of features of t.
        timesteps: T of `time_frequencies`.
    """

    features: int
    timesteps: int

    @nn.compact
    def __call__(self, t: Array) -> Array:
        """[B, d] of t [B] in 0..timesteps."""
        dense = lambda n, name: nn.Dense(n, kernel_init=nn.initializers.normal(0.02), name=name)
        frequencies = time_frequencies(self.features, self.timesteps)
        if self.has_variable("constants", "frequencies"):
            frequencies = self.get_variable("constants", "frequencies")
        t = t.astype(jnp.promote_types(t.dtype, jnp.float32))
        angles = t[:, None] * jnp.asarray(frequencies, t.dtype)
        h = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        self.sow("intermediates", "features", h)
        return dense(self.features, "fc2")(nn.silu(dense(4 * self.features, "fc1")(h)))


def _vectors(head: nn.Dense, c: Array, count: int) -> list[Array]:
    """`count` vectors of a condition [B, D], as [B, 1, D], or of one per token, [B, T, D]."""
    v = head(nn.silu(c))
    # each is said to follow the rows, see Block of model/nets/dit.py
    parts = jnp.split(v, count, axis=-1)
    if c.ndim == 2:
        return [constrain(part[:, None], "batch", None, None) for part in parts]
    return [constrain(part, "batch", "seq", None) for part in parts]


def _head(c: Array, rows: int, dtype, bias: float, name: str) -> nn.Dense:
    """W, of zeros, and b of a head of modulation: float32 for one condition per image, `dtype` for
    one per token, where it takes 1/3 of the block's time."""
    dtype = jnp.float32 if c.ndim == 2 else dtype
    return nn.Dense(
        rows * c.shape[-1], kernel_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(bias), dtype=dtype, name=name,
    )  # fmt: skip


class DiHBlock(nn.Module):
    """r + gate1 mixer(norm(r) (1 + scale1) + shift1), then the same with an MLP.

    Scales come before shifts. Gates are 1 + g with g = -1 at the start; those of the attention, the
    DiT this family is compared with, are g = 0. Both start as the identity.

    Attributes:
        config: sizes and the kind of mixer.
        dtype: of the matmuls.
        frame_tokens: tokens of a frame for block-causal mixing; 0: every token sees all.
        cross: the tokens read a context first, by a mixer of their own.
        clamp: bound of the residual stream after the block; 0: none.
    """

    config: BlockConfig
    dtype: jnp.dtype
    frame_tokens: int = 0
    cross: bool = False
    clamp: float = 0.0

    @nn.compact
    def __call__(
        self,
        r: Array,
        state: Any = None,
        c: Array | None = None,
        context: Array | None = None,
        context_mask: Array | None = None,
    ) -> tuple[Array, Any]:
        """New residual stream [B, T, D] and state. In scan form.

        Args:
            r: [B, T, D]. c: [B, D] condition, or [B, T, D], one per token.
            state: of a stream's earlier frames; r are then the tokens of the next frame.
            context: [B, S, D]; context_mask as of `HigherOrderMixer`.
        """
        k, hom = self.config, self.config.mixer == "hom"
        parts = 2 + self.cross
        cond = _head(c, 2 * parts + 2 * self.cross, self.dtype, 0.0, "modulation")
        gate = _head(c, parts, self.dtype, -1.0 if hom else 0.0, "gates")
        v = _vectors(cond, c, 2 * parts + 2 * self.cross)
        gates = [g + 1 if hom else g for g in _vectors(gate, c, parts)]
        norm = lambda r, scale, shift: modulated_layer_norm(r, shift, scale, EPSILON, self.dtype)
        add = lambda r, g, y: constrain(
            gated_add(r, g.astype(r.dtype), y), "batch", "seq", None
        )  # fmt: skip
        mixer = lambda name: HigherOrderMixer(
            k.d_model, k.degree, k.expand, dtype=self.dtype, name=name
        )
        if self.cross:
            theirs = norm(context, v[2], v[3])
            y, _ = mixer("cross")(norm(r, v[0], v[1]), context=theirs, context_mask=context_mask)
            r, v, gates = add(r, gates[0], y), v[4:], gates[1:]
        h = norm(r, v[0], v[1])
        self.sow("intermediates", "mixer_in", h)
        if not hom:
            y, _ = FullAttention(k.d_model, k.n_head, self.dtype, name="attn")(h)
        elif state is not None:
            y, state, _ = mixer("hom").extend(h, state)
        else:
            size = self.frame_tokens
            frames = (size,) * (r.shape[1] // size) if size else None
            y, _ = mixer("hom")(h, frames=frames)
        self.sow("intermediates", "mixed", y)
        r = add(r, gates[0], y)
        self.sow("intermediates", "after_mixer", r)
        h = norm(r, v[2], v[3])
        self.sow("intermediates", "mlp_in", h)
        r = add(r, gates[1], GeluMLP(k.d_intermediate, self.dtype, True, name="mlp")(h))
        r = jnp.clip(r, -self.clamp, self.clamp) if self.clamp else r
        self.sow("intermediates", "out", r)
        return r, state


class DiHFinal(nn.Module):
    """W (norm(r) (1 + scale) + shift) + b in at least float32; all of it starts at zero."""

    features: int

    @nn.compact
    def __call__(self, r: Array, c: Array) -> Array:
        """[B, T, features] from [B, T, D] and the condition [B, D] or [B, T, D]."""
        scale, shift = _vectors(_head(c, 2, jnp.float32, 0.0, "modulation"), c, 2)
        wide = jnp.promote_types(r.dtype, jnp.float32)
        h = modulated_layer_norm(r, shift, scale, EPSILON, wide)
        zeros = nn.initializers.zeros
        kernel = self.param("kernel", zeros, (r.shape[-1], self.features))
        return matmul("btd,dk->btk", h, kernel) + self.param("bias", zeros, (self.features,))


def scanned_blocks(
    config: BlockConfig, length: int, dtype, remat: str, unroll: bool, **options
) -> nn.Module:
    """`length` blocks in a loop, parameters and states stacked on axis 0; `options` of DiHBlock."""
    block = DiHBlock
    if remat != "none":
        block = nn.remat(DiHBlock, prevent_cse=False, policy=REMAT_POLICIES[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        out_axes=0,
        length=length,
        unroll=length if unroll else 1,
    )(config, dtype, **options)


def draw_drop(module: nn.Module, rate: float, rows: int) -> Array | None:
    """[rows] bool: rows that an rng "dropout" drops; None without one, or at rate 0."""
    if not rate or not module.has_rng("dropout"):
        return None
    return jax.random.bernoulli(module.make_rng("dropout"), rate, (rows,))
