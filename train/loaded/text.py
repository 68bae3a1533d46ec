"""A trained run of a text model, loaded for use."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ...model.sampling import EOS, TextStream, cast_weights, make_sampler, make_stream
from ..data import load_vocab
from ..errors import UserError
from ..samples.command import continue_text
from ..schema import Sample
from .base import LoadedRun


class LoadedText(LoadedRun):
    """The weights of a text run and what is needed to use them; see `LoadedRun`.

    `vocab` is where the vocabulary is now, if not where `config.data.vocab` says.
    """

    def __init__(self, *args, vocab: str | None = None, **options):
        super().__init__(*args, **options)
        self._vocab_spec = vocab or self.config.data.vocab
        self._vocab_fingerprint = self.data_fingerprint.get("vocab")

    @functools.cached_property
    def decoding_variables(self) -> dict[str, Any]:
        """`variables` with matrices in the net's dtype: same outputs, less to read per token."""
        return jax.jit(functools.partial(cast_weights, self.net))(self.variables)

    @functools.cached_property
    def vocab(self):
        """The vocabulary: size, encode(text) -> ids, decode(ids) -> bytes.

        Raises:
            UserError: its file is missing, or it is not the one that the run was trained with.
        """
        vocab = load_vocab(os.path.expanduser(self._vocab_spec))
        saved = self._vocab_fingerprint
        if saved is not None and saved != vocab.fingerprint:
            raise UserError(
                f"the vocabulary {self._vocab_spec} ({vocab.size} ids) is not the one that "
                f"{self.path} was trained with ({saved.get('size')} ids); restore that file"
            )
        if vocab.size > self.config.net.vocab_size:
            raise UserError(
                f"the vocabulary {self._vocab_spec} has {vocab.size} ids, but the net of "
                f"{self.path} has only net.vocab_size={self.config.net.vocab_size}; name the "
                "vocabulary it was trained with"
            )
        return vocab

    def sampler(self, *, length: int, stop_ids: Sequence[int] = (EOS,), **options) -> Callable:
        """A jitted sampler(variables, key, prompts, lengths=None, *, temperature, top_k, top_p).

        See `lintime.model.sampling.make_sampler`; ids outside the vocabulary are never drawn.
        """
        options = self._with_vocab(options)
        return self._cached(make_sampler, length=length, stop_ids=tuple(stop_ids), **options)

    def stream(self, **options) -> TextStream:
        """Streaming generation over explicit state; see `lintime.model.sampling.make_stream`."""
        return self._cached(make_stream, **self._with_vocab(options))

    def generate(
        self,
        prompt: str | bytes | Sequence[str | bytes] = "",
        length: int | None = None,
        *,
        seed: int = 0,
        **settings,
    ) -> str | list[str]:
        """Continue a prompt, or several at once.

        Args:
            prompt: text, or a list of texts.
            length: most tokens to draw.
            seed: the same seed gives the same text.
            settings: temperature, top_k, top_p, stop; the run's `sample` settings unless given.

        Returns:
            The continuation without the prompt (a list for a list).
        """
        fields = {"temperature", "top_k", "top_p", "stop"}
        if unknown := settings.keys() - fields:
            raise TypeError(f"generate() takes {', '.join(sorted(fields))}, not {unknown.pop()}")
        usual = self.config.sample
        chosen = {name: getattr(usual, name) for name in fields} | settings
        sample = Sample(length=usual.length if length is None else length, **chosen)
        one = isinstance(prompt, str | bytes)
        texts = continue_text(self, [prompt] if one else list(prompt), sample, seed=seed)
        return texts[0] if one else texts

    def _with_vocab(self, options: dict) -> dict:
        """`vocab_size` from the vocabulary, unless it is given (a run may have none)."""
        return options if "vocab_size" in options else {"vocab_size": self.vocab.size} | options
