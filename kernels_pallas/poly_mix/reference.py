"""The definition: powers by repeated multiplication, masks as matrices."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .aggregate import seen_tokens, select_seen
from .operands import Operands
from .rope import rotate
from .state import PolyState


def activation(h: Array) -> Array:
    """clamp(leaky_relu(h, 0.01), -0.1, 6); slope 1 on [0, 6], 0.01 on [-10, 0), else 0; NaN stays.

    The intervals are closed, which matters in bfloat16, where 6 and -10 occur: so it is a selection
    and no `clip`, whose derivative at a tie is a half.
    """
    return jnp.where(h < -10, -0.1, jnp.where(h < 0, 0.01 * h, jnp.where(h > 6, 6.0, h)))


def poly_mix_reference(operands: Operands, causal: bool, frames, out_dtype):
    """Rows and state of `poly_mix` by one matmul with the matrix of all weights [B, R, N]."""
    h, coeff, weights, rotation, state, query_weights = operands
    batch, n, _ = h.shape
    acc = coeff.dtype
    h = select_seen(h, seen_tokens(weights, query_weights))
    a, power, p = activation(h.astype(acc)), 1.0, 0.0
    for j in range(coeff.shape[1]):
        power = power * a
        p = p + coeff[:, j] * power
    if rotation is not None:
        p = rotate(p, rotation)
    if query_weights is not None:
        matrix = query_weights.astype(acc)
    else:
        frames = (1,) * n if causal else (n,) if frames is None else frames
        sees = np.arange(n)[None] < np.cumsum(frames)[:, None]
        matrix = jnp.asarray(sees, acc)[None]
        if weights is not None:
            matrix = matrix * weights[:, None]
    matrix = lax.stop_gradient(jnp.broadcast_to(matrix, (batch, *matrix.shape[1:])))
    sums = jnp.einsum("brn,bne->bre", matrix, p, precision=lax.Precision.HIGHEST)
    count = jnp.sum(matrix, axis=2)
    if state is not None:
        before = lax.stop_gradient(state.count)[:, None]
        sums = sums + before[..., None] * state.mean[:, None]
        count = count + before
    rows = jnp.where(count[..., None] > 0, sums / jnp.where(count > 0, count, 1)[..., None], 0)
    last = None if query_weights is not None else PolyState(rows[:, -1], count[:, -1])
    return rows.astype(out_dtype), last
