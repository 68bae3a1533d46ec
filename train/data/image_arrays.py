"""Labelled images in NumPy files, memory-mapped, and the ones that scikit-learn carries."""

from __future__ import annotations

import functools
import hashlib
import math
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .documents import content_hash, file_size
from .image_files import Numbered

BUILTIN = ("builtin:digits", "builtin:photos")
_TILE, _STRIDE, _HELD_OUT = 128, 16, 128  # of builtin:photos, in pixels


class Member(NamedTuple):
    """An array: an .npy file, or the member `name` of an .npz file."""

    path: str
    name: str = ""


# ---------------------------------------------------------------- .npy and .npz


@functools.lru_cache(maxsize=64)
def open_array(member: Member) -> np.ndarray:
    """The array, read-only: memory-mapped, or in memory where an .npz file is compressed.

    Raises:
        OSError, ValueError, zipfile.BadZipFile, EOFError: it is not there or not complete.
    """
    if not member.name:
        return np.load(member.path, mmap_mode="r", allow_pickle=False)
    with zipfile.ZipFile(member.path) as archive:
        info = archive.getinfo(f"{member.name}.npy")
        with archive.open(info) as file:
            shape, fortran, dtype = _read_header(file)
            header = file.tell()
        if info.compress_type == zipfile.ZIP_STORED and not fortran and not dtype.hasobject:
            with open(member.path, "rb") as raw:  # the local header's lengths are its own
                raw.seek(info.header_offset + 26)
                names = sum(struct.unpack("<HH", raw.read(4)))
            start = info.header_offset + 30 + names + header
            return np.memmap(member.path, dtype, "r", start, shape)
        with archive.open(info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


class ArrayImages(Numbered):
    """Images in .npy and .npz files, one after the other.

    An .npz holds `images` (or `data`, or one array that fits): uint8 [N, H, W, 3], [N, H, W, 1] or
    [N, H, W]; optionally `labels` (or `label`; or `arr_1`, which positional saving makes): integers
    [N]; optionally `class_names`: strings [K]. Beside NAME.npy the labels are in NAME.labels.npy.
    Without labels all images are of one class.

    Args:
        files: of the same image size each; sizes may differ between files.
        class_names: of the training images; for the other splits.

    Raises:
        UserError: another type or shape, labels that do not fit.
    """

    what, axes = "images", 4  # a subclass holds other things

    def __init__(self, files: Sequence[Path], class_names: Sequence[str] | None = None):
        open_array.cache_clear()  # files may have changed since they were last opened
        self.files = [str(file) for file in files]
        self.members, labels, names = [], [], class_names
        for file in files:
            member, these, own_names = _open_file(file, self.what, self.axes)
            self.members.append(member)
            labels.append(these)
            names = own_names if names is None else names
        self._ends = np.cumsum([len(open_array(m)) for m in self.members])
        if len({these is None for these in labels}) > 1:
            without = self.files[[these is None for these in labels].index(True)]
            raise UserError(f"{without} has no labels, but other files have; give all or none")
        if labels[0] is None:
            labels = [np.zeros(int(self._ends[-1]), np.int32)]
        self.labels = np.concatenate(labels).astype(np.int64)
        if len(self.labels) == 0:
            raise UserError(f"{self.files[0]} holds no {self.what} (0 of them); save some there")
        self.class_names = self._check_labels(names)
        self.labels = self.labels.astype(np.int32)

    def _check_labels(self, names: Sequence[str] | None) -> tuple[str, ...]:
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or (names is not None and high >= len(names)):
            known = "0 and up" if names is None else f"0 to {len(names) - 1} ({len(names)} classes)"
            raise UserError(
                f"{self.files[0]} has labels from {low} to {high}, but class ids are {known}; "
                "correct the labels"
            )
        return tuple(str(k) for k in range(high + 1)) if names is None else tuple(names)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, i: int) -> tuple[int, int]:
        k = int(np.searchsorted(self._ends, i, side="right"))
        return k, i - (int(self._ends[k - 1]) if k else 0)

    def name(self, i: int) -> str:
        """File and position of image i."""
        k, position = self._find(i)
        return f"{self.what[:-1]} {position} of {self.files[k]}"

    def read(self, i: int) -> tuple[np.ndarray, int]:
        """([H, W, 3] uint8, label) of image i; of a video [F, H, W, 3]."""
        k, position = self._find(i)
        image = np.asarray(open_array(self.members[k])[position])
        return _three_channels(image, self.axes - 1), int(self.labels[i])

    @property
    def fingerprint(self) -> dict:
        """Labels and content, sampled where it is large (`documents.content_hash`)."""
        digest = hashlib.sha256(self.labels.astype("<i4").tobytes())
        for member in self.members:
            array = open_array(member)
            digest.update(str(array.shape).encode() + content_hash(_Bytes(array)).encode())
        return {"kind": "arrays", self.what: len(self), "content": digest.hexdigest()}


class _Bytes:
    """An array of images as documents of bytes, for `content_hash`."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.lengths = np.full(len(array), math.prod(array.shape[1:]), np.int64)

    def read(self, i: int, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.array[i]).reshape(-1)[start:stop]


def _three_channels(image: np.ndarray, axes: int) -> np.ndarray:
    image = image[..., None] if image.ndim < axes else image
    return np.broadcast_to(image, (*image.shape[:-1], 3)) if image.shape[-1] == 1 else image


def _open_file(
    file: Path, what: str, axes: int
) -> tuple[Member, np.ndarray | None, list[str] | None]:
    """Images (or videos), labels and class names of one file."""
    if file_size(file) == 0:
        raise UserError(f"{file} is empty (0 bytes); save the {what} again")
    try:
        if file.suffix.lower() == ".npy":
            member = Member(str(file))
            beside = file.with_name(f"{file.stem}.labels.npy")
            labels = open_array(Member(str(beside))) if beside.exists() else None
            names = None
        else:
            member, labels, names = _open_npz(file, what, axes)
        images = open_array(member)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"cannot read {file} as NumPy arrays ({error}); save it again with np.save or np.savez"
        ) from error
    if not _fits(images.shape, images.dtype, axes):
        form = "[N, H, W, 3] or, greyscale, [N, H, W]" if axes == 4 else "[N, F, H, W, 3]"
        raise UserError(
            f"{file} holds a {images.dtype} array of shape {images.shape}; {what} must be uint8 "
            f"{form}"
        )
    if labels is None:
        return member, None, names
    column = labels.ndim in (1, 2) and labels.size == len(labels)
    if not np.issubdtype(labels.dtype, np.integer) or not column:
        raise UserError(
            f"the labels of {file} are {labels.dtype} of shape {labels.shape}; they must be "
            f"integers [N], one class id per {what[:-1]}"
        )
    if labels.size != len(images):
        raise UserError(
            f"{file} has {len(images)} {what} but {labels.size} labels; save one label per "
            f"{what[:-1]}"
        )
    return member, labels.reshape(-1), names


def _fits(shape: tuple[int, ...], dtype: np.dtype, axes: int) -> bool:
    grey = axes == 4 and len(shape) == 3  # of videos [N, F, H, W] could be images as well
    sizes = grey or (len(shape) == axes and shape[-1] in (1, 3))
    return dtype == np.uint8 and sizes and 0 not in shape[1:]


def _open_npz(
    file: Path, what: str, axes: int
) -> tuple[Member, np.ndarray | None, list[str] | None]:
    with zipfile.ZipFile(file) as archive:
        held = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
        headers = {}
        for name in held:
            with archive.open(f"{name}.npy") as inside:
                shape, _, dtype = _read_header(inside)
                headers[name] = (shape, dtype)
    named = [name for name in (what, "data") if name in held]
    fitting = named[:1] or [name for name in held if _fits(*headers[name], axes)]
    if len(fitting) != 1:
        listed = ", ".join(f"{n} {d} {s}" for n, (s, d) in headers.items()) or "nothing"
        raise UserError(
            f"{file} should hold one uint8 array {what!r} [N, {'F, ' * (axes == 5)}H, W, 3] but "
            f"holds {listed}; save it with np.savez(FILE, {what}=..., labels=...)"
        )
    labels = next((n for n in ("labels", "label", "arr_1") if n in held and n not in fitting), None)
    names = None
    if "class_names" in held:
        names = [str(n) for n in open_array(Member(str(file), "class_names")).tolist()]
    return (
        Member(str(file), fitting[0]),
        None if labels is None else open_array(Member(str(file), labels)),
        names,
    )


# ---------------------------------------------------------------- carried by scikit-learn


class BuiltinImages(Numbered):
    """`builtin:digits` and `builtin:photos`.

    Digits: 1,797 scans of 8 x 8 pixels with 17 grey levels (value v becomes round(255 v / 16)), ten
    classes (the test set of Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits").

    Photos: tiles of 128 x 128 pixels, 16 pixels apart, of two photographs (a temple, a flower), one
    class each. The right 128 columns of each photograph are held out, tiles of theirs are the
    validation images: no pixel is in both.

    Args:
        path: one of BUILTIN.
        split: "train" or "validation" for photos; digits have no split of their own.
    """

    def __init__(self, path: str, split: str = "train"):
        self.path, self.split = path, split
        images, self.class_names = _builtin(path)
        if path == "builtin:digits":
            self.tiles = [(i, 0, 0, 8) for i in range(len(images))]
            self.labels = _digit_labels()
        else:
            self.tiles = []
            for k, (height, width, _) in enumerate(image.shape for image in images):
                edge = width - _HELD_OUT
                start, stop = (0, edge) if split == "train" else (edge, width)
                self.tiles += [
                    (k, top, left, _TILE)
                    for top in range(0, height - _TILE + 1, _STRIDE)
                    for left in range(start, stop - _TILE + 1, _STRIDE)
                ]
            self.labels = np.array([tile[0] for tile in self.tiles], np.int32)

    def __len__(self) -> int:
        return len(self.tiles)

    def name(self, i: int) -> str:
        """Number and source."""
        return f"image {i} of {self.path}"

    def read(self, i: int) -> tuple[np.ndarray, int]:
        """([H, W, 3] uint8, label) of image i."""
        k, top, left, side = self.tiles[i]
        image = _builtin(self.path)[0][k][top : top + side, left : left + side]
        return image, int(self.labels[i])

    @property
    def fingerprint(self) -> dict:
        """Content of the decoded images, and the tiles."""
        digest = hashlib.sha256(str(self.tiles).encode() + self.labels.astype("<i4").tobytes())
        for image in _builtin(self.path)[0]:
            digest.update(np.ascontiguousarray(image))
        return {"kind": self.path, "images": len(self), "content": digest.hexdigest()}


def _datasets():
    try:
        from sklearn import datasets
    except ImportError as error:
        raise UserError(
            "the built-in images come with scikit-learn: pip install 'lintime[image]', or set "
            "data.path to a folder of images"
        ) from error
    return datasets


@functools.lru_cache(maxsize=2)
def _builtin(path: str) -> tuple[Sequence[np.ndarray], tuple[str, ...]]:
    """([H, W, 3] uint8 images, class names)."""
    if path == "builtin:digits":
        levels = _datasets().load_digits().images  # [N, 8, 8] float64, 0..16
        grey = np.round(levels * (255 / 16)).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=3), tuple("0123456789")
    bunch = _datasets().load_sample_images()
    names = [Path(name).stem for name in bunch.filenames]
    pairs = sorted(zip(names, bunch.images, strict=True), key=lambda pair: pair[0])
    return [np.asarray(image) for _, image in pairs], tuple(name for name, _ in pairs)


def _digit_labels() -> np.ndarray:
    return _datasets().load_digits().target.astype(np.int32)
