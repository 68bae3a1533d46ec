"""The checkpoint layout of JiT with polynomial mixers (`davidpicard/JiTpp`).

    pos_embed, in_context_posemb, t_embedder.mlp.{0, 2}, y_embedder.embedding_table,
    x_embedder.{proj1, proj2},
    blocks.{i}.{norm1, attn.*, norm2, mlp.{w12, w3}, adaLN_modulation.1},
    final_layer.{norm_final, linear, adaLN_modulation.1}

Linear weights are (out, in), those of the patch (out, in, row, column). Below "attn" are the names
of model/convert/pom.py, with tables of the rotation, which are constants here. Arrays may be
numpy's, or jax's as in `jax.eval_shape`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..layers.positions import sincos_positions
from ..nets.jit import SIZES, JiT, JiTConfig, make_mixer
from .names import array_module, below, check_names, check_shapes, count_of, flatten, nest, shape_of
from .pom import pom_from_reference, pom_to_reference

POSITIONS, CONTEXT = "pos_embed", "in_context_posemb"
CONTEXT_NAME = "context_positions"  # our name
POSITION_TOLERANCE = 1e-5
PATCH, EXPAND = "x_embedder.proj1.weight", "x_embedder.proj2"
TABLE = "y_embedder.embedding_table.weight"
PREFIXES = ("denoiser.net.", "net.")
STARTS = {width: start for _, width, _, _, start in SIZES.values()}
# Our arrays -> theirs, of a block (without the mixer) and of the rest; kernels are transposed.
BLOCK = {
    "norm1/g": "norm1.weight",
    "norm2/g": "norm2.weight",
    "mlp/fc1/kernel": "mlp.w12.weight",
    "mlp/fc1/bias": "mlp.w12.bias",
    "mlp/fc2/kernel": "mlp.w3.weight",
    "mlp/fc2/bias": "mlp.w3.bias",
    "modulation/kernel": "adaLN_modulation.1.weight",
    "modulation/bias": "adaLN_modulation.1.bias",
}
TOP = {
    "t_embedder/fc1/kernel": "t_embedder.mlp.0.weight",
    "t_embedder/fc1/bias": "t_embedder.mlp.0.bias",
    "t_embedder/fc2/kernel": "t_embedder.mlp.2.weight",
    "t_embedder/fc2/bias": "t_embedder.mlp.2.bias",
    "y_embedder/embedding": TABLE,
    "x_embedder/expand/bias": f"{EXPAND}.bias",
    "final/norm/g": "final_layer.norm_final.weight",
    "final/kernel": "final_layer.linear.weight",
    "final/bias": "final_layer.linear.bias",
    "final/modulation/kernel": "final_layer.adaLN_modulation.1.weight",
    "final/modulation/bias": "final_layer.adaLN_modulation.1.bias",
}
SPECIAL = {
    "x_embedder/reduce/kernel": PATCH,
    "x_embedder/expand/kernel": f"{EXPAND}.weight",
    CONTEXT_NAME: CONTEXT,
}


def _turn(name: str, a: Any) -> Any:
    """An array of BLOCK or TOP from one layout to the other."""
    if not name.endswith("/kernel"):
        return a
    if a.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(a.shape)}, expected two axes")
    return a.T


def block_from_reference(flat: Mapping[str, Any], config: JiTConfig) -> dict[str, Any]:
    """Parameters of one `Block` from its arrays, named without "blocks.{i}.".

    Raises:
        ValueError: names missing or unknown, or arrays of another size.
    """
    attn, rest = below(flat, "attn."), {n: a for n, a in flat.items() if not n.startswith("attn.")}
    mixer = pom_from_reference(attn, make_mixer(config, parent=None))
    check_names(rest, BLOCK.values())
    params = {ours: _turn(ours, rest[theirs]) for ours, theirs in BLOCK.items()}
    return {**nest(params), "mixer": mixer}


def block_to_reference(params: Mapping[str, Any], config: JiTConfig) -> dict[str, Any]:
    """Inverse of `block_from_reference`, tables included."""
    flat = flatten({name: tree for name, tree in params.items() if name != "mixer"})
    mixer = make_mixer(config, parent=None)
    arrays = {theirs: _turn(ours, flat[ours]) for ours, theirs in BLOCK.items()}
    attn = pom_to_reference(params["mixer"], mixer, config.grid)
    return arrays | {f"attn.{name}": a for name, a in attn.items()}


def jit_from_reference(flat: Mapping[str, Any], config: JiTConfig) -> dict[str, Any]:
    """Parameters of `JiT` from a published checkpoint's arrays.

    Args:
        flat: arrays by name, see `bare_names`. `pos_embed` and tables of the rotation may be
            absent; they must be what the net computes.
        config: of the net that is to take them.

    Raises:
        ValueError: names missing or unknown, arrays of another size, or other positions.
    """
    flat = dict(flat)
    if POSITIONS in flat:
        _check_positions(flat.pop(POSITIONS), config)
    special = {o: t for o, t in SPECIAL.items() if o != CONTEXT_NAME or _has_context(config)}
    rest = {n: a for n, a in flat.items() if not n.startswith("blocks.")}
    check_names(rest, {*TOP.values(), *special.values()})
    blocks = count_of(flat, r"blocks\.(\d+)\.")
    if blocks != config.n_layer:
        raise ValueError(f"the file has {blocks} blocks, the config n_layer={config.n_layer}")
    shape_of(flat, PATCH, 4)
    shape_of(flat, f"{EXPAND}.weight", 4)
    params = {ours: _turn(ours, flat[theirs]) for ours, theirs in TOP.items()}
    params |= {
        "x_embedder/reduce/kernel": flat[PATCH].transpose(2, 3, 1, 0).reshape(
            -1, flat[PATCH].shape[0]
        ),
        "x_embedder/expand/kernel": flat[f"{EXPAND}.weight"][:, :, 0, 0].T,
    }  # fmt: skip
    if _has_context(config):
        shape_of(flat, CONTEXT, 3)
        params[CONTEXT_NAME] = flat[CONTEXT][0]
    each = [
        flatten(block_from_reference(below(flat, f"blocks.{i}."), config)) for i in range(blocks)
    ]
    for stack, part in (("blocks", each[: config.plain_blocks]),
                        ("context_blocks", each[config.plain_blocks :])):  # fmt: skip
        for name in part[0] if part else ():
            arrays = [block[name] for block in part]
            if len({tuple(a.shape) for a in arrays}) > 1:
                raise ValueError(f"{name} of blocks: {[tuple(a.shape) for a in arrays][:4]} differ")
            params[f"{stack}/{name}"] = array_module(arrays).stack(arrays)
    check_shapes(params, _shapes(config))
    return nest(params)


def _has_context(config: JiTConfig) -> bool:
    return config.plain_blocks < config.n_layer


def jit_to_reference(params: Mapping[str, Any], config: JiTConfig) -> dict[str, Any]:
    """Published names and layouts, `pos_embed` and tables included, in the order of the published
    module; inverse of `jit_from_reference`."""
    flat, p = flatten(params), config.patch_size
    arrays = {theirs: _turn(ours, flat[ours]) for ours, theirs in TOP.items()}
    kernel = flat["x_embedder/reduce/kernel"].reshape(p, p, config.in_channels, -1)
    arrays |= {
        POSITIONS: np.float32(sincos_positions(config.d_model, config.grid))[None],
        PATCH: kernel.transpose(3, 2, 0, 1),
        f"{EXPAND}.weight": flat["x_embedder/expand/kernel"].T[:, :, None, None],
    }
    if _has_context(config):
        arrays[CONTEXT] = flat[CONTEXT_NAME][None]
    for i in range(config.n_layer):
        late = i - config.plain_blocks
        stack, at = ("blocks", i) if late < 0 else ("context_blocks", late)
        own = {n: a[at] for n, a in below(flat, f"{stack}/").items()}
        own = block_to_reference(nest(own), config)
        arrays |= {f"blocks.{i}.{name}": a for name, a in own.items()}
    return {name: arrays[name] for name in _in_order(config, tables=True)}


def _in_order(config: JiTConfig, tables: bool = False) -> list[str]:
    """All names as the published module lists them: parameters, and with `tables` also constants
    that are not parameters there."""
    both = lambda name: [f"{name}.weight", f"{name}.bias"]
    mixer = ["attn.se_bias"] if config.groups == 1 else []
    mixer += ["attn.po_coeff"]
    if tables:
        mixer += [f"attn.{axis}_{part}" for axis in ("row", "col") for part in ("cos", "sin")]
    if config.groups == 1:
        mixer += ["attn.qc_proj.weight"]
    else:
        mixer += ["attn.po_proj.weight", *both("attn.se_proj")]
    block = [
        "norm1.weight", *mixer, "attn.ag_proj.weight", "norm2.weight", *both("mlp.w12"),
        *both("mlp.w3"), *both("adaLN_modulation.1"),
    ]  # fmt: skip
    return [
        POSITIONS, *([CONTEXT] if _has_context(config) else ()), *both("t_embedder.mlp.0"),
        *both("t_embedder.mlp.2"), TABLE, PATCH, *both(EXPAND),
        *(f"blocks.{i}.{name}" for i in range(config.n_layer) for name in block),
        "final_layer.norm_final.weight", *both("final_layer.linear"),
        *both("final_layer.adaLN_modulation.1"),
    ]  # fmt: skip


# ---------------------------------------------------------------- checkpoints


def bare_names(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The net's arrays of a training checkpoint's state_dict, without their prefix
    ("denoiser.net.", compiled or not); arrays that are named barely pass as they are."""
    flat = {name.replace("_orig_mod.", ""): a for name, a in flat.items()}
    for prefix in PREFIXES:
        if found := below(flat, prefix):
            return found
    return flat


def average_by_name(
    averages: Sequence[Any], flat: Mapping[str, Any], config: JiTConfig
) -> dict[str, Any]:
    """Names for an average of the weights (`ema_params1`, `ema_params2`), a list in the order of
    the published module's parameters.

    Args:
        averages: the list. flat: the checkpoint's weights by `bare_names`, whose shapes count.
        config: see `jit_config_from_reference`.

    Raises:
        ValueError: another number of arrays, or arrays of other shapes.
    """
    names = _in_order(config)
    if len(averages) != len(names):
        raise ValueError(f"the average has {len(averages)} arrays, the net {len(names)} parameters")
    named = dict(zip(names, averages))
    check_shapes(named, {name: tuple(flat[name].shape) for name in names if name in flat})
    return named


def jit_config_from_reference(
    flat: Mapping[str, Any],
    *,
    context_start: int | None = None,
    class_dropout: float = 0.1,
    input_size: int = 0,
) -> JiTConfig:
    """`JiTConfig` from names and shapes of a published checkpoint.

    Args:
        flat: arrays by name, see `bare_names`.
        context_start: shapes do not tell; None takes that of the published net of this width.
        class_dropout: nor do they tell the probability; 0 means that the label table has no row for
            a null class.
        input_size: 0 reads it from `pos_embed`.

    Raises:
        ValueError: not this layout, or sizes that contradict each other or must be given.
    """
    if PATCH not in flat:
        raise ValueError(f"no {PATCH}: this is not the JiT layout, or not all of it")
    bottleneck, channels, patch, _ = shape_of(flat, PATCH, 4)
    width = shape_of(flat, f"{EXPAND}.weight", 4)[0]
    attn = "blocks.0.attn."
    inner, degree = shape_of(flat, f"{attn}po_coeff", 2)
    groups = 1
    if f"{attn}po_proj.weight" in flat:
        groups = width // shape_of(flat, f"{attn}po_proj.weight", 3)[1]
        gates = shape_of(flat, f"{attn}se_proj.weight", 2)[0]
    else:
        gates = shape_of(flat, f"{attn}qc_proj.weight", 2)[0] - inner
    context = shape_of(flat, CONTEXT, 3)[1] if CONTEXT in flat else 0
    if context and context_start is None:
        if width not in STARTS:
            raise ValueError(
                f"the shapes do not tell net.context_start, nor is d_model={width} published; "
                "give it"
            )
        context_start = STARTS[width]
    if not input_size:
        if POSITIONS not in flat:
            raise ValueError(f"no {POSITIONS}: the file does not tell net.input_size; give it")
        tokens = shape_of(flat, POSITIONS, 3)[1]
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"{POSITIONS} has {tokens} tokens, which is no square")
        input_size = math.isqrt(tokens) * patch
    return JiTConfig(
        input_size=input_size, patch_size=patch, in_channels=channels, bottleneck=bottleneck,
        d_model=width, n_layer=count_of(flat, r"blocks\.(\d+)\."),
        n_head=gates if gates < inner else 1, degree=degree, expand=inner // width, groups=groups,
        mlp_ratio=_ratio(shape_of(flat, "blocks.0.mlp.w3.weight", 2)[1], width),
        num_classes=shape_of(flat, TABLE, 2)[0] - (class_dropout > 0),
        class_dropout=class_dropout, context_tokens=context, context_start=context_start or 0,
    )  # fmt: skip


def _ratio(hidden: int, width: int) -> float:
    """The mlp_ratio, the roundest there is, that makes a hidden width.

    Raises:
        ValueError: there is none.
    """
    whole = -(-3 * hidden // 2)  # the least n with int(2 n / 3) = hidden; n + 1 is the other
    fits = lambda ratio: JiTConfig(d_model=width, mlp_ratio=ratio).d_intermediate == hidden
    round_ones = (round(4 * whole / width) / 4, *(round(whole / width, n) for n in range(1, 6)))
    exact = (math.nextafter(n / width, math.inf) for n in (whole, whole + 1))
    for ratio in (*round_ones, *exact):
        if fits(ratio):
            return ratio
    raise ValueError(f"no mlp_ratio makes {hidden} hidden channels of {width}")


def _check_positions(given: Any, config: JiTConfig) -> None:
    """The table `pos_embed` of a file must be the computed one.

    Raises:
        ValueError: it is of another resolution, or other positions.
    """
    expected = (1, config.tokens, config.d_model)
    if tuple(given.shape) != expected:
        raise ValueError(
            f"{POSITIONS} has shape {tuple(given.shape)}, expected {expected}: the file is of "
            f"another resolution than net.input_size={config.input_size}"
        )
    if not isinstance(given, np.ndarray):
        return  # shapes only
    error = np.max(np.abs(given[0] - sincos_positions(config.d_model, config.grid)))
    if not error <= POSITION_TOLERANCE:
        raise ValueError(
            f"{POSITIONS} differs from the computed table by {error:.2g}, more than "
            f"{POSITION_TOLERANCE:g}: the file was made with other positions"
        )


def _shapes(config: JiTConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a net, computed without memory."""
    x, one = jnp.zeros((1, *config.shape)), jnp.zeros((1,), jnp.int32)
    variables = jax.eval_shape(JiT(config).init, {"params": jax.random.key(0)}, x, one, one)
    return {name: tuple(a.shape) for name, a in flatten(variables["params"]).items()}
