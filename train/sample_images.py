"""`lintime sample` for image models: grids and single files."""

from __future__ import annotations

import collections
import sys
from pathlib import Path
from typing import TextIO

import jax.numpy as jnp
import numpy as np
import tqdm

from .data.open import open_split
from .evaluate.reference import write_samples_npz
from .loaded_images import LoadedImages
from .pictures import image_grid, save_each, save_png, to_uint8
from .schema import ImageSample
from .tokenizer import LoadedTokenizer

GRID = 400  # most images of a grid


def classes_of(sample: ImageSample, num_classes: int) -> list[int]:
    """The class of each image to draw: `sample.classes` (or all) in turn."""
    classes = sample.classes or tuple(range(num_classes))
    return [classes[i % len(classes)] for i in range(sample.count or len(classes))]


def sample_classes(
    loaded: LoadedImages, sample: ImageSample, *, seed: int = 0, out: TextIO | None = None
) -> list[Path]:
    """Draw images by class and write samples/*.png: a grid, and single files if asked for.

    Args:
        loaded: the run. sample: what to draw. seed: of the draws. out: where paths are printed.

    Returns:
        Paths of the files, the grid (of the first images) first.
    """
    out = sys.stdout if out is None else out
    classes = classes_of(sample, loaded.num_classes)
    settings = loaded.settings(sample)
    folder = Path(loaded.path or ".") / "samples"
    stem = f"step{loaded.step:08d}-seed{seed}"
    names = [f"{stem}-{i:05d}-class{c}" for i, c in enumerate(classes)]
    kept: list[np.ndarray] = []

    def drawn():
        """Pieces as they are drawn; single files are written at once, the first are kept."""
        done = 0
        with tqdm.tqdm(
            total=len(classes), unit="images", desc="sampling", disable=not out.isatty(), file=out
        ) as bar:
            for piece in loaded.stream(classes, seed=seed, **settings):
                if sample.files:
                    save_each(piece, folder, names[done : done + len(piece)])
                if done < GRID:
                    kept.append(piece[: GRID - done])
                done += len(piece)
                bar.update(len(piece))
                yield piece

    paths = []
    if sample.npz:
        paths.append(folder / f"{stem}.npz")
        write_samples_npz(paths[0], drawn(), np.asarray(classes), count=len(classes))
    else:
        collections.deque(drawn(), maxlen=0)
    paths.insert(
        0, save_png(image_grid(np.concatenate(kept), sample.columns), folder / f"{stem}.png")
    )
    out.write(f"{len(classes)} images: {paths[0]}\n")
    for path in paths[1:]:
        out.write(f"as arrays: {path}\n")
    if sample.files:
        out.write(f"one by one: {folder}/{stem}-*.png\n")
        paths += [folder / f"{name}.png" for name in names]
    out.flush()
    return paths


def sample_reconstructions(
    loaded: LoadedTokenizer, sample: ImageSample, *, seed: int = 0, out: TextIO | None = None
) -> list[Path]:
    """Write validation images above their reconstructions as one grid."""
    del seed  # nothing is drawn
    out = sys.stdout if out is None else out
    data = open_split(loaded.config, "validation", loaded.path or ".")
    batch = data.batch(0, np.arange(min(sample.count or 16, loaded.config.batch_size)))
    images = batch["images"][batch["valid"]]
    again = loaded.decode(loaded.encode(jnp.asarray(images)))
    columns = min(sample.columns or 8, len(images))
    rows = []
    for at in range(0, len(images), columns):
        for part in (images, again):
            part = to_uint8(part[at : at + columns])
            missing = columns - len(part)
            rows.append(np.pad(part, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=255))
    path = Path(loaded.path or ".") / "samples" / f"step{loaded.step:08d}-reconstructions.png"
    save_png(image_grid(np.concatenate(rows), columns), path)
    out.write(f"images and their reconstructions below them: {path}\n")
    return [path]
