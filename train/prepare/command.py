"""`lintime prepare`: what is computed once, ahead of training: token codes of images, the moments
of their latents, or features of their captions (`prepare_text`).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ..data.codes import CodesInfo
from ..data.crops import FILTERS, VIEWS
from ..data.image_dataset import check_config
from ..data.image_sources import find_image_splits
from ..data.latents import LatentsInfo
from ..errors import UserError, told_as
from ..schema import CodeData, ImageData
from .encode import encode_images

SHARD_SIZE = 4096  # images; at 20 views of 256 codes a shard has 42 MB
LATENTS_SHARD_SIZE = 1024  # images; at 2 views of 64x64 latents of 4 channels a shard has 134 MB


class Tokenizer(Protocol):
    """What `prepare_codes` needs of a tokenizer.

    Attributes:
        fingerprint: changes with its weights; kept with the codes, and checked where they are used.
        codebook_size: codes are 0..codebook_size-1.
        downsample: pixels of a side per code.
    """

    fingerprint: str
    codebook_size: int
    downsample: int

    def encode(self, images: jax.Array) -> jax.Array:
        """images [B, S, S, 3] float32 in [-1, 1], rows shared out over the local devices -> codes
        [B, S/downsample, S/downsample] int32; compiled by the tokenizer."""


class Autoencoder(Protocol):
    """What `prepare_latents` needs of an autoencoder.

    Attributes:
        fingerprint: changes with its weights; kept with the latents, and checked where they are
            used.
        latent_channels, scaling_factor: see AutoencoderKLConfig.
        downsample: pixels of a side per position of a latent.
    """

    fingerprint: str
    latent_channels: int
    scaling_factor: float
    downsample: int

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """images [B, S, S, 3] float32 in [-1, 1], rows shared out over the local devices -> mean
        and log variance [B, S/downsample, S/downsample, latent_channels] float32; compiled by the
        autoencoder."""


def prepare_codes(
    images: ImageData,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    views: str = "ten",
    resizes: Sequence[float] = (1.1, 1.05),
    batch_size: int = 64,
    shard_size: int = SHARD_SIZE,
    say: Callable[[str], None] = print,
) -> CodesInfo:
    """Encodes images once into a folder of token codes, or continues where that was interrupted
    (see `encode_images`).

    Args:
        images: the source; its `path`, `size`, `filter` and `validation_fraction` are used.
        tokenizer: see Tokenizer.
        out: folder to make or to continue.
        views, resizes: see CodeData.
        batch_size: crops encoded at a time by this process (rounded up to a multiple of its
            devices).
        shard_size: images per shard of a new folder.
        say: takes a line for the user (of process 0).

    Returns:
        What the folder holds.

    Raises:
        UserError: settings out of range; a bad image; `out` holds codes of another tokenizer, other
            images or settings, or files that are not codes.
    """
    resizes = tuple(float(r) for r in resizes)
    _check(images, tokenizer.downsample, "tokenizer", views, resizes, batch_size, shard_size)
    splits = find_image_splits(images)
    info = CodesInfo(
        tokenizer=tokenizer.fingerprint,
        codebook_size=tokenizer.codebook_size,
        **_source(images, splits, tokenizer.downsample),
        views=views,
        resizes=resizes,
        shard_size=shard_size,
    )
    return encode_images(
        splits, info, tokenizer.encode, _folder(out), batch_size=batch_size, say=say
    )


def prepare_latents(
    images: ImageData,
    autoencoder: Autoencoder,
    out: str | Path,
    *,
    batch_size: int = 64,
    shard_size: int = LATENTS_SHARD_SIZE,
    say: Callable[[str], None] = print,
) -> LatentsInfo:
    """Encodes the centre crops of images once into a folder of posterior moments, or continues
    where that was interrupted (see `encode_images`).

    Args:
        images: the source; its `path`, `size`, `filter`, `validation_fraction` and `flip` (whether
            the mirror images of training images are kept too) are used.
        autoencoder: see Autoencoder.
        out, batch_size, shard_size, say: as of `prepare_codes`.

    Returns, raises: as `prepare_codes`.
    """
    views, resizes = "flip" if images.flip else "center", (1.0,)
    downsample = autoencoder.downsample
    _check(images, downsample, "autoencoder", views, resizes, batch_size, shard_size)
    splits = find_image_splits(images)
    info = LatentsInfo(
        autoencoder=autoencoder.fingerprint,
        latent_channels=autoencoder.latent_channels,
        scaling_factor=autoencoder.scaling_factor,
        **_source(images, splits, downsample),
        views=views,
        resizes=resizes,
        shard_size=shard_size,
    )
    together = jax.jit(lambda moments: jnp.concatenate(moments, -1).astype(jnp.float16))
    encode = lambda crops: together(tuple(autoencoder.encode(crops)))
    return encode_images(splits, info, encode, _folder(out), batch_size=batch_size, say=say)


def _folder(out: str | Path) -> Path:
    return Path(os.path.expanduser(out))


def _source(images: ImageData, splits: Mapping, downsample: int) -> dict[str, Any]:
    """The fields of an EncodedInfo that images decide."""
    side = images.size // downsample
    return dict(
        grid=(side, side),
        size=images.size,
        filter=images.filter,
        class_names=tuple(splits["train"].class_names),
        source={split: found.fingerprint for split, found in splits.items()},
        splits={split: len(found) for split, found in splits.items()},
    )


def _check(images: ImageData, downsample, maker, views, resizes, batch_size, shard_size) -> None:
    check_config(dataclasses.replace(images, resize=1.0, resize_max=0.0))
    if views not in VIEWS:
        raise UserError(f"views={views!r} is unknown; use one of {', '.join(VIEWS)}")
    if not resizes or min(resizes) < 1 or len(set(resizes)) < len(resizes):
        listed = ", ".join(map(str, resizes)) or "none"
        raise UserError(
            f"resizes={listed}: give one or more different numbers of at least 1, e.g. 1.1"
        )
    if images.size % downsample:
        near = max(1, round(images.size / downsample)) * downsample
        raise UserError(
            f"size={images.size} is not divisible by {downsample}, the {maker}'s pixels per "
            f"position; set size={near}"
        )
    if batch_size < 1 or shard_size < 1:
        raise UserError(f"batch={batch_size} and shard size {shard_size} must be at least 1")


# ---------------------------------------------------------------- command line

EXAMPLES = """\
examples:
  lintime prepare codes imagenet/ --tokenizer vq_ds16_c2i.pt --out codes/
  lintime prepare codes images/ --tokenizer runs/tokenizer --out codes/ --size 64 --views flip
  lintime prepare latents imagenet/ --autoencoder sd-vae-ft-ema/ --out latents/
  lintime prepare text images/ --encoder t5-v1_1-xxl/ --length 120 --out text/
The same command continues what was interrupted. On several hosts: --distributed, one file system.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `lintime prepare`."""
    defaults = CodeData()
    parser.epilog = EXAMPLES
    kinds = parser.add_subparsers(metavar="what", dest="what", required=True)
    kind = lambda name, text: kinds.add_parser(
        name, help=text, description=text, epilog=EXAMPLES, formatter_class=parser.formatter_class
    )

    codes = kind("codes", "Token codes of images.")
    codes.add_argument(
        "--tokenizer", metavar="RUN|FILE", required=True,
        help="run directory of a tokenizer, or a file of published weights",
    )  # fmt: skip
    _common(codes)
    codes.add_argument(
        "--views", choices=list(VIEWS), default=defaults.views,
        help="crops kept of a training image at every resize (default %(default)s)",
    )  # fmt: skip
    codes.add_argument(
        "--resizes", type=float, nargs="+", default=list(defaults.resizes), metavar="R",
        help="cut crops from squares of R times the size (default "
        f"{' '.join(map(str, defaults.resizes))})",
    )  # fmt: skip

    latents = kind("latents", "Means and log variances of the latents of images.")
    latents.add_argument(
        "--autoencoder", metavar="DIR|FILE", required=True,
        help="folder or file of a published KL autoencoder, such as sd-vae-ft-ema",
    )  # fmt: skip
    _common(latents)
    latents.add_argument(
        "--no-flip", dest="flip", action="store_false",
        help="do not keep the mirror images of training images too",
    )  # fmt: skip

    from . import text as prepare_text

    prepare_text.add_arguments(kind("text", "Features of the captions of images."))


def _common(parser: argparse.ArgumentParser) -> None:
    """Arguments of every kind that is made of images."""
    parser.add_argument(
        "images", metavar="IMAGES",
        help="a folder of class folders, .npz or .npy arrays, ArrayRecord files, builtin:digits",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to make or continue")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="default 256")
    parser.add_argument(
        "--filter", choices=list(FILTERS), default="bicubic",
        help="of resizing (default %(default)s, as ADM's preprocessing)",
    )  # fmt: skip
    parser.add_argument(
        "--validation-fraction", type=float, default=ImageData().validation_fraction, metavar="F",
        help="share held out where the images have no validation split (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=int, default=64, metavar="N",
        help="crops encoded at a time by each process (default 64)",
    )  # fmt: skip
    parser.add_argument("--distributed", action="store_true", help="several processes, by JAX")
    parser.add_argument("--coordinator", default="", metavar="HOST:PORT", help="process 0")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="with --coordinator")
    parser.add_argument("--process-index", type=int, default=-1, metavar="I", help="0 .. N-1")
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS)


def run_command(arguments: argparse.Namespace) -> None:
    """`lintime prepare`: encodes the images or their captions and says what to do next."""
    with told_as((r"^data\.path=", "IMAGES=")):
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.what == "text":
        from . import text as prepare_text

        prepare_text.run_command(arguments)
        return
    from ..launch import join

    join(arguments.coordinator, arguments.processes, arguments.process_index, arguments.distributed)
    images = ImageData(
        path=arguments.images, size=arguments.size, filter=arguments.filter,
        validation_fraction=arguments.validation_fraction,
        flip=getattr(arguments, "flip", False),
    )  # fmt: skip
    maker = _codes(arguments, images) if arguments.what == "codes" else _latents(arguments, images)
    if jax.process_index() == 0:
        print(f"train on them with data.path={arguments.out} {maker}")


def _codes(arguments: argparse.Namespace, images: ImageData) -> str:
    from ..encoders.tokenizer import load_tokenizer

    prepare_codes(
        images, load_tokenizer(arguments.tokenizer), arguments.out, views=arguments.views,
        resizes=arguments.resizes, batch_size=arguments.batch,
    )  # fmt: skip
    return f"data.tokenizer={arguments.tokenizer}"


def _latents(arguments: argparse.Namespace, images: ImageData) -> str:
    from ..encoders.autoencoder import load_autoencoder

    autoencoder = load_autoencoder(arguments.autoencoder)
    prepare_latents(images, autoencoder, arguments.out, batch_size=arguments.batch)
    return f"data.autoencoder={arguments.autoencoder}"
