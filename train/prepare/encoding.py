"""What a run trains on when its images are encoded first: token codes or latents."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..data.text_features import read_info
from ..errors import UserError, told_as
from ..schema import CodeData, ImageData, LatentData, Run
from ..stages import resolve
from ..tasks.diffusion import check_latents

# `prepare` names its images data and its folder --out.
_IMAGE_FIELDS = "|".join(field.name for field in dataclasses.fields(ImageData))
_IN_A_RUN = (
    (rf"\bdata\.({_IMAGE_FIELDS})\b", r"data.images.\1"),
    ("give another --out, or (delete the folder|empty it)", "remove it, or start with --fresh"),
)
FOLDERS = {CodeData: "codes", LatentData: "latents"}  # of a run, for what it encoded itself


def encoded_dir(run: Run, run_dir: str | Path) -> Path | None:
    """The folder of codes or latents that a run reads; None for other data."""
    name = FOLDERS.get(type(run.data))
    if name is None:
        return None
    return Path(run.data.path).expanduser() if run.data.path else Path(run_dir) / name


def encode_data(run: Run, run_dir: str | Path) -> Path | None:
    """`encoded_dir`, filled now if the run is to encode its images itself, and checked against the
    tokenizer or autoencoder that the run names.

    Raises:
        UserError: what encodes is missing, or is not what encoded the folder.
    """
    folder = encoded_dir(run, run_dir)
    if getattr(run.data, "text", "") and run.sample.text:
        place = run.data.text_encoder or read_info(run.data.text).place
        if not Path(place).expanduser().exists():  # else this is told after training
            raise UserError(
                f"sample.text has prompts, and their encoder is not at {place or '?'}; set "
                "data.text_encoder=DIR, or leave sample.text out to draw captions"
            )
    if isinstance(run.data, CodeData) and run.data.tokenizer:  # else there is nothing to check
        _codes(run, run_dir, folder)
    if isinstance(run.data, LatentData):
        if not run.data.path and not run.data.autoencoder:
            raise UserError(
                "neither data.path (a folder of `lintime prepare latents`) nor data.autoencoder is "
                "set; nothing says what to train on"
            )
        if run.data.autoencoder:
            _latents(run, folder)
    return folder


def _codes(run: Run, run_dir: str | Path, folder: Path) -> None:
    from ..data.codes import CodesInfo
    from ..encoders.tokenizer import check_fingerprint, load_tokenizer
    from .command import prepare_codes

    data = run.data
    tokenizer = load_tokenizer(resolve(data.tokenizer, run_dir))
    if data.path:
        check_fingerprint(CodesInfo.finished(folder).tokenizer, tokenizer, f"{folder} holds")
    else:
        with told_as(*_IN_A_RUN):
            prepare_codes(data.images, tokenizer, folder, views=data.views, resizes=data.resizes)


def _latents(run: Run, folder: Path) -> None:
    from ..data.latents import LatentsInfo
    from ..encoders.autoencoder import check_autoencoder, load_autoencoder
    from .command import prepare_latents

    data = run.data
    autoencoder = load_autoencoder(data.autoencoder)
    if data.path:
        check_autoencoder(LatentsInfo.finished(folder).autoencoder, autoencoder, f"{folder} holds")
    else:
        # Encoding takes long: what would not fit is said first.
        side = data.images.size // autoencoder.downsample
        net = getattr(run.net, "base", run.net)
        if data.images.size % autoencoder.downsample == 0:  # else `prepare_latents` says it
            shape = (side, side, autoencoder.latent_channels)
            check_latents(run, net, shape, autoencoder.scaling_factor)
        with told_as(*_IN_A_RUN, (r"(?<![\w.])size=", "data.images.size=")):
            prepare_latents(data.images, autoencoder, folder)
