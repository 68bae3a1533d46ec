"""Adapters for polynomial mixers, by family: from names and layouts of vectors to modules."""

from __future__ import annotations

from . import jit
from .kernels import kernel
from .layers import layer
from .streams import stream

FAMILIES = {
    "kernel": kernel,
    "pom": layer,
    "rope": layer,
    "rope1d": layer,
    "rope2d": layer,
    "stream": stream,
    "jit_block": jit.block,
    "jit_model": jit.model,
    "smp_jit": jit.sampler,
}
