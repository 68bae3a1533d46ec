"""A class-conditional image model over token codes, loaded for use."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ...model.sampling.classes import guidance_schedule, make_class_sampler
from ..encoders.tokenizer import LoadedTokenizer, check_fingerprint, load_tokenizer
from ..errors import UserError
from ..stages import resolve
from .images import LoadedImages


class LoadedCodes(LoadedImages):
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

    @property
    def decoder_print(self) -> str:
        return self.tokenizer.fingerprint

    @property
    def num_classes(self) -> int:
        return self.config.net.num_classes

    def sampler(self, **options) -> Callable:
        """A jitted sampler(variables, keys, labels, *, guidance, temperature, top_k, top_p) that
        gives codes [B, T]; see `lintime.model.sampling.make_class_sampler`."""
        return self._cached(make_class_sampler, **options)

    def drawer(self, settings):
        draw, decode, s = self.sampler(), self.tokenizer.decode, settings
        options = dict(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)
        if s.guidance != 1.0:
            tokens = self.config.net.num_tokens
            options["guidance"] = guidance_schedule(s.schedule, s.guidance, tokens)

        def images(keys, labels):
            codes = draw(self.variables, keys, labels, **options)
            return decode(codes.reshape(len(codes), *self.grid))

        return images
