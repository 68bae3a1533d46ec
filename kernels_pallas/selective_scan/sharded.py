"""Selective scan with the time axis split over devices."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from ..compat import vary
from . import selective_scan
from .reference import step_size


def selective_scan_sharded(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    *,
    axis_name: str,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    state: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """`selective_scan` inside `jax.shard_map` with time split over the mesh axis `axis_name`.

    Every device holds one of the equal, ordered parts of the sequence. It summarises its part by
    the decay exp(A sum_t dt_t) (0 if the part has a reset) and the last state from a zero start,
    gathers everyone's summaries, [B, D, N] twice from each, joins those before its own into its
    entering state and runs the op from there.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, resets, reverse, implementation: as in
            `selective_scan`, for this device's part of the sequence.
        axis_name: mesh axis that splits the sequence; all axes of the mesh must be manual.
        state: [B, D, N] before the first step of the whole sequence (after its last one with
            `reverse`), the same on all devices of the axis.

    Returns:
        this device's part of the output, and the state after the whole sequence, the same on all
        devices of the axis.
    """
    options = {
        "delta_bias": delta_bias,
        "delta_softplus": delta_softplus,
        "resets": resets,
        "reverse": reverse,
        "implementation": implementation,
    }
    _, last = selective_scan(u, delta, A, B, C, **options)
    decay = jnp.exp(step_size(delta, delta_bias, delta_softplus).sum(1)[..., None] * A)
    if resets is not None:
        decay = jnp.where(resets.any(1)[:, None, None], 0, decay)
    decays, lasts = (lax.all_gather(x, axis_name) for x in (decay.astype(last.dtype), last))
    me, shards = lax.axis_index(axis_name), decays.shape[0]
    order = range(shards)[:: -1 if reverse else 1]
    entering = jnp.zeros_like(last) if state is None else vary(state.astype(last.dtype), last)
    for shard in order[:-1]:
        before = shard > me if reverse else shard < me
        entering = jnp.where(before, decays[shard] * entering + lasts[shard], entering)
    out, leaving = selective_scan(u, delta, A, B, C, D, z, state=entering, **options)
    return out, lax.psum(jnp.where(me == order[-1], leaving, 0), axis_name)
