"""Features of captions, made once by `lintime prepare text`: what a folder holds, and reading it.

The folder holds, in the order of the images of a source (that of `lintime prepare latents`),

    text.json                        what is in it (`TextInfo`); written last
    SPLIT-00000.text.npy             [n, T, D] float16 features
    SPLIT-00000.captions.npz         lengths [n] int32: tokens that belong to each caption;
                                     pooled [n, P] float32; source, a hash of the captions
"""

from __future__ import annotations

import dataclasses
import functools
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .documents import write_atomically

FORMAT_VERSION = 1
AGAIN = "run `lintime prepare text IMAGES --encoder DIR --out DIR` again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextInfo:
    """What is in a folder of features.

    Attributes:
        encoder: fingerprint of the text encoder.
        length, width, pooled_width: T, D and P.
        source: split -> fingerprint of its images; captions: split -> hash of its captions.
        splits: split -> number of captions.
        shard_size: captions of a shard, the last one has the rest.
    """

    encoder: str
    length: int
    width: int
    pooled_width: int
    source: dict
    captions: dict
    splits: dict
    shard_size: int
    format: int = FORMAT_VERSION

    def shards(self, split: str) -> range:
        """Numbers of the split's shards."""
        return range(-(-self.splits[split] // self.shard_size))

    def shard_range(self, split: str, shard: int) -> range:
        """The captions of a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.splits[split]))

    def to_json(self) -> str:
        """The text of text.json."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> TextInfo:
        """Reads text.json or its unfinished form.

        Raises:
            UserError: it is damaged, or of a newer version.
            FileNotFoundError: there is none.
        """
        try:
            info = cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); {AGAIN}") from error
        if info.format != FORMAT_VERSION:
            raise UserError(
                f"{path} has format {info.format}, this version reads {FORMAT_VERSION}; {AGAIN}"
            )
        return info


class TextRows(NamedTuple):
    """features [R, T, D] float32, mask [R, T] bool, pooled [R, P] float32."""

    features: np.ndarray
    mask: np.ndarray
    pooled: np.ndarray


class TextFeatures:
    """The features of one split, by the number of the image.

    Attributes:
        info: TextInfo of the folder.

    Raises:
        UserError: no such folder, an unfinished or damaged one, or one without the split.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder).expanduser(), split
        try:
            self.info = TextInfo.read(self.folder / "text.json")
        except FileNotFoundError:
            raise UserError(f"{folder} is not a complete folder of features; {AGAIN}") from None
        if not self.info.splits.get(split):
            raise UserError(f"{folder} holds no {split} captions (it has {[*self.info.splits]})")
        open_shard.cache_clear()  # files may have changed since they were last opened
        for shard in self.info.shards(split):
            if not has_shard(self.folder, self.info, split, shard):
                raise UserError(f"shard {shard} of {split} in {folder} is damaged; {AGAIN}")

    def __len__(self) -> int:
        return self.info.splits[self.split]

    def rows(self, indices) -> TextRows:
        """What the captions of images `indices` [R] became."""
        found = []
        for i in np.asarray(indices, np.int64):
            shard, at = divmod(int(i), self.info.shard_size)
            features, lengths, pooled = open_shard(self.folder, self.split, shard)
            found.append((features[at].astype(np.float32), lengths[at], pooled[at]))
        features, lengths, pooled = (np.stack(part) for part in zip(*found, strict=True))
        return TextRows(features, np.arange(self.info.length) < lengths[:, None], pooled)


def shard_files(folder: Path, split: str, shard: int) -> tuple[Path, Path]:
    """(features, the rest) of a shard."""
    stem = f"{split}-{shard:05d}"
    return folder / f"{stem}.text.npy", folder / f"{stem}.captions.npz"


def write_shard(folder: Path, split: str, shard: int, features, lengths, pooled, source) -> None:
    """Writes a shard; each file whole, the features first.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    first, second = shard_files(folder, split, shard)
    held = {"lengths": np.asarray(lengths, "<i4"), "pooled": np.asarray(pooled, "<f4")}
    write_atomically(first, lambda file: np.save(file, np.asarray(features, "<f2")))
    write_atomically(second, lambda file: np.savez(file, source=source, **held))


def has_shard(folder: Path, info: TextInfo, split: str, shard: int, source: str = "") -> bool:
    """Whether both files of a shard are there and whole, and of captions of the hash `source`."""
    count = len(info.shard_range(split, shard))
    first, second = shard_files(folder, split, shard)
    try:
        features = np.load(first, mmap_mode="r")
        with np.load(second) as archive:
            lengths, pooled = archive["lengths"], archive["pooled"]
            made_of = str(archive["source"])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return False
    shapes = (features.shape, lengths.shape, pooled.shape)
    wanted = ((count, info.length, info.width), (count,), (count, info.pooled_width))
    return shapes == wanted and features.dtype == np.dtype("<f2") and source in ("", made_of)


@functools.lru_cache(maxsize=2048)
def open_shard(folder: Path, split: str, shard: int) -> tuple[np.ndarray, ...]:
    """(memory-mapped features, lengths, pooled)."""
    first, second = shard_files(folder, split, shard)
    with np.load(second) as archive:
        return np.load(first, mmap_mode="r"), archive["lengths"], archive["pooled"]
