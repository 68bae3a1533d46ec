"""Arrays of RGB images as documents: H*W*3 bytes each, row-major height, width, channel."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..schema import Data
from .documents import file_size, write_atomically


class ArrayRange(NamedTuple):
    """Images [start, stop) of the array in the .npy file `path`."""

    path: str
    start: int
    stop: int


@functools.lru_cache(maxsize=64)
def map_array(path: str) -> np.ndarray:
    """Memory-maps the array of an .npy file, read-only."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


class ImageDocuments:
    """Images as byte documents, all of `shape` [H, W, 3].

    Arrays are [N, H, W, 3], or [N, 3*H*W] with the three colour planes one after the other (the
    layout of the downsampled ImageNet files).
    """

    def __init__(self, ranges: list[ArrayRange], shape: tuple[int, int, int]):
        self.ranges, self.shape = ranges, shape
        self._ends = np.cumsum([r.stop - r.start for r in ranges])
        self.lengths = np.full(
            int(self._ends[-1]) if len(ranges) else 0, math.prod(shape), np.int64
        )

    def read(self, i: int, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of image i as uint8."""
        k = int(np.searchsorted(self._ends, i, side="right"))
        path, _, end = self.ranges[k]
        return image_bytes(np.asarray(map_array(path)[end - (int(self._ends[k]) - i)]), self.shape)[
            start:stop
        ]


def image_bytes(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """One image, [H, W, 3] or [3*H*W] planar, as [H*W*3] uint8 in height, width, channel order."""
    if image.ndim == 1:
        image = image.reshape(3, shape[0], shape[1]).transpose(1, 2, 0)
    return image.reshape(-1)


def is_array_file(path: str | Path) -> bool:
    """Whether the name says that the file holds NumPy arrays."""
    return Path(path).suffix.lower() in (".npy", ".npz")


def find_images(config: Data, split: str, *, cache: Path) -> ImageDocuments:
    """The images of one split.

    In a folder, files whose name contains "test", "val" or "train" are that split. Without a
    validation file the last `validation_fraction` of the training images is validation; without a
    test file test is validation. (For the division of the ImageNet64 literature rename val_data.npz
    to test_data.npz and set `validation_fraction` to 81167/1281167.) An .npz member is unpacked
    into `cache` once, so that it can be memory-mapped.

    Raises:
        UserError: no array, arrays of another type or shape, images that are not `sequence_len`
            tokens long, or a split without images.
    """
    map_array.cache_clear()  # files may have changed since they were last opened
    path = Path(config.path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if is_array_file(p))
    else:
        files = [path] if is_array_file(path) else []
    if not files:
        raise UserError(
            f"data.format='images' finds no .npy or .npz file at {path}; correct data.path"
        )
    groups = group_by_name(files)
    arrays, shape = {}, None
    for name in ("train", "validation", "test"):
        arrays[name] = []
        for file in groups[name]:
            count, this = _check_array(array := _unpacked(file, cache), file)
            if shape is not None and this != shape:
                raise UserError(
                    f"{file} holds images of shape {this}, the other files {shape}; keep one size"
                )
            shape = this
            arrays[name].append(ArrayRange(array, 0, count))
    tokens = math.prod(shape)
    if config.sequence_len != tokens:
        raise UserError(
            f"data.sequence_len={config.sequence_len}, but images of shape {shape} have {tokens} "
            f"tokens each; set data.sequence_len={tokens}"
        )
    if not arrays["validation"]:
        arrays["train"], arrays["validation"] = _split_tail(
            arrays["train"], config.validation_fraction
        )
    if not arrays["test"]:
        arrays["test"] = arrays["validation"]
    ranges = [r for r in arrays[split] if r.stop > r.start]
    if not ranges:
        raise UserError(
            f"data.path={config.path!r} has no {split} images; name a file after the split, or set "
            f"data.validation_fraction (now {config.validation_fraction})"
        )
    return ImageDocuments(ranges, shape)


def group_by_name(files: list[Path]) -> dict[str, list[Path]]:
    """Files by split: of several, those with "test" or "val" in their name, the others training."""
    groups = {"train": [], "validation": [], "test": []}
    for file in files:
        stem = file.stem.lower()
        if len(files) > 1 and "train" not in stem and "test" in stem:
            groups["test"].append(file)
        elif len(files) > 1 and "train" not in stem and "val" in stem:
            groups["validation"].append(file)
        else:
            groups["train"].append(file)
    return groups


def _split_tail(
    ranges: list[ArrayRange], fraction: float
) -> tuple[list[ArrayRange], list[ArrayRange]]:
    """Divides images in order: the last `fraction` of all of them is validation."""
    cut = round(sum(r.stop - r.start for r in ranges) * (1 - fraction))
    head, tail = [], []
    for r in ranges:
        middle = r.start + min(max(cut, 0), r.stop - r.start)
        head.append(r._replace(stop=middle))
        tail.append(r._replace(start=middle))
        cut -= r.stop - r.start
    return head, tail


def _check_array(path: str, file: Path) -> tuple[int, tuple[int, int, int]]:
    """(number of images, image shape) of an .npy file; `file` is the name for messages."""
    try:
        array = map_array(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {file} as a NumPy array ({error}); save it again with np.save"
        ) from error
    return _image_shape(array.shape, array.dtype, file)


def _image_shape(shape, dtype, file) -> tuple[int, tuple[int, int, int]]:
    if dtype == np.uint8 and len(shape) == 4 and shape[3] == 3:
        return shape[0], tuple(shape[1:])
    if dtype == np.uint8 and len(shape) == 2:
        side = math.isqrt(shape[1] // 3)
        if side and 3 * side * side == shape[1]:
            return shape[0], (side, side, 3)
    raise UserError(
        f"{file} holds a {dtype} array of shape {tuple(shape)}; images must be uint8 [N, H, W, 3], "
        "or [N, 3*H*W] with square colour planes"
    )


def _unpacked(file: Path, cache: Path) -> str:
    """Path of an .npy file with the images: `file`, or its .npz member copied into `cache`."""
    size = file_size(file)
    if size == 0:
        raise UserError(f"{file} is empty (0 bytes); save the images again")
    if file.suffix.lower() == ".npy":
        return str(file)
    key = f"{file.resolve()}:{size}:{os.stat(file).st_mtime_ns}"
    target = (
        cache
        / f"images-{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}.npy"
    )
    if not target.exists():
        try:
            with (
                zipfile.ZipFile(file) as archive,
                archive.open(_image_member(archive, file)) as member,
            ):
                write_atomically(target, lambda out: shutil.copyfileobj(member, out, 2**20))
        except (zipfile.BadZipFile, EOFError) as error:
            raise UserError(
                f"{file} is not a complete .npz file ({error}); copy it again"
            ) from error
    return str(target)


def _image_member(archive: zipfile.ZipFile, file: Path) -> str:
    """Name of the member with the images: "data" if there is one, else the only array that fits."""
    names = [name for name in archive.namelist() if name.endswith(".npy")]
    if "data.npy" in names:
        return "data.npy"
    fitting = []
    for name in names:
        with archive.open(name) as member:
            version = np.lib.format.read_magic(member)
            read_header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(member)
        try:
            _image_shape(shape, dtype, file)
            fitting.append(name)
        except UserError:
            pass
    if len(fitting) != 1:
        held = ", ".join(name.removesuffix(".npy") for name in names) or "nothing"
        raise UserError(
            f"{file} should hold one uint8 image array but holds {held}; save the images alone as "
            "'data'"
        )
    return fitting[0]
