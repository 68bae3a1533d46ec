"""Features of captions, made once by `lintime prepare text`: what a folder holds, and reading it.

The folder holds captions in the order of the images of a source (that of `lintime prepare
latents`), those of an image one after the other:

    text.json                        what is in it (`TextInfo`); written last
    SPLIT-00000.text.npy             [n, T, D] float16 features
    SPLIT-00000.captions.npz         lengths [n] int32: tokens that belong to each caption;
                                     pooled [n, P] float32; images [n] int32: the number of each
                                     one's image; texts: the captions as bytes of JSON; source, a
                                     hash of both
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
from .batches import StepDataset, pick, row_uniforms
from .documents import write_atomically

FORMAT_VERSION = 1
AGAIN = "run `lintime prepare text IMAGES --encoder DIR --out DIR` again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextInfo:
    """What is in a folder of features.

    Attributes:
        encoder: fingerprint of the text encoder.
        place: where that was.
        length, width, pooled_width: T, D and P.
        source: split -> fingerprint of its images; captions: split -> hash of its captions.
        splits: split -> number of captions; images: split -> number of images.
        shard_size: captions of a shard, the last one has the rest.
    """

    encoder: str
    place: str
    length: int
    width: int
    pooled_width: int
    source: dict
    captions: dict
    splits: dict
    images: dict
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
    """features [R, T, D] float16, mask [R, T] bool, pooled [R, P] float32."""

    features: np.ndarray
    mask: np.ndarray
    pooled: np.ndarray


class Shard(NamedTuple):
    """n captions: features [n, T, D], lengths [n], pooled [n, P], images [n], texts n; see the
    head of this file."""

    features: np.ndarray
    lengths: np.ndarray
    pooled: np.ndarray
    images: np.ndarray
    texts: list[str]


class TextFeatures:
    """The features of one split, by the number of the image.

    Attributes:
        info: TextInfo of the folder.

    Raises:
        UserError: no such folder, an unfinished or damaged one, or one without the split.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder).expanduser(), split
        self.info = read_info(folder)
        if not self.info.splits.get(split):
            raise UserError(f"{folder} holds no {split} captions (it has {[*self.info.splits]})")
        open_shard.cache_clear()  # files may have changed since they were last opened
        for shard in self.info.shards(split):
            if not has_shard(self.folder, self.info, split, shard):
                raise UserError(f"shard {shard} of {split} in {folder} is damaged; {AGAIN}")
        of = [self._shard(shard).images for shard in self.info.shards(split)]
        self.starts = np.searchsorted(np.concatenate(of), np.arange(len(self) + 1))

    def _shard(self, number: int) -> Shard:
        return open_shard(self.folder, self.split, number)

    def __len__(self) -> int:
        """Number of images."""
        return self.info.images[self.split]

    def _numbers(self, images, uniforms) -> list[tuple[int, int]]:
        """(shard, place in it) of a caption of each image: the first, or one by numbers [R]."""
        images = np.asarray(images, np.int64)
        first, end = self.starts[images], self.starts[images + 1]
        if uniforms is not None:
            first = first + [pick(u, count) for u, count in zip(uniforms, end - first)]
        return [divmod(int(i), self.info.shard_size) for i in first]

    def rows(self, images, uniforms=None) -> TextRows:
        """What captions of images number `images` [R] became: the first one of each image, or, of
        several, that which a number in [0, 1) of `uniforms` [R] chooses."""
        found = []
        for shard, at in self._numbers(images, uniforms):
            held = self._shard(shard)
            found.append((held.features[at], held.lengths[at], held.pooled[at]))
        features, lengths, pooled = (np.stack(part) for part in zip(*found, strict=True))
        return TextRows(features, np.arange(self.info.length) < lengths[:, None], pooled)

    def captions(self, images) -> list[str]:
        """The first caption of each image."""
        return [self._shard(shard).texts[at] for shard, at in self._numbers(images, None)]


class TextBatches:
    """A reader of images or latents (see `batches`) whose batches hold context: [R, T, D] float16
    features of a caption, and context_mask: [R, T] bool, too. In training one of an image's
    captions is drawn for each row, else it is the first. Rows without an image have context 0.
    """

    def __init__(self, reader, features: TextFeatures):
        self.reader, self.features = reader, features
        self.batch_size, self.num_batches = reader.batch_size, reader.num_batches

    def read(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows `rows` of batch `step`."""
        batch, reader = self.reader.read(step, rows), self.reader
        valid = batch["valid"]
        images = np.where(valid, reader.order.indices(step, rows), 0)
        uniforms = None
        if self.num_batches is None:  # numbers of another key than those of the images' views
            uniforms = row_uniforms(reader.seed + 2**40, step, rows, 1)[:, 0]
        features, mask, _ = self.features.rows(images, uniforms)
        context = np.where(valid[:, None, None], features, np.float16(0))
        return {**batch, "context": context, "context_mask": mask}


def add_text(dataset: StepDataset, folder: str | Path, split: str, source: dict) -> StepDataset:
    """Gives the batches of a data set of images or latents the features of their captions.

    Args:
        dataset: of `open_image_data` or `open_latent_data`.
        folder: of the features. split: that was opened.
        source: {split: fingerprint} of the images of the data set.

    Returns:
        The data set, with `text`: TextInfo, and the features in its fingerprint.

    Raises:
        UserError: no such folder, or one of other images.
    """
    info = read_info(folder)
    held = split if split in info.splits or split != "test" else "validation"
    ours, theirs = (json.loads(json.dumps(s.get(held))) for s in (source, info.source))
    if ours != theirs:
        count = f"{dataset.num_images:,} {held} images"
        raise UserError(
            f"data.text={folder} has captions of {info.images.get(held, 0):,} other {held} images "
            f"than the {count} of this run; run `lintime prepare text` on these images, with the "
            "same validation fraction"
        )
    dataset.batches = TextBatches(dataset.batches, TextFeatures(folder, held))
    dataset.text = info
    dataset.fingerprint |= {
        "text_encoder": info.encoder, "text_length": info.length, "captions": info.captions[held],
    }  # fmt: skip
    dataset.read_ahead = 2  # features are large
    dataset.description += f" with {info.splits[held]:,} captions"
    return dataset


def read_info(folder: str | Path) -> TextInfo:
    """What a complete folder holds.

    Raises:
        UserError: it is not one, or damaged.
    """
    try:
        return TextInfo.read(Path(folder).expanduser() / "text.json")
    except FileNotFoundError:
        raise UserError(f"{folder} is not a complete folder of features; {AGAIN}") from None


def shard_files(folder: Path, split: str, shard: int) -> tuple[Path, Path]:
    """(features, the rest) of a shard."""
    stem = f"{split}-{shard:05d}"
    return folder / f"{stem}.text.npy", folder / f"{stem}.captions.npz"


def write_shard(folder: Path, split: str, shard: int, held: Shard, source: str) -> None:
    """Writes a shard; each file whole, the features first.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    first, second = shard_files(folder, split, shard)
    rest = {
        "lengths": np.asarray(held.lengths, "<i4"), "pooled": np.asarray(held.pooled, "<f4"),
        "images": np.asarray(held.images, "<i4"),
        "texts": np.frombuffer(json.dumps(list(held.texts)).encode(), np.uint8),
    }  # fmt: skip
    write_atomically(first, lambda file: np.save(file, np.asarray(held.features, "<f2")))
    write_atomically(second, lambda file: np.savez(file, source=source, **rest))


def has_shard(folder: Path, info: TextInfo, split: str, shard: int, source: str = "") -> bool:
    """Whether both files of a shard are there and whole, and of captions of the hash `source`."""
    count = len(info.shard_range(split, shard))
    first, second = shard_files(folder, split, shard)
    try:
        features = np.load(first, mmap_mode="r")
        with np.load(second) as archive:
            lengths, pooled = archive["lengths"], archive["pooled"]
            made_of, images = str(archive["source"]), archive["images"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return False
    shapes = (features.shape, lengths.shape, pooled.shape, images.shape)
    wanted = ((count, info.length, info.width), (count,), (count, info.pooled_width), (count,))
    return shapes == wanted and features.dtype == np.dtype("<f2") and source in ("", made_of)


@functools.lru_cache(maxsize=2048)
def open_shard(folder: Path, split: str, shard: int) -> Shard:
    """A shard of a whole folder, its features memory-mapped."""
    first, second = shard_files(folder, split, shard)
    with np.load(second) as archive:
        texts = json.loads(archive["texts"].tobytes())
        rest = (archive[name] for name in ("lengths", "pooled", "images"))
        return Shard(np.load(first, mmap_mode="r"), *rest, texts)
