"""Jitted samplers."""

from .classes import guidance_schedule, make_class_sampler, row_keys
from .filters import (
    draw,
    filter_logits,
    keep_likely,
    keep_nucleus,
    keep_top_k,
    nucleus_filter,
    top_k_filter,
)
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
    "guidance_schedule",
    "init_stream",
    "keep_likely",
    "keep_nucleus",
    "keep_top_k",
    "make_class_sampler",
    "make_sampler",
    "make_stream",
    "next_logits",
    "next_tokens",
    "nucleus_filter",
    "pack_prompts",
    "push",
    "row_keys",
    "top_k_filter",
]
