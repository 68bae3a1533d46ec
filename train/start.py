"""What a run begins with: weights of another run, and fixed weights that checkpoints leave out."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from ..model.partition import path_string
from .errors import UserError
from .state import TrainState
from .tasks.base import Task


def start_from(
    task: Task, path: str, state: TrainState, abstract: TrainState
) -> tuple[TrainState, list[str]]:
    """Weights and codebooks of another run or converted checkpoint; optimiser and step stay new.

    Also the names among `task.optional` that the checkpoint lacks: they stay new as well.
    """
    wanted = {"params": abstract.params, "stats": abstract.stats}
    try:
        loaded = task.start_from(path, wanted)
    except UserError as error:
        raise UserError(f"init_from={path}: {error}") from error
    new = [n for n in task.optional if any(n in wanted[k] and n not in loaded[k] for k in wanted)]
    params = state.params | loaded["params"]
    state = state.replace(params=params, stats=state.stats | loaded["stats"])
    if state.ema:
        state = state.replace(ema=jax.tree.map(jax.numpy.copy, params))
    return state, new


def check_fixed(saved: dict[str, str], now: dict[str, str]) -> None:
    """Raises UserError where fixed weights have another digest than those of the run so far."""
    for name in sorted(now):
        if saved.get(name) != now[name]:
            raise UserError(
                f"the {name} weights are not those that this run was trained with (sha256 was "
                f"{saved.get(name)}, is {now[name]}); restore their file, or start anew with "
                "--fresh"
            )


def without(state: TrainState, fixed: Collection[str]) -> TrainState:
    """The state as checkpoints hold it."""
    return state.replace(stats={k: v for k, v in state.stats.items() if k not in fixed})


def placed(fixed: dict[str, Any], shardings: dict[str, Any]) -> dict[str, Any]:
    """Fixed weights as arrays on the devices."""
    put = lambda a, s: jax.make_array_from_callback(a.shape, s, lambda i: np.array(a[i]))
    return {name: jax.tree.map(put, tree, shardings[name]) for name, tree in fixed.items()}


def digest(tree: Any) -> str:
    """sha256 of names, shapes, dtypes and bytes."""
    total = hashlib.sha256()
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        total.update(f"{path_string(path)} {array.shape} {array.dtype}".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()
