"""Documents as ranges of bytes: what every source looks like before it becomes tokens.

A *document collection* has

    lengths: [N] int64, bytes per document
    read(i, start, stop) -> [stop - start] uint8, bytes of document i

and nothing else. `ByteDocuments` (here) serves files and in-memory texts, `images.ImageDocuments`
arrays of images. Files are memory-mapped on first use and only a few stay mapped, so a corpus of
tens of thousands of books needs neither its size in memory nor one file descriptor per book.
"""

from __future__ import annotations

import functools
import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..files import write_error

FULL_HASH_BYTES = 64 * 2**20  # up to this total the content hash reads everything
_SAMPLES, _SAMPLE_BYTES = 1024, 16 * 2**10


class Segment(NamedTuple):
    """One document: bytes [start, stop) of the file at path `source`, or of the bytes `source`."""

    name: str
    source: str | bytes
    start: int
    stop: int


@functools.lru_cache(maxsize=64)
def map_bytes(path: str) -> np.ndarray:
    """Memory-maps a non-empty file as [size] uint8, read-only."""
    try:
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {reason(error)}; check the file and its permissions"
        ) from error


def reason(error: OSError) -> str:
    """The operating system's words for an error, without number and path."""
    return error.strerror or str(error)


def file_size(path: str | os.PathLike) -> int:
    """Bytes in a readable file; UserError where it cannot be read."""
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}; check data.path") from error
    if not os.access(path, os.R_OK):
        raise UserError(f"cannot read {path}: permission denied; make it readable (chmod u+r)")
    return size


class ByteDocuments:
    """Documents that are byte ranges of files or of in-memory texts; empty ones are left out."""

    def __init__(self, segments: Sequence[Segment]):
        self.segments = [s for s in segments if s.stop > s.start]
        self.lengths = np.array([s.stop - s.start for s in self.segments], np.int64)

    def read(self, i: int, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of document i as uint8."""
        _, source, offset, end = self.segments[i]
        data = np.frombuffer(source, np.uint8) if isinstance(source, bytes) else map_bytes(source)
        if len(data) < end:
            raise UserError(
                f"{source} has become shorter than when it was opened; start the run again"
            )
        return data[offset + start : offset + stop]


def content_hash(documents) -> str:
    """sha256 over the documents' lengths and bytes.

    Above 64 MiB in total the bytes are 1,024 samples of 16 KiB at even distances instead of
    everything, so that a run on a large corpus starts at once; sizes always count.
    """
    digest = hashlib.sha256(np.asarray(documents.lengths, "<i8").tobytes())
    ends = np.cumsum(documents.lengths)
    total = int(ends[-1]) if len(ends) else 0
    if total <= FULL_HASH_BYTES:
        for i, length in enumerate(documents.lengths):
            digest.update(np.ascontiguousarray(documents.read(i, 0, int(length))))
    else:
        for position in np.linspace(0, total - 1, _SAMPLES).astype(np.int64):
            i = int(np.searchsorted(ends, position, side="right"))
            begin = int(position - (ends[i] - documents.lengths[i]))
            stop = min(begin + _SAMPLE_BYTES, int(documents.lengths[i]))
            digest.update(np.ascontiguousarray(documents.read(i, begin, stop)))
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable) -> None:
    """Calls `write(file)` on a temporary file beside `path` and renames it: all of it or nothing.

    Raises:
        UserError: the disk is full or the path cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
