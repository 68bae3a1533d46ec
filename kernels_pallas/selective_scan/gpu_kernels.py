"""The kernels of the selective scan on Hopper GPUs (Pallas Mosaic GPU); see pallas_gpu.py.

A program is one warpgroup with 32 V channels of a row. The N states of a channel are split over its
four warps, J = N/4 each, and the channels over the lanes, V each, so that a thread holds J V states
in registers: nothing is exchanged between threads in a step. Arrays of states are [4, J, 32 V]
(warp, state of the warp, channel). A lap of 8 steps, half a tile, goes through three parts:

    prepare: step sizes and inputs, per step and channel, spread over all threads
    advance: the recurrence, each warp at its own pace, and the warp's share of y = sum_n C h
    finish: the four shares added, skip and gate, per step and channel

which hand over through shared memory. The parts of three laps in a row run interleaved, so that one
part's latencies hide behind another's work; two barriers per lap stand between them. Pallas' own
barriers, around every store, are switched off.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import dispatch
from ..compat import gpu_kernel, out_like, vary
from .fused import LOG2E, sigmoid_short, softplus_short

WARPS, WARP = 4, 32
TILE = 16  # steps that are copied at once, and between two saved states
LAP = 8  # steps between barriers; an even number of laps makes a tile
STAGES = 3  # tiles in shared memory: two in use, one on its way
SUB = 4  # steps whose states and decays the backward pass holds in registers


class Layouts:
    """Which thread holds what, for J states a warp and V channels a lane."""

    def __init__(self, j: int, v: int):
        self.channels = WARP * v
        self.shape = (WARPS, j, self.channels)
        tiling = plgpu.Tiling((self.shape, (j, v)))
        options = {"warp_dims": (-5,), "lane_dims": (-3,), "vector_dim": -1}
        self.state = plgpu.Layout.TILED(tiling, **options)
        self.share = self.state.reduce((1,))  # [4, channels]: a warp a row
        self.row = self.state.reduce((0, 1))  # [channels]: the same in every warp
        self.column = self.state.reduce((2,))  # [4, J]: the same in every lane

    def rows(self, ref):
        """Four steps [4, channels] in float32, a warp a step."""
        return plgpu.layout_cast(ref[...], self.share).astype(jnp.float32)

    def states(self, ref):
        return plgpu.layout_cast(ref[...], self.state)

    def along_states(self, ref):
        """One value per channel, for every state."""
        return self._spread(plgpu.layout_cast(ref[...], self.row), (2,))

    def along_channels(self, ref):
        """One value per state, for every channel."""
        return self._spread(plgpu.layout_cast(ref[...], self.column), (0, 1))

    def _spread(self, value, axes):
        return plgpu.layout_cast(lax.broadcast_in_dim(value, self.shape, axes), self.state)

    def over_steps(self, value):
        """[channels] for four steps."""
        shape = (WARPS, self.channels)
        return plgpu.layout_cast(lax.broadcast_in_dim(value, shape, (1,)), self.share)

    def once(self, source, smem, barrier, layout):
        """A piece of HBM in registers; `smem` may be used again afterwards."""
        plgpu.copy_gmem_to_smem(source, smem, barrier)
        plgpu.barrier_wait(barrier)
        value = plgpu.layout_cast(smem[...], layout)
        plgpu.commit_smem()
        # Times one, which the compiler drops: a loop's carry must not be typed as varying.
        return value * plgpu.layout_cast(jnp.ones(value.shape, value.dtype), layout)


def _call(name, body, grid, inputs, outputs, scratch, cost):
    """Run body(**references) over inputs {name: array} and outputs {name: (shape, dtype)}."""
    like = next(iter(inputs.values()))
    names = (*inputs, *outputs, *scratch)
    kernel = gpu_kernel(
        lambda *refs: body(**dict(zip(names, refs, strict=True))),
        out_type=tuple(out_like(like, *out) for out in outputs.values()),
        scratch_types=tuple(scratch.values()),
        cost_estimate=cost,
        grid=grid,
        grid_names=("r", "d"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=dispatch.interpret("gpu"),
    )
    arrays = tuple(inputs.values())
    with jax.named_scope(name):
        results = vary(kernel(*arrays), arrays)  # the wrapper forgets what its outputs vary over
    return dict(zip(outputs, results, strict=True))


def _cost(size, states, exps, flops, arrays):
    """`exps` exponentials and `flops` per element and state; `arrays` moved once."""
    return pl.CostEstimate(
        flops=size * (states * flops + 40),
        transcendentals=size * (states * exps + 3),
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays),
    )


def _steps(refs, lay, rows, bias, use_softplus):
    """Raw and actual step sizes of four steps."""
    raw = lay.rows(refs.at[rows]) + bias
    return raw, softplus_short(raw) if use_softplus else raw


def walk(
    static, v, u, delta, z, a, b, c, skip, bias, start, keep, *, mode, save=False
):  # fmt: skip
    """Run the recurrence over rows [R, T]; T is a multiple of TILE, D of 128.

    Args:
        static: (softplus, reverse).
        v: channels per lane.
        u, delta, z: [R, T, D]; a: [4, J, D]; b, c: [R, G, T, 4, J]; skip, bias: [D];
            start: [R, 4, J, D]; keep: [R, T, 4] float32, 0 where a step forgets (four times, as
            copies come in 16 bytes), or None.
        mode: "output": y and the last state. "state": the last state only. "adjoint": of
            s = decay (s + gy C), gy = u silu(z), with u the output's cotangent, the last s.
        save: whether to return the state before every tile, too: [R, T/TILE, 4, J, D].

    Returns:
        dict of "out" [R, T, D], "last" [R, 4, J, D], "saved".
    """
    use_softplus, reverse = static
    lay = Layouts(a.shape[1], v)
    (rows, _, width), tiles = u.shape, u.shape[1] // TILE
    per_group = width // b.shape[1] // lay.channels
    down = not reverse
    streams = {"u": u, "delta": delta, "mix": c if mode == "adjoint" else b}
    if z is not None and mode != "state":
        streams["z"] = z
    if mode == "output":
        streams["read"] = c
    if keep is not None:
        streams["keep"] = keep
    weights = {"a": a, "start": start, "bias": bias} | ({"skip": skip} if mode == "output" else {})
    outputs = {"last": (start.shape, start.dtype)}
    if mode == "output":
        outputs["out"] = (u.shape, u.dtype)
    if save:
        outputs["saved"] = ((rows, tiles, *start.shape[1:]), start.dtype)
    tile = dict.fromkeys(("u", "delta", "z"), (TILE, lay.channels)) | {"keep": (TILE, 4)}
    tile |= dict.fromkeys(("mix", "read"), (TILE, *a.shape[:2]))
    scratch = {f"{k}_s": plgpu.SMEM((STAGES, *tile[k]), x.dtype) for k, x in streams.items()}
    scratch |= {k: plgpu.SMEM((2, LAP, lay.channels), jnp.float32) for k in ("dt", "x")}
    scratch |= {"whole": plgpu.SMEM(lay.shape, jnp.float32)}
    if mode == "output":
        scratch |= {"shares": plgpu.SMEM((2, LAP, WARPS, lay.channels), jnp.float32)}
        scratch |= {"y": plgpu.SMEM((2, LAP, lay.channels), u.dtype)}
    scratch |= {"full": plgpu.Barrier(num_arrivals=len(streams), num_barriers=STAGES)}
    scratch |= {"one": plgpu.Barrier(num_arrivals=1)}

    def body(last, whole, dt, x, full, one, **refs):
        r, d = lax.axis_index("r"), lax.axis_index("d")
        lane = pl.ds(d * lay.channels, lay.channels)
        group = lax.div(d, per_group)

        def source(name, rows):
            ref = refs[name]
            if name in ("mix", "read"):
                return ref.at[r, group, rows]
            return ref.at[r, rows] if name == "keep" else ref.at[r, rows, lane]

        at = lambda i: i if down else tiles - 1 - i
        laps = TILE // LAP
        begin_of = lambda lap: LAP * (lap if down else laps - 1 - lap)  # in its tile

        def fetch(i, slot):
            rows = pl.ds(at(i) * TILE, TILE)
            for name in streams:
                to = refs[f"{name}_s"].at[slot]
                plgpu.copy_gmem_to_smem(source(name, rows), to, full.at[slot])

        for i in range(STAGES):
            pl.when(i < tiles)(functools.partial(fetch, i, i))
        once = lambda ref: lay.once(ref, whole, one, lay.state)
        a, h = once(refs["a"].at[:, :, lane]) * LOG2E, once(refs["start"].at[r, :, :, lane])
        vector = lambda ref: lay.over_steps(lay.once(ref.at[lane], x.at[0, 0], one, lay.row))
        bias = vector(refs["bias"])
        skip = vector(refs["skip"]) if mode == "output" else None

        def prepare(slot, rows):
            _, step = _steps(refs["delta_s"].at[slot], lay, rows, bias, use_softplus)
            value = lay.rows(refs["u_s"].at[slot, rows])
            if mode != "adjoint":
                return step, step * value
            if z is not None:
                gate = lay.rows(refs["z_s"].at[slot, rows])
                value = value * gate * sigmoid_short(gate)
            return step, value

        def advance(slot, begin, buffer, steps, h):
            """Steps from `begin` of the tile on; what they read is loaded before all else."""
            sizes = [lay.along_states(dt.at[buffer, t]) for t in steps]
            values = [lay.along_states(x.at[buffer, t]) for t in steps]
            mixes = [lay.along_channels(refs["mix_s"].at[slot, begin + t]) for t in steps]
            reads = steps if mode != "output" else [
                lay.along_channels(refs["read_s"].at[slot, begin + t]) for t in steps
            ]  # fmt: skip
            ys = []
            for t, size, value, mix, read in zip(steps, sizes, values, mixes, reads, strict=True):
                decay = jnp.exp2(size * a)
                if keep is not None:
                    decay = decay * refs["keep_s"][slot, begin + t, 0]
                h = decay * (h + value * mix) if mode == "adjoint" else decay * h + value * mix
                ys.append(jnp.sum(h * read, axis=1) if mode == "output" else None)
            return h, ys

        def finish(slot, rows, buffer, local):
            y = skip * lay.rows(refs["u_s"].at[slot, rows])
            for w in range(WARPS):
                y = y + lay.rows(refs["shares"].at[buffer, local, w])
            if z is not None:
                gate = lay.rows(refs["z_s"].at[slot, rows])
                y = y * gate * sigmoid_short(gate)
            return y.astype(u.dtype)

        def send(i, lap, buffer):
            """The output of a lap on its way."""
            to = refs["out"].at[r, pl.ds(at(i) * TILE + begin_of(lap), LAP), lane]
            plgpu.copy_smem_to_gmem(refs["y"].at[buffer], to, commit_group=False)

        quarters = list(range(0, LAP, WARPS))[:: 1 if down else -1]

        def one_lap(i, lap, h):
            """The lap after this one prepared, this one advanced, the one before it finished."""
            before = (jnp.maximum(i - 1, 0), laps - 1) if lap == 0 else (i, lap - 1)
            after = (i, lap + 1) if lap < laps - 1 else (i + 1, 0)
            this, other = lap % 2, 1 - lap % 2
            slot, slot_before, slot_after = (lax.rem(j, STAGES) for j in (i, before[0], after[0]))
            if after[1] == 0:
                pl.when(i + 1 < tiles)(lambda: plgpu.barrier_wait(full.at[slot_after]))
            if mode == "output":  # what left two laps ago has been read; a barrier, too
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            if save and lap == 0:
                whole[...] = h
            for q in quarters:
                local = pl.ds(q, WARPS)
                rows = lambda lap, q=q: pl.ds(begin_of(lap) + q, WARPS)
                steps = list(range(q, q + WARPS))[:: 1 if down else -1]
                step, value = prepare(slot_after, rows(after[1]))
                if mode == "output":
                    y = finish(slot_before, rows(before[1]), other, local)
                h, shares = advance(slot, begin_of(lap), this, steps, h)
                dt[other, local], x[other, local] = step, value
                if mode == "output":
                    refs["y"][this, local] = y
                    for t, share in zip(steps, shares, strict=True):
                        refs["shares"][this, t] = share
            plgpu.commit_smem()
            if save and lap == 0:
                to = refs["saved"].at[r, at(i), :, :, lane]
                plgpu.copy_smem_to_gmem(whole, to, commit_group=False)
            if mode == "output":
                pl.when(i + lap > 0)(functools.partial(send, *before, this))
                plgpu.commit_smem_to_gmem_group()
            if lap == 0:  # the tile before this one is done with
                later = i - 1 + STAGES
                wanted = jnp.logical_and(i > 0, later < tiles)
                pl.when(wanted)(functools.partial(fetch, later, lax.rem(later, STAGES)))
            return h

        def one_tile(i, h):
            for lap in range(laps):
                h = one_lap(i, lap, h)
            return h

        plgpu.barrier_wait(full.at[0])
        for q in quarters:
            local = pl.ds(q, WARPS)
            dt[0, local], x[0, local] = prepare(0, pl.ds(begin_of(0) + q, WARPS))
        plgpu.commit_smem()
        h = lax.fori_loop(0, tiles, one_tile, h)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        whole[...] = h
        if mode == "output":
            slot, buffer = (tiles - 1) % STAGES, (laps - 1) % 2
            for q in quarters:
                rows, local = pl.ds(begin_of(laps - 1) + q, WARPS), pl.ds(q, WARPS)
                refs["y"][0, local] = finish(slot, rows, buffer, local)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(whole, last.at[r, :, :, lane], commit_group=False)
        if mode == "output":
            send(tiles - 1, laps - 1, 0)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    inputs = streams | weights
    cost = _cost(u.size, WARPS * a.shape[1], 1, 6 if mode == "output" else 4, inputs.values())
    grid = (rows, width // lay.channels)
    return _call(f"selective_scan_{mode}", body, grid, inputs, outputs, scratch, cost)
