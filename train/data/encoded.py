"""What images were turned into ahead of training (codes, latents): the folder, and batches of it.

A folder of KIND ("codes", "latents") holds

    KIND.json                        what is in it (`EncodedInfo`); written last
    SPLIT-00000.KIND.npy             [n, V, ...] what the images became
    SPLIT-00000.labels.npz           labels [n] int32; source, a hash of the images encoded
    SPLIT-00001. ...                 every shard has `shard_size` images, the last one the rest

V views of an image. Training images have V = (views) * (resizes), resize by resize; those of the
other splits one, the centre crop at the first resize.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from ..errors import UserError
from .batches import RowOrder, StepDataset, pick, row_uniforms
from .crops import VIEWS
from .documents import content_hash, write_atomically
from .image_dataset import describe

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedInfo(abc.ABC):
    """What is in a folder; `CodesInfo` and `LatentsInfo` say of which kind.

    Attributes:
        grid: (h, w) positions of an image.
        size, filter: of the images that were encoded.
        views, resizes: what was kept of a training image; see CodeData.
        class_names: K names; labels are positions in them.
        source: split -> fingerprint of its images.
        splits: split -> number of images.
        shard_size: images of a shard.
        KIND: what the images became. MAKER: the field that has the fingerprint of what made it,
            and what that is. ARGUMENTS: of `lintime prepare KIND`, for messages.
    """

    grid: tuple[int, int]
    size: int
    filter: str
    views: str
    resizes: tuple[float, ...]
    class_names: tuple[str, ...]
    source: dict
    splits: dict
    shard_size: int
    format: int = FORMAT_VERSION

    KIND: ClassVar[str]
    MAKER: ClassVar[str]
    ARGUMENTS: ClassVar[str]

    @property
    @abc.abstractmethod
    def row_shape(self) -> tuple[int, ...]:
        """Shape of what a view became, as it is stored."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """Of what is stored."""

    @abc.abstractmethod
    def check(self, encoded: np.ndarray) -> None:
        """Whether [N, h, w, ...] is what the maker of this folder makes.

        Raises:
            ValueError: the maker is broken. UserError: its weights are.
        """

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """What of the maker a checkpoint remembers."""

    def num_views(self, split: str) -> int:
        """V of a split."""
        return VIEWS[self.views] * len(self.resizes) if split == "train" else 1

    def shards(self, split: str) -> range:
        """Numbers of the split's shards."""
        return range(-(-self.splits[split] // self.shard_size))

    def shard_range(self, split: str, shard: int) -> tuple[int, int]:
        """[start, stop) of the images in a shard."""
        start = shard * self.shard_size
        return start, min(start + self.shard_size, self.splits[split])

    def shard_shape(self, split: str, shard: int) -> tuple[int, ...]:
        """[n, V, ...] of a shard."""
        start, stop = self.shard_range(split, shard)
        return stop - start, self.num_views(split), *self.row_shape

    def to_json(self) -> str:
        """The text of KIND.json."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def info_file(cls, folder: Path) -> Path:
        """What a finished folder says it holds."""
        return folder / f"{cls.KIND}.json"

    @classmethod
    def plan_file(cls, folder: Path) -> Path:
        """The same while the folder is being made."""
        return folder / f"{cls.KIND}.unfinished.json"

    @classmethod
    def shard_files(cls, folder: Path, split: str, shard: int) -> tuple[Path, Path]:
        """(arrays, labels) of a shard."""
        stem = f"{split}-{shard:05d}"
        return folder / f"{stem}.{cls.KIND}.npy", folder / f"{stem}.labels.npz"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads KIND.json or its unfinished form.

        Raises:
            UserError: it is damaged, or of a newer version.
            FileNotFoundError: there is none.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values["format"]
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{path} has format {version}, this version reads {FORMAT_VERSION}; encode "
                    "the images again"
                )
            for name in ("grid", "resizes", "class_names"):
                values[name] = tuple(values[name])
            return cls(**values)
        except FileNotFoundError:
            raise
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); encode the images again") from error

    @classmethod
    def finished(cls, folder: Path) -> Self:
        """What a complete folder holds.

        Raises:
            UserError: it is not one.
        """
        try:
            return cls.read(cls.info_file(folder))
        except FileNotFoundError:
            pass
        if cls.plan_file(folder).exists():
            raise UserError(
                f"the {cls.KIND} in {folder} are not complete; run the same `lintime prepare "
                f"{cls.KIND}` command again, it continues where it stopped"
            )
        raise UserError(
            f"{folder} is not a folder of {cls.KIND} (it has no {cls.info_file(folder).name}); "
            f"make one with `lintime prepare {cls.KIND} {cls.ARGUMENTS}`"
        )


# ---------------------------------------------------------------- shards


def write_shard(
    folder: Path, info: EncodedInfo, split: str, shard: int, arrays, labels, source: str = ""
) -> None:
    """Writes arrays [n, V, ...], labels [n] and the hash `source`; each file whole, the labels
    last.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    arrays_file, labels_file = info.shard_files(folder, split, shard)
    arrays, labels = np.asarray(arrays).astype(info.dtype), np.asarray(labels).astype("<i4")
    write_atomically(arrays_file, lambda file: np.save(file, arrays))
    write_atomically(labels_file, lambda file: np.savez(file, labels=labels, source=source))


def has_shard(
    folder: Path, info: EncodedInfo, split: str, shard: int, source: str | None = None
) -> bool:
    """Whether both files of a shard are there and whole, and made of `source` if that is given."""
    shape = info.shard_shape(split, shard)
    arrays_file, labels_file = info.shard_files(folder, split, shard)
    try:
        arrays = np.load(arrays_file, mmap_mode="r")
        with np.load(labels_file) as archive:
            labels, made_of = archive["labels"], str(archive["source"])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return False
    whole = (arrays.shape, arrays.dtype) == (shape, info.dtype)
    whole &= (labels.shape, labels.dtype) == (shape[:1], np.dtype("<i4"))
    return whole and source in (None, made_of)


@functools.lru_cache(maxsize=2048)
def _open_shard(arrays: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """(memory-mapped arrays, labels)."""
    with np.load(labels) as archive:
        return np.load(arrays, mmap_mode="r"), archive["labels"]


class _Shards:
    """The files of a split as documents of bytes, for `content_hash`: arrays, then labels."""

    def __init__(self, folder: Path, info: EncodedInfo, split: str):
        files = (info.shard_files(folder, split, shard) for shard in info.shards(split))
        pairs = [_open_shard(*pair) for pair in files]
        self.arrays = [array.reshape(-1).view(np.uint8) for pair in pairs for array in pair]
        self.lengths = np.array([len(array) for array in self.arrays], np.int64)

    def read(self, i: int, start: int, stop: int) -> np.ndarray:
        return self.arrays[i][start:stop]


# ---------------------------------------------------------------- batches


class EncodedReader(abc.ABC):
    """What the reader threads and processes hold: the folder, the order, how views are chosen."""

    def __init__(
        self, folder: Path, info: EncodedInfo, split: str, *, shuffle: bool, seed, batch_size
    ):
        training = split == "train"
        self.folder, self.info, self.split, self.seed = folder, info, split, seed
        self.count, self.batch_size = info.splits[split], batch_size
        self.order = RowOrder(
            self.count, batch_size, endless=training, seed=seed if training and shuffle else None
        )
        self.num_batches = self.order.num_batches
        self.views = info.num_views(split)

    def read(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows `rows` of batch `step`."""
        indices = self.order.indices(step, rows)
        arrays = np.zeros((len(indices), *self.info.row_shape), self.info.dtype)
        labels, valid = np.zeros(len(indices), np.int32), indices < self.count
        views = np.zeros(len(indices), np.int64)
        if self.views > 1:
            views = [pick(u, self.views) for u in row_uniforms(self.seed, step, rows, 1)[:, 0]]
        for k in np.flatnonzero(valid):
            shard, position = divmod(int(indices[k]), self.info.shard_size)
            files = self.info.shard_files(self.folder, self.split, shard)
            stored, of_shard = _open_shard(*files)
            arrays[k], labels[k] = stored[position, views[k]], of_shard[position]
        return {**self.fields(arrays), "labels": labels, "valid": valid}

    @abc.abstractmethod
    def fields(self, arrays: np.ndarray) -> dict[str, np.ndarray]:
        """What a batch says of stored rows [R, ...]."""


class EncodedDataset(StepDataset):
    """Batches of one split. A batch holds what the kind says (see its class) and labels: [R] int32;
    valid: [R] bool, False in the rows past the end of an evaluation split, where all else is zero.
    A training row is one of its image's views, each with the same chance.

    Attributes:
        fingerprint, num_batches: see StepDataset.
        info: EncodedInfo of the folder. grid: (h, w).
        num_images, num_classes, class_names, description: as for ImageDataset.
    """

    def __init__(self, reader: EncodedReader, *, fingerprint: dict, workers: int):
        super().__init__(reader, fingerprint=fingerprint, workers=workers)
        self.info = info = reader.info
        self.grid, self.num_images = info.grid, reader.count
        self.class_names, self.num_classes = info.class_names, len(info.class_names)
        views = f"{reader.views} views" if reader.views > 1 else "one view"
        self.description = (
            f"{describe(self.num_images, self.num_classes)}, {views} of "
            f"{info.grid[0]}x{info.grid[1]} {info.KIND}"
        )


def open_encoded(
    config, folder: str | Path, *, kind: type[EncodedInfo], reader: type[EncodedReader],
    dataset: type[EncodedDataset], split: str, seed: int, batch_size: int,
) -> EncodedDataset:  # fmt: skip
    """Opens one split of a folder.

    Args:
        config: the data section of a Run; its `path` is not read.
        folder: written by `lintime prepare`.
        kind, reader, dataset: of what the folder holds.
        split: "train" (endless, shuffled, a random view), "validation" or "test" (in order, each
            image once; test is validation where there is none of its own).
        seed: of the training order and views.
        batch_size: global rows.

    Raises:
        UserError: no such folder, an unfinished or damaged one, or one without the split.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if config.workers < 0:
        raise UserError(f"data.workers={config.workers} must be 0 (threads) or more")
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split={split!r} is not train, validation or test")
    folder = Path(os.path.expanduser(folder))
    info = kind.finished(folder)
    held = split if split in info.splits or split != "test" else "validation"
    if not info.splits.get(held):
        raise UserError(
            f"{folder} holds no {held} {kind.KIND} (it has {', '.join(info.splits)}); encode "
            "images with such a split, or set a validation fraction"
        )
    _open_shard.cache_clear()  # files may have changed since they were last opened
    for path in _lost(folder, info, held):
        raise UserError(
            f"{path} or its labels are missing or damaged; run the `lintime prepare {kind.KIND}` "
            "command that made the folder again"
        )
    batches = reader(folder, info, held, shuffle=config.shuffle, seed=seed, batch_size=batch_size)
    fingerprint = {
        "format": FORMAT_VERSION,
        "split": held,
        **info.identity(),
        "grid": list(info.grid),
        "views": batches.views,
        "images": batches.count,
        "content": content_hash(_Shards(folder, info, held)),
        "batch_size": batch_size,
        "shuffle": held == "train" and config.shuffle,
        "seed": seed,
    }
    return dataset(batches, fingerprint=fingerprint, workers=config.workers)


def _lost(folder: Path, info: EncodedInfo, split: str) -> Iterator[Path]:
    """Array files of the shards that are not whole."""
    for shard in info.shards(split):
        if not has_shard(folder, info, split, shard):
            yield info.shard_files(folder, split, shard)[0]
