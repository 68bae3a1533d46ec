"""What all suites of `lintime bench` measure with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import flops
from ..mesh import make_mesh, put_batch, state_shardings
from ..metrics import forward_flops
from ..schema import Run
from ..step import init_state, jit_step, make_train_step
from ..tasks.table import make_task

SAMPLE_SECONDS = 0.05  # of calls enqueued between two looks at the clock


def describe_device() -> dict[str, Any]:
    """Platform, kind, number and memory (bytes, None if unknown) of JAX's devices, and versions."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    return {
        "platform": platform, "kind": device.device_kind, "count": len(jax.devices()),
        "memory": limit, "jax": jax.__version__,
    }  # fmt: skip


def relative_error(a, b) -> float:
    """|a - b| / |b| in the L2 norm, in float64 on the host; inf where anything is not finite."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)
    return float(error) if np.isfinite(error) else float("inf")


def is_out_of_memory(text: str) -> bool:
    """Whether an error message of XLA says that the device's memory did not suffice."""
    return any(t in text for t in ("RESOURCE_EXHAUSTED", "ut of memory", "OUT_OF_MEMORY"))


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns with "status" "ok"; or "oom" or "error", and a "message"."""
    try:
        return {"status": "ok"} | measure()
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        status = "oom" if is_out_of_memory(str(error)) else "error"
        return {"status": status, "message": " ".join(str(error).split())[:300]}


def milliseconds(function: Callable, arguments: tuple, samples: int) -> float:
    """Median time of a jitted call, so many of them enqueued at a time that starting one hides."""
    run = jax.jit(function)

    def seconds(calls):
        start = time.perf_counter()
        for _ in range(calls):
            result = run(*arguments)  # the one before is freed when it has been computed
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    seconds(1)
    calls = min(max(round(SAMPLE_SECONDS / seconds(3)), 3), 1000)
    return 1e3 * statistics.median(seconds(calls) for _ in range(samples))


def copy_bandwidth(accelerator: bool, samples: int) -> float:
    """Bytes/s of a device copy, read and written bytes together."""
    size = 2**28 if accelerator else 2**20
    x = jnp.zeros((size,), jnp.float32)
    return 2 * x.nbytes / (1e-3 * milliseconds(lambda x: x + 1, (x,), samples))


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
