"""The token stream of a split, cut into training sequences.

Every document, followed by EOS where `append_eos` is set, is laid end to end in one stream;
sequence i is its tokens [i*T, (i+1)*T). These are the targets. From them follow (`features`)

    inputs       = [EOS] + targets[:-1]
    segment_ids  = cumsum(inputs == EOS)          document number within the sequence, from 1
    mask         = targets != pad

The stream is never materialised: a read finds its documents by binary search.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .vocab import EOS, PAD, SPECIAL


class ByteTokens:
    """A document collection's bytes as tokens: byte + 3."""

    def __init__(self, documents):
        self.documents, self.lengths = documents, documents.lengths

    def read(self, i: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of document i as int32."""
        return self.documents.read(i, start, stop).astype(np.int32) + SPECIAL


class ArrayTokens:
    """Token arrays in memory."""

    def __init__(self, documents: Sequence[np.ndarray]):
        self.documents = [np.asarray(document, np.int32) for document in documents]
        self.lengths = np.array([len(document) for document in self.documents], np.int64)

    def read(self, i: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of document i as int32."""
        return self.documents[i][start:stop]


class TokenStream:
    """Documents laid end to end.

    Args:
        tokens: has `lengths` [N] int64 and `read(i, start, stop) -> int32`.
        append_eos: put EOS after each document.
    """

    def __init__(self, tokens, *, append_eos: bool):
        self.tokens, self.append_eos = tokens, append_eos
        self._ends = np.cumsum(tokens.lengths + int(append_eos))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def num_sequences(self, sequence_len: int, *, drop_remainder: bool) -> int:
        """Number of sequences; without `drop_remainder` the last one may be partial."""
        return len(self) // sequence_len if drop_remainder else -(-len(self) // sequence_len)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, [stop - start] int32; pad beyond its end."""
        out = np.full(stop - start, PAD, np.int32)
        position, stop = start, min(stop, len(self))
        i = int(np.searchsorted(self._ends, position, side="right"))
        while position < stop:
            length, end = int(self.tokens.lengths[i]), int(self._ends[i])
            begin = end - length - int(self.append_eos)
            until = min(stop, begin + length)
            if position < until:
                out[position - start : until - start] = self.tokens.read(
                    i, position - begin, until - begin
                )
            if self.append_eos and until < stop:
                out[until - start] = EOS
            position = min(stop, end)
            i += 1
        return out


def features(targets: np.ndarray) -> dict[str, np.ndarray]:
    """inputs, targets, segment_ids and mask of sequences of targets [..., T], all int32."""
    inputs = np.concatenate([np.full_like(targets[..., :1], EOS), targets[..., :-1]], axis=-1)
    return {
        "inputs": inputs,
        "targets": targets,
        "segment_ids": np.cumsum(inputs == EOS, axis=-1, dtype=np.int32),
        "mask": (targets != PAD).astype(np.int32),
    }


def gather(
    stream: TokenStream,
    indices: np.ndarray,
    sequence_len: int,
    *,
    count: int,
    part: int = 0,
    parts: int = 1,
) -> dict[str, np.ndarray]:
    """The sequences numbered `indices` [R], or part `part` of `parts` of them: [R, T/parts] each.

    An index of `count` or more gives a dummy row: all zero, mask included.
    """
    stop = sequence_len // parts * (part + 1)
    starts = np.minimum(indices, count - 1) * sequence_len
    targets = np.zeros((len(indices), stop), np.int32)
    for row, start in enumerate(starts):
        targets[row] = stream.read(int(start), int(start) + stop)
    rows = {
        name: value[:, sequence_len // parts * part :] for name, value in features(targets).items()
    }
    return _blank(rows, indices < count)


def _blank(rows: dict[str, np.ndarray], real: np.ndarray) -> dict[str, np.ndarray]:
    """Zeroes the rows where `real` is False."""
    return {name: np.where(real[..., None], value, 0) for name, value in rows.items()}


def pack_documents(
    documents: Sequence[np.ndarray],
    sequence_len: int,
    *,
    append_eos: bool,
    drop_remainder: bool = False,
) -> dict[str, np.ndarray]:
    """Packs documents of token ids into sequences.

    Returns inputs, targets, segment_ids and mask, each [n, T] int32. The last
    sequence is padded with 0, or left out with `drop_remainder`.
    """
    stream = TokenStream(ArrayTokens(documents), append_eos=append_eos)
    count = stream.num_sequences(sequence_len, drop_remainder=drop_remainder)
    return gather(stream, np.arange(count), sequence_len, count=count)


def evaluation_batches(sequences: dict[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
    """Sequences [n, T] as batches [ceil(n/B), B, T] in order, the last one filled with zeros."""
    count = len(sequences["targets"])
    indices = np.arange(-(-count // batch_size) * batch_size).reshape(-1, batch_size)
    rows = {name: value[np.minimum(indices, count - 1)] for name, value in sequences.items()}
    return _blank(rows, indices < count)


def image_tokens(image: np.ndarray) -> np.ndarray:
    """An image [H, W, C] uint8 as [H*W*C] int32 tokens: row-major, byte + 3."""
    return np.asarray(image, np.uint8).reshape(-1).astype(np.int32) + SPECIAL
