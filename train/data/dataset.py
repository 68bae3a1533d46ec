"""Batches as pure functions of (seed, step, row), and their prefetching iterator."""

from __future__ import annotations

import dataclasses
import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
from absl import flags

from ..errors import UserError
from ..schema import Data
from .documents import content_hash
from .sources import find_documents, resolve_format
from .stream import ByteTokens, TokenStream, gather
from .tokens import progress, text_chunks, tokenise
from .vocab import ByteVocab, SentencePieceVocab, load_vocab, train_sentencepiece

FORMAT_VERSION = 1  # of the batches: raise it when the same config would give other ones
_ENDLESS = 2**62


class Batches:
    """What the reader threads and processes hold: the stream and the order in which it is visited.

    Training sequences form an endless order: every epoch is a new seeded permutation (or the
    stream's own order). Element g*B + r of it is row r of sequence batch g, which lasts for T/U
    updates: update u is part u % (T/U) of sequence batch u // (T/U), so row r of update u continues
    row r of update u - 1.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        count: int,
        sequence_len: int,
        update_len: int,
        batch_size: int,
        seed: int | None,
        endless: bool,
    ):
        self.stream, self.count, self.batch_size = stream, count, batch_size
        self.sequence_len, self.parts = sequence_len, sequence_len // update_len
        self.num_batches = None if endless else -(-count // batch_size)
        order = grain.MapDataset.range(count)
        if seed is not None:
            order = order.seed(seed % 2**32).shuffle()
        self.order = order.repeat() if endless else None

    def read(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows `rows` of batch `step`; see LMDataset.batch."""
        limit = self.num_batches
        if step < 0 or (limit is not None and step >= limit):
            raise IndexError(f"batch {step} is outside the {limit} batches")
        group, part = divmod(step, self.parts)
        indices = group * self.batch_size + np.asarray(rows, np.int64)
        if self.order is not None:
            indices = np.array([self.order[int(i)] for i in indices], np.int64)
        batch = gather(
            self.stream, indices, self.sequence_len, count=self.count, part=part, parts=self.parts
        )
        return batch | {"start": np.full(len(indices), part == 0)}


class _Steps:
    """Random access to batches by step, as a Grain source."""

    def __init__(self, batches: Batches, rows: np.ndarray, length: int):
        self.batches, self.rows, self.length = batches, rows, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.batches.read(int(step), self.rows)

    def __repr__(self) -> str:
        return f"LMDataset({self.length} steps, {len(self.rows)} rows)"


class LMDataset:
    """Batches of one split. Made by `open_data`.

    Attributes:
        vocab: the vocabulary (see `vocab`).
        fingerprint: JSON-able dict; a restored run's must be equal.
        updates_per_sequence: T/U for training, 1 for evaluation.
        num_batches: batches of an evaluation split; None for training, which is endless.
        num_sequences, num_tokens, num_bytes, num_documents: size of the split; the EOS count as
            tokens, not as bytes.
        documents: the split's raw bytes (`lengths`, `read`).
    """

    def __init__(self, batches: Batches, *, vocab, fingerprint: dict, documents, workers: int):
        self.batches, self.vocab, self.fingerprint = batches, vocab, fingerprint
        self.documents, self.workers = documents, workers
        self.updates_per_sequence, self.num_batches = batches.parts, batches.num_batches
        self.num_sequences, self.num_tokens = batches.count, len(batches.stream)
        self.num_documents, self.num_bytes = len(documents.lengths), int(documents.lengths.sum())

    @property
    def description(self) -> str:
        """Size of the split, for people."""
        return f"{self.num_bytes / 1e6:.2f} MB of data"

    def batch(self, step: int, rows) -> dict[str, np.ndarray]:
        """The given global rows of batch `step`: a pure function of (data, seed, step, row).

        Args:
            step: update number (training), or number of the batch (evaluation).
            rows: [R] row numbers in 0..batch_size-1, in any order.

        Returns:
            inputs, targets, mask, segment_ids: [R, U] int32; start: [R] bool, True where the
            update begins a new sequence. Evaluation: U = T, and rows past the end are all zero.
        """
        return self.batches.read(step, self._check_rows(rows))

    def iterate(self, start: int, rows, stop: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """batch(start, rows), batch(start + 1, rows), ... up to `stop`, read ahead by Grain.

        The same batches for any number of `workers` (reader processes; 0 = threads of this one).
        """
        rows = self._check_rows(rows)
        end = _ENDLESS if self.num_batches is None else self.num_batches
        stop = end if stop is None else min(stop, end)
        if start >= stop:
            return
        steps = grain.MapDataset.source(_Steps(self.batches, rows, end))[start:stop]
        dataset = steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
        if self.workers > 0:
            if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2)
            )
        iterator = iter(dataset)
        try:
            yield from iterator
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    def _check_rows(self, rows) -> np.ndarray:
        rows = np.asarray(rows, np.int64).reshape(-1)
        size = self.batches.batch_size
        if rows.size and not (0 <= rows.min() and rows.max() < size):
            raise ValueError(
                f"rows {rows.min()}..{rows.max()} are outside the batch of {size} rows"
            )
        return rows


def open_data(
    config: Data, *, split: str, seed: int, batch_size: int, cache: str | Path = "runs/cache"
) -> LMDataset:
    """Opens one split of the data as batches of token sequences.

    Args:
        config: the data section of a Run.
        split: "train" (endless, shuffled, updates of `update_len` tokens), "validation" or "test"
            (whole sequences in order, each once, the last batch filled with dummy rows).
        seed: of the training order.
        batch_size: global rows B.
        cache: folder for token files and unpacked arrays where `config.cache` is "".

    Training drops the tokens after the last whole sequence; evaluation keeps them, padded. No EOS
    is appended to enwik8-format data (one document cut by position) or to images, whatever
    `append_eos` says.

    Raises:
        UserError: whatever the user can mend: missing or empty data, too little of it, lengths that
            do not divide, a vocabulary that is missing.
    """
    _check_lengths(config, batch_size)
    config, cache = _expand(config, cache)
    kind = resolve_format(config)
    documents = find_documents(config, split, cache=cache)
    if kind == "images" and config.vocab != "bytes":
        raise UserError(
            f"images are byte sequences, but data.vocab={config.vocab!r}; set data.vocab=bytes"
        )
    vocab = _open_vocab(config, documents if split == "train" else None, cache)
    byte_level = isinstance(vocab, ByteVocab)
    tokens = ByteTokens(documents) if byte_level else tokenise(documents, vocab, cache)
    append_eos = config.append_eos and kind not in ("enwik8", "images")
    stream = TokenStream(tokens, append_eos=append_eos)

    training = split == "train"
    count = stream.num_sequences(config.sequence_len, drop_remainder=training)
    if count == 0:
        raise UserError(
            f"the {split} split of {config.path} has {len(stream)} tokens, less than one sequence "
            f"(data.sequence_len={config.sequence_len}); set data.sequence_len to at most "
            f"{len(stream)}, or use more data"
        )
    shuffle = training and config.shuffle
    update_len = (config.update_len or config.sequence_len) if training else config.sequence_len
    batches = Batches(
        stream,
        count=count,
        sequence_len=config.sequence_len,
        update_len=update_len,
        batch_size=batch_size,
        seed=seed if shuffle else None,
        endless=training,
    )
    fingerprint = {
        "format": FORMAT_VERSION,
        "split": split,
        "documents": len(documents.lengths),
        "bytes": int(documents.lengths.sum()),
        "content": content_hash(documents),
        "tokens": len(stream),
        "sequences": count,
        "sequence_len": config.sequence_len,
        "update_len": update_len,
        "append_eos": append_eos,
        "batch_size": batch_size,
        "shuffle": shuffle,
        "seed": seed,
        "vocab": vocab.fingerprint,
    }
    return LMDataset(
        batches, vocab=vocab, fingerprint=fingerprint, documents=documents, workers=config.workers
    )


def prepare_data(config: Data, *, cache: str | Path = "runs/cache") -> None:
    """Does the slow part of `open_data` ahead: trains the vocabulary and tokenises every split.

    On several hosts with one file system, run it in the first process and let the others wait: it
    is safe but wasteful to run in all of them.
    """
    config, cache = _expand(config, cache)
    train = find_documents(config, "train", cache=cache)
    vocab = _open_vocab(config, train, cache)
    if isinstance(vocab, SentencePieceVocab):
        tokenise(train, vocab, cache)
        if config.validation_fraction or resolve_format(config) in ("enwik8", "pg19"):
            for split in ("validation", "test"):
                tokenise(find_documents(config, split, cache=cache), vocab, cache)


def _expand(config: Data, cache: str | Path) -> tuple[Data, Path]:
    """Replaces ~ in the paths (shells leave `data.path=~/file` alone), and picks the cache."""
    path, vocab = os.path.expanduser(config.path), os.path.expanduser(config.vocab)
    cache = Path(os.path.expanduser(config.cache or cache))
    return dataclasses.replace(config, path=path, vocab=vocab), cache


def _open_vocab(config: Data, train_documents, cache: Path) -> ByteVocab | SentencePieceVocab:
    """Loads `config.vocab`, first training it if it is absent and `train_vocab` asks for it."""
    if config.vocab != "bytes" and config.train_vocab > 0 and not Path(config.vocab).exists():
        if train_documents is None:
            train_documents = find_documents(config, "train", cache=cache)
        total = int(train_documents.lengths.sum())
        with progress(total, "reading text for the vocabulary") as bar:

            def texts() -> Iterator[str]:
                for i in range(len(train_documents.lengths)):
                    for text in text_chunks(train_documents, i):
                        yield text
                        bar.update(len(text.encode("utf-8")))

            train_sentencepiece(texts(), config.train_vocab, config.vocab)
    return load_vocab(config.vocab)


def _check_lengths(config: Data, batch_size: int) -> None:
    length, update = config.sequence_len, config.update_len
    if length < 1:
        raise UserError(f"data.sequence_len={length} must be at least 1")
    if update < 0 or (update and length % update):
        raise UserError(
            f"data.update_len={update} does not divide data.sequence_len={length}; "
            "use a divisor, or 0 for whole sequences"
        )
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if config.workers < 0:
        raise UserError(f"data.workers={config.workers} must be 0 (threads) or more")


def raw_validation_bytes(dataset: LMDataset, batches: int | None = None) -> bytes:
    """The bytes that an evaluation over the first `batches` batches (None = all) predicts.

    They hold no EOS. Compressing them (`gzip_bits_per_byte`) gives a yardstick on exactly the data
    of the model's bits per byte. With SentencePiece: the text as the vocabulary decodes it.
    """
    stream, plan = dataset.batches.stream, dataset.batches
    stop = len(stream)
    if batches is not None:
        stop = min(stop, batches * plan.batch_size * plan.sequence_len)
    return dataset.vocab.decode(stream.read(0, stop))


def gzip_bits_per_byte(data: bytes) -> float:
    """Bits per byte of `gzip -9`."""
    return 8 * len(gzip.compress(data, compresslevel=9)) / len(data) if data else 0.0
