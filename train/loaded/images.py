"""A model that draws images by class or text, loaded for use; each kind says how it draws."""

from __future__ import annotations

import abc
import dataclasses
import inspect
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
from .wanted import Wanted, classes_of, wanted_classes

# Of the files written and of what they show, not of the drawing.
SHOWN = ("text", "classes", "count", "columns", "files", "npz")


class LoadedImages(LoadedRun, abc.ABC):
    """The weights of a model of images by class or text; see `LoadedRun`."""

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
    def drawer(self, settings: Any) -> Callable[[Array, Any], Any]:
        """draw(keys [B], labels) -> images [B, H, W, 3] or videos [B, F, H, W, 3] in [-1, 1], with
        settings like `config.sample`; labels [B] or, of texts, what `Wanted.take` gives."""

    def wanted(self, classes: Sequence[int] = ()) -> Wanted:
        """What images of these classes take; see `generate`.

        Raises:
            UserError: a class out of range.
        """
        return wanted_classes(classes, self.num_classes)

    def asked(self, sample: Any) -> Wanted:
        """What `sample` asks for."""
        return self.wanted(classes_of(sample, self.num_classes))

    @property
    def usual(self) -> Any:
        """How `generate` draws where nothing else is said: the run's `sample`."""
        return self.config.sample

    def settings(self, sample: Any) -> dict[str, Any]:
        """Of `sample`, the settings that say how images are drawn."""
        names = [f.name for f in dataclasses.fields(sample) if f.name not in SHOWN]
        return {name: getattr(sample, name) for name in names}

    def generate(
        self, classes: Sequence[int] | Wanted = (), *, seed: int = 0, start: int = 0, **settings
    ) -> np.ndarray:
        """Draw one image for each class id or text.

        Args:
            classes: ids in 0..num_classes-1, or what `wanted` or `asked` gives.
            seed, start: image i is drawn with keys that depend on (seed, start + i) only.
            settings: how to draw, fields of the run's `sample`, which are used unless given
                (`usual`); and what else `wanted` takes: of models that read a text its prompts,
                `text`, or their features, `context` and `context_mask`.

        Returns:
            [n, H, W, 3] uint8; [n, F, H, W, 3] where the model draws videos.

        Raises:
            UserError: no class, one out of range, or what turns codes or latents into pixels is not
                there.
        """
        return np.concatenate(list(self.stream(classes, seed=seed, start=start, **settings)))

    def stream(
        self, classes: Sequence[int] | Wanted = (), *, seed: int = 0, start: int = 0, **settings
    ) -> Iterator[np.ndarray]:
        """`generate`, yielding [rows, H, W, 3] at a time as they are drawn."""
        if not isinstance(classes, Wanted):
            told = inspect.signature(self.wanted).parameters
            told = {name: settings.pop(name) for name in list(settings) if name in told}
            classes = self.wanted(classes, **told)
        fields = self.settings(self.usual)
        if unknown := settings.keys() - fields.keys():
            raise TypeError(f"takes {', '.join(sorted(fields))}, not {unknown.pop()}")
        s = dataclasses.replace(self.usual, **settings)
        count = len(classes)
        if not count or s.rows < 1:
            raise UserError(f"{count} classes or texts, {s.rows} rows at a time; give at least 1")
        draw = self.drawer(s)
        rows = min(s.rows, count)
        for at in range(0, count, rows):
            filled = np.minimum(np.arange(at, at + rows), count - 1)  # one shape, compiled once
            keys = row_keys(jax.random.key(seed), rows, start + at)
            labels = jax.tree.map(jnp.asarray, classes.take(filled))
            yield to_uint8(draw(keys, labels))[: count - at]
