"""What the polynomial mixer's kernels for Hopper GPUs share: tiles of tokens, streamed through
shared memory, and the polynomial in registers (Pallas Mosaic GPU); see pallas_gpu.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import dispatch
from ..compat import gpu_kernel, out_like, vary
from ..gpu_stream import stream_tiles

LANES = 256  # channels of a program
ROWS = {"sums": 16, "change": 16, "forward": 16, "suffix": 16, "backward": 8}  # tokens of a tile
STAGES = 4  # tiles in flight
PROGRAMS = 528  # four for each of 132 multiprocessors
MIN_TILES = 2  # of a chunk


class Plan:
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


def row(value):
    return plgpu.layout_cast(value, plgpu.Layout.WG_STRIDED((LANES,), 2))


def constant(value: float):
    return row(jnp.full((LANES,), value, jnp.float32))


def load(ref, index):
    return row(ref[index].astype(jnp.float32))


def held(ref, index):
    """From HBM into registers. Times one, which the compiler drops: a loop's carry must not be
    typed as varying over a mesh."""
    return load(ref, index) * constant(1)


def splat(scalar):
    return row(jnp.broadcast_to(scalar, (LANES,)))


def act(h):
    return jnp.minimum(jnp.maximum(jnp.maximum(h, h * 0.01), -0.1), 6.0)


def slope(h):
    zero = constant(0)
    inside = jnp.where(h < 0, constant(0.01), constant(1))
    return jnp.where(h < -10, zero, jnp.where(h > 6, zero, inside))


def polynomial(a, coeff):
    value = coeff[-1]
    for c in coeff[-2::-1]:
        value = value * a + c
    return value * a


def with_derivative(a, coeff):
    """The polynomial and its derivative by a."""
    value, change = coeff[-1], None
    for c in (*coeff[-2::-1], None):
        change = value if change is None else change * a + value
        value = value * a if c is None else value * a + c
    return value, change


class Marks(NamedTuple):
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
        value = splat(self.gates[r, self.first])
        for i in range(1, self.count):
            other = splat(self.gates[r, self.first + i])
            value = jnp.where(self.heads > i - 0.5, other, value)
        return value


class Call:
    """One kernel: its operands by name, streamed through shared memory tile by tile or not."""

    def __init__(self, kind: str, like: Array):
        batch, n, width = like.shape
        self.plan, self.like = Plan(kind, batch, n, width), like
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

    def run(
        self, body, down: bool = True, flops: int = 20, beside: str | None = None
    ) -> dict[str, Array]:
        """Outputs by name. `beside`: a narrow stream that is copied into further columns of what
        leaves first (by all programs of the tokens alike, which is cheap)."""
        plan, like = self.plan, self.like
        rows, stages = plan.rows, plan.stages
        pad = plan.tiles * rows - plan.n
        streams = dict(self.streams)
        narrow = ("marks", "gate", "beside")
        for name in narrow:  # narrow: copied whole, so nothing may be missing
            if name in streams and streams[name].shape[1] != plan.tiles * rows:
                streams[name] = jnp.pad(streams[name][:, : plan.n], ((0, 0), (0, pad), (0, 0)))
        wide = [name for name in streams if name not in narrow]
        if plan.n < rows:
            missing = ((0, 0), (0, rows - plan.n), (0, 0))
            streams |= {name: jnp.pad(streams[name], missing) for name in wide}
        tokens = max(plan.n, rows)
        outs = {k: ((like.shape[0], tokens, like.shape[2]), d) for k, d in self.leaving.items()}
        extra = 0 if beside is None else streams[beside].shape[2]
        first = next(iter(outs), None)
        if beside is not None:
            outs[first] = (*like.shape[:1], tokens, like.shape[2] + extra), outs[first][1]
        outs |= {
            k: ((like.shape[0], plan.chunks, *shape, like.shape[2]), jnp.float32)
            for k, shape in self.outputs.items()
        }
        names = (*streams, *self.whole, *outs)
        tile = lambda name: (rows, LANES if name in wide else streams[name].shape[2])
        scratch = [plgpu.SMEM((stages, *tile(k)), v.dtype) for k, v in streams.items()]
        scratch += [plgpu.SMEM((2, rows, LANES), d) for d in self.leaving.values()]
        if beside is not None:
            scratch += [plgpu.SMEM((2, rows, extra), outs[first][1])]
        scratch += [plgpu.Barrier(num_arrivals=len(streams), num_barriers=stages)]

        def kernel_body(*refs):
            *refs, barrier = refs
            hbm = dict(zip(names, refs[: len(names)], strict=True))
            more = () if beside is None else ("copy of what is beside",)
            smem = dict(zip((*streams, *self.leaving, *more), refs[len(names) :], strict=True))
            b, c, lane, tiles = plan.place()

            def at(name):
                where = lambda i: pl.ds(plan.start(c, i, tiles, down), rows)
                if name in wide or name in self.leaving:
                    return lambda i: hbm[name].at[b, where(i), lane]
                return lambda i: hbm[name].at[b, where(i)]

            sources = [(at(k), smem[k]) for k in streams]
            sinks = [(at(k), smem[k]) for k in self.leaving]
            if beside is not None:
                columns = pl.ds(like.shape[2], extra)
                rest = lambda i: hbm[first].at[
                    b, pl.ds(plan.start(c, i, tiles, down), rows), columns
                ]
                sinks.append((rest, smem[more[0]]))

            def walk(step, carry):
                """carry = step(row's number in the tile, is it a token, inputs, outputs, carry)."""

                def one_tile(i, ins, outs, carry):
                    ins = dict(zip(streams, ins, strict=True))
                    outs = dict(zip((*self.leaving, *more), outs, strict=True))
                    if beside is not None:
                        outs[more[0]][...] = ins[beside][...]
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
