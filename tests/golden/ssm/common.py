"""A function of named arrays against a case: outputs, and gradients by the arrays' own names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ..compare import Report
from ..quick import quick_jit

IMPLEMENTATIONS = ("xla", "reference")


def check_function(
    report: Report, function: Callable, inputs: Mapping[str, np.ndarray], how: str
) -> None:
    """Compares outputs with the case's arrays, and gradients with its arrays `grad.<input>`.

    Args:
        function: {name: input} -> {name: output}, all in the case's layout.
        inputs: by name.
        how: for the names of the checks.
    """
    weights = {n: report.input(f"ct_{n}") for n in report.expected("ct_")}

    def loss(moving, fixed):
        outputs = function({**moving, **fixed})
        total = sum(jnp.sum(w * outputs[n]) for n, w in weights.items())
        return total, outputs

    floats = {n: jnp.asarray(a) for n, a in inputs.items() if np.asarray(a).dtype.kind == "f"}
    others = {n: a for n, a in inputs.items() if n not in floats}
    if weights:
        run = quick_jit(jax.value_and_grad(loss, has_aux=True))
        (_, outputs), gradients = run(floats, others)
    else:
        outputs, gradients = quick_jit(lambda a, b: loss(a, b)[1])(floats, others), {}
    for name, got in outputs.items():
        report.check(name, got, how=how)
    for name, got in gradients.items():
        report.check(f"grad.{name}", got, how=how)


def optional_inputs(report: Report, *names: str) -> dict[str, np.ndarray]:
    """Those of the named arrays that the case has."""
    return {name: report.input(name) for name in names if name in report}


def resets(seq_idx):
    """Where a packed sequence begins, from ids [B, L]; the state before belongs to id 0."""
    before = jnp.concatenate([jnp.zeros_like(seq_idx[:, :1]), seq_idx[:, :-1]], axis=1)
    return seq_idx != before
