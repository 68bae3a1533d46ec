"""What is particular to DiT and SiT in `lintime convert`: one layout for two processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...model.convert import dit as layout_of
from ...model.nets.dit import DiTConfig
from ...model.processes.flow import FlowMatching
from ...model.processes.gaussian import GaussianDiffusion
from ..errors import UserError
from ..override import apply_overrides
from ..resolution import check_positions_of
from ..schema import DiffusionSample, LatentData, Run
from ..weights import load_weights

LAYOUTS = ("dit", "sit")
# As the published demos draw; the FID protocols have guidance 1.5.
DEMO = {
    "dit": DiffusionSample(count=16, steps=250, guidance=4.0, guidance_channels=3),
    "sit": DiffusionSample(count=16, method="sde", steps=250, guidance=4.0, guidance_channels=3),
}
# What shapes do not tell, and a file without positions.
TOLD = ("n_head", "class_dropout", "input_size")


def recognises(flat: Mapping[str, np.ndarray]) -> bool:
    """Whether names are those of a DiT."""
    return layout_of.PATCH in flat


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

    Names and shapes tell all sizes of the published models. They do not tell whether the net was
    trained to diffuse (layout "dit", the default) or to follow a flow ("sit").

    Raises:
        UserError: not this layout, or hyperparameters that are missing or do not fit.
    """
    try:
        if config is None:
            config = demo_run(_net(flat, reference, overrides), layout or "dit")
        run = apply_overrides(config, overrides)
        if not isinstance(run.net, DiTConfig):
            raise UserError(f"{source} is a DiT checkpoint, the config is of another net")
        if said := check_positions_of(flat, run.net):
            print(said)
        return run, {"params": layout_of.dit_from_reference(flat, run.net), "stats": {}}
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def demo_run(net: DiTConfig, layout: str) -> Run:
    """A run of a net of latents whose layout is "dit" or "sit", drawing as the published demos."""
    variance = "learned_range" if net.learn_sigma else "fixed_large"
    process = FlowMatching() if layout == "sit" else GaussianDiffusion(variance=variance)
    return Run(net=net, process=process, data=LatentData(), sample=DEMO[layout])


def _net(flat, reference, overrides) -> DiTConfig:
    """The net that hyperparameters, or else the arrays and `overrides`, tell."""
    if reference is not None:
        return layout_of.dit_config_from_fields(reference)
    return layout_of.dit_config_from_reference(flat, **told(overrides, "net.", TOLD))


def says_all(run: Run) -> bool:
    """Whether what is read back from the layout, without `run`'s config and without options,
    predicts what `run` does, and latents of the published autoencoder."""
    demo = demo_run(run.net if isinstance(run.net, DiTConfig) else run.net.base, "dit")
    process = vars(demo.process).items()
    same = all(getattr(run.process, name, None) == value for name, value in process)
    latents = isinstance(run.data, LatentData)
    return same and latents and run.data.scaling_factor == demo.data.scaling_factor


def told(
    overrides: Sequence[str], prefix: str, names: Sequence[str], kind: type = DiTConfig
) -> dict[str, Any]:
    """{name: value} of those `names` of a net's config (`kind`) that overrides `prefix`name=value
    give."""
    given = {o.partition("=")[0].strip(): o.partition("=")[2] for o in overrides}
    given = {name: given[prefix + name] for name in names if prefix + name in given}
    net = apply_overrides(Run(net=kind()), [f"net.{n}={v}" for n, v in given.items()]).net
    return {name: getattr(net, name) for name in given}


def from_run(
    run: Run, run_dir: str | Path, layout: str | None
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """Layout, hyperparameters and arrays under the published names; arguments as of `export`.

    Raises:
        UserError: the layout cannot hold the model, or is that of the other process.
    """
    fits, reference = fitting(run, run_dir, layout, LAYOUTS, layout_of.dit_fields)
    params = load_weights(run, run_dir)["params"]
    return fits, reference, layout_of.dit_to_reference(params, run.net)


def fitting(
    run: Run,
    run_dir: str | Path,
    layout: str | None,
    layouts: Iterable[str],
    fields: Callable[[Any], dict[str, Any]],
) -> tuple[str, dict[str, Any]]:
    """The layout of a run's process, and the hyperparameters under its names.

    Args:
        layout: the one asked for; None takes any. layouts: of diffusion, and of flow matching.
        fields: of a net, its hyperparameters.

    Raises:
        UserError: the layout cannot hold the model, or is that of the other process.
    """
    diffusion, flow = layouts
    fits = flow if isinstance(run.process, FlowMatching) else diffusion
    if layout not in (None, fits):
        raise UserError(f"{run_dir} was trained for layout {fits}, not {layout}; use that")
    try:
        return fits, fields(run.net)
    except ValueError as error:
        raise UserError(f"{run_dir} does not fit the layout: {error}") from error
