"""Opening the data of a run, whatever its kind."""

from __future__ import annotations

from pathlib import Path

from ..schema import CodeData, ImageData, LatentData, Run, VideoData
from .dataset import open_data
from .image_sources import find_image_splits
from .text_features import add_text


def open_split(run: Run, split: str, run_dir: str | Path, encoded: str | Path | None = None):
    """One split of a run's data: batches that are a pure function of (seed, step, row).

    Args:
        run: the config. split: "train", "validation" or "test".
        run_dir: holds the caches.
        encoded: folder of codes or latents, for `CodeData` and `LatentData`.

    Returns:
        `LMDataset`, `ImageDataset`, `VideoDataset`, `CodeDataset` or `LatentDataset`; all have
        fingerprint, num_batches, batch, iterate and description. With `data.text` batches hold
        the features of captions (see `text_features.add_text`).

    Raises:
        UserError: whatever the user can mend.
    """
    seed = run.seed if split == "train" else 0
    common = dict(split=split, seed=seed, batch_size=run.batch_size)
    if isinstance(run.data, ImageData):
        from .image_dataset import open_image_data

        dataset = open_image_data(run.data, **common)
        if not run.data.text:
            return dataset
        sources = {name: found.fingerprint for name, found in find_image_splits(run.data).items()}
        return add_text(dataset, run.data.text, split, sources)
    if isinstance(run.data, VideoData):
        from .videos import open_video_data

        return open_video_data(run.data, **common)
    if isinstance(run.data, CodeData):
        from .codes import open_code_data

        return open_code_data(run.data, encoded, **common)
    if isinstance(run.data, LatentData):
        from .latents import open_latent_data

        dataset = open_latent_data(run.data, encoded, **common)
        if not run.data.text:
            return dataset
        return add_text(dataset, run.data.text, split, dataset.info.source)
    return open_data(run.data, cache=Path(run_dir) / "cache", **common)
