"""Token codes of images, made once by `lintime prepare codes`: what is in their folder (see
`encoded`), and batches of it. An image's view is T = h * w codes in raster order.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..schema import CodeData
from .encoded import EncodedDataset, EncodedInfo, EncodedReader, open_encoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodesInfo(EncodedInfo):
    """What is in a codes folder.

    Attributes:
        tokenizer: fingerprint of the tokenizer that made the codes.
        codebook_size: codes are 0..codebook_size-1.
    """

    tokenizer: str
    codebook_size: int

    KIND: ClassVar[str] = "codes"
    MAKER: ClassVar[str] = "tokenizer"
    ARGUMENTS: ClassVar[str] = "IMAGES --tokenizer RUN --out DIR"

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(T,)."""
        return (math.prod(self.grid),)

    @property
    def dtype(self) -> np.dtype:
        """uint16, or int32 where the codebook is larger."""
        return np.dtype("<u2" if self.codebook_size <= 2**16 else "<i4")

    def check(self, encoded: np.ndarray) -> None:
        """Codes [N, h, w] are those of the codebook; see EncodedInfo."""
        low, high = encoded.min(), encoded.max()
        if encoded.shape[1:] != self.grid or low < 0 or high >= self.codebook_size:
            raise ValueError(
                f"the tokenizer gave codes {low}..{high} of shape {encoded.shape[1:]}, not "
                f"0..{self.codebook_size - 1} of {self.grid}"
            )

    def identity(self) -> dict[str, Any]:
        """Tokenizer and size of its codebook."""
        return {"tokenizer": self.tokenizer, "codebook_size": self.codebook_size}


class CodeReader(EncodedReader):
    """See EncodedReader."""

    def fields(self, arrays: np.ndarray) -> dict[str, np.ndarray]:
        """codes [R, T] int32."""
        return {"codes": arrays.astype(np.int32)}


class CodeDataset(EncodedDataset):
    """Batches of the codes of one split (see EncodedDataset) with codes: [R, T] int32 in raster
    order. Made by `open_code_data`.

    Attributes:
        tokenizer, codebook_size, grid, num_tokens: who made the codes, V, (h, w) and T = h * w: a
            net and a decoder must agree with them.
    """

    def __init__(self, reader: CodeReader, *, fingerprint: dict, workers: int):
        super().__init__(reader, fingerprint=fingerprint, workers=workers)
        self.tokenizer, self.codebook_size = self.info.tokenizer, self.info.codebook_size
        self.num_tokens = math.prod(self.grid)


def open_code_data(
    config: CodeData, folder: str | Path, *, split: str, seed: int, batch_size: int
) -> CodeDataset:
    """Opens one split of a codes folder; arguments and errors as of `encoded.open_encoded`."""
    return open_encoded(
        config, folder, kind=CodesInfo, reader=CodeReader, dataset=CodeDataset, split=split,
        seed=seed, batch_size=batch_size,
    )  # fmt: skip
