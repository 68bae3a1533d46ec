"""The `mamba_ssm` checkpoint layout of Mamba language models (`state-spaces/mamba*`, `mamba2*`).

    backbone.embedding.weight, backbone.layers.{i}.{norm, mixer.*, norm2, mlp.fc1, mlp.fc2},
    backbone.norm_f.weight, lm_head.weight (tied to the embedding)

Its linear weights are (out, in), its convolution (C, 1, W). Hyperparameters are in `config.json`.
Arrays may be numpy's, or jax's as in `jax.eval_shape`: shapes then come without any memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..nets.mamba_lm import MambaConfig
from .names import array_module, below, flatten, nest, shape_of

# Our parameter of a mixer or layer -> (theirs, how it is laid out).
LINEAR, CONV, PLAIN, TABLE = "linear", "conv", "plain", "table"
MIXER = {
    "in_proj/kernel": ("in_proj.weight", LINEAR),
    "in_proj/bias": ("in_proj.bias", PLAIN),
    "conv1d/kernel": ("conv1d.weight", CONV),
    "conv1d/bias": ("conv1d.bias", PLAIN),
    "x_proj/kernel": ("x_proj.weight", LINEAR),
    "dt_proj/kernel": ("dt_proj.weight", LINEAR),
    "A_log": ("A_log", PLAIN),
    "D": ("D", PLAIN),
    "norm/g": ("norm.weight", PLAIN),
    "out_proj/kernel": ("out_proj.weight", LINEAR),
    "out_proj/bias": ("out_proj.bias", PLAIN),
}
LAYER = {
    "norm/g": ("norm.weight", PLAIN),
    "norm2/g": ("norm2.weight", PLAIN),
    "mlp/fc1/kernel": ("mlp.fc1.weight", LINEAR),
    "mlp/fc2/kernel": ("mlp.fc2.weight", LINEAR),
}
# Keyword arguments of their mixers (`ssm_cfg`) -> our fields.
SSM_FIELDS = {
    "d_state": "d_state", "d_conv": "d_conv", "expand": "expand", "dt_rank": "dt_rank",
    "headdim": "headdim", "ngroups": "ngroups", "d_ssm": "d_ssm", "rmsnorm": "rmsnorm",
    "norm_before_gate": "norm_before_gate", "D_has_hdim": "D_has_hdim", "dt_limit": "dt_limit",
    "chunk_size": "chunk", "bias": "use_bias", "conv_bias": "conv_bias",
}  # fmt: skip
MAMBA1_FIELDS = {"d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias"}
MAMBA2_FIELDS = SSM_FIELDS.keys() - {"dt_rank"}
# Arguments that only set initial values or choose among equal code paths.
SSM_IGNORED = {
    "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init",
    "use_fast_path", "use_mem_eff_path",
}  # fmt: skip


def _bias_name(kind: str) -> tuple[str, str]:
    """The dt bias has a place of its own in each mixer."""
    return ("dt_proj.bias" if kind == "mamba1" else "dt_bias", PLAIN)


def from_theirs(name: str, a: np.ndarray, layout: str) -> np.ndarray:
    """Their array as we lay it out.

    Raises:
        ValueError: it has other axes.
    """
    axes = {LINEAR: (None, None), CONV: (None, 1, None), TABLE: (1, None, None)}.get(layout)
    if axes and (a.ndim != len(axes) or any(n not in (None, m) for n, m in zip(axes, a.shape))):
        wanted = {LINEAR: "(out, in)", CONV: "(channels, 1, width)", TABLE: "(1, rows, d)"}[layout]
        raise ValueError(f"{name} has shape {tuple(a.shape)}, expected {wanted}")
    if layout == TABLE:
        return a[0]
    return a.T if layout == LINEAR else a[:, 0].T if layout == CONV else a


def to_theirs(a: np.ndarray, layout: str) -> np.ndarray:
    """Inverse of `from_theirs`."""
    if layout == TABLE:
        return a[None]
    return a.T if layout == LINEAR else a.T[:, None] if layout == CONV else a


def mixer_from_reference(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `Mamba1` or `Mamba2` from one mixer's arrays under `mamba_ssm` names.

    Raises:
        ValueError: a name that no mixer has, or an array with other axes.
    """
    kind = "mamba2" if "dt_bias" in flat else "mamba1"
    ours = {theirs: (name, layout) for name, (theirs, layout) in MIXER.items()}
    bias, layout = _bias_name(kind)
    ours[bias] = ("dt_bias", layout)
    unknown = sorted(set(flat) - set(ours))
    if unknown:
        raise ValueError(f"unknown parameters of a Mamba mixer: {', '.join(unknown)}")
    return nest({ours[n][0]: from_theirs(n, a, ours[n][1]) for n, a in flat.items()})


def mixer_to_reference(params: Mapping[str, Any], kind: str) -> dict[str, np.ndarray]:
    """Inverse of `mixer_from_reference`; `kind` is "mamba1" or "mamba2"."""
    theirs = MIXER | {"dt_bias": _bias_name(kind)}
    return {theirs[n][0]: to_theirs(a, theirs[n][1]) for n, a in flatten(params).items()}


def from_reference(flat: Mapping[str, np.ndarray], tied: bool | None = None) -> dict[str, Any]:
    """{"params", "stats"} of `MambaLM` from a whole checkpoint.

    Args:
        flat: arrays by name; `lm_head.weight` may be absent where it is the embedding.
        tied: whether the head is the embedding; None compares them.

    Raises:
        ValueError: not this layout, layers of different kinds, parameters that are unknown, or
            `tied` contradicts the arrays.
    """
    flat = dict(flat)
    embedding = _take(flat, "backbone.embedding.weight")
    params: dict[str, Any] = {
        "embedding": embedding,
        "norm_f": {"g": _take(flat, "backbone.norm_f.weight")},
    }
    if tied is False and "lm_head.weight" not in flat:
        raise ValueError("tie_embeddings is false, but there is no lm_head.weight")
    head = flat.pop("lm_head.weight", embedding)
    if tied is None or tied:
        same = head is embedding or (
            head.shape == embedding.shape and np.array_equal(head, embedding)
        )
        if tied and not same:
            raise ValueError(
                "tie_embeddings is true, but lm_head.weight is not backbone.embedding.weight"
            )
        tied = same
    if not tied:
        params["lm_head"] = head
    params["layers"] = layers_from_reference(flat)
    return {"params": params, "stats": {}}


def layers_from_reference(
    flat: dict[str, np.ndarray], names: Mapping[str, tuple[str, str]] = LAYER
) -> dict[str, Any]:
    """Parameters of all layers, stacked on axis 0, from what is left of a checkpoint.

    Args:
        flat: arrays by name, `backbone.layers.{i}.*` and nothing else.
        names: our parameter of a layer, besides the mixer's -> (theirs, layout).

    Raises:
        ValueError: other names, gaps in the numbers, or layers of different kinds.
    """
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name in list(flat):
        if name.startswith("backbone.layers."):
            number, _, rest = name[len("backbone.layers.") :].partition(".")
            layers.setdefault(number, {})[rest] = flat.pop(name)
    if flat:
        raise ValueError(f"unknown parameters: {', '.join(sorted(flat)[:5])}{_layer_norm(flat)}")
    if not layers or set(layers) != {str(i) for i in range(len(layers))}:
        found = ", ".join(sorted(layers)) or "none"
        raise ValueError(f"layers are not numbered from 0 without gaps; found: {found}")
    return nest(_stacked([_layer(layers[str(i)], i, names) for i in range(len(layers))]))


def _take(flat: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in flat:
        raise ValueError(f"no {name}: this is not the mamba_ssm layout, or not all of it")
    return flat.pop(name)


def _layer_norm(names) -> str:
    biases = any(n.endswith(("norm.bias", "norm2.bias", "norm_f.bias")) for n in names)
    return " (LayerNorm is not supported)" if biases else ""


def _layer(
    flat: Mapping[str, np.ndarray], number: int, names: Mapping[str, tuple[str, str]]
) -> dict[str, np.ndarray]:
    """One layer's parameters by our path."""
    ours = {theirs: (name, layout) for name, (theirs, layout) in names.items()}
    mixer = below(flat, "mixer.")
    rest = {n: a for n, a in flat.items() if not n.startswith("mixer.")}
    unknown = sorted(set(rest) - set(ours))
    if unknown:
        names = ", ".join(unknown)
        raise ValueError(f"layer {number}: unknown parameters {names}{_layer_norm(unknown)}")
    attention = "Wqkv.weight" in mixer
    if attention or not mixer:
        what = "attention" if attention else "no mixer"
        raise ValueError(f"layer {number} has {what}; hybrids with attention are not supported")
    try:
        converted = flatten({"mixer": mixer_from_reference(mixer)})
        return converted | {ours[n][0]: from_theirs(n, a, ours[n][1]) for n, a in rest.items()}
    except ValueError as error:
        raise ValueError(f"layer {number}: {error}") from error


def _stacked(layers: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Layers along axis 0.

    Raises:
        ValueError: names what one layer has or lacks against layer 0.
    """
    for number, layer in enumerate(layers):
        differ = sorted(layer.keys() ^ layers[0].keys())
        differ += [n for n, a in layer.items() if n in layers[0] and a.shape != layers[0][n].shape]
        if differ:
            raise ValueError(f"layer {number} and layer 0 differ in {', '.join(differ)}")
    xp = array_module([a for layer in layers for a in layer.values()])
    return {name: xp.stack([layer[name] for layer in layers]) for name in layers[0]}


def to_reference(variables: Mapping[str, Any], config: MambaConfig) -> dict[str, np.ndarray]:
    """A whole checkpoint in the `mamba_ssm` layout; inverse of `from_reference`."""
    params = variables["params"]
    flat = {
        "backbone.embedding.weight": params["embedding"],
        "backbone.norm_f.weight": params["norm_f"]["g"],
        "lm_head.weight": params.get("lm_head", params["embedding"]),
    }
    return flat | layers_to_reference(params["layers"], config.mixer)


def layers_to_reference(
    params: Mapping[str, Any], kind: str, names: Mapping[str, tuple[str, str]] = LAYER
) -> dict[str, np.ndarray]:
    """Inverse of `layers_from_reference`; `kind` is "mamba1" or "mamba2"."""
    mixer = MIXER | {"dt_bias": _bias_name(kind)}
    theirs = names | {f"mixer/{n}": (f"mixer.{t}", layout) for n, (t, layout) in mixer.items()}
    flat = {}
    for name, stack in flatten(params).items():
        their_name, layout = theirs[name]
        for number in range(stack.shape[0]):
            flat[f"backbone.layers.{number}.{their_name}"] = to_theirs(stack[number], layout)
    return flat


def config_from_reference(reference: Mapping[str, Any]) -> MambaConfig:
    """`MambaConfig` from the layout's `config.json`; the vocabulary is padded as there.

    Raises:
        ValueError: attention layers, LayerNorm, or fields that are missing, unknown or no numbers.
    """
    sizes = {"d_intermediate": 0, "pad_vocab_size_multiple": 8} | dict(reference)
    missing = [name for name in ("d_model", "n_layer", "vocab_size") if name not in sizes]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple", "d_intermediate"):
        value, least = sizes[name], 0 if name == "d_intermediate" else 1
        if not isinstance(value, int) or value < least:
            raise ValueError(f"config.json: {name}={value!r}, expected a whole number >= {least}")
    if reference.get("attn_layer_idx"):
        raise ValueError("hybrids with attention layers (attn_layer_idx) are not supported")
    if not reference.get("rms_norm", True):
        raise ValueError("rms_norm=false (LayerNorm) is not supported")
    ssm = reference.get("ssm_cfg") or {}
    if not isinstance(ssm, Mapping):
        raise ValueError(f"config.json: ssm_cfg={ssm!r}, expected an object")
    multiple = sizes["pad_vocab_size_multiple"]
    return MambaConfig(
        vocab_size=-(-sizes["vocab_size"] // multiple) * multiple,
        d_model=sizes["d_model"],
        n_layer=sizes["n_layer"],
        d_intermediate=sizes["d_intermediate"],
        tie_embeddings=reference.get("tie_embeddings", True),
        residual_in_fp32=reference.get("residual_in_fp32", True),
        **mixer_fields(dict(ssm)),
    )


def mixer_fields(ssm: dict[str, Any]) -> dict[str, Any]:
    """Fields of `MambaConfig` (and `AiMConfig`) from `ssm_cfg`.

    Raises:
        ValueError: another mixer, or an argument that is not supported.
    """
    layer = ssm.pop("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise ValueError(f"ssm_cfg.layer={layer!r}; Mamba1 and Mamba2 are supported")
    known = MAMBA1_FIELDS if layer == "Mamba1" else MAMBA2_FIELDS
    unknown = sorted(ssm.keys() - known - SSM_IGNORED)
    if unknown:
        raise ValueError(f"ssm_cfg.{unknown[0]} of {layer} is not supported")
    fields: dict[str, Any] = {"mixer": layer.lower()}
    for name in known & ssm.keys():
        if ssm[name] not in ("auto", None):
            fields[SSM_FIELDS[name]] = ssm[name]
    if "dt_limit" in fields:
        fields["dt_limit"] = _dt_limit(fields["dt_limit"])
    return fields


def ssm_cfg(config: MambaConfig) -> dict[str, Any]:
    """Keyword arguments of a config's mixer; inverse of `mixer_fields`."""
    default = {f.name: f.default for f in dataclasses.fields(MambaConfig)}
    second = config.mixer == "mamba2"
    ssm: dict[str, Any] = {"layer": "Mamba2"} if second else {}
    for theirs in sorted(MAMBA2_FIELDS if second else MAMBA1_FIELDS):
        value = getattr(config, SSM_FIELDS[theirs])
        if value != default[SSM_FIELDS[theirs]]:
            ssm[theirs] = list(value) if isinstance(value, tuple) else value
    return ssm


def _dt_limit(value: Any) -> tuple[float, ...]:
    """(lowest, highest) in finite numbers, which JSON can hold; () for (0, inf)."""
    try:
        low, high = (float(v) for v in value)
    except (TypeError, ValueError):
        raise ValueError(f"ssm_cfg.dt_limit={value!r}, expected two numbers") from None
    largest = float(np.finfo(np.float32).max)
    return () if low <= 0 and high >= largest else (low, min(high, largest))


def config_to_reference(config: MambaConfig) -> dict[str, Any]:
    """The layout's `config.json` of a net; inverse of `config_from_reference`.

    Raises:
        ValueError: the net has a setting that the layout cannot say.
    """
    default = {f.name: f.default for f in dataclasses.fields(MambaConfig)}
    if config.norm_epsilon != default["norm_epsilon"]:
        raise ValueError(
            f"net.norm_epsilon={config.norm_epsilon}, but the mamba_ssm layout knows 1e-05 only"
        )
    return {
        "d_model": config.d_model, "d_intermediate": config.d_intermediate,
        "n_layer": config.n_layer, "vocab_size": config.vocab_size, "ssm_cfg": ssm_cfg(config),
        "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32, "fused_add_norm": True,
        "pad_vocab_size_multiple": 1, "tie_embeddings": config.tie_embeddings,
    }  # fmt: skip


def infer_config(flat: Mapping[str, np.ndarray], ngroups: int = 0) -> dict[str, Any]:
    """Fields of `MambaConfig` that names and shapes determine, for checking and where there is no
    `config.json`.

    What they cannot tell: for Mamba-2 the number of groups (state size times groups they tell),
    dt_limit and norm_before_gate.

    Args:
        flat: arrays by name.
        ngroups: groups of a Mamba-2 mixer; 0 leaves `ngroups` and `d_state` out.

    Raises:
        ValueError: not this layout, sizes that contradict each other, or other groups.
    """
    shape = lambda name, axes: shape_of(flat, f"backbone.layers.0.mixer.{name}", axes)
    has = lambda name: f"backbone.layers.0.{name}" in flat
    vocab, d_model = shape_of(flat, "backbone.embedding.weight", 2)
    inner = shape("out_proj.weight", 2)[1]
    channels, _, d_conv = shape("conv1d.weight", 3)
    mixer = "mamba2" if has("mixer.dt_bias") else "mamba1"
    fields: dict[str, Any] = {
        "vocab_size": vocab, "d_model": d_model, "mixer": mixer, "d_conv": d_conv,
        "n_layer": len({n.split(".")[2] for n in flat if n.startswith("backbone.layers.")}),
        "expand": inner // max(d_model, 1), "use_bias": has("mixer.in_proj.bias"),
        "conv_bias": has("mixer.conv1d.bias"), "d_intermediate": 0,
    }  # fmt: skip
    if has("mlp.fc2.weight"):
        fields["d_intermediate"] = shape_of(flat, "backbone.layers.0.mlp.fc2.weight", 2)[1]
    if mixer == "mamba1":
        fields |= {"d_state": shape("A_log", 2)[1], "dt_rank": shape("dt_proj.weight", 2)[1]}
        return fields
    heads = shape("dt_bias", 1)[0]
    both = shape("in_proj.weight", 2)[0] - 2 * inner - heads  # B and C: twice groups * d_state
    d_ssm = channels - both
    if both <= 0 or both % 2 or not 0 < d_ssm <= inner or d_ssm % max(heads, 1):
        raise ValueError("in_proj, conv1d, dt_bias and out_proj of layer 0 do not fit together")
    fields |= {
        "headdim": d_ssm // heads, "d_ssm": 0 if d_ssm == inner else d_ssm,
        "rmsnorm": has("mixer.norm.weight"),
    }  # fmt: skip
    if d_ssm > heads:
        fields["D_has_hdim"] = shape("D", 1)[0] == d_ssm
    if ngroups:
        if both // 2 % ngroups:
            raise ValueError(f"ngroups={ngroups} does not divide {both // 2} (groups * d_state)")
        fields |= {"ngroups": ngroups, "d_state": both // 2 // ngroups}
    return fields
