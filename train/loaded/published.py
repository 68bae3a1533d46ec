"""Published checkpoints, loaded without a run directory: from a folder or from a model hub."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp

from ..arrays import config_beside, read_arrays, read_hyperparameters
from ..convert import aim as convert_aim
from ..convert.command import recognise
from ..errors import UserError
from ..schema import Precision
from ..weights import check_weights

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ("*.json", "*.safetensors", "*.bin")


def fetch(name: str) -> Path:
    """The files of a model `owner/name` on the Hugging Face hub, in the hub's own local cache.

    Raises:
        UserError: the package for it is not installed, or the hub cannot be reached or has no such
            model.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name} is not a directory here, and fetching it from the hub needs a package: "
            "pip install 'lintime[hub]'"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # the package has many kinds: offline, gone, private, no space
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot fetch {name} from the hub ({type(error).__name__}: {reason}); "
            "name a local directory instead"
        ) from error


def load_published(source: Path, loaded: dict, precision: Precision | None = None, **options):
    """A run in memory from arrays in a published layout and the config.json beside them.

    Args:
        source: file or folder. loaded: kind of net -> class of loaded run.
        precision: in which to compute. options: of the class of loaded run.

    Raises:
        UserError: not readable, or of no known layout.
    """
    flat = read_arrays(source)
    beside = config_beside(source)
    config, reference = read_hyperparameters(beside) if beside else (None, None)
    system = recognise(flat)
    run, variables = system.to_run(
        flat, layout=None, config=config, reference=reference, overrides=(), source=source
    )
    check_weights(run, variables, source)
    run = dataclasses.replace(run, precision=precision or run.precision)
    if system is convert_aim and (found := convert_aim.tokenizer_of(flat, source)):
        from ..encoders.tokenizer import LoadedTokenizer

        of, weights = found
        tokenizer = LoadedTokenizer(of, _on_device(weights["params"]), path=source)
        options = {"tokenizer": tokenizer} | options
    params, stats = _on_device(variables["params"]), _on_device(variables["stats"])
    return loaded[type(run.net)](run, params, stats, path=source, **options)


def _on_device(tree):
    return jax.tree.map(jnp.asarray, tree)
