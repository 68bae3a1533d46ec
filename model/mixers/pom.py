"""Polynomial mixer (PoM, 2026): gated means of learned polynomials instead of attention.

"A Linear-Time Replacement for Attention with the Polynomial Mixer" (arXiv 2604.06129). Layouts of
published parameters: `model/convert/pom.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ...kernels_pallas import dispatch
from ...kernels_pallas.matmul import matmul
from ...kernels_pallas.poly_mix import (
    PolyState,
    Rotation,
    gated_causal_mix,
    init_state,
    poly_mix,
    poly_mix_segments,
    projected_mean,
    repeat_frames,
    rope_frequencies,
    rope_rotation,
    rotate,
    runs,
)
from ...kernels_pallas.time_axis import valid_mask
from ..layers.mlp import uniform_fan_in
from ..partition import constrain

AXES = {"none": 0, "1d": 1, "2d": 2}


class PomState(NamedTuple):
    """What a polynomial mixer remembers; the size does not depend on how much it has read.

    Attributes:
        tokens: mean [B, E] and count [B] of the features of all tokens, float32.
        queries_read, tokens_read: [B] int32 how many there were, for positions.
    """

    tokens: PolyState
    queries_read: Array
    tokens_read: Array


def hard_sigmoid(x: Array) -> Array:
    """clamp(x / 6 + 1/2, 0, 1); slope 1/6 between -3 and 3, both excluded, else 0; NaN stays."""
    return jnp.where(x <= -3, 0, jnp.where(x >= 3, 1, x / 6 + 0.5)).astype(x.dtype)


def gate_frequencies(
    heads: int, width: int, axes: int, base: float, aligned: bool = False
) -> np.ndarray:
    """Frequencies [heads / (2 axes)] of gates that are one number per head, out of the features'.

    Every hd-th one (hd = width / heads), so that a gate turns as the first channel of its head; but
    the published code takes every (hd / 2)-th along one axis, which are higher. `aligned` does not.

    Raises:
        ValueError: heads that cannot be paired.
    """
    size, step = width // heads, 2 * axes
    if heads % step or size < step:
        raise ValueError(
            f"gates of {heads} heads of {size} channels cannot be rotated along {axes} axes: "
            f"heads must be divisible by {step} and have at least {step} channels"
        )
    stride = size // 2 if axes == 1 and not aligned else size
    return rope_frequencies(width, axes, base)[::stride][: heads // step]


def _coefficients(key, shape, dtype=jnp.float32):
    """Practically 0.001 with random signs, as published."""
    return jnp.clip(jax.random.normal(key, shape, dtype), -0.001, 0.001)


def by_rank(queries: int, rows: int, width: int, heads: int) -> bool:
    """Whether the output is a map of rank `heads`: fewer products than gating every channel.

    Args:
        queries: T. rows: how many different means of `width` channels they get.
    """
    return heads > 1 and rows * width + queries * heads < queries * width


class _Affine(nn.Module):
    """The parameters `kernel` and `bias` (None without) of a linear map, for others to apply."""

    shape: tuple[int, ...]
    use_bias: bool
    kernel_init: Any
    dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> tuple[Array, Array | None]:
        kernel = self.param("kernel", self.kernel_init, self.shape).astype(self.dtype)
        if not self.use_bias:
            return kernel, None
        fan_in = self.shape[-2]
        init = lambda key, shape: jax.random.uniform(
            key, shape, minval=-(fan_in**-0.5), maxval=fan_in**-0.5
        )
        outputs = self.shape[-1] if len(self.shape) == 2 else self.shape[0] * self.shape[-1]
        return kernel, self.param("bias", init, (outputs,)).astype(self.dtype)


class PolynomialMixer(nn.Module):
    """y = W_out (s(x) . a),  a = mean over the context of p(W_h c)  (arXiv 2604.06129).

        p(h) = sum_j c_j act(h)^j for j = 1 .. k;   s = hard_sigmoid(W_s x + b_s)

    s is one number per head, or per channel where heads <= 1. With RoPE the features and gates are
    rotated by position. The mean is over the tokens that a query sees. Where that is the same for
    many queries, heads make the output a map of rank H, sum_i s_i V_i with V_i = W_i a_i, so that
    the large output matmul does not happen.

    Parameters: `po_coeff` [E, k]; `ag_proj` {kernel [E, d], bias}; and with one group `qc_proj`
    {kernel [d, E + S]} (features first) and `se_bias` [S], with several `po_proj` {kernel
    [G, d/G, E/G], bias [E]} and `se_proj` {kernel [d, S], bias}.  E = expand d, S = heads or E.

    Attributes:
        features: width d of the input and output.
        degree: k. expand: E / d.
        heads: H selection heads; 0 and 1 both mean a gate for every channel.
        groups: G groups of channels with projections of their own.
        use_bias: biases of the output and (with groups) of the features; the gate always has one.
        causal: token t sees the tokens up to t.
        rope: "none", "1d" or "2d"; rope_base: of its frequencies.
        aligned_gates: see `gate_frequencies`; changes nothing but "1d" with heads.
        kernel_init: of all kernels; None is U(+-1/sqrt(fan in)).
        dtype: of the matmuls; polynomials, sums, counts and angles are float32.
        implementation: of the op; None chooses.
    """

    features: int
    degree: int = 2
    expand: int = 2
    heads: int = 1
    groups: int = 1
    use_bias: bool = False
    causal: bool = False
    rope: str = "none"
    rope_base: float = 10000.0
    aligned_gates: bool = False
    kernel_init: Any = None
    dtype: jnp.dtype = jnp.float32
    implementation: str | None = None

    @nn.nowrap
    def sizes(self) -> tuple[int, int, int]:
        """Width E of the features, width S of the gate, axes of the rotation.

        Raises:
            ValueError: widths, groups, heads and rotation do not fit together.
        """
        width, d = self.expand * self.features, self.features
        if self.rope not in AXES:
            raise ValueError(f"rope={self.rope!r}, expected one of {', '.join(AXES)}")
        if self.degree < 1 or self.expand < 1 or self.groups < 1:
            raise ValueError("degree, expand and groups must be at least 1")
        if d % self.groups:
            raise ValueError(f"groups={self.groups} does not divide features={d}")
        if self.heads > 1 and width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide expand * features = {width}")
        axes = AXES[self.rope]
        if axes:
            rope_frequencies(width, axes)
            self._gate_frequencies(width, axes)
        return width, self.heads if self.heads > 1 else width, axes

    @nn.nowrap
    def _gate_frequencies(self, width: int, axes: int) -> np.ndarray:
        if self.heads <= 1:
            return rope_frequencies(width, axes, self.rope_base)
        return gate_frequencies(self.heads, width, axes, self.rope_base, self.aligned_gates)

    def setup(self):
        width, gates, _ = self.sizes()
        d, groups = self.features, self.groups
        init = uniform_fan_in if self.kernel_init is None else self.kernel_init
        affine = lambda shape, bias: _Affine(shape, bias, init, self.dtype)
        if groups == 1:
            self.qc_proj = affine((d, width + gates), False)
            self.se_bias = self.param("se_bias", nn.initializers.zeros, (gates,))
        else:
            each = lambda key, shape: jnp.stack(
                [init(k, shape[1:]) for k in jax.random.split(key, groups)]
            )
            shape = (groups, d // groups, width // groups)
            self.po_proj = _Affine(shape, self.use_bias, each, self.dtype)
            self.se_proj = affine((d, gates), True)
        self.po_coeff = self.param("po_coeff", _coefficients, (width, self.degree))
        self.ag_proj = affine((width, d), self.use_bias)

    def project(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """h [B, N, E] of the context (x, if None) before the activation, and the gate [B, T, S] of
        x before any rotation, both in `dtype`."""
        width, _, _ = self.sizes()
        x = x.astype(self.dtype)
        context = x if context is None else context.astype(self.dtype)
        if self.groups == 1:
            kernel, _ = self.qc_proj()
            h = jnp.dot(context, kernel[:, :width])
            kernel, bias = kernel[:, width:], self.se_bias.astype(self.dtype)
        else:
            kernel, bias = self.po_proj()
            cut = context.reshape(*context.shape[:-1], self.groups, -1)
            h = jnp.einsum("bngi,gio->bngo", cut, kernel).reshape(*context.shape[:-1], width)
            h = h if bias is None else h + bias
            kernel, bias = self.se_proj()
        h = constrain(h, "batch", "seq", "features")
        return h, self._gate(jnp.dot(x, kernel) + bias)

    def _gate(self, x: Array) -> Array:
        gate = hard_sigmoid(x.astype(jnp.promote_types(self.dtype, jnp.float32)))
        return gate.astype(self.dtype)

    def __call__(
        self,
        x: Array,
        *,
        context: Array | None = None,
        context_mask: Array | None = None,
        positions: Array | None = None,
        mask: Array | None = None,
        segment_ids: Array | None = None,
        context_positions: Array | None = None,
        frames: Sequence[int] | None = None,
        query_frames: Sequence[int] | None = None,
        query_mask: Array | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Mix whole rows.

        Args:
            x: [B, T, d] queries, and tokens too unless a context is given.
            context: [B, N, d] tokens instead of x.
            context_mask, mask: [B, N] weights of the tokens of the context, of x: bool, integer or
                float, 0 for padding. Queries of weight 0 are answered like the others, so that x
                is finite there, too; beside a context, mask says nothing.
            positions: with rope: [T] or [B, T] ("1d"; None counts from 0), [T, 2] or [B, T, 2]
                rows and columns ("2d"; needed).
            segment_ids: [B, T] document ids; tokens see their document. At linear cost
                (`segment_means`), wherever the tokens of a document lie.
            context_positions: of the context; None counts from 0 ("1d").
            frames: lengths of the frames in which the tokens come: block-causal mixing, frame f
                sees the frames up to f.
            query_frames: lengths of the queries' frames, where a context is given; 0 for a frame
                that none of them is in.
            query_mask: [B, T, N] or [1, T, N] weight of each token for each query, instead of all
                other masks and `causal`. At quadratic cost.

        Returns:
            y [B, T, d] in `dtype`, and {} (no auxiliary losses). A query that sees nothing gets the
            bias alone.

        Raises:
            ValueError: arguments that do not belong together.
        """
        if context is None and context_mask is not None:
            raise ValueError("context_mask without a context")
        if context is not None and segment_ids is not None:
            raise ValueError("segment_ids say nothing about a context; give a query_mask")
        if segment_ids is not None and (frames is not None or query_mask is not None):
            raise ValueError("segment_ids, frames and query_mask are three masks; give one")
        weights = mask if context is None else context_mask
        positions = self._positions(x, context, positions, context_positions)
        y, _ = self._mix(
            x, context, weights, positions, None, self.causal, frames, query_frames, query_mask,
            segment_ids,
        )  # fmt: skip
        return y, {}

    def extend(
        self,
        x: Array,
        state: PomState,
        *,
        context: Array | None = None,
        context_mask: Array | None = None,
        positions: Array | None = None,
        mask: Array | None = None,
        lengths: Array | None = None,
        context_positions: Array | None = None,
        frames: Sequence[int] | None = None,
        query_frames: Sequence[int] | None = None,
    ) -> tuple[Array, PomState, dict[str, Any]]:
        """Continue from `state` with a piece x [B, T, d] (and a piece of the context): y, the new
        state, {}.

        Every query sees all of the piece and what was before it, as by the mask of blocks that are
        the pieces, whatever their lengths; or, if `causal`, the tokens up to its own; or what
        `frames` say. Arguments as for a call, and:

        Args:
            lengths: [B] int32 valid tokens of x, the rest is padding on the right: the next piece
                has the positions that follow them. Positions go on behind what `mask` hides, as
                in a call.
            positions, context_positions: None goes on from the state ("1d").
        """
        if context is not None and lengths is not None:
            raise ValueError("lengths count the tokens of x; give the context's context_mask")
        if context is None and context_mask is not None:
            raise ValueError("context_mask without a context")
        tokens = x if context is None else context
        weights = mask if context is None else context_mask
        if lengths is not None:
            valid = valid_mask(lengths, x.shape[1])
            weights = valid if weights is None else jnp.where(valid, weights, 0)
        positions = self._positions(x, context, positions, context_positions, state)
        y, after = self._mix(
            x, context, weights, positions, state.tokens, self.causal, frames, query_frames, None
        )
        queries = x.shape[1] if lengths is None else lengths
        read = tokens.shape[1] if lengths is None else lengths
        state = PomState(after, state.queries_read + queries, state.tokens_read + read)
        return y, state, {}

    def step(self, x_t: Array, state: PomState) -> tuple[Array, PomState]:
        """One token x_t [B, d]: y_t [B, d] and the new state."""
        y, state, _ = self.extend(x_t[:, None], state)
        return y[:, 0], state

    @nn.nowrap
    def init_state(self, batch: int, dtype=None, max_length: int | None = None) -> PomState:
        """The state before the first token: float32 in any case (float64 if `dtype` is), and of
        the same size whatever comes."""
        del max_length
        dtype = jnp.promote_types(self.dtype if dtype is None else dtype, jnp.float32)
        zero = jnp.zeros((batch,), jnp.int32)
        return PomState(init_state(batch, self.sizes()[0], dtype), zero, zero)

    def _positions(self, x, context, positions, context_positions, state=None):
        """Positions of the queries and of the tokens; (None, None) without rope."""
        if self.rope == "none":
            if positions is not None or context_positions is not None:
                raise ValueError('rope="none" reads no positions')
            return None, None
        count = lambda tokens, read: (
            jnp.arange(tokens.shape[1]) + (0 if state is None else read[:, None])
        )
        if positions is None:
            if self.rope == "2d":
                raise ValueError('rope="2d" needs positions [T, 2] (row, column)')
            positions = count(x, None if state is None else state.queries_read)
        if context_positions is None:
            if context is None:
                context_positions = positions
            elif self.rope == "2d":
                raise ValueError('rope="2d" needs context_positions [N, 2] (row, column)')
            else:
                context_positions = count(context, None if state is None else state.tokens_read)
        return positions, context_positions

    def _mix(
        self, x, context, weights, positions, state, causal, frames, query_frames, query_mask,
        segment_ids=None,
    ):  # fmt: skip
        """y, and the state of the tokens."""
        width, _, axes = self.sizes()
        if query_frames is not None and (context is None or frames is None):
            raise ValueError("query_frames go with a context and its frames")
        if frames is not None and context is not None:
            if query_frames is None or len(query_frames) != len(frames):
                raise ValueError("a context in frames needs query_frames, as many as frames")
        alone = context is None and frames is None and query_mask is None
        alone = alone and segment_ids is None and not causal and not axes and self.groups == 1
        if alone and not dispatch.must_be_split(x):
            kernel, _ = self.qc_proj()
            rows, gate, state = projected_mean(
                x.astype(self.dtype), kernel, self.po_coeff, weights=weights, state=state,
                implementation=self.implementation,
            )  # fmt: skip
            gate = self._gate(gate + self.se_bias.astype(self.dtype))
            return self._answer(gate, rows, (x.shape[1],)), state
        h, gate = self.project(constrain(x, "batch", "seq", None), context)
        rotation: Rotation | None = None
        if axes:
            own = rope_rotation(positions[0], self._gate_frequencies(width, axes), axes)
            gate = rotate(gate, own).astype(self.dtype)
            frequencies = rope_frequencies(width, axes, self.rope_base)
            rotation = rope_rotation(positions[1], frequencies, axes)
        options = {"weights": weights, "implementation": self.implementation}
        plain = query_mask is None and segment_ids is None and rotation is None and frames is None
        if causal and plain and self.heads > 1 and gate.shape[1] == h.shape[1]:
            selected, state = gated_causal_mix(
                h, self.po_coeff, gate, state=state, dtype=self.dtype, **options
            )
            return self._out(selected), state
        per_token = causal or query_mask is not None or segment_ids is not None
        dtype = self.dtype if per_token else jnp.promote_types(self.dtype, jnp.float32)
        options |= {"rotation": rotation, "dtype": dtype}
        if segment_ids is not None:
            rows = poly_mix_segments(h, self.po_coeff, segment_ids, causal=causal, **options)
        else:
            rows, state = poly_mix(
                h, self.po_coeff, causal=causal and query_mask is None, frames=frames,
                query_weights=query_mask, state=state, **options,
            )  # fmt: skip
        queries = x.shape[1]
        blocks = query_frames or frames
        blocks = (queries,) if blocks is None else tuple(blocks)
        if sum(blocks) != queries or min(blocks) < 0:
            raise ValueError(f"query_frames {blocks} are not lengths that add up to {queries}")
        if per_token:
            if rows.shape[1] not in (1, queries):
                raise ValueError(f"{rows.shape[1]} rows of the mask for {queries} queries")
            blocks = (1,) * rows.shape[1] if rows.shape[1] > 1 else (queries,)
        return constrain(self._answer(gate, rows, blocks), "batch", "seq", None), state

    def _answer(self, gate: Array, rows: Array, blocks: tuple[int, ...]) -> Array:
        """W_out (gate . rows): gate [B, T, S], rows [B, R, E], one for each block of queries."""
        kernel, bias = self.ag_proj()
        batch, queries, _ = gate.shape
        count, width = rows.shape[1:]
        heads = self.heads if self.heads > 1 else width
        by_head = rows.astype(self.dtype).reshape(batch, count, heads, -1)
        if by_rank(queries, count, width, self.heads):
            values = matmul("brhj,hjd->brhd", by_head, kernel.reshape(heads, -1, self.features))
            values, parts, row, start = values.astype(self.dtype), [], 0, 0
            for length, number in runs(blocks):
                part = gate[:, start : start + length * number]
                part = part.reshape(batch, number, length, heads)
                part = matmul("brth,brhd->brtd", part, values[:, row : row + number])
                parts.append(part.reshape(batch, number * length, self.features))
                row, start = row + number, start + length * number
            y = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
            y = y.astype(self.dtype)
        else:
            if count > 1 and blocks != (1,) * count:
                by_head = repeat_frames(by_head, blocks)
            selected = gate[..., None] * by_head
            return self._out(selected.reshape(batch, queries, width))
        return y if bias is None else y + bias

    def _out(self, selected: Array) -> Array:
        """W_out of gated features [B, T, E]."""
        kernel, bias = self.ag_proj()
        y = jnp.dot(constrain(selected, "batch", "seq", "features"), kernel)
        y = y if bias is None else y + bias
        return constrain(y, "batch", "seq", None)
