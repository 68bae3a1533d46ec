"""What happens to the operands of the polynomial mixer before an implementation sees them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ..compat import vary
from .aggregate import check_form
from .rope import Rotation
from .state import PolyState


class Operands(NamedTuple):
    """Checked operands, varying alike over mesh axes.

    Attributes:
        h: [B, N, E] in its own dtype; may hold NaN where no query sees the token.
        coeff: [E, k] in the accumulator's dtype (float32, or float64 for float64 h).
        weights: [B, N] in that dtype, or None. rotation: of `rope`, in that dtype, or None.
        state: in that dtype, or None. query_weights: [B or 1, M, N], or None.

    All but h, coeff and the state's mean are constants, without gradient.
    """

    h: Array
    coeff: Array
    weights: Array | None
    rotation: Rotation | None
    state: PolyState | None
    query_weights: Array | None


def prepare(
    h: Array,
    coeff: Array,
    weights: Array | None,
    rotation: Rotation | None,
    state: PolyState | None,
    query_weights: Array | None,
    causal: bool,
    frames: Any,
) -> Operands:
    """The operands, checked.

    Raises:
        ValueError: shapes, dtypes or forms of masks that do not fit together.
    """
    if h.ndim != 3 or 0 in h.shape or not jnp.issubdtype(h.dtype, jnp.floating):
        raise ValueError(f"h is {h.dtype} {h.shape}, expected a float array [B, N, E], none 0")
    batch, n, width = h.shape
    acc = jnp.promote_types(h.dtype, jnp.float32)
    if coeff.ndim != 2 or coeff.shape[0] != width or not coeff.shape[1]:
        raise ValueError(f"coeff has shape {coeff.shape}, expected ({width}, degree)")
    check_form(h, causal, frames, query_weights, weights, state)
    if state is not None:
        state = PolyState(*state)
        if state.mean.shape != (batch, width) or state.count.shape != (batch,):
            raise ValueError(
                f"state has shapes {state.mean.shape} and {state.count.shape}, expected "
                f"{(batch, width)} and {(batch,)}"
            )
        state = PolyState(state.mean.astype(acc), lax.stop_gradient(state.count.astype(acc)))
    if rotation is not None:
        rotation = Rotation(*(lax.stop_gradient(part.astype(acc)) for part in rotation))
        shape = rotation.cos.shape
        axes, pairs = shape[-2:]
        if shape[:-2] not in ((n,), (batch, n)) or 2 * axes * pairs != width:
            raise ValueError(
                f"rotation has shape {shape}, expected [{n}, A, K] or [{batch}, {n}, A, K] with "
                f"2 A K = {width}"
            )
    if weights is not None:
        weights = lax.stop_gradient(jnp.broadcast_to(weights.astype(acc), (batch, n)))
    operands = Operands(h, coeff.astype(acc), weights, rotation, state, query_weights)
    return vary(operands, operands)
