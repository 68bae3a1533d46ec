"""Batches of labelled images as pure functions of (seed, step, row)."""

from __future__ import annotations

import functools
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..errors import UserError
from ..schema import ImageData
from .batches import RowOrder, StepDataset, cpu_count, pick, row_uniforms
from .crops import FILTERS, center_crop, check_size, crop, resize_shorter, to_unit
from .image_sources import find_images

FORMAT_VERSION = 1  # of the batches: raise it when the same config would give other ones
_CROPS = ("random", "center")
_MOST_THREADS = 32


@functools.lru_cache(maxsize=2)
def decoding_threads(count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads, kept: Pillow decodes and resizes without holding Python's lock."""
    return ThreadPoolExecutor(count, "decode")


class ImageReader:
    """What the reader threads and processes hold: the images, their order, and how they are cut."""

    def __init__(self, images, config: ImageData, *, split: str, seed: int, batch_size: int):
        training = split == "train"
        self.images, self.seed, self.batch_size = images, seed, batch_size
        self.order = RowOrder(
            len(images), batch_size, endless=training,
            seed=seed if training and config.shuffle else None,
        )  # fmt: skip
        self.num_batches = self.order.num_batches
        self.size, self.filter = config.size, config.filter
        self.flip = training and config.flip
        self.random_crop = training and config.crop == "random"
        largest = config.resize_max if training and config.resize_max else config.resize
        self.sides = (round(config.resize * config.size), round(largest * config.size))
        self.threads = max(1, min(_MOST_THREADS, cpu_count() // max(1, config.workers)))

    def read(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows `rows` of batch `step`; see ImageDataset."""
        indices = self.order.indices(step, rows)
        count = len(indices)
        draws = row_uniforms(self.seed, step, rows, 4)
        batch = {
            "images": np.zeros((count, self.size, self.size, 3), np.float32),
            "labels": np.zeros(count, np.int32),
            "valid": indices < len(self.images),
        }

        def fill(k: int) -> None:
            if batch["valid"][k]:
                image, batch["labels"][k] = self.images.read(int(indices[k]))
                check_size(image, self.size, lambda: self.images.name(int(indices[k])))
                batch["images"][k] = to_unit(self.cut(image, draws[k]))

        # list() raises what a thread raised: the first bad row's error, whoever came first
        list(decoding_threads(self.threads).map(fill, range(count)))
        return batch

    def cut(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """[H, W, 3] to [size, size, 3]; `draws` [4] in [0, 1) choose scale, place and mirroring."""
        shortest, longest = self.sides
        if not (self.random_crop or self.flip or longest > shortest):
            return center_crop(resize_shorter(image, shortest, self.filter), self.size)
        side, top, left, mirror = draws
        image = resize_shorter(image, shortest + pick(side, longest - shortest + 1), self.filter)
        if self.random_crop:
            height, width = image.shape[:2]
            room = (height - self.size + 1, width - self.size + 1)
            image = crop(image, self.size, pick(top, room[0]), pick(left, room[1]))
        else:
            image = center_crop(image, self.size)
        return image[:, ::-1] if self.flip and mirror < 0.5 else image


class ImageDataset(StepDataset):
    """Batches of labelled images of one split. Made by `open_image_data`.

    A batch holds images: [R, size, size, 3] float32 in [-1, 1]; labels: [R] int32; valid: [R] bool,
    False in the rows past the end of an evaluation split, whose images and labels are zero.

    Attributes:
        fingerprint, num_batches: see StepDataset.
        num_images: N, of the split.
        num_classes, class_names: K, and K names; class ids are positions in them.
        description: e.g. "1,707 images of 10 classes".
    """

    read_ahead = 2  # batches are large, and their rows are read in parallel

    def __init__(self, reader: ImageReader, *, fingerprint: dict, workers: int):
        super().__init__(reader, fingerprint=fingerprint, workers=workers)
        self.num_images = len(reader.images)
        self.class_names = reader.images.class_names
        self.num_classes = len(self.class_names)
        self.description = describe(self.num_images, self.num_classes)


def describe(images: int, classes: int) -> str:
    """E.g. "1,707 images of 10 classes"."""
    return f"{images:,} image{'s' * (images != 1)} of {classes:,} class{'es' * (classes != 1)}"


def open_image_data(config: ImageData, *, split: str, seed: int, batch_size: int) -> ImageDataset:
    """Opens one split of labelled images.

    Args:
        config: the data section of a Run.
        split: "train" (endless, shuffled, random crops), "validation" or "test" (in order, each
            image once, its centre; the last batch filled with rows that are not valid).
        seed: of the training order and crops.
        batch_size: global rows.

    Raises:
        UserError: whatever the user can mend: missing or unreadable images, a folder without
            classes, images much smaller than `size`, settings out of range. Images other than the
            first are read when their turn comes; `batch` and `iterate` raise the same for them.
    """
    check_config(config)
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    images = find_images(config, split)
    first, _ = images.read(0)
    check_size(first, config.size, lambda: images.name(0))
    reader = ImageReader(images, config, split=split, seed=seed, batch_size=batch_size)
    fingerprint = {
        "format": FORMAT_VERSION,
        "split": split,
        "source": images.fingerprint,
        "classes": classes_hash(images.class_names),
        "size": config.size,
        "sides": list(reader.sides),
        "filter": config.filter,
        "random_crop": reader.random_crop,
        "flip": reader.flip,
        "batch_size": batch_size,
        "shuffle": split == "train" and config.shuffle,
        "seed": seed,
    }
    return ImageDataset(reader, fingerprint=fingerprint, workers=config.workers)


def classes_hash(names) -> str:
    """sha256 over the names of the classes, in order."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


def check_config(config: ImageData) -> None:
    """Raises UserError where a field of `config` is out of range."""
    if config.size < 1:
        raise UserError(f"data.size={config.size} must be at least 1 pixel")
    if config.crop not in _CROPS:
        raise UserError(f"data.crop={config.crop!r} is unknown; use one of {', '.join(_CROPS)}")
    if config.filter not in FILTERS:
        raise UserError(
            f"data.filter={config.filter!r} is unknown; use one of {', '.join(FILTERS)}"
        )
    if not config.resize >= 1:
        raise UserError(
            f"data.resize={config.resize} makes images smaller than data.size={config.size}; set "
            "it to 1 or more"
        )
    if config.resize_max and not config.resize_max >= config.resize:
        raise UserError(
            f"data.resize_max={config.resize_max} is less than data.resize={config.resize}; raise "
            "it, or set 0 for one size"
        )
    if config.workers < 0:
        raise UserError(f"data.workers={config.workers} must be 0 (threads) or more")
