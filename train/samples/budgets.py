"""Images or videos of a FlexiDiT at several compute budgets, side by side."""

from __future__ import annotations

import dataclasses
import io
import sys
import time
from pathlib import Path
from typing import TextIO

import numpy as np

from ...model.layers.patches import patch_name
from ..files import write_atomic
from ..loaded.flexible import LoadedFlexible, flexible_flops, flexible_segments
from ..schema import FlexibleSample
from .images import picture_stem, write_mp4, write_prompts
from .pictures import image_grid, picture_grid, save_picture

GRID = 100  # most images of a budget that are shown
FILMS = 4  # most videos of a budget whose frames are shown


def sample_budgets(
    loaded: LoadedFlexible, sample: FlexibleSample, *, seed: int = 0, out: TextIO | None = None
) -> list[Path]:
    """Draw the same images (seeds and classes) once for each of `sample.budgets`, write one
    picture samples/*-budgets.png and print a table. Videos also become an animated .gif.

    Per budget: the schedule, FLOPs (2 per multiply-add) of an image and their share of the full
    schedule's, and seconds per batch of `sample.rows` images, without compilation.

    Returns:
        The paths of the picture and, of videos, the animation.
    """
    out = sys.stdout if out is None else out
    wanted = loaded.asked(sample)
    net, results = loaded.config.net, []
    one = f"{'a' if loaded.noun == 'videos' else 'an'} {loaded.noun[:-1]}"
    full = flexible_flops(net, dataclasses.replace(sample, guide="cfg"), 1.0)
    for budget in sample.budgets:
        settings = loaded.settings(sample) | {"budgets": (budget,)}
        pieces = []
        for piece in loaded.stream(wanted, seed=seed, **settings):
            pieces.append(piece)
        began = time.perf_counter()
        next(loaded.stream(wanted, seed=seed, **settings))  # compiled by now
        seconds = time.perf_counter() - began
        flops = flexible_flops(net, sample, budget)
        parts = flexible_segments(net, sample, budget)
        steps = "+".join(f"{part.steps}x p{patch_name(part.mode)}" for part in parts)
        results.append((budget, steps, 2 * flops, flops / full, seconds, np.concatenate(pieces)))
        out.write(
            f"budget {budget:g}: {steps}, {2 * flops / 1e9:.4g} GFLOPs {one} "
            f"({flops / full:.0%}), {seconds:.3g} s for {len(pieces[0])} {loaded.noun}\n"
        )
        out.flush()
    folder, stem = picture_stem(loaded, sample, seed, end="budgets")
    path = folder / f"{stem}.png"
    write_atomic(path, _picture(results, sample.columns, one))
    out.write(
        f"{len(wanted)} {loaded.noun} at {len(results)} budgets, a multiply-add is 2 FLOPs: "
        f"{path}\n"
    )
    prompts = write_prompts(wanted, folder / stem, out)
    if loaded.noun == "images":
        return [path, *prompts]
    grids = [picture_grid(videos[:GRID], sample.columns) for *_, videos in results]
    grid = np.concatenate(grids, axis=1)
    paths = [path, save_picture(grid, folder / stem)]
    out.write(f"moving, the budgets one below the other: {paths[1]}\n")
    return paths + write_mp4(grid, folder / stem, out)


def _picture(results, columns: int, one: str) -> bytes:
    """A grid of images per budget, or of videos their frames, one video in a row."""
    from matplotlib.figure import Figure

    def shown(images):
        if images.ndim == 4:
            return image_grid(images[:GRID], columns)
        videos = images[:FILMS]
        return image_grid(videos.reshape(-1, *videos.shape[2:]), videos.shape[1])

    grids = [shown(images) for *_, images in results]
    height, width = grids[0].shape[:2]
    figure = Figure(figsize=(8, len(grids) * (8 * height / width + 0.5)), layout="constrained")
    for axes, grid, (budget, steps, flops, share, seconds, _) in zip(
        figure.subplots(len(grids), squeeze=False)[:, 0], grids, results
    ):
        axes.imshow(grid, interpolation="nearest")
        axes.set_title(
            f"budget {budget:g}: {steps}; {flops / 1e9:.4g} GFLOPs {one} ({share:.0%}), "
            f"{seconds:.3g} s", fontsize=9,
        )  # fmt: skip
        axes.set_axis_off()
    figure.supxlabel("a multiply-add is 2 FLOPs", fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
