"""A trained run of a text model, loaded for use."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ...model.sampling import (
    EOS,
    TextStream,
    cast_weights,
    make_sampler,
    make_stream,
    pack_prompts,
)
from ..data import load_vocab
from ..errors import UserError
from ..schema import Sample
from .base import LoadedRun

CHUNK = 16  # tokens decoded per trip to the host


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


def draw_settings(sample: Sample) -> dict[str, float]:
    """What streaming functions take besides the state."""
    return {"temperature": sample.temperature, "top_k": sample.top_k, "top_p": sample.top_p}


def text_stream(loaded: LoadedText, length: int, **options) -> TextStream:
    """Streaming functions; only quadratic attention has to know how many tokens will come."""
    if loaded.net.state_grows:
        options["max_new"] = -(-length // CHUNK) * CHUNK
    return loaded.stream(chunk=CHUNK, donate=True, **options)


class _Row:
    """The text of one row: cut at EOS or the stop text, shown only as far as it is certain."""

    def __init__(self, vocab, stop: bytes):
        self.vocab, self.stop = vocab, stop
        self.text = bytearray()
        self.done = False
        self._shown = 0

    def feed(self, ids: np.ndarray) -> bytes:
        """Take new ids; the bytes that may be shown now (a beginning of the stop text is held
        back)."""
        ends = np.flatnonzero(ids == self.vocab.eos)
        if ends.size:
            ids, self.done = ids[: ends[0]], True
        before = len(self.text)
        self.text += self.vocab.decode(ids)
        certain = len(self.text)
        if self.stop:
            at = self.text.find(self.stop, max(0, before - len(self.stop) + 1))
            if at >= 0:
                del self.text[at:]
                self.done, certain = True, at
            elif not self.done:
                partial = range(min(len(self.stop) - 1, certain), 0, -1)
                certain -= next((n for n in partial if self.text.endswith(self.stop[:n])), 0)
        return self._show(certain)

    def finish(self) -> bytes:
        """The row ends here: what was held back."""
        self.done = True
        return self._show(len(self.text))

    def _show(self, end: int) -> bytes:
        new, self._shown = bytes(self.text[self._shown : end]), end
        return new


def stream_text(
    loaded: LoadedText, prompts: Sequence[str | bytes], sample: Sample, *, seed: int = 0
) -> Iterator[list[bytes]]:
    """Continue each prompt, a few tokens at a time, until all rows have ended.

    Args:
        loaded: the run. prompts: one row each.
        sample: length, temperature, top_k, top_p and stop are read.
        seed: row i is drawn with keys that depend on (seed, i) only.

    Yields:
        The new bytes of every row (b"" where there are none); together they are the continuations,
        without the prompt and the stop text.
    """
    vocab = loaded.vocab
    tokens, lengths = pack_prompts([vocab.encode(p) for p in prompts])
    stream = text_stream(loaded, sample.length)
    settings = draw_settings(sample)
    rows = [_Row(vocab, sample.stop.encode()) for _ in prompts]
    state = stream.init(loaded.decoding_variables, jax.random.key(seed), tokens, lengths)
    for start in range(0, sample.length, CHUNK):
        new, state = stream.next(loaded.decoding_variables, state, **settings)
        new = np.asarray(new)[:, : sample.length - start]
        out = [b"" if row.done else row.feed(ids) for row, ids in zip(rows, new)]
        if start + CHUNK >= sample.length:
            out = [shown if row.done else shown + row.finish() for row, shown in zip(rows, out)]
        yield out
        if all(row.done for row in rows):
            return


def continue_text(
    loaded: LoadedText, prompts: Sequence[str | bytes], sample: Sample, *, seed: int = 0
) -> list[str]:
    """The continuations that `stream_text` yields, as text; U+FFFD for what is not UTF-8."""
    pieces = zip(*stream_text(loaded, prompts, sample, seed=seed))
    return [b"".join(row).decode("utf-8", "replace") for row in pieces]
