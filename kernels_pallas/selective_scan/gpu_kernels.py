"""What the kernels of the selective scan on Hopper GPUs share (Pallas Mosaic GPU).

Pallas' own barriers, around every store to shared memory, are switched off: the kernels place them.
"""

from __future__ import annotations

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import dispatch
from ..compat import gpu_kernel, out_like, vary

WARPS, WARP = 4, 32  # of a program: one warpgroup
TILE = 16  # steps that are copied at once, and between two saved states


def barrier():
    """All threads of the program, and what copies out of shared memory has read it.

    Cheaper than `commit_smem`, which also orders stores before copies that are issued later.
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def call_kernel(name, body, grid, inputs, outputs, scratch, cost):
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


def estimate(size, states, exps, flops, arrays):
    """`exps` exponentials and `flops` per element and state; `arrays` moved once."""
    return pl.CostEstimate(
        flops=size * (states * flops + 40),
        transcendentals=size * (states * exps + 3),
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays),
    )
