"""`lintime sample` for models of images and videos: grids and single files."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any, TextIO

import jax.numpy as jnp
import numpy as np
import tqdm

from ..data.open import open_split
from ..encoders.tokenizer import LoadedTokenizer
from ..evaluate.reference import write_samples_npz
from ..files import write_atomic
from ..loaded.images import LoadedImages
from ..loaded.wanted import Wanted, slug
from ..schema import ImageSample
from .pictures import (
    image_grid,
    picture_grid,
    save_each,
    save_mp4,
    save_picture,
    save_png,
    to_uint8,
)

GRID = 400  # most images of a grid


_NOT_DRAWN = ("files", "npz", "rows")  # how images are written, and how many are drawn at a time


def _drawn(sample: ImageSample) -> dict[str, Any]:
    """The settings that pictures depend on."""
    return {k: v for k, v in dataclasses.asdict(sample).items() if k not in _NOT_DRAWN}


def _changed(sample: ImageSample, usual: ImageSample) -> list[str]:
    """Settings other than the run's own as parts of a file name: guidance and two more by name and
    value, the rest as a hash.
    """
    usual = _drawn(usual)
    values = {k: v for k, v in _drawn(sample).items() if v != usual[k]}
    names = sorted(values, key=lambda k: k != "guidance")
    parts = []
    for name in names:
        value = values[name]
        text = ",".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
        if name == "text":
            text = f"-{slug(text, 19)}"
        parts.append(f"{name}{text}".removesuffix(".0"))
    if len(parts) <= 3 and all(len(part) <= 24 for part in parts):
        return parts
    digest = hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:8]
    return [*(part for part in parts if part.startswith("guidance")), digest]


def picture_stem(
    loaded: LoadedImages, sample: ImageSample, seed: int, *, end: str = ""
) -> tuple[Path, str]:
    """Folder and name, without its suffix, of pictures drawn with `sample`; `end` closes it."""
    folder = Path(loaded.path or ".") / "samples"
    parts = [f"step{loaded.step:08d}-seed{seed}", *_changed(sample, loaded.config.sample)]
    settings = {
        "step": loaded.step, "seed": seed, "sample": _drawn(sample),
        "precision": dataclasses.asdict(loaded.config.precision),
        "decoder": loaded.decoder_print,
    }  # fmt: skip
    if captions := getattr(loaded.config.data, "text", ""):
        settings["captions"] = captions
    return folder, _stem(folder, "-".join([*parts, *filter(None, [end])]), settings)


def _stem(folder: Path, stem: str, settings: dict[str, Any]) -> str:
    """`stem`, numbered where files of that name were drawn with other settings.

    A .json file beside the pictures holds all settings, so that the same command writes the same
    files again and another one never writes over them.
    """
    text, number, name = json.dumps(settings, indent=2) + "\n", 1, stem
    while (beside := folder / f"{name}.json").exists() or any(
        (folder / f"{name}.{kind}").exists() for kind in ("png", "gif")
    ):
        if beside.exists() and beside.read_text() == text:
            return name
        number += 1
        name = f"{stem}-{number}"
    write_atomic(beside, text)
    return name


def sample_classes(
    loaded: LoadedImages, sample: ImageSample, *, seed: int = 0, out: TextIO | None = None
) -> list[Path]:
    """Draw images by class or text and write samples/*.png: a grid, and single files if asked for.
    Videos become animated .gif files, and their grid also an .mp4 where imageio-ffmpeg is
    installed. Prompts are written to a .txt beside the grid, a line for each image.

    Args:
        loaded: the run. sample: what to draw. seed: of the draws. out: where paths are printed.

    Returns:
        Paths of the files, the grid (of the first images) first.
    """
    out = sys.stdout if out is None else out
    wanted = loaded.asked(sample)
    settings = loaded.settings(sample)
    folder, stem = picture_stem(loaded, sample, seed)
    names = [f"{stem}-{i:05d}-{wanted.word(i)}" for i in range(len(wanted))]
    kept: list[np.ndarray] = []

    def drawn():
        """Pieces as they are drawn; single files are written at once, the first are kept."""
        done = 0
        with tqdm.tqdm(
            total=len(wanted),
            unit=loaded.noun,
            desc="sampling",
            disable=not out.isatty(),
            file=out,
        ) as bar:
            for piece in loaded.stream(wanted, seed=seed, **settings):
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
        write_samples_npz(paths[0], drawn(), wanted.classes, count=len(wanted))
    else:
        collections.deque(drawn(), maxlen=0)
    grid = picture_grid(np.concatenate(kept), sample.columns)
    paths.insert(0, save_picture(grid, folder / stem))
    kind = paths[0].suffix
    out.write(f"{len(wanted)} {loaded.noun}: {paths[0]}\n")
    for path in paths[1:]:
        out.write(f"as arrays: {path}\n")
    paths += write_prompts(wanted, folder / stem, out)
    paths += write_mp4(grid, folder / stem, out)
    if sample.files:
        out.write(f"one by one: {folder}/{stem}-*{kind}\n")
        paths += [folder / f"{name}{kind}" for name in names]
    out.flush()
    return paths


def write_prompts(wanted: Wanted, stem: Path, out: TextIO) -> list[Path]:
    """The prompts as a .txt file, one in a line; nothing for images by class."""
    if wanted.prompts is None:
        return []
    path = stem.with_name(f"{stem.name}.txt")
    write_atomic(path, "".join(f"{' '.join(text.split())}\n" for text in wanted.prompts))
    out.write(f"of the prompts in {path}\n")
    return [path]


def write_mp4(grid: np.ndarray, stem: Path, out: TextIO) -> list[Path]:
    """A grid of videos [F, H, W, 3] as an .mp4 file too, or one line that says why not; nothing for
    images."""
    if grid.ndim == 3:
        return []
    path = save_mp4(grid, stem)
    out.write(f"as MP4: {path}\n" if path else "no MP4: install imageio-ffmpeg to have one\n")
    return [path] if path else []


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
    folder = Path(loaded.path or ".") / "samples"
    stem = _stem(
        folder,
        f"step{loaded.step:08d}-reconstructions",
        {
            "step": loaded.step, "images": len(images), "columns": columns,
            "data": dataclasses.asdict(loaded.config.data),
            "precision": dataclasses.asdict(loaded.config.precision),
        },
    )  # fmt: skip
    path = folder / f"{stem}.png"
    save_png(image_grid(np.concatenate(rows), columns), path)
    out.write(f"images and their reconstructions below them: {path}\n")
    return [path]
