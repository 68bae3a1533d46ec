"""Images of a distilled net beside its teacher's and those of every step on the way."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import jax
import numpy as np

from ...model.nets.dit import DiTConfig
from ...model.nets.replace_mixer import mixer_name, replace_mixers
from ..config_files import read_config
from ..data.open import open_split
from ..evaluate import make_evaluator
from ..files import write_atomic
from ..loaded.diffusion import LoadedDiffusion
from ..loaded.load import load
from ..mesh import make_mesh
from ..prepare.encoding import encoded_dir
from ..schema import DiffusionSample, Distill, Mesh, Run
from ..stages import resolve
from ..state import TrainState
from ..tasks.distill import new_mixers, same_mixers
from ..tasks.table import make_task
from .images import picture_stem
from .pictures import image_grid

GRID, COLUMNS = 40, 10  # most images of a net, and in a row
FILMS = 4  # most videos of a net whose frames are shown
BATCHES = 20  # most validation batches of the losses


def sample_distilled(
    loaded: LoadedDiffusion, sample: DiffusionSample, *, seed: int = 0, out: TextIO | None = None
) -> Path:
    """Draw the same images (seeds and classes) with the teacher, with the student right after its
    mixers were replaced, and after every run of distillation up to this one; write one picture
    samples/*-distilled.png with the validation loss of each below it, and print the losses.

    Args:
        loaded: a run that was distilled. sample: what to draw. seed: of the draws.
        out: where lines are printed.

    Returns:
        The path of the picture.

    Raises:
        UserError: the teacher or the validation data are not there any more.
    """
    out = sys.stdout if out is None else out
    run, path = loaded.config, loaded.path
    wanted = loaded.asked(dataclasses.replace(sample, count=min(sample.count or GRID, GRID)))
    data = open_split(run, "validation", path, encoded_dir(run, path))
    results = []
    for title, model in _models(loaded):
        images = np.concatenate(list(model.stream(wanted, seed=seed, **model.settings(sample))))
        results.append((title, images, _loss(model, data)))
        out.write(f"{title}: loss {results[-1][2]:.4g}\n")
        out.flush()
    folder, stem = picture_stem(loaded, sample, seed, end="distilled")
    where = folder / f"{stem}.png"
    write_atomic(where, _picture(results, min(sample.columns or COLUMNS, COLUMNS)))
    out.write(f"the same {loaded.noun} by teacher and student: {where}\n")
    return where


def _models(loaded: LoadedDiffusion) -> Iterator[tuple[str, LoadedDiffusion]]:
    """(what it is, net): one at a time, for each may be large."""
    place = Path(resolve(loaded.config.distill.teacher, loaded.path)).expanduser()
    mixer = read_config(place / "config.json").net.mixer
    yield f"teacher ({mixer})", load(place)
    later: list[tuple[str, Callable[[], LoadedDiffusion]]] = []
    run, path, step = loaded.config, loaded.path, loaded.step
    open_run: Callable[[], LoadedDiffusion] = lambda: loaded
    while True:
        how = "layer by layer" if run.distill.layers else "end to end"
        later.insert(0, (f"{how}, {step} updates", open_run))
        before = Path(resolve(run.init_from, path)).expanduser() if run.init_from else None
        if before is None or not (before / "config.json").is_file():
            break
        start = read_config(before / "config.json")
        if not start.distill.teacher:
            if isinstance(start.net, DiTConfig) and not same_mixers(start.net, run.net):
                yield f"{run.net.mixer} in its place", _replaced(load(before), run, path)
            break
        run, path = start, before
        step = run.steps
        open_run = lambda before=before: load(before)
    for title, make in later:
        yield title, make()


def _replaced(teacher: LoadedDiffusion, run: Run, path: Path) -> LoadedDiffusion:
    """The net of `run` before its first update."""
    fresh = jax.jit(lambda key: new_mixers(run, key))(jax.random.key(run.seed))
    fresh = {"blocks": {mixer_name(run.net): fresh}}
    params = replace_mixers(teacher.params, fresh, teacher.config.net, run.net)
    config = dataclasses.replace(run, distill=Distill())
    return LoadedDiffusion(config, params, {}, path=path, data_fingerprint=teacher.data_fingerprint)


def _loss(model: LoadedDiffusion, data) -> float:
    """The validation loss of the process, on this process's first device."""
    run = dataclasses.replace(model.config, distill=Distill())
    mesh = make_mesh(Mesh(), jax.local_devices()[:1])
    batches = min(run.eval.batches or BATCHES, BATCHES)
    evaluate = make_evaluator(make_task(run), data, mesh, run.batch_size, batches)
    return evaluate(TrainState(None, model.params, {}, {}, {}, {}))["loss"]


def _picture(results: list[tuple[str, np.ndarray, float]], columns: int) -> bytes:
    """Grids of images, or of the frames of videos, one video in a row, side by side."""
    from matplotlib.figure import Figure

    def shown(images):
        if images.ndim == 4:
            return image_grid(images, columns)
        videos = images[:FILMS]
        return image_grid(videos.reshape(-1, *videos.shape[2:]), videos.shape[1])

    grids = [shown(images) for _, images, _ in results]
    height, width = grids[0].shape[:2]
    figure = Figure(figsize=(4 * len(grids), 4 * height / width + 0.8), layout="constrained")
    for axes, grid, (title, _, loss) in zip(figure.subplots(1, len(grids)), grids, results):
        axes.imshow(grid, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"validation loss {loss:.4g}", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
