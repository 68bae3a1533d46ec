"""Weights of LPIPS as published: torchvision's VGG16 and the linear weights of the `lpips` package.

    features.{i}.weight, .bias      torchvision's vgg16 (`net.slice{k}.{i}.*` in a whole LPIPS)
    lin{k}.model.1.weight           the package's weights/v0.1/vgg.pth: (1, C, 1, 1)

Both may be in one file or come from two; other arrays (classifier, scaling) are left out.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ..nets.lpips import CHANNELS, SCALE, SHIFT, STAGES
from .names import Flat, check_shapes, nest
from .vq_tokenizer import conv_kernel, conv_weight

_SCALING = {"shift": SHIFT, "scale": SCALE}


def _vgg_names() -> dict[str, tuple[str, tuple[int, ...]]]:
    """torchvision's number of a convolution -> (our name, shape of its weight): convolutions and
    ReLUs count one each, and so do the poolings between stages.
    """
    names, index, before = {}, 0, 3
    for stage, (convolutions, channels) in enumerate(STAGES, 1):
        for i in range(1, convolutions + 1):
            names[f"features.{index}"] = (f"conv{stage}_{i}", (channels, before, 3, 3))
            index, before = index + 2, channels
        index += 1
    return names


VGG = _vgg_names()
LINEAR = {f"lin{k}.model.1.weight": (1, channels, 1, 1) for k, channels in enumerate(CHANNELS)}


def lpips_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all arrays that `lpips_from_reference` takes."""
    vgg = {f"{name}.weight": shape for name, (_, shape) in VGG.items()}
    vgg |= {f"{name}.bias": shape[:1] for name, (_, shape) in VGG.items()}
    return vgg | LINEAR


def lpips_from_reference(flat: Flat) -> dict[str, Any]:
    """Parameters of `LPIPS`.

    Args:
        flat: arrays by name; prefixes before `features.`, `net.slice{k}.` and `lin{k}.` do not
            matter.

    Raises:
        ValueError: says which of the two sets is missing and where it comes from, or which array
            is missing or of another shape; or the pixels were scaled otherwise.
    """
    found: dict[str, Any] = {}
    for name, array in flat.items():
        scaling = re.search(r"scaling_layer\.(shift|scale)$", name)
        if scaling and not np.allclose(np.reshape(array, -1), _SCALING[scaling[1]], atol=1e-6):
            raise ValueError(f"{name} is {np.reshape(array, -1)}, expected {_SCALING[scaling[1]]}")
        name = re.sub(r"^(?:.*[./])?(?:net\.)?slice\d+\.(\d+\.\w+)$", r"features.\1", name)
        name = re.sub(r"^(?:.*[./])?lins\.(\d+)\.", r"lin\1.", name)
        name = re.sub(r"^.*[./](features\.\d+\.\w+|lin\d\.model\.1\.weight)$", r"\1", name)
        if name in lpips_shapes():
            found[name] = array
    have = lambda names: any(n in found for n in names)
    if not have(f"{name}.weight" for name in VGG):
        raise ValueError(
            "no VGG16 (features.0.weight ...) among the arrays; take torchvision's vgg16 weights"
        )
    if not have(LINEAR):
        raise ValueError(
            "no linear weights of LPIPS (lin0.model.1.weight ...) among the arrays; take vgg.pth "
            "of the lpips package (weights/v0.1) and put it into the file of VGG16"
        )
    check_shapes(found, lpips_shapes())
    params: dict[str, Any] = {}
    for theirs, (ours, _) in VGG.items():
        params[f"vgg/{ours}/kernel"] = conv_kernel(found[f"{theirs}.weight"])
        params[f"vgg/{ours}/bias"] = found[f"{theirs}.bias"]
    for k, name in enumerate(LINEAR):
        params[f"lin{k}"] = found[name].reshape(-1)
    return nest(params)


def lpips_to_reference(params) -> dict[str, Any]:
    """Inverse of `lpips_from_reference`, under torchvision's names and `lin{k}.model.1.weight`."""
    flat: dict[str, Any] = {}
    for theirs, (ours, _) in VGG.items():
        layer = params["vgg"][ours]
        flat |= {f"{theirs}.weight": conv_weight(layer["kernel"]), f"{theirs}.bias": layer["bias"]}
    return flat | {n: params[f"lin{k}"].reshape(1, -1, 1, 1) for k, n in enumerate(LINEAR)}


def linear_weights(flat: Flat) -> list[Any]:
    """[C_k] per level for `lpips_head`, from the linear weights alone.

    Raises:
        ValueError: one is missing or has another shape.
    """
    found = {name: array for name, array in flat.items() if name in LINEAR}
    check_shapes(found, LINEAR)
    return [found[name].reshape(-1) for name in LINEAR]
