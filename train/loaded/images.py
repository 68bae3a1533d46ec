"""A model that draws images by class, loaded for use; each kind of model says how it draws."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ...model.sampling.classes import row_keys
from ..errors import UserError
from ..samples.pictures import to_uint8
from ..tasks.diffusion import pixels_of
from .base import LoadedRun

SHOWN = ("classes", "count", "columns", "files", "npz")  # of the files written, not of the drawing


class LoadedImages(LoadedRun, abc.ABC):
    """The weights of a class-conditional image model; see `LoadedRun`."""

    @property
    @abc.abstractmethod
    def num_classes(self) -> int:
        """Classes are 0 .. num_classes - 1."""

    @property
    def noun(self) -> str:
        """What it draws: "images" or "videos"."""
        return pixels_of(self.config.data)

    @property
    def decoder_print(self) -> str:
        """Fingerprint of what turns codes or latents into pixels; "" where pixels are drawn."""
        return ""

    @abc.abstractmethod
    def drawer(self, settings: Any) -> Callable[[Array, Array], Any]:
        """draw(keys [B], labels [B]) -> images [B, H, W, 3] or videos [B, F, H, W, 3] in
        [-1, 1], with settings like `config.sample`."""

    def settings(self, sample: Any) -> dict[str, Any]:
        """Of `sample`, the settings that say how images are drawn."""
        names = [f.name for f in dataclasses.fields(sample) if f.name not in SHOWN]
        return {name: getattr(sample, name) for name in names}

    def generate(
        self, classes: Sequence[int], *, seed: int = 0, start: int = 0, **settings
    ) -> np.ndarray:
        """Draw one image for each class id.

        Args:
            classes: ids in 0..num_classes-1.
            seed, start: image i is drawn with keys that depend on (seed, start + i) only.
            settings: how to draw, fields of the run's `sample`, which are used unless given.

        Returns:
            [n, H, W, 3] uint8; [n, F, H, W, 3] where the model draws videos.

        Raises:
            UserError: no class, one out of range, or what turns codes or latents into pixels is not
                there.
        """
        return np.concatenate(list(self.stream(classes, seed=seed, start=start, **settings)))

    def stream(
        self, classes: Sequence[int], *, seed: int = 0, start: int = 0, **settings
    ) -> Iterator[np.ndarray]:
        """`generate`, yielding [rows, H, W, 3] at a time as they are drawn."""
        fields = self.settings(self.config.sample)
        if unknown := settings.keys() - fields.keys():
            raise TypeError(f"takes {', '.join(sorted(fields))}, not {unknown.pop()}")
        s = dataclasses.replace(self.config.sample, **settings)
        if not len(classes) or s.rows < 1:
            raise UserError(f"{len(classes)} classes, {s.rows} rows at a time; give at least 1")
        wrong = [c for c in classes if not 0 <= c < self.num_classes]
        if wrong:
            raise UserError(
                f"class {wrong[0]} is out of range; this model has classes "
                f"0..{self.num_classes - 1}"
            )
        draw = self.drawer(s)
        rows = min(s.rows, len(classes))
        for at in range(0, len(classes), rows):
            part = list(classes[at : at + rows])
            filled = part + [part[-1]] * (rows - len(part))  # one shape, compiled once
            keys = row_keys(jax.random.key(seed), rows, start + at)
            yield to_uint8(draw(keys, jnp.asarray(filled, jnp.int32)))[: len(part)]
