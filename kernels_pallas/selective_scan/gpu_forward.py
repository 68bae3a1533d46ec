"""The forward kernel of the selective scan on Hopper GPUs (Pallas Mosaic GPU); see pallas_gpu.py.

A program is one warpgroup with 128 channels of a row, a channel a thread: its N states, step sizes,
skip and gate never leave the thread, and within a tile of time no thread waits for another. B and C
come from shared memory, the same for all threads; tiles of u, delta and z come and leave through
it, copied while the tile before is computed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .fused import LOG2E, sigmoid_short, softplus_short
from .gpu_kernels import TILE, WARP, call_kernel, estimate

CHANNELS = 128  # of a program
STAGES = 2  # tiles in shared memory


class _Layouts:
    """Which thread holds what: arrays [states, channels], a channel a thread."""

    def __init__(self, states: int):
        self.shape = (states, CHANNELS)
        tiling = plgpu.Tiling((self.shape, (WARP,), (1,)))
        self.state = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
        self.row = self.state.reduce((0,))  # [channels]
        self.column = self.state.reduce((1,))  # [states]: the same in every thread

    def vector(self, ref):
        """One value per channel, float32."""
        return plgpu.layout_cast(ref[...], self.row).astype(jnp.float32)

    def along_states(self, value):
        """A value per channel, for every state."""
        return self._spread(value, (1,))

    def along_channels(self, ref):
        """A value per state, for every channel."""
        return self._spread(plgpu.layout_cast(ref[...], self.column), (0,))

    def _spread(self, value, axes):
        return plgpu.layout_cast(lax.broadcast_in_dim(value, self.shape, axes), self.state)

    def once(self, source, smem, barrier, layout):
        """A piece of HBM in registers; `smem` may be used again afterwards."""
        plgpu.copy_gmem_to_smem(source, smem, barrier)
        plgpu.barrier_wait(barrier)
        value = plgpu.layout_cast(smem[...], layout)
        plgpu.commit_smem()
        # Times one, which the compiler drops: a loop's carry must not be typed as varying.
        return value * plgpu.layout_cast(jnp.ones(value.shape, value.dtype), layout)


def walk(static, u, delta, z, a, mix, skip, bias, start, keep, *, mode, save=False):
    """Run the recurrence over rows [R, T]; T is a multiple of TILE, D of 128 in every group.

    Args:
        static: (softplus, reverse).
        u, delta, z: [R, T, D]; a: [N, D]; mix: [R, G, T, 2, N], B and C; skip, bias: [D];
            start: [R, N, D], or None for zeros; keep: [R, T, 4] float32, 0 where a step forgets
            (four times, as copies come in 16 bytes), or None.
        mode: "output": y and the last state. "state": the last state only. "adjoint": of
            s = decay (s + gy C), gy = u silu(z), with u the output's cotangent, the last s.
        save: what the backward pass needs, too: the state before every tile, [R, T/TILE, N, D],
            and y before the gate.

    Returns:
        dict of "out" [R, T, D], "last" [R, N, D], "saved", "plain" [R, T, D] (with a gate), and
        if the mode is not "output" the sum of step sizes "time" [R, D].
    """
    use_softplus, reverse = static
    (rows, _, width), tiles, states = u.shape, u.shape[1] // TILE, a.shape[0]
    lay = _Layouts(states)
    per_group = width // mix.shape[1] // CHANNELS
    down, full_output = not reverse, mode == "output"
    streams = {"u": u, "delta": delta, "mix": mix}
    of_mix = pl.ds(mode == "adjoint", 1 + full_output)  # B, C, or both
    weights = {"a": a, "bias": bias} | ({} if start is None else {"start": start})
    outputs = {"last": ((rows, states, width), jnp.float32)}
    if z is not None and mode != "state":
        streams["z"] = z
    if keep is not None:
        streams["keep"] = keep
    leaving = {}
    if full_output:
        weights["skip"] = skip
        leaving["out"] = u
        if save and z is not None:
            leaving["plain"] = u
        outputs |= {k: (x.shape, x.dtype) for k, x in leaving.items()}
    else:
        outputs["time"] = ((rows, width), jnp.float32)
    if save:
        outputs["saved"] = ((rows, tiles, states, width), jnp.float32)
    tile = dict.fromkeys(("u", "delta", "z"), (TILE, CHANNELS))
    tile |= {"mix": (TILE, 1 + full_output, states), "keep": (TILE, 4)}
    scratch = {f"{k}_s": plgpu.SMEM((STAGES, *tile[k]), x.dtype) for k, x in streams.items()}
    scratch |= {f"{k}_s": plgpu.SMEM((2, TILE, CHANNELS), x.dtype) for k, x in leaving.items()}
    scratch |= {"whole": plgpu.SMEM((1 + save, *lay.shape), jnp.float32)}
    scratch |= {"vector": plgpu.SMEM((CHANNELS,), jnp.float32)}
    scratch |= {"full": plgpu.Barrier(num_arrivals=len(streams), num_barriers=STAGES)}
    scratch |= {"one": plgpu.Barrier(num_arrivals=1)}

    def body(last, whole, vector, full, one, **refs):
        r, d = lax.axis_index("r"), lax.axis_index("d")
        lane = pl.ds(d * CHANNELS, CHANNELS)
        group = lax.div(d, per_group)
        at = lambda i: i if down else tiles - 1 - i

        def place(name, i):
            ref, rows = refs[name], pl.ds(at(i) * TILE, TILE)
            if name == "mix":
                return ref.at[r, group, rows, of_mix]
            if name == "saved":
                return ref.at[r, at(i), :, lane]
            return ref.at[r, rows] if name == "keep" else ref.at[r, rows, lane]

        def fetch(i, slot):
            for name in streams:
                to = refs[f"{name}_s"].at[slot]
                plgpu.copy_gmem_to_smem(place(name, i), to, full.at[slot])

        for i in range(STAGES):
            pl.when(i < tiles)(functools.partial(fetch, i, i))
        a = lay.once(refs["a"].at[:, lane], whole.at[0], one, lay.state) * LOG2E
        h = plgpu.layout_cast(jnp.zeros(lay.shape, jnp.float32), lay.state)
        if start is not None:
            h = lay.once(refs["start"].at[r, :, lane], whole.at[0], one, lay.state)
        bias = lay.once(refs["bias"].at[lane], vector, one, lay.row)
        skip = lay.once(refs["skip"].at[lane], vector, one, lay.row) if full_output else None

        def step(slot, buffer, t, h, time):
            piece = lambda name: lay.vector(refs[f"{name}_s"].at[slot, t])
            size = piece("delta") + bias
            size = softplus_short(size) if use_softplus else size
            value = piece("u")
            gate = None
            if "z" in streams:
                gate = piece("z")
                gate = gate * sigmoid_short(gate)
            decay = jnp.exp2(lay.along_states(size) * a)
            if keep is not None:
                decay = decay * refs["keep_s"][slot, t, 0]
            mix, *read = (
                lay.along_channels(refs["mix_s"].at[slot, t, k]) for k in range(1 + full_output)
            )
            if mode == "adjoint":
                value = value if gate is None else value * gate
                return decay * (h + lay.along_states(value) * mix), time + size
            h = decay * h + lay.along_states(size * value) * mix
            if not full_output:
                return h, time + size
            y = skip * value
            y = y + jnp.sum(h * read[0], axis=0)
            if "plain" in leaving:
                refs["plain_s"][buffer, t] = y.astype(u.dtype)
            y = y if gate is None else y * gate
            refs["out_s"][buffer, t] = y.astype(u.dtype)
            return h, time

        def one_tile(i, carry):
            h, time = carry
            slot, buffer = lax.rem(i, STAGES), lax.rem(i, 2)
            plgpu.barrier_wait(full.at[slot])
            if leaving:  # what left two tiles ago has been read; a barrier, too
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            if save:
                whole[buffer] = h
            for t in range(TILE) if down else range(TILE)[::-1]:
                h, time = step(slot, buffer, t, h, time)
            plgpu.commit_smem()  # every thread has read the tile and written its results
            for name in leaving:
                to = place(name, i)
                plgpu.copy_smem_to_gmem(refs[f"{name}_s"].at[buffer], to, commit_group=False)
            if save:
                plgpu.copy_smem_to_gmem(whole.at[buffer], place("saved", i), commit_group=False)
            if leaving:
                plgpu.commit_smem_to_gmem_group()
            pl.when(i + STAGES < tiles)(functools.partial(fetch, i + STAGES, slot))
            return h, time

        h, time = lax.fori_loop(0, tiles, one_tile, (h, bias * 0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        whole[0] = h
        if not full_output:
            vector[...] = time
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(whole.at[0], last.at[r, :, lane])
        if not full_output:
            plgpu.copy_smem_to_gmem(vector, refs["time"].at[r, lane])
        plgpu.wait_smem_to_gmem(0)

    inputs = streams | weights
    results = (jax.ShapeDtypeStruct(*v) for v in outputs.values())
    moved = (*inputs.values(), *results)
    cost = estimate(u.size, states, 1, 6 if full_output else 4, moved)
    grid = (rows, width // CHANNELS)
    return call_kernel(f"selective_scan_{mode}", body, grid, inputs, outputs, scratch, cost)
