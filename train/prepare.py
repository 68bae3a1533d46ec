"""`lintime prepare`: what is computed once, ahead of training. Now: token codes of images."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..kernels_pallas.compat import auto_mesh
from .data.batches import cpu_count
from .data.codes import (
    INFO_FILE,
    PLAN_FILE,
    CodesInfo,
    has_shard,
    read_info,
    shard_files,
    write_shard,
)
from .data.crops import FILTERS, VIEWS, check_size, to_unit, views_of
from .data.image_dataset import check_config, decoding_threads, describe
from .data.image_sources import find_image_splits
from .data.tokens import progress
from .errors import UserError
from .files import write_atomic
from .launch import agree
from .schema import CodeData, ImageData

SHARD_SIZE = 4096  # images; at 20 views of 256 codes a shard has 42 MB
EXAMPLES = """\
examples:
  lintime prepare codes imagenet/ --tokenizer vq_ds16_c2i.pt --out codes/
  lintime prepare codes images/ --tokenizer runs/tokenizer --out codes/ --size 64 --views flip
The same command continues what was interrupted. On several hosts: --distributed, one file system.
"""


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
    """Encodes images once into a folder of token codes (see `data.codes`).

    Every split of the source is encoded: training images in all views at all resizes, the others in
    the centre crop at the first resize. Shard i of all is made by process i % (number of
    processes), each of its batches by all devices of the process. Shards are written whole, so that
    an interrupted run continues with the missing ones; where images were replaced or removed since
    then, those shards are kept whose images are the same. A finished folder is left as it is.

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
    out, primary = Path(os.path.expanduser(out)), jax.process_index() == 0
    resizes = tuple(float(r) for r in resizes)
    _check(images, tokenizer, views, resizes, batch_size, shard_size)
    splits = find_image_splits(images)
    side = images.size // tokenizer.downsample
    info = CodesInfo(
        tokenizer=tokenizer.fingerprint,
        codebook_size=tokenizer.codebook_size,
        grid=(side, side),
        size=images.size,
        filter=images.filter,
        views=views,
        resizes=resizes,
        class_names=tuple(splits["train"].class_names),
        source={split: found.fingerprint for split, found in splits.items()},
        splits={split: len(found) for split, found in splits.items()},
        shard_size=shard_size,
    )
    info, changed = _compare_with(out, info)
    everything = [(split, shard) for split in info.splits for shard in info.shards(split)]
    hashes = {
        (split, shard): splits[split].hash_of(range(*info.shard_range(split, shard)))
        for split, shard in (everything if changed else ())
    }
    missing = [i for i in everything if not has_shard(out, info, *i, source=hashes.get(i))]
    stale = [path for i in missing for path in shard_files(out, *i) if path.exists()]
    if changed and len(missing) == len(everything) and stale:
        raise UserError(_refusal(out, "other images"))
    what = _what(info)
    if not missing and (out / INFO_FILE).exists():
        if primary:
            say(f"{out} already holds the codes of {what}")
        return info
    _barrier("looked")  # everybody has seen the folder as it was
    if primary:
        done = len(everything) - len(missing)
        say(
            f"encoding {what} to {out}"
            + (f", continuing: {done} of {len(everything)} shards are there" if done else "")
        )
        for path in stale:
            path.unlink(missing_ok=True)
        if not (out / INFO_FILE).exists():
            write_atomic(out / PLAN_FILE, info.to_json())
    _barrier("plan")  # nobody writes before the folder says for what
    lacking = set(missing)
    mine = everything[jax.process_index() :: jax.process_count()]
    mine = [item for item in mine if item in lacking]
    crops = sum(info.shard_shape(*item)[0] * info.num_views(item[0]) for item in mine)
    encode = _encoder(tokenizer, batch_size, (images.size, images.size, 3))
    try:
        with progress(crops, "encoding", unit=" crops", disable=not primary) as bar:
            for split, shard in mine:
                source = splits[split].hash_of(range(*info.shard_range(split, shard)))
                codes, labels = _encode_shard(splits[split], info, split, shard, encode, bar.update)
                write_shard(out, info, split, shard, codes, labels, source)
    except UserError as error:
        _barrier("shards", error)
    _barrier("shards")
    lost = [item for item in everything if not has_shard(out, info, *item)] if primary else []
    if lost:
        error = UserError(
            f"{shard_files(out, *lost[0])[0]} is not there although every process is done; "
            "give all of them one --out folder on a shared file system"
        )
        _barrier("complete", error)
    _barrier("complete")
    if primary:
        write_atomic(out / INFO_FILE, info.to_json())
        (out / PLAN_FILE).unlink(missing_ok=True)
        say(f"{out} holds the codes of {what}")
    _barrier("done")
    return info


def _check(images: ImageData, tokenizer, views, resizes, batch_size, shard_size) -> None:
    check_config(dataclasses.replace(images, resize=1.0, resize_max=0.0))
    if views not in VIEWS:
        raise UserError(f"views={views!r} is unknown; use one of {', '.join(VIEWS)}")
    if not resizes or min(resizes) < 1 or len(set(resizes)) < len(resizes):
        listed = ", ".join(map(str, resizes)) or "none"
        raise UserError(
            f"resizes={listed}: give one or more different numbers of at least 1, e.g. 1.1"
        )
    if images.size % tokenizer.downsample:
        near = max(1, round(images.size / tokenizer.downsample)) * tokenizer.downsample
        raise UserError(
            f"size={images.size} is not divisible by {tokenizer.downsample}, the pixels per code "
            f"of the tokenizer; set size={near}"
        )
    if batch_size < 1 or shard_size < 1:
        raise UserError(f"batch={batch_size} and shard size {shard_size} must be at least 1")


def _what(info: CodesInfo) -> str:
    counts = " + ".join(f"{count:,} {split}" for split, count in info.splits.items())
    images = describe(sum(info.splits.values()), len(info.class_names))
    return f"{images} ({counts}), {info.num_views('train')} crops of a training image"


def _compare_with(out: Path, info: CodesInfo) -> tuple[CodesInfo, bool]:
    """What the folder asks for: (`info` with its shard size, whether its images have changed).

    Images may have changed in a folder that is not finished: a bad one was replaced or removed.

    Raises:
        UserError: the folder holds something else.
    """
    for name in (INFO_FILE, PLAN_FILE):
        try:
            found = read_info(out / name)
        except FileNotFoundError:
            continue
        if found.tokenizer != info.tokenizer:
            raise UserError(
                _refusal(
                    out,
                    f"another tokenizer (fingerprint {found.tokenizer[:12]}, this one has "
                    f"{info.tokenizer[:12]})",
                )
            )
        info = dataclasses.replace(info, shard_size=found.shard_size)
        old, new = (json.loads(i.to_json()) for i in (found, info))
        different = [key for key in old if old[key] != new[key]]
        for key in different:
            if key == "class_names":
                raise UserError(_refusal(out, "other class names"))
            if key not in ("source", "splits"):
                raise UserError(_refusal(out, f"{key}={old[key]} (here {new[key]})"))
        if different and name == INFO_FILE:
            raise UserError(_refusal(out, "other images"))
        return info, bool(different)
    if out.exists() and not (out.is_dir() and all(p.name.startswith(".") for p in out.iterdir())):
        raise UserError(
            f"{out} exists and is not a folder of codes; give another --out, or empty it"
        )
    return info, False


def _refusal(out: Path, what: str) -> str:
    return f"{out} holds codes made with {what}; give another --out, or delete the folder"


# ---------------------------------------------------------------- encoding


def _encoder(tokenizer: Tokenizer, batch_size: int, shape: tuple[int, int, int]):
    """crops [n <= B, S, S, 3] uint8 -> a call that waits for their codes [n, h, w].

    Every batch has the same B, a multiple of the devices, so that one program is compiled.
    """
    devices = jax.local_devices()
    rows = -(-batch_size // len(devices)) * len(devices)
    sharding = NamedSharding(auto_mesh((len(devices),), ("rows",), devices), PartitionSpec("rows"))

    def start(crops: Sequence[np.ndarray]) -> Callable[[], np.ndarray]:
        batch = np.zeros((rows, *shape), np.float32)
        batch[: len(crops)] = to_unit(np.stack(crops))
        codes = tokenizer.encode(jax.device_put(batch, sharding))
        return lambda: np.asarray(codes)[: len(crops)]

    start.rows = rows
    return start


def _encode_shard(images, info: CodesInfo, split: str, shard: int, encode, advance):
    """(codes [n, V, T], labels [n]) of a shard.

    Threads read images ahead of the device, which works on one batch while the next is put
    together.
    """
    resizes, views = (
        (info.resizes, info.views) if split == "train" else (info.resizes[:1], "center")
    )

    def read(i: int) -> tuple[np.ndarray, int]:
        image, label = images.read(i)
        check_size(image, info.size, lambda: images.name(i))
        common = dict(size=info.size, filter=info.filter, views=views)
        return np.concatenate([views_of(image, resize=r, **common) for r in resizes]), label

    labels, done, running = [], [], None
    start, stop = info.shard_range(split, shard)
    pieces = _ahead(read, range(start, stop))

    def crops() -> Iterator[np.ndarray]:
        for of_image, label in pieces:
            labels.append(label)
            yield from of_image

    stream = crops()
    while batch := list(itertools.islice(stream, encode.rows)):
        following = encode(batch)
        if running is not None:
            done.append(running())
            advance(len(done[-1]))
        running = following
    done.append(running())
    advance(len(done[-1]))
    codes = np.concatenate(done)
    if codes.shape[1:] != info.grid or codes.min() < 0 or codes.max() >= info.codebook_size:
        raise ValueError(
            f"the tokenizer gave codes {codes.min()}..{codes.max()} of shape {codes.shape[1:]}, "
            f"not 0..{info.codebook_size - 1} of {info.grid}"
        )
    return codes.reshape(info.shard_shape(split, shard)), np.array(labels, np.int32)


def _ahead(function: Callable, items: Iterable) -> Iterator:
    """function(item) in order, computed by threads a few items ahead."""
    threads = max(1, min(32, cpu_count()))
    waiting, pool = collections.deque(), decoding_threads(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _barrier(name: str, failure: UserError | None = None) -> None:
    """All processes meet here; a failure of one ends all, each with a reason."""
    failed = agree(failure is not None, any)
    if failure is not None:
        raise failure
    if failed:
        raise UserError(f"another process could not go on (prepare codes, {name}); see its message")


# ---------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `lintime prepare`."""
    defaults = CodeData()
    parser.epilog = EXAMPLES
    parser.add_argument("what", choices=["codes"], help="token codes of images, for training on")
    parser.add_argument(
        "images", metavar="IMAGES",
        help="a folder of class folders, .npz or .npy arrays, ArrayRecord files, builtin:digits",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", metavar="RUN|FILE", required=True,
        help="run directory of a tokenizer, or a file of published weights",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to make or continue")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="default 256")
    parser.add_argument(
        "--views", choices=list(VIEWS), default=defaults.views,
        help="crops kept of a training image at every resize (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--resizes", type=float, nargs="+", default=list(defaults.resizes), metavar="R",
        help="cut crops from squares of R times the size (default "
        f"{' '.join(map(str, defaults.resizes))})",
    )  # fmt: skip
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


def run_command(arguments: argparse.Namespace) -> None:
    """`lintime prepare codes`: encodes the images and says what to do next."""
    from .launch import join

    join(arguments.coordinator, arguments.processes, arguments.process_index, arguments.distributed)
    from .tokenizer import load_tokenizer

    images = ImageData(
        path=arguments.images, size=arguments.size, filter=arguments.filter,
        validation_fraction=arguments.validation_fraction,
    )  # fmt: skip
    prepare_codes(
        images, load_tokenizer(arguments.tokenizer), arguments.out, views=arguments.views,
        resizes=arguments.resizes, batch_size=arguments.batch,
    )  # fmt: skip
    if jax.process_index() == 0:
        print(f"train on them with data.path={arguments.out} data.tokenizer={arguments.tokenizer}")
