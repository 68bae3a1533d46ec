"""FlexiDiT in a layout by analogy with DiT's (`model/convert/dit.py`); no public code has one.

shared: x_embedder.flex.weight (D, C, p*, p*), final_layer.flex.{weight, bias} in place of
        x_embedder.proj.weight and final_layer.linear.*; patch_size_embed.{p} (D)
lora:   the DiT's own names, and modes.{p}.x_embedder.{weight (D, C, p, p), bias},
        modes.{p}.final_layer.{weight, bias}, modes.{p}.patch_size_embed (D),
        modes.{p}.lora.blocks.{i}.{attn.qkv, ..}.{A (r, in), B (out, r)}
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ..nets.dit import position_table
from ..nets.flexidit import FlexiDiTConfig, check_config, init_params
from .dit import PATCH, POSITIONS, check_positions, dit_from_reference, dit_to_reference
from .names import array_module, below, check_names, check_shapes, flatten, nest, shape_of

FLEX = {
    "x_embedder.flex.weight": PATCH,
    "final_layer.flex.weight": "final_layer.linear.weight",
    "final_layer.flex.bias": "final_layer.linear.bias",
}
MODES = "modes."
SHIFT = "patch_size_embed"


def flexidit_from_reference(flat: Mapping[str, Any], config: FlexiDiTConfig) -> dict[str, Any]:
    """The tree of a FlexiDiT from arrays under the names above.

    Args:
        flat: arrays by name; `pos_embed` may be absent, else it is the base's table.

    Raises:
        ValueError: names missing or unknown, arrays of another size, another position table.
    """
    check_config(config)
    if config.variant == "lora":
        base = {name: a for name, a in flat.items() if not name.startswith(MODES)}
        own = below(flat, MODES)
        params = {"base": dit_from_reference(base, config.base)}
        modes: dict[str, Any] = {}
        for p in config.others:
            modes[f"p{p}"] = _mode_from(below(own, f"{p}."), config, f"{MODES}{p}.")
        left = [n for n in own if n.partition(".")[0] not in map(str, config.others)]
        if left:
            raise ValueError(f"patch_sizes={config.patch_sizes}, but the file has {MODES}{left[0]}")
        params["modes"] = modes
    else:
        flat = dict(flat)
        if POSITIONS in flat:
            check_positions(flat.pop(POSITIONS), config.base)
        shifts = {p: f"{SHIFT}.{p}" for p in config.others}
        given = [n for n in flat if n.startswith(f"{SHIFT}.")]
        check_names({n: flat[n] for n in given}, shifts.values())
        missing = [n for n in FLEX if n not in flat]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}: not the layout of the shared variant")
        plain = {FLEX.get(n, n): a for n, a in flat.items() if n not in given}
        params = dit_from_reference(plain, _at_star(config))
        if shifts:
            params[SHIFT] = {f"p{p}": flat[name] for p, name in shifts.items()}
    check_shapes(flatten(params), _shapes(config))
    return params


def flexidit_to_reference(params: Mapping[str, Any], config: FlexiDiTConfig) -> dict[str, Any]:
    """Arrays under the names above, `pos_embed` of the base included; inverse of
    `flexidit_from_reference`.

    Raises:
        ValueError: the layout has no such mixer.
    """
    check_config(config)
    if config.variant == "lora":
        flat = dit_to_reference(params["base"], config.base)
        for p in config.others:
            own = _mode_to(params["modes"][f"p{p}"], config, p)
            flat |= {f"{MODES}{p}.{name}": a for name, a in own.items()}
        return flat
    net = {name: tree for name, tree in params.items() if name != SHIFT}
    theirs = {plain: flex for flex, plain in FLEX.items()}
    flat = dit_to_reference(net, _at_star(config))
    del flat[POSITIONS]  # of the underlying patch; the file's is of the base
    flat = {theirs.get(n, n): a for n, a in flat.items()}
    flat |= {f"{SHIFT}.{p}": params[SHIFT][f"p{p}"] for p in config.others}
    flat[POSITIONS] = np.float32(position_table(config.base))[None]
    return flat


def _at_star(config: FlexiDiTConfig):
    """The DiT that has the shapes of the shared weights."""
    return dataclasses.replace(config.base, patch_size=config.star)


def _mode_from(flat: Mapping[str, Any], config: FlexiDiTConfig, where: str) -> dict[str, Any]:
    """One mode of the lora variant."""
    layers = config.base.n_layer
    factor = lambda i, target, side: f"lora.blocks.{i}.{target}.{side}"
    ends = ["x_embedder.weight", "x_embedder.bias", "final_layer.weight", "final_layer.bias", SHIFT]
    every = itertools.product(range(layers), config.targets, "AB")
    wanted = [*ends, *(factor(*each) for each in every)]
    try:
        check_names(flat, wanted)
        shape_of(flat, "x_embedder.weight", 4)
        for name in wanted[len(ends) :] + ["final_layer.weight"]:
            shape_of(flat, name, 2)
    except ValueError as error:
        raise ValueError(f"{where}*: {error}") from error
    tree = {
        "x_embedder/kernel": _patch_from(flat["x_embedder.weight"]),
        "x_embedder/bias": flat["x_embedder.bias"],
        "final/kernel": flat["final_layer.weight"].T,
        "final/bias": flat["final_layer.bias"],
        SHIFT: flat[SHIFT],
    }
    for target in config.targets:
        for side in "AB":
            arrays = [flat[factor(i, target, side)].T for i in range(layers)]
            path = f"lora/{target.replace('.', '/')}/{side}"
            tree[path] = array_module(arrays).stack(arrays)
    return nest(tree)


def _mode_to(own: Mapping[str, Any], config: FlexiDiTConfig, patch: int) -> dict[str, Any]:
    base, own = config.base, flatten(own)
    kernel = own["x_embedder/kernel"].reshape(patch, patch, base.in_channels, base.d_model)
    flat = {
        "x_embedder.weight": kernel.transpose(3, 2, 0, 1),
        "x_embedder.bias": own["x_embedder/bias"],
        "final_layer.weight": own["final/kernel"].T,
        "final_layer.bias": own["final/bias"],
        SHIFT: own[SHIFT],
    }
    for target in config.targets:
        for side in "AB":
            stacked = own[f"lora/{target.replace('.', '/')}/{side}"]
            for i in range(base.n_layer):
                flat[f"lora.blocks.{i}.{target}.{side}"] = stacked[i].T
    return flat


def _patch_from(weight):
    """(D, C, p, p) as [p p C, D], rows (row, column, channel)."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _shapes(config: FlexiDiTConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, computed without memory."""
    tree = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return {name: tuple(a.shape) for name, a in flatten(tree).items()}
