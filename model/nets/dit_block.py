"""One block of a DiT, and the mixer in it; see `nets.dit`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ..layers.conditioning import ModulationHead, gated_add, modulated_layer_norm
from ..layers.mlp import GeluMLP
from ..layers.positions import coordinates, sincos_positions
from ..mixers.bidirectional import Bidirectional
from ..mixers.full_attention import FullAttention, JointAttention
from ..mixers.pom import PolynomialMixer
from ..partition import constrain
from . import mamba_lm

if TYPE_CHECKING:
    from .dit import DiTConfig

EPSILON = 1e-6  # of the layer norms
MIXINGS = ("full", "factorised")
ROPES = ("none", "2d")


def make_mixer(config: DiTConfig, dtype=jnp.float32, **module):
    """The mixer of a config; `module` goes to the Flax module (name, parent).

    Raises:
        ValueError: an unknown kind of mixer, or of mixing, or sizes that do not fit together.
    """
    if config.mixing not in MIXINGS[: 1 + (config.frames > 0)]:
        raise ValueError(
            f"mixing={config.mixing!r}; choose full or, for videos (frames > 0), factorised"
        )
    if config.rope not in ROPES[: 1 + (config.mixer == "pom" and not config.frames)]:
        raise ValueError(f"rope={config.rope!r}; choose none or, for images and mixer=pom, 2d")
    if config.mixer == "attention":
        return FullAttention(config.d_model, config.n_head, dtype, **module)
    if config.mixer == "pom":
        mixer = PolynomialMixer(
            config.d_model, config.degree, config.expand, config.n_head, config.ngroups,
            config.use_bias, rope=config.rope, kernel_init=nn.initializers.xavier_uniform(),
            dtype=dtype, **module,
        )  # fmt: skip
        mixer.sizes()
        return mixer
    if config.mixer not in ("mamba1", "mamba2"):
        raise ValueError(f"mixer={config.mixer!r}; choose attention, pom, mamba2 or mamba1")
    return Bidirectional(mamba_lm.make_mixer(config, dtype, parent=None), **module)


def position_table(config: DiTConfig):
    """The net's position table [T, D] float64 (numpy): a constant, not a parameter."""
    return sincos_positions(config.d_model, config.grid, scale=_position_scale(config))


def _position_scale(config: DiTConfig):
    """Size of a patch in units of the coordinates; see `sincos_positions`."""
    side = config.patch_size / (config.base_patch or config.patch_size)
    side *= (config.base_size or config.input_size) / config.input_size
    time = config.patch_frames / (config.base_patch_frames or config.patch_frames)
    return (time, side, side) if config.frames else side


class Block(nn.Module):
    """r + gate1 mixer(norm(r) (1 + scale1) + shift1), then the same with an MLP (adaLN-Zero).

    A context is read between the two ("cross"), or goes through both beside r ("joint"). What the
    last block makes of a joint context is not used.
    """

    config: DiTConfig
    dtype: jnp.dtype

    def setup(self):
        c = self.config
        self.modulation = ModulationHead(6)  # float32: few rows, and it scales all tokens
        self.mlp = GeluMLP(c.d_intermediate, self.dtype)
        if c.context == "joint":
            self.attn = JointAttention(c.d_model, c.n_head, self.dtype)
            self.context_modulation = ModulationHead(6)
            self.context_mlp = GeluMLP(c.d_intermediate, self.dtype)
            return
        name = "attn" if c.mixer == "attention" else "mixer"
        setattr(self, name, make_mixer(c, self.dtype))
        if c.context == "cross":
            zeros = nn.initializers.zeros
            self.cross = FullAttention(c.d_model, c.n_head, self.dtype, out_init=zeros)

    def conditioning(self, c: Array, *_):
        """c [B, D] as it is, and the block's vectors [B, 6 D], or [B, 12 D] with those of a joint
        context behind them. In scan form.
        """
        vectors = self.modulation(c, flat=True)
        if self.config.context == "joint":
            theirs = self.context_modulation(c, flat=True)
            vectors = jnp.concatenate([vectors, theirs], axis=-1)
        return c, constrain(vectors, "batch", None)

    def __call__(
        self, r, vectors: Array, number: Array, context: Array | None, context_mask: Array | None
    ):
        """New residual stream [B, T, D] (and None), from what `conditioning` gives. In scan form.

        number: int32, the block's. With a joint context r is (r, the context's stream [B, S, D]). A
        cross context [B, S, D] comes as `context`; context_mask: [B, S].
        """
        # Each is said to follow the rows: left to itself XLA's partitioner takes rows of other
        # devices for some of them on meshes of data, fsdp and tensor (jax 0.10 to 0.12).
        by_row = lambda v: constrain(v[:, None], "batch", None, None)
        joint = self.config.context == "joint"
        vectors = [by_row(v) for v in jnp.split(vectors, 12 if joint else 6, axis=-1)]
        if joint:
            return self._joint(*r, vectors[:6], vectors[6:], context_mask), None
        shift1, scale1, gate1, *second = vectors
        y = self._mix(modulated_layer_norm(r, shift1, scale1, EPSILON, self.dtype), number)
        self.sow("intermediates", "mixed", y)
        r = _add(r, gate1, y)
        if self.config.context == "cross":
            y, _ = self.cross(r, context=context, context_mask=context_mask)
            self.sow("intermediates", "crossed", y)
            r = constrain(r + y.astype(r.dtype), "batch", "seq", None)
        r, y = self._feed(self.mlp, r, *second)
        self.sow("intermediates", "mlp_out", y)
        self.sow("intermediates", "out", r)
        return r, None

    def alone(self, _, r, vectors: Array, number: Array, context, context_mask):
        """(None, new residual stream) from one that is not the block before's. In scan form."""
        return None, self(r, vectors, number, context, context_mask)[0]

    def _mix(self, h: Array, number: Array) -> Array:
        """The mixer's [B, T, D]; block `number` mixes within frames (even) or along time (odd)."""
        mixer_of = lambda block: block.attn if self.config.mixer == "attention" else block.mixer
        grid = self.config.grid
        if self.config.mixing == "full":
            if self.config.rope == "none":
                return mixer_of(self)(h)[0]
            at = coordinates(grid, scale=_position_scale(self.config))
            return self.mixer(h, positions=jnp.asarray(at, jnp.float32))[0]
        times = grid[0]
        h = h.reshape(h.shape[0], times, -1, h.shape[-1])

        def within(block, h):
            rows = h.reshape(-1, *h.shape[2:])
            return mixer_of(block)(rows)[0].reshape(h.shape)

        def along(block, h):
            return jnp.swapaxes(within(block, jnp.swapaxes(h, 1, 2)), 1, 2)

        # A branch, for the loop over blocks has one body; parameters of both are the same.
        y = nn.cond(number % 2 == 1, along, within, self, h)
        return y.reshape(y.shape[0], -1, y.shape[-1])

    def _joint(self, r, s, own, theirs, context_mask):
        """New streams of tokens and context."""
        norm = lambda r, v: modulated_layer_norm(r, v[0], v[1], EPSILON, self.dtype)
        y, z = self.attn(norm(r, own), norm(s, theirs), context_mask=context_mask)
        self.sow("intermediates", "mixed", y)
        r, s = _add(r, own[2], y), _add(s, theirs[2], z, None)
        r, y = self._feed(self.mlp, r, *own[3:])
        s, _ = self._feed(self.context_mlp, s, *theirs[3:], axis=None)
        self.sow("intermediates", "mlp_out", y)
        self.sow("intermediates", "out", r)
        return r, s

    def _feed(self, mlp, r, shift, scale, gate, axis="seq"):
        """The MLP's branch: (new stream, what was added before its gate)."""
        y = mlp(modulated_layer_norm(r, shift, scale, EPSILON, self.dtype))
        return _add(r, gate, y, axis), y


def _add(r: Array, gate: Array, y: Array, axis: str | None = "seq") -> Array:
    return constrain(gated_add(r, gate.astype(r.dtype), y), "batch", axis, None)
