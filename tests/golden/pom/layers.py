"""Families pom and rope*: the layer, values between its steps, and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lintime.kernels_pallas.poly_mix import (
    poly_mix,
    polynomial,
    rope_frequencies,
    rope_rotation,
    rotate,
)
from lintime.model.convert.pom import TABLES, pom_from_reference, pom_to_reference
from lintime.model.mixers.pom import PolynomialMixer, gate_frequencies

from ..compare import Report
from ..quick import quick_jit


def mixer_of(report: Report, **fields: Any) -> tuple[PolynomialMixer, dict[str, Any]]:
    """The mixer of a case's config and its parameters; they must go back as they came."""
    config, arrays = report.case.config, report.case.params
    rope = "1d" if "freqs_cos" in arrays else "2d" if "row_cos" in arrays else "none"
    mixer = PolynomialMixer(
        features=config["dim"], degree=config["degree"], expand=config["expand"],
        groups=config["n_groups"], heads=config["n_sel_heads"], use_bias=config["bias"],
        rope=rope, rope_base=config.get("rope_base", 10000.0), **fields,
    )  # fmt: skip
    params = pom_from_reference(arrays, mixer)
    tables = [arrays[n].shape[0] for n in ("freqs_cos", "row_cos", "col_cos") if n in arrays]
    back = pom_to_reference(params, mixer, tuple(tables))
    for name, array in arrays.items():
        error = np.abs(back[name] - array).max()
        if error > (1e-5 if name in TABLES else 0):
            report.fail(name, f"comes back with an error of {error:.2g}")
    return mixer, jax.tree.map(jnp.asarray, params)


def frames_of(mask: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Lengths of the frames of tokens and of queries of a block-causal mask [B, T, N]; or None."""
    rows = mask[0]
    seen = rows.astype(bool).sum(axis=1)
    stairs = np.arange(rows.shape[1]) < seen[:, None]
    ends, counts = np.unique(seen, return_counts=True)
    if (mask != stairs).any() or (np.diff(seen) < 0).any() or ends[-1] != rows.shape[1]:
        return None
    frames = np.diff(ends, prepend=0)
    return (tuple(map(int, frames)), tuple(map(int, counts))) if ends[0] else None


def positions_of(report: Report) -> dict[str, Any]:
    """The positions of a case, as keyword arguments of the mixer."""
    names = {
        "in_positions": "positions",
        "in_positions_hw": "positions",
        "in_ctx_positions": "context_positions",
        "in_ctx_positions_hw": "context_positions",
    }
    return {ours: jnp.asarray(report.input(n)) for n, ours in names.items() if n in report}


def layer(report: Report) -> None:
    """All ways to call the layer that mean the case's mask."""
    mask = jnp.asarray(report.input("in_mask")) if "in_mask" in report else None
    causal = report.case.config.get("mask") == "causal"
    mixer, params = mixer_of(report, causal=causal)
    inputs = {"x": jnp.asarray(report.input("in_xq"))}
    if "in_xc" in report:
        inputs["context"] = jnp.asarray(report.input("in_xc"))
    elif report.case.config.get("cross"):
        report.fail("in_xc", "is missing")
    positions = positions_of(report)
    ways: dict[str, tuple[PolynomialMixer, dict[str, Any]]] = {}
    if mask is None:
        ways[""] = mixer, {}
        if causal:
            ones = (1,) * inputs["x"].shape[1]
            ways["frames of one"] = mixer.clone(causal=False), {"frames": ones}
    elif mask.ndim == 2:
        ways[""] = mixer, {"context_mask" if "context" in inputs else "mask": mask}
    else:
        ways["matrix"] = mixer, {"query_mask": mask}
        frames = frames_of(np.asarray(mask))
        if frames and ("context" in inputs or frames[0] == frames[1]):
            own = {"query_frames": frames[1]} if "context" in inputs else {}
            ways["frames"] = mixer, {"frames": frames[0], **own}
    for how, (variant, options) in ways.items():
        _check_way(report, variant, params, inputs, options | positions, how)
    _check_between(report, mixer, params, inputs, mask, positions)


def _check_way(report, mixer, params, inputs, options, how) -> None:
    ct = report.input("ct_y")

    def loss(params, inputs):
        y, _ = mixer.apply({"params": params}, **inputs, **options)
        return jnp.sum(y * ct), y

    go = quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y), (grads, (grad_inputs)) = go(params, inputs)
    report.check("out_y", y, how=how)
    for name, ours in (("grad_in_xq", "x"), ("grad_in_xc", "context")):
        if ours in grad_inputs:
            report.check(name, grad_inputs[ours], how=how)

    def convert(flat: Mapping[str, np.ndarray]):
        return pom_from_reference({n: a for n, a in flat.items() if n not in TABLES}, mixer)

    report.check_params("gp.", grads, convert, how=how)


def _check_between(report, mixer, params, inputs, mask, positions) -> None:
    """The values between the layer's steps, by its public parts."""
    config, (width, gates, axes) = report.case.config, mixer.sizes()

    def run(params, inputs):
        h, gate = mixer.apply({"params": params}, **inputs, method="project")
        coeff, found = params["po_coeff"], {}
        found |= {"h_proj": h, "gate": gate, "poly": polynomial(h, coeff)}
        rotation = None
        if axes:
            own = positions.get("positions", jnp.arange(gate.shape[1]))
            theirs = positions.get(
                "context_positions", jnp.arange(h.shape[1]) if "context" in inputs else own
            )
            base = config.get("rope_base", 10000.0)
            frequencies = rope_frequencies(width, axes, base)
            of_gate = frequencies
            if gates < width:
                of_gate = gate_frequencies(gates, width, axes, base)
            gate = rotate(gate, rope_rotation(own, of_gate, axes))
            rotation = rope_rotation(theirs, frequencies, axes)
            found |= {"gate_rot": gate, "poly_rot": rotate(found["poly"], rotation)}
        form = {"causal": True} if mixer.causal else {}
        if mask is not None:
            form = {"weights" if mask.ndim == 2 else "query_weights": mask}
        rows, _ = poly_mix(h, coeff, rotation=rotation, **form)
        heads = lambda a: a.reshape(*a.shape[:2], gates, -1)
        selected = gate[..., None] * heads(rows)
        found |= {"agg": rows, "sel": selected.reshape(*selected.shape[:2], width)}
        return found

    for name, got in quick_jit(run)(params, inputs).items():
        report.check(f"mid_{name}", got)
