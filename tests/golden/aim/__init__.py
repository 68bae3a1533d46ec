"""Adapters for AiM and its tokenizer, by family: from names and layouts of vectors to modules."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from ..compare import Report
from .net import aim
from .sampling import sampling_filters


def _later(module: str, name: str) -> Callable[[Report], None]:
    """An adapter whose module is imported when a case needs it."""

    def adapter(report: Report) -> None:
        getattr(importlib.import_module(f"{__name__}.{module}"), name)(report)

    return adapter


FAMILIES = {
    "aim": aim,
    "sampling_filters": sampling_filters,
    "aim_hub": _later("hub", "hub"),
    "vq": _later("tokenizer", "vq"),
    "stage1_patchgan": _later("stage1", "patchgan"),
    "stage1_lpips_head": _later("stage1", "lpips_head"),
}
