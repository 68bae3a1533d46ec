"""What is particular to AiM in `lintime convert`: stage 2 with or without its tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ...model.convert import aim as layout_of
from ...model.convert.aim import TOKENIZER, join_hub, split_hub
from ...model.nets.aim import AiMConfig
from ..errors import UserError
from ..override import apply_overrides
from ..schema import CodeData, ImageData, ImageSample, Precision, Run
from ..stages import stage_dir
from . import tokenizer as convert_tokenizer

LAYOUTS = ("aim-hub", "aim-stage2")
# As the published demo draws; the FID protocol has guidance 2 (B) or 1.75 (L, XL) and no filters.
DEMO = ImageSample(count=16, guidance=5.0, top_k=600, top_p=0.98)


def recognises(flat: Mapping[str, np.ndarray]) -> bool:
    """Whether names are those of an AiM checkpoint."""
    return any("backbone.cls_embed." in name for name in flat)


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

    Where the arrays hold the tokenizer, too, it is stage 0 of the run (see `tokenizer_of`).

    Raises:
        UserError: not this layout, or hyperparameters that are missing or do not fit.
    """
    try:
        _, tokenizer = split_hub(flat)
        if layout == "aim-hub" and not tokenizer:
            raise UserError(f"{source} holds no tokenizer ({TOKENIZER}*); use --layout aim-stage2")
        if reference is not None:
            net = layout_of.config_from_reference(reference)
        elif config is None:
            net = AiMConfig(position_offset=1, **layout_of.infer_config(flat, ngroups=1))
        run = config or Run(
            net=net,
            data=CodeData(tokenizer="stage:0" if tokenizer else "", images=ImageData(path="")),
            precision=Precision(compute="bfloat16"),  # as it was trained
            sample=DEMO,
        )
        if tokenizer and not run.stages:
            parts = convert_tokenizer.to_run(
                tokenizer, layout=None, config=None, reference=None, overrides=(), source=source
            )
            run = dataclasses.replace(run, stages=(parts[0],))
        run = apply_overrides(run, overrides)
        if not isinstance(run.net, AiMConfig):
            raise UserError(f"{source} is an AiM checkpoint, the config is of another net")
        return run, layout_of.from_reference(flat, run.net)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def tokenizer_of(flat: Mapping[str, np.ndarray], source: str | Path):
    """(run, variables) of the tokenizer that the arrays hold, or None."""
    _, tokenizer = split_hub(flat)
    if not tokenizer:
        return None
    return convert_tokenizer.to_run(
        tokenizer, layout=None, config=None, reference=None, overrides=(), source=source
    )


def extra_runs(flat: Mapping[str, np.ndarray], out: Path, source: str | Path) -> dict[Path, tuple]:
    """Runs to write besides, by folder: the tokenizer as stage 0."""
    found = tokenizer_of(flat, source)
    return {stage_dir(out, 0): found} if found else {}


def from_run(
    run: Run, run_dir: str | Path, layout: str | None
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """Layout, hyperparameters and arrays under the published names; arguments as of `export`.

    Raises:
        UserError: the layout cannot hold the model, or the tokenizer is not the one it was trained
            with.
    """
    try:
        reference = layout_of.config_to_reference(run.net)
    except ValueError as error:
        raise UserError(f"{run_dir} does not fit the layout: {error}") from error
    from ..loaded.load import load

    loaded = load(run_dir)
    stage2 = layout_of.to_reference(jax.tree.map(np.asarray, loaded.variables), run.net)
    layout = layout or ("aim-hub" if run.data.tokenizer else "aim-stage2")
    if layout == "aim-stage2":
        return layout, reference, stage2
    if not run.data.tokenizer:
        raise UserError(f"{run_dir} names no tokenizer; use --layout aim-stage2")
    arrays = convert_tokenizer.arrays_of(loaded.tokenizer.params["tokenizer"])
    return layout, reference, join_hub(stage2, arrays, run.net.tie_embeddings)
