"""The linear scan with time split over a mesh axis: one exchange of summaries each way.

Shard i's steps together are one step (P_i, L_i): the product of its decays and its last state from
zero. These are gathered, the state that enters a shard is the combination of the shards before
it, and the op runs from there. The backward pass is the same, against time: its summaries are
conj(P_i) and the gradient that leaves the shard when none enters it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .. import dispatch
from ..compat import vary, varying_axes
from . import pallas_gpu, pallas_tpu, xla
from .operands import prepare, unable
from .pairs import Parts, add, mul

# implementation -> its forward and backward pass, as `with_gradient` takes them, and its summary
PASSES = {
    "xla": (xla.scan_forward, xla.scan_backward, xla.scan_summary),
    "pallas_tpu": (pallas_tpu.scan_forward, pallas_tpu.scan_backward, xla.scan_summary),
    "pallas_gpu": (pallas_gpu.scan_forward, pallas_gpu.scan_backward, pallas_gpu.scan_summary),
}


def linear_scan_sharded(
    a: Any,
    x: Any,
    *,
    axis_name: str,
    state: Any = None,
    resets: Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Any, Any]:
    """`linear_scan` inside a `shard_map` (all axes manual, check_vma=True) that splits time.

    Args:
        a, x, resets: this device's T/n steps: shard i of the mesh axis holds the i-th n-th.
        axis_name: mesh axis over which time is split.
        state: [B, D] state before the first step of all, the same on all shards; None is zero.
        reverse, implementation: as for `linear_scan`; there is no sharded "reference".

    Returns:
        h of this device's steps, and the state after the last step of all, equal on all shards.
        One all_gather of 2 B D float32 numbers a shard forwards, one backwards.
    """
    paired = isinstance(x, (tuple, list))
    operands = prepare(a, x, state, resets, None)
    operands = vary(operands, varying_axes(operands) | {axis_name})
    problems = unable(operands[2])
    one = operands[1][0]
    name = dispatch.resolve(
        "linear_scan", implementation, PASSES, unable=problems, x=one, channels=one.shape[2]
    )
    passes = PASSES[name]
    h, last = _scan(axis_name, passes, reverse, *operands)
    place, count = _place(axis_name, reverse)
    last = tuple(lax.psum(jnp.where(place == count - 1, p, 0), axis_name) for p in last)
    return (h, last) if paired else (h[0], last[0])


def _place(axis_name: str, reverse: bool) -> tuple[Array, int]:
    """This shard's place in the order of processing, and the number of shards."""
    count, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    return (count - 1 - index if reverse else index), count


def _entering(product: Parts, leaving: Parts, first: Parts, axis_name: str, reverse: bool) -> Parts:
    """What enters this shard: the steps (product, leaving) of those before it, from `first`."""
    place, count = _place(axis_name, reverse)
    steps = lax.all_gather(jnp.stack([*product, *leaving]), axis_name)

    def apply(value, now):
        at, step = now
        parts = tuple(step)
        after = add(mul(parts[: len(value)], value), parts[len(value) :])
        return tuple(jnp.where(at < place, n, v) for n, v in zip(after, value, strict=True)), None

    steps = jnp.flip(steps, 0) if reverse else steps
    return lax.scan(apply, first, (jnp.arange(count), steps))[0]


def _forward(axis_name, passes, reverse, a, x, state):
    summary = passes[2](a, x, reverse, adjoint=False)
    enter = _entering(*summary, state, axis_name, reverse)
    return passes[0](a, x, enter, reverse), (a, enter)


def _scan_only(*args):
    return _forward(*args)[0]


def _rule_forward(*args):
    (h, last), (a, enter) = _forward(*args)
    return (h, last), (a, h, enter)


def _rule_backward(axis_name, passes, reverse, saved, cotangents):
    a, h, enter = saved
    ct, ct_last = cotangents
    # s_t = conj(a_t) (ct_t + s_{t+1}) is what leaves step t, against time; ct_last enters last.
    product, leaving = passes[2](a, ct, not reverse, adjoint=True)
    leaving = add(leaving, mul(product, ct_last))
    zero = jax.tree.map(jnp.zeros_like, enter)
    ct_last = add(ct_last, _entering(product, leaving, zero, axis_name, not reverse))
    da, dx, dstate = passes[1](a, h, enter, ct, ct_last, reverse)
    first = _place(axis_name, reverse)[0] == 0
    return da, dx, tuple(jnp.where(first, part, 0) for part in dstate)


_scan = jax.custom_vjp(_scan_only, nondiff_argnums=(0, 1, 2))
_scan.defvjp(_rule_forward, _rule_backward)
