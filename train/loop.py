"""Training, as one story: data, mesh, state, resume, then update after update until the end.

python: `train(run, "runs/my-run")`        shell: `lintime train CONFIG [field=value ...]`
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..model.partition import unsharded
from .checkpoint import Checkpoints
from .config_files import check_continuation, read_config, save_config
from .data.open import open_split
from .errors import UserError, told_as
from .evaluate import make_evaluator
from .launch import StopRequest, agree, stop_on_signals
from .mesh import check_batch, local_rows, make_mesh, put_batch, state_shardings
from .metrics import Clock
from .prepare.encoding import encode_data
from .schema import Checkpoint, CodeData, ImageData, Run
from .stages import check_stages, is_finished, located, resolve, stage_dir, stages_of
from .start import check_fixed, digest, placed, start_from, without
from .step import init_state, jit_step, make_train_step
from .tasks.table import make_task
from .track import Tracker, plot_curves, truncate_metrics


@dataclasses.dataclass
class Result:
    """What a call of `train` leaves behind.

    Attributes:
        run_dir: the run directory. step: updates done in all.
        metrics: the last validation metrics ({} when stopped before the end).
        stopped: name of the signal that stopped it early, or None.
        where: what was stopped: "" or e.g. "stage 0".
    """

    run_dir: Path
    step: int
    metrics: dict[str, float]
    stopped: str | None = None
    where: str = ""


def train(
    run: Run,
    run_dir: str | Path,
    *,
    profile: tuple[int, int] | None = None,
    devices=None,
) -> Result:
    """Train `run` in `run_dir`, continuing what is there; ends with a validation of the final
    weights. Its stages, and encoding of its images, come first.

    Args:
        run: validated config.
        run_dir: run directory (created if absent).
        profile: (first, last) update to trace into `run_dir`/profile.
        devices: devices to use; all by default.

    Raises:
        UserError: anything the user can mend, in one line; nothing already saved is lost.
    """
    run_dir, primary = Path(run_dir), jax.process_index() == 0
    saved_config = run_dir / "config.json"
    if saved_config.exists():
        check_continuation(read_config(saved_config), run)

    # ---- what this run builds on, and its data ------------------------------------------------
    check_stages(run)
    for number, stage in stages_of(run).items():
        folder = stage_dir(run_dir, number)
        finished = is_finished(stage, folder)
        if agree(finished, any) != agree(finished, all):
            raise UserError(
                f"processes see different files in {folder}; a run directory has to be on storage "
                "that all share"
            )
        if not finished:
            own = [(r"\bdata\.path\b", "data.images.path")] if _lends_images(run, number) else []
            with told_as(*own):
                result = train(stage, folder, devices=devices)
            if result.stopped:
                return dataclasses.replace(result, where=f"stage {number}")
    encoded = encode_data(run, run_dir)
    task = make_task(located(run, run_dir))
    train_data = open_split(run, "train", run_dir, encoded)
    val_data = open_split(run, "validation", run_dir, encoded)
    task.check_data(train_data)
    meta = {"fingerprint": {"train": train_data.fingerprint, "validation": val_data.fingerprint}}

    fixed = task.fixed_stats()
    if fixed:
        meta["fixed"] = {name: digest(tree) for name, tree in fixed.items()}

    # ---- mesh and state -----------------------------------------------------------------------
    mesh = make_mesh(run.mesh, devices)
    check_batch(run, mesh)
    rows = local_rows(mesh, run.batch_size)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda k: init_state(task, run, k), jax.random.key(run.seed))
        shardings = state_shardings(abstract, mesh, task.sharded)
        abstract = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
        )
        updates = {
            mode: jit_step(
                make_train_step(task.in_mode(mode), run), shardings, run.precision.unroll
            )
            for mode in task.modes
        }

    # ---- resume, or start ---------------------------------------------------------------------
    checkpoints = Checkpoints(run_dir, run.checkpoint)
    start, new = checkpoints.latest_step(), []
    if start is not None:
        _check_fingerprint(checkpoints.meta(start).get("fingerprint"), meta["fingerprint"])
        check_fixed(checkpoints.meta(start).get("fixed") or {}, meta.get("fixed") or {})
        state = checkpoints.restore(without(abstract, fixed), start)
    else:
        start = 0
        with jax.set_mesh(mesh):
            init = jax.jit(lambda k: init_state(task, run, k), out_shardings=shardings)
            state = init(jax.random.key(run.seed))
        if run.init_from:
            path = resolve(run.init_from, run_dir)
            state, new = start_from(task, path, state, without(abstract, fixed))
    state = state.replace(stats=state.stats | placed(fixed, shardings.stats))
    fixed = frozenset(fixed)  # their names; the arrays are on the devices now
    if primary:
        save_config(run, saved_config)
        truncate_metrics(run_dir / "metrics.jsonl", start)
    tracker = Tracker(
        run_dir, total_steps=run.steps, tensorboard=run.log.tensorboard, wandb=run.log.wandb,
        task_metric=task.metric, primary=primary, resume_step=start,
    )  # fmt: skip
    n_params = sum(a.size for a in jax.tree.leaves(abstract.params))
    tracker.message(
        f"{run_dir}: {n_params / 1e6:.2f}M parameters, {len(mesh.devices.flat)} "
        f"{mesh.devices.flat[0].platform} device(s), {train_data.description}"
        + (f", continuing at step {start}" if start else "")
    )

    if new:
        tracker.message(f"init_from={path}: it has no {', '.join(new)}, which starts fresh")
    if whole := unsharded(abstract.params, mesh):
        tracker.message(
            f"kept whole on every device, fsdp does not divide them: {', '.join(whole)}"
        )

    # ---- updates -----------------------------------------------------------------------------
    validate = make_evaluator(task, val_data, mesh, run.batch_size, run.eval.batches)
    clock = Clock(task, run, mesh)
    stopped, last_val, step = None, {}, start

    def finish_update(number: int, metrics: Any) -> None:
        values = {k: v.item() for k, v in jax.device_get(metrics).items()}
        if not values.pop("ok"):
            kept = without(state, fixed)
            raise UserError(_keep_failure(run_dir, number - 1, kept, train_data, rows, meta))
        values |= clock.tick()
        tracker.progress(number, values)
        if number % run.log.every == 0 or number == run.steps:
            clock.restart()
            tracker.log(number, values | {clock.unit: number * clock.per_update})

    def save_and_validate(final: bool) -> None:
        nonlocal last_val
        val_loss = None
        if final or _due(step, run.eval.every):
            last_val = validate(state)
            val_loss = last_val["loss"]
            line = {f"val_{k}": v for k, v in last_val.items()}
            if final and primary:
                extra = task.yardstick(val_data, run.eval.batches)
                last_val, line = last_val | extra, line | extra
            if step > start:  # a finished run that is called again has this line already
                tracker.log(step, line)
        if final or _due(step, run.checkpoint.every):
            checkpoints.save(without(state, fixed), meta, val_loss)
        clock.pause()

    try:
        with stop_on_signals() as stop:
            pending = None  # metrics are read one update late: the device never waits for the host
            for batch in train_data.iterate(start, rows, run.steps):
                if _agreed(stop, step):
                    stopped = stop.signal or "SIGTERM"
                    break
                if profile and step == profile[0]:
                    jax.profiler.start_trace(str(run_dir / "profile"))
                with jax.set_mesh(mesh):
                    update = updates[task.mode_at(step)]
                    state, metrics = update(state, put_batch(batch, step, mesh, run.batch_size))
                step += 1
                if profile and step == profile[1]:
                    jax.block_until_ready(metrics)
                    jax.profiler.stop_trace()
                    tracker.message(
                        f"trace of updates {profile[0]}..{profile[1]}: {run_dir}/profile"
                    )
                if pending:
                    finish_update(*pending)
                pending = (step, metrics)
                if step < run.steps and (
                    _due(step, run.eval.every) or _due(step, run.checkpoint.every)
                ):
                    finish_update(*pending)
                    pending = None
                    save_and_validate(final=False)
            if pending:
                finish_update(*pending)

            # ---- the end, or the save before leaving -------------------------------------------
            if stopped:
                tracker.message(f"{stopped}: saving step {step} and leaving")
                checkpoints.save(without(state, fixed), meta)
            else:
                save_and_validate(final=True)
            checkpoints.close()
    finally:
        tracker.close()
        if primary:
            with contextlib.suppress(UserError):  # nothing to draw yet, or the disk is full
                plot_curves(run_dir)
    return Result(run_dir, step, last_val, stopped)


def _lends_images(run: Run, number: int) -> bool:
    """Whether a stage has the images of its run."""
    stage = run.stages[number]
    return (
        isinstance(run.data, CodeData) and isinstance(stage.data, ImageData) and not stage.data.path
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _agreed(stop: StopRequest, step: int) -> bool:
    """Whether to leave: at once in one process; several must leave at the same step, so they ask
    around.
    """
    if jax.process_count() > 1 and step % 10:
        return False
    return agree(bool(stop), any)


def _keep_failure(run_dir: Path, step: int, state, data, rows, meta: dict) -> str:
    """Save the state before update `step` and its batch, for a look at why it was not finite."""
    folder = run_dir / "failed" / f"step-{step}"
    saved = Checkpoints(folder, Checkpoint())
    saved.save(state, meta)
    saved.close()
    if jax.process_index() == 0:
        np.savez(folder / "batch.npz", **data.batch(step, rows))
    return (
        f"update {step} gave a loss or gradient that is not finite; the state before it and its "
        f"batch are in {folder}; lower optim.learning_rate or set optim.clip, start with --fresh"
    )


def _check_fingerprint(saved: dict | None, now: dict) -> None:
    for split, fingerprint in now.items():
        before = (saved or {}).get(split) or {}
        for key, value in json.loads(json.dumps(fingerprint)).items():
            if before.get(key) != value:
                raise UserError(
                    f"the {split} data is not what this run was trained on ({key} was "
                    f"{before.get(key)}, is {value}); restore the data, or start anew with --fresh"
                )
