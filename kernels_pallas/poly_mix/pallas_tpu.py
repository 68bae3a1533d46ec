"""The polynomial mixer as TPU kernels: h once over HBM forwards, once backwards.

The grid is (blocks of channels, rows, blocks of tokens), tokens last and sequential: sums stay in
VMEM from one block to the next. There are two kernels each way. One sums the polynomials of a row
of tokens: means, and block-causal means of equal frames, whose frames are its rows; what follows on
[B, F, E] is XLA's. The other writes a running mean per token: prefixes of 8 tokens in log-depth
across the sublanes, on top of what was carried. Backwards both recompute the activation and its
powers, write dh in h's dtype and add up dcoeff in float32 in VMEM, over the rows too, without
atomics; the running mean goes against time with the sum of what is to come.

Ends of N and E that do not fill a block are masked, not padded. Weights and reciprocal counts come
as one float32 array [B, 8, N] along the lanes (next to h's E numbers a token: nothing) and are
turned into columns in VMEM.

Floors: forward one array over HBM (h in) or two (rows out, running), 2 k + 8 flops an element;
backward two (h in, dh out) or three (ct in), 5 k + 8 flops.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import dispatch
from ..compat import out_like, vary
from .aggregate import counts, rows_from_sums
from .operands import Operands
from .reference import activation
from .state import PolyState, reciprocal

BLOCK_T = 512
BLOCK_E = 512
CHUNK = 32  # tokens that are worked on at a time
TILE = 8  # rows of a float32 register
WEIGHT, SHARE, BEFORE = range(3)  # rows of the array of columns


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes of a call, and which columns there are."""

    rows: int
    n: int
    width: int
    degree: int
    block_t: int
    block_e: int
    weighted: bool
    continued: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        return pl.cdiv(self.width, self.block_e), self.rows, pl.cdiv(self.n, self.block_t)

    @property
    def chunk(self) -> int:
        return math.gcd(self.block_t, CHUNK)

    @property
    def ragged(self) -> bool:
        return bool(self.n % self.block_t)


def _plan(h: Array, coeff: Array, narrowest: Any, weighted: bool, continued: bool = False) -> _Plan:
    rows, n, width = h.shape
    tile = 32 // jnp.dtype(narrowest).itemsize
    block_t = min(BLOCK_T, -(-n // tile) * tile)
    block_e = min(BLOCK_E, width)
    return _Plan(rows, n, width, coeff.shape[1], block_t, block_e, weighted, continued)


def _columns(plan: _Plan, like: Array, parts: dict[int, Array]) -> Array:
    """[B or 1, 8, N] of rows [B or 1, N], 0 elsewhere, N filled up to whole blocks."""
    batch = max(part.shape[0] for part in parts.values())
    empty = jnp.zeros((batch, plan.n), next(iter(parts.values())).dtype)
    stack = [jnp.broadcast_to(parts.get(i, empty), empty.shape) for i in range(TILE)]
    fill = plan.grid[2] * plan.block_t - plan.n
    return vary(jnp.pad(jnp.stack(stack, axis=1), ((0, 0), (0, 0), (0, fill))), like)


# Inside the kernels.


def _column(columns: Any, start: Any, which: int, plan: _Plan) -> Array:
    """[chunk, block_e] of one number a token."""
    part = columns[pl.ds(start, plan.chunk), :][:, which : which + 1]
    return jnp.broadcast_to(part, (plan.chunk, plan.block_e))


def _each_chunk(plan: _Plan, body: Callable, carry: Any, reverse: bool = False) -> Any:
    """`body(first token of the chunk within the block, carry)`, in order."""
    count = plan.block_t // plan.chunk

    def step(i, carry):
        at = count - 1 - i if reverse else i
        return body(pl.multiple_of(at * plan.chunk, plan.chunk), carry)

    return lax.fori_loop(0, count, step, carry, unroll=min(2, count))


def _inside(start: Any, block: Any, plan: _Plan) -> Array | None:
    """[chunk, block_e] bool: which tokens there are; None for all."""
    if not plan.ragged:
        return None
    row = lax.broadcasted_iota(jnp.int32, (plan.chunk, plan.block_e), 0)
    return block * plan.block_t + start + row < plan.n


def _select(keep: Array | None, x: Array) -> Array:
    return x if keep is None else jnp.where(keep, x, 0)


def _load(h_ref: Any, columns: Any, start: Any, inside: Array | None, plan: _Plan):
    """h in float32, 0 where nobody looks; its weights; and where somebody does."""
    h = h_ref[0, pl.ds(start, plan.chunk), :].astype(columns.dtype)
    if not plan.weighted:
        return _select(inside, h), None, inside
    weight = _column(columns, start, WEIGHT, plan)  # 0 beyond N
    keep = weight != 0
    return _select(keep, h), weight, keep


def _features(h: Array, coeff: Array) -> Array:
    """p(h) by Horner's rule; coeff [k, block_e]."""
    a = activation(h)
    value = coeff[-1:]
    for j in range(coeff.shape[0] - 2, -1, -1):
        value = value * a + coeff[j : j + 1]
    return a * value


def _fold(x: Array) -> Array:
    """[chunk, E] summed to the 8 rows of a register."""
    parts = [x[i : i + TILE] for i in range(0, x.shape[0], TILE)]
    return functools.reduce(jnp.add, parts)


def _running(x: Array, carry: Array, reverse: bool) -> tuple[Array, Array]:
    """Sums of x [chunk, E] from its start (its end, if `reverse`) on top of carry [1, E]."""
    row = lax.broadcasted_iota(jnp.int32, (TILE, x.shape[1]), 0)
    parts = [x[i : i + TILE] for i in range(0, x.shape[0], TILE)]
    done = []
    for part in reversed(parts) if reverse else parts:
        for k in (1, 2, 4):
            missing = row >= TILE - k if reverse else row < k
            part = part + jnp.where(missing, 0, pltpu.roll(part, TILE - k if reverse else k, 0))
        part = part + carry
        carry = part[:1] if reverse else part[-1:]
        done.append(part)
    done = done[::-1] if reverse else done
    return (done[0] if len(done) == 1 else jnp.concatenate(done, axis=0)), carry


def _turn_columns(refs: tuple, scratch: Any) -> None:
    if refs:
        scratch[...] = refs[0][0].T


def _sums_kernel(h_ref, coeff_ref, *refs, plan: _Plan):
    *given, sums_ref, total, columns = refs
    coeff, block = coeff_ref[...], pl.program_id(2)
    _turn_columns(tuple(given), columns)

    @pl.when(block == 0)
    def _():
        total[...] = jnp.zeros(total.shape, total.dtype)

    def body(start, carry):
        h, weight, _ = _load(h_ref, columns, start, _inside(start, block, plan), plan)
        p = _features(h, coeff)
        return carry + _fold(p if weight is None else weight * p)

    total[...] = _each_chunk(plan, body, total[...])

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        sums_ref[0] = jnp.sum(total[...], axis=0, keepdims=True)


def _means_kernel(h_ref, coeff_ref, given, *refs, plan: _Plan):
    *before, rows_ref, sums_ref, total, columns = refs
    coeff, block = coeff_ref[...], pl.program_id(2)
    _turn_columns((given,), columns)

    @pl.when(block == 0)
    def _():
        total[...] = jnp.zeros(total.shape, total.dtype)

    def body(start, carry):
        h, weight, _ = _load(h_ref, columns, start, _inside(start, block, plan), plan)
        p = _features(h, coeff)
        sums, carry = _running(p if weight is None else weight * p, carry, reverse=False)
        rows = _column(columns, start, SHARE, plan) * sums
        if plan.continued:
            rows = rows + _column(columns, start, BEFORE, plan) * before[0][0]
        rows_ref[0, pl.ds(start, plan.chunk), :] = rows.astype(rows_ref.dtype)
        return carry

    total[...] = _each_chunk(plan, body, total[...])
    sums_ref[0] = total[...]


def _backward(h_ref, coeff_ref, dh_ref, dcoeff_ref, powers, columns, plan, block, gradient, carry):
    """dh and dcoeff; `gradient(start, inside, carry)` is that of the sum that a chunk's tokens
    enter, [1 or chunk, E], and the carry."""
    coeff, degree = coeff_ref[...], plan.degree
    slopes = [coeff[j : j + 1] * (j + 1) for j in range(degree)]
    last = pl.num_programs(2) - 1

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        powers[...] = jnp.zeros(powers.shape, powers.dtype)

    def body(start, carry):
        inside = _inside(start, block, plan)
        h, weight, keep = _load(h_ref, columns, start, inside, plan)
        dp, carry = gradient(start, inside, carry)
        dp = dp if weight is None else weight * dp
        a = activation(h)
        value = slopes[-1]
        for slope in slopes[-2::-1]:
            value = value * a + slope
        steep = jnp.where(h < -10, 0, jnp.where(h < 0, 0.01, jnp.where(h > 6, 0.0, 1.0)))
        dh = _select(keep, (dp * value) * steep.astype(coeff.dtype))
        dh_ref[0, pl.ds(start, plan.chunk), :] = dh.astype(dh_ref.dtype)
        term = dp
        for j in range(degree):
            term = term * a
            powers[pl.ds(j * TILE, TILE), :] += _fold(term)
        return carry

    carry = _each_chunk(plan, body, carry, reverse=True)

    @pl.when((pl.program_id(1) == pl.num_programs(1) - 1) & (pl.program_id(2) == last))
    def _():
        for j in range(degree):
            rows = powers[pl.ds(j * TILE, TILE), :]
            dcoeff_ref[pl.ds(j, 1), :] = jnp.sum(rows, axis=0, keepdims=True)

    return carry


def _sums_backward_kernel(h_ref, coeff_ref, ct_ref, *refs, plan: _Plan):
    *given, dh_ref, dcoeff_ref, powers, columns = refs
    _turn_columns(tuple(given), columns)
    ct = ct_ref[0]
    _backward(
        h_ref, coeff_ref, dh_ref, dcoeff_ref, powers, columns, plan, pl.program_id(2),
        lambda start, inside, carry: (ct, carry), 0,
    )  # fmt: skip


def _means_backward_kernel(h_ref, coeff_ref, ct_ref, ct_sums_ref, given, *refs, plan: _Plan):
    """Against time: a token's sum is in the rows from its own on, and in the sum of all."""
    dh_ref, dcoeff_ref, later_ref, powers, later, columns = refs
    _turn_columns((given,), columns)
    dtype, ct_sums = powers.dtype, ct_sums_ref[0]

    @pl.when(pl.program_id(2) == 0)
    def _():
        later[...] = jnp.zeros(later.shape, later.dtype)

    def gradient(start, inside, carry):
        ct = _select(inside, ct_ref[0, pl.ds(start, plan.chunk), :].astype(dtype))
        g, carry = _running(_column(columns, start, SHARE, plan) * ct, carry, reverse=True)
        return g + ct_sums, carry

    block = pl.num_programs(2) - 1 - pl.program_id(2)
    later[...] = _backward(
        h_ref, coeff_ref, dh_ref, dcoeff_ref, powers, columns, plan, block, gradient, later[...]
    )
    later_ref[0] = later[...]


# Around the kernels.


def _specs(plan: _Plan, down: bool = True) -> dict[str, Any]:
    """Blocks of each operand; tokens ascend if `down`."""
    order = (lambda j: j) if down else (lambda j: plan.grid[2] - 1 - j)
    spec = pl.BlockSpec
    columns = lambda array: spec(
        (1, TILE, plan.block_t),
        (lambda e, b, j: (b, 0, order(j)))
        if array.shape[0] == plan.rows
        else (lambda e, b, j: (0, 0, order(j))),
    )
    return {
        "tokens": spec((1, plan.block_t, plan.block_e), lambda e, b, j: (b, order(j), e)),
        "coeff": spec((plan.degree, plan.block_e), lambda e, b, j: (0, e)),
        "row": spec((1, 1, plan.block_e), lambda e, b, j: (b, 0, e)),
        "columns": columns,
    }


def _call(kernel, name, plan, operands, in_specs, outs, out_specs, scratch, rows, flops):
    acc = operands[1].dtype
    moved = sum(z.size * z.dtype.itemsize for z in (*operands, *outs))
    scratch = [pltpu.VMEM((r, plan.block_e), acc) for r in scratch]
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=plan.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=outs,
        scratch_shapes=[*scratch, pltpu.VMEM((plan.block_t, TILE), acc)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", rows, "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=flops * plan.rows * plan.n * plan.width, bytes_accessed=moved, transcendentals=0
        ),
        interpret=dispatch.interpret("tpu"),
        name=name,
    )(*operands)


@jax.custom_vjp
def _sums(h: Array, coeff: Array, weights: Array | None) -> Array:
    """sum_n w_n p(h_n) of every row: [R, 1, E] of h [R, N, E], coeff [E, k], weights [R, N]."""
    plan = _plan(h, coeff, h.dtype, weights is not None)
    given = [] if weights is None else [_columns(plan, h, {WEIGHT: weights})]
    specs = _specs(plan)
    return _call(
        _sums_kernel, "poly_mix", plan, (h, coeff.T, *given),
        [specs["tokens"], specs["coeff"], *(specs["columns"](z) for z in given)],
        [out_like(h, (plan.rows, 1, plan.width), coeff.dtype)], [specs["row"]], [TILE],
        "parallel", 2 * plan.degree + 8,
    )[0]  # fmt: skip


def _sums_rule(operands, ct):
    h, coeff, weights = operands
    plan = _plan(h, coeff, h.dtype, weights is not None)
    given = [] if weights is None else [_columns(plan, h, {WEIGHT: weights})]
    specs = _specs(plan)
    dh, dcoeff = _call(
        _sums_backward_kernel, "poly_mix_backward", plan, (h, coeff.T, ct, *given),
        [specs["tokens"], specs["coeff"], specs["row"], *(specs["columns"](z) for z in given)],
        [out_like(h, h.shape, h.dtype), out_like(h, coeff.shape[::-1], coeff.dtype)],
        [specs["tokens"], specs["coeff"]], [plan.degree * TILE], "arbitrary", 5 * plan.degree + 8,
    )  # fmt: skip
    return dh, dcoeff.T, None


_sums.defvjp(lambda *operands: (_sums(*operands), operands), _sums_rule)


def _running_operands(h, coeff, weights, count, state, narrowest):
    """Plan, columns, and the state's mean as [B, 1, E] in a list, empty without a state."""
    plan = _plan(h, coeff, narrowest, weights is not None, state is not None)
    share = reciprocal(count)
    parts = {SHARE: share} if weights is None else {WEIGHT: weights, SHARE: share}
    if state is not None:
        parts[BEFORE] = share * state.count[:, None]
    return plan, _columns(plan, h, parts), [] if state is None else [state.mean[:, None]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _means(out_dtype, h, coeff, weights, count, state) -> tuple[Array, Array]:
    """The running mean of every token [B, N, E] in `out_dtype`, the state's counted in, and the
    sum of all without the state [B, 1, E]. count: [B or 1, N] what each mean is divided by."""
    narrowest = min(h.dtype, jnp.dtype(out_dtype), key=lambda d: d.itemsize)
    plan, columns, before = _running_operands(h, coeff, weights, count, state, narrowest)
    specs = _specs(plan)
    outs = [
        out_like(h, h.shape, out_dtype),
        out_like(h, (plan.rows, 1, plan.width), coeff.dtype),
    ]
    return _call(
        _means_kernel, "poly_mix_causal", plan, (h, coeff.T, columns, *before),
        [specs["tokens"], specs["coeff"], specs["columns"](columns), *[specs["row"]] * len(before)],
        outs, [specs["tokens"], specs["row"]], [1], "parallel", 2 * plan.degree + 16,
    )  # fmt: skip


def _means_rule(out_dtype, operands, cotangents):
    h, coeff, weights, count, state = operands
    ct, ct_sums = cotangents
    narrowest = min(h.dtype, ct.dtype, key=lambda d: d.itemsize)
    plan, columns, _ = _running_operands(h, coeff, weights, count, state, narrowest)
    specs = _specs(plan, down=False)
    dh, dcoeff, later = _call(
        _means_backward_kernel, "poly_mix_causal_backward", plan,
        (h, coeff.T, ct, ct_sums, columns),
        [
            specs["tokens"], specs["coeff"], specs["tokens"], specs["row"],
            specs["columns"](columns),
        ],
        [
            out_like(h, h.shape, h.dtype), out_like(h, coeff.shape[::-1], coeff.dtype),
            out_like(h, (plan.rows, 1, plan.width), coeff.dtype),
        ],
        [specs["tokens"], specs["coeff"], specs["row"]], [plan.degree * TILE, 1], "arbitrary",
        5 * plan.degree + 16,
    )  # fmt: skip
    if state is not None:
        state = PolyState(state.count[:, None] * later[:, 0], jnp.zeros_like(state.count))
    return dh, dcoeff.T, None, None, state


def _means_forward(out_dtype, *operands):
    return tuple(_means(out_dtype, *operands)), operands


_means.defvjp(_means_forward, _means_rule)


def poly_mix_tpu(operands: Operands, causal: bool, frames, out_dtype):
    """Rows [B, R, E] in `out_dtype` and the state of `poly_mix` by the kernels above.

    No rotation, no query_weights, frames of one length. Off a TPU it runs in Pallas' interpreter.
    """
    h, coeff, weights, _, state, _ = operands
    batch, n, width = h.shape
    count = vary(counts(n, weights, causal, frames, coeff.dtype), h)
    if causal:
        total = count if state is None else state.count[:, None] + count
        rows, sums = _means(out_dtype, h, coeff, weights, total, state)
        _, last = rows_from_sums(sums, count[:, -1:], state)
        return rows, last
    number = 1 if frames is None else len(frames)
    split = lambda x: x.reshape(batch * number, n // number, *x.shape[2:])
    sums = _sums(split(h), coeff, None if weights is None else split(weights))
    sums = jnp.cumsum(sums.reshape(batch, number, width), axis=1) if number > 1 else sums
    rows, last = rows_from_sums(sums, count, state)
    return rows.astype(out_dtype), last
