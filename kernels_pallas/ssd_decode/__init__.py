"""Decoding with Mamba-2's dual form (arXiv 2405.21060, section 3): past tokens instead of a state.

Unrolled, the recurrence of `ssd` reads, head by head and from a zero state,

    y_t = sum_{s <= t} exp(cs_t - cs_s) dt_s (C_t . B_s) x_s        cs_t = sum_{s <= t} dt_s A

so a step may read the tokens so far instead of updating a state [P, N]: t (P + 2) + t N/H numbers a
head, read only, against 2 P N read and written. That is less traffic up to about t = 2 N.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from .. import dispatch
from ..compat import vary
from ..ssd import prepare
from .cache import DualCache, append, block_heads, init_cache, resize
from .pallas_gpu import ssd_decode_gpu, ssd_decode_step_gpu, unable
from .reference import ssd_decode_reference
from .xla import ssd_decode_xla

IMPLEMENTATIONS = {
    "reference": ssd_decode_reference,
    "xla": ssd_decode_xla,
    "pallas_gpu": ssd_decode_gpu,
}


def _check(cache: DualCache, **arrays: tuple) -> None:
    """Shapes of a cache, and of others given as (array, axes, axes, ..), None if not there."""
    if cache.scale.ndim != 4 or cache.B.ndim != 4 or cache.x.shape[-1] % cache.scale.shape[-1]:
        shapes = {name: tuple(v.shape) for name, v in cache._asdict().items()}
        raise ValueError(f"not a cache as `init_cache` makes it: {shapes}")
    sizes = cache.sizes
    sizes["L"] = sizes["K"] * sizes["P"]
    sizes["W"] = sizes["H"] * sizes["P"] + 2 * sizes["G"] * sizes["N"]
    own = {"x": "RJSL", "B": "RSGN", "cs": "RH"}
    checked = {f"cache.{name}": (getattr(cache, name), axes) for name, axes in own.items()}
    for name, (array, *specs) in (checked | arrays).items():
        wanted = [tuple(sizes[axis] for axis in spec) for spec in specs]
        if array is not None and tuple(array.shape) not in wanted:
            expected = " or ".join(str(shape) for shape in wanted)
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
    _check(cache, C=(C, "RGN"))
    name = implementation_for(cache, implementation)
    index = jnp.asarray(index, jnp.int32)
    cache, C, index = vary((cache, C, index), (cache, C, index))
    return IMPLEMENTATIONS[name](cache, C, index)


def ssd_decode_step(
    cache: DualCache,
    xBC: Array,
    dt: Array,
    A: Array,
    D: Array | None = None,
    *,
    index: Any,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    implementation: str | None = None,
) -> tuple[Array, DualCache]:
    """One step of `ssd` by the dual form: the token goes into slot `index`, its output comes out.

    On a GPU one kernel does both, and changes the cache in place if nobody needs the old one.

    Args:
        cache: the tokens before this one, in slots 0 .. index - 1.
        xBC: [R, H P + 2 G N] x, B and C side by side, as a layer's convolution leaves them. Used in
            the dtype of the cache.
        dt: [R, H] step sizes before bias, softplus and clamp.
        A: [H] float32, negative.
        D: [H] or [H, P] skip, or None.
        index: scalar int32, may be traced.
        dt_bias, dt_softplus, dt_limit: as for `ssd`.
        implementation: as for `ssd_decode`.

    Returns:
        y [R, H, P] float32 (float64 for float64 inputs), and the cache with the token.

    Raises:
        ValueError: as `ssd_decode`.
    """
    _check(cache, xBC=(xBC, "RW"), dt=(dt, "RH"), A=(A, "H"), D=(D, "H", "HP"),
           dt_bias=(dt_bias, "H"))  # fmt: skip
    name = implementation_for(cache, implementation)
    index = jnp.asarray(index, jnp.int32)
    operands = (cache, xBC.astype(cache.x.dtype), dt, A, D, index)
    cache, xBC, dt, A, D, index = vary(operands, operands)
    if name == "pallas_gpu":
        activation = dict(dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit)
        return ssd_decode_step_gpu(cache, xBC, dt, A, D, index, **activation)
    sizes, acc = cache.sizes, prepare.wide(cache.x.dtype)
    rows, heads, width, groups, states = (sizes[k] for k in "RHPGN")
    x = xBC[:, : heads * width].reshape(rows, heads, width)
    B, C = jnp.split(xBC[:, heads * width :].reshape(rows, 2 * groups, states), 2, axis=1)
    dt = prepare.activate(dt, dt_bias, dt_softplus, dt_limit).astype(acc)
    cache = append(cache, x, dt, dt * A.astype(acc), B, index)
    y = IMPLEMENTATIONS[name](cache, C, index)
    return y if D is None else y + D.reshape(heads, -1).astype(acc) * x.astype(acc), cache


__all__ = [
    "IMPLEMENTATIONS",
    "DualCache",
    "append",
    "block_heads",
    "implementation_for",
    "init_cache",
    "resize",
    "ssd_decode",
    "ssd_decode_step",
]
