"""The scan on Hopper GPUs (Pallas Mosaic GPU): tiles through shared memory, the carry in registers.

A program is one warpgroup that owns 128 channels of one row and walks time serially, a channel a
thread. Tiles [rows, 128] of the operands arrive through the bulk copy engine, a few tiles ahead;
results leave by it, too. A group of 8 steps is loaded before the group before it is stored, so that
the serial loop waits neither for HBM nor for shared memory. The last tile of T is masked; reversed
time only changes the order of tiles and rows.

Where rows and channels give too few programs to fill the chip, time is cut into chunks: a first
pass makes each chunk one step (the product of its decays, its last state from zero), the same
kernel scans those, and the main pass starts every chunk from its true state.

Floors, arrays of B T D over HBM: forward 3 (a, x in, h out), in chunks 5; backward 5 (a, h, ct in,
da, dx out), in chunks 7. 2 and 4 flops an element (8 and 20 for pairs, with twice the arrays).
D is padded, by a copy, where rows of HBM are not a multiple of 16 bytes, and up to 128 channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import dispatch
from ..compat import gpu_kernel, out_like, vary
from ..gpu_stream import stream_tiles
from .pairs import Parts, add, conj, mul, with_gradient
from .xla import reduce_steps

LANES = 128  # channels of a program
GROUP = 8  # steps loaded at once
TILE_BYTES = 8192  # of one part of one operand
STAGES = {"forward": 4, "backward": 3}  # tiles in flight
ONE_PASS = 96  # programs from which on one pass over time is faster than two
PROGRAMS = 264  # two for each of 132 multiprocessors
MIN_TILES = 8  # of a chunk


def chunk_tiles(programs: int, tiles: int) -> int:
    """Tiles of time per chunk, given how many programs rows and channels make."""
    if programs >= ONE_PASS or tiles < 2 * MIN_TILES:
        return tiles
    chunks = min(-(-PROGRAMS // programs), tiles // MIN_TILES)
    return -(-tiles // chunks)


class _Plan:
    """Static sizes of a pass over [B, T, D] arrays: tiles of `rows` steps, chunks of tiles."""

    def __init__(self, arrays: Parts, n: int, down: bool):
        batch, self.t_len, width = arrays[0].shape
        sizes = [part.dtype.itemsize for part in arrays]
        self.n, self.down = n, down
        self.rows = max(GROUP, TILE_BYTES // (n * max(sizes) * LANES) // GROUP * GROUP)
        whole = 16 // min(sizes)
        blocks = pl.cdiv(width, LANES)
        # A tile as wide as its array would be one piece of memory, which the copy engine moves
        # whole: it would not stop at the last step of a row, as it does for a window.
        self.width = LANES + whole if blocks == 1 else -(-width // whole) * whole
        self.tiles = pl.cdiv(self.t_len, self.rows)
        self.lanes = blocks * LANES  # of states and summaries
        self.per_chunk = chunk_tiles(batch * blocks, self.tiles)
        self.chunks = pl.cdiv(self.tiles, self.per_chunk)
        self.grid = (batch, self.chunks, blocks)

    def pad(self, parts: Parts) -> Parts:
        """Arrays wider than a tile, of at least its steps, rows of whole 16 bytes."""
        missing = (0, max(0, self.rows - self.t_len)), (0, self.width - parts[0].shape[2])
        if missing == ((0, 0), (0, 0)):
            return parts
        return tuple(jnp.pad(part, ((0, 0), *missing)) for part in parts)

    def pad_state(self, parts: Parts) -> Parts:
        return tuple(jnp.pad(p, ((0, 0), (0, self.lanes - p.shape[1]))) for p in parts)

    def place(self) -> tuple[Any, Any, Any, Any]:
        """This program's row, chunk and channels, and the number of tiles in its chunk."""
        b, c, d = (lax.axis_index(name) for name in ("b", "c", "d"))
        tiles = jnp.minimum(self.per_chunk, self.tiles - c * self.per_chunk)
        return b, c, pl.ds(d * LANES, LANES), tiles

    def tile(self, c: Any, i: Any) -> Any:
        """Where in time the i-th tile of chunk c lies."""
        at = c * self.per_chunk + i
        return at if self.down else self.tiles - 1 - at

    def start(self, c: Any, i: Any) -> Any:
        """The first step of that tile."""
        return self.tile(c, i) * self.rows

    def order(self) -> list[list[int]]:
        """Rows of a tile in the order of the pass, in groups."""
        rows = list(range(self.rows)) if self.down else list(range(self.rows))[::-1]
        return [rows[i : i + GROUP] for i in range(0, self.rows, GROUP)]

    def masked(self, refs: Any, r: int, start: Any, fills: tuple[float, ...]) -> Parts:
        """Row r of the tile that begins at `start`, `fills` where it lies beyond T."""
        parts = _load(refs, r)
        if self.t_len % self.rows == 0:
            return parts
        inside = start + r < self.t_len
        return _choose(inside, parts, tuple(_constant(f) for f in fills[: self.n]))


def _row(value: Array) -> Array:
    return plgpu.layout_cast(value, plgpu.Layout.WG_STRIDED((LANES,), 1))


def _constant(value: float) -> Array:
    return _row(jnp.full((LANES,), value, jnp.float32))


def _load(refs: Any, index: Any) -> Parts:
    return tuple(_row(ref[index].astype(jnp.float32)) for ref in refs)


def _choose(condition: Any, yes: Parts, no: Parts) -> Parts:
    """One of two by a scalar condition."""
    wide = jnp.broadcast_to(condition, (LANES,))
    return tuple(jnp.where(wide, y, n) for y, n in zip(yes, no, strict=True))


def _groups(order: list[list[int]], load: Callable, use: Callable, carry: Any) -> Any:
    """carry = use(rows, what load(row) gave for each, carry), loading one group ahead."""
    ready = [load(r) for r in order[0]]
    for i, rows in enumerate(order):
        following = [load(r) for r in order[i + 1]] if i + 1 < len(order) else []
        carry = use(rows, ready, carry)
        ready = following
    return carry


def _streams(refs, smems, b, lane, rows, start) -> list[Any]:
    """Sources or sinks of a pipeline: rows of HBM from step start(i), and shared memory."""
    at = lambda ref: lambda i: ref.at[b, pl.ds(start(i), rows), lane]
    return [(at(ref), smem) for ref, smem in zip(refs, smems, strict=True)]


def _write(refs: Any, rows: list[int], values: list[Parts]) -> None:
    for r, parts in zip(rows, values, strict=True):
        for ref, part in zip(refs, parts, strict=True):
            ref[r] = part.astype(ref.dtype)


def _split(refs: Any, n: int) -> list[Any]:
    return [refs[i : i + n] for i in range(0, len(refs), n)]


def _summary_body(*refs, plan: _Plan, adjoint: bool):
    """Each chunk as one step. `adjoint`: s = conj(a) (x + s) instead of h = a h + x."""
    n = plan.n
    *refs, barrier = refs
    a_hbm, x_hbm, product_hbm, last_hbm, a_smem, x_smem = _split(refs, n)
    b, c, lane, tiles = plan.place()
    start = functools.partial(plan.start, c)

    def body(i, ins, _, carry):
        def load(r):
            a = plan.masked(ins[:n], r, start(i), (1, 0))
            return conj(a) if adjoint else a, plan.masked(ins[n:], r, start(i), (0, 0))

        def use(rows, loaded, carry):
            product, h = carry
            for a, x in loaded:
                product = mul(a, product)
                h = mul(a, add(x, h)) if adjoint else add(mul(a, h), x)
            return product, h

        return _groups(plan.order(), load, use, carry)

    sources = _streams((*a_hbm, *x_hbm), (*a_smem, *x_smem), b, lane, plan.rows, start)
    one, zero = _constant(1), _constant(0)
    carry = (one, zero)[:n], (zero, zero)[:n]
    product, last = stream_tiles(tiles, sources, [], barrier, STAGES["forward"], body, carry)
    for ref, value in zip((*product_hbm, *last_hbm), (*product, *last), strict=True):
        ref[b, c, lane] = value


def _enter(plan: _Plan, b: Any, c: Any, lane: Any, first: Any, joined: list[Any]) -> Parts:
    """The state before this chunk: `first` [B, D], later the scanned summaries [B, chunks, D]."""
    # Times one, which the compiler drops: a loop's carry must not be typed as varying over a mesh.
    start = tuple(part * _constant(1) for part in _load(first, (b, lane)))
    if not joined:
        return start
    before = _load(joined[0], (b, jnp.maximum(c - 1, 0), lane))
    return _choose(c == 0, start, before)


def _leave(plan: _Plan, b: Any, c: Any, lane: Any, refs: Any, last: Parts) -> None:
    """The last chunk's state is the whole pass's."""

    @pl.when(c == plan.chunks - 1)
    def _():
        for ref, value in zip(refs, last, strict=True):
            ref[b, lane] = value


def _forward_body(*refs, plan: _Plan):
    n = plan.n
    *refs, barrier = refs
    a_hbm, x_hbm, first, *joined, h_hbm, last_hbm, a_smem, x_smem, h_smem = _split(refs, n)
    b, c, lane, tiles = plan.place()
    start = functools.partial(plan.start, c)

    def body(i, ins, outs, h):
        def load(r):
            a = plan.masked(ins[:n], r, start(i), (1, 0))
            return a, plan.masked(ins[n:], r, start(i), (0, 0))

        def use(rows, loaded, h):
            states = []
            for a, x in loaded:
                h = add(mul(a, h), x)
                states.append(h)
            _write(outs, rows, states)
            return h

        return _groups(plan.order(), load, use, h)

    sources = _streams((*a_hbm, *x_hbm), (*a_smem, *x_smem), b, lane, plan.rows, start)
    sinks = _streams(h_hbm, h_smem, b, lane, plan.rows, start)
    h = _enter(plan, b, c, lane, first, joined)
    h = stream_tiles(tiles, sources, sinks, barrier, STAGES["forward"], body, h)
    _leave(plan, b, c, lane, last_hbm, h)


def _backward_body(*refs, plan: _Plan):
    """s_t = conj(a_t) g_t with g_t = ct_t + s_{t+1}, against time; da_t = g_t conj(h_{t-1})."""
    n = plan.n
    *refs, barrier = refs
    a_hbm, h_hbm, ct_hbm, state_hbm, ct_last, *rest = _split(refs, n)
    *joined, da_hbm, dx_hbm, dstate_hbm, a_smem, h_smem, ct_smem, da_smem, dx_smem = rest
    b, c, lane, tiles = plan.place()
    start = functools.partial(plan.start, c)
    reverse = plan.down  # the recurrence runs the other way
    state = _load(state_hbm, (b, lane))

    def start_before(i):
        """Where the steps before the tile's begin; those of time's first tile lack the first."""
        return start(i) + 1 if reverse else jnp.maximum(start(i) - 1, 0)

    def before(refs, r, i):
        """The state before row r of tile i."""
        if reverse:
            h = _load(refs, r)
            if plan.t_len % plan.rows == 0 and r < plan.rows - 1:
                return h
            first = start(i) + r == plan.t_len - 1
        else:
            h = _load(refs, r - jnp.where(plan.tile(c, i) == 0, 1, 0) if r else 0)
            if r:
                return h
            first = plan.tile(c, i) == 0
        return _choose(first, state, h)

    def body(i, ins, outs, s):
        def load(r):
            a = conj(plan.masked(ins[:n], r, start(i), (1, 0)))
            ct = plan.masked(ins[2 * n :], r, start(i), (0, 0))
            return a, before(ins[n : 2 * n], r, i), ct

        def use(rows, loaded, s):
            grads = []
            for a, h, ct in loaded:
                g = add(ct, s)
                s = mul(a, g)
                grads.append((*mul(g, conj(h)), *g))
            _write(outs, rows, grads)
            return s

        return _groups(plan.order(), load, use, s)

    sources = [
        *_streams(a_hbm, a_smem, b, lane, plan.rows, start),
        *_streams(h_hbm, h_smem, b, lane, plan.rows, start_before),
        *_streams(ct_hbm, ct_smem, b, lane, plan.rows, start),
    ]
    sinks = _streams((*da_hbm, *dx_hbm), (*da_smem, *dx_smem), b, lane, plan.rows, start)
    s = _enter(plan, b, c, lane, ct_last, joined)
    s = stream_tiles(tiles, sources, sinks, barrier, STAGES["backward"], body, s)
    _leave(plan, b, c, lane, dstate_hbm, s)


def _call(body, plan, inputs, outs, streams, stages, flops, **options):
    """Run a kernel; `streams`: the inputs and the outputs that go through shared memory."""
    smem = lambda parts, slots: [plgpu.SMEM((slots, plan.rows, LANES), p.dtype) for p in parts]
    barrier = plgpu.Barrier(num_arrivals=len(streams[0]), num_barriers=stages)
    batch, steps, width = plan.grid[0], plan.t_len, plan.width
    kernel = gpu_kernel(
        functools.partial(body, plan=plan, **options),
        out_type=tuple(outs),
        scratch_types=[*smem(streams[0], stages), *smem(streams[1], 2), barrier],
        cost_estimate=pl.CostEstimate(
            flops=flops * batch * steps * width,
            bytes_accessed=sum(z.size * z.dtype.itemsize for z in (*inputs, *outs)),
            transcendentals=0,
        ),
        grid=plan.grid,
        grid_names=("b", "c", "d"),
        # Else every row stored costs two barriers. Allowed: no shared memory is both read and
        # written by threads, and the copy engine sees it after `commit_smem` only.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=dispatch.interpret("gpu"),
    )
    return vary(kernel(*inputs), inputs)  # Mosaic GPU's wrapper forgets what its outputs vary over


def _chunk_steps(plan: _Plan, a: Parts, x: Parts, adjoint: bool) -> tuple[Parts, Parts]:
    """Each chunk of padded operands as one step, [B, chunks, D] in order of processing."""
    shape = (plan.grid[0], plan.chunks, plan.lanes)
    outs = [out_like(x[0], shape, jnp.float32)] * 2 * plan.n
    steps = _call(
        _summary_body, plan, (*a, *x), outs, ((*a, *x), ()), STAGES["forward"],
        (3, 14)[plan.n - 1], adjoint=adjoint,
    )  # fmt: skip
    return tuple(steps[: plan.n]), tuple(steps[plan.n :])


def _joined(plan: _Plan, a: Parts, x: Parts, first: Parts, adjoint: bool) -> Parts:
    """The state after each chunk [B, chunks, D], of padded operands; () if there is one chunk."""
    if plan.chunks == 1:
        return ()
    return scan_forward(*_chunk_steps(plan, a, x, adjoint), first, False)[0]


@dispatch.compiled_once(3)
def scan_forward(a, x, state, reverse):
    """Forward pass, as `pairs.with_gradient` takes it."""
    n, (_, t_len, width) = len(a), x[0].shape
    plan = _Plan((*a, *x), n, not reverse)
    a, x, state = plan.pad(a), plan.pad(x), plan.pad_state(state)
    joined = _joined(plan, a, x, state, adjoint=False)
    outs = [out_like(x[0], part.shape, part.dtype) for part in (*x, *state)]
    result = _call(
        _forward_body, plan, (*a, *x, *state, *joined), outs, ((*a, *x), x),
        STAGES["forward"], (2, 8)[n - 1],
    )  # fmt: skip
    h, last = result[:n], result[n:]
    return tuple(p[:, :t_len, :width] for p in h), tuple(p[:, :width] for p in last)


@dispatch.compiled_once(5)
def scan_backward(a, h, state, ct, ct_last, reverse):
    """Backward pass, as `pairs.with_gradient` takes it."""
    n, (_, t_len, width) = len(a), h[0].shape
    plan = _Plan((*a, *h), n, reverse)
    a, h, ct = plan.pad(a), plan.pad(h), plan.pad(ct)
    state, ct_last = plan.pad_state(state), plan.pad_state(ct_last)
    joined = _joined(plan, a, ct, ct_last, adjoint=True)
    outs = [out_like(h[0], part.shape, part.dtype) for part in (*a, *h, *state)]
    result = _call(
        _backward_body, plan, (*a, *h, *ct, *state, *ct_last, *joined), outs,
        ((*a, *h, *ct), (*a, *h)), STAGES["backward"], (4, 20)[n - 1],
    )  # fmt: skip
    da, dx, dstate = _split(result, n)
    cut = lambda parts: tuple(p[:, :t_len, :width] for p in parts)
    return cut(da), cut(dx), tuple(p[:, :width] for p in dstate)


def scan_summary(a: Parts, x: Parts, reverse: bool, *, adjoint: bool) -> tuple[Parts, Parts]:
    """All steps as one, as `xla.scan_summary`, in one pass over a and x."""
    plan = _Plan((*a, *x), len(a), not reverse)
    steps = _chunk_steps(plan, plan.pad(a), plan.pad(x), adjoint)
    cut = lambda parts: tuple(p[:, : x[0].shape[2]] for p in parts)
    product, last = reduce_steps(*steps, reverse=False)
    return cut(product), cut(last)


_differentiable = with_gradient(scan_forward, scan_backward)


def linear_scan_gpu(a: Parts, x: Parts, state: Parts, reverse: bool) -> tuple[Parts, Parts]:
    """h_t = a_t h_{t-1} + x_t by the kernels above; arguments as for `linear_scan_xla`.

    float32 accumulation; h is rounded once; no float64. Off a GPU it runs in Pallas' interpreter,
    if this jax has one.
    """
    return _differentiable(a, x, state, reverse)
