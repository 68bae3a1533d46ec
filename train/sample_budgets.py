"""Images of a FlexiDiT at several compute budgets, side by side."""

from __future__ import annotations

import dataclasses
import io
import sys
import time
from pathlib import Path
from typing import TextIO

import numpy as np

from .files import write_atomic
from .loaded_flexible import LoadedFlexible, flexible_flops, flexible_segments
from .pictures import image_grid
from .sample_images import classes_of, picture_stem
from .schema import FlexibleSample

GRID = 100  # most images of a budget that are shown


def sample_budgets(
    loaded: LoadedFlexible, sample: FlexibleSample, *, seed: int = 0, out: TextIO | None = None
) -> list[Path]:
    """Draw the same images (seeds and classes) once for each of `sample.budgets`, write one
    picture samples/*-budgets.png and print a table.

    Per budget: the schedule, FLOPs (2 per multiply-add) of an image and their share of the full
    schedule's, and seconds per batch of `sample.rows` images, without compilation.

    Returns:
        The path of the picture.
    """
    out = sys.stdout if out is None else out
    classes = classes_of(sample, loaded.num_classes)
    net, results = loaded.config.net, []
    full = flexible_flops(net, dataclasses.replace(sample, guide="cfg"), 1.0)
    for budget in sample.budgets:
        settings = loaded.settings(sample) | {"budgets": (budget,)}
        pieces = []
        for piece in loaded.stream(classes, seed=seed, **settings):
            pieces.append(piece)
        began = time.perf_counter()
        first = classes[: sample.rows]
        next(loaded.stream(first, seed=seed, **settings))  # compiled by now
        seconds = time.perf_counter() - began
        flops = flexible_flops(net, sample, budget)
        steps = "+".join(f"{s.steps}x p{s.mode}" for s in flexible_segments(net, sample, budget))
        results.append((budget, steps, 2 * flops, flops / full, seconds, np.concatenate(pieces)))
        out.write(
            f"budget {budget:g}: {steps}, {2 * flops / 1e9:.4g} GFLOPs an image "
            f"({flops / full:.0%}), {seconds:.3g} s for {len(first)} images\n"
        )
        out.flush()
    folder, stem = picture_stem(loaded, sample, seed, end="budgets")
    path = folder / f"{stem}.png"
    write_atomic(path, _picture(results, sample.columns))
    out.write(f"{len(classes)} images at {len(results)} budgets: {path}\n")
    return [path]


def _picture(results, columns: int) -> bytes:
    from matplotlib.figure import Figure

    grids = [image_grid(images[:GRID], columns) for *_, images in results]
    height, width = grids[0].shape[:2]
    figure = Figure(figsize=(8, len(grids) * (8 * height / width + 0.5)), layout="constrained")
    for axes, grid, (budget, steps, flops, share, seconds, _) in zip(
        figure.subplots(len(grids), squeeze=False)[:, 0], grids, results
    ):
        axes.imshow(grid, interpolation="nearest")
        axes.set_title(
            f"budget {budget:g}: {steps}; {flops / 1e9:.4g} GFLOPs an image ({share:.0%}), "
            f"{seconds:.3g} s", fontsize=9,
        )  # fmt: skip
        axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
