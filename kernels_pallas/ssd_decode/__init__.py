"""Decoding with Mamba-2's dual form (arXiv 2405.21060, section 3): past tokens instead of a state.

Unrolled, the recurrence of `ssd` reads, head by head and from a zero state,

    y_t = sum_{s <= t} exp(cs_t - cs_s) dt_s (C_t . B_s) x_s        cs_t = sum_{s <= t} dt_s A

so a step may read the tokens so far instead of updating a state [P, N]: t (P + 2) + t N/H numbers a
head, read only, against 2 P N read and written. That is less traffic up to about t = 2 N.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from .. import dispatch
from ..compat import vary
from .cache import DualCache, append, block_heads, init_cache, resize
from .pallas_gpu import ssd_decode_gpu, unable
from .reference import ssd_decode_reference
from .xla import ssd_decode_xla

IMPLEMENTATIONS = {
    "reference": ssd_decode_reference,
    "xla": ssd_decode_xla,
    "pallas_gpu": ssd_decode_gpu,
}


def _check(cache: DualCache, C: Array) -> None:
    if cache.scale.ndim != 4 or cache.B.ndim != 4 or cache.x.shape[-1] % cache.scale.shape[-1]:
        shapes = {name: tuple(v.shape) for name, v in cache._asdict().items()}
        raise ValueError(f"not a cache as `init_cache` makes it: {shapes}")
    sizes = cache.sizes
    lane = sizes["K"] * sizes["P"]
    for name, array, axes in (
        ("cache.x", cache.x, "RJS"), ("cache.B", cache.B, "RSGN"), ("cache.cs", cache.cs, "RH"),
        ("C", C, "RGN"),
    ):  # fmt: skip
        expected = tuple(sizes[axis] for axis in axes) + ((lane,) if name == "cache.x" else ())
        if tuple(array.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {expected}")
    if sizes["J"] % sizes["G"]:
        raise ValueError(f"{sizes['J']} blocks of heads are not a multiple of {sizes['G']} groups")


def implementation_for(cache: DualCache, implementation: str | None = None) -> str:
    """The implementation `ssd_decode` runs on such a cache (arrays or their shapes).

    "pallas_gpu" reads the slots up to the index only; the others read all slots, so that their
    caller does well to start with few slots and to `resize`.
    """
    return dispatch.resolve(
        "ssd_decode", implementation, IMPLEMENTATIONS, unable=unable(cache), x=cache.B
    )


def ssd_decode(
    cache: DualCache, C: Array, index: Any, *, implementation: str | None = None
) -> Array:
    """y = sum_{s <= index} exp(cs + scale_s) (C . B_s) x_s, the newest token's output.

    Args:
        cache: the tokens so far, the newest in slot `index` (see `append`). Slots after it may hold
            anything; only "xla" wants the x there finite, as `init_cache` and `append` leave it.
        C: [R, G, N] of the newest token; head h uses group h // (H/G).
        index: scalar int32, may be traced.
        implementation: None (best available), "reference", "xla", or "pallas_gpu" (also as
            "pallas"); see `implementation_for`.

    Returns:
        y [R, H, P] float32 (float64 for float64 inputs), without the skip D x.

    Raises:
        ValueError: shapes that do not fit (with the numbers), or an implementation that does not
            exist here or does not take such a cache.
    """
    _check(cache, C)
    name = implementation_for(cache, implementation)
    index = jnp.asarray(index, jnp.int32)
    cache, C, index = vary((cache, C, index), (cache, C, index))
    return IMPLEMENTATIONS[name](cache, C, index)


__all__ = [
    "IMPLEMENTATIONS",
    "DualCache",
    "append",
    "block_heads",
    "implementation_for",
    "init_cache",
    "resize",
    "ssd_decode",
]
