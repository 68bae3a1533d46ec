"""Training and evaluation data: every batch is a pure function of seed, step and row.

`open_data(config, split=..., seed=..., batch_size=...)` is the way in for text, `open_image_data`,
`open_code_data` and `open_latent_data` for images, their codes and their latents,
`open_video_data` for videos; `open.open_split`
takes any run.
"""

from .codes import CodeDataset, open_code_data
from .dataset import (
    LMDataset,
    gzip_bits_per_byte,
    open_data,
    prepare_data,
    raw_validation_bytes,
)
from .image_dataset import ImageDataset, open_image_data
from .image_files import write_array_records
from .latents import LatentDataset, open_latent_data
from .stream import evaluation_batches, image_tokens, pack_documents
from .videos import VideoDataset, open_video_data
from .vocab import ByteVocab, SentencePieceVocab, load_vocab, train_sentencepiece

__all__ = [
    "ByteVocab",
    "CodeDataset",
    "ImageDataset",
    "LMDataset",
    "LatentDataset",
    "SentencePieceVocab",
    "VideoDataset",
    "evaluation_batches",
    "gzip_bits_per_byte",
    "image_tokens",
    "load_vocab",
    "open_code_data",
    "open_data",
    "open_image_data",
    "open_latent_data",
    "open_video_data",
    "pack_documents",
    "prepare_data",
    "raw_validation_bytes",
    "train_sentencepiece",
    "write_array_records",
]
