"""SSD with the time axis split over a mesh axis: one exchange of states, then the local op."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..compat import vary
from ..matmul import matmul
from . import prepare, ssd
from .xla import pass_states


def _summary(x, a, dt, B, resets, reverse):
    """What the shard does to a state: log of its decay [B, H], closed [B], own state [B, H, P, N].

    Exponents are sums of a from a step to the end (the start, if reversed), never differences.
    """
    total = jnp.sum(a, axis=1)
    zero = jnp.zeros_like(a[:, :1])
    beyond = jnp.concatenate([zero, a[:, :-1]] if reverse else [a[:, 1:], zero], axis=1)
    beyond = lax.cumsum(beyond, axis=1, reverse=not reverse)
    weight = jnp.exp(jnp.minimum(beyond, 0)) * dt
    closed = jnp.zeros(x.shape[:1], bool)
    if resets is not None:
        counts = lax.cumsum(resets.astype(jnp.int32), axis=1, reverse=not reverse)
        weight = jnp.where((counts == resets)[..., None], weight, 0)  # no reset after the step
        closed = jnp.any(resets, axis=1)
    batch, t_len, heads, _ = x.shape
    scaled = (x * weight[..., None]).astype(x.dtype)
    scaled = scaled.reshape(batch, t_len, B.shape[2], -1, x.shape[-1])
    own = matmul("btgkp,btgn->bgkpn", scaled, B.astype(x.dtype))
    return total, closed, own.reshape(batch, heads, *own.shape[3:])


def ssd_sharded(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    *,
    axis_name: str,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk: int = 128,
    state: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """`ssd` inside `jax.shard_map`, time split over the mesh axis `axis_name` in equal shards.

    Every shard sends its decay exp(A sum dt) and its last state from zero to all others (one
    all-gather of [B, H, P, N] float32), combines those before it into the state it starts from, and
    runs the op. All mesh axes must be manual; made for `check_vma=True`.

    Args:
        axis_name: the mesh axis; shard i holds steps i T .. (i+1) T - 1.
        state: [B, H, P, N] global initial state, the same on all shards (with `reverse` it enters
            at the right end of the last shard).
        The others are local parts of the arguments of `ssd`.

    Returns:
        local y [B, T, H, P], and the global final state, the same on all shards.
    """
    acc = prepare.wide(x.dtype)
    steps = prepare.activate(dt, dt_bias, dt_softplus, dt_limit).astype(acc)
    operands = (x, steps * A.astype(acc), steps, B, resets)
    summarise = jax.checkpoint(lambda operands: _summary(*operands, reverse))
    summary = vary(summarise(vary(operands, operands)), frozenset({axis_name}))
    log_decay, closed, own = (lax.all_gather(v, axis_name, axis=1) for v in summary)
    first = None
    if state is not None:
        first = vary(state.astype(acc), own)[:, :, None]
    entering, _ = pass_states(
        log_decay[..., None], closed, own[:, :, :, None], first, reverse=reverse
    )
    index = lax.axis_index(axis_name)
    entering = lax.dynamic_index_in_dim(entering, index, axis=1, keepdims=False)[:, :, 0]
    y, last = ssd(
        x, dt, A, B, C, D, z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
        chunk=chunk, state=entering, resets=resets, reverse=reverse, implementation=implementation,
    )  # fmt: skip
    end = 0 if reverse else lax.axis_size(axis_name) - 1
    return y, lax.psum(jnp.where(index == end, last, 0), axis_name)
