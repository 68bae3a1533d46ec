"""Opening the data of a run, whatever its kind."""

from __future__ import annotations

from pathlib import Path

from ..schema import CodeData, ImageData, Run
from .dataset import open_data


def open_split(run: Run, split: str, run_dir: str | Path, codes: str | Path | None = None):
    """One split of a run's data: batches that are a pure function of (seed, step, row).

    Args:
        run: the config. split: "train", "validation" or "test".
        run_dir: holds the caches.
        codes: folder of codes, for `CodeData`.

    Returns:
        `LMDataset`, `ImageDataset` or `CodeDataset`; all have fingerprint, num_batches, batch,
        iterate and description.

    Raises:
        UserError: whatever the user can mend.
    """
    seed = run.seed if split == "train" else 0
    common = dict(split=split, seed=seed, batch_size=run.batch_size)
    if isinstance(run.data, ImageData):
        from .image_dataset import open_image_data

        return open_image_data(run.data, **common)
    if isinstance(run.data, CodeData):
        from .codes import open_code_data

        return open_code_data(run.data, codes, **common)
    return open_data(run.data, cache=Path(run_dir) / "cache", **common)
