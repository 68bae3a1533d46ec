"""One optimiser update as a pure function: micro-batches, gradients, statistics, guard against
NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .optimizers import average_decay, make_schedule
from .schema import EMA, Run
from .state import TrainState
from .tasks.base import Task


def init_state(task: Task, run: Run, key: jax.Array) -> TrainState:
    """The state before the first update; pure, so it can be jitted with output shardings."""
    variables = task.init(key)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt=task.optimizer().init(params),
        ema=jax.tree.map(jnp.copy, params) if run.ema.decay > 0 else {},
        stats=variables["stats"],
        carry=task.init_carry(run.batch_size),
    )


def make_train_step(task: Task, run: Run) -> Callable:
    """step(state, batch) -> (state, metrics), to be jitted with the state donated.

    `batch["step"]` (int32 scalar) must equal `state.step`. An update whose loss or gradient is not
    finite leaves the whole state as it was, so that every later call (whose batch number no longer
    matches) does nothing either until the host notices `metrics["ok"]`.
    """
    optimizer = task.optimizer()
    schedule = make_schedule(run.optim, run.steps)
    parts = run.optim.accumulate

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = jax.random.key(run.seed)
        number = batch["step"]
        arrays = {k: v for k, v in batch.items() if k != "step"}

        def micro(index, arrays, carry):
            k = jax.random.fold_in(key, index)
            rows = {**arrays, "step": number}

            def objective(params):
                out = task.loss(params, state.stats, carry, rows, k)
                return out[0], out[1:]

            return jax.value_and_grad(objective, has_aux=True)(state.params)

        if parts == 1:
            (loss, (weight, delta, carry, metrics)), grads = micro(0, arrays, state.carry)
        else:
            (loss, (weight, delta, carry, metrics)), grads = _accumulate(
                micro, arrays, state.carry, parts
            )
        loss = loss / weight
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.tree.norm(grads)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if run.ema.decay > 0:
            d = decay_at(run.ema, number)
            ema = jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)
        new = TrainState(state.step + 1, params, opt, ema, task.absorb(state.stats, delta), carry)
        ok = jnp.isfinite(loss) & jnp.isfinite(norm) & (number == state.step)
        new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, state)
        report = {"loss": loss, **task.report(metrics["sum"]), **metrics["mean"]}
        report["lr"] = run.optim.learning_rate * schedule(number)
        report["grad_norm"] = norm
        return new, {**report, "ok": ok}

    return step


def decay_at(ema: EMA, number):
    """Decay of the average in update `number`, 0 the first, see `EMA`; a number where it is one."""
    if (ema.interval, ema.start, ema.power) == (1, 0, 0):
        return ema.decay
    if ema.power:
        decay = average_decay(number, limit=ema.decay, start=ema.start, power=ema.power)
    else:
        decay = jnp.where(number < ema.start, 0.0, jnp.float32(ema.decay))
    return jnp.where(number % ema.interval == 0, decay, 1.0)


def jit_step(step: Callable, shardings, unroll: bool) -> Callable:
    """`step` jitted with its state donated and given `shardings`.

    With `unroll` (precision.unroll) a GPU runs it without CUDA graphs: its thousands of kernels
    keep the device busy anyway, and graphs of them were 9% slower (AiM-XL on an H200, jax 0.11.2:
    222 against 203 ms).
    """
    options = {"xla_gpu_graph_min_graph_size": 1_000_000}
    return jax.jit(
        step, donate_argnums=0, out_shardings=(shardings, None),
        compiler_options=options if unroll and jax.default_backend() == "gpu" else None,
    )  # fmt: skip


def _accumulate(micro, arrays, carry, parts):
    """Sum `micro` over `parts` micro-batches; rows are dealt out so that each stays on its
    device.
    """
    deal = lambda a, axis: jnp.moveaxis(
        a.reshape(*a.shape[:axis], a.shape[axis] // parts, parts, *a.shape[axis + 1 :]),
        axis + 1,
        0,
    )
    gather = lambda a: jnp.moveaxis(a, 0, 2).reshape(a.shape[1], -1, *a.shape[3:])
    split = jax.tree.map(lambda a: deal(a, 0), arrays)
    split_carry = jax.tree.map(lambda a: deal(a, 1), carry)

    def body(total, inputs):
        index, rows, rows_carry = inputs
        (loss, (weight, delta, rows_carry, metrics)), grads = micro(index, rows, rows_carry)
        out = {"loss": loss, "weight": weight, "delta": delta, "metrics": metrics, "grads": grads}
        return jax.tree.map(jnp.add, total, out), rows_carry

    inputs = (jnp.arange(parts), split, split_carry)
    first = jax.eval_shape(lambda i: body_out(micro, i), jax.tree.map(lambda a: a[0], inputs))
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
    total, new_carry = lax.scan(body, zero, inputs)
    metrics = total["metrics"]
    metrics["mean"] = jax.tree.map(lambda a: a / parts, metrics["mean"])
    new_carry = jax.tree.map(gather, new_carry)
    return (total["loss"], (total["weight"], total["delta"], new_carry, metrics)), total["grads"]


def body_out(micro, inputs):
    """Structure of what one micro-batch adds to the totals."""
    (loss, (weight, delta, _, metrics)), grads = micro(*inputs)
    return {"loss": loss, "weight": weight, "delta": delta, "metrics": metrics, "grads": grads}
