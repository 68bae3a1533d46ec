"""What is particular to VQ image tokenizers in `lintime convert` (LlamaGen's layout)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ...model.convert import vq_tokenizer as layout_of
from ...model.nets.vq_tokenizer import VQTokenizerConfig
from ..encoders.tokenizer import tokenizer_run
from ..errors import UserError
from ..override import apply_overrides
from ..schema import Run
from ..weights import load_weights

LAYOUTS = ("llamagen-vq",)


def recognises(flat: Mapping[str, np.ndarray]) -> bool:
    """Whether names are those of a VQ tokenizer alone."""
    return any(name.endswith(layout_of.CODEBOOK) for name in flat)


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

    Names and shapes tell all sizes. The run has no discriminator.

    Raises:
        UserError: not this layout, or a config of another net.
    """
    del layout, reference  # there is one, and it comes without a file of hyperparameters
    try:
        net = layout_of.config_from_shapes(flat)
        params = layout_of.tokenizer_from_reference(flat)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    run = config or tokenizer_run(net)
    if not isinstance(run.net, VQTokenizerConfig):
        raise UserError(f"{source} is a VQ tokenizer, the config is of another net")
    if config is not None:  # what it says of training a discriminator has no weights here
        plain = tokenizer_run(net).process
        run = dataclasses.replace(run, process=plain)
    run = apply_overrides(run, overrides)
    return run, {"params": {"tokenizer": params}, "stats": {}}


def from_run(
    run: Run, run_dir: str | Path, layout: str | None
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """Layout, sizes and arrays under the published names; arguments as of `export`."""
    del layout
    params = load_weights(run, run_dir)["params"]["tokenizer"]
    return LAYOUTS[0], dataclasses.asdict(run.net), arrays_of(params)


def arrays_of(params) -> dict[str, np.ndarray]:
    """A tokenizer's parameters under the published names."""
    return layout_of.tokenizer_to_reference(jax.tree.map(np.asarray, params))
