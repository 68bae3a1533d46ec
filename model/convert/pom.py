"""The published layout of PoM layers of 2026 (`davidpicard/pom`), one layer's arrays by name.

    qc_proj.weight (E + S, d), se_bias                       one group
    po_proj.{weight (E, d/G, 1), bias}, se_proj.{weight, bias}     several groups
    po_coeff (E, k), ag_proj.{weight (d, E), bias}
    freqs_cos, freqs_sin | row_cos, row_sin, col_cos, col_sin      tables of the RoPE variant

Linear weights are (out, in). The tables are constants here: they are checked, not kept. Weights of
the forerunner of 2025 (`po_proj.weight` (E, d), `se_proj`) take the same places; its functions
differ, so that such weights need more training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...kernels_pallas.poly_mix import rope_frequencies
from ..mixers.pom import PolynomialMixer
from .names import array_module, check_shapes, flatten, nest

BUFFERS = {"1d": ("freqs",), "2d": ("row", "col")}
TABLES = {f"{name}_{part}" for name in ("freqs", "row", "col") for part in ("cos", "sin")}
# Our parameter -> theirs.
NAMES = {
    "qc_proj/kernel": "qc_proj.weight",
    "se_bias": "se_bias",
    "po_proj/kernel": "po_proj.weight",
    "po_proj/bias": "po_proj.bias",
    "se_proj/kernel": "se_proj.weight",
    "se_proj/bias": "se_proj.bias",
    "po_coeff": "po_coeff",
    "ag_proj/kernel": "ag_proj.weight",
    "ag_proj/bias": "ag_proj.bias",
}


def _reference_shapes(mixer: PolynomialMixer) -> dict[str, tuple[int, ...]]:
    width, gates, _ = mixer.sizes()
    d, groups = mixer.features, mixer.groups
    shapes: dict[str, tuple[int, ...]] = {
        "po_coeff": (width, mixer.degree),
        "ag_proj.weight": (d, width),
    }
    if groups == 1:
        shapes |= {"qc_proj.weight": (width + gates, d), "se_bias": (gates,)}
    else:
        shapes |= {"po_proj.weight": (width, d // groups, 1)}
        shapes |= {"se_proj.weight": (gates, d), "se_proj.bias": (gates,)}
        shapes |= {"po_proj.bias": (width,)} if mixer.use_bias else {}
    return shapes | ({"ag_proj.bias": (d,)} if mixer.use_bias else {})


def rope_tables(mixer: PolynomialMixer, lengths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The layout's tables for positions below `lengths`: (max_seq_len,) or (max_h, max_w)."""
    width, _, axes = mixer.sizes()
    if axes != len(lengths):
        raise ValueError(f"rope={mixer.rope!r} has {axes} axes, not {len(lengths)}")
    tables = {}
    for name, length in zip(BUFFERS.get(mixer.rope, ()), lengths, strict=True):
        frequencies = rope_frequencies(width, axes, mixer.rope_base)
        angles = np.arange(length)[:, None] * frequencies
        tables[f"{name}_cos"] = np.cos(angles).astype(np.float32)
        tables[f"{name}_sin"] = np.sin(angles).astype(np.float32)
    return tables


def pom_from_reference(flat: Mapping[str, Any], mixer: PolynomialMixer) -> dict[str, Any]:
    """Parameters of `mixer` from one layer's arrays (numpy's or jax's).

    Args:
        flat: arrays by name, without the layer's prefix. Tables may be absent.
        mixer: the layer they are for.

    Raises:
        ValueError: names or shapes that are not this layer's, or tables of another rotation.
    """
    tables = {n: a for n, a in flat.items() if n in TABLES}
    flat = forerunner_to_reference({n: a for n, a in flat.items() if n not in TABLES})
    check_shapes(flat, _reference_shapes(mixer))
    _check_tables(tables, mixer)
    return nest({ours: _from(ours, flat[n], mixer) for ours, n in NAMES.items() if n in flat})


def forerunner_to_reference(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Names of the layer of 2025 as those of 2026; arrays of 2026 pass unchanged."""
    flat = dict(flat)
    if "po_proj.weight" in flat and flat["po_proj.weight"].ndim == 2:
        parts = [flat.pop(n) for n in ("po_proj.weight", "se_proj.weight") if n in flat]
        flat["qc_proj.weight"] = array_module(parts).concatenate(parts)
        if "se_proj.bias" in flat:
            flat["se_bias"] = flat.pop("se_proj.bias")
    return flat


def pom_to_reference(
    params: Mapping[str, Any], mixer: PolynomialMixer, lengths: tuple[int, ...] = ()
) -> dict[str, Any]:
    """One layer's arrays under the published names; inverse of `pom_from_reference`.

    Args:
        lengths: of the tables to add, see `rope_tables`; () adds none.
    """
    flat = flatten(params)
    arrays = {NAMES[ours]: _to(ours, a) for ours, a in flat.items()}
    check_shapes(arrays, _reference_shapes(mixer))
    return arrays | (rope_tables(mixer, lengths) if lengths else {})


def _from(name: str, a: Any, mixer: PolynomialMixer) -> Any:
    if name == "po_proj/kernel":  # (E, d/G, 1): group by group, transposed
        return a[:, :, 0].reshape(mixer.groups, -1, a.shape[1]).swapaxes(1, 2)
    return a.T if name.endswith("/kernel") else a


def _to(name: str, a: Any) -> Any:
    if name == "po_proj/kernel":
        return a.swapaxes(1, 2).reshape(-1, a.shape[1])[:, :, None]
    return a.T if name.endswith("/kernel") else a


def _check_tables(tables: Mapping[str, Any], mixer: PolynomialMixer) -> None:
    if not tables:
        return
    names = BUFFERS.get(mixer.rope, ())
    expected = {f"{name}_{part}" for name in names for part in ("cos", "sin")}
    if set(tables) != expected:
        raise ValueError(
            f"tables {', '.join(sorted(tables))}: rope={mixer.rope!r} has "
            f"{', '.join(sorted(expected)) or 'none'}"
        )
    if array_module(tables.values()) is not np:
        return  # shapes without values, as in `jax.eval_shape`
    want = rope_tables(mixer, tuple(tables[f"{name}_cos"].shape[0] for name in names))
    for name, table in tables.items():
        error = np.inf
        if table.shape == want[name].shape:
            error = np.abs(np.float32(table) - want[name]).max()
        if not error < 1e-2:  # tables may have been rounded to bfloat16
            raise ValueError(
                f"{name} is not the table of rope_base={mixer.rope_base:g} and width "
                f"{mixer.sizes()[0]}: largest difference {error:.2g}; set rope_base"
            )
