"""Family kernel: the aggregation of polynomials alone, in every implementation of this device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lintime.kernels_pallas.poly_mix import poly_mix, rope_frequencies, rope_rotation

from ..compare import Report
from ..manifest import Tolerance
from ..quick import quick_jit

IMPLEMENTATIONS = ("xla", "reference")
# of float32 arithmetic on the values of a 16-bit case, and of what is then rounded to 16 bits
FINE = Tolerance(1e-6, 2e-5, 1e-6, 2e-5, per_array=True)
ROUNDED = dataclasses.replace(FINE, rtol=2.0**-8, grad_rtol=2.0**-8)


def kernel(report: Report) -> None:
    """Values and gradients against the published kernels, and against exact ones.

    16-bit cases run twice: as they are, and with float32 features of the same values, which shows
    the slopes at the kinks.
    """
    config = report.case.config
    x, coeff = report.input("in_x"), jnp.asarray(report.input("in_coeff"))
    form = {"causal": "causal" in config["kernel"]}
    if "in_mask" in report:
        form["weights"] = jnp.asarray(report.input("in_mask"))
    if "rope" in config["kernel"]:
        frequencies = rope_frequencies(x.shape[2], base=config.get("rope_base", 10000.0))
        form["rotation"] = rope_rotation(report.input("in_positions"), frequencies)
        for name, table in zip(("mid_freqs_cos", "mid_freqs_sin"), form["rotation"], strict=True):
            report.check(name, table[:, 0])
    ct = report.input("ct_y")
    dtype = jnp.dtype(config["input_dtype"])

    def run(dtype, out, implementation):
        def loss(x, coeff):
            y, _ = poly_mix(x, coeff, dtype=out, implementation=implementation, **form)
            return jnp.sum(y.astype(ct.dtype) * ct), y

        go = quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, y), (dx, dcoeff) = go(jnp.asarray(x, dtype), coeff)
        found = {"out_y": y, "grad_in_x": dx, "gp.coeff": dcoeff}
        return {n: np.asarray(a.astype(ct.dtype)) for n, a in found.items()}

    kernels = () if jax.default_backend() == "gpu" or "rotation" in form else ("pallas_tpu",)
    for implementation in (*IMPLEMENTATIONS, *kernels):
        for name, got in run(dtype, dtype, implementation).items():
            report.check(name, got, how=implementation)
            loose = dtype.itemsize < 4
            report.check(
                f"{name}_exact", got, tolerance=ROUNDED if loose else None, how=implementation
            )
        if dtype.itemsize < 4:
            for name, got in run(ct.dtype, ct.dtype, implementation).items():
                how = f"{implementation}, float32"
                report.check(f"{name}_exact", got, tolerance=FINE, how=how)
