"""What the dual form of Mamba-2 keeps of the tokens so far, laid out to be read in one stream.

Heads lie in blocks of K, at most 8, of one group, so that a block's tokens are one piece of memory:
a kernel reads whole lines of it, and a matrix product makes a block of heads out of it at once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

HEADS = 8  # of a block, at most


class DualCache(NamedTuple):
    """S slots of tokens, those from 0 on in use; R rows, J = H/K blocks of K heads.

    Attributes:
        x: [R, J, S, K P] inputs, after convolution and activation.
        B: [R, S, G, N], in x's dtype.
        scale: [R, J, S, K] float32, log dt_s - cs_s: the token's weight, but for what follows it.
        cs: [R, H] float32, the sum of dt A over all tokens so far, the last one included.
    """

    x: Array
    B: Array
    scale: Array
    cs: Array

    @property
    def sizes(self) -> dict[str, int]:
        """R, J, S, K, H, P, G, N."""
        rows, blocks, slots, per = self.scale.shape
        width = self.x.shape[-1] // per
        groups, states = self.B.shape[2:]
        heads = blocks * per
        return dict(R=rows, J=blocks, S=slots, K=per, H=heads, P=width, G=groups, N=states)


def block_heads(heads: int, groups: int) -> int:
    """K, the heads of a block: the most out of 8, 4, 2, 1 that divide the heads of a group."""
    return next(k for k in (HEADS, 4, 2, 1) if heads // groups % k == 0)


def init_cache(
    rows: int, slots: int, heads: int, width: int, groups: int, states: int, dtype
) -> DualCache:
    """An empty cache: H = `heads` of P = `width`, N = `states`; x and B in `dtype`.

    Raises:
        ValueError: groups do not divide heads.
    """
    if heads % groups:
        raise ValueError(f"{heads} heads are not a multiple of {groups} groups")
    per = block_heads(heads, groups)
    blocks = heads // per
    return DualCache(
        jnp.zeros((rows, blocks, slots, per * width), dtype),
        jnp.zeros((rows, slots, groups, states), dtype),
        jnp.zeros((rows, blocks, slots, per), jnp.float32),
        jnp.zeros((rows, heads), jnp.float32),
    )


def append(cache: DualCache, x: Array, dt: Array, a: Array, B: Array, index: Array) -> DualCache:
    """The cache with one token more, in slot `index` (a scalar), updated in place under jit.

    Args:
        x: [R, H, P].
        dt: [R, H] step sizes, activated, >= 0 (0 makes a token that nobody sees).
        a: [R, H] dt A, <= 0.
        B: [R, G, N].
    """
    by_block = lambda v: v.reshape(v.shape[0], cache.x.shape[1], 1, -1)
    put = lax.dynamic_update_slice_in_dim
    cs = cache.cs + a.astype(jnp.float32)
    scale = jnp.log(dt.astype(jnp.float32)) - cs
    return DualCache(
        put(cache.x, by_block(x).astype(cache.x.dtype), index, 2),
        put(cache.B, B[:, None].astype(cache.B.dtype), index, 1),
        put(cache.scale, by_block(scale), index, 2),
        cs,
    )


def resize(cache: DualCache, slots: int) -> DualCache:
    """The cache with more slots, or with the first ones only."""

    def fit(v, axis):
        if slots <= v.shape[axis]:
            return lax.slice_in_dim(v, 0, slots, axis=axis)
        pads = [(0, 0)] * v.ndim
        pads[axis] = 0, slots - v.shape[axis]
        return jnp.pad(v, pads)

    return DualCache(fit(cache.x, 2), fit(cache.B, 1), fit(cache.scale, 2), cache.cs)
