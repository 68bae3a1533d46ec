"""Finds labelled images and their splits: class folders, arrays, ArrayRecord files, built-in ones.

How images are divided where the source does not come divided: every class gives about
`validation_fraction` of its images to validation, chosen by a hash of their names or numbers. Where
there is no test split, test is the validation split.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..schema import ImageData
from .image_arrays import BUILTIN, ArrayImages, BuiltinImages
from .image_files import (
    CLASSES_FILE,
    FolderImages,
    RecordImages,
    is_image,
    is_record_file,
    sub_folders,
)
from .images import group_by_name, is_array_file
from .sources import SPLITS

_VALIDATION = ("validation", "val", "valid")


class Subset:
    """Some of the images of a set, in a fixed order; see `image_files` for the surface."""

    def __init__(self, images, indices: np.ndarray):
        self.images, self.indices = images, np.asarray(indices, np.int64)
        self.class_names = images.class_names
        self.labels = None if images.labels is None else images.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, i: int) -> str:
        """Name of image i."""
        return self.images.name(int(self.indices[i]))

    def read(self, i: int) -> tuple[np.ndarray, int]:
        """([H, W, 3] uint8, label) of image i."""
        return self.images.read(int(self.indices[i]))

    def identity(self, i: int) -> str:
        """Identity of image i."""
        return self.images.identity(int(self.indices[i]))

    def hash_of(self, indices: Sequence[int]) -> str:
        """Hash of the content of some images."""
        return self.images.hash_of(self.indices[np.asarray(indices, np.int64)])

    @property
    def fingerprint(self) -> dict:
        """That of the whole set, and which images of it."""
        chosen = hashlib.sha256(self.indices.astype("<i8").tobytes()).hexdigest()
        return (
            self.images.fingerprint
            | {"of": len(self.images), "images": len(self)}
            | {"indices": chosen}
        )


def find_image_splits(config: ImageData) -> dict[str, object]:
    """The labelled image sets of a source: "train", "validation" (unless the source has none and
    `validation_fraction` is 0), and "test" where the source has one of its own.

    Raises:
        UserError: missing, empty or unreadable data.
    """
    if not 0 <= config.validation_fraction < 1:
        raise UserError(
            f"data.validation_fraction={config.validation_fraction} must be at least 0 and below 1"
        )
    splits = _open(config.path)
    if "validation" not in splits:
        train, held_out = hold_out(splits["train"], config.validation_fraction)
        splits["train"] = train
        if len(held_out):
            splits["validation"] = held_out
    return {split: splits[split] for split in SPLITS if split in splits}


def find_images(config: ImageData, split: str):
    """The labelled image set of one split; test is validation where there is none of its own.

    Raises:
        UserError: see `find_image_splits`; or the split is empty.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {SPLITS}")
    splits = find_image_splits(config)
    found = splits.get(split, splits.get("validation") if split == "test" else None)
    if found is None or not len(found):
        raise UserError(
            f"data.path={config.path!r} leaves no {split} images with data.validation_fraction="
            f"{config.validation_fraction}; set a fraction such as 0.05, or give more images"
        )
    return found


def hold_out(images, fraction: float) -> tuple[Subset, Subset]:
    """(training, validation) images.

    Validation gets round(fraction * N) of N images, but at least one, shared out over the classes
    by largest remainders; no class gives its last image while another one can. Within a class those
    with the smallest hash of their name go (in arrays and records: of their number): the same
    division everywhere, and almost the same when images come or go.
    """
    count = len(images)
    wanted = max(1, round(fraction * count)) if fraction and count > 1 else 0
    labels = np.zeros(count, np.int32) if images.labels is None else images.labels
    sizes = np.bincount(labels, minlength=1)
    quota = sizes * (wanted / max(count, 1))
    limit = np.maximum(sizes - 1, 0) if np.maximum(sizes - 1, 0).sum() >= wanted else sizes
    shares = np.minimum(np.floor(quota).astype(np.int64), limit)
    by_remainder = np.argsort(shares - quota, kind="stable")
    while (left := wanted - int(shares.sum())) > 0:
        open_classes = [k for k in by_remainder if shares[k] < limit[k]]
        shares[open_classes[:left]] += 1
    ranks = np.array([_rank(images.identity(i)) for i in range(count)], np.uint64)
    order = np.lexsort((ranks, labels))
    starts = np.cumsum(sizes) - sizes
    held = np.zeros(count, bool)
    for k in np.flatnonzero(shares):
        held[order[starts[k] : starts[k] + shares[k]]] = True
    return Subset(images, np.flatnonzero(~held)), Subset(images, np.flatnonzero(held))


def _rank(identity: str) -> int:
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little")


def _open(path: str) -> dict[str, object]:
    """The splits that the source itself has."""
    if path.startswith("builtin:"):
        if path not in BUILTIN:
            raise UserError(
                f"data.path={path!r} is unknown; built-in images are {' and '.join(BUILTIN)}"
            )
        if path == "builtin:digits":
            return {"train": BuiltinImages(path)}
        return {split: BuiltinImages(path, split) for split in ("train", "validation")}
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return _open_folder(Path(path))
    if not os.path.exists(path):
        files = [Path(name) for name in sorted(glob.glob(path, recursive=True))]
        if not files:
            raise UserError(
                f"data.path={path!r} does not exist (looked in {os.getcwd()}); correct it or use "
                f"{BUILTIN[0]!r}"
            )
        return _open_files(files, path)
    return _open_files([Path(path)], path)


def _open_folder(root: Path) -> dict[str, object]:
    folders = sub_folders(root)
    if "train" in folders and sub_folders(root / "train"):
        train = FolderImages(root / "train")
        splits = {"train": train}
        held_out = next((name for name in _VALIDATION if name in folders), None)
        for split, name in (("validation", held_out), ("test", "test")):
            if name in folders:
                splits[split] = FolderImages(root / name, train.class_names)
        return splits
    files = [p for p in sorted(root.iterdir()) if not p.name.startswith(".") and p.is_file()]
    known = [p for p in files if is_array_file(p) or is_record_file(p)]
    if known:
        return _open_files(known, str(root))
    return {"train": FolderImages(root)}


def _open_files(files: Sequence[Path], path: str) -> dict[str, object]:
    """Arrays or ArrayRecord files, divided by their names."""
    files = [f for f in files if not f.name.endswith((".labels.npy", CLASSES_FILE))]
    arrays = [file for file in files if is_array_file(file)]
    records = [file for file in files if is_record_file(file)]
    if not files or len(files) not in (len(arrays), len(records)):
        strange = next((f for f in files if f not in arrays and f not in records), None)
        what = f"{strange} is neither" if strange else f"{path} holds both"
        hint = (
            "; to read images, give the folder that holds one sub-folder per class"
            if strange and is_image(strange.name)
            else "; keep one kind of file"
        )
        raise UserError(f"{what} NumPy arrays (.npy, .npz) and ArrayRecord files{hint}")
    groups = group_by_name(list(files))
    if not groups["train"]:
        raise UserError(
            f"data.path={path!r} holds no training images ({len(files)} files named after other "
            "splits); add some or rename a file"
        )
    if records:
        return {name: RecordImages(group) for name, group in groups.items() if group}
    train = ArrayImages(groups["train"])
    splits = {"train": train}
    for split in ("validation", "test"):
        if groups[split]:
            splits[split] = ArrayImages(groups[split], train.class_names)
    return splits
