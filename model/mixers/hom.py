"""The higher-order mixer: means of products of several projections, gated by the query
(PoM's layer of 2024; arXiv 2411.12663).

    u_1 .. u_k = gelu(W x);  h_1 = u_1,  h_i = u_i h_{i-1}
    y = W_o (sigmoid(W_s x) * mean(h_1 .. h_k))

The mean is all that a token learns of the others, so time and memory are linear in their number,
and a stream needs the mean and a count only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ...kernels_pallas.poly_mix import (
    PolyState,
    aggregate,
    init_state,
    merge_states,
    repeat_frames,
    segment_means,
)
from ...kernels_pallas.time_axis import valid_mask
from ..layers.parted_dense import PartedDense
from ..partition import constrain


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
        causal: token t sees the tokens up to t.
        dtype: of the matmuls; products and means are at least float32.

    Raises:
        ValueError: a degree or an expansion below 1.
    """

    features: int
    degree: int = 2
    expand: int = 2
    use_bias: bool = True
    causal: bool = False
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
        context_mask: Array | None = None,
        positions: None = None,
        mask: Array | None = None,
        segment_ids: Array | None = None,
        frames: Sequence[int] | None = None,
        query_mask: Array | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Mix whole rows.

        Args:
            x: [B, T, d] queries, and tokens too unless a context is given.
            context: [B, N, d] tokens instead of x.
            context_mask, mask: [B, N] weights of the tokens of the context, of x: bool, integer or
                float, 0 for padding. Queries of weight 0 are answered like the others.
            segment_ids: [B, T] document ids; tokens see their document. At linear cost
                (`segment_means`), wherever the tokens of a document lie.
            frames: lengths of the frames in which the tokens of x come: block-causal mixing, frame
                f sees the frames up to f.
            query_mask: [B, T, N] or [1, T, N] weight of each token for each query, instead of all
                other masks. At quadratic cost.
            positions: of the mixer contract; this mixer takes none.

        Returns:
            y [B, T, d] in `dtype`, and {} (no auxiliary losses). A query that sees nothing gets the
            bias alone.

        Raises:
            ValueError: positions, or arguments that do not belong together.
        """
        if positions is not None:
            raise ValueError("HigherOrderMixer has no positions: add them to its input")
        if context is None and context_mask is not None:
            raise ValueError("context_mask without a context")
        if context is not None and (mask is not None or segment_ids is not None):
            raise ValueError("mask and segment_ids say nothing about a context")
        if context is not None and (frames is not None or self.causal):
            raise ValueError("frames and causal say nothing about a context; give a query_mask")
        if segment_ids is not None and (frames is not None or query_mask is not None):
            raise ValueError("segment_ids, frames and query_mask are three masks; give one")
        weights, causal = mask if context is None else context_mask, self.causal
        x = constrain(x, "batch", "seq", None)
        p = self._products(x if context is None else context, weights)
        if segment_ids is not None:
            rows = segment_means(p, segment_ids, weights=weights, causal=causal)
        else:
            rows, _ = aggregate(
                p, weights=weights, causal=causal, frames=frames, query_weights=query_mask
            )
        self.sow("intermediates", "aggregated", rows)
        return self._select(x, rows, frames), {}

    @nn.nowrap
    def init_state(self, batch: int, dtype=None, max_length: int | None = None) -> PolyState:
        """The state of a stream that has seen nothing: mean [B, k e d] and count [B], float32 (or
        float64, if `dtype` is), of the same size whatever comes."""
        del max_length
        dtype = self.dtype if dtype is None else dtype
        return init_state(batch, self.width, jnp.promote_types(dtype, jnp.float32))

    def extend(
        self,
        x: Array,
        state: PolyState,
        *,
        mask: Array | None = None,
        lengths: Array | None = None,
        frames: Sequence[int] | None = None,
        count_pieces: bool = False,
    ) -> tuple[Array, PolyState, dict[str, Any]]:
        """Continue from `state` with a piece x [B, T, d]: y, the new state, {}.

        Every query sees all of the piece and what was before it, as by the mask of blocks that are
        the pieces, whatever their lengths; or, if `causal`, the tokens up to its own; or what
        `frames` say.

        Args:
            mask, frames: as for a call.
            lengths: [B] int32 valid tokens of x, the rest is padding on the right.
            count_pieces: the published rule, by which a piece counts as one token whatever its
                length: right for pieces of one length only.
        """
        weights = mask
        if lengths is not None:
            valid = valid_mask(lengths, x.shape[1])
            weights = valid if weights is None else jnp.where(valid, weights, 0)
        p = self._products(x, weights)
        if count_pieces:
            _, own = aggregate(p, weights=weights)
            state = merge_states(state, PolyState(own.mean, jnp.ones_like(own.count)))
            return self._select(x, state.mean[:, None], None), state, {}
        rows, state = aggregate(p, weights=weights, causal=self.causal, frames=frames, state=state)
        return self._select(x, rows, frames), state, {}

    def step(self, x_t: Array, state: PolyState) -> tuple[Array, PolyState]:
        """One token x_t [B, d]: y_t [B, d] and the new state."""
        y, state, _ = self.extend(x_t[:, None], state)
        return y[:, 0], state

    def _products(self, tokens: Array, weights: Array | None) -> Array:
        """[B, N, k e d]; what has no weight is 0 before it can spoil a gradient."""
        if weights is not None:
            tokens = jnp.where((weights != 0)[..., None], tokens, 0)
        return running_products(self.ho_proj(tokens))

    def _select(self, x: Array, rows: Array, frames: Sequence[int] | None) -> Array:
        """W_o of the gated rows [B, 1, T or number of frames, k e d]."""
        rows = rows if frames is None else repeat_frames(rows, frames)
        gate = nn.sigmoid(self.se_proj(x).astype(rows.dtype))
        gate = constrain(gate, "batch", "seq", "features")
        return constrain(self.ag_proj((gate * rows).astype(self.dtype)), "batch", "seq", None)
