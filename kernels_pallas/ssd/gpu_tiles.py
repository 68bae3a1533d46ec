"""What the GPU kernels of SSD share: tiles in shared memory and registers, warpgroup products."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Q = 64  # steps per chunk
LOG2E = math.log2(math.e)
TILE = plgpu.Layout.WGMMA
ROW, COLUMN = TILE.reduce(0), TILE.reduce(1)  # indexed by column, by row of a tile


def tiled(*shape, dtype):
    """Shared memory in the layout that warpgroup products read."""
    lanes = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def load(ref, layout):
    """The array in shared memory, in registers in that layout."""
    return plgpu.layout_cast(ref[...], layout)


def load_wide(ref):
    """A tile in shared memory as float32 in registers."""
    return load(ref, TILE).astype(jnp.float32)


def zeros(*shape):
    """A float32 tile of zeros in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), TILE)


def across(v, shape):
    """A value per row, along the rows of a tile."""
    return lax.broadcast_in_dim(v, shape, (0,))


def down(v, shape):
    """A value per column, down the columns of a tile."""
    return lax.broadcast_in_dim(v, shape, (1,))


def positions():
    """Row and column of every element of a [Q, Q] tile."""
    return [plgpu.broadcasted_iota(jnp.int32, (Q, Q), axis, layout=TILE) for axis in (0, 1)]


def products(interpret, *sums):
    """For every (acc, (a, b), ...) of `sums` acc + a b + ..., issued together and awaited once.

    acc and the results are float32 in registers; a in registers or shared memory, or a function
    that makes it while the products before it run, b in shared memory.
    """
    if interpret:  # no accumulators with a value and no operands in registers there
        known = lambda v: v() if callable(v) else v
        value = lambda v: v if isinstance(v := known(v), jax.Array) else v[...]
        dot = lambda a, b: jnp.dot(value(a), value(b), preferred_element_type=jnp.float32)
        return [sum((dot(a, b) for a, b in pairs), acc) for acc, *pairs in sums]

    def issue(refs):
        for ref, (_, *pairs) in zip(refs, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(ref, a() if callable(a) else a, b)

    return list(pl.run_state(issue)(tuple(plgpu.ACC.init(acc) for acc, *_ in sums)))
