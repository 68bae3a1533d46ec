"""What is particular to FlexiDiT in `lintime convert`; its layout is by analogy with DiT's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...model.convert import flexidit as layout_of
from ...model.nets.flexidit import FlexiDiTConfig
from ..errors import UserError
from ..override import apply_overrides
from ..resolution import check_positions_of
from ..schema import Run
from ..tasks.flexible import flexible_run, split_base
from ..weights import load_weights
from . import dit as convert_dit

# Ours, and the layout of the base's process.
says_all = convert_dit.says_all
LAYOUTS = {"flexidit": "dit", "flexisit": "sit"}
TOLD = (*convert_dit.TOLD, "patch_size")


def recognises(flat: Mapping[str, np.ndarray]) -> bool:
    """Whether names are those of a FlexiDiT."""
    return "x_embedder.flex.weight" in flat or any(n.startswith(layout_of.MODES) for n in flat)


def to_run(
    flat: Mapping[str, np.ndarray],
    *,
    layout: str | None,
    config: Run | None,
    reference: Mapping[str, Any] | None,
    overrides: Sequence[str],
    source: str | Path,
) -> tuple[Run, dict[str, Any]]:
    """A run and its {"params", "stats"} from arrays; arguments as of `convert`.

    Raises:
        UserError: not this layout, or hyperparameters that are missing or do not fit.
    """
    try:
        if config is None:
            if reference is not None:
                net = layout_of.flexidit_config_from_fields(reference)
            else:
                known = convert_dit.told(overrides, "net.base.", TOLD)
                net = layout_of.flexidit_config_from_reference(flat, **known)
            config = convert_dit.demo_run(net.base, LAYOUTS[layout or "flexidit"])
            config = flexible_run(config, net)
        run = apply_overrides(config, overrides)
        if not isinstance(run.net, FlexiDiTConfig):
            raise UserError(f"{source} is a FlexiDiT checkpoint, the config is of another net")
        if said := check_positions_of(flat, run.net):
            print(said)
        return run, split_base(layout_of.flexidit_from_reference(flat, run.net))
    except UserError:
        raise
    except ValueError as error:
        # of the base, as what is told about a DiT
        text = re.sub(r"\bnet\.(?!base\.)(?=\w+_(head|size)\b)", "net.base.", str(error))
        raise UserError(f"{source}: {text}") from error


def from_run(
    run: Run, run_dir: str | Path, layout: str | None
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """Layout, hyperparameters and arrays under the layout's names; arguments as of `export`.

    Raises:
        UserError: the layout cannot hold the model, or is that of the other process.
    """
    fields = layout_of.flexidit_fields
    fits, reference = convert_dit.fitting(run, run_dir, layout, LAYOUTS, fields)
    weights = load_weights(run, run_dir)
    tree = {**weights["params"], **weights["stats"]}
    return fits, reference, layout_of.flexidit_to_reference(tree, run.net)
