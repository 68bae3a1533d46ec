"""Validation: sums over whole batches on the mesh, so the result does not depend on how rows are
split.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from ..mesh import local_rows, put_batch
from ..state import TrainState


def make_evaluator(task, data, mesh, batch_size: int, batches: int = 0) -> Callable:
    """evaluate(state) -> metrics of the averaged weights (or the weights, if no average is kept).

    Args:
        task: with `evaluate` (sums over a batch) and `validation` (sums to metrics).
        data: validation split; every sequence starts from an empty state.
        batches: how many batches to use; 0 = all.

    Returns:
        A function giving {"loss", the task's metrics} as Python floats.
    """
    rows = local_rows(mesh, batch_size)
    count = min(batches or data.num_batches, data.num_batches)
    jitted = jax.jit(task.evaluate)

    def evaluate(state: TrainState) -> dict[str, float]:
        params, sums = state.ema or state.params, None
        with jax.set_mesh(mesh):
            for number, batch in enumerate(data.iterate(0, rows, count)):
                out = jitted(params, state.stats, put_batch(batch, number, mesh, batch_size))
                sums = out if sums is None else jax.tree.map(lambda a, b: a + b, sums, out)
            report = task.validation(sums)
        return {name: value.item() for name, value in report.items()}

    return evaluate
