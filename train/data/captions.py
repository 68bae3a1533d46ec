"""Texts as the token ids of published text encoders: CLIP's byte pairs, T5's SentencePiece.

Both give rows of one length: `rows(texts, length)` -> ids [B, length] int32, mask [B, length] bool.
A text that is too long loses its end, never the token that ends it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from .vocab import EOS, PAD, SentencePieceVocab

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def clean(text: str) -> str:
    """Composed characters (NFC), one space for any whitespace, lower case letter by letter."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()
    return "".join(c.lower() for c in text)


def split_words(text: str) -> Iterator[str]:
    """The pieces within which byte pairs are merged: a special token, an English contraction, a run
    of letters, one digit, or a run of anything else but whitespace.
    """
    kinds = [_kind(c) for c in text]
    at = 0
    while at < len(text):
        fixed = [w for w in (BEGIN, END, *CONTRACTIONS) if text.startswith(w, at)]
        end = at + (len(fixed[0]) if fixed else 1)
        if not fixed and kinds[at] in "L*":
            while end < len(text) and kinds[end] == kinds[at]:
                end += 1
        if kinds[at] != " ":
            yield text[at:end]
        at = end


def _kind(character: str) -> str:
    """Letter, number, whitespace or anything else, as Unicode's categories have it."""
    category = unicodedata.category(character)[0]
    return category if category in "LN" else " " if character.isspace() else "*"


@functools.cache
def byte_letters() -> tuple[str, ...]:
    """A visible character for each byte: itself where it is one, else one from U+0100 on."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (chr(256 + i) for i in range(256))
    return tuple(chr(b) if b in shown else next(others) for b in range(256))


class ClipVocab:
    """CLIP's byte-level byte pairs, lower case, of vocab.json and merges.txt (arXiv 2103.00020,
    section 2.4).

    Attributes:
        size, begin, end, pad: number of ids, and ids around a text. Padding is the end token again
            unless special_tokens_map.json or tokenizer_config.json name another.

    Raises:
        UserError: a file is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = folder = Path(folder)
        try:
            self._ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            lines = lines[lines[0].startswith("#version") :]
            pairs = [tuple(line.split()) for line in lines if line.strip()]
            self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
            self.size, self.begin, self.end = len(self._ids), self._ids[BEGIN], self._ids[END]
            self.pad = self._ids[self._pad_token()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"cannot read vocab.json and merges.txt of a CLIP tokenizer in {folder} "
                f"({type(error).__name__}: {error}); put both there"
            ) from error
        self._word = functools.lru_cache(maxsize=65536)(self._word_ids)

    def _pad_token(self) -> str:
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (self.folder / name).is_file():
                held = json.loads((self.folder / name).read_text(encoding="utf-8"))
                token = held.get("pad_token")
                if token:
                    return token if isinstance(token, str) else token["content"]
        return END

    @property
    def fingerprint(self) -> str:
        """Hash of what the ids mean."""
        held = [sorted(self._ids.items()), list(self._ranks), self.pad]
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end."""
        return [i for word in split_words(clean(text)) for i in self._word(word)]

    def rows(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """begin, text, end, padding; see the module."""
        found = ([self.begin, *self.encode(t)[: length - 2], self.end] for t in texts)
        return pad_rows(found, len(texts), length, self.pad)

    def _word_ids(self, word: str) -> tuple[int, ...]:
        """Ids of one piece: the pair that was learnt first is merged first, everywhere."""
        if word in (BEGIN, END):
            return (self._ids[word],)
        letters = byte_letters()
        parts = [letters[b] for b in word.encode("utf-8")]
        parts[-1] += WORD_END
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda p: self._ranks.get(p, len(self._ranks)))
            if best not in self._ranks:
                break
            merged, at = [], 0
            while at < len(parts):
                pair = tuple(parts[at : at + 2]) == best
                merged.append("".join(best) if pair else parts[at])
                at += 1 + pair
            parts = merged
        return tuple(self._ids.get(part, self.end) for part in parts)


class T5Vocab:
    """T5's SentencePiece pieces; 1 ends a text, 0 is padding.

    Args:
        path: spiece.model.

    Raises:
        UserError: as of `SentencePieceVocab`.
    """

    pad, end = PAD, EOS

    def __init__(self, path: str | os.PathLike):
        self._vocab = SentencePieceVocab(path)
        self.size = self._vocab.size

    @property
    def fingerprint(self) -> str:
        """Hash of the model."""
        return self._vocab.fingerprint["sha256"][:16]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the end."""
        return self._vocab.encode(text).tolist()

    def rows(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """text, end, padding; see the module."""
        found = ([*self.encode(t)[: length - 1], self.end] for t in texts)
        return pad_rows(found, len(texts), length, self.pad)


def pad_rows(found, count: int, length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of at most `length` ids as ids, mask [count, length]."""
    ids, mask = np.full((count, length), pad, np.int32), np.zeros((count, length), bool)
    for i, row in enumerate(found):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return ids, mask
