"""Token files: a SentencePiece vocabulary's ids of every document, made once, then mapped."""

from __future__ import annotations

import codecs
import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .documents import content_hash, write_atomically
from .vocab import SentencePieceVocab

_FORMAT = 1
_CHUNK = 2**20  # bytes read at a time; texts are tokenised in chunks that end at a line's end
_GROUP = 32  # chunks tokenised together, on several threads


class TokenFile:
    """Documents of tokens in a file.

    Args:
        path: raw uint16 or uint32 ids, all documents end to end.
        lengths: [N] tokens per document.
        dtype: of the file.
    """

    def __init__(self, path: Path, lengths: np.ndarray, dtype: np.dtype):
        self.path, self.lengths, self.dtype = str(path), lengths, np.dtype(dtype)
        self._starts = np.cumsum(lengths) - lengths

    def read(self, i: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of document i as int32."""
        begin = int(self._starts[i])
        return _map_tokens(self.path, self.dtype.str)[begin + start : begin + stop].astype(np.int32)


@functools.lru_cache(maxsize=8)
def _map_tokens(path: str, dtype: str) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def tokenise(documents, vocab: SentencePieceVocab, cache: Path) -> TokenFile:
    """The documents' tokens, from `cache` if they are there, else made and kept there.

    The file's name is a hash of content and vocabulary, so a changed text or model is tokenised
    anew. The index is written last, and both by rename: an interrupted run leaves nothing that
    looks complete.
    """
    dtype = np.dtype("<u2" if vocab.size < 2**16 else "<u4")
    key = json.dumps([_FORMAT, content_hash(documents), vocab.fingerprint], sort_keys=True)
    stem = f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    path, index = cache / f"{stem}.bin", cache / f"{stem}.index.npy"
    lengths = _read_index(path, index, dtype)
    if lengths is None:
        lengths = np.zeros(len(documents.lengths), np.int64)
        write_atomically(path, lambda file: _write_tokens(file, documents, vocab, dtype, lengths))
        write_atomically(index, lambda file: np.save(file, lengths))
        _map_tokens.cache_clear()
    return TokenFile(path, lengths, dtype)


def _read_index(path: Path, index: Path, dtype: np.dtype) -> np.ndarray | None:
    """Tokens per document, or None where the pair of files is not there or not whole."""
    try:
        lengths = np.load(index, allow_pickle=False)
        whole = path.stat().st_size == int(lengths.sum()) * dtype.itemsize
    except (OSError, ValueError, EOFError):
        return None
    return lengths if whole else None


def _write_tokens(file, documents, vocab, dtype, lengths) -> None:
    chunks = (
        (i, text) for i in range(len(documents.lengths)) for text in text_chunks(documents, i)
    )
    with progress(int(documents.lengths.sum()), "tokenising") as bar:
        while group := list(itertools.islice(chunks, _GROUP)):
            for (i, text), ids in zip(
                group, vocab.encode_many([text for _, text in group]), strict=True
            ):
                lengths[i] += len(ids)
                file.write(ids.astype(dtype).tobytes())
                bar.update(len(text.encode("utf-8")))


def text_chunks(documents, i: int) -> Iterator[str]:
    """Document i as text in pieces of about 1 MiB.

    A piece ends after a newline; in longer lines before a space, or anywhere as the last resort.
    Bytes that are not UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    length, held = int(documents.lengths[i]), ""
    for start in range(0, length, _CHUNK):
        stop = min(start + _CHUNK, length)
        held += decoder.decode(documents.read(i, start, stop).tobytes(), final=stop == length)
        cut = len(held)
        if stop < length:
            cut = held.rfind("\n") + 1 or max(held.rfind(" "), 0) or cut
        if cut:
            yield held[:cut]
        held = held[cut:]
    if held:
        yield held


def progress(total: int, what: str, unit: str = "B", disable: bool = False) -> tqdm:
    """A progress bar (over bytes by default) on a terminal; elsewhere a line every 30 seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        disable=disable,
        unit_scale=True,
        leave=not terminal,
        delay=1 if terminal else 30,
        mininterval=0.5 if terminal else 30,
        bar_format=None
        if terminal
        else "{desc}: {n_fmt} of {total_fmt}, {elapsed}, left {remaining}\n",
    )
