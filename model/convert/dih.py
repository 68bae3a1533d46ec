"""The checkpoint layout of PoM's diffusion models of 2024 (`davidpicard/HoMM`).

    freqs, classes_emb, time_emb.{0, 2}, in_conv, layers.{i}.{hom.{ho_proj, se_proj, ag_proj},
    ffw.{0, 2}, cond_mlp.1, gate_mlp.1}, out_proj, out_mod.1

DiH++ adds registers, pos_emb and cond_pos_emb; the DiT baseline has mha.{qkv, proj} for hom; the
text-to-video model has in_proj for in_conv, text_emb for classes_emb, and layers.{i}.c_hom. Linear
weights are (out, in), patches enter as a convolution (out, channel, row, column). Arrays may be
numpy's, or jax's as in `jax.eval_shape`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..nets.dih import DiH, DiHConfig
from ..nets.dih_block import time_frequencies
from ..nets.text_video_dih import TextVideoDiH, TextVideoDiHConfig
from .names import array_module, check_names, check_shapes, count_of, flatten, nest, shape_of

FREQUENCIES, FREQUENCY_TOLERANCE = "freqs", 1e-5
PATCH, LABELS = "in_conv.weight", "classes_emb.weight"
TABLES = {
    "registers": "registers",
    "positions": "pos_emb",
    "condition_positions": "cond_pos_emb",
}
# name: (layers, width, MLP's hidden width in units of it)
SIZES = {"S": (12, 384, 3), "B": (12, 768, 3), "L": (24, 1024, 2), "XL": (28, 1152, 2)}
MIXER = {name: name for name in ("ho_proj", "se_proj", "ag_proj")}
Config = DiHConfig | TextVideoDiHConfig


def bare_names(flat: Mapping[str, Any], weights: str = "ema") -> dict[str, Any]:
    """One net's arrays out of a training checkpoint's `state_dict`, by the names of the net.

    Args:
        flat: names of a training checkpoint begin with `model.` or, the average of the weights,
            `ema.ema_model.`, and have `_orig_mod.` in them where the net was compiled; those of
            the autoencoder begin with `vae`. Names of extracted weights are bare already.
        weights: "ema", or "model": which of the two.

    Raises:
        ValueError: unknown `weights`, or the checkpoint has none of them.
    """
    if weights not in ("ema", "model"):
        raise ValueError(f"weights={weights!r}; choose ema or model")
    names = {name: name.replace("_orig_mod.", "") for name in flat}
    prefix = {"ema": "ema.ema_model.", "model": "model."}[weights]
    if not any(n.startswith(("model.", "ema.")) for n in names.values()):
        return {bare: flat[n] for n, bare in names.items() if not bare.startswith("vae")}
    found = {b.removeprefix(prefix): flat[n] for n, b in names.items() if b.startswith(prefix)}
    if not found:
        other = {"ema": "model", "model": "ema"}[weights]
        raise ValueError(f"no names begin with {prefix}; take weights={other}")
    return found


def _linear(modules: Mapping[str, str]) -> dict[str, str]:
    pairs = {}
    for ours, theirs in modules.items():
        pairs |= {f"{ours}/kernel": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}
    return pairs


def mixer_from_reference(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of `HigherOrderMixer` from those of the published layer, with or without biases.

    `po_proj`, the name of the package of 2025, is `ho_proj`.

    Raises:
        ValueError: names missing or unknown.
    """
    flat = {n.replace("po_proj.", "ho_proj."): a for n, a in flat.items()}
    pairs = _linear(MIXER)
    if "ho_proj.bias" not in flat:
        pairs = {o: t for o, t in pairs.items() if t.endswith("weight")}
    check_names(flat, pairs.values())
    return nest({ours: _transposed(theirs, flat[theirs]) for ours, theirs in pairs.items()})


def _block_names(config: Config) -> dict[str, str]:
    modules = {f"hom/{o}": f"hom.{t}" for o, t in MIXER.items()}
    if config.mixer == "attention":
        modules = {"attn/qkv": "mha.qkv", "attn/proj": "mha.proj"}
    if isinstance(config, TextVideoDiHConfig):
        modules |= {f"cross/{o}": f"c_hom.{t}" for o, t in MIXER.items()}
    modules |= {"mlp/fc1": "ffw.0", "mlp/fc2": "ffw.2"}
    return _linear(modules | {"modulation": "cond_mlp.1", "gates": "gate_mlp.1"})


def _top_names(config: Config) -> dict[str, str]:
    modules = {"t_embedder/fc1": "time_emb.0", "t_embedder/fc2": "time_emb.2"}
    modules |= {"final": "out_proj", "final/modulation": "out_mod.1"}
    if isinstance(config, TextVideoDiHConfig):
        return _linear(modules | {"text_embedder": "text_emb", "x_embedder": "in_proj"})
    return _linear(modules)


def _transposed(name: str, a: Any) -> Any:
    return a.T if name.endswith(".weight") else a


def block_from_reference(flat: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Parameters of one `DiHBlock` from the names of a published block.

    Raises:
        ValueError: names missing or unknown.
    """
    flat = {n.replace("po_proj.", "ho_proj."): a for n, a in flat.items()}
    names = _block_names(config)
    check_names(flat, names.values())
    return nest({ours: _transposed(theirs, flat[theirs]) for ours, theirs in names.items()})


def dih_from_reference(flat: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Parameters of `DiH` or `TextVideoDiH` from published arrays (see `bare_names`).

    Args:
        flat: arrays by name. `freqs` may be absent; it must be what the net computes.
        config: of the net that is to take them; its kind says which net.

    Raises:
        ValueError: names missing or unknown, arrays of another size, or other frequencies.
    """
    flat = {n.replace("po_proj.", "ho_proj."): a for n, a in flat.items()}
    if FREQUENCIES in flat:
        _check_frequencies(flat.pop(FREQUENCIES), config)
    top, block, video = _top_names(config), _block_names(config), _is_video(config)
    tables = {} if video else {o: t for o, t in TABLES.items() if o in _learned(config)}
    theirs = {*top.values(), *tables.values()}
    theirs |= set() if video else {PATCH, "in_conv.bias", LABELS}
    theirs |= {f"layers.{i}.{name}" for i in range(config.n_layer) for name in block.values()}
    check_names(flat, theirs)
    params = {ours: _transposed(name, flat[name]) for ours, name in top.items()}
    if not video:
        shape_of(flat, PATCH, 4)
        params |= {
            "x_embedder/kernel": flat[PATCH].transpose(2, 3, 1, 0).reshape(-1, config.d_model),
            "x_embedder/bias": flat["in_conv.bias"],
            "y_embedder/embedding": flat[LABELS],
        }
        params |= {ours: flat[name][0] for ours, name in tables.items()}
    for ours, name in block.items():
        arrays = [_transposed(name, flat[f"layers.{i}.{name}"]) for i in range(config.n_layer)]
        if len({tuple(a.shape) for a in arrays}) > 1:
            raise ValueError(f"layers.*.{name}: {[tuple(a.shape) for a in arrays][:4]}, .. differ")
        params[f"blocks/{ours}"] = array_module(arrays).stack(arrays)
    check_shapes(params, _shapes(config))
    return nest(params)


def dih_constants(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The collection "constants" of a file: the frequencies of times as it has them, whose last
    digit is not everyone's. Nets do without it. {} where the file has none."""
    return {"t_embedder": {"frequencies": flat[FREQUENCIES]}} if FREQUENCIES in flat else {}


def dih_to_reference(params: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Published names and layouts, `freqs` included; inverse of `dih_from_reference`."""
    frequencies = time_frequencies(config.d_model, config.timesteps)
    params, flat = flatten(params), {FREQUENCIES: np.float32(frequencies)}
    if not _is_video(config):
        p = config.patch_size
        kernel = params["x_embedder/kernel"].reshape(p, p, config.in_channels, config.d_model)
        flat |= {
            PATCH: kernel.transpose(3, 2, 0, 1),
            "in_conv.bias": params["x_embedder/bias"],
            LABELS: params["y_embedder/embedding"],
        }
        flat |= {TABLES[name]: params[name][None] for name in _learned(config)}
    flat |= {name: _transposed(name, params[ours]) for ours, name in _top_names(config).items()}
    for ours, name in _block_names(config).items():
        stacked = params[f"blocks/{ours}"]
        each = range(config.n_layer)
        flat |= {f"layers.{i}.{name}": _transposed(name, stacked[i]) for i in each}
    return flat


def _is_video(config: Config) -> bool:
    return isinstance(config, TextVideoDiHConfig)


def _learned(config: DiHConfig) -> tuple[str, ...]:
    """The tables of DiH++ that a net has."""
    if config.positions != "learned":
        return ()
    return ("positions", "condition_positions", *(["registers"] if config.registers else []))


def _check_frequencies(given: Any, config: Config) -> None:
    """Raises ValueError unless `freqs` is what the net computes."""
    expected = time_frequencies(config.d_model, config.timesteps)
    if tuple(given.shape) != expected.shape:
        raise ValueError(f"freqs has shape {tuple(given.shape)}, expected {expected.shape}")
    if not isinstance(given, np.ndarray):
        return  # shapes only
    error = np.max(np.abs(given - expected))
    if not error <= FREQUENCY_TOLERANCE:
        raise ValueError(
            f"freqs differs from the computed frequencies by {error:.2g}: the file was made for "
            f"another number of timesteps than net.timesteps={config.timesteps}"
        )


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a net, computed without memory."""
    x, one = jnp.zeros((1, *config.shape)), jnp.zeros((1,), jnp.int32)
    told = {}
    if _is_video(config):
        net, told = TextVideoDiH(config), {"context": jnp.zeros((1, 1, config.context_dim))}
    else:
        net = DiH(config)
    init = lambda: net.init({"params": jax.random.key(0)}, x, one, one, **told)
    return {name: tuple(a.shape) for name, a in flatten(jax.eval_shape(init)["params"]).items()}


# ---------------------------------------------------------------- configs


def dih_config_from_reference(
    flat: Mapping[str, Any],
    *,
    degree: int = 2,
    n_head: int = 16,
    input_size: int = 32,
    positions: str = "harmonic",
    class_dropout: float = 0.1,
) -> DiHConfig:
    """`DiHConfig` from names and shapes of published arrays (see `bare_names`).

    Args:
        degree: shapes tell degree x expand only. n_head: of the baseline with attention.
        input_size, positions: of nets without learned tables.
        class_dropout: 0 means that the label table has no row for a null class.

    Raises:
        ValueError: not this layout, or sizes that contradict each other.
    """
    if PATCH not in flat:
        raise ValueError(f"no {PATCH}: this is not the layout of DiH, or not all of it")
    width, channels, patch, _ = shape_of(flat, PATCH, 4)
    options: dict[str, Any] = {"positions": positions, "input_size": input_size}
    if "layers.0.mha.qkv.weight" in flat:
        options |= {"mixer": "attention", "n_head": n_head}
    else:
        names = [n for n in ("ho_proj", "po_proj") if f"layers.0.hom.{n}.weight" in flat]
        kept = shape_of(flat, f"layers.0.hom.{(names or ['ho_proj'])[0]}.weight", 2)[0]
        if kept % (degree * width):
            raise ValueError(f"the mixer keeps {kept} numbers, no multiple of {degree} x {width}")
        options |= {"degree": degree, "expand": kept // (degree * width)}
    if "pos_emb" in flat:
        tokens = shape_of(flat, "pos_emb", 3)[1]
        side = round(tokens**0.5)
        if side**2 != tokens:
            raise ValueError(f"pos_emb has {tokens} tokens, which is no square")
        options |= {
            "positions": "learned", "input_size": side * patch, "clamp": 255.0,
            "registers": flat["registers"].shape[1] if "registers" in flat else 0,
            "resize_by_count": True,
        }  # fmt: skip
    return DiHConfig(
        patch_size=patch, in_channels=channels, d_model=width,
        n_layer=count_of(flat, r"layers\.(\d+)\."),
        mlp_ratio=shape_of(flat, "layers.0.ffw.0.weight", 2)[0] / width,
        num_classes=shape_of(flat, LABELS, 2)[0] - (class_dropout > 0),
        class_dropout=class_dropout, timesteps=_timesteps(flat, width), **options,
    )  # fmt: skip


def _timesteps(flat: Mapping[str, Any], width: int) -> int:
    """T, as `freqs` tells it; 1000 where it is absent."""
    freqs = flat.get(FREQUENCIES)
    if not isinstance(freqs, np.ndarray) or len(freqs) < 2:
        return 1000
    return round(float(freqs[-1]) ** (-width / (width - 2)))


def dih_config_from_fields(fields: Mapping[str, Any], **options: Any) -> DiHConfig:
    """`DiHConfig` from the arguments of a published class, or from a published model's name.

    Args:
        fields: input_dim, n_classes, n_timesteps, im_size, kernel_size, dim, n_layers, order,
            order_expand, ffw_expand; n_heads for the baseline with attention; n_registers for
            DiH++. Or model ("DiH-XL/2", "DiH++-XL/2", "DiT-XL/2") and im_size. Besides, of our
            own: positions, class_dropout.
        options: fields of `DiHConfig` that the published class does not have.

    Raises:
        ValueError: fields that are not known.
    """
    fields, plus, heads = dict(fields), "n_registers" in fields, "n_heads" in fields
    config: dict[str, Any] = {}
    if "model" in fields:
        name = str(fields.pop("model"))
        found = re.fullmatch(r"(DiH(?:\+\+)?|DiT)-(S|B|L|XL)/(\d)", name)
        if not found:
            raise ValueError(f"model={name!r}, expected a name like DiH-XL/2")
        layers, width, ratio = SIZES[found[2]]
        plus, heads = found[1] == "DiH++", found[1] == "DiT"
        config = {
            "n_layer": layers, "d_model": width, "patch_size": int(found[3]), "mlp_ratio": ratio,
            "registers": 16 * plus,
        }  # fmt: skip
    if heads:
        config |= {"mixer": "attention", "mlp_ratio": 4}
    if plus:
        config |= {"positions": "learned", "clamp": 255.0, "resize_by_count": True}
    for theirs, value in fields.items():
        if theirs not in FIELDS:
            raise ValueError(f"{theirs} is not known; known: model, {', '.join(FIELDS)}")
        config[FIELDS[theirs]] = value
    config["mlp_ratio"] = float(config.get("mlp_ratio", DiHConfig.mlp_ratio))
    return DiHConfig(**config | options)


def dih_fields(config: DiHConfig) -> dict[str, Any]:
    """Arguments of the published class; inverse of `dih_config_from_fields`.

    Raises:
        ValueError: a net that no published class makes.
    """
    learned = config.positions == "learned"
    fixed = {"clamp": 255.0 if learned else 0.0, "resize_by_count": learned}
    if config.mixer == "attention":
        fixed |= {"positions": "harmonic", "mlp_ratio": 4.0}
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(f"net.{name}={getattr(config, name)}, the layout has {value}")
    names = dict(FIELDS)
    del names["n_registers" if not learned else "positions"]
    for name in ("order", "order_expand", "ffw_expand") if config.mixer == "attention" else (
        "n_heads",
    ):  # fmt: skip
        del names[name]
    return {theirs: getattr(config, ours) for theirs, ours in names.items()}


# Their argument of the net's class -> our field; the last two are ours alone.
FIELDS = {
    "input_dim": "in_channels", "n_classes": "num_classes", "n_timesteps": "timesteps",
    "im_size": "input_size", "kernel_size": "patch_size", "dim": "d_model",
    "n_layers": "n_layer", "order": "degree", "order_expand": "expand",
    "ffw_expand": "mlp_ratio", "n_heads": "n_head", "n_registers": "registers",
    "positions": "positions", "class_dropout": "class_dropout",
}  # fmt: skip
VIDEO_FIELDS = {
    "input_dim": "in_channels", "text_dim": "context_dim", "n_timesteps": "timesteps",
    "vid_length": "frames", "kernel_s": "patch_size", "kernel_t": "patch_frames",
    "dim": "d_model", "n_layers": "n_layer", "order": "degree", "order_expand": "expand",
    "ffw_expand": "mlp_ratio", "block_causal": "block_causal",
}  # fmt: skip
# name: (layers, width, side of a patch, frames of a patch, MLP's hidden width in units of it)
VIDEO_SIZES = {
    "S/2": (12, 384, 2, 2, 3), "B/2": (12, 768, 2, 2, 3), "B/4": (12, 768, 4, 2, 3),
    "XL/2": (20, 1152, 2, 2, 2),
}  # fmt: skip


def text_video_config_from_fields(fields: Mapping[str, Any]) -> TextVideoDiHConfig:
    """`TextVideoDiHConfig` from the arguments of the published class, or a published model's name.

    Args:
        fields: those of `VIDEO_FIELDS`, and vid_size "HxW"; or model ("S/2") instead of sizes.

    Raises:
        ValueError: fields that are not known.
    """
    fields, config = dict(fields), {}
    if "model" in fields:
        name = str(fields.pop("model"))
        if name not in VIDEO_SIZES:
            raise ValueError(f"model={name!r}, expected one of {', '.join(VIDEO_SIZES)}")
        names = ("n_layer", "d_model", "patch_size", "patch_frames", "mlp_ratio")
        config = dict(zip(names, VIDEO_SIZES[name]))
    if "vid_size" in fields:
        rows, columns = map(int, str(fields.pop("vid_size")).split("x"))
        config |= {"input_size": rows, "input_width": columns}
    for theirs, value in fields.items():
        if theirs not in VIDEO_FIELDS:
            raise ValueError(f"{theirs} is not known; known: vid_size, {', '.join(VIDEO_FIELDS)}")
        config[VIDEO_FIELDS[theirs]] = value
    config["mlp_ratio"] = float(config.get("mlp_ratio", TextVideoDiHConfig.mlp_ratio))
    return TextVideoDiHConfig(**config)
