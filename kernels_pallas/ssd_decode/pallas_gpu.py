"""The read of the dual form on Hopper GPUs (Pallas Mosaic GPU): one stream over the tokens so far.

A program has one row and a few blocks of K heads, a warpgroup each. A tile of 16 tokens of a block
is one piece of memory, 16 K P numbers, and comes by one bulk copy; only tiles up to the index are
read. For each tile the warpgroup makes the weights

    w[s, h] = (C . B_s) exp2(log2(e) (cs_h + scale[s, h]))        0 beyond the index

float32, a thread each, and leaves them in shared memory; then it walks the tokens, a thread with
K P / 128 neighbouring channels of a head and their sums in registers. Nothing is summed over threads
but C . B_s. Tokens beyond the index in the last tile are selected away.

HBM bytes: n H P + n G N numbers of x and B and 4 n H bytes of weights a row, for n = index + 1
rounded up to 16; B is read H / (K x warpgroups) times, from the second time on out of the L2 cache.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import dispatch
from ..compat import gpu_kernel, gpu_load, out_like, vary
from .cache import DualCache

TILE = 16  # tokens of a copy: 8, 16 or 32
STAGES = 2  # tiles of a block in shared memory
BULK = True
WARPGROUPS = 2  # blocks of heads of a program, at most
_LOG2E = math.log2(math.e)


def unable(cache: DualCache) -> dict[str, str | None]:
    """What the kernel does not take of a cache, as `dispatch.resolve` wants it."""
    sizes, dtype, problem = cache.sizes, cache.x.dtype, None
    lane, rest = divmod(sizes["K"] * sizes["P"], 128)
    if dtype not in (jnp.bfloat16, jnp.float16) or cache.B.dtype != dtype:
        problem = f"x of {dtype} and B of {cache.B.dtype} (both must be of one 16-bit type)"
    elif rest or lane not in (2, 4, 8) or sizes["K"] % 4 or sizes["N"] % 64:
        problem = (
            f"blocks of K={sizes['K']} heads of P={sizes['P']} with N={sizes['N']} states "
            "(K of 4 or 8, K P of 256, 512 or 1024, N a multiple of 64)"
        )
    elif sizes["S"] % TILE:
        problem = f"{sizes['S']} slots (a multiple of {TILE})"
    return {"pallas_gpu": problem}


def _layouts(heads: int, width: int) -> tuple:
    """Who has what: of a token [K, P], of weights [16, K], of B [16, N]."""
    tiled = lambda tiles, warps, lanes: plgpu.Layout.TILED(plgpu.Tiling(tiles), warps, lanes, -1)
    lane = heads * width // 128  # channels of a thread
    if heads == 8:
        token = tiled(((8, width), (2, width), (lane,)), (-5,), (-3, -2))
    else:
        token = tiled(((4, width), (lane,)), (-3,), (-2,))
    rows = min(TILE, 16)  # at once, a quarter of them a warp
    lanes = 128 // rows  # of a row
    at_once, spare = 64 // lanes, lanes // heads
    tiles = (rows, 64), (rows // 4, 64)
    if spare == 1:
        weight = tiled(((rows, heads), (rows // 4, heads), (1,)), (-5,), (-3, -2))
        states = tiled((*tiles, (at_once,)), (-5,), (-3, -2))
    else:
        lanes = (-3, plgpu.Replicated(spare), -2)
        weight = tiled(((rows, heads), (rows // 4, heads), (1,)), (-5,), lanes)
        states = tiled((*tiles, (at_once * heads,), (at_once,)), (-6,), (-4, -3, -2))
    return token, weight, states


def _body(refs, smem, barriers, where, *, sizes, wgs, stages):
    """One warpgroup: all tokens of a block of heads."""
    x_ref, b_ref, scale_ref, cs_ref, c_ref, index_ref, y_ref = refs
    full, full_b, empty_b = barriers
    row, part, wg = where
    block = part * wgs + wg
    group = lax.div(block, sizes["J"] // sizes["G"])
    heads, width = sizes["K"], sizes["P"]
    token, weight, states = _layouts(heads, width)
    x_s, scale_s, w_s = (smem[k].at[wg] for k in ("x", "scale", "w"))
    b_s = smem["b"]

    # Whole pieces of memory, which need no description of the array as a window into one does.
    inside = plgpu.OOBFillMode.PROMISE_IN_BOUNDS if BULK else plgpu.OOBFillMode.ZEROS
    copy = functools.partial(plgpu.copy_gmem_to_smem, oob_mode=inside)

    def fetch(i, slot):
        at = pl.ds(i * TILE, TILE)
        barrier = full.at[wg * stages + slot]
        copy(x_ref.at[row, block, at], x_s.at[slot], barrier)
        copy(scale_ref.at[row, block, at], scale_s.at[slot], barrier)

    def fetch_b(i, slot):
        copy(b_ref.at[row, pl.ds(i * TILE, TILE), group], b_s.at[slot], full_b.at[slot])

    early = min(stages, sizes["S"] // TILE)  # does not wait for the index
    for i in range(early):
        fetch(i, i)
        pl.when(wg == 0)(functools.partial(fetch_b, i, i))
    index = jnp.minimum(index_ref[0], sizes["S"] - 1)
    tiles = lax.div(index, TILE) + 1
    cs = gpu_load(cs_ref.at[row, block], weight.reduce(0)) * _LOG2E
    c = gpu_load(c_ref.at[row, group], states.reduce(0)).astype(jnp.float32)

    def spread(v, shape, axis, layout):
        return plgpu.layout_cast(lax.broadcast_in_dim(v, shape, (axis,)), layout)

    at_tile = (TILE, heads)
    at_token = plgpu.broadcasted_iota(jnp.int32, (TILE, heads), 0, layout=weight)

    def one_tile(i, acc, masked):
        slot, parity = lax.rem(i, stages), lax.rem(i, 2)
        plgpu.barrier_wait(full_b.at[slot])
        plgpu.barrier_wait(full.at[wg * stages + slot])
        b = gpu_load(b_s.at[slot], states).astype(jnp.float32)
        scores = jnp.sum(b * spread(c, b.shape, 1, states), axis=1)
        if wgs > 1:
            plgpu.barrier_arrive(empty_b.at[slot])
        exponent = gpu_load(scale_s.at[slot], weight) * _LOG2E + spread(cs, at_tile, 1, weight)
        w = jnp.exp2(exponent) * spread(scores, at_tile, 0, weight)
        if masked:
            w = jnp.where(
                at_token + i * TILE <= index, w, plgpu.layout_cast(jnp.zeros_like(w), weight)
            )
        w_s.at[parity][...] = w
        plgpu.commit_smem()  # so all threads have read tile i - 1, and see the weights of tile i

        @pl.when(i > 0)
        def _():
            more = i - 1 + stages

            @pl.when(more < tiles)
            def _():
                there = lax.rem(more, stages)
                fetch(more, there)

                @pl.when(wg == 0)
                def _():
                    if wgs > 1:
                        plgpu.barrier_wait(empty_b.at[there])
                    fetch_b(more, there)

        for s in range(TILE):
            x = gpu_load(x_s.at[slot, s], token).astype(jnp.float32)
            if masked:
                inside = jnp.broadcast_to(i * TILE + s <= index, (heads, width))
                x = jnp.where(inside, x, plgpu.layout_cast(jnp.zeros_like(x), token))
            w = gpu_load(w_s.at[parity, s], token.reduce(1))
            acc = acc + x * spread(w, x.shape, 0, token)
        return acc

    acc = plgpu.layout_cast(jnp.zeros((heads, width), jnp.float32), token)
    last = tiles - 1
    acc = lax.fori_loop(0, last, lambda i, acc: one_tile(i, acc, False), acc)
    acc = one_tile(last, acc, True)
    y_ref.at[row, block][...] = acc
    for i in range(early):  # not wanted, but on its way

        @pl.when(i >= tiles)
        def _(i=i):
            plgpu.barrier_wait(full.at[wg * stages + i])
            plgpu.barrier_wait(full_b.at[i])


def ssd_decode_gpu(cache: DualCache, C: Array, index: Array) -> Array:
    """See `ssd_decode`; weights and sums are float32."""
    sizes, dtype = cache.sizes, cache.x.dtype
    rows, blocks, slots, heads = (sizes[k] for k in "RJSK")
    width, states = sizes["P"], sizes["N"]
    per_group = blocks // sizes["G"]
    wgs = max(w for w in range(1, WARPGROUPS + 1) if per_group % w == 0)
    stages = STAGES
    operands = (
        cache.x.reshape(rows, blocks, slots, heads, width),
        cache.B,
        cache.scale,
        cache.cs.reshape(rows, blocks, heads),
        C.astype(dtype),
        index.reshape(1),
    )

    def body(*refs):
        where = [lax.axis_index(name) for name in ("rows", "parts", "wg")]
        scratch = {
            "x": plgpu.SMEM((wgs, stages, TILE, heads, width), dtype),
            "b": plgpu.SMEM((stages, TILE, states), dtype),
            "scale": plgpu.SMEM((wgs, stages, TILE, heads), jnp.float32),
            "w": plgpu.SMEM((wgs, 2, TILE, heads), jnp.float32),
        }
        barriers = (
            plgpu.Barrier(num_arrivals=2, num_barriers=wgs * stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        )

        def scoped(smem, barriers):
            _body(refs, smem, barriers, where, sizes=sizes, wgs=wgs, stages=stages)

        pl.run_scoped(scoped, scratch, barriers, collective_axes="wg")

    numbers = rows * slots
    cost = pl.CostEstimate(
        flops=2 * numbers * blocks * heads * (width + 1),
        transcendentals=numbers * blocks * heads,
        bytes_accessed=sum(v.size * v.dtype.itemsize for v in operands),
    )
    y = gpu_kernel(
        body,
        out_type=out_like(cache.x, (rows, blocks, heads, width), jnp.float32),
        grid=(blocks // wgs, rows), grid_names=("parts", "rows"), num_threads=wgs, thread_name="wg",
        # Barriers are where they must be: `commit_smem` is one.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        cost_estimate=cost, interpret=dispatch.interpret("gpu"),
    )(*operands)  # fmt: skip
    return vary(y.reshape(rows, blocks * heads, width), operands)
