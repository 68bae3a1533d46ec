"""Adapters for DiT, by family: from names and layouts of vectors to modules."""

from __future__ import annotations

from .net import forward, pos_embed
from .processes import bpd, loss, respacing, sample, sit, tables

FAMILIES = {
    "forward": forward,
    "pos_embed": pos_embed,
    "tables": tables,
    "respacing": respacing,
    "loss": loss,
    "bpd": bpd,
    "sample": sample,
    "sit": sit,
}
