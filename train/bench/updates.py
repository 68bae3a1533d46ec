"""Timing of training updates, for all benchmarks of `lintime bench` that train at random data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .. import flops
from ..mesh import make_mesh, put_batch, state_shardings
from ..metrics import forward_flops
from ..schema import Run
from ..step import init_state, jit_step, make_train_step
from ..tasks.table import make_task


def time_updates(
    run: Run, draw: Callable[[np.random.Generator], dict], steps: int, warmup: int = 3
) -> dict[str, Any]:
    """Seconds of the whole training step on one device, update by update.

    As in training, an update is read when the next is queued, so the host's work is hidden if there
    is time to hide it in.

    Args:
        draw: the arrays of a batch from a random generator, but for "valid".

    Returns:
        {"seconds": [steps], "compile_s", "model_flops" (3 x forward matmuls), "mfu" (None where the
        device's peak is unknown), "loss", "peak_bytes"}.

    Raises:
        ValueError: a loss or a gradient is not finite.
    """
    mesh, task, seconds = make_mesh(run.mesh, jax.devices()[:1]), make_task(run), []

    def batch(number):
        arrays = draw(np.random.default_rng(number))
        arrays |= {"valid": np.ones((run.batch_size,), bool)}
        return put_batch(arrays, number, mesh, run.batch_size)

    with jax.set_mesh(mesh):
        make = lambda key: init_state(task, run, key)
        shardings = state_shardings(jax.eval_shape(make, jax.random.key(0)), mesh)
        state = jax.jit(make, out_shardings=shardings)(jax.random.key(0))
        update = jit_step(make_train_step(task, run), shardings, run.precision.unroll)
        began = time.perf_counter()
        update = update.lower(state, batch(0)).compile()
        compile_s = time.perf_counter() - began
        last = None
        for number in range(warmup + steps + 1):
            state, metrics = update(state, jax.block_until_ready(batch(number)))
            if last is not None:
                if not bool(last["ok"]):
                    raise ValueError(f"the loss or a gradient of update {number} is not finite")
                seconds.append(time.perf_counter() - began)
            began, last = time.perf_counter(), metrics
        model_flops = 3 * forward_flops(task, run)
    used = flops.mfu(model_flops, statistics.median(seconds[warmup:]), jax.devices()[:1])
    return {
        "seconds": seconds[warmup:], "compile_s": compile_s, "model_flops": model_flops,
        "mfu": used, "loss": float(metrics["loss"]),
    } | peak_memory()  # fmt: skip


def peak_memory() -> dict[str, int | None]:
    """{"peak_bytes": most memory this process has used on the first device; None if unknown}."""
    return {"peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")}
