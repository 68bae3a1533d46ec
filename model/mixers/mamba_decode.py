"""Mamba token by token: states that a step updates in place, and the two forms of Mamba-2's step.

A step is bound by the bytes it moves. The recurrent form reads and writes the state, 2 H P N
numbers per row. The dual form keeps what the state is made of and only reads it (arXiv 2405.21060,
section 3, for one query):

    y_t = sum_{s<=t} exp(cs_t - cs_s) (C_t . B_s) dt_s x_s + D x_t,      cs_t = sum_{j<=t} dt_j A

that is H P + G N + H numbers per row and token: less traffic as long as t is below about 2 N P H /
(H P + G N + H), 240 tokens for N = 128 and P = 64.

Both keep the convolution's window as a ring, input number t in slot t mod (W-1), so that a step
writes one slot instead of moving them all. All rows have read equally many tokens of one document.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ...kernels_pallas.ssd.prepare import activate, gate
from ...kernels_pallas.ssd.xla import dot

CACHES = ("recurrent", "dual")


class RecurrentCache(NamedTuple):
    """What `Mamba1.step` and `Mamba2.step` carry from token to token.

    Attributes:
        conv: [B, W-1, C] ring of the convolution's last inputs.
        ssm: state of the recurrence, [B, D, N] (Mamba-1) or [B, H, P, N] (Mamba-2), in any dtype.
        index: [] int32 tokens read.
    """

    conv: Array
    ssm: Array
    index: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DualCache:
    """What `Mamba2.step` carries in the dual form; K heads lie together, in wide rows.

    Attributes:
        conv: [B, W-1, C] ring of the convolution's last inputs.
        x: [B, H/K, S, K P] inputs of the state-space part, in slot s those of token s.
        b: [B, S, G, N] B of the tokens.
        weight: [B, H, S] float32 log dt_s - cs_s; -inf in empty slots, which so count for nothing.
        decay: [B, H] float32 cs of the last token.
        index: [] int32 tokens read.
        length: slots that a step reads, at least as many as tokens have been read with it. It is
            static: sample in pieces and raise it from one to the next (`with_length`).
    """

    conv: Array
    x: Array
    b: Array
    weight: Array
    decay: Array
    index: Array
    length: int = dataclasses.field(metadata={"static": True})


def with_length(cache, length: int):
    """`cache`, any pytree, in which every `DualCache` reads `length` slots."""
    is_dual = lambda node: isinstance(node, DualCache)
    change = lambda n: dataclasses.replace(n, length=length) if is_dual(n) else n
    return jax.tree.map(change, cache, is_leaf=is_dual)


def heads_together(heads: int) -> int:
    """K: the largest divisor of the number of heads up to 8, the width of a tensor core's tile."""
    return max(k for k in range(1, 9) if heads % k == 0)


def init_dual(
    batch: int, max_length: int, heads: int, headdim: int, groups: int, d_state: int, dtype
) -> dict[str, Array]:
    """The fields x, b, weight and decay of an empty `DualCache` for `max_length` tokens."""
    together = heads_together(heads)
    return {
        "x": jnp.zeros((batch, heads // together, max_length, together * headdim), dtype),
        "b": jnp.zeros((batch, max_length, groups, d_state), dtype),
        "weight": jnp.full((batch, heads, max_length), -jnp.inf, jnp.float32),
        "decay": jnp.zeros((batch, heads), jnp.float32),
    }


def conv_step(
    x: Array, weight: Array, bias: Array | None, window: Array, index: Array | None = None
) -> tuple[Array, Array]:
    """One token of `causal_conv1d` with SiLU.

    Args:
        x: [B, C]. weight: [W, C]. bias: [C] or None.
        window: [B, W-1, C] the inputs before: oldest first, or with `index` a ring.
        index: [] int32 number of this input, in a ring.

    Returns:
        y [B, C] in x's dtype, accumulated in float32, and the new window in its own dtype.
    """
    before = weight.shape[0] - 1
    past = weight[:before]
    if index is not None and before:
        slot = index % before
        # Slot j holds input number index - 1 - (slot - 1 - j) mod W-1; tap 0 meets the oldest.
        twice = jnp.concatenate([past, past])
        past = lax.dynamic_slice_in_dim(twice, (before - slot) % before, before)
    total = weight[before] * x.astype(jnp.float32)
    if bias is not None:
        total = total + bias
    for j in range(before):
        total = total + past[j] * window[:, j].astype(jnp.float32)
    new = x.astype(window.dtype)[:, None]
    if index is None:
        window = jnp.concatenate([window[:, 1:], new], axis=1) if before else window
    elif before:
        window = lax.dynamic_update_slice_in_dim(window, new, slot, axis=1)
    return jax.nn.silu(total).astype(x.dtype), window


def dual_step(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array,
    z: Array | None = None,
    *,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    cache: DualCache,
) -> tuple[Array, DualCache]:
    """`ssd_step` in the dual form: the same arguments, but for a cache instead of the state.

    Args:
        cache: of the tokens before; its `length` must exceed its `index`.

    Returns:
        y [B, H, P] in x's dtype and the cache with the token in it, its window as it was. Weights
        and sums are float32; the product with the inputs takes operands in the cache's dtype and
        accumulates in float32.
    """
    batch, heads, headdim = x.shape
    groups, together, length = B.shape[1], cache.x.shape[3] // headdim, cache.length
    blocks = heads // together
    put = lambda whole, new, axis: lax.dynamic_update_slice_in_dim(
        whole, jnp.expand_dims(new, axis).astype(whole.dtype), cache.index, axis
    )
    dt = activate(dt, dt_bias, dt_softplus, dt_limit)
    decay = cache.decay + dt * A
    new = dataclasses.replace(
        cache,
        x=put(cache.x, x.reshape(batch, blocks, together * headdim), 2),
        b=put(cache.b, B, 1),
        weight=put(cache.weight, jnp.log(dt) - decay, 2),
        decay=decay,
        index=cache.index + 1,
    )
    # C . B and the weights are small; the inputs are what counts. Heads that lie together are
    # multiplied with the weights of all K of them, and each takes its own part: a matrix product
    # that reads every input once, where K matrix-vector products would be slow.
    seen = new.b[:, :length].astype(jnp.float32)
    scores = jnp.einsum("bgn,bsgn->bgs", C.astype(jnp.float32), seen)
    weights = jnp.exp(decay[..., None] + new.weight[:, :, :length])
    weights = weights.reshape(batch, groups, -1, length) * scores[:, :, None]
    weights = weights.reshape(batch, blocks, together, length)
    parts = dot("bjks,bjsc->bjkc", weights.astype(new.x.dtype), new.x[:, :, :length])
    parts = parts.reshape(batch, blocks, together, together, headdim)
    own = jnp.eye(together, dtype=bool)[:, :, None]
    y = jnp.sum(jnp.where(own, parts, 0), axis=2, dtype=jnp.float32).reshape(x.shape)
    y = y + D.reshape(heads, -1) * x.astype(jnp.float32)
    return (y.astype(x.dtype) if z is None else gate(y, z.astype(x.dtype))), new
