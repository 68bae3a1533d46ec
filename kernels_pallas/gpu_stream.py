"""Tiles of HBM through shared memory, a few ahead, in Mosaic GPU kernels of one warpgroup."""

from __future__ import annotations

import functools

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def stream_tiles(tiles, sources, sinks, barrier, stages, body, carry):
    """carry = body(i, input tiles, output tiles, carry) for i in 0 .. tiles - 1.

    Args:
        sources: (i -> slice of HBM, shared memory [stages, ...]) of every input.
        sinks: (i -> slice of HBM, shared memory [2, ...]) of every output.
        barrier: one per stage, which every input's copy arrives at.
    """

    def fetch(i, slot):
        for source, smem in sources:
            plgpu.copy_gmem_to_smem(source(i), smem.at[slot], barrier.at[slot])

    for i in range(stages):
        pl.when(i < tiles)(functools.partial(fetch, i, i))

    def step(i, carry):
        slot, out = lax.rem(i, stages), lax.rem(i, 2)
        plgpu.barrier_wait(barrier.at[slot])
        if sinks:  # the copies of two tiles ago have read their slot
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        carry = body(
            i, [smem.at[slot] for _, smem in sources], [smem.at[out] for _, smem in sinks], carry
        )
        plgpu.commit_smem()  # every thread has read its inputs and written its outputs
        if sinks:
            for sink, smem in sinks:
                plgpu.copy_smem_to_gmem(smem.at[out], sink(i), commit_group=False)
            plgpu.commit_smem_to_gmem_group()
        pl.when(i + stages < tiles)(functools.partial(fetch, i + stages, slot))
        return carry

    carry = lax.fori_loop(0, tiles, step, carry)
    if sinks:
        plgpu.wait_smem_to_gmem(0)
    return carry
