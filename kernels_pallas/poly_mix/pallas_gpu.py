"""The polynomial mixer on Hopper GPUs (Pallas Mosaic GPU): tiles through shared memory, sums in
registers.

A program is one warpgroup that owns 256 channels of one row, two to a thread, and walks a chunk of
the tokens serially. Tiles [tokens, 256] arrive through the bulk copy engine, a few ahead; results
leave by it, too. Tokens are cut into as many chunks as fill the chip, in two passes without
atomics: sums of the chunks; then every chunk from the sums before it.

Bytes of h's elements over HBM, 16 bit: mean forward 2, backward 4 (XLA's, elementwise); causal
forward 4 and in chunks 6, backward 6 and in chunks 8, with gates by head 10 (a . dy, which XLA adds
up within heads, leaves as well).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import dispatch
from ..compat import gpu_kernel, out_like, vary
from ..gpu_stream import stream_tiles
from .aggregate import counts, rows_from_sums
from .operands import Operands
from .state import PolyState, reciprocal
from .xla import weighted_sums

LANES = 256  # channels of a program
ROWS = {"sums": 16, "forward": 16, "suffix": 16, "backward": 8}  # tokens of a tile
STAGES = 4  # tiles in flight
PROGRAMS = 528  # four for each of 132 multiprocessors
MIN_TILES = 2  # of a chunk
MOST_DEGREES = 8  # whose sums fit into registers


def unable(operands: Operands, causal: bool, frames, gate: Array | None = None) -> str | None:
    """What the kernels do not take, None for nothing."""
    h, coeff, weights, rotation, _, query_weights = operands
    if h.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{h.dtype}"
    if h.shape[2] % LANES or h.shape[2] == LANES:
        return f"{h.shape[2]} channels (a multiple of {LANES}, from {2 * LANES} on)"
    if coeff.shape[1] > MOST_DEGREES:
        return f"degree {coeff.shape[1]} (up to {MOST_DEGREES})"
    if rotation is not None or query_weights is not None or frames is not None:
        return "rotations, query_weights and frames"
    if gate is not None:
        heads = gate.shape[2]
        size = h.shape[2] // heads
        if heads % 4 or (LANES % size and size % LANES):
            return f"{heads} gates of {size} channels"
    return None


class _Plan:
    """How tokens are cut into tiles and chunks for one kind of pass."""

    def __init__(self, kind: str, batch: int, n: int, width: int):
        self.n, self.rows, self.stages = n, ROWS[kind], STAGES
        self.tiles = pl.cdiv(n, self.rows)
        blocks = width // LANES
        size = max(ROWS.values())  # chunks are alike in all passes
        pieces = pl.cdiv(n, size)
        chunks = min(max(1, PROGRAMS // (batch * blocks)), max(1, pieces // MIN_TILES))
        self.per_chunk = pl.cdiv(pieces, chunks) * (size // self.rows)
        self.chunks = pl.cdiv(self.tiles, self.per_chunk)
        self.grid = (batch, self.chunks, blocks)

    def place(self):
        """This program's row, chunk and channels, and the number of tiles in its chunk."""
        b, c, d = (lax.axis_index(name) for name in ("b", "c", "d"))
        tiles = jnp.minimum(self.per_chunk, self.tiles - c * self.per_chunk)
        return b, c, pl.ds(d * LANES, LANES), tiles

    def start(self, c, i, tiles, down: bool):
        """The first token of the i-th tile of chunk c, counted from its end if not `down`."""
        return (c * self.per_chunk + (i if down else tiles - 1 - i)) * self.rows


def _row(value):
    return plgpu.layout_cast(value, plgpu.Layout.WG_STRIDED((LANES,), 2))


def _constant(value: float):
    return _row(jnp.full((LANES,), value, jnp.float32))


def _load(ref, index):
    return _row(ref[index].astype(jnp.float32))


def _held(ref, index):
    """From HBM into registers. Times one, which the compiler drops: a loop's carry must not be
    typed as varying over a mesh."""
    return _load(ref, index) * _constant(1)


def _wide(scalar):
    return _row(jnp.broadcast_to(scalar, (LANES,)))


def _act(h):
    return jnp.minimum(jnp.maximum(jnp.maximum(h, h * 0.01), -0.1), 6.0)


def _slope(h):
    zero = _constant(0)
    inside = jnp.where(h < 0, _constant(0.01), _constant(1))
    return jnp.where(h < -10, zero, jnp.where(h > 6, zero, inside))


def _polynomial(a, coeff):
    value = coeff[-1]
    for c in coeff[-2::-1]:
        value = value * a + c
    return value * a


def _with_derivative(a, coeff):
    """The polynomial and its derivative by a."""
    value, change = coeff[-1], None
    for c in (*coeff[-2::-1], None):
        change = value if change is None else change * a + value
        value = value * a if c is None else value * a + c
    return value, change


class _Marks(NamedTuple):
    """What is known of a tile's tokens, in shared memory.

    Attributes:
        marks: [tokens, 4]: weight, 1 / count, and two zeros (copies come in 16 bytes). gates:
            [tokens, heads] or None. heads: which of this program's heads a channel belongs to, and
            how many there are. first: the first of them.
    """

    marks: Any
    gates: Any
    heads: Any
    count: int
    first: Any

    def gate(self, r):
        value = _wide(self.gates[r, self.first])
        for i in range(1, self.count):
            other = _wide(self.gates[r, self.first + i])
            value = jnp.where(self.heads > i - 0.5, other, value)
        return value


class _Call:
    """One kernel: its operands by name, streamed through shared memory tile by tile or not."""

    def __init__(self, kind: str, like: Array):
        batch, n, width = like.shape
        self.plan, self.like = _Plan(kind, batch, n, width), like
        self.streams, self.whole, self.leaving, self.outputs = {}, {}, {}, {}

    def stream(self, **arrays):
        self.streams |= {k: v for k, v in arrays.items() if v is not None}
        return self

    def hold(self, **arrays):
        self.whole |= {k: v for k, v in arrays.items() if v is not None}
        return self

    def leave(self, **dtypes):
        self.leaving |= {k: v for k, v in dtypes.items() if v is not None}
        return self

    def give(self, **shapes):
        self.outputs |= shapes
        return self

    def run(self, body, down: bool = True, flops: int = 20) -> dict[str, Array]:
        plan, like = self.plan, self.like
        rows, stages = plan.rows, plan.stages
        pad = plan.tiles * rows - plan.n
        streams = dict(self.streams)
        for name in ("marks", "gate"):  # narrow: copied whole, so nothing may be missing
            if name in streams and streams[name].shape[1] != plan.tiles * rows:
                streams[name] = jnp.pad(streams[name][:, : plan.n], ((0, 0), (0, pad), (0, 0)))
        wide = [name for name in streams if name not in ("marks", "gate")]
        if plan.n < rows:
            missing = ((0, 0), (0, rows - plan.n), (0, 0))
            streams |= {name: jnp.pad(streams[name], missing) for name in wide}
        tokens = max(plan.n, rows)
        outs = {k: ((like.shape[0], tokens, like.shape[2]), d) for k, d in self.leaving.items()}
        outs |= {
            k: ((like.shape[0], plan.chunks, *shape, like.shape[2]), jnp.float32)
            for k, shape in self.outputs.items()
        }
        names = (*streams, *self.whole, *outs)
        tile = lambda name: (rows, LANES if name in wide else streams[name].shape[2])
        scratch = [plgpu.SMEM((stages, *tile(k)), v.dtype) for k, v in streams.items()]
        scratch += [plgpu.SMEM((2, rows, LANES), d) for d in self.leaving.values()]
        scratch += [plgpu.Barrier(num_arrivals=len(streams), num_barriers=stages)]

        def kernel_body(*refs):
            *refs, barrier = refs
            hbm = dict(zip(names, refs[: len(names)], strict=True))
            smem = dict(zip((*streams, *self.leaving), refs[len(names) :], strict=True))
            b, c, lane, tiles = plan.place()

            def at(name):
                where = lambda i: pl.ds(plan.start(c, i, tiles, down), rows)
                if name in wide or name in self.leaving:
                    return lambda i: hbm[name].at[b, where(i), lane]
                return lambda i: hbm[name].at[b, where(i)]

            sources = [(at(k), smem[k]) for k in streams]
            sinks = [(at(k), smem[k]) for k in self.leaving]

            def walk(step, carry):
                """carry = step(row's number in the tile, is it a token, inputs, outputs, carry)."""

                def one_tile(i, ins, outs, carry):
                    ins = dict(zip(streams, ins, strict=True))
                    outs = dict(zip(self.leaving, outs, strict=True))
                    start = plan.start(c, i, tiles, down)
                    for r in range(rows) if down else range(rows)[::-1]:
                        inside = None if plan.n % rows == 0 else start + r < plan.n
                        carry = step(r, inside, ins, outs, carry)
                    return carry

                return stream_tiles(tiles, sources, sinks, barrier, stages, one_tile, carry)

            body(hbm, b, c, lane, walk)

        inputs = (*streams.values(), *self.whole.values())
        moved = sum(z.size * z.dtype.itemsize for z in inputs)
        kernel = gpu_kernel(
            kernel_body,
            out_type=tuple(out_like(like, *out) for out in outs.values()),
            scratch_types=scratch,
            cost_estimate=pl.CostEstimate(
                flops=flops * like.size, transcendentals=0, bytes_accessed=moved
            ),
            grid=plan.grid,
            grid_names=("b", "c", "d"),
            # Allowed: no shared memory is both read and written by threads, and the copy engine
            # sees it after `commit_smem` only.
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
            interpret=dispatch.interpret("gpu"),
        )
        results = vary(kernel(*inputs), inputs)
        results = dict(zip(outs, results, strict=True))
        return results | {k: results[k][:, : plan.n] for k in self.leaving}


def _columns(hbm, lane, degree):
    return [_held(hbm["coeff"], (j, lane)) for j in range(degree)]


def _weigh(value, weight, inside, ins, r):
    """The value of a token times its weight, 0 where that is 0: there it may be NaN."""
    if weight:
        w = ins["marks"][r, 0]
        wide = jnp.broadcast_to(w != 0, (LANES,))
        return jnp.where(wide, value * w, _constant(0))
    if inside is not None:
        return jnp.where(jnp.broadcast_to(inside, (LANES,)), value, _constant(0))
    return value


def _sums(h: Array, marks: Array | None, coeff: Array | None, degree: int) -> Array:
    """Sums over the tokens of every chunk of w p(h) [B, chunks, 1, E], or of the w act(h)^j
    [B, chunks, degree, E] if `coeff` [degree, E] is None."""
    call = _Call("sums", h).stream(h=h, marks=marks).hold(coeff=coeff)
    many = 1 if coeff is not None else degree

    def body(hbm, b, c, lane, walk):
        known = None if coeff is None else _columns(hbm, lane, degree)

        def step(r, inside, ins, outs, sums):
            a = _act(_load(ins["h"], r))
            weigh = functools.partial(_weigh, weight=marks is not None, inside=inside, ins=ins, r=r)
            if known is not None:
                return (sums[0] + weigh(_polynomial(a, known)),)
            if marks is not None or inside is not None:
                term, a = weigh(a), weigh_nothing(a, ins, inside, r)
            else:
                term = a
            new = []
            for j, total in enumerate(sums):
                term = term * a if j else term
                new.append(total + term)
            return tuple(new)

        def weigh_nothing(a, ins, inside, r):
            keep = inside if marks is None else ins["marks"][r, 0] != 0
            return jnp.where(jnp.broadcast_to(keep, (LANES,)), a, _constant(0))

        sums = walk(step, (_constant(0),) * many)
        for j, value in enumerate(sums):
            hbm["sums"][b, c, j, lane] = value

    return call.give(sums=(many,)).run(body, flops=4 + 2 * degree)["sums"]


def gpu_moments(h, degree, weights, frames, dtype):
    """As `xla.moments`, for one frame."""
    del frames, dtype
    return _moments(h, weights, degree)


@dispatch.compiled_once(2)
def _moments(h, weights, degree):
    sums = _sums(h, None if weights is None else _marks(weights, None), None, degree)
    return jnp.moveaxis(jnp.sum(sums, axis=1, keepdims=True), 2, 3)


def _marks(weights: Array, share: Array | None) -> Array:
    """[B, N, 4] of [B, N] weights and 1 / count."""
    zero = jnp.zeros_like(weights)
    return jnp.stack([weights, zero if share is None else share, zero, zero], axis=-1)


def _heads(gate: Array | None, width: int) -> tuple[int, Array | None]:
    """Channels of a head; and which of its program's heads a channel belongs to."""
    if gate is None:
        return 1, None
    size = width // gate.shape[2]
    return size, (jnp.arange(LANES) // size).astype(jnp.float32)


def _gates(hbm, size, ins, lane):
    """`_Marks` of a tile."""
    if "gate" not in ins:
        return _Marks(ins["marks"], None, None, 0, 0)
    count = max(1, LANES // size)
    first = lax.div(lax.axis_index("d") * LANES, size)
    return _Marks(ins["marks"], ins["gate"], None, count, first)


@dispatch.compiled_once(5, 6)
def _forward(h, coeff, gate, marks, start, weighted, dtype):
    """out [B, N, E] and the sums after every chunk [B, chunks, E]."""
    degree, columns = coeff.shape[1], coeff.T
    plan = _Plan("forward", *h.shape)
    entering = start[:, None]
    if plan.chunks > 1:
        sums = _sums(h, marks if weighted else None, columns, degree)[:, :-1, 0]
        sums = jnp.concatenate([entering, sums], axis=1)
        entering = jnp.cumsum(sums, axis=1)
    size, heads = _heads(gate, h.shape[2])
    call = _Call("forward", h).stream(h=h, marks=marks, gate=gate)
    call.hold(coeff=columns, entering=entering, heads=heads)

    def body(hbm, b, c, lane, walk):
        known = _columns(hbm, lane, degree)
        which = None if heads is None else _held(hbm["heads"], (pl.ds(0, LANES),))

        def step(r, inside, ins, outs, carry):
            (total,) = carry
            value = _polynomial(_act(_load(ins["h"], r)), known)
            total = total + _weigh(value, weighted, inside, ins, r)
            out = total * ins["marks"][r, 1]
            if gate is not None:
                out = out * _gates(hbm, size, ins, lane)._replace(heads=which).gate(r)
            outs["out"][r] = out.astype(dtype)
            return (total,)

        (total,) = walk(step, (_held(hbm["entering"], (b, c, lane)),))
        hbm["last"][b, c, lane] = total

    call.leave(out=dtype).give(last=())
    result = call.run(body, flops=8 + 2 * degree)
    return result["out"], result["last"]


@dispatch.compiled_once(7)
def _backward(h, coeff, gate, marks, last, ct, ct_last, weighted):
    """dh, dcoeff, a . ct (None without gates) and the gradient of the sums before all tokens."""
    degree, columns = coeff.shape[1], coeff.T
    plan = _Plan("backward", *h.shape)
    size, heads = _heads(gate, h.shape[2])
    pulled = lambda ins, which, hbm, lane, r, g: (
        (g if gate is None else g * _gates(hbm, size, ins, lane)._replace(heads=which).gate(r))
        * ins["marks"][r, 1]
    )

    def held_heads(hbm):
        return None if heads is None else _held(hbm["heads"], (pl.ds(0, LANES),))

    entering = ct_last[:, None]
    if plan.chunks > 1:

        def sum_up(hbm, b, c, lane, walk):
            which = held_heads(hbm)

            def step(r, inside, ins, outs, carry):
                g = pulled(ins, which, hbm, lane, r, _load(ins["ct"], r))
                return (carry[0] + _weigh(g, False, inside, ins, r),)

            hbm["sums"][b, c, lane] = walk(step, (_constant(0),))[0]

        call = _Call("suffix", h).stream(ct=ct, marks=marks, gate=gate).hold(heads=heads)
        sums = call.give(sums=()).run(sum_up, flops=3)["sums"][:, 1:]
        sums = jnp.concatenate([sums, entering], axis=1)
        entering = lax.cumsum(sums, axis=1, reverse=True)

    def body(hbm, b, c, lane, walk):
        known, which = _columns(hbm, lane, degree), held_heads(hbm)

        def step(r, inside, ins, outs, carry):
            suffix, total, *dcoeff = carry
            wide, ct = _load(ins["h"], r), _load(ins["ct"], r)
            ct = _weigh(ct, False, inside, ins, r)
            suffix = suffix + pulled(ins, which, hbm, lane, r, ct)
            a = _act(wide)
            value, change = _with_derivative(a, known)
            dp = _weigh(suffix, weighted, inside, ins, r)
            if gate is not None:
                outs["dot"][r] = (total * ins["marks"][r, 1] * ct).astype(ct_dtype)
                total = total - _weigh(value, weighted, inside, ins, r)
            dh, slope = dp * change, _slope(wide)
            if weighted or inside is not None:
                keep = ins["marks"][r, 0] != 0 if weighted else inside
                keep = jnp.broadcast_to(keep, (LANES,))
                dh, a = (jnp.where(keep, z, _constant(0)) for z in (dh, a))
            outs["dh"][r] = (dh * slope).astype(h.dtype)
            new, term = [], dp
            for before in dcoeff:
                term = term * a
                new.append(before + term)
            return suffix, total, *new

        suffix = _held(hbm["entering"], (b, c, lane))
        total = _constant(0) if gate is None else _held(hbm["last"], (b, c, lane))
        suffix, _, *dcoeff = walk(step, (suffix, total, *(_constant(0),) * degree))
        hbm["left"][b, c, lane] = suffix
        for j, value in enumerate(dcoeff):
            hbm["dcoeff"][b, c, j, lane] = value

    ct_dtype = None if gate is None else ct.dtype
    call = _Call("backward", h).stream(h=h, ct=ct, marks=marks, gate=gate)
    call.hold(coeff=columns, entering=entering, heads=heads, last=None if gate is None else last)
    call.leave(dh=h.dtype, dot=ct_dtype).give(left=(), dcoeff=(degree,))
    result = call.run(body, down=False, flops=12 + 5 * degree)
    dcoeff = jnp.sum(result["dcoeff"], axis=(0, 1)).T
    return result["dh"], dcoeff, result.get("dot"), result["left"][:, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _causal(h, coeff, gate, marks, start, weighted, dtype):
    out, last = _forward(h, coeff, gate, marks, start, weighted, dtype)
    return out, last[:, -1]


def _causal_forward(h, coeff, gate, marks, start, weighted, dtype):
    out, last = _forward(h, coeff, gate, marks, start, weighted, dtype)
    return (out, last[:, -1]), (h, coeff, gate, marks, last)


def _causal_backward(weighted, dtype, saved, cts):
    h, coeff, gate, marks, last = saved
    dh, dcoeff, dot, dstart = _backward(h, coeff, gate, marks, last, *cts, weighted)
    if gate is not None:
        dot = dot.reshape(*gate.shape, -1)
        dot = jnp.sum(dot.astype(jnp.float32), axis=-1)
    return dh, dcoeff, dot, None, dstart


_causal.defvjp(_causal_forward, _causal_backward)


def poly_mix_gpu(
    operands: Operands, causal: bool, frames, out_dtype, gate: Array | None = None
) -> tuple[Array, PolyState]:
    """Rows [B, R, E] and state of `poly_mix` by the kernels above; see `unable`.

    Args:
        gate: [B, N, H] for causal rows: each is multiplied with its token's gate, head by head.
    """
    h, coeff, weights, _, state, _ = operands
    batch, n, width = h.shape
    if not causal:
        sums = weighted_sums(h, coeff, weights, (n,), gpu_moments)
        count = counts(n, weights, False, (n,), coeff.dtype)
        rows, last = rows_from_sums(sums, count, state)
        return rows.astype(out_dtype), last
    count = counts(n, weights, True, None, coeff.dtype)
    start = vary(jnp.zeros((batch, width), jnp.float32), h)
    if state is not None:
        before = lax.stop_gradient(state.count)
        count, start = before[:, None] + count, before[:, None] * state.mean
    count = jnp.broadcast_to(count, (batch, n))
    share = reciprocal(count)
    marks = _marks(jnp.ones_like(share) if weights is None else weights, share)
    gate = None if gate is None else gate.astype(jnp.float32)
    marks, gate = vary((marks, gate), h)
    rows, last = _causal(h, coeff, gate, marks, start, weights is not None, jnp.dtype(out_dtype))
    return rows, PolyState(last * share[:, -1:], count[:, -1])
