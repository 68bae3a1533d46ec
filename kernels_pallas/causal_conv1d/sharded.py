"""The causal convolution with time split over a mesh axis: a halo of W-1 inputs, one ppermute."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from ..compat import vary, varying_axes
from . import causal_conv1d, last_inputs


def causal_conv1d_sharded(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    axis_name: str,
    activation: str | None = None,
    state: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """`causal_conv1d` inside a `shard_map` (all axes manual, check_vma=True) that splits time.

    Args:
        x, resets: this device's T/n steps: shard i of the mesh axis holds the i-th n-th.
        axis_name: mesh axis over which time is split.
        state: [B, W-1, C] as for `causal_conv1d`, the same on all shards.
        weight, bias, activation, reverse, implementation: as for `causal_conv1d`.

    Returns:
        y of this device's steps, and the state after the last step of all, equal on all shards.

    Raises:
        ValueError: a shard holds fewer than W-1 steps; and what `causal_conv1d` raises.
    """
    batch, t_len, channels = x.shape
    before = weight.shape[0] - 1
    if t_len < before:
        raise ValueError(
            f"{t_len} steps on each shard of {axis_name!r} are fewer than the {before} inputs that "
            f"a convolution of {before + 1} taps needs from its neighbour; use fewer shards"
        )
    options = {"activation": activation, "reverse": reverse, "implementation": implementation}
    if state is None:
        state = jnp.zeros((batch, before, channels), x.dtype)
    count, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    x, state = vary((x, state.astype(x.dtype)), varying_axes((x, state, resets)) | {axis_name})
    leaving = last_inputs(x, jnp.zeros_like(state), resets, reverse=reverse)
    if before:  # ppermute takes no empty arrays
        step = -1 if reverse else 1
        pairs = [(i, i + step) for i in range(count) if 0 <= i + step < count]
        halo = lax.ppermute(leaving, axis_name, pairs)
        state = jnp.where(index == (count - 1 if reverse else 0), state, halo)
    y, _ = causal_conv1d(x, weight, bias, state=state, resets=resets, **options)
    final = 0 if reverse else count - 1
    return y, lax.psum(jnp.where(index == final, leaving, 0), axis_name)
