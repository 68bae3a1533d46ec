"""The convolution as TPU kernels: x once over HBM forwards; x and the cotangent once backwards.

The grid is (rows, blocks of channels, blocks of time), time last and sequential. Forwards the last
inputs of a block stay in VMEM as the halo of the next one. The backward pass goes against time: it
reads its halo of x as a small block of its own, recomputes the pre-activation, keeps the gradients
of the steps that follow in VMEM, and sums the taps' gradients per row and block of channels,
without atomics; the sum over rows is XLA's. Ends of T and C that do not fill a block are masked.

Floors: forward 2 arrays over HBM (x in, y out), 2 W flops an element and a sigmoid; backward 3 (x,
ct in, dx out), 6 W flops and a sigmoid. Resets add one float32 number a step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import dispatch
from ..compat import out_like, vary
from .xla import tap_masks

BLOCK_T = 256
BLOCK_C = 512
CHUNK = 32  # rows that are worked on at a time, within registers


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes of a call; `halo` rows of inputs before a block, at least W - 1."""

    batch: int
    t_len: int
    channels: int
    width: int
    halo: int
    block_t: int
    block_c: int
    silu: bool
    resets: bool

    @property
    def grid(self) -> tuple[int, int, int]:
        blocks = pl.cdiv(self.channels, self.block_c), pl.cdiv(self.t_len, self.block_t)
        return self.batch, *blocks

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """(first row, rows) of the parts of a block."""
        rows = math.gcd(self.block_t, CHUNK)
        return [(start, rows) for start in range(0, self.block_t, rows)]


def _plan(x: Array, weight: Array, resets: Array | None, silu: bool) -> _Plan:
    (batch, t_len, channels), width = x.shape, weight.shape[0]
    tile = 8 if x.dtype.itemsize >= 4 else 16
    halo = max(tile, 1 << (width - 2).bit_length() if width > 1 else 0)
    block_t = min(max(BLOCK_T, halo), -(-t_len // halo) * halo)
    block_c = min(BLOCK_C, channels)
    return _Plan(
        batch, t_len, channels, width, halo, block_t, block_c, silu, resets is not None
    )  # fmt: skip


def _column(age_ref: Any, plan: _Plan) -> Array | None:
    """The block's ages as [block_t, 1]; the block lies along lanes, to take no room in HBM."""
    if not plan.resets:
        return None
    return jnp.broadcast_to(age_ref[0], (8, plan.block_t)).T[:, :1]


def _seen(part: Array, age: Array | None, j: int) -> Array:
    """`part` where the input j steps before belongs to the same sequence, else 0."""
    if age is None or j == 0:
        return part
    return jnp.where(jnp.broadcast_to(age, part.shape) >= j, part, 0)


def _load_inputs(inputs: Any, x_ref: Any, halo: Array, block: Any, plan: _Plan) -> None:
    """inputs <- the halo, then the block of x, 0 beyond T."""
    x = x_ref[0].astype(inputs.dtype)
    if plan.t_len % plan.block_t:
        step = block * plan.block_t + lax.broadcasted_iota(jnp.int32, x.shape, 0)
        x = jnp.where(step < plan.t_len, x, 0)
    inputs[pl.ds(0, plan.halo), :] = halo.astype(inputs.dtype)
    inputs[pl.ds(plan.halo, plan.block_t), :] = x


def _windows(inputs: Any, age: Array | None, start: int, rows: int, plan: _Plan) -> list[Array]:
    """What each tap sees at `rows` steps of the block from `start`, the oldest first."""
    age = None if age is None else age[start : start + rows]
    load = lambda j: inputs[pl.ds(plan.halo + start - j, rows), :]
    return [_seen(load(j), age, j) for j in range(plan.width - 1, -1, -1)]


def _preactivation(windows: list[Array], taps: Array) -> Array:
    """`taps` [W + 1, C] holds the bias in its last row."""
    total = taps[len(windows) :]
    for k, part in enumerate(windows):
        total = total + taps[k : k + 1] * part
    return total


def _forward_kernel(*refs, plan: _Plan):
    x_ref, taps_ref, state_ref, *age_ref, y_ref, inputs = refs
    block = pl.program_id(2)
    taps = taps_ref[...]
    age = _column(*age_ref, plan) if age_ref else None
    halo = inputs[pl.ds(plan.block_t, plan.halo), :]  # the end of the block before
    halo = jnp.where(block == 0, state_ref[0].astype(inputs.dtype), halo)
    _load_inputs(inputs, x_ref, halo, block, plan)
    for start, rows in plan.chunks:
        y = _preactivation(_windows(inputs, age, start, rows, plan), taps)
        y = jax.nn.silu(y) if plan.silu else y
        y_ref[0, pl.ds(start, rows), :] = y.astype(y_ref.dtype)


def _backward_kernel(*refs, plan: _Plan):
    """`later` and `ages` hold zeros, the block's steps, and the first steps of the next block."""
    if plan.resets:
        *refs, ages = refs
        x_ref, halo_ref, ct_ref, taps_ref, state_ref, age_ref, *refs = refs
    else:
        x_ref, halo_ref, ct_ref, taps_ref, state_ref, *refs = refs
    dx_ref, dtaps_ref, dstate_ref, inputs, later = refs
    halo, block_t = plan.halo, plan.block_t
    block = pl.num_programs(2) - 1 - pl.program_id(2)
    taps = taps_ref[...]
    age = _column(age_ref, plan) if plan.resets else None
    running = (later, ages) if plan.resets else (later,)

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref in (*running, dtaps_ref):
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    @pl.when(pl.program_id(2) > 0)
    def _():
        for ref in running:
            ref[pl.ds(halo + block_t, halo), :] = ref[pl.ds(halo, halo), :]

    if plan.resets:
        ages[pl.ds(halo, block_t), :] = age
    before = jnp.where(block == 0, state_ref[0], halo_ref[0])
    _load_inputs(inputs, x_ref, before, block, plan)
    sums = [jnp.zeros((1, taps.shape[1]), taps.dtype)] * (plan.width + 1)
    for start, rows in plan.chunks:
        windows = _windows(inputs, age, start, rows, plan)
        g = ct_ref[0, pl.ds(start, rows), :].astype(taps.dtype)
        if plan.silu:
            v = _preactivation(windows, taps)
            s = jax.nn.sigmoid(v)
            g = g * (s * (1 + v * (1 - s)))
        if plan.t_len % block_t:
            step = block * block_t + start + lax.broadcasted_iota(jnp.int32, g.shape, 0)
            g = jnp.where(step < plan.t_len, g, 0)
        later[pl.ds(halo + start, rows), :] = g
        sums = [
            total + jnp.sum(g * part if part is not None else g, axis=0, keepdims=True)
            for total, part in zip(sums, (*windows, None), strict=True)
        ]
    for k, total in enumerate(sums):
        dtaps_ref[0, pl.ds(k, 1), :] += total

    def inputs_gradient(start, rows):
        """Of `rows` inputs from step `start` of the block, which may lie before it."""
        total = jnp.zeros((rows, taps.shape[1]), taps.dtype)
        for j in range(plan.width):
            at = pl.ds(halo + start + j, rows)
            part = _seen(later[at, :], ages[at, :] if plan.resets else None, j)
            total = total + taps[plan.width - 1 - j : plan.width - j] * part
        return total

    for start, rows in plan.chunks:
        dx_ref[0, pl.ds(start, rows), :] = inputs_gradient(start, rows).astype(dx_ref.dtype)

    @pl.when(block == 0)
    def _():
        dstate_ref[0] = inputs_gradient(-halo, halo).astype(dstate_ref.dtype)


def _call(kernel, name, plan, operands, in_specs, outs, out_specs, scratch, flops):
    moved = sum(z.size * z.dtype.itemsize for z in (*operands, *outs))
    elements = plan.batch * plan.t_len * plan.channels
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=plan.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=outs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops * plan.width * elements,
            bytes_accessed=moved,
            transcendentals=elements if plan.silu else 0,
        ),
        interpret=dispatch.interpret("tpu"),
        name=name,
    )(*operands)


def _specs(plan: _Plan, down: bool) -> dict[str, pl.BlockSpec]:
    """Blocks of each operand, time ascending if `down`."""
    order = (lambda j: j) if down else (lambda j: plan.grid[2] - 1 - j)
    per = plan.block_t // plan.halo
    spec = pl.BlockSpec
    return {
        "time": spec((1, plan.block_t, plan.block_c), lambda b, c, j: (b, order(j), c)),
        "before": spec(
            (1, plan.halo, plan.block_c),
            lambda b, c, j: (b, jnp.maximum(order(j) * per - 1, 0), c),
        ),
        "taps": spec((plan.width + 1, plan.block_c), lambda b, c, j: (0, c)),
        "sums": spec((1, plan.width + 1, plan.block_c), lambda b, c, j: (b, 0, c)),
        "state": spec((1, plan.halo, plan.block_c), lambda b, c, j: (b, 0, c)),
        "age": spec((1, 1, plan.block_t), lambda b, c, j: (b, 0, order(j))),
    }


def _shared_operands(plan: _Plan, x, weight, bias, state, resets):
    """taps [W + 1, C], the state filled up to the halo, and the ages if there are resets."""
    acc = jnp.promote_types(jnp.result_type(x, weight, bias), jnp.float32)
    taps = jnp.concatenate([weight.astype(acc), bias.astype(acc)[None]])
    missing = plan.halo - state.shape[1]
    operands = [taps, jnp.pad(state, ((0, 0), (missing, 0), (0, 0)))]
    if resets is not None:  # how many of the inputs before a step belong to its sequence
        count = jnp.zeros(resets.shape, acc)
        for mask in tap_masks(resets, plan.width)[1:]:
            count = count + mask[..., 0]
        fill = plan.grid[2] * plan.block_t - plan.t_len
        operands.append(jnp.pad(count, ((0, 0), (0, fill)))[:, None])
    return vary(operands, x), acc


def _forward(silu, x, weight, bias, state, resets):
    plan = _plan(x, weight, resets, silu)
    rest, acc = _shared_operands(plan, x, weight, bias, state, resets)
    specs = _specs(plan, down=True)
    names = ("time", "taps", "state", "age")[: 1 + len(rest)]
    return _call(
        _forward_kernel, "causal_conv1d", plan, (x, *rest), [specs[n] for n in names],
        [out_like(x, x.shape, x.dtype)], [specs["time"]],
        [pltpu.VMEM((plan.halo + plan.block_t, plan.block_c), acc)], 2,
    )[0]  # fmt: skip


def _rule_forward(silu, *operands):
    return _forward(silu, *operands), operands


def _rule_backward(silu, operands, ct):
    x, weight, bias, state, resets = operands
    plan = _plan(x, weight, resets, silu)
    rest, acc = _shared_operands(plan, x, weight, bias, state, resets)
    specs = _specs(plan, down=False)
    names = ("time", "before", "time", "taps", "state", "age")[: 3 + len(rest)]
    outs = [
        out_like(x, x.shape, x.dtype),
        out_like(x, (plan.batch, plan.width + 1, plan.channels), acc),
        out_like(x, rest[1].shape, x.dtype),
    ]
    window = plan.halo + plan.block_t + plan.halo
    scratch = [
        pltpu.VMEM((plan.halo + plan.block_t, plan.block_c), acc),
        pltpu.VMEM((window, plan.block_c), acc),
    ]
    if plan.resets:
        scratch.append(pltpu.VMEM((window, 1), acc))
    dx, dtaps, dstate = _call(
        _backward_kernel, "causal_conv1d_backward", plan, (x, x, ct, *rest),
        [specs[n] for n in names], outs, [specs[n] for n in ("time", "sums", "state")],
        scratch, 6,
    )  # fmt: skip
    dtaps = jnp.sum(dtaps, axis=0)
    dweight, dbias = dtaps[:-1].astype(weight.dtype), dtaps[-1].astype(bias.dtype)
    return dx, dweight, dbias, dstate[:, plan.halo - state.shape[1] :], None


_differentiable = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_differentiable.defvjp(_rule_forward, _rule_backward)


def causal_conv1d_tpu(
    x: Array, weight: Array, bias: Array, state: Array, resets: Array | None, silu: bool
) -> Array:
    """The convolution by the kernels above; arguments as for `causal_conv1d_xla`.

    float32 accumulation, one rounding. Off a TPU it runs in Pallas' interpreter.
    """
    return _differentiable(silu, x, weight, bias, state, resets)
