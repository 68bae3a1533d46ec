"""Jitted samplers."""

from .filters import draw, filter_logits, nucleus_filter, top_k_filter
from .text import (
    EOS,
    PAD,
    UNK,
    StreamState,
    TextStream,
    cast_weights,
    init_stream,
    make_sampler,
    make_stream,
    next_logits,
    next_tokens,
    pack_prompts,
    push,
)

__all__ = [
    "EOS",
    "PAD",
    "UNK",
    "StreamState",
    "TextStream",
    "cast_weights",
    "draw",
    "filter_logits",
    "init_stream",
    "make_sampler",
    "make_stream",
    "next_logits",
    "next_tokens",
    "nucleus_filter",
    "pack_prompts",
    "push",
    "top_k_filter",
]
