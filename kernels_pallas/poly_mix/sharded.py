"""The polynomial mixer with the tokens split over a mesh axis: one exchange of states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..compat import vary, varying_axes
from . import poly_mix
from .rope import Rotation
from .state import PolyState, merge_states, reciprocal


def poly_mix_sharded(
    h: Array,
    coeff: Array,
    *,
    axis_name: str,
    weights: Array | None = None,
    causal: bool = False,
    frames: Sequence[int] | None = None,
    rotation: Rotation | None = None,
    state: PolyState | None = None,
    dtype: Any = None,
    implementation: str | None = None,
) -> tuple[Array, PolyState]:
    """`poly_mix` inside a `shard_map` (all axes manual, check_vma=True) that splits the tokens.

    Args:
        h, weights, rotation: this device's N/n tokens: shard i holds the i-th n-th.
        axis_name: mesh axis over which the tokens are split.
        frames: lengths of this shard's frames, the same on all shards: no frame is cut.
        state: mean and count before the first token of all, the same on all shards.
        coeff, causal, dtype, implementation: as for `poly_mix`.

    Returns:
        the rows of this device's tokens or frames (the one row of all tokens without causal and
        frames), and the state after the last token of all; that row and the state are equal on all
        shards. An all_gather of E + 1 float32 numbers a row of the batch; h is read twice where
        there is more than one row.
    """
    options = {"weights": weights, "rotation": rotation, "implementation": implementation}
    _, own = poly_mix(h, coeff, **options)
    own = vary(own, varying_axes(own) | {axis_name})
    count = lax.psum(own.count, axis_name)
    part = own.count * reciprocal(vary(count, own))
    whole = PolyState(lax.psum(part[:, None] * own.mean, axis_name), count)
    whole = whole if state is None else merge_states(PolyState(*state), whole)
    out_dtype = h.dtype if dtype is None else jnp.dtype(dtype)
    if not causal and frames is None:
        return whole.mean[:, None].astype(out_dtype), whole
    all_own = jax.tree.map(lambda x: lax.all_gather(x, axis_name), own)
    before = jnp.arange(all_own.count.shape[0]) < lax.axis_index(axis_name)
    counts = jnp.where(before[:, None], all_own.count, 0)
    count = jnp.sum(counts, axis=0)
    mean = jnp.sum((counts * reciprocal(count))[..., None] * all_own.mean, axis=0)
    entering = PolyState(mean, count)
    if state is not None:
        entering = merge_states(PolyState(*state), entering)
    rows, _ = poly_mix(
        h, coeff, causal=causal, frames=frames, state=entering, dtype=out_dtype, **options
    )
    return rows, whole
