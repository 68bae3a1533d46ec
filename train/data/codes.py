"""Token codes of images, made once by `lintime prepare codes`: the folder, and batches of it.

A codes folder holds

    codes.json                       what the codes are (`CodesInfo`); written last
    SPLIT-00000.codes.npy            [n, V, T] uint16 (int32 where the codebook is larger)
    SPLIT-00000.labels.npz           labels [n] int32; source, a hash of the images encoded
    SPLIT-00001. ...                 every shard has `shard_size` images, the last one the rest

V views of an image, T = h * w codes each in raster order. Training images have V = (views) *
(resizes), resize by resize; those of the other splits one, the centre crop at the first resize.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..schema import CodeData
from .batches import RowOrder, StepDataset, pick, row_uniforms
from .crops import VIEWS
from .documents import content_hash, write_atomically
from .image_dataset import describe

FORMAT_VERSION = 1
INFO_FILE, PLAN_FILE = "codes.json", "codes.unfinished.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodesInfo:
    """What is in a codes folder.

    Attributes:
        tokenizer: fingerprint of the tokenizer that made the codes.
        codebook_size: codes are 0..codebook_size-1.
        grid: (h, w) codes of an image.
        size, filter: of the images that were encoded.
        views, resizes: what was kept of a training image; see CodeData.
        class_names: K names; labels are positions in them.
        source: split -> fingerprint of its images.
        splits: split -> number of images.
        shard_size: images of a shard.
    """

    tokenizer: str
    codebook_size: int
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

    def num_views(self, split: str) -> int:
        """V of a split."""
        return VIEWS[self.views] * len(self.resizes) if split == "train" else 1

    @property
    def dtype(self) -> np.dtype:
        """Of the stored codes."""
        return np.dtype("<u2" if self.codebook_size <= 2**16 else "<i4")

    def shards(self, split: str) -> range:
        """Numbers of the split's shards."""
        return range(-(-self.splits[split] // self.shard_size))

    def shard_range(self, split: str, shard: int) -> tuple[int, int]:
        """[start, stop) of the images in a shard."""
        start = shard * self.shard_size
        return start, min(start + self.shard_size, self.splits[split])

    def shard_shape(self, split: str, shard: int) -> tuple[int, int, int]:
        """[n, V, T] of a shard."""
        start, stop = self.shard_range(split, shard)
        return stop - start, self.num_views(split), math.prod(self.grid)

    def to_json(self) -> str:
        """The text of codes.json."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def read_info(path: Path) -> CodesInfo:
    """Reads codes.json or its unfinished form.

    Raises:
        UserError: it is damaged, or of a newer version.
        FileNotFoundError: there is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format {version}, this version reads {FORMAT_VERSION}; encode the "
                "images again"
            )
        for name in ("grid", "resizes", "class_names"):
            values[name] = tuple(values[name])
        return CodesInfo(**values)
    except FileNotFoundError:
        raise
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); encode the images again") from error


def shard_files(folder: Path, split: str, shard: int) -> tuple[Path, Path]:
    """(codes, labels) of a shard."""
    stem = f"{split}-{shard:05d}"
    return folder / f"{stem}.codes.npy", folder / f"{stem}.labels.npz"


def write_shard(
    folder: Path, info: CodesInfo, split: str, shard: int, codes, labels, source: str = ""
) -> None:
    """Writes codes [n, V, T], labels [n] and the hash `source`; each file whole, the labels last.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    codes_file, labels_file = shard_files(folder, split, shard)
    codes, labels = np.asarray(codes).astype(info.dtype), np.asarray(labels).astype("<i4")
    write_atomically(codes_file, lambda file: np.save(file, codes))
    write_atomically(labels_file, lambda file: np.savez(file, labels=labels, source=source))


def has_shard(
    folder: Path, info: CodesInfo, split: str, shard: int, source: str | None = None
) -> bool:
    """Whether both files of a shard are there and whole, and made of `source` if that is given."""
    shape = info.shard_shape(split, shard)
    codes_file, labels_file = shard_files(folder, split, shard)
    try:
        codes = np.load(codes_file, mmap_mode="r")
        with np.load(labels_file) as archive:
            labels, made_of = archive["labels"], str(archive["source"])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return False
    whole = (codes.shape, codes.dtype) == (shape, info.dtype)
    whole &= (labels.shape, labels.dtype) == (shape[:1], np.dtype("<i4"))
    return whole and source in (None, made_of)


@functools.lru_cache(maxsize=2048)
def _open_shard(folder: str, split: str, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """(memory-mapped codes, labels)."""
    codes, labels = shard_files(Path(folder), split, shard)
    with np.load(labels) as archive:
        return np.load(codes, mmap_mode="r"), archive["labels"]


class CodeReader:
    """What the reader threads and processes hold: the folder, the order, how views are chosen."""

    def __init__(
        self, folder: Path, info: CodesInfo, split: str, config: CodeData, seed, batch_size
    ):
        training = split == "train"
        self.folder, self.info, self.split, self.seed = str(folder), info, split, seed
        self.count, self.batch_size = info.splits[split], batch_size
        self.order = RowOrder(
            self.count, batch_size, endless=training,
            seed=seed if training and config.shuffle else None,
        )  # fmt: skip
        self.num_batches = self.order.num_batches
        self.views = info.num_views(split)

    def read(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows `rows` of batch `step`; see CodeDataset."""
        indices = self.order.indices(step, rows)
        batch = {
            "codes": np.zeros((len(indices), math.prod(self.info.grid)), np.int32),
            "labels": np.zeros(len(indices), np.int32),
            "valid": indices < self.count,
        }
        views = np.zeros(len(indices), np.int64)
        if self.views > 1:
            views = [pick(u, self.views) for u in row_uniforms(self.seed, step, rows, 1)[:, 0]]
        for k in np.flatnonzero(batch["valid"]):
            shard, position = divmod(int(indices[k]), self.info.shard_size)
            codes, labels = _open_shard(self.folder, self.split, shard)
            batch["codes"][k] = codes[position, views[k]]
            batch["labels"][k] = labels[position]
        return batch


class CodeDataset(StepDataset):
    """Batches of the codes of one split. Made by `open_code_data`.

    A batch holds codes: [R, T] int32 in raster order; labels: [R] int32; valid: [R] bool, False in
    the rows past the end of an evaluation split, whose codes and labels are zero. A training row is
    one of its image's views, each with the same chance.

    Attributes:
        fingerprint, num_batches: see StepDataset.
        info: CodesInfo of the folder.
        tokenizer, codebook_size, grid, num_tokens: who made the codes, V, (h, w) and T = h * w: a
            net and a decoder must agree with them.
        num_images, num_classes, class_names, description: as for ImageDataset.
    """

    def __init__(self, reader: CodeReader, *, fingerprint: dict, workers: int):
        super().__init__(reader, fingerprint=fingerprint, workers=workers)
        self.info = info = reader.info
        self.tokenizer, self.codebook_size, self.grid = (
            info.tokenizer,
            info.codebook_size,
            info.grid,
        )
        self.num_tokens, self.num_images = math.prod(info.grid), reader.count
        self.class_names, self.num_classes = info.class_names, len(info.class_names)
        views = f"{reader.views} views" if reader.views > 1 else "one view"
        self.description = (
            f"{describe(self.num_images, self.num_classes)}, {views} of "
            f"{info.grid[0]}x{info.grid[1]} codes"
        )


def open_code_data(
    config: CodeData, folder: str | Path, *, split: str, seed: int, batch_size: int
) -> CodeDataset:
    """Opens one split of a codes folder.

    Args:
        config: the data section of a Run; its `path` is not read.
        folder: written by `prepare_codes`.
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
    info = finished_codes(folder)
    held = split if split in info.splits or split != "test" else "validation"
    if not info.splits.get(held):
        raise UserError(
            f"{folder} holds no {held} codes (it has {', '.join(info.splits)}); encode images with "
            "such a split, or set a validation fraction"
        )
    _open_shard.cache_clear()  # files may have changed since they were last opened
    for shard in info.shards(held):
        if not has_shard(folder, info, held, shard):
            raise UserError(
                f"{shard_files(folder, held, shard)[0]} or its labels are missing or damaged; run "
                "the `lintime prepare codes` command that made the folder again"
            )
    reader = CodeReader(folder, info, held, config, seed, batch_size)
    fingerprint = {
        "format": FORMAT_VERSION,
        "split": held,
        "tokenizer": info.tokenizer,
        "codebook_size": info.codebook_size,
        "grid": list(info.grid),
        "views": reader.views,
        "images": reader.count,
        "content": content_hash(_Shards(folder, info, held)),
        "batch_size": batch_size,
        "shuffle": held == "train" and config.shuffle,
        "seed": seed,
    }
    return CodeDataset(reader, fingerprint=fingerprint, workers=config.workers)


def finished_codes(folder: Path) -> CodesInfo:
    """What a complete folder of codes holds.

    Raises:
        UserError: it is not one.
    """
    try:
        return read_info(folder / INFO_FILE)
    except FileNotFoundError:
        pass
    if (folder / PLAN_FILE).exists():
        raise UserError(
            f"the codes in {folder} are not complete; run the same `lintime prepare codes` command "
            "again, it continues where it stopped"
        )
    raise UserError(
        f"{folder} is not a folder of codes (it has no {INFO_FILE}); make one with "
        "`lintime prepare codes IMAGES --tokenizer RUN --out DIR`"
    )


class _Shards:
    """The files of a split as documents of bytes, for `content_hash`: codes, then labels."""

    def __init__(self, folder: Path, info: CodesInfo, split: str):
        pairs = [_open_shard(str(folder), split, shard) for shard in info.shards(split)]
        self.arrays = [array.reshape(-1).view(np.uint8) for pair in pairs for array in pair]
        self.lengths = np.array([len(array) for array in self.arrays], np.int64)

    def read(self, i: int, start: int, stop: int) -> np.ndarray:
        return self.arrays[i][start:stop]
