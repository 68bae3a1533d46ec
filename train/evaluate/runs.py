"""What `lintime eval` computes of image runs besides their loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..data.batches import pick, row_uniforms
from ..data.open import open_split
from ..encoders.tokenizer import LoadedTokenizer
from ..loaded.images import LoadedImages
from ..mesh import local_rows, make_mesh, put_batch
from ..schema import Run
from .images import evaluate_generation, evaluate_reconstruction, load_inception
from .reference import read_reference


def image_figures(loaded, run: Run, split: str, seed: int = 0) -> dict[str, Any]:
    """Figures of reconstruction (a tokenizer) or generation (a class-conditional model).

    Generation draws `eval.samples` images of uniformly random classes with the settings of
    `sample`, as the published protocols do; with eval.samples = 0 there is nothing to judge.

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
        note = (
            "set eval.samples=N eval.inception=FILE eval.reference=FILE for FID and its relatives"
        )
        return {"notes": [note], "protocol": ""}
    inception = load_inception(run.eval.inception) if run.eval.inception else None
    if not draws:
        return evaluate_reconstruction(_pairs(loaded, run, split), inception=inception)
    reference = read_reference(run.eval.reference) if run.eval.reference else None
    uniform = row_uniforms(seed, 0, np.arange(run.eval.samples), 1)[:, 0]
    classes = [pick(u, loaded.num_classes) for u in uniform]
    images = loaded.stream(classes, seed=seed, **loaded.settings(run.sample))
    return evaluate_generation(
        images, inception=inception, reference=reference, num_images=run.eval.samples
    )


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
