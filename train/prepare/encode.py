"""Encoding images ahead of training, with any encoder: in shards that an interrupted command finds
again, shared out over processes and devices.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ...kernels_pallas.compat import auto_mesh
from ..data.batches import cpu_count
from ..data.crops import check_size, to_unit, views_of
from ..data.encoded import EncodedInfo, has_shard, write_shard
from ..data.image_dataset import decoding_threads, describe
from ..data.tokens import progress
from ..errors import UserError
from ..files import write_atomic
from ..launch import agree

# images [B, S, S, 3] float32 in [-1, 1], rows shared out over the local devices -> [B, h, w, ...];
# compiled by the encoder
Encode = Callable[[jax.Array], jax.Array]


def encode_images(
    splits: Mapping, info: EncodedInfo, encode: Encode, out: Path, *, batch_size: int,
    say: Callable[[str], None],
) -> EncodedInfo:  # fmt: skip
    """Encodes images once into a folder (see `data.encoded`).

    Every split is encoded: training images in all views at all resizes, the others in the centre
    crop at the first resize. Shard i of all is made by process i % (number of processes), each of
    its batches by all devices of the process. Shards are written whole, so that an interrupted run
    continues with the missing ones; where images were replaced or removed since then, those shards
    are kept whose images are the same. A finished folder is left as it is.

    Args:
        splits: split -> images (see `find_image_splits`).
        info: what is wanted; its `check` judges what `encode` returns.
        encode: see Encode. out: folder to make or to continue.
        batch_size: crops encoded at a time by this process (rounded up to a multiple of its
            devices).
        say: takes a line for the user (of process 0).

    Returns:
        What the folder holds.

    Raises:
        UserError: a bad image; `out` holds what another encoder made, other images or settings, or
            files of another kind.
    """
    primary = jax.process_index() == 0
    info, changed = _compare_with(out, info)
    everything = [(split, shard) for split in info.splits for shard in info.shards(split)]
    hashes = {
        (split, shard): splits[split].hash_of(range(*info.shard_range(split, shard)))
        for split, shard in (everything if changed else ())
    }
    missing = [i for i in everything if not has_shard(out, info, *i, source=hashes.get(i))]
    stale = [path for i in missing for path in info.shard_files(out, *i) if path.exists()]
    if changed and len(missing) == len(everything) and stale:
        raise UserError(_refusal(out, info, "other images"))
    what = _what(info)
    if not missing and info.info_file(out).exists():
        if primary:
            say(f"{out} already holds the {info.KIND} of {what}")
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
        if not info.info_file(out).exists():
            write_atomic(info.plan_file(out), info.to_json())
    _barrier("plan")  # nobody writes before the folder says for what
    lacking = set(missing)
    mine = everything[jax.process_index() :: jax.process_count()]
    mine = [item for item in mine if item in lacking]
    crops = sum(info.shard_shape(*item)[0] * info.num_views(item[0]) for item in mine)
    start = _starter(encode, batch_size, (info.size, info.size, 3))
    try:
        with progress(crops, "encoding", unit=" crops", disable=not primary) as bar:
            for split, shard in mine:
                source = splits[split].hash_of(range(*info.shard_range(split, shard)))
                arrays, labels = _encode_shard(splits[split], info, split, shard, start, bar.update)
                write_shard(out, info, split, shard, arrays, labels, source)
    except UserError as error:
        _barrier("shards", error)
    _barrier("shards")
    lost = [item for item in everything if not has_shard(out, info, *item)] if primary else []
    if lost:
        error = UserError(
            f"{info.shard_files(out, *lost[0])[0]} is not there although every process is done; "
            "give all of them one --out folder on a shared file system"
        )
        _barrier("complete", error)
    _barrier("complete")
    if primary:
        write_atomic(info.info_file(out), info.to_json())
        info.plan_file(out).unlink(missing_ok=True)
        say(f"{out} holds the {info.KIND} of {what}")
    _barrier("done")
    return info


def _what(info: EncodedInfo) -> str:
    counts = " + ".join(f"{count:,} {split}" for split, count in info.splits.items())
    images = describe(sum(info.splits.values()), len(info.class_names))
    crops = info.num_views("train")
    return f"{images} ({counts}), {crops} crop{'s' * (crops > 1)} of a training image"


def _compare_with(out: Path, info: EncodedInfo) -> tuple[EncodedInfo, bool]:
    """What the folder asks for: (`info` with its shard size, whether its images have changed).

    Images may have changed in a folder that is not finished: a bad one was replaced or removed.

    Raises:
        UserError: the folder holds something else.
    """
    for path in (info.info_file(out), info.plan_file(out)):
        try:
            found = info.read(path)
        except FileNotFoundError:
            continue
        theirs, ours = getattr(found, info.MAKER), getattr(info, info.MAKER)
        if theirs != ours:
            which = f"another {info.MAKER} (fingerprint {theirs[:12]}, this one has {ours[:12]})"
            raise UserError(_refusal(out, info, which))
        info = dataclasses.replace(info, shard_size=found.shard_size)
        old, new = (json.loads(i.to_json()) for i in (found, info))
        different = [key for key in old if old[key] != new[key]]
        for key in different:
            if key == "class_names":
                raise UserError(_refusal(out, info, "other class names"))
            if key not in ("source", "splits"):
                raise UserError(_refusal(out, info, f"{key}={old[key]} (here {new[key]})"))
        if different and path == info.info_file(out):
            raise UserError(_refusal(out, info, "other images"))
        return info, bool(different)
    if out.exists() and not (out.is_dir() and all(p.name.startswith(".") for p in out.iterdir())):
        raise UserError(
            f"{out} exists and is not a folder of {info.KIND}; give another --out, or empty it"
        )
    return info, False


def _refusal(out: Path, info: EncodedInfo, what: str) -> str:
    return f"{out} holds {info.KIND} made with {what}; give another --out, or delete the folder"


# ---------------------------------------------------------------- encoding


def _starter(encode: Encode, batch_size: int, shape: tuple[int, int, int]):
    """crops [n <= B, S, S, 3] uint8 -> a call that waits for what they become, [n, h, w, ...].

    Every batch has the same B, a multiple of the devices, so that one program is compiled.
    """
    devices = jax.local_devices()
    rows = -(-batch_size // len(devices)) * len(devices)
    sharding = NamedSharding(auto_mesh((len(devices),), ("rows",), devices), PartitionSpec("rows"))

    def start(crops: Sequence[np.ndarray]) -> Callable[[], np.ndarray]:
        batch = np.zeros((rows, *shape), np.float32)
        batch[: len(crops)] = to_unit(np.stack(crops))
        encoded = encode(jax.device_put(batch, sharding))
        return lambda: np.asarray(encoded)[: len(crops)]

    start.rows = rows
    return start


def _encode_shard(images, info: EncodedInfo, split: str, shard: int, start, advance):
    """(arrays [n, V, ...], labels [n]) of a shard.

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
    pieces = _ahead(read, range(*info.shard_range(split, shard)))

    def crops() -> Iterator[np.ndarray]:
        for of_image, label in pieces:
            labels.append(label)
            yield from of_image

    stream = crops()
    while batch := list(itertools.islice(stream, start.rows)):
        following = start(batch)
        if running is not None:
            done.append(running())
            advance(len(done[-1]))
        running = following
    done.append(running())
    advance(len(done[-1]))
    encoded = np.concatenate(done)
    info.check(encoded)
    return encoded.reshape(info.shard_shape(split, shard)), np.array(labels, np.int32)


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
        raise UserError(f"another process could not go on (prepare, {name}); see its message")
