"""Text-to-video diffusion with higher-order mixers, block-causal in time (arXiv 2411.12663), or
by class: a class is a text of one learned token.

A video of one frame is an image: the same net is a text-to-image model. A token of frame f mixes
with the frames 0..f, at linear cost. Each block therefore keeps no more of the past than a mean and
a count, and `TextVideoDiH.extend` computes a video frame by frame: equal to the whole call, at
constant memory.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ...kernels_pallas.poly_mix import PolyState, init_state
from ..layers.patches import patchify, unpatchify
from ..layers.unit_positions import unit_positions, unit_waves
from ..partition import constrain
from .dih_block import DiHFinal, DiHTimeEmbedder, draw_drop, scanned_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextVideoDiHConfig:
    """TextVideoDiH; the defaults are the XL/2 model for 80 frames of 128 x 240 pixels.

    Attributes:
        input_size, input_width: rows and columns of the (latent) frames; width 0: square.
        frames: of a video, at least 1.
        patch_size: side of a patch. patch_frames: frames of a patch.
        in_channels: C.
        d_model: residual width D, a multiple of 8. n_layer: blocks.
        degree, expand: of the mixers.
        mlp_ratio: hidden width of the MLP in units of D.
        context_dim: width of the features of a text, or of the token of a class.
        num_classes: K; 0: the net reads texts. Class id K is the null class.
        class_dropout: probability that a row trains without its text or class.
        timesteps: T; times are in 0..T.
        block_causal: tokens see the frames (of patches) up to their own; else all.
    """

    input_size: int = 16
    input_width: int = 30
    frames: int = 20
    patch_size: int = 2
    patch_frames: int = 2
    in_channels: int = 16
    d_model: int = 1152
    n_layer: int = 20
    degree: int = 2
    expand: int = 2
    mlp_ratio: float = 2.0
    context_dim: int = 1024
    num_classes: int = 0
    class_dropout: float = 0.1
    timesteps: int = 1000
    block_causal: bool = False

    mixer = "hom"  # what a block of `DiH` asks for; not a field
    n_head = 0

    @property
    def context(self) -> str:
        """ "cross" if the net reads texts, else "none"."""
        return "none" if self.num_classes else "cross"

    @property
    def out_channels(self) -> int:
        """Channels of the output: C."""
        return self.in_channels

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an input without its batch axis: (F, H, W, C)."""
        columns = self.input_width or self.input_size
        return (self.frames, self.input_size, columns, self.in_channels)

    @property
    def patch(self) -> tuple[int, int, int]:
        """(patch_frames, p, p)."""
        return (self.patch_frames, self.patch_size, self.patch_size)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens (f, h, w).

        Raises:
            ValueError: patches do not divide the video.
        """
        if min(self.patch) < 1 or any(n % p for n, p in zip(self.shape, self.patch)):
            raise ValueError(f"patches of {self.patch} do not divide videos of {self.shape[:3]}")
        f, h, w = (n // p for n, p in zip(self.shape, self.patch))
        return (f, h, w)

    @property
    def tokens(self) -> int:
        """T, tokens of a video."""
        return math.prod(self.grid)

    @property
    def d_intermediate(self) -> int:
        """Hidden width of the MLP."""
        return int(self.mlp_ratio * self.d_model)


class TextVideoDiH(nn.Module):
    """Prediction for a noisy video and a text; parameters of all blocks are stacked on axis 0.

    Attributes: as of `DiH`.
    """

    config: TextVideoDiHConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unroll: bool = False

    def setup(self):
        c = self.config
        self.blocks = scanned_blocks(
            c, c.n_layer, self.dtype, self.remat, self.unroll, cross=True,
            frame_tokens=math.prod(c.grid[1:]) if c.block_causal else 0,
        )  # fmt: skip
        dense = lambda: nn.Dense(c.d_model, kernel_init=nn.initializers.xavier_uniform())
        self.x_embedder, self.text_embedder = dense(), dense()
        if c.num_classes:
            init = nn.initializers.normal(1.0)  # as wide as features of a text
            self.y_embedder = nn.Embed(c.num_classes, c.context_dim, embedding_init=init)
        self.t_embedder = DiHTimeEmbedder(c.d_model, c.timesteps)
        self.final = DiHFinal(math.prod(c.patch) * c.out_channels)

    def __call__(
        self,
        x: Array,
        t: Array,
        labels: Array | None = None,
        *,
        drop: Array | None = None,
        context: Array | None = None,
        context_mask: Array | None = None,
    ) -> tuple[Array, dict]:
        """What the process asks for (noise or velocity) at every pixel.

        Args:
            x: [B, F, H, W, C] noisy videos.
            t: [B] int or float time in 0..timesteps, that of all frames.
            labels: [B] int32 class ids in 0..num_classes; not read by a net of texts.
            drop: [B] bool: rows without their text or class. None: each row with probability
                class_dropout if an rng "dropout" is given, else none.
            context: [B, S, context_dim] features of a text; of nets of texts only.
            context_mask: [B, S] (or [B, 1, S]) their weights, e.g. 1 for tokens of the text; None:
                all 1. A row of zeros is a row without a text.

        Returns:
            [B, F, H, W, C] float32, and {} (no auxiliary losses).

        Raises:
            ValueError: videos or features of another shape.
        """
        c = self.config
        if x.shape[1:] != c.shape:
            raise ValueError(f"videos of shape {x.shape[1:]}; the net is for {c.shape}")
        table = unit_positions(c.d_model, c.grid)
        told = self._context(labels, drop, context, context_mask)
        out, _ = self._run(x, t, table, *told, None)
        return out, {}

    def _context(self, labels, drop, context, mask):
        """(drop, context, mask): a class as a text of one token, no class as one to drop."""
        c = self.config
        if not c.num_classes:
            if context is None:
                raise ValueError("the net reads texts; give it a context")
            return drop, context, mask
        if labels is None or context is not None:
            raise ValueError("the net is told a class, not a text; give labels alone")
        drop = draw_drop(self, c.class_dropout, len(labels)) if drop is None else drop
        none = labels >= c.num_classes
        drop = none if drop is None else drop | none
        return drop, self.y_embedder(jnp.minimum(labels, c.num_classes - 1))[:, None], None

    @nn.nowrap
    def init_state(self, batch: int) -> PolyState:
        """Of a stream before its first frame: mean [L, B, k e D] and count [L, B], float32."""
        c = self.config
        one = init_state(batch, c.degree * c.expand * c.d_model)
        return jax.tree.map(lambda a: jnp.zeros((c.n_layer, *a.shape), a.dtype), one)

    def extend(
        self,
        x: Array,
        t: Array,
        frame: Array | int,
        state: PolyState,
        *,
        labels: Array | None = None,
        drop: Array | None = None,
        context: Array | None = None,
        context_mask: Array | None = None,
    ) -> tuple[Array, PolyState]:
        """The next frame of patches of a stream, from it and what blocks remember of the others.

        Frame by frame this is the call with block_causal, if `state` comes from the same t, text
        and drop: a sampler keeps one state for every evaluation of the net. Streams may become
        longer than the config's frames: times go on at the same pace.

        Args:
            x: [B, patch_frames, H, W, C]. t, labels, drop, context, context_mask: as of the call.
            frame: number of the frame of patches, 0 the first; may be traced.
            state: of `init_state`, or of the frame before.

        Returns:
            [B, patch_frames, H, W, C] float32, and the new state.

        Raises:
            ValueError: a net that is not block-causal, or arrays of another shape.
        """
        c = self.config
        if not c.block_causal:
            raise ValueError("block_causal=False: frames see those that come later")
        if x.shape[1:] != (c.patch_frames, *c.shape[1:]):
            raise ValueError(
                f"frames of shape {x.shape[1:]}; the net extends by {c.patch_frames} frames of "
                f"{c.shape[1:]}"
            )
        times, *place = c.grid
        still = np.float32(unit_positions(c.d_model, (1, *place))[:, c.d_model // 2 :])
        u = jnp.asarray(frame, jnp.float32).reshape(1, 1) / max(times - 1, 1)
        moving = jnp.broadcast_to(unit_waves(u, c.d_model // 2, xp=jnp), still.shape)
        table = jnp.concatenate([moving, still], axis=1)
        told = self._context(labels, drop, context, context_mask)
        return self._run(x, t, table, *told, state)

    def _run(self, x, t, table, drop, context, mask, state):
        """The net on tokens at the positions of `table`."""
        c = self.config
        if context.ndim != 3 or context.shape[2] != c.context_dim:
            raise ValueError(
                f"a context of shape {context.shape[1:]}; the net has context_dim={c.context_dim}"
            )
        grid = tuple(n // p for n, p in zip(x.shape[1:], c.patch))
        wide = lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32))
        r = self.x_embedder(patchify(wide(x), c.patch))
        self.sow("intermediates", "patches", r)
        r = constrain(r + jnp.asarray(table, r.dtype), "batch", "seq", None)
        mask = jnp.ones(context.shape[:2], r.dtype) if mask is None else mask.astype(r.dtype)
        mask = mask[:, 0] if mask.ndim == 3 else mask
        drop = draw_drop(self, c.class_dropout, len(x)) if drop is None else drop
        if drop is not None:
            mask = jnp.where(drop[:, None], 0, mask)
        # by selection: what is not seen may hold anything
        text = self.text_embedder(jnp.where((mask != 0)[..., None], wide(context), 0))
        self.sow("intermediates", "text", text)
        text = constrain(text, "batch", None, None)
        time = constrain(self.t_embedder(t), "batch", None)
        r, state = self.blocks(r, state, time, text, mask)
        out = unpatchify(self.final(r, time), c.patch, grid)
        return constrain(out, "batch", *(None,) * 4), state
