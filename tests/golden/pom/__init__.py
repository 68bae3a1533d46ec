"""Adapters for polynomial mixers, by family: from names and layouts of vectors to modules."""

from __future__ import annotations

from . import jit
from .dih import block, image
from .hom import hom, hom_stream
from .kernels import kernel
from .layers import layer
from .samplers import image_sampler, video_sampler
from .streams import stream
from .tables import tables
from .video import video

FAMILIES = {
    "kernel": kernel,
    "pom": layer,
    "rope": layer,
    "rope1d": layer,
    "rope2d": layer,
    "stream": stream,
    "hom": hom,
    "hom_stream": hom_stream,
    "dih_block": block,
    "dih": image,
    "dihpp": image,
    "dit_baseline": image,
    "tables": tables,
    "tvdih": video,
    "t2i": video,
    "smp": image_sampler,
    "smp_video": video_sampler,
    "jit_block": jit.block,
    "jit_model": jit.model,
    "smp_jit": jit.sampler,
}
