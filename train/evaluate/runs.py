"""What `lintime eval` computes of image runs besides their loss."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..data.batches import pick, row_uniforms
from ..data.open import open_split
from ..encoders.tokenizer import LoadedTokenizer
from ..loaded.diffusion import LoadedDiffusion
from ..loaded.images import LoadedImages
from ..mesh import local_rows, make_mesh, put_batch
from ..schema import Run
from .clip_score import ClipMeter, load_clip
from .images import evaluate_generation, evaluate_reconstruction, load_inception
from .reference import read_reference


def image_figures(loaded, run: Run, split: str, seed: int = 0) -> dict[str, Any]:
    """Figures of reconstruction (a tokenizer) or generation (a class-conditional model).

    Generation draws `eval.samples` images with the settings of `sample`: of uniformly random
    classes, as the published protocols do, or of texts, as `sample` asks for (the captions of the
    validation images, unless it has prompts). With eval.samples = 0 there is nothing to judge.
    Images of texts have a CLIP score too, where eval.clip names weights.

    Args:
        loaded: the run. run: its config with the user's changes. split: of reconstruction.
        seed: of classes and draws.

    Returns:
        Figures by name, "notes" and "protocol" (see `evaluate_generation`); {} for other runs.

    Raises:
        UserError: files that are missing or hold something else.
    """
    if not isinstance(loaded, LoadedImages | LoadedTokenizer):
        return {}
    draws = isinstance(loaded, LoadedImages)
    if draws and not run.eval.samples:
        notes = [
            "set eval.samples=N eval.inception=FILE eval.reference=FILE for FID and its relatives"
        ]
        if _reads_text(loaded):
            notes.append("set eval.samples=N eval.clip=DIR for the CLIP score")
        return {"notes": notes, "protocol": ""}
    clip = load_clip(run.eval.clip) if run.eval.clip else None
    inception = load_inception(run.eval.inception) if run.eval.inception else None
    if not draws:
        return evaluate_reconstruction(_pairs(loaded, run, split), inception=inception)
    reference = read_reference(run.eval.reference) if run.eval.reference else None
    if _reads_text(loaded):
        wanted = loaded.asked(dataclasses.replace(run.sample, count=run.eval.samples))
    else:
        uniform = row_uniforms(seed, 0, np.arange(run.eval.samples), 1)[:, 0]
        wanted = loaded.wanted([pick(u, loaded.num_classes) for u in uniform])
    images = loaded.stream(wanted, seed=seed, **loaded.settings(run.sample))
    if clip is not None:
        images = _scored(images, meter := ClipMeter(clip), wanted.prompts)
    figures = evaluate_generation(
        images, inception=inception, reference=reference, num_images=run.eval.samples
    )
    if clip is not None:
        collections.deque(images, maxlen=0)  # nobody has asked for them without Inception
        score = meter.score()
        figures |= {"clip_score": score.score}
        if inception is None:  # who judged is said below
            figures |= {"num_images": score.count, "protocol": ""}
        figures["notes"].append(
            f"clip_score: {score.count:,} pairs, images seen at {score.size}x{score.size}, CLIP "
            f"{score.clip[:12]}"
        )
    elif _reads_text(loaded):
        figures["notes"].append("left out clip_score: no CLIP weights were given (--clip DIR)")
    return figures


def _reads_text(loaded) -> bool:
    return isinstance(loaded, LoadedDiffusion) and loaded.texts is not None


def _scored(images, meter: ClipMeter, prompts: Sequence[str]) -> Iterator[np.ndarray]:
    """The images, seen by the meter on their way."""
    waiting = iter(prompts)
    for piece in images:
        for image in piece:
            meter.add(image, next(waiting))
        yield piece


def _pairs(loaded: LoadedTokenizer, run: Run, split: str) -> Iterator[tuple]:
    """(originals, reconstructions), batch by batch, on all devices."""
    data = open_split(run, split, loaded.path or ".")
    mesh = make_mesh(run.mesh)
    rows = local_rows(mesh, run.batch_size)
    count = min(run.eval.batches or data.num_batches, data.num_batches)
    for number, batch in enumerate(data.iterate(0, rows, count)):
        images = put_batch({"images": batch["images"]}, number, mesh, run.batch_size)["images"]
        again = np.asarray(loaded.decode(loaded.encode(images)))
        yield batch["images"][batch["valid"]], again[batch["valid"]]
