"""What a diffusion model that reads a text is told: prompts, features, captions of its data."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.open import open_split
from ..data.text_features import TextFeatures, read_info
from ..encoders.text import LoadedTextEncoder, load_text_encoder
from ..errors import UserError
from ..prepare.encoding import encoded_dir
from ..schema import DiffusionSample
from ..tasks.diffusion import Sizes
from .wanted import Wanted, wanted_texts


class TextReader:
    """Prompts and captions as a net reads them.

    Attributes:
        loaded: the run. config: of its net.

    `encoder` is a loaded one or where it is now, if not where `config.data` says.
    """

    def __init__(self, loaded, config: Sizes, encoder: str | LoadedTextEncoder | None):
        self.loaded, self.config, self._encoder = loaded, config, encoder

    @functools.cached_property
    def encoder(self) -> LoadedTextEncoder:
        """What turns prompts into features.

        Raises:
            UserError: it is missing, or not the one whose features the net was trained on.
        """
        given, run, path = self._encoder, self.loaded.config, self.loaded.path
        if not isinstance(given, LoadedTextEncoder):
            place = given or run.data.text_encoder or _place(run.data.text)
            if not place or not Path(place).expanduser().exists():
                raise UserError(
                    f"{path} reads features of texts, and their encoder is "
                    f"{f'not at {place}' if place else 'not known'}; name it with "
                    "--text-encoder DIR (data.text_encoder)"
                )
            given = load_text_encoder(place, length=self.config.context_length)
        wanted = self.loaded.data_fingerprint.get("text_encoder", given.fingerprint)
        if given.fingerprint != wanted or given.width != self.config.context_dim:
            raise UserError(
                f"{given.path} is not the text encoder whose features {path} was trained on "
                f"(fingerprint {wanted[:12]}, this one has {given.fingerprint[:12]}); name that "
                "one with --text-encoder DIR (data.text_encoder)"
            )
        if given.length != self.config.context_length:
            raise UserError(
                f"the text encoder gives {given.length} tokens, {path} reads "
                f"{self.config.context_length}; load it with length={self.config.context_length}"
            )
        return given

    def of_prompts(self, prompts: Sequence[str], classes: Sequence[int] = ()) -> Wanted:
        """One image for each prompt."""
        prompts = [str(text) for text in prompts]
        encoder = self.encoder

        def features(rows):
            return encoder.encode([prompts[i] for i in rows])[:2]

        return wanted_texts(
            self.config, len(prompts), prompts=prompts, features=features, classes=classes
        )

    def of_features(self, context: Any, mask: Any = None, classes: Sequence[int] = ()) -> Wanted:
        """One image for each row of features [n, S, D], with the mask [n, S] of their tokens.

        Raises:
            UserError: features of another shape.
        """
        context, size = np.asarray(context), (self.config.context_length, self.config.context_dim)
        mask = None if mask is None else np.asarray(mask)
        if context.shape[1:] != size or (mask is not None and mask.shape != context.shape[:2]):
            shape = "none" if mask is None else mask.shape
            raise UserError(
                f"context of shape {context.shape} and context_mask of shape {shape}; this net "
                f"reads [n, {size[0]}, {size[1]}] and [n, {size[0]}]"
            )

        def features(rows):
            return context[rows], None if mask is None else mask[rows]

        return wanted_texts(
            self.config, len(context), prompts=None, features=features, classes=classes
        )

    def of_sample(self, sample: DiffusionSample) -> Wanted:
        """What `sample` asks for: its prompts in turn, or where there are none the captions of the
        first validation images, with their features as they are stored."""
        if sample.text:
            count = sample.count or len(sample.text)
            classes = _in_turn(sample.classes, count) if sample.classes else ()
            return self.of_prompts(_in_turn(sample.text, count), classes)
        held = self._validation_captions()
        count = sample.count or len(held)
        images = np.arange(count) % len(held)
        classes: Sequence[int] = ()
        if self.config.num_classes:
            classes = _in_turn(sample.classes or _labels(self.loaded), count)
        return wanted_texts(
            self.config, count, prompts=held.captions(images), classes=classes,
            features=lambda rows: held.rows(images[rows])[:2],
        )  # fmt: skip

    def _validation_captions(self) -> TextFeatures:
        folder = self.loaded.config.data.text
        try:
            held = TextFeatures(folder, "validation")
        except UserError as error:
            raise UserError(f"{error}; or give prompts with --text (sample.text)") from error
        wanted = self.loaded.data_fingerprint.get("text_encoder", held.info.encoder)
        if held.info.encoder != wanted:
            raise UserError(
                f"data.text={folder} holds features of another text encoder than "
                f"{self.loaded.path} was trained on; make them with that one, or give --text"
            )
        return held


def _in_turn(things: Sequence[Any], count: int) -> list[Any]:
    return [things[i % len(things)] for i in range(count)]


def _labels(loaded) -> list[int]:
    """The classes of all validation images."""
    run, path = loaded.config, loaded.path or "."
    data = open_split(run, "validation", path, encoded_dir(run, path))
    rows, found = np.arange(data.batches.batch_size), []
    for step in range(data.num_batches):
        batch = data.batch(step, rows)
        found += batch["labels"][batch["valid"]].tolist()
    return found


def _place(folder: str) -> str:
    """Where the encoder of a folder of features was; "" if the folder is gone."""
    try:
        return read_info(folder).place
    except UserError:
        return ""
