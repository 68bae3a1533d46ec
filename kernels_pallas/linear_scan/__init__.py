"""Linear scan: h_t = a_t h_{t-1} + x_t, real or complex-diagonal, the core of the state-space ops.

Elementwise over D channels (arXiv 2312.00752, section 3.3; the scan of pairs (a, x) with
(a2, x2) o (a1, x1) = (a1 a2, a2 x1 + x2)).
"""

from __future__ import annotations

from typing import Any

from jax import Array

from .. import dispatch
from ..time_axis import fill_invalid
from .operands import prepare, unable
from .pairs import combine
from .pallas_gpu import linear_scan_gpu
from .pallas_tpu import linear_scan_tpu
from .reference import linear_scan_reference
from .xla import linear_scan_xla

IMPLEMENTATIONS = {
    "reference": linear_scan_reference,
    "xla": linear_scan_xla,
    "pallas_tpu": linear_scan_tpu,
    "pallas_gpu": linear_scan_gpu,
}


def linear_scan(
    a: Any,
    x: Any,
    *,
    state: Any = None,
    resets: Array | None = None,
    lengths: Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Any, Any]:
    """h_t = a_t h_{t-1} + x_t over T steps, channel by channel.

    Args:
        a: [B, T, D] decays, or a pair (re, im) of such arrays, for complex a. Any values whose
            products over stretches of time stay finite. May be wider than x (float32 decays of
            bfloat16 inputs).
        x: inputs, shaped like a, a pair if a is one.
        state: [B, D] the state before the first step, float32, a pair if a is one; None is zero.
        resets: [B, T] bool: True where a new sequence begins, that is where no state enters.
        lengths: [B] int32 valid steps per row. What stands after them may be anything, NaN
            included: h is 0 there, gradients are 0, and the state passes through unchanged.
        reverse: the recurrence runs from T - 1 down to 0, h_t = a_t h_{t+1} + x_t; the state enters
            at the right end and leaves at the left, and a reset lets nothing in from the right.
        implementation: None (best available), "reference" (a loop over time), "xla"
            (associative scan), "pallas_tpu", "pallas_gpu", or "pallas" for this device's kernel.

    Returns:
        h like x, and the state after the last valid step like `state`. Products and sums are in
        float32 (float64 for float64 inputs), h is rounded once. The gradient of a uses the rounded
        h; gradients of pairs are those of the real and imaginary parts.

    Raises:
        ValueError: shapes that do not fit together, or an implementation that is not there or does
            not take such operands.
    """
    paired = isinstance(x, (tuple, list))
    operands = prepare(a, x, state, resets, lengths)
    problems = unable(operands[2])
    one = operands[1][0]
    name = dispatch.resolve(
        "linear_scan", implementation, IMPLEMENTATIONS, unable=problems, x=one,
        channels=one.shape[2],
    )  # fmt: skip
    h, last = IMPLEMENTATIONS[name](*operands, reverse)
    h = tuple(fill_invalid(part, lengths) for part in h)
    return (h, last) if paired else (h[0], last[0])


__all__ = ["IMPLEMENTATIONS", "combine", "linear_scan"]
