"""Adapters for DiT, by family: from names and layouts of vectors to modules."""

from __future__ import annotations

from .net import forward, pos_embed

FAMILIES = {
    "forward": forward,
    "pos_embed": pos_embed,
}
