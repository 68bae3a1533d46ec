"""SSD on Hopper GPUs: one kernel with warpgroup matrix products (Pallas Mosaic GPU).

A program owns one or two heads of a group and one segment of time; each head has a warpgroup of its
own, a further one brings the tiles of x, B, C and the step sizes through shared memory. Chunks of
64 steps, with the state S^T [N, P] of a head in registers, float32, as the accumulator of its own
update:

    scores = (C B^T) o L o dt    rounded to x's dtype, from registers
    y      = exp(cs) o (C S^T) + scores x + D x
    S^T    = exp(cs_Q) S^T + B^T (exp(cs_Q - cs) dt x)

Where rows and heads are too few to fill the chip, time is split into segments: a first pass makes
each segment's own last state (it reads x and B only), `join_chunks` joins them, and the main pass
starts every segment from its true state.

HBM bytes for E = B T H P elements of 2 bytes: 4 E (6 E with segments), and 8 E/P for cs and dt;
multiply-adds per element: 64 + 64 N/P + 2 N.

For the gradient the kernel also writes the state entering every chunk, 2 E N/64 bytes. The gradient
dH of the state leaving a chunk obeys the same recurrence, from the last chunk to the first,

    dH^T = exp(cs_Q) dH^T + C^T (exp(cs) dy)

so the same kernel makes and keeps it (x is dy, B is C); `gpu_backward` takes all chunks from there.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import dispatch
from ..compat import gpu_kernel, gpu_load, out_like, vary
from ..time_axis import join_chunks, pad_time, spread
from .gpu_backward import gradients
from .gpu_tiles import (
    COLUMN,
    LOG2E,
    ROW,
    TILE,
    Q,
    across,
    down,
    load,
    load_wide,
    positions,
    products,
    tiled,
    zeros,
)
from .prepare import cut
from .xla import backward, values

STAGES = 4  # chunks in shared memory, if they fit
SHARED = 220 * 1024  # bytes of shared memory for the stages and what is kept
PROGRAMS = 132  # one per multiprocessor; half of it or fewer are split along time


def segments(batch: int, heads: int, chunks: int) -> int:
    """Segments of time: 1 unless rows and pairs of heads leave half of the chip without work."""
    programs = batch * -(-heads // 2)
    if programs > PROGRAMS // 2:
        return 1
    return max(1, min(PROGRAMS // programs, chunks // 8))


def _at(segment, i, tiles, reverse):
    """Chunk that a segment comes to in its i-th step."""
    return segment * tiles + (tiles - 1 - i if reverse else i)


def _compute(
    refs,
    smem,
    barriers,
    where,
    *,
    tiles,
    stages,
    wgs,
    has_d,
    has_state,
    has_counts,
    summary,
    every,
    reverse,
):
    """One warpgroup: all chunks of one head and one segment."""
    interpret = bool(dispatch.interpret("gpu"))
    rest = list(refs[4:])
    if has_counts:
        rest.pop(0)  # comes through shared memory
    d_ref = rest.pop(0) if has_d else None
    first_ref = rest.pop(0) if has_state else None
    y_ref = None if summary else rest.pop(0)
    states_ref = rest.pop(0) if every else None
    final_ref = rest.pop(0)
    full, empty, once = barriers
    b, seg, pair, wg = where
    head = pair * wgs + wg
    p, n = smem["x"].shape[-1], smem["b"].shape[-1]
    dtype = smem["x"].dtype

    def fetch(src, dst, layout):
        plgpu.copy_gmem_to_smem(src, dst, once.at[wg])
        plgpu.barrier_wait(once.at[wg])
        return load(dst, layout)

    skip = fetch(d_ref.at[head], smem["d"].at[wg], ROW) if has_d else None
    state = zeros(n, p)
    if has_state:
        state = state + gpu_load(first_ref.at[b, seg, head], TILE)

    def chunk(i, state):
        slot = lax.rem(i, stages)
        plgpu.barrier_wait(full.at[slot])
        x_s, b_s = smem["x"].at[slot, wg], smem["b"].at[slot]
        vec = smem["vec"].at[slot, wg]
        cs, dt = load(vec.at[0], COLUMN), load(vec.at[1], COLUMN)
        end = vec[0, Q - 1]
        total = jnp.exp2(end)
        weight = jnp.exp2(cs) if reverse else dt * jnp.exp2(jnp.minimum(end - cs, 0))
        if has_counts:
            n_at, n_end = load(smem["counts"].at[slot], COLUMN), smem["counts"][slot, Q - 1]
            total = jnp.where(n_end == 0, total, 0.0)
            weight = jnp.where(n_at == (0.0 if reverse else n_end), weight, 0.0)
        scaled = smem["scaled"].at[wg]
        x = load_wide(x_s)
        if summary:  # the last state has left and been read by all; else y's wait says so
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        scaled[...] = (x * across(weight, (Q, p))).astype(dtype)
        if every or not summary:
            smem["state"].at[wg][...] = state.astype(dtype)
        plgpu.commit_smem()
        at_tile = _at(seg, i, tiles, reverse)
        if every:

            @pl.when(lax.rem(at_tile, every) == 0)
            def _():
                there = states_ref.at[b, lax.div(at_tile, every), head]
                plgpu.copy_smem_to_gmem(smem["state"].at[wg], there)

        advance = state * total, (b_s.transpose((1, 0)), scaled)
        if summary:
            (state,) = products(interpret, advance)
            plgpu.barrier_arrive(empty.at[slot])
            return state

        c_s = smem["c"].at[slot]
        row, column = positions()
        within = column <= row
        if has_counts:
            n_from = load(smem["counts"].at[slot], ROW)
            within = within & (across(n_at, (Q, Q)) == down(n_from, (Q, Q)))
        exponent = jnp.minimum(across(cs, (Q, Q)) - down(load(vec.at[0], ROW), (Q, Q)), 0)
        decay = jnp.exp2(jnp.where(within, exponent, -jnp.inf))
        cb, y, state = products(
            interpret,
            (zeros(Q, Q), (c_s, b_s.transpose((1, 0)))),
            (zeros(Q, p), (c_s, smem["state"].at[wg])),
            advance,
        )
        scores = (cb * (decay * down(load(vec.at[1], ROW), (Q, Q)))).astype(dtype)
        into = jnp.exp2(cs)
        if has_counts:
            into = jnp.where(n_at == 0, into, 0.0)
        y = y * across(into, (Q, p))
        if has_d:  # x once more from shared memory: registers are scarce
            y = y + load_wide(x_s) * down(skip, (Q, p))
        (y,) = products(interpret, (y, (scores, x_s)))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the last y and of this state
        y_s = smem["y"].at[wg]
        y_s[...] = y.astype(y_s.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_s, y_ref.at[b, pl.ds(at_tile * Q, Q), head])
        plgpu.barrier_arrive(empty.at[slot])
        return state

    state = lax.fori_loop(0, tiles, chunk, state)
    final_ref.at[b, seg, head][...] = state
    plgpu.wait_smem_to_gmem(0)


def _bring(
    refs, smem, barriers, where, *, tiles, stages, wgs, per_group, has_counts, summary, reverse
):
    """The warpgroup that copies tiles to shared memory."""
    x_ref, b_ref, c_ref, vec_ref = refs[:4]
    full, empty, _ = barriers
    b, seg, pair, _ = where
    group = lax.div(pair * wgs, per_group)

    def copy(i):
        slot = lax.rem(i, stages)
        tile = _at(seg, i, tiles, reverse)
        rows = pl.ds(tile * Q, Q)
        send = lambda src, dst: plgpu.copy_gmem_to_smem(src, dst, full.at[slot])
        send(b_ref.at[b, rows, group], smem["b"].at[slot])
        if not summary:
            send(c_ref.at[b, rows, group], smem["c"].at[slot])
        for wg in range(wgs):
            head = pair * wgs + wg
            send(x_ref.at[b, rows, head], smem["x"].at[slot, wg])
            send(vec_ref.at[b, tile, head], smem["vec"].at[slot, wg])
        if has_counts:
            send(refs[4].at[b, tile], smem["counts"].at[slot])

    for i in range(min(stages, tiles)):
        copy(jnp.int32(i))

    @pl.loop(stages, max(stages, tiles))
    def _(i):
        plgpu.barrier_wait(empty.at[lax.rem(i, stages)])
        copy(i)


def _call(
    x, B, C, vec, counts, D, first, *, split, summary=False, out_dtype=None, every=0, reverse=False
):
    """(y [B, T, H, P], states entering every `every`-th chunk [B, c, H, N, P], states after every
    segment [B, split, H, N, P]); no y if `summary`, the second only if `every`.

    With `reverse` (and `summary`) the walk of the gradient of the state: x is dy, B is C, chunks
    come last to first, and the states kept are those leaving the chunks.
    """
    batch, t_len, heads, p = x.shape
    groups, n = B.shape[2:]
    per_group = heads // groups
    # Two heads of P = 128 with a float32 y would take more shared memory than there is.
    wide_y = not summary and p * jnp.dtype(out_dtype).itemsize > 256
    wgs = 2 if per_group % 2 == 0 and not wide_y else 1
    tiles = t_len // Q // split
    stage = 2 * Q * (wgs * p + n * (1 if summary else 2))
    held = wgs * p * (2 * Q + 2 * n + (0 if summary else Q * jnp.dtype(out_dtype).itemsize))
    stages = min(STAGES, (SHARED - held) // stage)
    D = None if D is None else jnp.broadcast_to(D, (heads, p))
    flags = dict(
        tiles=tiles,
        stages=stages,
        wgs=wgs,
        has_counts=counts is not None,
        summary=summary,
        reverse=reverse,
    )

    def body(*refs):
        where = [lax.axis_index(name) for name in ("rows", "segments", "heads", "wg")]
        scratch = {
            "x": tiled(stages, wgs, Q, p, dtype=x.dtype),
            "b": tiled(stages, Q, n, dtype=x.dtype),
            "scaled": tiled(wgs, Q, p, dtype=x.dtype),
            "vec": plgpu.SMEM((stages, wgs, 2, Q), jnp.float32),
        }
        if counts is not None:
            scratch["counts"] = plgpu.SMEM((stages, Q), jnp.float32)
        if not summary:
            scratch["c"] = tiled(stages, Q, n, dtype=x.dtype)
            scratch["y"] = tiled(wgs, Q, p, dtype=out_dtype)
        if every or not summary:
            scratch["state"] = tiled(wgs, n, p, dtype=x.dtype)
        if D is not None:
            scratch["d"] = plgpu.SMEM((wgs, p), jnp.float32)
        arrivals = 1 + (not summary) + 2 * wgs + (counts is not None)
        barriers = (
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
            plgpu.Barrier(num_barriers=wgs),
        )

        def scoped(smem, barriers):
            @pl.when(where[-1] < wgs)
            def _():
                plgpu.set_max_registers(240, action="increase")
                _compute(refs, smem, barriers, where, has_d=D is not None, every=every,
                         has_state=first is not None, **flags)  # fmt: skip

            @pl.when(where[-1] == wgs)
            def _():
                plgpu.set_max_registers(24, action="decrease")
                _bring(refs, smem, barriers, where, per_group=per_group, **flags)

        pl.run_scoped(scoped, scratch, barriers, collective_axes="wg")

    operands = [v for v in (x, B, C, vec, counts, D, first) if v is not None]
    out_type = [out_like(x, (batch, split, heads, n, p), jnp.float32)]
    if every:
        kept = -(-tiles * split // every)
        out_type.insert(0, out_like(x, (batch, kept, heads, n, p), x.dtype))
    if not summary:
        out_type.insert(0, out_like(x, x.shape, out_dtype))
    steps = batch * t_len * heads
    cost = pl.CostEstimate(
        flops=2 * steps * p * (n if summary else Q + Q * n // p + 2 * n),
        transcendentals=steps * Q * (not summary),
        bytes_accessed=sum(v.size * v.dtype.itemsize for v in (*operands, *out_type)),
    )
    return gpu_kernel(
        body, out_type=out_type, grid=(heads // wgs, split, batch),
        grid_names=("heads", "segments", "rows"), num_threads=wgs + 1, thread_name="wg",
        # Barriers are where they must be: `wait_smem_to_gmem` and `commit_smem` are such.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        cost_estimate=cost, interpret=dispatch.interpret("gpu"),
    )(*operands)  # fmt: skip


def _cut_in_time(dt, a, resets, split):
    """(cs [B, c, H, Q], vec [B, c, H, 2, Q] of cs in bits and dt, counts [B, c, Q] or None)."""
    pad = lambda v: pad_time(v, Q * split)
    by_chunk = lambda v: jnp.moveaxis(cut(pad(v), Q), 2, 3)
    cs = jnp.cumsum(by_chunk(a), axis=-1)
    counts = None
    if resets is not None:
        counts = jnp.cumsum(cut(pad(resets), Q).astype(jnp.float32), axis=-1)
    return cs, jnp.stack([cs * LOG2E, by_chunk(dt)], axis=3), counts


def _first_states(call, cs, counts, state, split, reverse=False):
    """S^T before the first chunk of every segment [B, split, H, N, P], or None for zeros."""
    first = None if state is None else state.swapaxes(2, 3)
    if split == 1:
        return None if first is None else first[:, None]
    (own,) = call(None, None, summary=True)
    by_segment = lambda v: v.reshape(v.shape[0], split, -1, *v.shape[2:])
    decays = jnp.exp(jnp.sum(by_segment(cs[..., -1]), axis=2))[..., None, None]
    if counts is not None:
        closed = jnp.any(by_segment(counts[..., -1]) > 0, axis=2)
        decays = jnp.where(spread(closed, decays), 0, decays)
    first = jnp.zeros_like(own[:, 0]) if first is None else first
    return join_chunks(decays, own, first, reverse=reverse)[0]


@dispatch.compiled_once(8, 9)
def _forward(x, dt, a, B, C, D, state, resets, out_dtype, every):
    """(y, final state, states entering every `every`-th chunk [B, c, H, N, P] or None)."""
    batch, t_len, heads, _ = x.shape
    split = segments(batch, heads, -(-t_len // Q))
    cs, vec, counts = _cut_in_time(dt, a, resets, split)
    x, B, C = (pad_time(v, Q * split) for v in (x, B, C))
    call = functools.partial(_call, x, B, C, vec, counts, split=split)
    first = _first_states(call, cs, counts, state, split)
    y, *states, final = call(D, first, every=every, out_dtype=out_dtype)
    return y[:, :t_len], final[:, -1].swapaxes(2, 3), states[0] if every else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _ssd(x, dt, a, B, C, D, state, resets, out_dtype):
    return _forward(x, dt, a, B, C, D, state, resets, out_dtype, 0)[:2]


def _ssd_fwd(*args):
    operands, out_dtype = values(args[:8]), args[8]
    if operands[0].shape[1] <= Q and operands[6] is None:  # a single chunk: nothing enters it
        return _ssd(*operands, out_dtype), (operands, None)
    y, final, states = _forward(*operands, out_dtype, 1)
    return (y, final), (operands, states)


def _ssd_bwd(out_dtype, residuals, cotangents):
    operands, states = residuals
    if states is None:
        return (*backward(operands, None, *cotangents, Q), None)
    x, (dy, dfinal) = operands[0], cotangents
    dy = vary(jnp.zeros(x.shape, x.dtype), x) if isinstance(dy, SymbolicZero) else dy
    dfinal = None if isinstance(dfinal, SymbolicZero) else dfinal
    return *_backward(*operands, states, dy, dfinal), None


@dispatch.compiled_once()
def _backward(x, dt, a, B, C, D, state, resets, states, dy, dfinal):
    """Gradients of the operands but for `resets`."""
    batch, t_len, heads, _ = x.shape
    split = segments(batch, heads, -(-t_len // Q))
    cs, vec, counts = _cut_in_time(dt, a, resets, split)
    x, dy, B, C = (pad_time(v.astype(x.dtype), Q * split) for v in (x, dy, B, C))
    call = functools.partial(_call, dy, C, C, vec, counts, split=split, reverse=True)
    first = _first_states(call, cs, counts, dfinal, split, reverse=True)
    leaving, last = call(None, first, summary=True, every=1)
    grads = gradients(x, B, C, D, dy, cs, vec, counts, states, leaving, t_len)
    return *grads, None if state is None else last[:, 0].swapaxes(2, 3)


_ssd.defvjp(_ssd_fwd, _ssd_bwd, symbolic_zeros=True)


def ssd_pallas_gpu(x, dt, a, B, C, D, state, resets, *, chunk, out_dtype) -> tuple[Array, Array]:
    """See `prepare` for the arguments. The kernels' chunks are 64 steps; `chunk` is not used.

    The gradient comes from kernels too, from XLA's form only for T <= 64 without a state.
    """
    return _ssd(x, dt, a, B, C, D, state, resets, out_dtype)
