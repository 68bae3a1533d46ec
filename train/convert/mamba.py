"""What is particular to Mamba language models in `lintime convert`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...model.convert import mamba as layout_of
from ...model.nets.mamba_lm import MambaConfig
from ..errors import UserError
from ..override import apply_overrides
from ..schema import Data, Run
from ..weights import load_weights

LAYOUTS = ("mamba-ssm",)


def recognises(flat: Mapping[str, np.ndarray]) -> bool:
    """Whether names are those of the mamba_ssm layout, or nearly."""
    return any(name.startswith("backbone.") for name in flat)


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

    Published models read the ids of a tokenizer that is not part of lintime, so `data.vocab` is ""
    unless `config` or `overrides` name one.

    Raises:
        UserError: not this layout, or hyperparameters that are missing or do not fit.
    """
    del layout  # there is one
    try:
        if reference is not None:
            net = layout_of.config_from_reference(reference)
        elif config is None:
            variables = layout_of.from_reference(flat)
            told = [o for o in overrides if o.partition("=")[0].strip() == "net.ngroups"]
            ngroups = apply_overrides(Run(net=MambaConfig(ngroups=0)), told).net.ngroups
            net = _inferred(flat, variables, ngroups, source)
        run = apply_overrides(config or Run(net=net, data=Data(vocab="")), overrides)
        if not isinstance(run.net, MambaConfig):
            raise UserError(f"{source} is a Mamba checkpoint, the config is of another net")
        variables = layout_of.from_reference(flat, run.net.tie_embeddings)
        differences = _differences(run.net, layout_of.infer_config(flat, run.net.ngroups))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    if differences:
        raise UserError(f"{source} does not fit the config: {'; '.join(differences)}")
    return run, variables


def from_run(
    run: Run, run_dir: str | Path, layout: str | None
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """Layout, hyperparameters and arrays under the published names; arguments as of `export`.

    Raises:
        UserError: the layout cannot hold the model.
    """
    try:
        reference = layout_of.config_to_reference(run.net)
    except ValueError as error:
        raise UserError(f"{run_dir} does not fit the layout: {error}") from error
    return LAYOUTS[0], reference, layout_of.to_reference(load_weights(run, run_dir), run.net)


def _inferred(flat, variables, ngroups: int, source) -> MambaConfig:
    """The net that the arrays tell; asks for what they do not."""
    fields = layout_of.infer_config(flat, ngroups)
    if fields["mixer"] == "mamba2" and not ngroups:
        raise UserError(
            f"the arrays of {source} do not tell net.ngroups (1 in all published Mamba-2 models); "
            "give it as FIELD=VALUE, or all hyperparameters with --config config.json"
        )
    return MambaConfig(**fields, tie_embeddings="lm_head" not in variables["params"])


def _differences(net: MambaConfig, inferred: Mapping[str, Any]) -> list[str]:
    """Fields in which a config contradicts the arrays, as text."""
    given = vars(net) | {
        "d_state": net.d_state or {"mamba1": 16, "mamba2": 128}.get(net.mixer),
        "dt_rank": net.dt_rank or -(-net.d_model // 16),
        "d_ssm": 0 if net.d_ssm == net.expand * net.d_model else net.d_ssm,
        "d_intermediate": -(-net.d_intermediate // 128) * 128,
    }
    different = [name for name, value in inferred.items() if given[name] != value]
    if "mixer" in different:  # everything else then differs as well
        different = ["mixer"]
    return [
        f"net.{name} is {inferred[name]} in the checkpoint, {given[name]} in the config"
        for name in different
    ]
