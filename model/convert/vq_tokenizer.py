"""Layouts of VQ tokenizers: LlamaGen's training checkpoints and released `vq_ds16_c2i.pt`, AiM's
bare state dict and the `vqvae.` half of its hub files; and LlamaGen's PatchGAN discriminator.

    encoder.conv_blocks.{i}.res.{j}.conv1.weight  <->  encoder/conv_blocks_{i}/res_{j}/conv1/kernel

Convolutions are (out, in, height, width) there and (height, width, in, out) here. Arrays may be
numpy's, or jax's as in `jax.eval_shape`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..nets.patchgan import PatchGAN
from ..nets.vq_tokenizer import VQTokenizer, VQTokenizerConfig
from .names import Flat, below, check_shapes, count_of, flatten, nest, shape_of

CODEBOOK = "quantize.embedding.weight"
USAGE = "quantize.codebook_used"  # a statistic of their training loop
ENTRIES = ("model", "ema")  # of LlamaGen's training checkpoints


# ---------------------------------------------------------------- arrays by name


def conv_kernel(array: Any) -> Any:
    """(out, in, height, width) -> (height, width, in, out)."""
    return array.transpose(2, 3, 1, 0)


def conv_weight(array: Any) -> Any:
    """Inverse of `conv_kernel`."""
    return array.transpose(3, 2, 0, 1)


def _ours(name: str, array: Any) -> tuple[str, Any]:
    """Our path and layout of one of their arrays."""
    if name == CODEBOOK:
        return "codebook", array
    path = re.sub(r"\.(\d+)(?=\.)", r"_\1", name).replace(".", "/")
    if not path.endswith("/weight"):
        return path, array
    stem = path.removesuffix("weight")
    return (stem + "kernel", conv_kernel(array)) if array.ndim == 4 else (stem + "scale", array)


def _theirs(path: str, array: Any) -> tuple[str, Any]:
    """Inverse of `_ours`."""
    if path == "codebook":
        return CODEBOOK, array
    name = re.sub(r"_(\d+)(?=\.)", r".\1", path.replace("/", "."))
    stem, _, leaf = name.rpartition(".")
    if leaf == "kernel":
        return f"{stem}.weight", conv_weight(array)
    return (f"{stem}.weight" if leaf == "scale" else name), array


def tokenizer_arrays(flat: Flat, weights: str = "model") -> dict[str, Any]:
    """The tokenizer's arrays under their own names, out of any file that has them.

    Args:
        flat: of a training checkpoint (names begin with "model/" or "ema/"), of AiM's hub file
            (names begin with "vqvae.", others are left out), or bare.
        weights: "model" or "ema", the entry of a training checkpoint to take.

    Raises:
        ValueError: there is no such entry, or no tokenizer.
    """
    if weights not in ENTRIES:
        raise ValueError(f"weights={weights!r}; choose one of {', '.join(ENTRIES)}")
    flat = dict(flat)
    entries = [entry for entry in ENTRIES if any(n.startswith(f"{entry}/") for n in flat)]
    if weights in entries:
        flat = below(flat, f"{weights}/")
    elif entries or weights != "model":
        raise ValueError(f"no {weights!r} weights here; found: {', '.join(entries) or 'one set'}")
    if any(n.startswith("vqvae.") for n in flat):
        flat = below(flat, "vqvae.")
    flat.pop(USAGE, None)
    if CODEBOOK not in flat:
        found = ", ".join(sorted(flat)[:4]) or "none"
        raise ValueError(f"no VQ tokenizer: {CODEBOOK} is missing; names found: {found}")
    return flat


# ---------------------------------------------------------------- tokenizer


def config_from_shapes(flat: Flat, weights: str = "model") -> VQTokenizerConfig:
    """The config of a tokenizer, from names and shapes alone.

    They do not tell `l2_norm`; it is true, as in every published one.

    Raises:
        ValueError: not this layout, or sizes that do not fit together.
    """
    flat = tokenizer_arrays(flat, weights)
    number = lambda pattern: count_of(flat, pattern)
    levels = number(r"encoder\.conv_blocks\.(\d+)\.")
    ch, in_channels, *_ = shape_of(flat, "encoder.conv_in.weight", 4)
    width = lambda i: shape_of(flat, f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4)[0]
    widths = [width(i) for i in range(levels)]
    odd = [w for w in widths if not ch or w % ch]
    if odd or not widths:
        raise ValueError(f"channels of the levels {widths} are no multiples of the first, {ch}")
    codebook_size, codebook_dim = shape_of(flat, CODEBOOK, 2)
    return VQTokenizerConfig(
        ch=ch,
        ch_mult=tuple(w // ch for w in widths),
        num_res_blocks=number(r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        z_channels=shape_of(flat, "encoder.conv_out.weight", 4)[0],
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        in_channels=in_channels,
        out_channels=shape_of(flat, "decoder.conv_out.weight", 4)[0],
    )


def tokenizer_shapes(config: VQTokenizerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tokenizer's parameters in their layout; nothing is computed."""
    side = config.downsample
    image = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    params = jax.eval_shape(VQTokenizer(config).init, jax.random.key(0), image)["params"]
    return {n: a.shape for n, a in jax.eval_shape(tokenizer_to_reference, params).items()}


def tokenizer_from_reference(flat: Flat, weights: str = "model") -> dict[str, Any]:
    """Parameters of `VQTokenizer` with the config `config_from_shapes(flat)`.

    Args:
        flat, weights: see `tokenizer_arrays`.

    Raises:
        ValueError: names every array that is missing, unknown or of another shape.
    """
    flat = tokenizer_arrays(flat, weights)
    check_shapes(flat, tokenizer_shapes(config_from_shapes(flat)))
    return nest(dict(_ours(name, array) for name, array in flat.items()))


def tokenizer_to_reference(params: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `tokenizer_from_reference`: the bare state dict, without `codebook_used`."""
    return dict(_theirs(path, array) for path, array in flatten(params).items())


# ---------------------------------------------------------------- discriminator


def _discriminator_names(layers: int) -> dict[str, str]:
    """Our module -> their index: each convolution but the outer ones brings a norm and a ReLU."""
    names = {"conv_0": "main.0", f"conv_{layers + 1}": f"main.{2 + 3 * layers}"}
    for i in range(1, layers + 1):
        names |= {f"conv_{i}": f"main.{3 * i - 1}", f"norm_{i}": f"main.{3 * i}"}
    return names


_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def discriminator_from_reference(flat: Flat) -> dict[str, Any]:
    """{"params", "batch_stats"} of `PatchGAN` from LlamaGen's `discriminator` entry or a bare
    state dict (`main.{i}.*`); `num_batches_tracked` is left out.

    Raises:
        ValueError: names every array that is missing, unknown or of another shape.
    """
    flat = below(flat, "discriminator/") or dict(flat)
    flat = {n: a for n, a in flat.items() if not n.endswith("num_batches_tracked")}
    features, channels, *_ = shape_of(flat, "main.0.weight", 4)
    layers = sum(n.endswith("running_mean") for n in flat)
    net = PatchGAN(features=features, layers=layers)
    side = net.least_size
    image = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    wanted = jax.eval_shape(net.init, jax.random.key(0), image)
    expected = jax.eval_shape(discriminator_to_reference, wanted)
    check_shapes(flat, {n: a.shape for n, a in expected.items()})
    theirs = {t: o for o, t in _discriminator_names(layers).items()}
    leaves = {t: o for o, t in _NORM.items()}
    variables: dict[str, Any] = {}
    for name, array in flat.items():
        module, _, leaf = name.rpartition(".")
        ours = theirs[module]
        if ours.startswith("conv") and leaf == "weight":
            leaf, array = "kernel", conv_kernel(array)
        elif ours.startswith("norm"):
            leaf = leaves[leaf]
        kind = "batch_stats" if leaf in ("mean", "var") else "params"
        variables[f"{kind}/{ours}/{leaf}"] = array
    return nest(variables)


def discriminator_to_reference(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `discriminator_from_reference`: a bare state dict."""
    layers = sum(name.startswith("norm_") for name in variables["params"])
    names, flat = _discriminator_names(layers), {}
    for kind in ("params", "batch_stats"):
        for path, array in flatten(variables.get(kind, {})).items():
            module, _, leaf = path.partition("/")
            kernel = leaf == "kernel"
            leaf = "weight" if kernel else _NORM[leaf]
            flat[f"{names[module]}.{leaf}"] = conv_weight(array) if kernel else array
    return flat
