"""Adapters for FlexiDiT, by family: from names and layouts of vectors to modules."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from ..compare import Report
from .matrices import flexivit_resize, matrices, pos_embed, video_embed


def _later(module: str, name: str) -> Callable[[Report], None]:
    """An adapter whose module is imported when a case needs it."""

    def adapter(report: Report) -> None:
        getattr(importlib.import_module(f"{__name__}.{module}"), name)(report)

    return adapter


FAMILIES = {
    "flexivit_resize": flexivit_resize,
    "matrices": matrices,
    "pos_embed": pos_embed,
    "video_embed": video_embed,
    "objectives": _later("objectives", "objectives"),
    "shared": _later("net", "shared"),
    "shared_init": _later("net", "shared_init"),
    "lora": _later("net", "lora"),
    "sampler": _later("sampler", "sampler"),
}
