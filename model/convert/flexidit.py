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
from .dit import (
    PATCH,
    POSITIONS,
    check_positions,
    dit_config_from_fields,
    dit_config_from_reference,
    dit_fields,
    dit_from_reference,
    dit_to_reference,
)
from .names import array_module, below, check_names, check_shapes, flatten, nest, shape_of

FLEX = {
    "x_embedder.flex.weight": PATCH,
    "final_layer.flex.weight": "final_layer.linear.weight",
    "final_layer.flex.bias": "final_layer.linear.bias",
}
MODES = "modes."
SHIFT = "patch_size_embed"
# Of `FlexiDiTConfig`, beside the arguments of the DiT.
FIELDS = (
    "patch_sizes", "variant", "underlying", "resize", "rank", "alpha", "targets", "detail",
)  # fmt: skip


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


def flexidit_fields(config: FlexiDiTConfig) -> dict[str, Any]:
    """Arguments of the base's published class, and those of `FlexiDiTConfig` under our names.

    Raises:
        ValueError: the layout has no such base.
    """
    own = {name: getattr(config, name) for name in FIELDS}
    own |= {name: list(own[name]) for name in ("patch_sizes", "targets")}
    return dit_fields(config.base) | own


def flexidit_config_from_fields(fields: Mapping[str, Any]) -> FlexiDiTConfig:
    """Inverse of `flexidit_fields`.

    Raises:
        ValueError: unknown fields, values of another type, or a config that cannot be.
    """
    own = {name: fields[name] for name in FIELDS if name in fields}
    for name, value in own.items():
        default = getattr(FlexiDiTConfig, name)
        kinds = {float: (int, float), tuple: (list, tuple)}.get(type(default), type(default))
        if not isinstance(value, kinds):
            raise ValueError(f"{name}={value!r}, expected a value of type {type(default).__name__}")
        own[name] = type(default)(value)
    base = dit_config_from_fields({n: v for n, v in fields.items() if n not in own})
    config = FlexiDiTConfig(base=base, **own)
    check_config(config)
    return config


def flexidit_config_from_reference(
    flat: Mapping[str, Any], *, patch_size: int = 0, **known
) -> FlexiDiTConfig:
    """`FlexiDiTConfig` from names and shapes; `alpha` and `resize`, which they do not tell, are the
    defaults.

    Args:
        flat: arrays by name.
        patch_size: of the base; the shared variant does not tell.
        known: as `dit_config_from_reference` takes it.

    Raises:
        ValueError: not this layout, or sizes that must be given.
    """
    if not any(name.startswith(MODES) for name in flat):
        star = shape_of(flat, "x_embedder.flex.weight", 4)[2]
        if not patch_size:
            raise ValueError("the shapes do not tell net.base.patch_size; give it")
        sizes = [n.partition(".")[2] for n in flat if n.startswith(f"{SHIFT}.")]
        base = dit_config_from_reference({FLEX.get(n, n): a for n, a in flat.items()}, **known)
        side = known.get("input_size") or base.input_size // star * patch_size
        base = dataclasses.replace(base, patch_size=patch_size, input_size=side)
        options: dict[str, Any] = {"underlying": star}
    else:
        own = below(flat, MODES)
        sizes = {name.partition(".")[0] for name in own}
        rest = {name: a for name, a in flat.items() if not name.startswith(MODES)}
        base = dit_config_from_reference(rest, **known)
        first = f"{min(sizes)}.lora.blocks.0."
        targets = [n[len(first) : -2] for n in own if n.startswith(first) and n.endswith(".A")]
        if not targets:
            raise ValueError(f"no {MODES}{first}*: this is not the layout of adapters")
        rank = shape_of(own, f"{first}{targets[0]}.A", 2)[0]
        options = {"variant": "lora", "rank": rank, "targets": tuple(targets)}
    if not all(map(str.isdigit, sizes)):
        raise ValueError(f"patch sizes {', '.join(sorted(sizes))} are not all numbers")
    patch_sizes = tuple(sorted({base.patch_size, *map(int, sizes)}))
    config = FlexiDiTConfig(base=base, patch_sizes=patch_sizes, **options)
    check_config(config)
    return config


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
