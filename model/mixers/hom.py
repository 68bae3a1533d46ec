"""The higher-order mixer: means of products of several projections, gated by the query
(PoM's layer of 2024; arXiv 2411.12663).

    u_1 .. u_k = gelu(W x);  h_1 = u_1,  h_i = u_i h_{i-1}
    y = W_o (sigmoid(W_s x) * mean(h_1 .. h_k))

The mean is all that a token learns of the others, so time and memory are linear in their number,
and a stream needs the mean and a count only.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ..layers.parted_dense import PartedDense
from ..partition import constrain
from .aggregation import (
    Frames,
    Mask,
    MeanState,
    aggregate,
    extend_mean,
    init_mean,
    rows_of_tokens,
)


def running_products(parts: tuple[Array, ...]) -> Array:
    """u_1, u_1 u_2, .. of k arrays [.., E] after the exact GELU: [.., k E], computed in
    at least float32."""
    products: list[Array] = []
    for part in parts:
        u = nn.gelu(part.astype(jnp.promote_types(part.dtype, jnp.float32)), approximate=False)
        products.append(u * products[-1] if products else u)
    return jnp.concatenate(products, axis=-1)


class HigherOrderMixer(nn.Module):
    """Mixing of tokens with each other, or with a context, by gated means of products.

    Parameters: `ho_proj` and `se_proj` [d, k e d], `ag_proj` [k e d, d], with biases.
    Xavier-uniform.

    Attributes:
        features: width d of the input and output.
        degree: k, factors of the longest product. expand: e, width of a factor in units of d.
        use_bias: of the projections.
        dtype: of the matmuls; products and means are at least float32.

    Raises:
        ValueError: a degree or an expansion below 1.
    """

    features: int
    degree: int = 2
    expand: int = 2
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        if self.degree < 1 or self.expand < 1:
            raise ValueError(f"degree={self.degree}, expand={self.expand}; both are at least 1")
        init, part = nn.initializers.xavier_uniform(), self.expand * self.features
        self.ho_proj = PartedDense((part,) * self.degree, self.use_bias, init, self.dtype)
        options = dict(use_bias=self.use_bias, kernel_init=init, dtype=self.dtype)
        self.se_proj = nn.Dense(self.width, **options)
        self.ag_proj = nn.Dense(self.features, **options)

    @property
    def width(self) -> int:
        """k e d: what is kept of a context."""
        return self.degree * self.expand * self.features

    def __call__(
        self,
        x: Array,
        *,
        context: Array | None = None,
        context_mask: Mask = None,
        positions: None = None,
        mask: Mask = None,
        segment_ids: None = None,
        frames: Frames | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Mix whole rows.

        Args:
            x: [B, T, d], finite.
            context: [B, N, d]: the tokens that are mixed in, instead of x.
            context_mask: who of the context is seen, see `aggregate`: weights [B, N], or [B or 1,
                T or 1, N]. A row of zeros sees nothing, and its y is ag_proj's bias.
            mask: who of x is seen, without a context: the same, or "causal".
            frames: block-causal mixing of x; see `aggregate`.
            positions, segment_ids: of the mixer contract; this mixer takes none.

        Returns:
            y [B, T, d] in `dtype`, and {} (no auxiliary losses).

        Raises:
            ValueError: arguments that this mixer does not take, that do not belong together, or
                have wrong shapes.
        """
        if positions is not None or segment_ids is not None:
            raise ValueError("HigherOrderMixer has no positions, and takes no segment_ids")
        if context is None and context_mask is not None:
            raise ValueError("context_mask without a context")
        if context is not None and (mask is not None or frames is not None):
            raise ValueError("mask and frames say nothing about a context; give a context_mask")
        x = constrain(x, "batch", "seq", None)
        seen = context_mask if context is not None else mask
        rows = aggregate(
            self._products(x if context is None else context, seen), seen, frames=frames
        )
        self.sow("intermediates", "aggregated", rows)
        return self._select(x, rows_of_tokens(rows, x.shape[1], frames)), {}

    def init_state(self, batch: int) -> MeanState:
        """The state of a stream that has seen nothing: [B, 1, k e d] and [B], float32."""
        return init_mean(batch, self.width)

    def extend(
        self,
        x: Array,
        state: MeanState,
        *,
        mask: Array | None = None,
        count_chunks: bool = False,
    ) -> tuple[Array, MeanState]:
        """The next tokens of a stream: each sees all of them, and all before.

        Extending by the frames of a video one after another equals a call with `frames`; by single
        tokens, one with mask="causal".

        Args:
            x: [B, T, d], any T. state: of `init_state`, or of the tokens before.
            mask: [B, T] weights of these tokens.
            count_chunks: the published rule, which counts chunks instead of tokens; right for
                chunks of one length only.

        Returns:
            y [B, T, d] in `dtype`, and the new state.
        """
        state = extend_mean(state, self._products(x, mask), mask, count_chunks=count_chunks)
        return self._select(x, state.mean), state

    def step(self, x: Array, state: MeanState) -> tuple[Array, MeanState]:
        """`extend` by one token x [B, d]: y [B, d] and the new state."""
        y, state = self.extend(x[:, None], state)
        return y[:, 0], state

    def _products(self, tokens: Array, mask: Mask) -> Array:
        """[B, N, k e d]; what a mask [B, N] hides is 0 before it can spoil a gradient."""
        if mask is not None and not isinstance(mask, str) and jnp.ndim(mask) == 2:
            tokens = jnp.where((mask != 0)[..., None], tokens, 0)
        return running_products(self.ho_proj(tokens))

    def _select(self, x: Array, rows: Array) -> Array:
        """W_o of the gated rows [B, 1 or T, k e d]."""
        gate = nn.sigmoid(self.se_proj(x).astype(rows.dtype))
        gate = constrain(gate, "batch", "seq", "features")
        return constrain(self.ag_proj((gate * rows).astype(self.dtype)), "batch", "seq", None)
