"""Mamba token by token: states that a step updates in place, and the two forms of Mamba-2's step.

A step is bound by the bytes it moves. The recurrent form reads and writes the state, 2 H P N
numbers per row. The dual form keeps what the state is made of and only reads it (arXiv 2405.21060,
section 3, for one query):

    y_t = sum_{s<=t} exp(cs_t - cs_s) (C_t . B_s) dt_s x_s + D x_t,      cs_t = sum_{j<=t} dt_j A

that is about H P numbers per row and token: less traffic on average over up to 4 N tokens.

Both keep the convolution's window as a ring, input number t in slot t mod (W-1), so that a step
writes one slot instead of moving them all. All rows have read equally many tokens of one document.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ...kernels_pallas import ssd_decode

CACHES = ("recurrent", "dual")


class RecurrentCache(NamedTuple):
    """What `Mamba1.step` and `Mamba2.step` carry from token to token.

    Attributes:
        conv: [B, W-1, C] ring of the convolution's last inputs.
        ssm: state of the recurrence, [B, D, N] (Mamba-1) or [B, H, P, N] (Mamba-2), in any dtype.
        offset: [] int32 tokens read.
    """

    conv: Array
    ssm: Array
    offset: Array


class DualCache(NamedTuple):
    """What `Mamba2.step` carries in the dual form.

    Attributes:
        conv: [B, W-1, C] ring of the convolution's last inputs.
        tokens: what the recurrence has read, with a slot for every token.
        offset: [] int32 tokens read.
    """

    conv: Array
    tokens: ssd_decode.DualCache
    offset: Array


def dual_segments(cache: Any, total: int, piece: int) -> tuple[int, ...]:
    """Where to cut the decoding of `total` tokens so that few empty slots are read.

    Args:
        cache: a pytree of caches (or their shapes).
        piece: tokens between two cuts.

    Returns:
        Ends of the segments, the last one `total`; `resize` the cache to each end before its
        segment. Only (total,) if nothing in `cache` reads empty slots.
    """
    if has_kernel(cache) or not any(isinstance(node, DualCache) for node in _nodes(cache)):
        return (total,)
    return (*range(piece, total, piece), total)


def has_kernel(cache: Any) -> bool:
    """Whether every `DualCache` in a pytree of caches (or their shapes), and at least one, is read
    by a kernel that reads no empty slots."""
    found = [node for node in _nodes(cache) if isinstance(node, DualCache)]
    kinds = {ssd_decode.implementation_for(node.tokens) for node in found}
    return kinds == {"pallas_gpu"}


def resize(cache: Any, slots: int) -> Any:
    """`cache`, any pytree, with `slots` slots in every `DualCache` in it."""
    fit = lambda n: n._replace(tokens=ssd_decode.resize(n.tokens, slots))
    change = lambda node: fit(node) if isinstance(node, DualCache) else node
    return jax.tree.map(change, cache, is_leaf=lambda node: isinstance(node, DualCache))


def _nodes(cache):
    return jax.tree.leaves(cache, is_leaf=lambda node: isinstance(node, DualCache))


def conv_step(
    x: Array, weight: Array, bias: Array | None, window: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    """One token of `causal_conv1d` with SiLU.

    Args:
        x: [B, C]. weight: [W, C]. bias: [C] or None.
        window: [B, W-1, C] the inputs before: oldest first, or with `offset` a ring.
        offset: [] int32 inputs before this one, for a ring.

    Returns:
        y [B, C] in x's dtype, accumulated in float32, and the new window in its own dtype.
    """
    before = weight.shape[0] - 1
    past = weight[:before]
    if offset is not None and before:
        slot = offset % before
        # Slot j holds input number offset - 1 - (slot - 1 - j) mod W-1; tap 0 meets the oldest.
        twice = jnp.concatenate([past, past])
        past = lax.dynamic_slice_in_dim(twice, (before - slot) % before, before)
    total = weight[before] * x.astype(jnp.float32)
    if bias is not None:
        total = total + bias
    for j in range(before):
        total = total + past[j] * window[:, j].astype(jnp.float32)
    new = x.astype(window.dtype)[:, None]
    if offset is None:
        window = jnp.concatenate([window[:, 1:], new], axis=1) if before else window
    elif before:
        window = lax.dynamic_update_slice_in_dim(window, new, slot, axis=1)
    return jax.nn.silu(total).astype(x.dtype), window
