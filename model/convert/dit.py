"""The checkpoint layout of DiT (`facebookresearch/DiT`), which SiT (`willisma/SiT`) shares.

    pos_embed, x_embedder.proj, t_embedder.mlp.{0, 2}, y_embedder.embedding_table,
    blocks.{i}.{attn.qkv, attn.proj, mlp.fc1, mlp.fc2, adaLN_modulation.1},
    final_layer.{linear, adaLN_modulation.1}

Linear weights are (out, in). A patch enters flattened (channel, row, column), and leaves (row,
column, channel). Arrays may be numpy's, or jax's as in `jax.eval_shape`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..nets.dit import DiT, DiTConfig, position_table
from .names import array_module, check_names, check_shapes, flatten, nest, shape_of

POSITIONS, POSITION_TOLERANCE = "pos_embed", 1e-5
PATCH = "x_embedder.proj.weight"
TABLE = "y_embedder.embedding_table.weight"
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
HEADS = {width: heads for _, width, heads in SIZES.values()}
# Our field -> their argument of the net's class.
FIELDS = {
    "input_size": "input_size", "patch_size": "patch_size", "in_channels": "in_channels",
    "d_model": "hidden_size", "n_layer": "depth", "n_head": "num_heads", "mlp_ratio": "mlp_ratio",
    "class_dropout": "class_dropout_prob", "num_classes": "num_classes",
    "learn_sigma": "learn_sigma",
}  # fmt: skip
# Our module -> theirs; each has a kernel (their weight, transposed) and a bias.
TOP = {
    "t_embedder/fc1": "t_embedder.mlp.0",
    "t_embedder/fc2": "t_embedder.mlp.2",
    "final": "final_layer.linear",
    "final/modulation": "final_layer.adaLN_modulation.1",
}
BLOCK = {
    "attn/qkv": "attn.qkv",
    "attn/proj": "attn.proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}


def _linear(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}/kernel": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}


def _names(modules: Mapping[str, str]) -> dict[str, str]:
    return {o: t for ours, theirs in modules.items() for o, t in _linear(ours, theirs).items()}


def _to_ours(name: str, a):
    """Their array of a block or of the top as we lay it out."""
    if name.endswith(".bias"):
        return a
    if a.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(a.shape)}, expected (out, in)")
    return a.T


def dit_from_reference(flat: Mapping[str, Any], config: DiTConfig) -> dict[str, Any]:
    """Parameters of `DiT` from a published checkpoint's arrays.

    Args:
        flat: arrays by name. `pos_embed` may be absent; it must be the table the net computes.
        config: of the net that is to take them.

    Raises:
        ValueError: names missing or unknown, arrays of another size, or another position table.
    """
    _check_net(config)
    flat = dict(flat)
    if POSITIONS in flat:
        check_positions(flat.pop(POSITIONS), config)
    top, block = _names(TOP), _names(BLOCK)
    theirs = {*top.values(), PATCH, "x_embedder.proj.bias", TABLE}
    theirs |= {f"blocks.{i}.{name}" for i in range(config.n_layer) for name in block.values()}
    check_names(flat, theirs)
    shape_of(flat, PATCH, 4)
    params = {ours: _to_ours(name, flat[name]) for ours, name in top.items()}
    params |= {
        "x_embedder/kernel": flat[PATCH].transpose(2, 3, 1, 0).reshape(-1, config.d_model),
        "x_embedder/bias": flat["x_embedder.proj.bias"],
        "y_embedder/embedding": flat[TABLE],
    }
    for ours, name in block.items():
        each = [f"blocks.{i}.{name}" for i in range(config.n_layer)]
        arrays = [_to_ours(n, flat[n]) for n in each]
        if len({tuple(a.shape) for a in arrays}) > 1:
            raise ValueError(f"blocks.*.{name}: {[tuple(a.shape) for a in arrays][:4]}, .. differ")
        params[f"blocks/{ours}"] = array_module(arrays).stack(arrays)
    check_shapes(params, _shapes(config))
    return nest(params)


def dit_to_reference(params: Mapping[str, Any], config: DiTConfig) -> dict[str, Any]:
    """Published names and layouts, `pos_embed` included; inverse of `dit_from_reference`.

    Raises:
        ValueError: the layout has no such mixer, no context or no videos.
    """
    _check_net(config)
    params, p = flatten(params), config.patch_size
    kernel = params["x_embedder/kernel"].reshape(p, p, config.in_channels, config.d_model)
    flat = {
        POSITIONS: np.float32(position_table(config))[None],
        PATCH: kernel.transpose(3, 2, 0, 1),
        "x_embedder.proj.bias": params["x_embedder/bias"],
        TABLE: params["y_embedder/embedding"],
    }
    theirs = lambda name, a: a.T if name.endswith(".weight") else a
    flat |= {name: theirs(name, params[ours]) for ours, name in _names(TOP).items()}
    for ours, name in _names(BLOCK).items():
        stacked = params[f"blocks/{ours}"]
        flat |= {f"blocks.{i}.{name}": theirs(name, stacked[i]) for i in range(config.n_layer)}
    return flat


def _check_net(config: DiTConfig) -> None:
    if config.mixer != "attention":
        raise ValueError(f"net.mixer={config.mixer}, but the DiT layout knows attention only")
    if config.context != "none":
        raise ValueError(f"net.context={config.context}, but the DiT layout knows no context")
    if config.frames:
        raise ValueError(f"net.frames={config.frames}, but the DiT layout is of images")


def check_positions(given: Any, config: DiTConfig) -> None:
    """The table `pos_embed` of a file must be the computed one: that of the net, or, where the net
    is of another resolution and its base_size says how to take that, of the file's own.

    Raises:
        ValueError: another resolution and no base_size, or other positions.
    """
    tokens, width = config.tokens, config.d_model
    if tuple(given.shape) != (1, tokens, width):
        size = size_of_positions(given, config.patch_size)
        if not size or not config.base_size or given.shape[2] != width:
            raise ValueError(
                f"{POSITIONS} has shape {tuple(given.shape)}, expected (1, {tokens}, {width}): the "
                f"file is of another resolution; set net.input_size={size} (now "
                f"{config.input_size}, patches of {config.patch_size}), or "
                f"net.base_size={size} to interpolate its positions"
            )
        config = dataclasses.replace(config, input_size=size, base_size=0)
    if not isinstance(given, np.ndarray):
        return  # shapes only
    error = np.max(np.abs(given[0] - position_table(config)))
    if not error <= POSITION_TOLERANCE:
        raise ValueError(
            f"{POSITIONS} differs from the computed table by {error:.2g}, more than "
            f"{POSITION_TOLERANCE:g}: the file was made with other positions (net.base_size now "
            f"{config.base_size})"
        )


def size_of_positions(given: Any, patch: int) -> int:
    """The input size that a table `pos_embed` (1, tokens, width) is of; 0 if it is of none."""
    side = math.isqrt(given.shape[1]) if given.ndim == 3 else 0
    return side * patch if side and side**2 == given.shape[1] else 0


def _shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a net, computed without memory."""
    shape = (1, config.input_size, config.input_size, config.in_channels)
    x, one = jnp.zeros(shape), jnp.zeros((1,), jnp.int32)
    variables = jax.eval_shape(DiT(config).init, {"params": jax.random.key(0)}, x, one, one)
    return {name: tuple(a.shape) for name, a in flatten(variables["params"]).items()}


def dit_config_from_reference(
    flat: Mapping[str, Any], *, n_head: int = 0, class_dropout: float = 0.1, input_size: int = 0
) -> DiTConfig:
    """`DiTConfig` from names and shapes of a published checkpoint.

    Args:
        flat: arrays by name.
        n_head: shapes do not tell; 0 takes that of the published model of this width.
        class_dropout: nor do they tell the probability; 0 means that the label table has no row for
            a null class.
        input_size: 0 reads it from `pos_embed`.

    Raises:
        ValueError: not this layout, sizes that contradict each other, or that must be given.
    """
    if PATCH not in flat:
        raise ValueError(f"no {PATCH}: this is not the DiT layout, or not all of it")
    width, channels, patch, _ = shape_of(flat, PATCH, 4)
    if not n_head and width not in HEADS:
        raise ValueError(
            f"the shapes do not tell net.n_head, nor is d_model={width} published; give it"
        )
    blocks = {int(m[1]) for n in flat if (m := re.match(r"blocks\.(\d+)\.", n))}
    if blocks != set(range(len(blocks))) or not blocks:
        raise ValueError(f"blocks {sorted(blocks)} are not numbered from 0 without gaps")
    if not input_size:
        if POSITIONS not in flat:
            raise ValueError(f"no {POSITIONS}: the file does not tell net.input_size; give it")
        tokens = shape_of(flat, POSITIONS, 3)[1]
        input_size = math.isqrt(tokens) * patch
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"{POSITIONS} has {tokens} tokens, which is no square")
    out = shape_of(flat, "final_layer.linear.weight", 2)[0]
    known = {channels * patch**2: False, 2 * channels * patch**2: True}
    if out not in known:
        raise ValueError(f"the last layer has {out} rows; patches of {patch} need {list(known)}")
    hidden = shape_of(flat, "blocks.0.mlp.fc1.weight", 2)[0]
    ratio = hidden / width
    if int(ratio * width) < hidden:  # lost to rounding
        ratio = math.nextafter(ratio, math.inf)
    return DiTConfig(
        input_size=input_size, patch_size=patch, in_channels=channels, d_model=width,
        n_layer=len(blocks), n_head=n_head or HEADS[width],
        mlp_ratio=ratio,
        num_classes=shape_of(flat, TABLE, 2)[0] - (class_dropout > 0),
        class_dropout=class_dropout, learn_sigma=known[out],
    )  # fmt: skip


def dit_config_from_fields(fields: Mapping[str, Any]) -> DiTConfig:
    """`DiTConfig` from the arguments of the published class, or from those of its training script.

    Args:
        fields: input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio,
            class_dropout_prob, num_classes, learn_sigma (those not given have the published
            default); or instead of sizes model ("DiT-XL/2") and image_size (8 times input_size);
            and base_size, which is ours.

    Raises:
        ValueError: fields that are not known, or are no numbers.
    """
    fields = dict(fields)
    config: dict[str, Any] = {}
    if "model" in fields:
        name = fields.pop("model")
        found = re.fullmatch(r"(?:DiT|SiT)-(S|B|L|XL)/(\d)", str(name))
        if not found:
            raise ValueError(f"model={name!r}, expected a name like DiT-XL/2")
        depth, width, heads = SIZES[found[1]]
        config = {"n_layer": depth, "d_model": width, "n_head": heads, "patch_size": int(found[2])}
    if "image_size" in fields:
        fields["input_size"] = _number("image_size", fields.pop("image_size"), int) // 8
    if "base_size" in fields:
        config["base_size"] = _number("base_size", fields.pop("base_size"), int)
    unknown = sorted(fields.keys() - set(FIELDS.values()))
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is not known; known: {', '.join(FIELDS.values())}")
    for ours, theirs in FIELDS.items():
        if theirs in fields:
            kind = type(getattr(DiTConfig, ours))
            config[ours] = _number(theirs, fields[theirs], kind)
    return DiTConfig(**config)


def _number(name: str, value: Any, kind: type) -> Any:
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}={value!r}, expected a value of type {kind.__name__}")
    return kind(value)


def dit_fields(config: DiTConfig) -> dict[str, Any]:
    """The arguments of the published class (and base_size, if there is one, of which it sees the
    effect in `pos_embed`); inverse of `dit_config_from_fields`.

    Raises:
        ValueError: the layout has no such mixer, no context or no videos.
    """
    _check_net(config)
    own = {"base_size": config.base_size} if config.base_size else {}
    return {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()} | own
