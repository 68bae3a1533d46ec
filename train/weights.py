"""Weights of runs: read to be used or converted, and compared with what a net takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..model.convert.names import check_shapes, flatten
from .checkpoint import restore_inference
from .errors import UserError
from .schema import Run
from .tasks.table import make_task


def load_weights(run: Run, run_dir: str | Path) -> dict[str, Any]:
    """{"params", "stats"} of a run as numpy arrays: the newest, averaged where it keeps those."""
    abstract = make_task(run).abstract()
    return jax.tree.map(np.asarray, restore_inference(run_dir, abstract))


def check_weights(run: Run, variables: dict[str, Any], source: str | Path) -> None:
    """The net of `run` must have exactly these arrays.

    Raises:
        UserError: names those that are missing, unknown or of another shape.
    """
    wanted = make_task(run).abstract()
    shapes = {name: tuple(a.shape) for name, a in flatten(wanted).items()}
    try:
        check_shapes(flatten({"stats": {}} | variables), shapes)
    except ValueError as error:
        raise UserError(f"{source} does not fit the config: {error}") from error
