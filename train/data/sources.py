"""Finds the documents of one split: built-in texts, files, folders, enwik8, PG-19, images.

How documents are divided when the data does not come divided:

* one document (a single text file): the last `validation_fraction` of its bytes is validation;
* several documents: a stable hash of each one's name decides, about `validation_fraction` of them
  go to validation, and a document never changes sides when others are added.

Where there is no test split, test is the validation split.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from pathlib import Path

from ..errors import UserError
from ..schema import Data
from .builtin import python_docs
from .documents import ByteDocuments, Segment, file_size, map_bytes, reason
from .images import ImageDocuments, find_images, is_array_file

SPLITS = ("train", "validation", "test")
FORMATS = ("auto", "text", "enwik8", "pg19", "images")
BUILTIN = "builtin:python-docs"
ENWIK8_BYTES, _ENWIK8_CUTS = (
    100_000_000,
    {"train": (0, 90), "validation": (90, 95), "test": (95, 100)},
)
_SUBFOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
_COMPRESSED = {".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz"}


def resolve_format(config: Data) -> str:
    """The format that "auto" stands for: builtin, enwik8, pg19, images or text.

    Raises:
        UserError: an unknown format, or a path that does not exist.
    """
    if config.format not in FORMATS:
        raise UserError(
            f"data.format={config.format!r} is unknown; use one of {', '.join(FORMATS)}"
        )
    path = config.path
    if path.startswith("builtin:"):
        if path != BUILTIN:
            raise UserError(f"data.path={path!r} is unknown; the built-in text is {BUILTIN!r}")
        return "builtin"
    if not _is_glob(path) and not os.path.exists(path):
        raise UserError(
            f"data.path={path!r} does not exist (looked in {os.getcwd()}); correct it or use "
            f"{BUILTIN!r}"
        )
    if config.format != "auto":
        return config.format
    if _is_glob(path):
        return "text"
    if os.path.isdir(path):
        return _directory_format(config)
    if is_array_file(path):
        return "images"
    named = os.path.basename(path) in ("enwik8", "text8")
    return "enwik8" if named and os.path.getsize(path) == ENWIK8_BYTES else "text"


def find_documents(config: Data, split: str, *, cache: Path) -> ByteDocuments | ImageDocuments:
    """The non-empty documents of `split` ("train", "validation" or "test") in a fixed order.

    Args:
        config: which data, and how it is divided.
        cache: folder where compressed image arrays are unpacked.

    Raises:
        UserError: missing, empty or unreadable data, or a split without any.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {SPLITS}")
    if not 0 <= config.validation_fraction < 1:
        raise UserError(
            f"data.validation_fraction={config.validation_fraction} must be at least 0 and below 1"
        )
    kind = resolve_format(config)
    map_bytes.cache_clear()  # files may have changed since they were last opened
    if kind == "images":
        return find_images(config, split, cache=cache)
    if kind == "builtin":
        documents = ByteDocuments(split_by_hash(python_docs(), config.validation_fraction, split))
    elif kind == "enwik8":
        documents = ByteDocuments([_enwik8(config.path, split)])
    elif kind == "pg19":
        documents = ByteDocuments(_pg19(config, split))
    else:
        documents = ByteDocuments(_text(config, split))
    if not len(documents.lengths):
        raise UserError(
            f"data.path={config.path!r} leaves no {split} data with data.validation_fraction="
            f"{config.validation_fraction}; set a fraction such as 0.05, or give more data"
        )
    return documents


def split_by_hash(segments, fraction: float, split: str) -> list[Segment]:
    """The documents on one side; those whose name hashes below `fraction` are validation.

    With few documents the rule may leave one side empty; then the nearest document in hash order
    moves there, so that two or more documents always give both sides (unless `fraction` is 0).
    """
    if fraction == 0:
        return list(segments) if split == "train" else []
    ranks = [_stable_hash(segment.name) for segment in segments]
    held_out = {i for i, rank in enumerate(ranks) if rank < fraction}
    if not held_out:
        held_out = {min(range(len(ranks)), key=ranks.__getitem__)}
    elif len(held_out) == len(ranks):
        held_out.discard(max(range(len(ranks)), key=ranks.__getitem__))
    return [segment for i, segment in enumerate(segments) if (i in held_out) == (split != "train")]


def _stable_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name only, not on process, platform or Python."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _enwik8(path: str, split: str) -> Segment:
    """The standard division of enwik8 and text8: 90, 5 and 5 million bytes.

    It is one document and the division is by position: no EOS is ever appended (`append_eos` is
    ignored).
    """
    size = file_size(path) if os.path.isfile(path) else None
    if size != ENWIK8_BYTES:
        found = "a folder" if size is None else f"{size:,} bytes"
        raise UserError(
            f"data.format='enwik8' needs the raw file of {ENWIK8_BYTES:,} bytes, "
            f"but {path} is {found}; "
            "unpack the original file, or set data.format=text"
        )
    first, last = _ENWIK8_CUTS[split]
    return Segment(os.path.basename(path), path, first * 1_000_000, last * 1_000_000)


def _text(config: Data, split: str) -> list[Segment]:
    """One file, a glob, or a directory searched by `pattern`."""
    path = config.path
    if _is_glob(path):
        files = [name for name in sorted(glob.glob(path, recursive=True)) if os.path.isfile(name)]
        if not files:
            raise UserError(f"data.path={path!r} matches no file; correct the pattern")
        base = _glob_base(path)
        segments = [_file(name, Path(name).relative_to(base).as_posix()) for name in files]
    elif os.path.isdir(path):
        segments = _directory(Path(path), config.pattern)
    else:
        segments = [_file(path, os.path.basename(path))]
    if not any(segment.stop for segment in segments):
        what = f"{path} is" if len(segments) == 1 else f"all {len(segments)} files of {path} are"
        raise UserError(f"{what} empty (0 bytes); set data.path to a file with text")
    segments = [segment for segment in segments if segment.stop]
    if len(segments) > 1:
        return split_by_hash(segments, config.validation_fraction, split)
    return [_tail_split(segments[0], config.validation_fraction, split)]


def _tail_split(segment: Segment, fraction: float, split: str) -> Segment:
    """The first or the last part of one document, cut where no UTF-8 character is torn."""
    cut = round(segment.stop * (1 - fraction))
    data = map_bytes(segment.source)
    for _ in range(3):  # a character has at most three continuation bytes (10xxxxxx)
        if cut < segment.stop and data[cut] & 0xC0 == 0x80:
            cut += 1
    return segment._replace(stop=cut) if split == "train" else segment._replace(start=cut)


def _pg19(config: Data, split: str) -> list[Segment]:
    """Sub-folders train/, validation/ (or val/, valid/) and, optionally, test/ of documents."""
    root = Path(config.path)
    if not root.is_dir():
        raise UserError(
            f"data.format='pg19' needs a folder, but {root} is a file; set data.format=text"
        )
    folder = _subfolder(root, split)
    if folder is None and split == "test":
        folder = _subfolder(root, "validation")
    if folder is None:
        names = " or ".join(
            f"{name}/" for name in _SUBFOLDERS["validation" if split == "test" else split]
        )
        raise UserError(
            f"data.format='pg19' needs a folder {names} in {root}; add it or set data.format=text"
        )
    segments = _directory(folder, config.pattern)
    if not any(segment.stop for segment in segments):
        raise UserError(
            f"all {len(segments)} files in {folder} are empty (0 bytes); put text there"
        )
    return segments


def _subfolder(root: Path, split: str) -> Path | None:
    return next((root / name for name in _SUBFOLDERS[split] if (root / name).is_dir()), None)


def _directory(root: Path, pattern: str) -> list[Segment]:
    """Files below `root` that match `pattern`, by relative path; hidden ones are left out."""
    segments = [_file(path, name) for name, path in sorted(_match(root, pattern).items())]
    if not segments:
        endings = Counter(path.suffix or "no ending" for path in _match(root, "**/*").values())
        if not endings:
            raise UserError(f"{root} holds no files; set data.path to a folder with text")
        held = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(4))
        common = next((ending for ending, _ in endings.most_common() if ending.startswith(".")), "")
        raise UserError(
            f"no file in {root} matches data.pattern={pattern!r} (it holds {held}); "
            f"set data.pattern, for example '**/*{common}'"
        )
    return segments


def _match(root: Path, pattern: str) -> dict[str, Path]:
    try:
        names = {
            path.relative_to(root).as_posix(): path for path in root.glob(pattern) if path.is_file()
        }
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"data.pattern={pattern!r} is not a file name pattern ({error}); use for example "
            "'**/*.txt'"
        ) from error
    except OSError as error:
        raise UserError(f"cannot search {root}: {reason(error)}; check its permissions") from error
    return {
        name: path
        for name, path in names.items()
        if not any(p.startswith(".") for p in name.split("/"))
    }


def _file(path: str | Path, name: str) -> Segment:
    if Path(path).suffix.lower() in _COMPRESSED:
        raise UserError(f"{path} is compressed; unpack it and set data.path to the result")
    return Segment(name, str(path), 0, file_size(path))


def _directory_format(config: Data) -> str:
    root = Path(config.path)
    if _subfolder(root, "train") and _subfolder(root, "validation"):
        return "pg19"
    arrays = any(is_array_file(path) for path in _match(root, "*").values())
    return "images" if arrays and not _match(root, config.pattern) else "text"


def _is_glob(path: str) -> bool:
    return glob.has_magic(path) and not os.path.exists(path)


def _glob_base(pattern: str) -> Path:
    """The fixed folder in front of a glob's first wildcard."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed])
