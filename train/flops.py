"""Counting the FLOPs of a traced function, and the peak rates they are compared with.

Model FLOPs utilisation (MFU) of a training step is

    MFU = model FLOPs per step / (seconds per step * number of devices * peak FLOP/s of a device)

with model FLOPs = 3 x the FLOPs of the forward pass (one forward, two for the backward: gradients
of activations and of weights). Work that rematerialisation repeats is not useful work, so count the
forward function alone, `3 * count_flops(forward, ...)`, rather than the traced training step, whose
jaxpr contains the recomputation. A multiply-add is 2 FLOPs; elementwise work is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

# Dense bfloat16 peak of one JAX device, FLOP/s; the first key found in `device_kind` counts. TPU
# v2, v3 and 7x show two JAX devices per chip, so theirs is half of the chip's (46, 123, 2307 e12).
_PEAKS = {
    "tpu": {
        "v2": 23e12,
        "v3": 61.5e12,
        "v4": 275e12,
        "v5 lite": 197e12,
        "v5e": 197e12,
        "v5": 459e12,  # v5p
        "v6": 918e12,
        "7x": 1153.5e12,
    },
    "gpu": {
        "gb200": 2500e12,
        "b200": 2250e12,
        "h100 pcie": 756e12,
        "h100 nvl": 835e12,
        "h100": 989e12,
        "h200": 989e12,  # also GH200
        "a100": 312e12,
        "l40s": 362e12,
        "l4": 121e12,
    },
}


def count_flops(fn: Callable, *args: Any) -> int:
    """FLOPs of `fn(*args)` for all devices together, by tracing alone (nothing runs).

    Args:
        fn: a JAX-traceable function; close over static arguments.
        *args: arrays or `jax.ShapeDtypeStruct`s.
    """
    return jaxpr_flops(jax.make_jaxpr(fn)(*args))


def jaxpr_flops(jaxpr: Any) -> int:
    """FLOPs of a jaxpr, open or closed: 2 per multiply-add of matmuls and convolutions.

    - `scan` counts its body `length` times; `cond` its most expensive branch; `while`, whose trip
      count is unknown, its body and condition once (a lower bound);
    - `shard_map` shapes are per device, so its body counts once per device of the axes it maps;
    - a Pallas call counts its declared `cost_estimate`, or, without one, body x grid;
    - cuDNN attention counts the full T x S product, masked or not, as the einsum form does.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(map(_equation_flops, jaxpr.eqns))


def peak_flops(device: Any) -> float | None:
    """Dense bfloat16 peak of a JAX device in FLOP/s; None when unknown (CPUs and others)."""
    platform = {"cuda": "gpu"}.get(device.platform, device.platform)
    kind = device.device_kind.lower()
    return next((peak for key, peak in _PEAKS.get(platform, {}).items() if key in kind), None)


def mfu(model_flops: float, seconds: float, devices: Sequence[Any]) -> float | None:
    """Model FLOPs utilisation in [0, 1] of a step that takes `seconds` on `devices`.

    Args:
        model_flops: for a training step `3 * count_flops(forward, ...)` of the global batch.

    Returns:
        None where the peak of a device is unknown: leave the figure out.
    """
    peaks = [peak_flops(device) for device in devices]
    if None in peaks or not peaks or seconds <= 0:
        return None
    return model_flops / (seconds * sum(peaks))


def _equation_flops(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name in _HANDLERS:
        return _HANDLERS[name](eqn)
    cost = params.get("cost_estimate")
    if cost is not None:
        return int(cost.flops)
    return sum(map(jaxpr_flops, _sub_jaxprs(params.values())))


def _sub_jaxprs(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _sub_jaxprs(value)
        elif hasattr(getattr(value, "jaxpr", value), "eqns"):
            yield value


def _dot_general(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)


def _conv(eqn: Any) -> int:
    kernel = eqn.invars[1].aval.shape
    _, in_channels, *window = eqn.params["dimension_numbers"].rhs_spec  # already per feature group
    macs = math.prod(kernel[i] for i in (in_channels, *window))
    return 2 * math.prod(eqn.outvars[0].aval.shape) * macs


def _shard_map(eqn: Any) -> int:
    sizes = dict(eqn.params["mesh"].shape)
    axes = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes", sizes))
    return math.prod(sizes[a] for a in axes) * jaxpr_flops(eqn.params["jaxpr"])


def _pallas_call(eqn: Any) -> int:
    cost = eqn.params.get("cost_estimate")
    if cost is not None:
        return int(cost.flops)
    grid = getattr(eqn.params.get("grid_mapping"), "grid", ())
    steps = math.prod(g for g in grid if isinstance(g, int))
    return steps * jaxpr_flops(eqn.params["jaxpr"])


def _cudnn_attention(eqn: Any) -> int:
    query, key, value = (v.aval.shape for v in eqn.invars[:3])
    axis = 1 if eqn.params["layout"] == 0 else 2  # BTNH, else BNTH
    lengths = query[axis] * key[axis]
    heads = query[3 - axis]
    return 2 * query[0] * heads * lengths * (query[-1] + value[-1])


_HANDLERS = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "scan": lambda eqn: eqn.params["length"] * jaxpr_flops(eqn.params["jaxpr"]),
    "while": lambda eqn: (
        jaxpr_flops(eqn.params["body_jaxpr"]) + jaxpr_flops(eqn.params["cond_jaxpr"])
    ),
    "cond": lambda eqn: max(map(jaxpr_flops, eqn.params["branches"])),
    "shard_map": _shard_map,
    "pallas_call": _pallas_call,
    "linear_call": lambda eqn: jaxpr_flops(eqn.params["callee"]),
    "dot_product_attention_fwd_wrapper": _cudnn_attention,
    "dot_product_attention_fwd": _cudnn_attention,
    "dot_product_attention_bwd_wrapper": lambda eqn: 2 * _cudnn_attention(eqn),
    "dot_product_attention_bwd": lambda eqn: 2 * _cudnn_attention(eqn),
}
