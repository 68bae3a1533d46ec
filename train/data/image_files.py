"""Encoded images: decoding to RGB, class folders, and ArrayRecord files.

A *labelled image set* (see `image_sources`) has

    class_names:   tuple of str, id k is the k-th
    labels:        [N] int32, or None where only reading an image tells its label
    name(i)        what messages call image i
    read(i)        ([H, W, 3] uint8, label)
    fingerprint    JSON-able dict that changes with the content
    identity(i)    stays when other images come or go, where images have names
    hash_of(some)  changes with the content of some images; does not decode them

and is picklable: files are opened by whoever reads.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError
from ..files import write_atomic, write_error
from .documents import file_size, reason

ENDINGS = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".jp2", ".avif",
}  # fmt: skip
RECORD_ENDINGS = (".array_record", ".arrayrecord")
CLASSES_FILE = "classes.json"
_SIZED_FILES = 4096  # the sizes of so many files are part of a fingerprint
_SAMPLED_RECORDS = 64


# ---------------------------------------------------------------- decoding


def decode_image(encoded: str | os.PathLike | bytes, name: str) -> np.ndarray:
    """An encoded image as [H, W, 3] uint8 RGB: upright (EXIF), first frame, transparency on white.

    Any format that Pillow reads. Palettes, greyscale (16 bits: the upper eight) and CMYK are
    converted.

    Args:
        encoded: a file's path, or its bytes.
        name: for messages.

    Raises:
        UserError: it cannot be read as an image.
    """
    source = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    try:
        with Image.open(source) as image:
            image.load()
            return np.asarray(_to_rgb(_upright(image)))
    except Exception as error:  # on damaged files Pillow raises a dozen types
        if isinstance(error, MemoryError):
            raise
        what = reason(error) if isinstance(error, OSError) else str(error)
        what = "unknown format or damaged" if "cannot identify" in what else what
        raise UserError(f"cannot read the image {name}: {what}; replace or remove it") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data say nothing about the pixels
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError("it has 32-bit pixels; save it with 8 bits per channel")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class Numbered:
    """For sets whose images have no names: an image is its number, content is known as a whole."""

    def identity(self, i: int) -> str:
        """The number."""
        return str(i)

    def hash_of(self, indices: Sequence[int]) -> str:
        """sha256 over the content of the whole set, and the numbers."""
        text = json.dumps([self.fingerprint, [int(i) for i in indices]])
        return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------- class folders


class FolderImages:
    """Images in one folder per class, found recursively; hidden files are left out.

    Args:
        root: holds the class folders.
        class_names: wanted classes; default: all sub-folders by name. Ids are their positions.

    Raises:
        UserError: no class folders, a class without images, or a class that is not wanted.
    """

    def __init__(self, root: Path, class_names: Sequence[str] | None = None):
        self.root = str(root)
        found = sub_folders(root)
        if not found:
            loose = sum(is_image(entry.name) for entry in _entries(root))
            held = f"{loose} images but no" if loose else "no"
            raise UserError(
                f"{root} holds {held} class folders; put the images into one sub-folder per class"
            )
        self.class_names = tuple(found if class_names is None else class_names)
        if strange := [name for name in found if name not in self.class_names]:
            raise UserError(
                f"{root} has the class folder {strange[0]}, which the training images do not have "
                f"({len(self.class_names)} classes); add it there or remove it here"
            )
        self.paths, labels = [], []
        for k, name in enumerate(self.class_names):
            if name not in found:  # allowed in a validation folder
                continue
            paths = _images_below(root / name)
            if not paths:
                raise UserError(
                    f"the class folder {root / name} holds no images "
                    f"({', '.join(sorted(ENDINGS))}); add some or remove it"
                )
            self.paths += [f"{name}/{path}" for path in paths]
            labels += [k] * len(paths)
        self.labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """Path of image i."""
        return os.path.join(self.root, self.paths[i])

    def read(self, i: int) -> tuple[np.ndarray, int]:
        """([H, W, 3] uint8, label) of image i."""
        return decode_image(self.name(i), self.name(i)), int(self.labels[i])

    def identity(self, i: int) -> str:
        """Path below the root."""
        return self.paths[i]

    def hash_of(self, indices: Sequence[int]) -> str:
        """sha256 over names and sizes."""
        digest = hashlib.sha256()
        for i in indices:
            size = file_size(self.name(i))
            digest.update(f"{self.paths[i]}\0{size}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    @property
    def fingerprint(self) -> dict:
        """All names, and the sizes of up to 4,096 files at even distances."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(path.encode("utf-8", "surrogateescape") + b"\0")
        count = min(len(self.paths), _SIZED_FILES)
        for i in np.linspace(0, len(self.paths) - 1, count).astype(int):
            digest.update(file_size(self.name(i)).to_bytes(8, "little"))
        return {"kind": "folders", "images": len(self.paths), "content": digest.hexdigest()}


def sub_folders(root: Path) -> list[str]:
    """Names of the folders in `root`, sorted; hidden ones are left out."""
    return sorted(entry.name for entry in _entries(root) if entry.is_dir())


def _entries(root: Path) -> list[os.DirEntry]:
    try:
        return [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read {root}: {reason(error)}; check data.path") from error


def is_image(name: str) -> bool:
    """Whether a file's name says that it is a visible image."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in ENDINGS


def _images_below(folder: Path) -> list[str]:
    """Relative paths of the images in a folder and its sub-folders, sorted."""

    def stop(error: OSError):
        raise UserError(f"cannot read {error.filename}: {reason(error)}; check its permissions")

    found = []
    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(place, folder)
        found += [os.path.normpath(os.path.join(inside, n)) for n in files if is_image(n)]
    return sorted(path.replace(os.sep, "/") for path in found)


# ---------------------------------------------------------------- ArrayRecord


def is_record_file(path: Path) -> bool:
    """Whether the name says so: *.array_record, also with -00000-of-00008 after it."""
    return any(ending in path.name.lower() for ending in RECORD_ENDINGS)


class RecordImages(Numbered):
    """Images in ArrayRecord files.

    A record is the label (int32, little-endian) followed by the bytes of an encoded image (PNG,
    JPEG, ...). `classes.json` beside the files, a JSON list of strings, names the classes: labels
    are positions in it. `write_array_records` writes both.
    """

    labels = None

    def __init__(self, files: Sequence[Path]):
        self.files = [str(file) for file in files]
        self.class_names = _read_classes(files[0].parent)
        try:
            import grain

            self.records = grain.sources.ArrayRecordDataSource(self.files)
            self.count = len(self.records)
        except ImportError as error:
            raise UserError(
                "ArrayRecord files need the array-record package, which is not available for this "
                "system; use class folders or arrays"
            ) from error
        except Exception as error:  # the reader's errors have no common type
            raise UserError(
                f"cannot read {self.files[0]} as ArrayRecord files ({str(error).splitlines()[0]}); "
                "write them again"
            ) from error

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        """Record number and folder."""
        return f"record {i} of {os.path.dirname(self.files[0]) or '.'}"

    def read(self, i: int) -> tuple[np.ndarray, int]:
        """([H, W, 3] uint8, label) of record i."""
        record = self.records[i]
        label = struct.unpack_from("<i", record)[0] if len(record) > 4 else -1
        if not 0 <= label < len(self.class_names):
            raise UserError(
                f"{self.name(i)} has the label {label}, but {CLASSES_FILE} names "
                f"{len(self.class_names)} classes (0 to {len(self.class_names) - 1}); write the "
                "records again as int32 label + encoded image"
            )
        return decode_image(record[4:], self.name(i)), label

    @property
    def fingerprint(self) -> dict:
        """Names and sizes of the files, and 64 records at even distances."""
        digest = hashlib.sha256(json.dumps([os.path.basename(f) for f in self.files]).encode())
        for file in self.files:
            digest.update(file_size(file).to_bytes(8, "little"))
        samples = min(self.count, _SAMPLED_RECORDS)
        for i in np.linspace(0, self.count - 1, samples).astype(int):
            digest.update(self.records[int(i)])
        return {"kind": "records", "images": self.count, "content": digest.hexdigest()}


def _read_classes(folder: Path) -> tuple[str, ...]:
    path = folder / CLASSES_FILE
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UserError(
            f'{path} is missing or is not a JSON list of class names; write ["name of class 0", '
            "...] there"
        )
    return tuple(names)


def write_array_records(
    path: str | os.PathLike,
    images: Iterable[np.ndarray | bytes | str | os.PathLike],
    labels: Iterable[int],
    class_names: Sequence[str],
) -> int:
    """Writes one ArrayRecord file of labelled images, and `classes.json` beside it.

    A record is the label as little-endian int32 followed by an encoded image, stored one by one
    for random access. In a folder of several files, those with "val" or "test" in their name are
    the split of that name, the others training.

    Args:
        path: e.g. DIR/train-00000.array_record.
        images: [H, W, 3] or [H, W] uint8 arrays (stored as PNG), or encoded images: bytes, or
            paths of files.
        labels: one int in 0..K-1 per image.
        class_names: K names.

    Returns:
        number of records.

    Raises:
        UserError: a label out of range, other classes beside the file, or it cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path, classes = Path(path), json.dumps(list(class_names), ensure_ascii=False)
    if not is_record_file(path):
        raise UserError(f"{path}: name the file *.array_record")
    beside = path.parent / CLASSES_FILE
    if beside.exists() and _read_classes(path.parent) != tuple(class_names):
        raise UserError(f"{beside} names other classes; use another folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            for image, label in zip(images, labels, strict=True):
                if not 0 <= label < len(class_names):
                    raise UserError(
                        f"image {count} has the label {label}, but there are {len(class_names)} "
                        f"classes; labels are 0 to {len(class_names) - 1}"
                    )
                writer.write(struct.pack("<i", label) + _encoded(image))
                count += 1
        finally:
            writer.close()
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
    write_atomic(beside, classes)
    return count


def _encoded(image) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        return buffer.getvalue()
    return Path(image).read_bytes()
