"""Reference sets and sample sets as .npz files in the layout of ADM's evaluator (guided-diffusion,
`evaluations/`): samples are `arr_0`, uint8 [N, H, W, 3]; a reference set holds such images, or
statistics of Inception features, or both (`VIRTUAL_imagenet256_labeled.npz`: 10,000 images for
precision and recall, statistics of the whole training set for FID and sFID).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..files import write_error

IMAGES, LABELS = "arr_0", "arr_1"
# Names of mean and covariance: of the pooled features (FID) and of the spatial ones (sFID).
STATISTICS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}
_LAYOUT = (
    f"a reference or sample file holds images {IMAGES} (uint8 [N, H, W, 3]), or statistics mu "
    "[D] and sigma [D, D] with mu_s and sigma_s for sFID"
)


class Gaussian(NamedTuple):
    """mean [D], covariance [D, D], float64."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a file offers.

    Attributes:
        path, sha256: the file.
        image_shape: (N, H, W, 3) of its images, or None.
        statistics: {"fid": Gaussian, "sfid": Gaussian}, those that are in the file.
    """

    path: Path
    sha256: str
    image_shape: tuple[int, int, int, int] | None
    statistics: dict[str, Gaussian]

    def images(self, batch_size: int) -> Iterator[np.ndarray]:
        """Its images in order, uint8 [B, H, W, 3]; the last batch may be smaller. They are read
        as they are wanted, never all at once."""
        yield from read_images(self.path, batch_size)


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's content.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read_reference(path: str | Path) -> Reference:
    """Opens an .npz file of images, statistics or both; arrays are found by name, others ignored.

    Raises:
        UserError: no such file, no .npz, or arrays that are not those of the layout.
    """
    path = Path(path)
    with _archive(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        shape = _image_header(archive, path)[0] if IMAGES in names else None
        statistics = {}
        for kind, (mean, covariance) in STATISTICS.items():
            present = {mean, covariance} & names
            if len(present) == 1:
                raise UserError(f"{path} has {present.pop()} but not both of {mean}, {covariance}")
            if present:
                arrays = Gaussian(_array(archive, path, mean), _array(archive, path, covariance))
                _check_statistics(arrays, path, mean, covariance)
                statistics[kind] = arrays
    if shape is None and not statistics:
        found = ", ".join(sorted(names)[:6]) or "nothing"
        raise UserError(f"{path} holds {found}; {_LAYOUT}")
    return Reference(path, sha256_of(path), shape, statistics)


def read_images(path: str | Path, batch_size: int) -> Iterator[np.ndarray]:
    """`arr_0` of an .npz file in batches, uint8 [B, H, W, 3], without reading all of it at once.

    Raises:
        UserError: no such file, no .npz, no such images in it, or it ends too early.
    """
    path = Path(path)
    with _archive(path) as archive:
        shape, stream = _image_header(archive, path)
        with stream:
            size = int(np.prod(shape[1:]))
            for start in range(0, shape[0], batch_size):
                count = min(batch_size, shape[0] - start)
                data = stream.read(count * size)
                if len(data) < count * size:
                    raise UserError(f"{path} ends within its {shape[0]:,} images; fetch it again")
                yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])


def write_samples_npz(
    path: str | Path,
    images: np.ndarray | Iterable[np.ndarray],
    labels: np.ndarray | None = None,
    *,
    count: int | None = None,
) -> int:
    """Writes a file that ADM's evaluator reads: `arr_0` = images and, if given, `arr_1` = labels.

    Args:
        path: file to write; it appears when it is complete.
        images: uint8 [N, H, W, 3], or batches of such, written as they come.
        labels: integers [N].
        count: N; needed for batches, whose number is not known when the file begins. Further
            images are not written.

    Returns:
        N.

    Raises:
        UserError: images that are no such arrays, fewer than `count`, labels of another number,
            or the file cannot be written.
    """
    path = Path(path)
    if isinstance(images, np.ndarray):
        images, count = [images], len(images) if count is None else count
    if count is None or count < 1:
        raise UserError(f"the number of images to write must be at least 1, got {count}")
    if labels is not None and np.shape(labels) != (count,):
        raise UserError(f"{count:,} images need as many labels, got shape {np.shape(labels)}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as stream:
                _write_images(stream, images, count, path)
            if labels is not None:
                with archive.open(f"{LABELS}.npy", "w") as stream:
                    np.lib.format.write_array(stream, np.asarray(labels, np.int64))
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):  # not there: it was renamed, or never came to be
            temporary.unlink()
    return count


def _write_images(stream, images: Iterable[np.ndarray], count: int, path: Path) -> None:
    written, shape = 0, None
    for batch in images:
        batch = np.asarray(batch)
        shape = shape or batch.shape[1:]
        good = batch.dtype == np.uint8 and batch.ndim == 4 and batch.shape[1:] == shape
        if not good or shape[2] != 3:
            raise UserError(
                f"samples for {path} must be uint8 [N, H, W, 3] of one size, got {batch.dtype} "
                f"{batch.shape}"
            )
        if not written:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(stream, header)
        batch = batch[: count - written]
        stream.write(np.ascontiguousarray(batch).data)
        written += len(batch)
        if written == count:
            return
    raise UserError(f"{path} was to hold {count:,} images, only {written:,} came")


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The open file; whatever goes wrong within it is a UserError."""
    if not path.is_file():
        raise UserError(f"{path} is not there; name an .npz file: {_LAYOUT}")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, zlib.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot read {path} ({reason}); it is damaged or no .npz file: {_LAYOUT}"
        ) from error


def _image_header(archive: zipfile.ZipFile, path: Path):
    """((N, H, W, 3), stream at the first image)."""
    if f"{IMAGES}.npy" not in archive.namelist():
        raise UserError(f"{path} holds no images {IMAGES}; {_LAYOUT}")
    stream = archive.open(f"{IMAGES}.npy")
    shape, fortran, dtype = _header(stream)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or 0 in shape:
        raise UserError(
            f"{path}: {IMAGES} is {dtype} {shape}{' in Fortran order' if fortran else ''}, "
            "expected uint8 [N, H, W, 3]"
        )
    return shape, stream


def _header(stream):
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"arrays of version {version} are not known")
    return read[version](stream)


def _array(archive: zipfile.ZipFile, path: Path, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
    if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
        raise UserError(f"{path}: {name} is not an array of finite floating-point numbers")
    return array.astype(np.float64)


def _check_statistics(arrays: Gaussian, path: Path, mean: str, covariance: str) -> None:
    dim = arrays.mean.size
    if arrays.mean.shape != (dim,) or arrays.covariance.shape != (dim, dim):
        raise UserError(
            f"{path}: {mean} has shape {arrays.mean.shape} and {covariance} "
            f"{arrays.covariance.shape}, expected [D] and [D, D]"
        )
