"""The scan as TPU kernels: one pass over HBM forwards, one fused pass backwards.

The grid is (rows, blocks of channels, blocks of time), time last and sequential: the carry stays in
VMEM from one block of time to the next. Inside a block, tiles of 8 steps (16 beside 16-bit types)
are scanned in log-depth across the sublanes, and the carry enters each tile with one multiply-add.
Ends of T and D that do not fill a block are masked, not padded; reversed time is a matter of index
maps.

Floors: forward 3 arrays over HBM (a, x in, h out), 2 flops an element; backward 5 (a, h, ct in, da,
dx out), 4 flops an element; twice the arrays and about four times the flops for pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import dispatch
from ..compat import out_like
from .pairs import Parts, add, cast, combine, conj, mul, with_gradient

BLOCK_T = 256
BLOCK_D = 512  # of a real scan; half of it for pairs, which have twice the arrays


def _scan_tile(a: Parts, x: Parts, down: bool) -> tuple[Parts, Parts]:
    """Prefixes of the steps in a tile [R, D]: from above if `down`, else from below."""
    rows = a[0].shape[0]
    row = lax.broadcasted_iota(jnp.int32, a[0].shape, 0)
    k = 1
    while k < rows:
        missing = row < k if down else row >= rows - k
        shift = lambda z, value, m=missing, k=k: jnp.where(m, value, _roll(z, k, down))
        before = tuple(shift(p, 1 - i) for i, p in enumerate(a)), tuple(shift(p, 0) for p in x)
        a, x = combine(before, (a, x))
        k *= 2
    return a, x


def _roll(z: Array, k: int, down: bool) -> Array:
    """Row r of the result is row r - k of z if `down`, else row r + k; around the ends."""
    return pltpu.roll(z, k if down else z.shape[0] - k, 0)


def _edge(z: Parts, down: bool) -> Parts:
    """The row that a pass in this direction reaches last, as [1, D]."""
    return tuple(p[-1:] if down else p[:1] for p in z)


def _tile(refs: Any, start: Any, rows: int, dtype: Any) -> Parts:
    return tuple(r[0, pl.ds(start, rows), :].astype(dtype) for r in refs)


def _store(refs: Any, start: Any, parts: Parts) -> None:
    for ref, part in zip(refs, parts, strict=True):
        ref[0, pl.ds(start, part.shape[0]), :] = part.astype(ref.dtype)


def _each_tile(block_t: int, rows: int, down: bool, body: Callable, carry: Any) -> Any:
    """`body(first row of the tile, carry)` for every tile of the block, in order of the pass."""
    count = block_t // rows

    def step(i, carry):
        at = i if down else count - 1 - i
        return body(pl.multiple_of(at * rows, rows), carry)

    return lax.fori_loop(0, count, step, carry, unroll=min(4, count))


def _masked(step: Array, t_len: int, block_t: int) -> Callable:
    """select(parts, fills): `fills` where a step lies beyond T; no work if none can."""
    if t_len % block_t == 0:
        return lambda parts, fills: parts
    inside = step < t_len
    return lambda parts, fills: tuple(
        jnp.where(inside, p, f) for p, f in zip(parts, fills, strict=True)
    )


def _forward_kernel(*refs, n, t_len, block_t, rows, reverse):
    a_ref, x_ref, start_ref, h_ref, last_ref, carry_ref = (
        refs[i * n : (i + 1) * n] for i in range(6)
    )
    acc, width = carry_ref[0].dtype, carry_ref[0].shape[1]
    j, count = pl.program_id(2), pl.num_programs(2)
    block = count - 1 - j if reverse else j
    row = lax.broadcasted_iota(jnp.int32, (rows, width), 0)

    @pl.when(j == 0)
    def _():
        for carry, start in zip(carry_ref, start_ref, strict=True):
            carry[...] = start[0]

    def body(start, carry):
        select = _masked(block * block_t + start + row, t_len, block_t)
        a = select(_tile(a_ref, start, rows, acc), (1, 0)[:n])
        x = select(_tile(x_ref, start, rows, acc), (0, 0)[:n])
        a, x = _scan_tile(a, x, not reverse)
        h = add(mul(a, carry), x)
        _store(h_ref, start, h)
        return _edge(h, not reverse)

    carry = _each_tile(block_t, rows, not reverse, body, tuple(r[...] for r in carry_ref))
    for ref, last, part in zip(carry_ref, last_ref, carry, strict=True):
        ref[...] = part
        last[0] = part


def _backward_kernel(*refs, n, t_len, block_t, rows, reverse):
    """s_t = conj(a_t) g_t with g_t = ct_t + s_{t+1} runs against time; da_t = g_t conj(h_{t-1})."""
    (
        a_ref, h_ref, beyond_ref, ct_ref, start_ref, ct_last_ref,
        da_ref, dx_ref, dstart_ref, carry_ref,
    ) = (refs[i * n : (i + 1) * n] for i in range(10))  # fmt: skip
    acc, width = carry_ref[0].dtype, carry_ref[0].shape[1]
    down = reverse  # the direction of this pass
    j, count = pl.program_id(2), pl.num_programs(2)
    block = j if down else count - 1 - j
    first = t_len - 1 if reverse else 0
    start_state = tuple(r[0] for r in start_ref)
    row = lax.broadcasted_iota(jnp.int32, (rows, width), 0)
    edge = 0 if not down else rows - 1  # the row whose step before is in the next tile

    @pl.when(j == 0)
    def _():
        for carry, ct_last in zip(carry_ref, ct_last_ref, strict=True):
            carry[...] = ct_last[0]

    def body(start, carry):
        s, h = carry
        step = block * block_t + start + row
        select = _masked(step, t_len, block_t)
        a = conj(select(_tile(a_ref, start, rows, acc), (1, 0)[:n]))
        ct = select(_tile(ct_ref, start, rows, acc), (0, 0)[:n])
        decay, inner = _scan_tile(a, mul(a, ct), down)
        now = add(mul(decay, s), inner)
        entering = tuple(
            jnp.where(row == rows - 1 - edge, s_part, _roll(part, 1, down))
            for s_part, part in zip(s, now, strict=True)
        )
        g = add(ct, entering)
        # The next tile of the pass holds the step before this tile's `edge`.
        at = start + rows if down else start - rows
        inside = (at < block_t) if down else (at >= 0)
        at = pl.multiple_of(jnp.where(inside, at, start), rows)
        following = tuple(
            jnp.where(inside, here, there)
            for here, there in zip(
                _tile(h_ref, at, rows, acc), _tile(beyond_ref, 0, rows, acc), strict=True
            )
        )
        before = tuple(
            jnp.where(
                step == first,
                init,
                _roll(jnp.where(row == (rows - 1 - edge), there, here), 1, not down),
            )
            for init, here, there in zip(start_state, h, following, strict=True)
        )
        _store(dx_ref, start, g)
        _store(da_ref, start, mul(g, conj(before)))
        return _edge(now, down), following

    begin = 0 if down else block_t - rows
    carry = tuple(r[...] for r in carry_ref), _tile(h_ref, begin, rows, acc)
    s, _ = _each_tile(block_t, rows, down, body, carry)
    for ref, dstart, part in zip(carry_ref, dstart_ref, s, strict=True):
        ref[...] = part
        dstart[0] = part


class _Shape:
    """Blocks, index maps and options that the two kernels share."""

    def __init__(self, arrays: Parts, acc: Any, n: int):
        self.batch, self.t_len, self.width = arrays[0].shape
        narrow = any(part.dtype.itemsize < 4 for part in arrays)
        self.rows = 16 if narrow else 8
        self.block_t = min(BLOCK_T, -(-self.t_len // self.rows) * self.rows)
        self.block_d = min(BLOCK_D // n, self.width)
        self.grid = (
            self.batch, pl.cdiv(self.width, self.block_d), pl.cdiv(self.t_len, self.block_t)
        )  # fmt: skip
        self.scratch = [pltpu.VMEM((1, self.block_d), acc)] * n

    def along_time(self, down: bool) -> pl.BlockSpec:
        """Blocks of time in the order of a pass."""
        count = self.grid[2]
        order = lambda j: j if down else count - 1 - j
        return pl.BlockSpec((1, self.block_t, self.block_d), lambda b, d, j: (b, order(j), d))

    def beyond(self, down: bool) -> pl.BlockSpec:
        """The tile that follows each block in the order of a pass (any tile after the last)."""
        count, per = self.grid[2], self.block_t // self.rows
        last = pl.cdiv(self.t_len, self.rows) - 1

        def index(b, d, j):
            at = (j + 1) * per if down else (count - 1 - j) * per - 1
            return b, jnp.clip(at, 0, last), d

        return pl.BlockSpec((1, self.rows, self.block_d), index)

    def fixed(self) -> pl.BlockSpec:
        """A state [B, 1, D], the same for every block of time."""
        return pl.BlockSpec((1, 1, self.block_d), lambda b, d, j: (b, 0, d))

    def call(self, kernel, name, n, reverse, in_specs, out_specs, outs, flops, operands):
        numbers = {"n": n, "t_len": self.t_len, "block_t": self.block_t, "rows": self.rows}
        moved = sum(z.size * z.dtype.itemsize for z in (*operands, *outs))
        return pl.pallas_call(
            functools.partial(kernel, **numbers, reverse=reverse),
            grid=self.grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=outs,
            scratch_shapes=self.scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            cost_estimate=pl.CostEstimate(
                flops=flops * self.batch * self.t_len * self.width,
                bytes_accessed=moved,
                transcendentals=0,
            ),
            interpret=dispatch.interpret("tpu"),
            name=name,
        )(*operands)


def _row(state: Parts) -> Parts:
    return tuple(part[:, None] for part in state)


def scan_forward(a, x, state, reverse):
    """Forward pass, as `pairs.with_gradient` takes it."""
    n = len(a)
    shape = _Shape((*a, *x), state[0].dtype, n)
    time, fixed = shape.along_time(not reverse), shape.fixed()
    outs = [out_like(x[0], p.shape, p.dtype) for p in (*x, *_row(state))]
    result = shape.call(
        _forward_kernel, "linear_scan", n, reverse, [time] * 2 * n + [fixed] * n,
        [time] * n + [fixed] * n, outs, (2, 8)[n - 1], (*a, *x, *_row(state)),
    )  # fmt: skip
    return tuple(result[:n]), tuple(part[:, 0] for part in result[n:])


def scan_backward(a, h, state, ct, ct_last, reverse):
    """Backward pass, as `pairs.with_gradient` takes it."""
    n, acc = len(a), state[0].dtype
    ct_last = cast(ct_last, acc)
    shape = _Shape((*a, *h, *ct), acc, n)
    time, fixed = shape.along_time(reverse), shape.fixed()
    operands = (*a, *h, *h, *ct, *_row(state), *_row(ct_last))
    outs = [out_like(h[0], p.shape, p.dtype) for p in (*a, *h, *_row(state))]
    result = shape.call(
        _backward_kernel, "linear_scan_backward", n, reverse,
        [time] * 2 * n + [shape.beyond(reverse)] * n + [time] * n + [fixed] * 2 * n,
        [time] * 2 * n + [fixed] * n, outs, (4, 20)[n - 1], operands,
    )  # fmt: skip
    return tuple(result[:n]), tuple(result[n : 2 * n]), tuple(p[:, 0] for p in result[2 * n :])


_differentiable = with_gradient(scan_forward, scan_backward)


def linear_scan_tpu(a: Parts, x: Parts, state: Parts, reverse: bool) -> tuple[Parts, Parts]:
    """h_t = a_t h_{t-1} + x_t by the kernels above; arguments as for `linear_scan_xla`.

    float32 accumulation; h is rounded once. Off a TPU it runs in Pallas' interpreter.
    """
    return _differentiable(a, x, state, reverse)
