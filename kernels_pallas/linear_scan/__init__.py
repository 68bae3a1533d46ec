"""Linear scan: h_t = a_t h_{t-1} + x_t, real or complex-diagonal, the core of the state-space ops.

Elementwise over D channels (arXiv 2312.00752, section 3.3; the scan of pairs (a, x) with
(a2, x2) o (a1, x1) = (a1 a2, a2 x1 + x2)).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from .. import dispatch
from ..compat import vary
from ..time_axis import fill_invalid, spread
from .pairs import Parts, accumulator, combine
from .reference import linear_scan_reference
from .xla import linear_scan_xla

IMPLEMENTATIONS = {"reference": linear_scan_reference, "xla": linear_scan_xla}


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
        a: [B, T, D] decays (any values that keep h finite), or a pair (re, im) of such arrays, for
            complex a. May be wider than x (float32 decays of bfloat16 inputs).
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
        ValueError: shapes that do not fit together, or an implementation that is not there.
    """
    paired = isinstance(x, (tuple, list))
    a, x = _parts("a", a, paired), _parts("x", x, paired)
    if x[0].ndim != 3 or 0 in x[0].shape:
        raise ValueError(f"x has shape {x[0].shape}, expected [B, T, D], none of them 0")
    batch, t_len, width = x[0].shape
    for name, arrays, shape in (
        ("a", a, x[0].shape),
        ("x", x, x[0].shape),
        ("state", () if state is None else _parts("state", state, paired), (batch, width)),
        ("resets", () if resets is None else (resets,), (batch, t_len)),
        ("lengths", () if lengths is None else (lengths,), (batch,)),
    ):
        for array in arrays:
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    name = dispatch.resolve("linear_scan", implementation, IMPLEMENTATIONS)
    acc = accumulator(*a, *x)
    if state is None:
        state = (jnp.zeros((batch, width), acc),) * len(x)
    else:
        state = tuple(part.astype(acc) for part in _parts("state", state, paired))
    a, x = _rewrite(a, x, resets, lengths)
    a, x, state = vary((a, x, state), (a, x, state))
    h, last = IMPLEMENTATIONS[name](a, x, state, reverse)
    h = tuple(fill_invalid(part, lengths) for part in h)
    return (h, last) if paired else (h[0], last[0])


def _parts(name: str, value: Any, paired: bool) -> Parts:
    """(re, im) or (re,), each an array of one real dtype."""
    if isinstance(value, (tuple, list)) != paired or (paired and len(value) != 2):
        wanted = "a pair (re, im), as x is one" if paired else "an array, as x is one"
        raise ValueError(f"{name} is a {type(value).__name__}, expected {wanted}")
    parts = tuple(jnp.asarray(part) for part in (value if paired else (value,)))
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1 or not jnp.issubdtype(parts[0].dtype, jnp.floating):
        found = " and ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(f"{name} is {found}, expected one real floating-point dtype")
    return parts


def _rewrite(a: Parts, x: Parts, resets, lengths) -> tuple[Parts, Parts]:
    """Resets become a = 0, padding becomes a = 1 and x = 0: a step that changes nothing."""
    if resets is not None:
        a = tuple(jnp.where(spread(resets, part), 0, part) for part in a)
    if lengths is not None:
        a = tuple(fill_invalid(part, lengths, 1 - i) for i, part in enumerate(a))
        x = tuple(fill_invalid(part, lengths) for part in x)
    return a, x


__all__ = ["IMPLEMENTATIONS", "combine", "linear_scan"]
