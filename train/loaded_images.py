"""A class-conditional image model over token codes, loaded for use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..model.sampling.classes import guidance_schedule, make_class_sampler, row_keys
from .errors import UserError
from .loaded import LoadedRun
from .pictures import to_uint8
from .schema import ImageSample
from .stages import resolve
from .tokenizer import LoadedTokenizer, check_fingerprint, load_tokenizer


class LoadedImages(LoadedRun):
    """The weights of an AiM run, and its tokenizer; see `LoadedRun`.

    `tokenizer` is a loaded tokenizer or where it is now, if not where `config.data.tokenizer` says.
    """

    def __init__(self, *args, tokenizer: str | LoadedTokenizer | None = None, **options):
        super().__init__(*args, **options)
        self._tokenizer = tokenizer

    @functools.cached_property
    def tokenizer(self) -> LoadedTokenizer:
        """What turns codes into pixels.

        Raises:
            UserError: it is missing, or not the one whose codes the net was trained on.
        """
        given = self._tokenizer
        if not isinstance(given, LoadedTokenizer):
            place = given or resolve(self.config.data.tokenizer, self.path or ".")
            if not place:
                raise UserError(
                    f"{self.path} was trained on codes alone; name their tokenizer with "
                    "data.tokenizer=DIR_OR_FILE"
                )
            given = load_tokenizer(place)
        wanted = self.data_fingerprint.get("tokenizer")
        if wanted is not None:
            check_fingerprint(wanted, given, f"{self.path} was trained on")
        return given

    @functools.cached_property
    def grid(self) -> tuple[int, int]:
        """Height and width of the code grid."""
        saved = self.data_fingerprint.get("grid")
        if saved:
            return tuple(saved)
        tokens = self.config.net.num_tokens
        side = int(tokens**0.5)
        if side * side != tokens:
            raise UserError(f"net.num_tokens={tokens} is not a square; decode the codes yourself")
        return side, side

    def sampler(self, **options) -> Callable:
        """A jitted sampler(variables, keys, labels, *, guidance, temperature, top_k, top_p) that
        gives codes [B, T]; see `lintime.model.sampling.make_class_sampler`."""
        return self._cached(make_class_sampler, **options)

    def generate(
        self, classes: Sequence[int], *, seed: int = 0, start: int = 0, **settings
    ) -> np.ndarray:
        """Draw one image for each class id.

        Args:
            classes: ids in 0..num_classes-1.
            seed, start: image i is drawn with keys that depend on (seed, start + i) only.
            settings: guidance, schedule, temperature, top_k, top_p, rows; the run's `sample`
                settings unless given.

        Returns:
            [n, H, W, 3] uint8.

        Raises:
            UserError: no class, one out of range, or no tokenizer.
        """
        return np.concatenate(list(self.stream(classes, seed=seed, start=start, **settings)))

    def stream(self, classes: Sequence[int], *, seed: int = 0, start: int = 0, **settings):
        """`generate`, yielding [rows, H, W, 3] at a time as they are drawn."""
        fields = {"guidance", "schedule", "temperature", "top_k", "top_p", "rows"}
        if unknown := settings.keys() - fields:
            raise TypeError(f"takes {', '.join(sorted(fields))}, not {unknown.pop()}")
        usual = self.config.sample
        s = ImageSample(**{name: getattr(usual, name) for name in fields} | settings)
        net = self.config.net
        if not len(classes) or s.rows < 1:
            raise UserError(f"{len(classes)} classes, {s.rows} rows at a time; give at least 1")
        wrong = [c for c in classes if not 0 <= c < net.num_classes]
        if wrong:
            raise UserError(
                f"class {wrong[0]} is out of range; this model has classes 0..{net.num_classes - 1}"
            )
        draw, decode = self.sampler(), self.tokenizer.decode
        options = dict(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)
        if s.guidance != 1.0:
            options["guidance"] = guidance_schedule(s.schedule, s.guidance, net.num_tokens)
        rows = min(s.rows, len(classes))
        for at in range(0, len(classes), rows):
            part = list(classes[at : at + rows])
            filled = part + [part[-1]] * (rows - len(part))  # one shape, compiled once
            keys = row_keys(jax.random.key(seed), rows, start + at)
            labels = jnp.asarray(filled, jnp.int32)
            codes = draw(self.variables, keys, labels, **options)
            images = decode(codes.reshape(rows, *self.grid))
            yield to_uint8(images)[: len(part)]
