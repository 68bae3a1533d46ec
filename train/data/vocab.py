"""Vocabularies: bytes, or SentencePiece pieces.

Ids 0, 1, 2 are pad, EOS (end of document) and unknown. A vocabulary has

    size, pad, eos, unk     numbers
    encode(text)            -> [n] int32 ids of bytes or str, no EOS added
    decode(ids)             -> bytes
    fingerprint             JSON-able; equal exactly if the ids mean the same

Decoding is per token: decode(a + b) = decode(a) + decode(b), so text can be streamed.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import UserError
from .documents import reason, write_atomically

PAD, EOS, UNK = 0, 1, 2
SPECIAL = 3  # ids below this are pad, EOS and unknown; byte b is id b + 3

TRAINING_CHARACTERS = 1_000_000_000
_BYTE_FALLBACK_FROM = 1024
_SENTENCE = 1000  # characters: the trainer leaves out sentences above 4,192 bytes


class ByteVocab:
    """259 ids: pad, EOS, unknown, then the 256 bytes."""

    size, pad, eos, unk = 256 + SPECIAL, PAD, EOS, UNK

    @property
    def fingerprint(self) -> dict:
        return {"kind": "bytes", "size": self.size}

    def encode(self, text: bytes | str) -> np.ndarray:
        """Ids [n] int32 of the bytes (of the UTF-8 encoding, for a str)."""
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32) + SPECIAL

    def decode(self, ids) -> bytes:
        """Bytes of the ids; pad, EOS and unknown give nothing."""
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and not (0 <= ids.min() and ids.max() < self.size):
            raise ValueError(
                f"ids from {ids.min()} to {ids.max()} are outside the {self.size} byte ids"
            )
        return (ids[ids >= SPECIAL] - SPECIAL).astype(np.uint8).tobytes()


class SentencePieceVocab:
    """A SentencePiece model with pad 0, EOS 1, unknown 2: `train_sentencepiece`'s, or T5's.

    Args:
        path: the .model file.

    Raises:
        UserError: the file is missing or no such model, or sentencepiece is not installed.
    """

    pad, eos, unk = PAD, EOS, UNK

    def __init__(self, path: str | os.PathLike):
        try:
            self._model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the vocabulary {path}: {reason(error)}; set data.vocab=bytes or "
                "the path of a model, or data.train_vocab=32000 to train one there"
            ) from error
        self.path = str(path)
        self._load()

    def _load(self) -> None:
        try:
            self._processor = _sentencepiece().SentencePieceProcessor(model_proto=self._model)
            ids = tuple(getattr(self._processor, name)() for name in ("pad_id", "eos_id", "unk_id"))
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{self.path} is not a SentencePiece model; correct data.vocab"
            ) from error
        if ids != (PAD, EOS, UNK):
            raise UserError(
                f"{self.path} has pad, EOS, unknown = {ids}, but 0, 1, 2 are needed; train one "
                "with data.train_vocab, or use one that reserves these ids"
            )
        self.size = self._processor.get_piece_size()
        self._bytes = [self._piece_bytes(i) for i in range(self.size)]

    def _piece_bytes(self, i: int) -> bytes:
        processor = self._processor
        if i == UNK:
            return "\ufffd".encode()
        if processor.is_control(i):
            return b""
        if processor.is_byte(i):
            return bytes([int(processor.id_to_piece(i)[1:-1], 16)])  # "<0x0A>"
        return processor.id_to_piece(i).replace("\u2581", " ").encode("utf-8")

    def __getstate__(self) -> dict:
        return {"path": self.path, "_model": self._model}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._load()

    @property
    def fingerprint(self) -> dict:
        digest = hashlib.sha256(self._model).hexdigest()
        return {"kind": "sentencepiece", "size": self.size, "sha256": digest}

    def encode(self, text: bytes | str) -> np.ndarray:
        """Ids [n] int32 of the text; bytes that are not UTF-8 are read as U+FFFD."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: list[bytes | str]) -> list[np.ndarray]:
        """`encode` of each text, on several threads."""
        texts = [t.decode("utf-8", "replace") if isinstance(t, bytes) else t for t in texts]
        return [np.asarray(ids, np.int32) for ids in self._processor.encode(texts)]

    def decode(self, ids) -> bytes:
        """UTF-8 text of the ids, token by token; pad and EOS give nothing, unknown gives U+FFFD.

        A space that a model puts in front of every text (as T5's does) is kept.
        """
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and not (0 <= ids.min() and ids.max() < self.size):
            raise ValueError(
                f"ids from {ids.min()} to {ids.max()} are outside the {self.size} pieces"
            )
        return b"".join(self._bytes[i] for i in ids)


def load_vocab(spec: str) -> ByteVocab | SentencePieceVocab:
    """The vocabulary named by `Data.vocab`: "bytes" or the path of a SentencePiece model.

    Raises:
        UserError: no such model, or "": the run has the ids of a tokenizer that is not here.
    """
    if not spec:
        raise UserError(
            "this run takes token ids only: call lintime.load(DIR).net from Python, or name a "
            "vocabulary with the same ids: data.vocab=FILE"
        )
    return ByteVocab() if spec == "bytes" else SentencePieceVocab(spec)


def train_sentencepiece(texts: Iterable[str], size: int, path: str | os.PathLike) -> None:
    """Trains a byte-pair-encoding model of `size` pieces on `texts` and writes it to `path`.

    Pad 0, EOS 1, unknown 2, no BOS; every character of the training text is covered. Text is not
    normalised, and newline, tab and carriage return are pieces of their own, so
    decode(encode(text)) is the text. From 1,024 pieces on, 256 of them are bytes, into which
    characters not seen in training fall apart; a smaller vocabulary cannot spare these and calls
    such characters unknown. At most 1e9 characters are read.

    Raises:
        UserError: too little text, a size that does not fit it, or sentencepiece is not installed.
    """
    trainer = _sentencepiece().SentencePieceTrainer
    sentences = _sentences(texts)
    try:
        first = next(sentences)
    except StopIteration:
        raise UserError("there is no text to train a vocabulary on; check data.path") from None
    model = io.BytesIO()
    try:
        trainer.train(
            sentence_iterator=itertools.chain([first], sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            character_coverage=1.0,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            byte_fallback=size >= _BYTE_FALLBACK_FROM,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=["\n", "\t", "\r"],
            train_extremely_large_corpus=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"data.train_vocab={size} does not fit this text: {_advice(str(error))}"
        ) from error
    write_atomically(Path(path), lambda file: file.write(model.getvalue()))


def _sentences(texts: Iterable[str]):
    """Lines of at most 1,000 characters, up to 1e9 characters in all."""
    left = TRAINING_CHARACTERS
    for text in texts:
        for line in re.split(r"[\n\t\r]+", text):
            for start in range(0, len(line), _SENTENCE):
                sentence = line[start : start + _SENTENCE][:left]
                left -= len(sentence)
                if sentence:
                    yield sentence
                if left <= 0:
                    return


def _advice(message: str) -> str:
    """The trainer's two usual complaints in plain words."""
    if high := re.search(r"value <= (\d+)", message):
        return f"it yields at most {high[1]} pieces; set data.train_vocab={high[1]}"
    if low := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"its characters alone need {low[1]}; set a larger data.train_vocab"
    return message.replace("\n", " ")


def _sentencepiece():
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(
            "SentencePiece vocabularies need the sentencepiece package; install lintime[text], "
            "or set data.vocab=bytes"
        ) from error
    return sentencepiece
