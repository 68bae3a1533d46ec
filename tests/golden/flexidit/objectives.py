"""Family objectives: distillation and distribution matching of given outputs and features."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lintime.model.processes.flexible import distillation_loss, mmd

from ..compare import Report


def objectives(report: Report) -> None:
    """Losses by sample, the gradient into the weak mode, both discrepancies."""
    channels = report.case.config["C"]
    weak, powerful = (
        jnp.moveaxis(jnp.asarray(report.input(name)), 1, -1) for name in ("weak", "powerful")
    )

    def mean(weak, powerful):
        _, parts = distillation_loss(weak, powerful, channels)
        return jnp.mean(parts["distill_eps"]), parts

    (_, parts), (grad, none) = jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(
        weak, powerful
    )
    for name, value in parts.items():
        report.check(name, value)
    report.check("grad_weak_eps", jnp.moveaxis(grad[..., :channels], -1, 1))
    if jnp.any(none != 0):
        report.fail("grad_weak_eps", "the powerful mode gets a gradient")
    x, y = report.input("feat_x"), report.input("feat_y")
    for kernel in ("poly3", "rbf"):
        report.check(f"mmd_{kernel}", mmd(x, y, kernel))
