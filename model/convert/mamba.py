"""The `mamba_ssm` checkpoint layout of Mamba language models (`state-spaces/mamba*`, `mamba2*`).

    backbone.embedding.weight, backbone.layers.{i}.{norm, mixer.*, norm2, mlp.fc1, mlp.fc2},
    backbone.norm_f.weight, lm_head.weight (tied to the embedding)

Its linear weights are (out, in), its convolution (C, 1, W). Hyperparameters are in `config.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..nets.mamba_lm import MambaConfig
from .names import flatten, nest

# Our parameter of a mixer or layer -> (theirs, how it is laid out).
_LINEAR, _CONV, _PLAIN = "linear", "conv", "plain"
MIXER = {
    "in_proj/kernel": ("in_proj.weight", _LINEAR),
    "in_proj/bias": ("in_proj.bias", _PLAIN),
    "conv1d/kernel": ("conv1d.weight", _CONV),
    "conv1d/bias": ("conv1d.bias", _PLAIN),
    "x_proj/kernel": ("x_proj.weight", _LINEAR),
    "dt_proj/kernel": ("dt_proj.weight", _LINEAR),
    "A_log": ("A_log", _PLAIN),
    "D": ("D", _PLAIN),
    "norm/g": ("norm.weight", _PLAIN),
    "out_proj/kernel": ("out_proj.weight", _LINEAR),
    "out_proj/bias": ("out_proj.bias", _PLAIN),
}
LAYER = {
    "norm/g": ("norm.weight", _PLAIN),
    "norm2/g": ("norm2.weight", _PLAIN),
    "mlp/fc1/kernel": ("mlp.fc1.weight", _LINEAR),
    "mlp/fc2/kernel": ("mlp.fc2.weight", _LINEAR),
}
# Keyword arguments of their mixers (`ssm_cfg`) -> our fields.
SSM_FIELDS = {
    "d_state": "d_state", "d_conv": "d_conv", "expand": "expand", "dt_rank": "dt_rank",
    "headdim": "headdim", "ngroups": "ngroups", "d_ssm": "d_ssm", "rmsnorm": "rmsnorm",
    "norm_before_gate": "norm_before_gate", "D_has_hdim": "D_has_hdim", "dt_limit": "dt_limit",
    "chunk_size": "chunk", "bias": "use_bias", "conv_bias": "conv_bias",
}  # fmt: skip
# Arguments that only set initial values or choose among equal code paths.
SSM_IGNORED = {
    "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init",
    "use_fast_path", "use_mem_eff_path",
}  # fmt: skip


def _bias_name(kind: str) -> tuple[str, str]:
    """The dt bias has a place of its own in each mixer."""
    return ("dt_proj.bias" if kind == "mamba1" else "dt_bias", _PLAIN)


def _turn(a: np.ndarray, layout: str, back: bool) -> np.ndarray:
    """Between their layout and ours; the same permutation serves both directions of `linear`."""
    a = np.asarray(a)
    if layout == _LINEAR:
        return a.T
    if layout == _CONV:
        return a.T[:, None] if back else a[:, 0].T
    return a


def mixer_from_reference(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `Mamba1` or `Mamba2` from one mixer's arrays under `mamba_ssm` names.

    Raises:
        ValueError: a name that no mixer has.
    """
    kind = "mamba2" if "dt_bias" in flat else "mamba1"
    ours = {theirs: (name, layout) for name, (theirs, layout) in MIXER.items()}
    bias, layout = _bias_name(kind)
    ours[bias] = ("dt_bias", layout)
    unknown = sorted(set(flat) - set(ours))
    if unknown:
        raise ValueError(f"unknown parameters of a Mamba mixer: {', '.join(unknown)}")
    return nest({ours[n][0]: _turn(a, ours[n][1], False) for n, a in flat.items()})


def mixer_to_reference(params: Mapping[str, Any], kind: str) -> dict[str, np.ndarray]:
    """Inverse of `mixer_from_reference`; `kind` is "mamba1" or "mamba2"."""
    theirs = MIXER | {"dt_bias": _bias_name(kind)}
    return {theirs[n][0]: _turn(a, theirs[n][1], True) for n, a in flatten(params).items()}


def from_reference(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """{"params", "stats"} of `MambaLM` from a whole checkpoint.

    Raises:
        ValueError: not this layout, layers of different kinds, or parameters that are unknown.
    """
    flat = dict(flat)
    embedding = _take(flat, "backbone.embedding.weight")
    params: dict[str, Any] = {
        "embedding": embedding,
        "norm_f": {"g": _take(flat, "backbone.norm_f.weight")},
    }
    head = flat.pop("lm_head.weight", embedding)
    if head.shape != embedding.shape or not np.array_equal(head, embedding):
        params["lm_head"] = head
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name in list(flat):
        if name.startswith("backbone.layers."):
            number, _, rest = name[len("backbone.layers.") :].partition(".")
            layers.setdefault(int(number), {})[rest] = flat.pop(name)
    if flat:
        raise ValueError(f"unknown parameters: {', '.join(sorted(flat)[:5])}")
    if sorted(layers) != list(range(len(layers))) or not layers:
        raise ValueError(f"layers {sorted(layers)} are not numbered from 0 without gaps")
    each = [_layer(layers[i], i) for i in range(len(layers))]
    stacked = {}
    for name in each[0]:
        shapes = {tree[name].shape if name in tree else None for tree in each}
        if len(shapes) > 1 or any(tree.keys() != each[0].keys() for tree in each):
            raise ValueError("layers differ in kind or size; hybrids with attention do not load")
        stacked[name] = np.stack([tree[name] for tree in each])
    params["layers"] = nest(stacked)
    return {"params": params, "stats": {}}


def _take(flat: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in flat:
        raise ValueError(f"no {name}: this is not the mamba_ssm layout")
    return np.asarray(flat.pop(name))


def _layer(flat: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """One layer's parameters by our path."""
    ours = {theirs: (name, layout) for name, (theirs, layout) in LAYER.items()}
    mixer = {n[len("mixer.") :]: a for n, a in flat.items() if n.startswith("mixer.")}
    rest = {n: a for n, a in flat.items() if not n.startswith("mixer.")}
    unknown = sorted(set(rest) - set(ours))
    if unknown:
        raise ValueError(f"layer {number}: unknown parameters {', '.join(unknown)}")
    try:
        converted = flatten({"mixer": mixer_from_reference(mixer)})
    except ValueError as error:
        raise ValueError(f"layer {number}: {error}; hybrids do not load") from error
    return converted | {ours[n][0]: _turn(a, ours[n][1], False) for n, a in rest.items()}


def to_reference(variables: Mapping[str, Any], config: MambaConfig) -> dict[str, np.ndarray]:
    """A whole checkpoint in the `mamba_ssm` layout; inverse of `from_reference`."""
    params = variables["params"]
    embedding = np.asarray(params["embedding"])
    flat = {
        "backbone.embedding.weight": embedding,
        "backbone.norm_f.weight": np.asarray(params["norm_f"]["g"]),
        "lm_head.weight": np.asarray(params.get("lm_head", embedding)),
    }
    mixer = {f"mixer/{n}": (f"mixer.{t}", layout) for n, (t, layout) in MIXER.items()}
    bias, layout = _bias_name(config.mixer)
    theirs = LAYER | mixer | {"mixer/dt_bias": (f"mixer.{bias}", layout)}
    for name, stack in flatten(params["layers"]).items():
        their_name, layout = theirs[name]
        for number, a in enumerate(np.asarray(stack)):
            flat[f"backbone.layers.{number}.{their_name}"] = _turn(a, layout, True)
    return flat


def config_from_reference(reference: Mapping[str, Any]) -> MambaConfig:
    """`MambaConfig` from the layout's `config.json`; the vocabulary is padded as there.

    Raises:
        ValueError: attention layers, LayerNorm, or fields that are missing or unknown.
    """
    missing = [name for name in ("d_model", "n_layer", "vocab_size") if name not in reference]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    if reference.get("attn_layer_idx"):
        raise ValueError("attention layers (attn_layer_idx) are not supported")
    if not reference.get("rms_norm", True):
        raise ValueError("rms_norm=false (LayerNorm) is not supported")
    ssm = dict(reference.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise ValueError(f"ssm_cfg.layer={layer!r}; Mamba1 and Mamba2 are supported")
    fields: dict[str, Any] = {"mixer": layer.lower()}
    for name, value in ssm.items():
        if name in SSM_IGNORED:
            continue
        if name not in SSM_FIELDS:
            raise ValueError(f"ssm_cfg.{name} is not supported")
        if value in ("auto", None):
            continue
        if name == "dt_limit":
            value = () if tuple(value)[0] == 0 and tuple(value)[1] == float("inf") else value
            value = tuple(float(v) for v in value)
        fields[SSM_FIELDS[name]] = value
    multiple = reference.get("pad_vocab_size_multiple", 8)
    return MambaConfig(
        vocab_size=-(-reference["vocab_size"] // multiple) * multiple,
        d_model=reference["d_model"],
        n_layer=reference["n_layer"],
        d_intermediate=reference.get("d_intermediate", 0),
        tie_embeddings=reference.get("tie_embeddings", True),
        residual_in_fp32=reference.get("residual_in_fp32", True),
        **fields,
    )


def config_to_reference(config: MambaConfig) -> dict[str, Any]:
    """The layout's `config.json` of a net; inverse of `config_from_reference`."""
    default = {f.name: f.default for f in dataclasses.fields(MambaConfig)}
    ssm: dict[str, Any] = {"layer": "Mamba2" if config.mixer == "mamba2" else "Mamba1"}
    for theirs, ours in SSM_FIELDS.items():
        value = getattr(config, ours)
        if value != default[ours]:
            ssm[theirs] = list(value) if isinstance(value, tuple) else value
    return {
        "d_model": config.d_model, "d_intermediate": config.d_intermediate,
        "n_layer": config.n_layer, "vocab_size": config.vocab_size, "ssm_cfg": ssm,
        "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32, "fused_add_norm": True,
        "pad_vocab_size_multiple": 1, "tie_embeddings": config.tie_embeddings,
    }  # fmt: skip


def infer_config(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Fields of `MambaConfig` that names and shapes determine, for checking and where there is no
    `config.json`.

    For Mamba-2 groups and state size cannot be told apart from the shapes, nor can switches.

    Raises:
        ValueError: not this layout.
    """
    embedding = _take(dict(flat), "backbone.embedding.weight")
    shape = lambda name: np.shape(flat[f"backbone.layers.0.mixer.{name}"])
    numbers = {int(n.split(".")[2]) for n in flat if n.startswith("backbone.layers.")}
    mixer = "mamba2" if "backbone.layers.0.mixer.dt_bias" in flat else "mamba1"
    if "backbone.layers.0.mixer.out_proj.weight" not in flat:
        raise ValueError("layer 0 has no Mamba mixer: this is not the mamba_ssm layout")
    d_model, inner = shape("out_proj.weight")
    fields: dict[str, Any] = {
        "vocab_size": embedding.shape[0], "d_model": d_model, "n_layer": len(numbers),
        "mixer": mixer, "d_conv": shape("conv1d.weight")[-1], "expand": inner // d_model,
    }  # fmt: skip
    if mixer == "mamba1":
        fields |= {"d_state": shape("A_log")[1], "dt_rank": shape("dt_proj.weight")[1]}
    if "backbone.layers.0.mlp.fc2.weight" in flat:
        fields["d_intermediate"] = np.shape(flat["backbone.layers.0.mlp.fc2.weight"])[1]
    return fields
