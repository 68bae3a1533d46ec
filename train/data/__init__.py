"""Training and evaluation data: every batch is a pure function of seed, step and row.

`open_data(config, split=..., seed=..., batch_size=...)` is the way in.
"""

from .dataset import (
    LMDataset,
    gzip_bits_per_byte,
    open_data,
    prepare_data,
    raw_validation_bytes,
)
from .stream import evaluation_batches, image_tokens, pack_documents
from .vocab import ByteVocab, SentencePieceVocab, load_vocab, train_sentencepiece

__all__ = [
    "ByteVocab",
    "LMDataset",
    "SentencePieceVocab",
    "evaluation_batches",
    "gzip_bits_per_byte",
    "image_tokens",
    "load_vocab",
    "open_data",
    "pack_documents",
    "prepare_data",
    "raw_validation_bytes",
    "train_sentencepiece",
]
