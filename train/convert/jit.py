"""What is particular to JiT in `lintime convert`: its checkpoints keep averages as lists."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...model.convert import jit as layout_of
from ...model.nets.jit import JiTConfig, jit_process
from ..arrays import AVERAGE
from ..config_files import to_json
from ..errors import UserError
from ..override import apply_overrides
from ..schema import DiffusionSample, ImageData, Run
from ..weights import load_weights

LAYOUTS = ("jit",)
# Published: the solver, its steps, guidance by time; the strength is chosen here.
DEMO = DiffusionSample(
    count=16, rows=16, method="heun", steps=50, guidance=3.0, guided_times=(0.1, 1.0)
)
TOLD = ("context_start", "class_dropout", "input_size")  # what shapes do not tell


def recognises(flat: Mapping[str, np.ndarray]) -> bool:
    """Whether names are those of a JiT, with their prefix or without."""
    return layout_of.PATCH in layout_of.bare_names(flat)


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

    Of a training checkpoint the first average is taken (`ema_params1`), else the weights
    themselves. Images are `data.path=` whatever is given: sampling reads none.

    Raises:
        UserError: not this layout, or hyperparameters that are missing or do not fit.
    """
    del layout  # there is one
    try:
        weights = layout_of.bare_names({n: a for n, a in flat.items() if not AVERAGE.search(n)})
        if config is None:
            if reference is not None:
                raise UserError(
                    f"{source}: the JSON beside it is no lintime config, and JiT has no published "
                    "hyperparameters to read; remove it, or give --config"
                )
            config = demo_run(_net(weights, overrides))
        run = apply_overrides(config, overrides)
        if not isinstance(run.net, JiTConfig):
            raise UserError(f"{source} is a JiT checkpoint, the config is of another net")
        if average := first_average(flat):
            # Whatever is no parameter there (tables of the rotation) has no average.
            weights = weights | layout_of.average_by_name(average, weights, run.net)
        return run, {"params": layout_of.jit_from_reference(weights, run.net), "stats": {}}
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def first_average(flat: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The arrays of the first list of averages in a checkpoint, in its order; [] if it has none."""
    found = {(m["name"], int(m["index"])): a for n, a in flat.items() if (m := AVERAGE.search(n))}
    first = min(found, default=("", 0))[0]
    return [found[key] for key in sorted(found) if key[0] == first]


def demo_run(net: JiTConfig) -> Run:
    """A run of a net of pixels with the process that it was trained with."""
    data = ImageData(
        path="", size=net.input_size, crop="center", resize=1.0, filter="bicubic", flip=True
    )
    return Run(net=net, process=jit_process(net.input_size), data=data, sample=DEMO)


def _net(flat: Mapping[str, np.ndarray], overrides: Sequence[str]) -> JiTConfig:
    """The net that the arrays and `overrides` tell."""
    given = {o.partition("=")[0].strip(): o.partition("=")[2] for o in overrides}
    given = [f"net.{name}={given[f'net.{name}']}" for name in TOLD if f"net.{name}" in given]
    net = apply_overrides(Run(net=JiTConfig()), given).net
    told = {re.split(r"[.=]", text)[1] for text in given}
    return layout_of.jit_config_from_reference(flat, **{n: getattr(net, n) for n in told})


def from_run(
    run: Run, run_dir: str | Path, layout: str | None
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """Layout, the run's config (nothing is published to say it in) and arrays under the published
    names; arguments as of `export`."""
    params = load_weights(run, run_dir)["params"]
    return layout or LAYOUTS[0], to_json(run), layout_of.jit_to_reference(params, run.net)
