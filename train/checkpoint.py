"""Checkpoints of a run: Orbax on disk, one item per part of the state, restored onto any mesh."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ..model.partition import path_string
from .errors import UserError
from .schema import Checkpoint
from .state import TrainState

FORMAT_VERSION = 1
FOLDER = "checkpoints"
# Parts are separate items, so weights outlive a change of optimiser. Empty parts are not written.
PARTS = ("params", "ema", "stats", "carry", "opt")


class Checkpoints:
    """Saves and restores TrainState under `run_dir`/checkpoints, asynchronously and atomically.

    A save that is interrupted leaves a temporary folder that is never mistaken for a checkpoint.

    Args:
        run_dir: run directory.
        config: how many to keep; None opens for reading only.
    """

    def __init__(self, run_dir: str | Path, config: Checkpoint | None = None):
        self.folder = (Path(run_dir).expanduser() / FOLDER).absolute()
        if config is None and not self.folder.is_dir():
            raise UserError(
                f"{run_dir} holds no checkpoints; train there first or name another run"
            )
        options = _read_only() if config is None else _keep(config)
        hosts = options.setdefault("multiprocessing_options", ocp.options.MultiprocessingOptions())
        quiet = _errors_only("absl") if config is None else contextlib.nullcontext()
        with _one_line(self.folder), quiet:  # Orbax warns that what is opened to read is read-only
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(**options),
                item_handlers={
                    p: ocp.StandardCheckpointHandler(multiprocessing_options=hosts) for p in PARTS
                }
                | {"meta": ocp.JsonCheckpointHandler(multiprocessing_options=hosts)},
            )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Step with the lowest validation loss (the newest if none was validated)."""
        scored = [
            (self.meta(s)["val_loss"], s)
            for s in self._manager.all_steps()
            if self.meta(s).get("val_loss") is not None
        ]
        return min(scored)[1] if scored else self.latest_step()

    def save(self, state: TrainState, meta: dict, val_loss: float | None = None) -> None:
        """Save in the background (waits for the previous save first).

        Args:
            state: to save; its step names the checkpoint.
            meta: JSON-able extras (config, data fingerprint).
            val_loss: ranks the checkpoint among the best.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        _check_space(self.folder, state)
        items = {p: ocp.args.StandardSave(getattr(state, p)) for p in PARTS if getattr(state, p)}
        meta = meta | {"format": FORMAT_VERSION, "step": step, "val_loss": val_loss}
        metrics = None if val_loss is None else {"val_loss": val_loss}
        # Orbax warns of a save without the metric that ranks saves.
        quiet = _errors_only("absl") if metrics is None else contextlib.nullcontext()
        with _one_line(self.folder / str(step)), quiet:
            self._manager.save(
                step,
                args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items),
                metrics=metrics,
            )

    def wait(self) -> None:
        """Block until the last save is on disk; raises what went wrong there."""
        with _one_line(self.folder):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Wait for the last save and release the manager."""
        self.wait()
        self._manager.close()

    def meta(self, step: int) -> dict:
        """The extras saved with a checkpoint."""
        path = self.folder / str(step) / "meta" / "metadata"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise _damaged(self.folder / str(step)) from error

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The saved state, laid out as `abstract` (ShapeDtypeStructs with shardings) says.

        Raises:
            UserError: the checkpoint is damaged, or is of another model (shapes or dtypes differ).
        """
        parts = {p: getattr(abstract, p) for p in PARTS if getattr(abstract, p)}
        restored = self._read(step, parts)
        number = jax.make_array_from_callback(
            (), abstract.step.sharding, lambda _: np.asarray(step, np.int32)
        )
        empty = {p: {} for p in PARTS}
        return TrainState(step=number, **(empty | restored))

    def restore_parts(self, abstract: dict[str, Any], step: int) -> dict[str, Any]:
        """Some parts only, e.g. {"params": ..., "stats": ...} for inference."""
        return self._read(step, {k: v for k, v in abstract.items() if v})

    def has(self, step: int, part: str) -> bool:
        """Whether a checkpoint holds a part, e.g. "ema"."""
        return (self.folder / str(step) / part).is_dir()

    def names(self, step: int, part: str) -> set[str]:
        """Top-level names of a part, e.g. {"tokenizer", "discriminator"}; none if it is absent."""
        if not self.has(step, part):
            return set()
        return {path.partition("/")[0] for path in self._saved(self.folder / str(step), part)}

    def _read(self, step: int, parts: dict[str, Any]) -> dict[str, Any]:
        folder = self.folder / str(step)
        missing = [p for p in parts if not self.has(step, p)]
        if missing:
            raise UserError(f"{folder} holds no {missing[0]}; it was saved with another config")
        self._check_model(folder, parts)
        args = {p: ocp.args.StandardRestore(tree) for p, tree in parts.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
            raise _damaged(folder) from error
        return {p: restored[p] for p in parts}

    def _saved(self, folder: Path, part: str) -> dict[str, tuple]:
        """(shape, dtype) of the arrays of a part on disk, by path."""
        try:
            metadata = self._manager.item_metadata(int(folder.name))[part]
            return {
                path_string(p): (tuple(m.shape), np.dtype(m.dtype))
                for p, m in jax.tree_util.tree_leaves_with_path(getattr(metadata, "tree", metadata))
            }
        except Exception as error:
            raise _damaged(folder) from error

    def _check_model(self, folder: Path, parts: dict[str, Any]) -> None:
        """Compare names, shapes and dtypes with what is on disk before reading (orbax casts
        silently).
        """
        for part, tree in parts.items():
            saved = self._saved(folder, part)
            wanted = {
                path_string(p): (tuple(a.shape), np.dtype(a.dtype))
                for p, a in jax.tree_util.tree_leaves_with_path(tree)
            }
            for name in sorted(wanted.keys() | saved.keys()):
                if wanted.get(name) != saved.get(name):
                    here, there = (_shape_text(d.get(name)) for d in (wanted, saved))
                    raise UserError(
                        f"{folder} is from another model: {part}/{name} is {there} there, "
                        f"{here} here"
                    )


def save_inference(
    run_dir: str | Path, variables: dict[str, Any], step: int = 0, meta=None
) -> None:
    """Write {"params", "stats"} as a checkpoint of `run_dir` that `eval`, `sample`, `init_from`
    accept.
    """
    state = TrainState(np.int32(step), variables["params"], {}, {}, variables.get("stats", {}), {})
    checkpoints = Checkpoints(run_dir, Checkpoint())
    checkpoints.save(state, meta or {})
    checkpoints.close()


def restore_inference(
    run_dir: str | Path,
    abstract: dict[str, Any],
    *,
    ema: bool = True,
    step: int | None = None,
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """{"params", "stats"} of the newest checkpoint (or `step`); averaged weights where the run
    keeps them.

    Args:
        abstract: {"params", "stats"} of ShapeDtypeStructs, with shardings if the arrays shall have
            some.
        ema: prefer the moving average.
        optional: top-level names that are left out of the result where the checkpoint lacks them.
    """
    checkpoints = Checkpoints(run_dir)
    step = checkpoints.latest_step() if step is None else step
    if step is None:
        raise UserError(f"{run_dir} holds no complete checkpoint; train there first")
    part = "ema" if ema and checkpoints.has(step, "ema") else "params"
    wanted = {part: abstract["params"], "stats": abstract.get("stats", {})}
    for name in wanted if optional else ():
        lacking = set(optional) - checkpoints.names(step, name)
        wanted[name] = {k: v for k, v in wanted[name].items() if k not in lacking}
    restored = checkpoints.restore_parts(wanted, step)
    checkpoints.close()
    return {"params": restored[part], "stats": restored.get("stats", {})}


@contextlib.contextmanager
def _errors_only(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read_only() -> dict[str, Any]:
    """For this process alone: it must not wait for others, which need not be reading."""
    index = jax.process_index()
    hosts = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"read{index}"
    )
    return {"read_only": True, "multiprocessing_options": hosts}


def _keep(config: Checkpoint) -> dict[str, Any]:
    managers = ocp.checkpoint_managers
    best = managers.BestN(
        get_metric_fn=lambda m: m["val_loss"], reverse=True, n=config.keep_best,
        keep_checkpoints_without_metrics=False,
    )  # fmt: skip
    policies = [managers.LatestN(config.keep)] + ([best] if config.keep_best else [])
    return {
        "preservation_policy": managers.AnyPreservationPolicy(policies),
        # Without a best_fn orbax would not write the metrics, and a continued run forget its best.
        "best_fn": lambda m: m["val_loss"],
        "best_mode": "min",
        "enable_async_checkpointing": True,
        "cleanup_tmp_directories": True,
    }


def _check_space(folder: Path, state: TrainState) -> None:
    """Refuse a save that cannot fit, before anything is written (this process's share)."""
    arrays = [a for a in jax.tree.leaves(state) if isinstance(a, jax.Array)]
    need = sum(s.data.nbytes for a in arrays for s in a.addressable_shards if s.replica_id == 0)
    with contextlib.suppress(OSError):  # object stores and some network file systems have no answer
        free = shutil.disk_usage(folder).free
        if free < need:
            raise UserError(
                f"no space left on device for a checkpoint in {folder}: {need / 1e6:.1f} MB "
                f"needed, {free / 1e6:.1f} MB free; nothing already saved was lost; free space "
                "and run the same command again"
            )


def _shape_text(entry) -> str:
    return "absent" if entry is None else f"{entry[1]}{list(entry[0])}"


def _damaged(folder: Path) -> UserError:
    return UserError(
        f"checkpoint {folder} is truncated or damaged; remove that folder to continue from "
        "the one before"
    )


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into one clear line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = str(error)
        code = getattr(error, "errno", None)
        if (
            code == errno.ENOSPC
            or "No space left" in text
            or "ENOSPC" in text
            or "Disk quota" in text
        ):
            raise UserError(
                f"no space left on device while writing {path}; nothing already saved was lost; "
                "free space and run the same command again"
            ) from error
        if isinstance(error, OSError) or "Permission denied" in text:
            raise UserError(f"cannot write {path}: {text.splitlines()[0]}") from error
        raise
