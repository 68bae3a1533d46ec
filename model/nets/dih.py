"""DiH: class-conditional image diffusion that mixes patches by a higher-order mixer instead of
attention (arXiv 2411.12663), its variant DiH++, and the DiT with attention it is compared with.

What the net predicts (noise or velocity) and the range of t are its process's, see
model/processes/noise_levels.py.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ..layers.patches import SquareImages, patchify, unpatchify
from ..layers.unit_positions import WAVES, unit_positions
from ..partition import constrain
from .dih_block import DiHFinal, DiHTimeEmbedder, draw_drop, scanned_blocks

MIXERS = ("hom", "attention")
POSITIONS = (*WAVES, "learned")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiHConfig(SquareImages):
    """DiH; the defaults are DiH-XL/2 for 256 x 256 images.

    Attributes:
        input_size: side of the (latent) image. in_channels: C.
        patch_size: p, which divides input_size.
        d_model: residual width D. n_layer: blocks.
        mixer: "hom", or "attention" with n_head heads.
        degree, expand: of the mixer "hom".
        mlp_ratio: hidden width of the MLP in units of D.
        num_classes: K; class id K is the null class, for guidance.
        class_dropout: probability that a row trains on the null class; 0: there is none.
        timesteps: T; times are in 0..T.
        positions: "harmonic": the table of the 256 pixel models; "shifted": that of the models of
            higher resolution; "learned": DiH++, with a learned table, and another that is added to
            the condition, which all heads of modulation then read token by token.
        registers: learned tokens before the others; with positions="learned" only.
        clamp: bound of the residual stream after every block, 0: none. DiH++ was trained with 255.
        resize_by_count: as published, learned tables are resized for an input of another number of
            tokens only, and read in raster order for another shape of as many.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    d_model: int = 1152
    n_layer: int = 28
    mixer: str = "hom"
    degree: int = 2
    expand: int = 2
    n_head: int = 16
    mlp_ratio: float = 2.0
    num_classes: int = 1000
    class_dropout: float = 0.1
    timesteps: int = 1000
    positions: str = "harmonic"
    registers: int = 0
    clamp: float = 0.0
    resize_by_count: bool = False

    @property
    def d_intermediate(self) -> int:
        """Hidden width of the MLP."""
        return int(self.mlp_ratio * self.d_model)


def check_dih(config: DiHConfig) -> None:
    """Raises ValueError for fields that are unknown or do not fit together."""
    if config.mixer not in MIXERS:
        raise ValueError(f"mixer={config.mixer!r}; choose {' or '.join(MIXERS)}")
    if config.positions not in POSITIONS:
        raise ValueError(f"positions={config.positions!r}; choose one of {', '.join(POSITIONS)}")
    if config.registers and config.positions != "learned":
        raise ValueError(
            f"registers={config.registers} with positions={config.positions}; registers need "
            "positions=learned"
        )
    if config.resize_by_count and config.positions != "learned":
        raise ValueError(
            f"resize_by_count=true with positions={config.positions}, whose table is computed for "
            "every shape; leave it out"
        )
    if not config.num_classes and not config.class_dropout:
        raise ValueError("num_classes=0 and class_dropout=0: no class is left; set num_classes=1")


def resize_table(table: Array, grid: tuple[int, int], new: tuple[int, int]) -> Array:
    """A table of positions [.., h w, D] for another grid: bicubic (a = -1/2), with antialiasing.

    Args:
        table: [h w, D] of the grid (h, w). new: (h', w').

    Returns:
        [h' w', D] in at least float32.
    """
    if new == grid:
        return table
    table = table.astype(jnp.promote_types(table.dtype, jnp.float32))
    image = table.reshape(*grid, table.shape[-1])
    resized = jax.image.resize(image, (*new, table.shape[-1]), "cubic", antialias=True)
    return resized.reshape(math.prod(new), table.shape[-1])


class DiH(nn.Module):
    """Prediction for a noisy image; parameters of all blocks are stacked on axis 0.

    The collection "intermediates", if asked for, holds what the blocks make.

    Attributes:
        config: sizes and switches.
        dtype: of the blocks' matmuls. Embeddings, modulation of whole images, statistics of the
            norms, means of the mixer, residual stream and last layer are float32.
        remat: "none", "full" or "dots": what the backward pass recomputes per block.
        unroll: compile every block on its own instead of one in a loop: faster, and slower to
            compile.
    """

    config: DiHConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unroll: bool = False

    def setup(self):
        c = self.config
        check_dih(c)
        self.blocks = scanned_blocks(
            c, c.n_layer, self.dtype, self.remat, self.unroll, clamp=c.clamp
        )
        self.x_embedder = nn.Dense(c.d_model, kernel_init=nn.initializers.xavier_uniform())
        self.t_embedder = DiHTimeEmbedder(c.d_model, c.timesteps)
        self.y_embedder = nn.Embed(
            c.num_classes + (c.class_dropout > 0), c.d_model,
            embedding_init=nn.initializers.normal(0.02),
        )  # fmt: skip
        self.final = DiHFinal(c.patch_size**2 * c.out_channels)
        if c.positions == "learned":
            init = nn.initializers.truncated_normal(0.02)
            self.position_table = self.param("positions", init, (c.tokens, c.d_model))
            self.condition_table = self.param(
                "condition_positions", init, (c.registers + c.tokens, c.d_model)
            )
            if c.registers:
                self.register_table = self.param("registers", init, (c.registers, c.d_model))

    def __call__(
        self, x: Array, t: Array, labels: Array, *, drop: Array | None = None
    ) -> tuple[Array, dict]:
        """What the process asks for (noise or velocity) at every pixel.

        Args:
            x: [B, H, W, C] noisy images; patch_size divides H and W. Those of another shape than
                input_size get positions over the same range.
            t: [B] int or float time in 0..timesteps.
            labels: [B] int32 class ids in 0..num_classes (the null class).
            drop: [B] bool: rows to take the null class, whatever their label. None: each row with
                probability class_dropout if an rng "dropout" is given, else none.

        Returns:
            [B, H, W, C] float32, and {} (no auxiliary losses).

        Raises:
            ValueError: other channels, sizes that patches do not divide, or `drop` for a net
                without a null class.
        """
        c = self.config
        if x.ndim != 4 or x.shape[-1] != c.in_channels:
            raise ValueError(f"images of shape {x.shape[1:]}; the net has {c.in_channels} channels")
        r = self.x_embedder(
            patchify(x.astype(jnp.promote_types(x.dtype, jnp.float32)), c.patch_size)
        )
        grid = (x.shape[1] // c.patch_size, x.shape[2] // c.patch_size)
        self.sow("intermediates", "patches", r)
        condition = constrain(self.condition(t, labels, drop=drop), "batch", None)
        r = r + self._table(grid, r.dtype)
        if c.positions == "learned":
            own, table = jnp.split(self.condition_table, [c.registers])
            table = jnp.concatenate([own, self._resized(table, grid)])
            condition = constrain(condition[:, None] + table, "batch", "seq", None)
        if c.registers:
            first = jnp.broadcast_to(self.register_table, (len(r), c.registers, c.d_model))
            r = jnp.concatenate([first.astype(r.dtype), r], axis=1)
        r = constrain(r, "batch", "seq", None)
        r, _ = self.blocks(r, None, condition, None, None)
        if c.positions == "learned":
            r, condition = r[:, c.registers :], condition[:, c.registers :]
        out = unpatchify(self.final(r, condition), c.patch_size, grid)
        return constrain(out, "batch", None, None, None), {}

    def condition(self, t: Array, labels: Array, *, drop: Array | None = None) -> Array:
        """[B, D]: what time and class contribute; arguments as of the call."""
        c = self.config
        if drop is not None and not c.class_dropout:
            raise ValueError("class_dropout=0: the net has no null class to drop labels to")
        drop = draw_drop(self, c.class_dropout, len(labels)) if drop is None else drop
        if drop is not None:
            labels = jnp.where(drop, c.num_classes, labels)
        time = self.t_embedder(t)
        self.sow("intermediates", "time", time)
        return time + self.y_embedder(labels)

    def _table(self, grid: tuple[int, int], dtype) -> Array:
        """The position table [T, D] of a grid."""
        c = self.config
        if c.positions == "learned":
            table = self._resized(self.position_table, grid).astype(dtype)
        else:
            table = jnp.asarray(unit_positions(c.d_model, grid, c.positions), dtype)
        self.sow("intermediates", "positions", table)
        return table

    def _resized(self, table: Array, grid: tuple[int, int]) -> Array:
        """A learned table for a grid."""
        same_count = math.prod(grid) == self.config.tokens
        if self.config.resize_by_count and same_count:
            return table
        table = resize_table(table, self.config.grid, grid)
        self.sow("intermediates", "resized", table)
        return table
