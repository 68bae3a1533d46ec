"""A trained run, loaded for use: `lintime.load("runs/mine").generate("Once upon a time")`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax
from jax.sharding import SingleDeviceSharding

from ...model.nets.aim import AiMConfig
from ...model.nets.dih import DiHConfig
from ...model.nets.dit import DiTConfig
from ...model.nets.flexidit import FlexiDiTConfig
from ...model.nets.jit import JiTConfig
from ...model.nets.mamba_lm import MambaConfig
from ...model.nets.text_video_dih import TextVideoDiHConfig
from ...model.nets.transformer_vq import TransformerVQConfig
from ...model.nets.vq_tokenizer import VQTokenizerConfig
from ..arrays import INDEX, WEIGHTS
from ..checkpoint import FOLDER, Checkpoints, restore_inference
from ..config_files import read_config
from ..encoders.tokenizer import LoadedTokenizer
from ..errors import UserError
from ..schema import Precision, Run
from ..tasks.table import make_task
from .base import LoadedRun
from .codes import LoadedCodes
from .diffusion import LoadedDiffusion
from .flexible import LoadedFlexible
from .published import HUB_NAME, fetch, load_published
from .text import LoadedText

# What a loaded run can do, by the kind of its net.
LOADED = {
    TransformerVQConfig: LoadedText,
    MambaConfig: LoadedText,
    AiMConfig: LoadedCodes,
    DiTConfig: LoadedDiffusion,
    FlexiDiTConfig: LoadedFlexible,
    DiHConfig: LoadedDiffusion,
    JiTConfig: LoadedDiffusion,
    TextVideoDiHConfig: LoadedDiffusion,
    VQTokenizerConfig: LoadedTokenizer,
}


def load(
    path: str | os.PathLike,
    *,
    step: int | None = None,
    ema: bool = True,
    precision: Precision | None = None,
    **options,
) -> LoadedRun:
    """Load a run directory, or a directory written by `lintime convert`, for inference.

    Args:
        path: the directory, a folder of a published checkpoint (config.json and
            model.safetensors), or the name of such a model on the hub (`hp-l33/aim-base`).
        step: checkpoint to load; the newest unless given.
        ema: prefer the moving average of the weights where the run keeps one.
        precision: in which to compute, if not as in training.
        options: of the kind of run: `vocab` of text, `tokenizer` of images from codes,
            `autoencoder` and `text_encoder` of diffusion; where that is now, if not where the
            config says.

    Raises:
        UserError: no such directory, not a run, no checkpoint, or one that is damaged or of
            another model.
    """
    name, path = str(path), Path(path).expanduser()
    if not path.is_dir():
        if not HUB_NAME.fullmatch(name) or path.parent.is_dir():
            raise UserError(
                f"{path} is not a directory; name one that `lintime train` or `convert` wrote"
            )
        path = fetch(name)
    weights = [path / (name + end) for name in WEIGHTS.values() for end in ("", INDEX)]
    if not (path / FOLDER).is_dir() and any(file.is_file() for file in weights):
        return load_published(path, LOADED, precision, **options)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is not a run directory: it has no config.json; name one that "
            "`lintime train` or `lintime convert` wrote"
        )
    config = read_config(path / "config.json")
    config = dataclasses.replace(config, precision=precision or config.precision)
    restored, step, fingerprint = _restore(config, path, step, ema)
    return LOADED[type(config.net)](
        config, restored["params"], restored["stats"], step=step, path=path,
        data_fingerprint=fingerprint, **options,
    )  # fmt: skip


def _restore(config: Run, path: Path, step: int | None, ema: bool) -> tuple[dict, int, dict]:
    """{"params", "stats"} on one device, their step, and the fingerprint of the training data."""
    checkpoints = Checkpoints(path)
    latest = checkpoints.latest_step()
    if latest is None:
        raise UserError(f"{path} holds no complete checkpoint; train there first")
    step = latest if step is None else step
    if not checkpoints.has(step, "params"):
        have = sorted(int(p.name) for p in checkpoints.folder.iterdir() if p.name.isdigit())
        raise UserError(
            f"{path} has no checkpoint of step {step}; it has {', '.join(map(str, have))}"
        )
    fingerprint = (checkpoints.meta(step).get("fingerprint") or {}).get("train") or {}
    checkpoints.close()
    task = make_task(config)
    device = SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), task.abstract()
    )
    return restore_inference(path, abstract, ema=ema, step=step), step, fingerprint
