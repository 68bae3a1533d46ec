"""Families rmsnorm, mamba1_block and mamba2_block."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lintime.model.convert.mamba import SSM_FIELDS, mixer_from_reference
from lintime.model.layers.norms import gated_rms_norm
from lintime.model.mixers.mamba import Mamba1, Mamba2

from ..compare import Report
from ..quick import quick_jit
from .common import check_function, optional_inputs
from .ops import check_cache


def rmsnorm(report: Report) -> None:
    """Gated RMS norm, either order, groups."""
    config = report.case.config
    inputs = optional_inputs(report, "x", "weight", "z")

    def run(a):
        y = gated_rms_norm(
            a["x"], a["weight"], a.get("z"), group_size=config.get("group_size"),
            norm_before_gate=config.get("norm_before_gate", False), epsilon=config["eps"],
        )  # fmt: skip
        return {"y": y}

    check_function(report, run, inputs, "")


def mamba1_block(report: Report) -> None:
    """A Mamba-1 mixer: parallel form with gradients, then prefill and steps."""
    _block(report, Mamba1)


def mamba2_block(report: Report) -> None:
    """A Mamba-2 mixer: parallel form with gradients, then prefill and steps."""
    _block(report, Mamba2)


def _block(report: Report, kind: type) -> None:
    config = report.case.config
    known = {f.name for f in dataclasses.fields(kind)}
    fields = {SSM_FIELDS[n]: v for n, v in config.items() if n in SSM_FIELDS and v is not None}
    fields = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items() if n in known}
    fields = {n: v for n, v in fields.items() if v != "auto"}
    mixer = kind(features=config["d_model"], **fields)
    params = mixer_from_reference(report.case.params)
    x, weight = jnp.asarray(report.input("x")), report.input("ct_y")

    def loss(params, x):
        y, _ = mixer.apply({"params": params}, x)
        return jnp.sum(y * weight), y

    run = quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y), (grads, grad_x) = run(params, x)
    report.check("y", y, how="parallel")
    report.check("grad.x", grad_x)
    report.check_params("grad.param.", grads, mixer_from_reference)

    extend = quick_jit(lambda x, state: mixer.apply({"params": params}, x, state, method="extend"))
    step = quick_jit(lambda x, state: mixer.apply({"params": params}, x, state, method="step"))
    state = mixer.init_state(x.shape[0])
    prefill, outputs = config.get("prefill") or 0, []
    if prefill:
        y, state, _ = extend(x[:, :prefill], state)
        outputs.append(y)
        check_cache(report, "conv_state_after_prefill", state.conv)
        report.check("ssm_state_after_prefill", state.ssm)
    for t in range(prefill, x.shape[1]):
        y, state = step(x[:, t], state)
        outputs.append(y[:, None])
    report.check("y", np.concatenate(outputs, axis=1), how="prefill and steps")
    check_cache(report, "conv_state_end", state.conv)
    report.check("ssm_state_end", state.ssm)
