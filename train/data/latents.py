"""Posterior moments of images, made once by `lintime prepare latents`: what is in their folder (see
`encoded`), and batches of it. An image's view is [h, w, 2 C] float16, C means, then C log
variances: training draws fresh noise in every epoch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import UserError
from ..schema import LatentData
from .encoded import EncodedDataset, EncodedInfo, EncodedReader, open_encoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsInfo(EncodedInfo):
    """What is in a latents folder.

    Attributes:
        autoencoder: fingerprint of the autoencoder that made the latents.
        latent_channels: C.
        scaling_factor: of the autoencoder; what is stored is not scaled.
    """

    autoencoder: str
    latent_channels: int
    scaling_factor: float

    KIND: ClassVar[str] = "latents"
    MAKER: ClassVar[str] = "autoencoder"
    ARGUMENTS: ClassVar[str] = "IMAGES --autoencoder FILE --out DIR"

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(h, w, 2 C)."""
        return *self.grid, 2 * self.latent_channels

    @property
    def dtype(self) -> np.dtype:
        """float16."""
        return np.dtype("<f2")

    def check(self, encoded: np.ndarray) -> None:
        """Moments [N, h, w, 2 C] are finite; see EncodedInfo."""
        if encoded.shape[1:] != self.row_shape:
            raise ValueError(
                f"the autoencoder gave moments of shape {encoded.shape[1:]}, not {self.row_shape}"
            )
        if not np.isfinite(encoded).all():
            raise UserError(
                "the autoencoder gave moments that are not finite in float16; its weights are "
                "damaged, or not of this layout"
            )

    def identity(self) -> dict[str, Any]:
        """Autoencoder and size of a latent."""
        return {"autoencoder": self.autoencoder, "latent_channels": self.latent_channels}


class LatentReader(EncodedReader):
    """See EncodedReader."""

    def fields(self, arrays: np.ndarray) -> dict[str, np.ndarray]:
        """mean, logvar [R, h, w, C] float32."""
        mean, logvar = np.split(arrays.astype(np.float32), 2, axis=-1)
        return {"mean": mean, "logvar": logvar}


class LatentDataset(EncodedDataset):
    """Batches of the posteriors of one split (see EncodedDataset) with mean, logvar: [R, h, w, C]
    float32, not scaled. Made by `open_latent_data`.

    Attributes:
        autoencoder, scaling_factor, shape: who made the latents, by what to multiply a draw, and
            (h, w, C): a net and a decoder must agree with them.
    """

    def __init__(self, reader: LatentReader, *, fingerprint: dict, workers: int):
        super().__init__(reader, fingerprint=fingerprint, workers=workers)
        self.autoencoder, self.scaling_factor = self.info.autoencoder, self.info.scaling_factor
        self.shape = (*self.grid, self.info.latent_channels)


def open_latent_data(
    config: LatentData, folder: str | Path, *, split: str, seed: int, batch_size: int
) -> LatentDataset:
    """Opens one split of a latents folder; arguments and errors as of `encoded.open_encoded`."""
    return open_encoded(
        config, folder, kind=LatentsInfo, reader=LatentReader, dataset=LatentDataset, split=split,
        seed=seed, batch_size=batch_size,
    )  # fmt: skip
