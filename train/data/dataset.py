"""Batches of token sequences as pure functions of (seed, step, row)."""

from __future__ import annotations

import dataclasses
import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..schema import Data
from .batches import RowOrder, StepDataset
from .documents import content_hash
from .sources import find_documents, resolve_format
from .stream import ByteTokens, TokenStream, gather
from .tokens import progress, text_chunks, tokenise
from .vocab import ByteVocab, SentencePieceVocab, load_vocab, train_sentencepiece

FORMAT_VERSION = 1  # of the batches: raise it when the same config would give other ones


class Batches:
    """What the reader threads and processes hold: the stream and the order in which it is visited.

    Training sequences are visited in the order of `RowOrder`. Sequence batch g lasts for T/U
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
        self.order = RowOrder(count, batch_size, seed=seed, endless=endless)
        self.num_batches = self.order.num_batches

    def read(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows `rows` of batch `step`; see LMDataset.batch."""
        group, part = divmod(step, self.parts)
        indices = self.order.indices(group, rows)
        batch = gather(
            self.stream, indices, self.sequence_len, count=self.count, part=part, parts=self.parts
        )
        return batch | {"start": np.full(len(indices), part == 0)}


class LMDataset(StepDataset):
    """Batches of token sequences of one split. Made by `open_data`.

    A batch holds inputs, targets, mask, segment_ids: [R, U] int32; start: [R] bool, True where the
    update begins a new sequence. Evaluation: U = T, and rows past the end are all zero.

    Attributes:
        vocab: the vocabulary (see `vocab`).
        fingerprint, num_batches: see StepDataset.
        updates_per_sequence: T/U for training, 1 for evaluation.
        num_sequences, num_tokens, num_bytes, num_documents: size of the split; the EOS count as
            tokens, not as bytes.
        documents: the split's raw bytes (`lengths`, `read`).
    """

    def __init__(self, batches: Batches, *, vocab, fingerprint: dict, documents, workers: int):
        super().__init__(batches, fingerprint=fingerprint, workers=workers)
        self.vocab, self.documents, self.updates_per_sequence = vocab, documents, batches.parts
        self.num_sequences, self.num_tokens = batches.count, len(batches.stream)
        self.num_documents, self.num_bytes = len(documents.lengths), int(documents.lengths.sum())

    @property
    def description(self) -> str:
        """Size of the split, for people."""
        return f"{self.num_bytes / 1e6:.2f} MB of data"


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
