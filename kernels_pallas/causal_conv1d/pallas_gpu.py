"""The convolution on Hopper GPUs (Pallas Mosaic GPU): one pass over time each way.

    v_t = b + sum_k w_k x_{t-(W-1)+k}         y_t = act(v_t)
    g_t = dy_t act'(v_t)                      dx_t = sum_k w_k g_{t+(W-1)-k}
    dw_k = sum_t g_t x_{t-(W-1)+k}            db = sum_t g_t

A program is one warpgroup with a chunk of time of one row, and 512 bytes of every step: a thread
has 4 bytes, two neighbouring channels of 16-bit types. Tiles arrive and leave through the copy
engine; the thread walks their steps in the order of the op, the last W-1 inputs in registers. The
backward kernel walks the same way: it makes v and g of a step, and keeps the unfinished dx of the
last W-1 steps in registers, so dx leaves W-1 steps late. What lies beyond a chunk (W-1 inputs
before it; backwards also W-1 inputs and cotangents after it) is fetched and computed once more.
Sums over a chunk are written in float32 and added by XLA: nothing is added atomically.

Floors, arrays of B T C over HBM: forward 2 (x in, y out), backward 3 (x, dy in, dx out); 2 W and
6 W flops an element, one exponential and one root each way. Resets add 4 bytes a step and block of
channels. C is padded, by a copy, where rows of HBM are not a multiple of 16 bytes, and up to one
block of channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import dispatch
from ..compat import gpu_kernel, out_like, vary
from ..time_axis import flip_time
from .xla import causal_conv1d_xla, tap_masks

ROW_BYTES = 512  # of a step of a tile: 4 a thread
GROUP = 4  # steps loaded at once; more take registers from other programs
TILE_BYTES = {"forward": 8192, "backward": 8192}
STAGES = {"forward": 3, "backward": 2}  # tiles of an input in shared memory
# Wanted: three and two turns of as many as the 132 multiprocessors hold at once.
PROGRAMS = {"forward": 3 * 5 * 132, "backward": 2 * 4 * 132}
MIN_TILES = 8  # of a chunk
MOST_TAPS = 8
_LOG2E = 1.4426950408889634

Vectors = tuple[Array, ...]


def unable(x: Array, weight: Array, bias: Array | None) -> dict[str, str | None]:
    """What the kernels do not take of the operands, as `dispatch.resolve` wants it."""
    problem = None
    if weight.shape[0] > MOST_TAPS:
        problem = f"{weight.shape[0]} taps (at most {MOST_TAPS})"
    for array in (x, weight, bias):
        if array is not None and array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            problem = str(array.dtype)
    return {"pallas_gpu": problem}


def chunk_tiles(programs: int, tiles: int, wanted: int) -> int:
    """Tiles of time per chunk, given how many programs rows and channels make.

    At least two, or all: what lies before a chunk is then whole tiles (see `_body`).
    """
    chunks = min(wanted // programs, tiles // max(MIN_TILES, 2))
    return -(-tiles // max(chunks, 1))


class _Plan:
    """Static sizes of a pass over [B, T, C] arrays; `down`: time ascends."""

    def __init__(self, which: str, x: Array, width: int, down: bool, silu: bool):
        batch, self.t_len, channels = x.shape
        size = x.dtype.itemsize
        self.which, self.width, self.down, self.silu, self.dtype = which, width, down, silu, x.dtype
        self.before = width - 1
        self.late = self.before if which == "backward" else 0  # steps an output is late
        # Steps fetched beside a chunk: a single one would be one piece of memory, see below.
        self.beside = max(self.before, 2)
        self.block, self.vector = ROW_BYTES // size, 4 // size
        self.rows, self.stages = TILE_BYTES[which] // ROW_BYTES, STAGES[which]
        blocks, whole = pl.cdiv(channels, self.block), 16 // size
        # A tile as wide as its array would be one piece of memory, which the copy engine moves
        # whole: it would not stop at the last step of a row, as it does for a window.
        self.channels = self.block + whole if blocks == 1 else -(-channels // whole) * whole
        self.steps = max(self.t_len, self.rows)  # of the padded arrays
        self.lanes = blocks * self.block  # of weights and sums
        self.tiles = pl.cdiv(self.t_len, self.rows)
        self.ragged = self.t_len % self.rows != 0
        self.ages = -(-self.rows // 32) * 32  # of a tile: whole 128 bytes
        self.per_chunk = chunk_tiles(batch * blocks, self.tiles, PROGRAMS[which])
        self.chunks = pl.cdiv(self.tiles, self.per_chunk)
        self.grid = (batch, self.chunks, blocks)

    def pad(self, x: Array) -> Array:
        """Wider than a tile, of at least its steps, rows of whole 16 bytes."""
        missing = self.steps - x.shape[1], self.channels - x.shape[2]
        return jnp.pad(x, ((0, 0), (0, missing[0]), (0, missing[1]))) if any(missing) else x

    def pad_lanes(self, x: Array) -> Array:
        """Whole blocks of channels; no type narrower than x's, as a thread loads 4 bytes."""
        x = x if x.dtype.itemsize >= self.dtype.itemsize else x.astype(self.dtype)
        missing = self.lanes - x.shape[-1]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x

    def tile(self, index: Any) -> Any:
        """Where in time the index-th tile of the walk lies."""
        return index if self.down else self.tiles - 1 - index

    def rows_before(self) -> list[int]:
        """Of the steps fetched before a chunk, those that tell, in the order of the walk."""
        rows = range(self.beside)
        return list(rows[-self.before :]) if self.down else list(rows[: self.before])[::-1]

    def rows_after(self) -> list[int]:
        """The same after a chunk."""
        return self.order_of(self.beside)[: self.late]

    def order_of(self, rows: int) -> list[int]:
        """Rows of so many steps in the order of the walk."""
        return list(range(rows)) if self.down else list(range(rows))[::-1]

    def constant(self, value: float) -> Array:
        return self.row(jnp.full((self.block,), value, jnp.float32))

    def row(self, value: Array) -> Array:
        return plgpu.layout_cast(value, plgpu.Layout.WG_STRIDED((self.block,), self.vector))

    def choose(self, condition: Any, yes: Array, no: Array) -> Array:
        """One of two by a scalar condition."""
        return jnp.where(jnp.broadcast_to(condition, (self.block,)), yes, no)


def _windows(plan: _Plan, x: Array, inside: Any, age: Any, window: Vectors):
    """What each tap sees, the oldest first; and the inputs before the next step.

    `inside`: whether the step lies before T; `age`: how many inputs before it belong to its
    sequence. Both scalars, or None for what needs no such question.
    """
    x = x.astype(jnp.float32)
    if inside is not None:
        x = plan.choose(inside, x, plan.constant(0))
    seen = list(window)
    if age is not None:
        for m, old in enumerate(window):
            seen[m] = plan.choose(age >= plan.before - m, old, plan.constant(0))
    following = (*window, x)[1:]
    if inside is not None and not plan.down:  # steps beyond T come first: the state stays
        pairs = zip(following, window, strict=True)
        following = tuple(plan.choose(inside, new, old) for new, old in pairs)
    return [*seen, x], following


def _preactivation(seen: list[Array], weight: Vectors, bias: Array) -> Array:
    total = bias
    for w, x in zip(weight, seen, strict=True):
        total = total + w * x
    return total


def _sigmoid(scaled: Array) -> Array:
    """Of v, given -log2(e) v: with one exponential and one root, to 1e-7 (8 + |v|) of it."""
    root = lax.rsqrt(1 + jnp.exp2(scaled))
    return root * root


def _forward_step(plan, weight, bias, item, carry):
    """(window, y) of a step."""
    x, inside, age = item
    seen, carry = _windows(plan, x, inside, age, carry)
    v = _preactivation(seen, weight, bias)
    return carry, v * _sigmoid(-_LOG2E * v) if plan.silu else v


def _backward_step(plan, weight, scaled, item, carry, *, own=True):
    """The carry, and dx of the step W-1 before.

    The carry is the W-1 inputs before the step, the unfinished dx of the steps before, the oldest
    first, and the sums for the taps and the bias, to which only the chunk's `own` steps add.
    `scaled`: weight and bias times -log2(e), for SiLU's exponential to take v as it comes.
    """
    x, dy, inside, age = item
    window, unfinished, sums = carry
    seen, window = _windows(plan, x, inside, age, window)
    g = dy.astype(jnp.float32)
    if inside is not None:
        g = plan.choose(inside, g, plan.constant(0))
    if plan.silu:
        v = _preactivation(seen, *scaled)
        s = _sigmoid(v)
        part = v * s
        g = g * (s + (part - part * s) * (-1 / _LOG2E))
    if own:
        parts = (*(g * x for x in seen), g)
        sums = tuple(total + part for total, part in zip(sums, parts, strict=True))
    totals = []
    for m, w in enumerate(weight):  # of the step W-1-m before
        j = plan.before - m
        reaching = g if age is None or j == 0 else plan.choose(age >= j, g, plan.constant(0))
        totals.append(w * reaching if j == 0 else unfinished[m] + w * reaching)
    return (window, tuple(totals[1:]), sums), totals[0]


def _body(plan: _Plan, refs: dict[str, Any]) -> None:
    """Both kernels; `refs` holds HBM by name, its shared memory as name_s, and barriers.

    All barriers are placed here. "full" (one a stage), "before" and "after" order copies into
    shared memory before the reads of it. `turn_over` holds the two of a tile.
    """
    b, c, d = (lax.axis_index(name) for name in ("b", "c", "d"))
    lane = pl.ds(d * plan.block, plan.block)
    first = c * plan.per_chunk  # of this chunk's tiles
    tiles = jnp.minimum(plan.per_chunk, plan.tiles - first)
    backward = plan.which == "backward"
    has_age = "age" in refs
    names = ["x"] + ["dy"] * backward
    out = "dx" if backward else "y"
    start = lambda index: plan.tile(index) * plan.rows
    copy = plgpu.copy_gmem_to_smem

    def fetch(i, slot):
        full = refs["full"].at[slot]
        for name in names:
            source = refs[name].at[b, pl.ds(start(first + i), plan.rows), lane]
            copy(source, refs[f"{name}_s"].at[slot], full)
        if has_age:
            copy(refs["age"].at[b, plan.tile(first + i)], refs["age_s"].at[slot], full)

    if plan.before:
        # The inputs before the chunk; the first chunk has the state instead. If time descends, the
        # tile that T cuts short comes first, so another tile of its chunk lies between.
        at = start(first)
        if plan.down:
            at = jnp.maximum(at - plan.beside, 0)
        else:
            at = jnp.minimum(at + plan.rows, plan.steps - plan.beside)
        source = refs["x"].at[b, pl.ds(at, plan.beside), lane]
        copy(source, refs["before_s"], refs["before"])
    for i in range(plan.stages):
        pl.when(i < tiles)(functools.partial(fetch, i, i))
    following = first + tiles  # the tile after the chunk, if there is one
    if plan.late:
        at = start(jnp.minimum(following, plan.tiles - 1))
        at = at if plan.down else at + plan.rows - plan.beside
        for name in names:
            source = refs[name].at[b, pl.ds(at, plan.beside), lane]
            copy(source, refs[f"{name}_after_s"], refs["after"])
        if has_age:
            source = refs["age"].at[b, plan.tile(jnp.minimum(following, plan.tiles - 1))]
            copy(source, refs["age_after_s"], refs["after"])

    # Times one, which the compiler drops: a loop's carry must not be typed as varying over a mesh.
    load = lambda ref: plan.row(ref).astype(jnp.float32) * plan.constant(1)
    weight = tuple(load(refs["weight"][k, lane]) for k in range(plan.width))
    bias = load(refs["bias"][lane])
    window = ()
    if plan.before:
        zero = plan.constant(0)
        given = [zero] * plan.before
        if "state" in refs:
            given = [load(refs["state"][b, m, lane]) for m in range(plan.before)]
        plgpu.barrier_wait(refs["before"])
        rows = [load(refs["before_s"][r]) for r in plan.rows_before()]
        window = tuple(plan.choose(c == 0, s, x) for s, x in zip(given, rows, strict=True))
    carry, step = window, functools.partial(_forward_step, plan, weight, bias)
    if backward:
        zeros = (plan.constant(0),) * (plan.width + 1)
        carry = window, zeros[: plan.before], zeros
        scaled = tuple(-_LOG2E * w for w in weight), -_LOG2E * bias
        step = functools.partial(_backward_step, plan, weight, scaled)

    def turn_over(i):
        """Between the last output of tile i - 1 and the first one of tile i."""
        # Every thread has read its inputs and written its outputs of tile i - 1: so the engine may
        # read the outputs and overwrite the inputs.
        plgpu.commit_smem()

        @pl.when(i > 0)
        def _():
            send(i - 1)
            more = i - 1 + plan.stages
            pl.when(more < tiles)(lambda: fetch(more, lax.rem(more, plan.stages)))

        # The engine has read the outputs of tile i - 2, whose place tile i takes.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)

    def send(i):
        to = refs[out].at[b, pl.ds(start(first + i), plan.rows), lane]
        plgpu.copy_smem_to_gmem(refs["out_s"].at[lax.rem(i, 2)], to)

    order = plan.order_of(plan.rows)
    row = lambda smem, r: tuple(plan.row(smem[f"{name}_s"][r]) for name in names)

    def one_tile(i, carry):
        slot, place = lax.rem(i, plan.stages), lax.rem(i, 2)
        at = start(first + i)
        smem = {k: refs[k].at[slot] for k in ("x_s", "dy_s", "age_s") if k in refs}

        def item(r):
            inside = at + r < plan.t_len if plan.ragged else None
            return *row(smem, r), inside, smem["age_s"][r] if has_age else None

        plgpu.barrier_wait(refs["full"].at[slot])
        ready = []
        following = [item(r) for r in order[:GROUP]]
        for q in range(plan.rows):
            if q == plan.late:
                turn_over(i)
            if q % GROUP == 0:  # the next group is read before this one is worked on
                ready = following
                following = [item(r) for r in order[q + GROUP : q + 2 * GROUP]]
            carry, value = step(ready[q % GROUP], carry)
            # What is late belongs to the tile before; before the first tile, to nobody.
            to = place if q >= plan.late else 1 - place
            refs["out_s"][to, order[q - plan.late]] = value.astype(plan.dtype)
        return carry

    carry = lax.fori_loop(0, tiles, one_tile, carry)
    last = tiles - 1
    if plan.late:
        plgpu.barrier_wait(refs["after"])
        smem = {f"{name}_s": refs[f"{name}_after_s"] for name in names}
        for q, r in enumerate(plan.rows_after()):
            inside = following < plan.tiles
            if plan.down and plan.ragged:
                inside = inside & (start(following) + r < plan.t_len)
            age = refs["age_after_s"][order[q]] if has_age else None
            carry, value = step((*row(smem, r), inside, age), carry, own=False)
            refs["out_s"][lax.rem(last, 2), order[q - plan.late]] = value.astype(plan.dtype)
    plgpu.commit_smem()  # every thread has written its outputs
    send(last)
    if backward:
        for k, value in enumerate(carry[2]):
            refs["sums"][b, c, k, lane] = value
    plgpu.wait_smem_to_gmem(0)


def _call(plan: _Plan, inputs: dict[str, Array], outputs: dict[str, tuple[Any, Any]]) -> Vectors:
    """Run a kernel over inputs {name: array} and outputs {name: (shape, dtype)}."""
    inputs = dict(zip(inputs, vary(tuple(inputs.values()), inputs["x"]), strict=True))
    stages, tile = plan.stages, (plan.rows, plan.block)
    streams = [k for k in ("x", "dy", "age") if k in inputs]
    shape = lambda k: (plan.ages,) if k == "age" else tile
    smem = lambda k, *shape: plgpu.SMEM(shape, inputs[k].dtype)
    scratch = {f"{k}_s": smem(k, stages, *shape(k)) for k in streams}
    scratch["out_s"] = plgpu.SMEM((2, *tile), plan.dtype)
    scratch["full"] = plgpu.Barrier(num_arrivals=len(streams), num_barriers=stages)
    if plan.before:
        scratch["before_s"] = smem("x", plan.beside, plan.block)
        scratch["before"] = plgpu.Barrier(num_arrivals=1)
    if plan.late:
        for k in streams:
            after = (plan.ages,) if k == "age" else (plan.beside, plan.block)
            scratch[f"{k}_after_s"] = smem(k, *after)
        scratch["after"] = plgpu.Barrier(num_arrivals=len(streams))
    names = (*inputs, *outputs, *scratch)
    elements = plan.grid[0] * plan.steps * plan.channels
    moved = sum(z.size * z.dtype.itemsize for z in inputs.values())
    moved += elements * plan.dtype.itemsize
    kernel = gpu_kernel(
        lambda *refs: _body(plan, dict(zip(names, refs, strict=True))),
        out_type=tuple(out_like(inputs["x"], *out) for out in outputs.values()),
        scratch_types=tuple(scratch.values()),
        cost_estimate=pl.CostEstimate(
            flops=(6 if plan.which == "backward" else 2) * plan.width * elements,
            bytes_accessed=moved,
            transcendentals=2 * elements * plan.silu,
        ),
        grid=plan.grid,
        grid_names=("b", "c", "d"),
        # Else every row stored costs two barriers; see `_body` for those that must be.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=dispatch.interpret("gpu"),
    )
    arrays = tuple(inputs.values())
    with jax.named_scope(f"causal_conv1d_{plan.which}"):
        return vary(kernel(*arrays), arrays)  # the wrapper forgets what its outputs vary over


def _operands(plan, x, weight, bias, state, resets, **more) -> dict[str, Array]:
    inputs = {"x": plan.pad(x)} | {k: plan.pad(v) for k, v in more.items()}
    inputs |= {"weight": plan.pad_lanes(weight), "bias": plan.pad_lanes(bias)}
    if plan.before and state is not None:
        inputs["state"] = plan.pad_lanes(state)
    if plan.before and resets is not None:  # how many inputs before a step are of its sequence
        turn = (lambda z: z) if plan.down else flip_time
        masks = tap_masks(turn(resets), plan.width)[1:]
        age = turn(sum(mask[..., 0].astype(jnp.int32) for mask in masks))
        age = jnp.pad(age, ((0, 0), (0, plan.tiles * plan.rows - plan.t_len)))
        age = age.reshape(-1, plan.tiles, plan.rows)
        inputs["age"] = jnp.pad(age, ((0, 0), (0, 0), (0, plan.ages - plan.rows)))
    return inputs


@dispatch.compiled_once(0)
def _forward(static, x, weight, bias, state, resets):
    silu, reverse = static
    plan = _Plan("forward", x, weight.shape[0], not reverse, silu)
    inputs = _operands(plan, x, weight, bias, state, resets)
    (y,) = _call(plan, inputs, {"y": (inputs["x"].shape, x.dtype)})
    return y[:, : x.shape[1], : x.shape[2]]


def _rule_forward(static, *operands):
    return _forward(static, *operands), operands


@dispatch.compiled_once(0)
def _rule_backward(static, operands, dy):
    (silu, reverse), (x, weight, bias, state, resets) = static, operands
    _, t_len, channels = x.shape
    plan = _Plan("backward", x, weight.shape[0], not reverse, silu)
    inputs = _operands(plan, x, weight, bias, state, resets, dy=dy)
    sums = (plan.grid[0], plan.chunks, plan.width + 1, plan.lanes)
    outputs = {"dx": (inputs["x"].shape, x.dtype), "sums": (sums, jnp.float32)}
    dx, sums = _call(plan, inputs, outputs)
    sums = jnp.sum(sums, axis=(0, 1))[:, :channels]
    grads = sums[:-1].astype(weight.dtype), sums[-1].astype(bias.dtype)
    dstate = _state_gradient(static, operands, dy) if plan.before else state
    return dx[:, :t_len, :channels], *grads, dstate, None


def _state_gradient(static, operands, dy) -> Array | None:
    """Only the first W-1 steps see the state; XLA drops this if nobody asks."""
    (silu, reverse), (x, weight, bias, state, resets) = static, operands
    if state is None:
        return None
    steps = min(x.shape[1], state.shape[1])
    head: Callable = lambda z: z[:, :steps]
    if reverse:
        head = lambda z: flip_time(z[:, z.shape[1] - steps :])
    x, dy, resets = head(x), head(dy), None if resets is None else head(resets)
    _, pull = jax.vjp(lambda s: causal_conv1d_xla(x, weight, bias, s, resets, silu), state)
    return pull(dy)[0]


_differentiable = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_differentiable.defvjp(_rule_forward, _rule_backward)


def causal_conv1d_gpu(
    x: Array,
    weight: Array,
    bias: Array,
    state: Array | None,
    resets: Array | None,
    silu: bool,
    reverse: bool = False,
) -> Array:
    """The convolution by the kernels above; arguments as for `causal_conv1d_xla`, and two more.

    float32 accumulation, one rounding. Off a GPU it runs in Pallas' interpreter, if this jax has
    one. See `unable` for what it takes.

    Args:
        state: may be None, for zeros.
        reverse: time descends; x, resets and y stay as they lie, state is in order of processing.
    """
    return _differentiable((silu, reverse), x, weight, bias, state, resets)
