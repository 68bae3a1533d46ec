"""Families conv1d, scan and ssd: the ops, in the reference's layouts."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from lintime.kernels_pallas.causal_conv1d import causal_conv1d, causal_conv1d_step
from lintime.kernels_pallas.selective_scan import selective_scan, selective_scan_step
from lintime.kernels_pallas.ssd import chunk_parts, ssd as ssd_op, ssd_step

from ..compare import Report
from ..quick import quick_jit
from .common import IMPLEMENTATIONS, check_function, optional_inputs, resets

swap = lambda x: jnp.swapaxes(x, 1, 2)  # [B, D, L] <-> [B, L, D]


def conv1d(report: Report) -> None:
    """Causal convolution over a whole sequence, or step by step from a cache of W columns."""
    if "conv_state" in report:
        return _conv1d_steps(report)
    config = report.case.config
    inputs = optional_inputs(report, "x", "weight", "bias", "initial_states", "seq_idx")
    for name in IMPLEMENTATIONS:

        def run(a, name=name):
            state = a.get("initial_states")
            y, state = causal_conv1d(
                swap(a["x"]), a["weight"].T, a.get("bias"), activation=config["activation"],
                state=None if state is None else swap(state),
                resets=resets(a["seq_idx"]) if "seq_idx" in a else None, implementation=name,
            )  # fmt: skip
            return {"y": swap(y), "final_states": swap(state)}

        check_function(report, run, inputs, name)


def _conv1d_steps(report: Report) -> None:
    x, weight = report.input("x"), report.input("weight")
    cache = report.input("conv_state")
    bias = report.input("bias") if "bias" in report else None
    width = weight.shape[1]
    state, outputs = swap(cache)[:, cache.shape[2] - width + 1 :], []
    for t in range(x.shape[2]):
        y, state = causal_conv1d_step(
            x[:, :, t], weight.T, bias, activation=report.case.config["activation"], state=state
        )
        outputs.append(y)
    report.check("y", np.stack(outputs, axis=2))
    check_cache(report, "conv_state_out", state)


def check_cache(report: Report, name: str, state) -> None:
    """A cache of W columns against our W-1: the oldest column is never read again."""
    if name in report:
        expected = report.case.arrays[name]
        kept = expected[:, :, expected.shape[2] - state.shape[1] :]
        report.check(name, swap(state), kept, how="last W-1 columns")


def scan(report: Report) -> None:
    """Selective scan with any of its optional inputs, real or complex, whole or step by step."""
    config = report.case.config
    softplus = config.get("delta_softplus", config.get("dt_softplus", False))
    if "state" in report:
        return _scan_steps(report, softplus)
    names = ("u", "delta", "A", "A_re", "A_im", "B", "C", "D", "z", "delta_bias", "initial_state")
    inputs = optional_inputs(report, *names)
    for implementation in IMPLEMENTATIONS:

        def run(a, implementation=implementation):
            complex_a = "A_re" in a
            time_first = lambda b: jnp.moveaxis(b, -1, 1) if b.ndim > 2 else b
            if complex_a:
                pair = lambda b: b[..., ::2] + 1j * b[..., 1::2]
                decay = a["A_re"] + 1j * a["A_im"]
                inner = {n: time_first(pair(a[n])) for n in "BC"}
            else:
                decay, inner = a["A"], {n: time_first(a[n]) for n in "BC"}
            y, state = selective_scan(
                swap(a["u"]), swap(a["delta"]), decay, inner["B"], inner["C"], a.get("D"),
                swap(a["z"]) if "z" in a else None, delta_bias=a.get("delta_bias"),
                delta_softplus=softplus, state=a.get("initial_state"),
                implementation=implementation,
            )  # fmt: skip
            if complex_a:
                states = {"last_state_re": state.real, "last_state_im": state.imag}
            else:
                states = {"last_state": state}
            return {"out": swap(y), **states}

        check_function(report, run, inputs, implementation)


def _scan_steps(report: Report, softplus: bool) -> None:
    a = optional_inputs(report, "state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    state, outputs = a["state"], []
    for t in range(a["x"].shape[2]):
        at = lambda name, t=t: a[name][..., t] if name in a else None
        y, state = selective_scan_step(
            at("x"), at("dt"), a["A"], at("B"), at("C"), a.get("D"), at("z"),
            dt_bias=a.get("dt_bias"), dt_softplus=softplus, state=state,
        )  # fmt: skip
        outputs.append(y)
    report.check("y", np.stack(outputs, axis=2))
    report.check("state_out", state)


def ssd(report: Report) -> None:
    """SSD at every chunk size the case names, its intermediates, or step by step."""
    config = report.case.config
    settings = {
        "dt_softplus": config.get("dt_softplus", False),
        "dt_limit": tuple(config.get("dt_limit") or (0.0, math.inf)),
    }
    if "state" in report:
        return _ssd_steps(report, settings)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states", "seq_idx")
    inputs = optional_inputs(report, *names)
    first = config.get("chunk_size_of_intermediates")
    sizes = [first or 16, *config.get("also_check_chunk_sizes", ())]
    for how, options in (
        *((f"chunk {n}", {"chunk": n, "implementation": "xla"}) for n in sizes),
        ("reference", {"implementation": "reference"}),
    ):

        def run(a, options=options):
            y, state = ssd_op(
                *(a[n] for n in ("x", "dt", "A", "B", "C")), a.get("D"), a.get("z"),
                dt_bias=a.get("dt_bias"), state=a.get("initial_states"),
                resets=resets(a["seq_idx"]) if "seq_idx" in a else None, **settings, **options,
            )  # fmt: skip
            return {"y": y, "final_states": state}

        check_function(report, run, inputs, how)
    if any(report.matching("chunk.")):
        parts = quick_jit(
            lambda a: chunk_parts(
                *(a[n] for n in ("x", "dt", "A", "B", "C")), dt_bias=a.get("dt_bias"),
                state=a.get("initial_states"), chunk=first, **settings,
            )
        )({n: a for n, a in inputs.items() if n not in ("D", "z", "seq_idx")})  # fmt: skip
        for name, part in report.matching("chunk."):
            report.check(name, parts[part])


def _ssd_steps(report: Report, settings) -> None:
    a = optional_inputs(report, "state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    state, outputs = a["state"], []
    for t in range(a["x"].shape[0]):
        at = lambda name, t=t: a[name][t] if name in a else None
        y, state = ssd_step(
            at("x"), at("dt"), a["A"], at("B"), at("C"), a.get("D"), at("z"),
            dt_bias=a.get("dt_bias"), state=state, **settings,
        )  # fmt: skip
        outputs.append(y)
    report.check("y", np.stack(outputs))
    report.check("state_out", state)
