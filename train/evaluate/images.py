"""Figures of merit of images: of a generator against a reference set, of a tokenizer's
reconstructions against their originals. What cannot be computed is left out and said in `notes`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from ...kernels_pallas.compat import auto_mesh
from ...model.nets.inception import (
    PUBLISHED,
    SIZE,
    InceptionFeatures,
    inception_features,
    inception_from_reference,
)
from ..arrays import read_arrays
from ..errors import UserError
from ..samples.pictures import to_uint8
from .reference import Gaussian, Reference, sha256_of
from .statistics import (
    NEIGHBOURS,
    SCORE_SPLIT,
    SSIM_WINDOW,
    InceptionScore,
    Moments,
    frechet_distance,
    precision_recall,
    psnr,
    ssim,
)

NO_WEIGHTS = f"no Inception weights were given (the published file {PUBLISHED})"
PUBLISHED_COUNT = 50_000


@dataclasses.dataclass(frozen=True)
class Inception:
    """A network ready to run.

    Attributes:
        features: uint8 images [B, H, W, 3], any B, to `InceptionFeatures` of numpy arrays.
        sha256: of the file with the weights.
    """

    features: Callable[[np.ndarray], InceptionFeatures]
    sha256: str


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What figures depend on besides the images; two are comparable if this is equal.

    Attributes:
        num_images: images that were judged.
        image_size: "HxW" of them.
        resize: how images come to the size that Inception reads; "" without Inception.
        inception, reference: SHA-256 of the files; "" without.
        reference_images: images in the reference file; 0 if it has statistics only.
        score_split: images per split of the Inception score.
        neighbours: k of precision and recall.
    """

    num_images: int
    image_size: str
    resize: str = ""
    inception: str = ""
    reference: str = ""
    reference_images: int = 0
    score_split: int = SCORE_SPLIT
    neighbours: int = NEIGHBOURS

    def __str__(self) -> str:
        """One line to print beside the figures."""
        if not self.num_images:
            return "no images were judged"
        parts = [f"{self.num_images:,} images of {self.image_size}"]
        if self.inception:
            parts += [f"resize {self.resize}", f"Inception {self.inception[:12]}"]
            parts += [f"IS over splits of {self.score_split:,}"]
        if self.reference:
            parts += [f"reference {self.reference[:12]} ({self.reference_images:,} images)"]
            parts += [f"k = {self.neighbours}"]
        return ", ".join(parts)


def load_inception(path: str | Path, *, batch_size: int = 64, devices=None) -> Inception:
    """The FID Inception with the weights of a file (.pth, .safetensors or .npz).

    Args:
        path: the published file (see `model/nets/inception.py`), or its arrays in another format.
        batch_size: images at a time over all devices (rounded up to a multiple of their number);
            the last batch is padded, so each image size is compiled once.
        devices: to split batches over; this process's by default.

    Raises:
        UserError: no such file, damaged, or weights of another network.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is not there; name the file of Inception weights, {PUBLISHED}")
    try:
        params = inception_from_reference(read_arrays(path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: {error}") from error
    devices = jax.local_devices() if devices is None else list(devices)
    size = -(-batch_size // len(devices)) * len(devices)
    mesh = auto_mesh((len(devices),), ("data",), devices)
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    params = jax.device_put(params, everywhere)
    run = jax.jit(inception_features, in_shardings=(everywhere, rows))

    def features(images: np.ndarray) -> InceptionFeatures:
        pieces = []
        for start in range(0, len(images), size):
            piece = images[start : start + size]
            padding = [(0, size - len(piece)), (0, 0), (0, 0), (0, 0)]
            out = run(params, jax.device_put(np.pad(piece, padding), rows))
            pieces.append(InceptionFeatures(*(np.asarray(a)[: len(piece)] for a in out)))
        return InceptionFeatures(*map(np.concatenate, zip(*pieces)))

    return Inception(features, sha256_of(path))


def evaluate_generation(
    images: Iterable[np.ndarray],
    *,
    inception: Inception | None,
    reference: Reference | None,
    num_images: int,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Any]:
    """FID, sFID, Inception score, precision and recall of generated images, as ADM's evaluator
    defines them (Dhariwal & Nichol 2021, arXiv 2105.05233, appendix; guided-diffusion).

    Args:
        images: batches [B, H, W, 3] of any B, uint8 or float in [-1, 1]; more than `num_images`
            are not asked for.
        inception: of `load_inception`; None computes nothing and says so, without drawing images.
        reference: of `read_reference`; None leaves the Inception score only. Its statistics are
            preferred to its images for FID and sFID; precision and recall need its images.
        num_images: images to judge; published figures take 50,000.
        batch_size: reference images read at a time.
        progress: show a bar (plain lines where there is no terminal).

    Returns:
        {"fid", "sfid", "inception_score", "precision", "recall"}: floats, those that could be
        computed; "num_images"; "notes": what was left out and why, one line each; "protocol".

    Raises:
        UserError: fewer images than `num_images`, images of several sizes, or a reference made
            with other features.
    """
    if num_images < 2:
        raise UserError(f"{num_images} images are too few to compare; ask for at least 2")
    notes: list[str] = []
    if inception is None:
        notes.append(f"left out fid, sfid, inception_score, precision, recall: {NO_WEIGHTS}")
        return {"num_images": 0, "notes": notes, "protocol": Protocol(0, "")}
    if reference is None:
        notes.append("left out fid, sfid, precision, recall: no reference file was given")
    wants_pool = reference is not None and reference.image_shape is not None
    if reference is not None and not wants_pool:
        notes.append(f"left out precision, recall: {reference.path} holds no images")

    pools: list[np.ndarray] = []
    score, moments, size = InceptionScore(), {}, ""
    batches = _take(map(to_uint8, images), num_images)
    for batch in _bar(batches, num_images, "samples", progress):
        size = _same_size(size, batch)
        features = inception.features(batch)
        _add_moments(moments, features)
        score.add(features.score_logits)
        if wants_pool:
            pools.append(features.pool)
    figures: dict[str, Any] = {}
    if reference is not None:
        wanted, ref_pool = _reference_side(reference, inception, batch_size, progress)
        for kind in ("fid", "sfid"):
            if kind in wanted:
                figures[kind] = _distance(kind, moments[kind], wanted[kind], reference)
            else:
                notes.append(f"left out {kind}: {reference.path} has no statistics for it")
        if ref_pool is not None:
            few = min(num_images, len(ref_pool))
            if few > NEIGHBOURS:
                pool = np.concatenate(pools)
                figures["precision"], figures["recall"] = precision_recall(ref_pool, pool)
            else:
                notes.append(f"left out precision, recall: {few} images are too few")
    figures["inception_score"] = score.value
    if num_images != PUBLISHED_COUNT:
        notes.append(
            f"{num_images:,} images, published figures use {PUBLISHED_COUNT:,}: with fewer, fid "
            "comes out higher and inception_score lower"
        )
    ref_shape = reference.image_shape if wants_pool else None
    if ref_shape and f"{ref_shape[1]}x{ref_shape[2]}" != size:
        notes.append(f"samples are {size}, the reference's images {ref_shape[1]}x{ref_shape[2]}")
    protocol = _protocol(num_images, size, inception, reference)
    return figures | {"num_images": num_images, "notes": notes, "protocol": protocol}


def evaluate_reconstruction(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    inception: Inception | None = None,
    num_images: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """How near reconstructions are to their originals.

    All figures are of 8-bit images, as their files would be: PSNR and SSIM (means over images,
    data range 255), MSE (of values scaled to [0, 1]), and rFID, the Fréchet distance of the two
    sets' Inception features.

    Args:
        pairs: batches (originals, reconstructions), [B, H, W, 3], uint8 or float in [-1, 1].
        inception: of `load_inception`; without it rFID is left out.
        num_images: for the progress bar and a limit; None takes all pairs.
        progress: show a bar (plain lines where there is no terminal).

    Returns:
        {"psnr", "ssim", "mse", "rfid"}: floats, those that could be computed; "num_images",
        "notes", "protocol" as for `evaluate_generation`.

    Raises:
        UserError: no pairs, fewer than `num_images`, or shapes that differ.
    """
    notes: list[str] = []
    if inception is None:
        notes.append(f"left out rfid: {NO_WEIGHTS}")
    sums = dict.fromkeys(("psnr", "ssim", "mse"), 0.0)
    sides: tuple[dict, dict] = ({}, {})
    count, size = 0, ""
    both = (np.stack(_checked_pair(*pair), 1) for pair in pairs)
    for batch in _bar(_take(both, num_images), num_images, "reconstructions", progress):
        originals, copies = batch[:, 0], batch[:, 1]
        size = _same_size(size, originals)
        count += len(batch)
        error = (originals.astype(np.float64) - copies) / 255
        sums["mse"] += float(np.sum(np.mean(error**2, (1, 2, 3))))
        sums["psnr"] += float(np.sum(psnr(originals, copies, 255)))
        if min(batch.shape[2:4]) >= SSIM_WINDOW:
            sums["ssim"] += float(np.sum(ssim(originals, copies, 255)))
        elif "ssim" in sums:
            del sums["ssim"]
            notes.append(f"left out ssim: its window has {SSIM_WINDOW} pixels, images are {size}")
        if inception is not None:
            for side, images in zip(sides, (originals, copies)):
                _add_moments(side, inception.features(images), ("fid",))
    if not count:
        raise UserError("there are no images to reconstruct; the data is empty")
    figures: dict[str, Any] = {name: total / count for name, total in sums.items()}
    if inception is not None and count > 1:
        a, b = (_gaussian(side["fid"]) for side in sides)
        figures["rfid"] = frechet_distance(*a, *b)
    elif inception is not None:
        notes.append("left out rfid: one image has no covariance")
    if "rfid" in figures and count != PUBLISHED_COUNT:
        notes.append(
            f"{count:,} images, published figures use the {PUBLISHED_COUNT:,} of ImageNet's "
            "validation set: with fewer, rfid comes out higher"
        )
    protocol = _protocol(count, size, inception, None)
    return figures | {"num_images": count, "notes": notes, "protocol": protocol}


# ---------------------------------------------------------------- parts


def _reference_side(
    reference: Reference, inception: Inception, batch_size: int, progress: bool
) -> tuple[dict[str, Gaussian], np.ndarray | None]:
    """Statistics by kind, from the file or from its images, and the images' pooled features."""
    wanted = dict(reference.statistics)
    if reference.image_shape is None:
        return wanted, None
    lacking = tuple(kind for kind in ("fid", "sfid") if kind not in wanted)
    pools, moments = [], {}
    batches = reference.images(batch_size)
    for batch in _bar(batches, reference.image_shape[0], "reference", progress):
        features = inception.features(batch)
        _add_moments(moments, features, lacking)
        pools.append(features.pool)
    if reference.image_shape[0] > 1:
        wanted |= {kind: _gaussian(m) for kind, m in moments.items()}
    return wanted, np.concatenate(pools)


def _add_moments(moments: dict, features: InceptionFeatures, kinds=("fid", "sfid")) -> None:
    rows = {"fid": features.pool, "sfid": features.spatial}
    for kind in kinds:
        flat = rows[kind].reshape(len(rows[kind]), -1)
        try:
            moments.setdefault(kind, Moments(flat.shape[1])).add(flat)
        except ValueError as error:
            raise UserError(f"{kind}: {error}") from error


def _gaussian(moments: Moments) -> Gaussian:
    return Gaussian(moments.mean, moments.covariance)


def _distance(kind: str, moments: Moments, wanted: Gaussian, reference: Reference) -> float:
    ours = _gaussian(moments)
    if ours.mean.shape != wanted.mean.shape:
        raise UserError(
            f"{reference.path}: statistics for {kind} have {len(wanted.mean)} features, Inception "
            f"gives {len(ours.mean)}; take a reference file for this network"
        )
    try:
        return frechet_distance(*ours, *wanted)
    except ValueError as error:
        raise UserError(f"{reference.path}: {kind}: {error}") from error


def _protocol(count: int, size: str, inception, reference) -> Protocol:
    shape = reference.image_shape if reference is not None else None
    return Protocol(
        num_images=count,
        image_size=size,
        resize=f"TensorFlow 1 bilinear to {SIZE}x{SIZE}" if inception is not None else "",
        inception=inception.sha256 if inception is not None else "",
        reference=reference.sha256 if reference is not None else "",
        reference_images=shape[0] if shape else 0,
    )


def _checked_pair(original: np.ndarray, copy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if np.shape(original) != np.shape(copy):
        raise UserError(
            f"originals have shape {np.shape(original)}, reconstructions {np.shape(copy)}"
        )
    return to_uint8(original), to_uint8(copy)


def _same_size(known: str, batch: np.ndarray) -> str:
    if batch.ndim != 4 or batch.shape[3] != 3:
        raise UserError(f"expected images [B, H, W, 3], got shape {batch.shape}")
    size = f"{batch.shape[1]}x{batch.shape[2]}"
    if known not in ("", size):
        raise UserError(f"images of {known} and {size} in one evaluation; make them one size")
    return size


def _take(batches: Iterable[np.ndarray], count: int | None) -> Iterator[np.ndarray]:
    """The first `count` rows; stops asking when it has them."""
    taken = 0
    if count == 0:
        return
    for batch in batches:
        batch = batch if count is None else batch[: count - taken]
        taken += len(batch)
        if len(batch):
            yield batch
        if taken == count:
            return
    if count is not None:
        raise UserError(f"{count:,} images were asked for, only {taken:,} came")


def _bar(batches: Iterable[np.ndarray], total: int | None, what: str, show: bool):
    """Yields the batches and counts their rows: a bar on a terminal, else a line now and then."""
    terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=what,
        unit="image",
        disable=not show,
        leave=not terminal,
        delay=1 if terminal else 30,
        mininterval=0.5 if terminal else 30,
        bar_format=None if terminal else "{desc}: {n_fmt} of {total_fmt}, left {remaining}\n",
    ) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
