"""Polynomial mixer: means of learned polynomials of the tokens, the core of PoM layers.

The aggregation of "A Linear-Time Replacement for Attention with the Polynomial Mixer"
(arXiv 2604.06129). `aggregate` alone, on any features, also serves the layer of arXiv 2411.12663.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .. import dispatch
from ..compat import vary
from . import pallas_gpu
from .aggregate import aggregate, counts, repeat_frames, rows_from_sums, runs
from .operands import Operands, prepare, unable
from .pallas_gpu import poly_mix_gpu
from .pallas_tpu import poly_mix_tpu
from .projected import projected_sums
from .reference import activation, poly_mix_reference
from .rope import Rotation, rope_frequencies, rope_rotation, rotate
from .segments import poly_mix_segments, segment_means
from .state import PolyState, init_state, merge_states
from .xla import poly_mix_xla, polynomial

IMPLEMENTATIONS = {
    "reference": poly_mix_reference,
    "xla": poly_mix_xla,
    "pallas_gpu": poly_mix_gpu,
    "pallas_tpu": poly_mix_tpu,
}


def poly_mix(
    h: Array,
    coeff: Array,
    *,
    weights: Array | None = None,
    causal: bool = False,
    frames: Sequence[int] | None = None,
    query_weights: Array | None = None,
    rotation: Rotation | None = None,
    state: PolyState | None = None,
    dtype: Any = None,
    implementation: str | None = None,
) -> tuple[Array, PolyState | None]:
    """a_r = sum_n w_rn R_n p(h_n) / sum_n w_rn,  p(h) = sum_j c_j act(h)^j,  j = 1 .. k.

    act(h) = clamp(leaky_relu(h, 0.01), -0.1, 6), channel by channel; R_n rotates by position. Which
    tokens a row sees: all (one row), `causal`, `frames` (block-causal), `query_weights`.

    Args:
        h: [B, N, E] projected tokens. Polynomials are evaluated in float32 whatever h is (6^7 is
            more than float16 holds), in float64 for float64.
        coeff: [E, k] coefficients; column j - 1 multiplies the power j. Read as float32.
        weights: [B, N] (or [1, N]) weight of each token, bool, integer or float: 0 for padding,
            where h may be NaN. None means 1.
        causal: row n sees the tokens up to n; N rows.
        frames: lengths of the F frames in which the tokens come, adding up to N: row f sees the
            frames up to f; F rows, one per frame (`repeat_frames` makes one per token).
        query_weights: [B, M, N] (or [1, M, N]) weight of token n for query m; M rows. By a matmul,
            so quadratic; alone, without weights, causal, frames and state.
        rotation: angles [N, A, K] or [B, N, A, K] of `rope_rotation`, 2 A K = E; the features are
            rotated before they are summed.
        state: mean and count of the tokens before the first one; None is none.
        dtype: of the rows; None means h's. Sums, counts and the state are float32 in any case.
        implementation: None (best available), "reference" (mask matrices), "xla", "pallas_gpu"
            (bfloat16, float16, float32; means and causal rows of E = 512, 768, ..), "pallas_tpu"
            (no rotation, no query_weights, frames of one length), or "pallas" for this device's
            kernel.

    Returns:
        rows [B, R, E] with R = 1, N, F or M, 0 where a row sees no weight; and the state after the
        last token, to go on from (None with query_weights). Gradients go to h, coeff and the
        state's mean; weights, counts and angles are constants.

    Raises:
        ValueError: shapes or forms of masks that do not fit together, or an implementation that
            does not exist here.
    """
    frames = None if frames is None else tuple(int(length) for length in frames)
    operands = prepare(h, coeff, weights, rotation, state, query_weights, causal, frames)
    name = dispatch.resolve(
        "poly_mix", implementation, IMPLEMENTATIONS, x=operands.h, channels=h.shape[2],
        unable=_unable(operands, causal, frames),
    )  # fmt: skip
    out_dtype = h.dtype if dtype is None else jnp.dtype(dtype)
    return IMPLEMENTATIONS[name](operands, causal, frames, out_dtype)


def gated_causal_mix(
    h: Array,
    coeff: Array,
    gate: Array,
    *,
    weights: Array | None = None,
    state: PolyState | None = None,
    dtype: Any = None,
    implementation: str | None = None,
) -> tuple[Array, PolyState | None]:
    """s_n . a_n for the causal rows a of `poly_mix`: what the output matmul of a layer reads.

    Args:
        gate: [B, N, H] one number per token and head, or per channel (H = E); H divides E.
        h, coeff, weights, state, dtype, implementation: as for `poly_mix`. The kernel never writes
            the rows, unless the heads do not fit its tiles.

    Returns:
        [B, N, E] in `dtype`, and the state after the last token.

    Raises:
        ValueError: as `poly_mix`; or a gate that does not fit.
    """
    heads = gate.shape[-1] if gate.ndim == 3 else 0
    if gate.shape[:2] != h.shape[:2] or not heads or h.shape[2] % heads:
        raise ValueError(f"gate has shape {gate.shape}, expected {h.shape[:2]} and heads of E")
    out_dtype = h.dtype if dtype is None else jnp.dtype(dtype)
    operands = prepare(h, coeff, weights, None, state, None, True, None)
    name = dispatch.resolve(
        "poly_mix", implementation, IMPLEMENTATIONS, x=operands.h, channels=h.shape[2],
        unable=_unable(operands, True, None),
    )  # fmt: skip
    if name == "pallas_gpu" and pallas_gpu.unable(operands, True, None, gate) is None:
        return poly_mix_gpu(operands, True, None, out_dtype, vary(gate, operands))
    rows, last = IMPLEMENTATIONS[name](operands, True, None, out_dtype)
    shape = (*gate.shape, h.shape[2] // heads)
    return (gate[..., None].astype(out_dtype) * rows.reshape(shape)).reshape(h.shape), last


def projected_mean(
    x: Array,
    kernel: Array,
    coeff: Array,
    *,
    weights: Array | None = None,
    state: PolyState | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array, PolyState]:
    """The mean of `poly_mix` for h = x W_h, and x W_s, with [W_h, W_s] one matrix.

    As two matmuls and `poly_mix`, but the gradients of both products lie side by side, so that
    those of x and W take one matmul each.

    Args:
        x: [B, N, d], finite also at weight 0: it is multiplied by gradients of 0.
        kernel: [d, E + S], W_h first; of x's dtype.
        coeff, weights, state, implementation: as for `poly_mix`.

    Returns:
        the row [B, 1, E] in at least float32, x W_s [B, N, S] and the state.

    Raises:
        ValueError: as `poly_mix`.
    """
    shape = (*x.shape[:2], coeff.shape[0])
    like = jnp.broadcast_to(jnp.zeros((), x.dtype), shape)  # for its shape: never computed
    _, coeff, weights, _, state, _ = prepare(like, coeff, weights, None, state, None, False, None)
    operands = Operands(jax.ShapeDtypeStruct(shape, x.dtype), coeff, weights, None, state, None)
    name = dispatch.resolve(
        "poly_mix", implementation, IMPLEMENTATIONS, x=x, channels=coeff.shape[0],
        unable=_unable(operands, False, None),
    )  # fmt: skip
    x, kernel, coeff, weights, state = vary(
        everything := (x, kernel, coeff, weights, state), everything
    )
    whole = (kernel.shape[1] - coeff.shape[0]) % 8 == 0  # rows of whole 16 bytes
    if not (name == "xla" or name == "pallas_gpu" and whole):
        h = jnp.dot(x, kernel[:, : coeff.shape[0]])
        operands = prepare(h, coeff, weights, None, state, None, False, None)
        rows, state = IMPLEMENTATIONS[name](operands, False, None, coeff.dtype)
        return rows, jnp.dot(x, kernel[:, coeff.shape[0] :]), state
    sums, beside = projected_sums(x, kernel, coeff, weights, name == "pallas_gpu")
    count = counts(x.shape[1], weights, False, shape[1:2], coeff.dtype)
    rows, state = rows_from_sums(sums, count, state)
    return rows, beside, state


def _unable(operands, causal, frames):
    return unable(operands, frames) | {"pallas_gpu": pallas_gpu.unable(operands, causal, frames)}


__all__ = [
    "IMPLEMENTATIONS",
    "PolyState",
    "Rotation",
    "activation",
    "aggregate",
    "gated_causal_mix",
    "init_state",
    "merge_states",
    "poly_mix",
    "poly_mix_segments",
    "polynomial",
    "projected_mean",
    "repeat_frames",
    "rope_frequencies",
    "rope_rotation",
    "rotate",
    "runs",
    "segment_means",
]
