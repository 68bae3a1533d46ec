"""The checkpoint layouts of AiM (`hp-l33/AiM`): stage 2 alone, and the hub's with the tokenizer.

    backbone.embeddings.{word, position}_embeddings, backbone.cls_embed.embedding_table,
    backbone.adaln_group.1 (adaLN-single and -group), backbone.layers.{i}.{norm, scale_shift_table
    or adaLN_modulation.1, mixer.*, norm2, mlp.fc1, mlp.fc2}, backbone.norm_f,
    backbone.final_layer.{norm_final, adaLN_modulation.1}, lm_head.weight (tied to the embedding)

The hub's model.safetensors has these under `mamba.` and the tokenizer under `vqvae.`, the tied
matrix once; its config.json holds the sizes of stage 2. Layers are as in `model/convert/mamba.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..layers.conditioning import share_out
from ..nets.aim import AiM, AiMConfig
from . import mamba
from .mamba import LINEAR, PLAIN, TABLE, from_theirs, to_theirs
from .names import array_module, below, check_shapes, flatten, nest, shape_of

STAGE2, TOKENIZER = "mamba.", "vqvae."  # prefixes of the hub's layout
EMBEDDING, HEAD = "backbone.embeddings.word_embeddings.weight", "lm_head.weight"
TOP = {
    "embedding": (EMBEDDING, PLAIN),
    "position_embedding": ("backbone.embeddings.position_embeddings.weight", PLAIN),
    "class_embedding": ("backbone.cls_embed.embedding_table.weight", PLAIN),
    "norm_f/g": ("backbone.norm_f.weight", PLAIN),
    "norm_final/g": ("backbone.final_layer.norm_final.weight", PLAIN),
    "final_modulation/kernel": ("backbone.final_layer.adaLN_modulation.1.weight", LINEAR),
    "final_modulation/bias": ("backbone.final_layer.adaLN_modulation.1.bias", PLAIN),
}
GROUP = {
    "group_modulation/kernel": ("backbone.adaln_group.1.weight", LINEAR),
    "group_modulation/bias": ("backbone.adaln_group.1.bias", PLAIN),
}
LAYER = mamba.LAYER | {
    "modulation/head/kernel": ("adaLN_modulation.1.weight", LINEAR),
    "modulation/head/bias": ("adaLN_modulation.1.bias", PLAIN),
    "modulation/table": ("scale_shift_table", TABLE),
}
SIZES = ("d_model", "n_layer", "vocab_size", "num_classes", "num_tokens")
FIELDS = (*SIZES, "d_intermediate", "tie_embeddings", "residual_in_fp32", "token_drop",
          "mixer_drop", "mlp_drop")  # fmt: skip
# Fields that change no number: the vocabulary is not padded, norms may be fused or not.
IGNORED = ("attn_cfg", "fused_add_norm", "pad_vocab_size_multiple")


def split_hub(
    flat: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Arrays of stage 2 and of the tokenizer, without their prefixes.

    Args:
        flat: the hub's layout, or stage 2 alone, with or without its prefix.

    Raises:
        ValueError: arrays with and without a prefix, or with another one.
    """
    prefixed = any(name.startswith((STAGE2, TOKENIZER)) for name in flat)
    other = sorted(n for n in flat if prefixed and not n.startswith((STAGE2, TOKENIZER)))
    if other:
        names = ", ".join(other[:5])
        raise ValueError(f"{names} is neither under {STAGE2} nor under {TOKENIZER}")
    return (below(flat, STAGE2) if prefixed else dict(flat)), below(flat, TOKENIZER)


def join_hub(
    stage2: Mapping[str, np.ndarray], tokenizer: Mapping[str, np.ndarray], tied: bool = True
) -> dict[str, np.ndarray]:
    """The hub's layout, inverse of `split_hub`; a tied matrix is stored once."""
    stage2 = {n: a for n, a in stage2.items() if not (tied and n == HEAD)}
    return {STAGE2 + n: a for n, a in stage2.items()} | {
        TOKENIZER + n: a for n, a in tokenizer.items()
    }


def from_reference(
    flat: Mapping[str, np.ndarray], config: AiMConfig | None = None
) -> dict[str, Any]:
    """{"params", "stats"} of `AiM` from stage 2 of a checkpoint, with or without prefix.

    Args:
        flat: arrays by name, those of a tokenizer are passed over. Of a tied matrix one copy will
            do; of two, both must be equal.
        config: of the net that is to take them; None checks no sizes, and takes a head that is
            given for tied if it equals the embedding.

    Raises:
        ValueError: not this layout, parameters that are missing, unknown or of another size, or
            layers of different kinds.
    """
    flat, _ = split_hub(flat)
    top = TOP | (GROUP if GROUP["group_modulation/kernel"][0] in flat else {})
    missing = sorted(theirs for theirs, _ in top.values() if theirs not in flat)
    if EMBEDDING in missing:
        raise ValueError(f"no {EMBEDDING}: this is not the AiM layout, or not all of it")
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    params = {ours: from_theirs(n, flat.pop(n), layout) for ours, (n, layout) in top.items()}
    head = flat.pop(HEAD, None)
    tied = head is None or _equal(head, params["embedding"])
    if config is not None and config.tie_embeddings and not tied:
        raise ValueError(f"tie_embeddings is true, but {HEAD} is not {EMBEDDING}")
    if config is not None and not config.tie_embeddings and head is None:
        raise ValueError(f"tie_embeddings is false, but there is no {HEAD}")
    if head is not None and not (tied if config is None else config.tie_embeddings):
        params["lm_head"] = head
    params = nest(params) | {"layers": mamba.layers_from_reference(flat, LAYER)}
    if config is not None:
        check_shapes(flatten(params), _shapes(config))
    return {"params": params, "stats": {}}


def _equal(a: Any, b: Any) -> bool:
    if a is b or a.shape != b.shape or array_module((a, b)) is not np:
        return a is b
    return np.array_equal(a, b)


def _shapes(config: AiMConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a net, computed without memory."""
    codes, labels = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1,), jnp.int32)
    variables = jax.eval_shape(AiM(config).init, {"params": jax.random.key(0)}, codes, labels)
    return {name: tuple(a.shape) for name, a in flatten(variables["params"]).items()}


def to_reference(variables: Mapping[str, Any], config: AiMConfig) -> dict[str, np.ndarray]:
    """Stage 2 without prefix, both copies of a tied matrix; inverse of `from_reference`.

    Raises:
        ValueError: the layout has no such mixer.
    """
    _check_mixer(config)
    params = flatten({n: p for n, p in variables["params"].items() if n != "layers"})
    names = TOP | GROUP | {"lm_head": (HEAD, PLAIN)}
    flat = {names[n][0]: to_theirs(a, names[n][1]) for n, a in params.items()}
    flat.setdefault(HEAD, params["embedding"])
    return flat | mamba.layers_to_reference(variables["params"]["layers"], config.mixer, LAYER)


def _check_mixer(config: AiMConfig) -> None:
    if config.mixer not in ("mamba1", "mamba2"):
        raise ValueError(f"net.mixer={config.mixer}, but the AiM layout knows Mamba mixers only")


def config_from_reference(reference: Mapping[str, Any], *, position_offset: int = 1) -> AiMConfig:
    """`AiMConfig` from the fields of the hub's `config.json`.

    Args:
        reference: the fields; those of `IGNORED` may have any value, others that are not known are
            refused. What is not given has the default of the published code.
        position_offset: not in the file; the released weights are sampled with 1.

    Raises:
        ValueError: fields that are missing, unknown, not supported or not numbers.
    """
    missing = [name for name in SIZES if name not in reference]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    known = {*FIELDS, *IGNORED, "ssm_cfg", "attn_layer_idx", "rms_norm", "adaln_group",
             "num_groups"}  # fmt: skip
    unknown = sorted(reference.keys() - known)
    if unknown:
        raise ValueError(f"config.json: {', '.join(unknown)} is not known")
    least = dict.fromkeys((*SIZES, "num_groups"), 1) | {"d_intermediate": 0}
    for name, low in least.items():
        value = reference.get(name, low)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"config.json: {name}={value!r}, expected a whole number >= {low}")
    for name in ("token_drop", "mixer_drop", "mlp_drop"):
        value = reference.get(name, 0.0)
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"config.json: {name}={value!r}, expected a number in [0, 1)")
    for name in ("tie_embeddings", "residual_in_fp32", "rms_norm", "adaln_group"):
        if not isinstance(reference.get(name, True), bool):
            raise ValueError(f"config.json: {name}={reference[name]!r}, expected true or false")
    if reference.get("attn_layer_idx"):
        raise ValueError("hybrids with attention layers (attn_layer_idx) are not supported")
    if not reference.get("rms_norm", True):
        raise ValueError("rms_norm=false (LayerNorm) is not supported")
    ssm = reference.get("ssm_cfg", {"layer": "Mamba2"}) or {}
    if not isinstance(ssm, Mapping):
        raise ValueError(f"config.json: ssm_cfg={ssm!r}, expected an object")
    return AiMConfig(
        position_offset=position_offset,
        **_conditioning(reference.get("adaln_group", False), reference.get("num_groups", 1)),
        **{name: reference[name] for name in FIELDS if name in reference},
        **mamba.mixer_fields(dict(ssm)),
    )


def _conditioning(grouped: bool, num_groups: int) -> dict[str, Any]:
    if not grouped:
        return {"conditioning": "adaln"}
    if num_groups == 1:
        return {"conditioning": "adaln_single"}
    return {"conditioning": "adaln_group", "num_groups": num_groups}


def config_to_reference(config: AiMConfig) -> dict[str, Any]:
    """The fields of the hub's `config.json`; inverse of `config_from_reference`.

    The published code samples with position_offset=1 whatever a net was trained for; the layout
    cannot say otherwise, nor does it hold `class_dropout`.

    Raises:
        ValueError: the net has a setting that the layout cannot say.
    """
    _check_mixer(config)
    default = AiMConfig().norm_epsilon
    if config.norm_epsilon != default:
        raise ValueError(
            f"net.norm_epsilon={config.norm_epsilon}, but the AiM layout knows {default} only"
        )
    return {
        **{name: getattr(config, name) for name in FIELDS}, "ssm_cfg": mamba.ssm_cfg(config),
        "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 8, "adaln_group": config.groups > 0,
        "num_groups": max(config.groups, 1),
    }  # fmt: skip


def infer_config(flat: Mapping[str, np.ndarray], ngroups: int = 0) -> dict[str, Any]:
    """Fields of `AiMConfig` that names and shapes determine; see `mamba.infer_config`.

    Args:
        flat: stage 2, with or without prefix. ngroups: groups of a Mamba-2 mixer; 0 leaves
            `ngroups` and `d_state` out.

    Raises:
        ValueError: not this layout, or sizes that contradict each other.
    """
    flat, _ = split_hub(flat)
    vocab, width = shape_of(flat, EMBEDDING, 2)
    fields = mamba.infer_config({**flat, "backbone.embedding.weight": flat[EMBEDDING]}, ngroups)
    fields["num_tokens"] = shape_of(flat, TOP["position_embedding"][0], 2)[0] - 1
    fields["num_classes"] = shape_of(flat, TOP["class_embedding"][0], 2)[0] - 1
    group = GROUP["group_modulation/bias"][0]
    rows = 6 if fields["d_intermediate"] else 3
    groups = shape_of(flat, group, 1)[0] // (rows * width) if group in flat else 0
    return fields | _conditioning(group in flat, groups)


def to_adaln(variables: Mapping[str, Any], config: AiMConfig) -> tuple[dict[str, Any], AiMConfig]:
    """The same net with a modulation head in every block, instead of shared ones and tables.

    Args:
        variables: of a net with adaLN-single or -group (adaLN is returned as it is).

    Returns:
        Variables that compute the same, and their config.
    """
    if not config.groups:
        return dict(variables), config
    params = dict(variables["params"])
    head, layers = params.pop("group_modulation"), dict(params["layers"])
    rows = 3 * config.branches
    spread = lambda a: share_out(a, config.n_layer, rows)
    pieces = lambda a: a.reshape(-1, rows * config.groups, config.d_model)
    kernel = spread(jnp.moveaxis(pieces(head["kernel"]), 1, 0))  # [layers, rows, d, d]
    bias = spread(pieces(head["bias"])[0]) + layers["modulation"]["table"]
    stacked = {
        "kernel": jnp.moveaxis(kernel, 1, 2).reshape(config.n_layer, config.d_model, -1),
        "bias": bias.reshape(config.n_layer, -1),
    }
    params["layers"] = layers | {"modulation": {"head": stacked}}
    return {**variables, "params": params}, dataclasses.replace(config, conditioning="adaln")
