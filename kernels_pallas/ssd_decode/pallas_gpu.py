"""The dual form on Hopper GPUs (Pallas Mosaic GPU): one stream over the tokens so far.

A program has one row and a few blocks of K heads, a warpgroup each. A tile of some tokens of a
block is one piece of memory and comes by one bulk copy; only tiles up to the index are read. For
each tile the warpgroup makes the weights

    w[s, h] = (C . B_s) exp2(log2(e) (cs_h + scale[s, h]))        0 beyond the index

in float32 and leaves them in shared memory. Then it walks the tokens, a thread with K P / 128
neighbouring channels of a head and their sums in registers: nothing but C . B_s is summed over
threads. Tokens beyond the index in the last tile are cleared.

A step also activates dt and puts the new token into the last tile in shared memory, in place of
whatever came for its slot, and into HBM, where nobody reads that slot before the next step.

HBM bytes a row, for n = index + 1 rounded up to a tile: n (H P + G N) numbers of x and B, and 4 n H
of scale. B is read once for the warpgroups of a program, again by others, then out of L2.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import dispatch
from ..compat import (
    gpu_kernel,
    gpu_kernel_in_place,
    gpu_load,
    gpu_store,
    interpret_mode,
    out_like,
    vary,
)
from ..selective_scan.fused import softplus_short
from .cache import DualCache

TILE = 16  # tokens of a copy: 8, 16 or 32
STAGES = 2  # tiles of a block in shared memory
WARPGROUPS = 3  # blocks of heads of a program, at most
PROGRAMS = 128  # at least, about one a multiprocessor, else fewer blocks each
_LOG2E = math.log2(math.e)


def unable(cache: DualCache) -> dict[str, str | None]:
    """What the kernel does not take of a cache, as `dispatch.resolve` wants it."""
    sizes, dtype, problem = cache.sizes, cache.x.dtype, None
    lane, rest = divmod(sizes["K"] * sizes["P"], 128)
    if dtype not in (jnp.bfloat16, jnp.float16) or cache.B.dtype != dtype:
        problem = f"x of {dtype} and B of {cache.B.dtype} (both must be of one 16-bit type)"
    elif rest or lane not in (2, 4, 8) or sizes["K"] % 4:
        problem = (
            f"blocks of {sizes['K']} heads of P={sizes['P']} (4 or 8 heads, 256, 512 or 1024 wide)"
        )
    elif sizes["N"] % 64 or 2 * sizes["G"] * sizes["N"] % sizes["P"]:
        problem = f"N={sizes['N']} states (a multiple of 64; 2 G N a multiple of P={sizes['P']})"
    elif sizes["S"] % TILE:
        problem = f"{sizes['S']} slots (a multiple of {TILE})"
    return {"pallas_gpu": problem}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a kernel is compiled for, besides its operands.

    Attributes:
        tile, stages, wgs: tokens of a copy, copies under way, blocks of heads of a program.
        on_gpu: not in the interpreter.
        step: whether there is a new token, with these dt_softplus and dt_limit.
    """

    tile: int
    stages: int
    wgs: int
    on_gpu: bool
    step: bool
    dt_softplus: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)


def _plan(sizes: dict[str, int], **step) -> _Plan:
    """The plan for a cache of such sizes."""
    per_group = sizes["J"] // sizes["G"]
    fits = [w for w in range(WARPGROUPS, 0, -1) if per_group % w == 0]
    fills = (w for w in fits if sizes["R"] * sizes["J"] >= PROGRAMS * w)
    on_gpu = not dispatch.interpret("gpu")
    return _Plan(TILE, STAGES, next(fills, 1), on_gpu, bool(step), **step)


def _layouts(tile: int, heads: int, width: int) -> tuple:
    """Who has what: of a token [K, P], of weights [tile, K], of B [tile, N]."""
    tiled = lambda tiles, warps, lanes: plgpu.Layout.TILED(plgpu.Tiling(tiles), warps, lanes, -1)
    lane = heads * width // 128  # channels of a thread
    if heads == 8:
        token = tiled(((8, width), (2, width), (lane,)), (-5,), (-3, -2))
    else:
        token = tiled(((4, width), (lane,)), (-3,), (-2,))
    rows = min(tile, 16)  # at once, a quarter of them a warp
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


def _body(plan, sizes, refs, smem, barriers, where):
    """One warpgroup: all tokens of a block of heads."""
    tile, stages, wgs = plan.tile, plan.stages, plan.wgs
    full, full_b, empty_b = barriers
    row, part, wg = where
    block = part * wgs + wg
    per_group = sizes["J"] // sizes["G"]
    group = lax.div(block, per_group)
    heads, width = sizes["K"], sizes["P"]
    token, weight, states = _layouts(tile, heads, width)
    a_head, a_state = weight.reduce(0), states.reduce(0)
    x_s, scale_s, w_s = (smem[k].at[wg] for k in ("x", "scale", "w"))
    b_s = smem["b"]
    # Whole pieces of memory, which need no description of the array as a window into one does.
    copy = functools.partial(plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    def fetch(i, slot):
        at = pl.ds(i * tile, tile)
        barrier = full.at[wg * stages + slot]
        copy(refs["x"].at[row, block, at], x_s.at[slot], barrier)
        copy(refs["scale"].at[row, block, at], scale_s.at[slot], barrier)

    def fetch_b(i, slot):
        at = pl.ds(i * tile, tile)
        copy(refs["B"].at[row, at, group], b_s.at[slot], full_b.at[slot])

    early = min(stages, sizes["S"] // tile)  # does not wait for the index
    for i in range(early):
        fetch(i, i)
        pl.when(wg == 0)(functools.partial(fetch_b, i, i))
    index = jnp.minimum(refs["index"][0], sizes["S"] - 1)
    tiles = lax.div(index, tile) + 1

    def spread(v, shape, axis, layout):
        return plgpu.layout_cast(lax.broadcast_in_dim(v, shape, (axis,)), layout)

    zeros = lambda shape, dtype, layout: plgpu.layout_cast(jnp.zeros(shape, dtype), layout)
    acc = zeros((heads, width), jnp.float32, token)
    if plan.step:
        new = _new_token(plan, sizes, refs, row, block, group)
        cs, c = new["cs"], new["C"]
        if "skip" in new:
            skip = new["skip"]
            skip = skip if skip.ndim == 2 else spread(skip, acc.shape, 0, token)
            acc = acc + new["x"].astype(jnp.float32) * skip
    else:
        cs = gpu_load(refs["cs"].at[row, block], a_head)
        c = gpu_load(refs["C"].at[row, group], a_state)
    cs, c = cs * _LOG2E, c.astype(jnp.float32)
    at_tile = (tile, heads)
    at_token = plgpu.broadcasted_iota(jnp.int32, at_tile, 0, layout=weight)

    def insert(slot, at):
        """The new token into the last tile, where something else came for it, and into HBM."""
        gpu_store(x_s.at[slot, at], new["x"])
        gpu_store(scale_s.at[slot, at], new["scale"])
        gpu_store(b_s.at[slot, at], new["B"])  # every warpgroup the same
        plgpu.commit_smem()  # also: all have read cs
        gpu_store(refs["x"].at[row, block, index], new["x"])
        gpu_store(refs["scale"].at[row, block, index], new["scale"])
        gpu_store(refs["cs"].at[row, block], new["cs"])

        @pl.when(lax.rem(block, per_group) == 0)
        def _():
            gpu_store(refs["B"].at[row, index, group], new["B"])

    def one_tile(i, acc):
        slot, parity = lax.rem(i, stages), lax.rem(i, 2)
        plgpu.barrier_wait(full_b.at[slot])
        plgpu.barrier_wait(full.at[wg * stages + slot])

        @pl.when(i == tiles - 1)
        def _():
            empty = zeros((heads, width), x_s.dtype, token)
            for s in range(1, tile):  # what a thread clears only itself will read
                pl.when(i * tile + s > index)(functools.partial(gpu_store, x_s.at[slot, s], empty))
            if plan.step:
                insert(slot, index - i * tile)

        b = gpu_load(b_s.at[slot], states).astype(jnp.float32)
        scores = jnp.sum(b * spread(c, b.shape, 1, states), axis=1)
        if wgs > 1:
            plgpu.barrier_arrive(empty_b.at[slot])
        exponent = gpu_load(scale_s.at[slot], weight) * _LOG2E + spread(cs, at_tile, 1, weight)
        w = jnp.exp2(exponent) * spread(scores, at_tile, 0, weight)
        inside = at_token + i * tile <= index
        gpu_store(w_s.at[parity], jnp.where(inside, w, zeros(at_tile, jnp.float32, weight)))
        plgpu.commit_smem()  # so all threads have read tile i - 1, and see the weights of tile i
        more = i - 1 + stages

        @pl.when((i > 0) & (more < tiles))
        def _():
            there = lax.rem(more, stages)
            fetch(more, there)

            @pl.when(wg == 0)
            def _():
                if wgs > 1:
                    plgpu.barrier_wait(empty_b.at[there])
                fetch_b(more, there)

        for s in range(tile):
            x = gpu_load(x_s.at[slot, s], token).astype(jnp.float32)
            w = gpu_load(w_s.at[parity, s], token.reduce(1))
            acc = acc + x * spread(w, x.shape, 0, token)
        return acc

    gpu_store(refs["y"].at[row, block], lax.fori_loop(0, tiles, one_tile, acc))
    for i in range(early):  # not wanted, but on its way

        @pl.when(i >= tiles)
        def _(i=i):
            plgpu.barrier_wait(full.at[wg * stages + i])
            plgpu.barrier_wait(full_b.at[i])


def _new_token(plan, sizes, refs, row, block, group):
    """x [K, P], B and C [N], cs and scale [K] of the new token, and the skip [K] or [K, P]."""
    heads, width, n = sizes["K"], sizes["P"], sizes["N"]
    token, weight, states = _layouts(plan.tile, heads, width)
    a_head, a_state = weight.reduce(0), states.reduce(0)
    beside = sizes["H"] * width + group * n
    new = {"x": gpu_load(refs["xBC_heads"].at[row, pl.ds(block * heads, heads)], token)}
    for name, at in (("B", beside), ("C", beside + sizes["G"] * n)):
        new[name] = gpu_load(refs["xBC"].at[row, pl.ds(at, n)], a_state)
    load = lambda ref: gpu_load(ref, a_head).astype(jnp.float32)
    dt = load(refs["dt"].at[row, block])
    if "dt_bias" in refs:
        dt = dt + load(refs["dt_bias"].at[block])
    if plan.dt_softplus:
        dt = softplus_short(dt)
    low, high = plan.dt_limit
    constant = lambda v: plgpu.layout_cast(jnp.full((heads,), v, jnp.float32), a_head)
    dt = jnp.maximum(dt, constant(low))
    if math.isfinite(high):
        dt = jnp.minimum(dt, constant(high))
    new["cs"] = load(refs["cs"].at[row, block]) + dt * load(refs["A"].at[block])
    new["scale"] = jnp.log(dt) - new["cs"]
    if "D" in refs:
        D = refs["D"].at[block]
        new["skip"] = gpu_load(D, token if len(D.shape) == 2 else token.reduce(1))
    return new


# jit: else the many layers of a decoder would each be traced, lowered and compiled.
@functools.partial(jax.jit, static_argnums=0)
def _kernel(plan: _Plan, cache: DualCache, operands: dict[str, Array]) -> tuple[Array, DualCache]:
    """y, and the cache, with the new token if there is one."""
    sizes, dtype = cache.sizes, cache.x.dtype
    rows, blocks, slots, heads = (sizes[k] for k in "RJSK")
    width, tile, stages, wgs = sizes["P"], plan.tile, plan.stages, plan.wgs
    held = {
        "x": cache.x.reshape(rows, blocks, slots, heads, width),
        "B": cache.B,
        "scale": cache.scale,
        "cs": cache.cs.reshape(rows, blocks, heads),
    }
    names = (*held, *operands, "y")

    def body(*refs):
        where = [lax.axis_index(name) for name in ("rows", "parts", "wg")]
        scratch = {
            "x": plgpu.SMEM((wgs, stages, tile, heads, width), dtype),
            "b": plgpu.SMEM((stages, tile, sizes["N"]), dtype),
            "scale": plgpu.SMEM((wgs, stages, tile, heads), jnp.float32),
            "w": plgpu.SMEM((wgs, 2, tile, heads), jnp.float32),
        }
        barriers = (
            plgpu.Barrier(num_arrivals=2, num_barriers=wgs * stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        )
        named = dict(zip(names, refs, strict=True))
        scoped = lambda smem, barriers: _body(plan, sizes, named, smem, barriers, where)
        pl.run_scoped(scoped, scratch, barriers, collective_axes="wg")

    options = dict(
        out_type=(out_like(cache.x, (rows, blocks, heads, width), jnp.float32),),
        grid=(blocks // wgs, rows), grid_names=("parts", "rows"), num_threads=wgs, thread_name="wg",
        # Barriers are where they must be: `commit_smem` is one.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=False if plan.on_gpu else interpret_mode("gpu"),
    )  # fmt: skip
    if plan.step:
        run = gpu_kernel_in_place(body, **options)
        (y,), changed = run(tuple(held.values()), *operands.values())
        shaped = (v.reshape(old.shape) for v, old in zip(changed, cache, strict=True))
        cache = DualCache(*shaped)
    else:
        (y,) = gpu_kernel(body, **options)(*held.values(), *operands.values())
    y = y.reshape(rows, blocks * heads, width)
    return vary((y, cache), (cache, *operands.values()))


def ssd_decode_gpu(cache: DualCache, C: Array, index: Array) -> Array:
    """See `ssd_decode`; weights and sums are float32."""
    operands = {"C": C.astype(cache.x.dtype), "index": index.reshape(1)}
    return _kernel(_plan(cache.sizes), cache, operands)[0]


def ssd_decode_step_gpu(
    cache: DualCache,
    xBC: Array,
    dt: Array,
    A: Array,
    D: Array | None,
    index: Array,
    *,
    dt_bias: Array | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> tuple[Array, DualCache]:
    """See `ssd_decode_step`."""
    sizes = cache.sizes
    blocks, per = sizes["J"], sizes["K"]
    xBC = xBC.astype(cache.x.dtype)
    operands = {
        "xBC": xBC,
        "xBC_heads": xBC.reshape(sizes["R"], -1, sizes["P"]),
        "dt": dt.reshape(-1, blocks, per),
        "A": A.reshape(blocks, per),
        "index": index.reshape(1),
    }
    if dt_bias is not None:
        operands["dt_bias"] = dt_bias.reshape(blocks, per)
    if D is not None:
        operands["D"] = D.astype(jnp.float32).reshape(blocks, per, *D.shape[1:])
    plan = _plan(sizes, dt_softplus=dt_softplus, dt_limit=tuple(map(float, dt_limit)))
    return _kernel(plan, cache, operands)
