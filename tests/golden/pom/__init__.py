"""Adapters for PoM, by family: from names and layouts of vectors to modules."""

from __future__ import annotations

from .dih import block, image, tables
from .hom import hom, hom_stream
from .video import video

FAMILIES = {
    "hom": hom,
    "hom_stream": hom_stream,
    "dih_block": block,
    "dih": image,
    "dihpp": image,
    "dit_baseline": image,
    "tables": tables,
    "tvdih": video,
    "t2i": video,
}
