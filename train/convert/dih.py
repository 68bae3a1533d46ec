"""What is particular to DiH, DiH++ and their baseline in `lintime convert` (arXiv 2411.12663)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...model.convert import dih as layout_of
from ...model.nets.dih import DiHConfig
from ...model.processes.noise_levels import NoiseLevels
from ..errors import UserError
from ..override import apply_overrides
from ..schema import LatentData, LevelSample, Run
from ..weights import load_weights
from .dit import told

LAYOUTS = ("dih",)
# As the published evaluation draws: w = 1.5 of cond + w (cond - uncond).
DEMO = LevelSample(count=16, steps=250, guidance=2.5)
# What shapes do not tell.
TOLD = ("degree", "n_head", "input_size", "positions", "class_dropout")


def recognises(flat: Mapping[str, np.ndarray]) -> bool:
    """Whether names are those of a DiH, by themselves or in a training checkpoint."""
    patch, labels = layout_of.PATCH, layout_of.LABELS
    return all(any(n.endswith(name) for n in flat) for name in (patch, labels))


def to_run(
    flat: Mapping[str, np.ndarray],
    *,
    layout: str | None,
    config: Run | None,
    reference: Mapping[str, Any] | None,
    overrides: Sequence[str],
    source: str | Path,
) -> tuple[Run, dict[str, Any]]:
    """A run and its {"params", "stats"} from published arrays; arguments as of `convert`.

    A training checkpoint has two sets of weights, of which the average is taken. Nothing in a file
    tells degree, position table, or what the net learned: velocities unless process.predict says
    so.

    Raises:
        UserError: not this layout, or hyperparameters that are missing or do not fit.
    """
    try:
        flat = layout_of.bare_names(flat)
        if config is None:
            config = demo_run(_net(flat, reference, overrides))
        run = apply_overrides(config, overrides)
        if not isinstance(run.net, DiHConfig):
            raise UserError(f"{source} is a DiH checkpoint, the config is of another net")
        return run, {"params": layout_of.dih_from_reference(flat, run.net), "stats": {}}
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def demo_run(net: DiHConfig) -> Run:
    """A run of a net of latents, drawing as the published evaluation."""
    process = NoiseLevels(timesteps=net.timesteps)
    return Run(net=net, process=process, data=LatentData(), sample=DEMO)


def _net(flat, reference, overrides) -> DiHConfig:
    """The net that hyperparameters, or else the arrays and `overrides`, tell."""
    if reference is not None:
        return layout_of.dih_config_from_fields(reference)
    known = told(overrides, "net.", TOLD, DiHConfig)
    return layout_of.dih_config_from_reference(flat, **known)


def says_all(run: Run) -> bool:
    """Whether what is read back from the layout, without `run`'s config and without options,
    predicts what `run` does, and latents of the published autoencoder."""
    demo = demo_run(run.net)
    latents = isinstance(run.data, LatentData)
    same = latents and run.data.scaling_factor == demo.data.scaling_factor
    return same and run.process == demo.process


def from_run(
    run: Run, run_dir: str | Path, layout: str | None
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """Layout, hyperparameters and arrays under the published names; arguments as of `export`.

    Raises:
        UserError: the layout cannot hold the model.
    """
    try:
        reference = layout_of.dih_fields(run.net)
    except ValueError as error:
        raise UserError(f"{run_dir} does not fit the layout: {error}") from error
    params = load_weights(run, run_dir)["params"]
    return "dih", reference, layout_of.dih_to_reference(params, run.net)
