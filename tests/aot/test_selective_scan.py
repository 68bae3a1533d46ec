"""The selective scan's kernels compile for TPUs, in less memory than the XLA form."""

import jax
import jax.numpy as jnp
import pytest

from lintime.kernels_pallas.selective_scan import selective_scan

from . import CHIPS, MARKS, compile_for, memory_report

pytestmark = MARKS


def shapes(batch, t_len, width, states, *, groups=1, dtype=jnp.bfloat16, leave_out=()):
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    wide = jnp.float32
    inputs = {
        "u": array(batch, t_len, width),
        "delta": array(batch, t_len, width),
        "A": array(width, states, dtype=wide),
        "B": array(batch, t_len, groups, states),
        "C": array(batch, t_len, groups, states),
        "D": array(width, dtype=wide),
        "z": array(batch, t_len, width),
        "delta_bias": array(width, dtype=wide),
        "state": array(batch, width, states, dtype=wide),
    }
    return {k: v for k, v in inputs.items() if k not in leave_out}


def forward(implementation, **options):
    options = {"delta_softplus": True, "implementation": implementation, **options}
    return lambda inputs: selective_scan(**inputs, **options)


def gradient(implementation, wrap=lambda f: f, **options):
    def loss(inputs):
        out, state = wrap(forward(implementation, **options))(inputs)
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(state)

    return jax.grad(loss)


CASES = {
    "usual": (shapes(2, 512, 1024, 16), {}),
    "ragged, reverse": (shapes(2, 200, 192, 64), {"reverse": True}),
    "groups, float32": (shapes(1, 300, 256, 128, groups=2, dtype=jnp.float32), {}),
    "tiny": (shapes(1, 5, 40, 5, leave_out=("z", "D")), {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip, case):
    inputs, options = CASES[case]
    text = compile_for(chip, gradient("pallas_tpu", **options), inputs).as_text()
    assert text.count("tpu_custom_call") == 2  # one kernel forward, one backward


def test_resets_and_remat_compile():
    inputs = shapes(2, 256, 256, 16)

    def loss(inputs, resets):
        run = jax.checkpoint(forward("pallas_tpu", resets=resets > 0))
        return jnp.sum(run(inputs)[0].astype(jnp.float32) ** 2)

    compile_for("v5e", jax.grad(loss), inputs, jax.ShapeDtypeStruct((2, 256), jnp.int32))


@pytest.mark.slow
def test_memory():
    """No state per step in HBM: the XLA form needs many times an input beyond inputs and results.

    The kernel's gradient needs the output, its cotangent and the boundary states, not much else.
    """
    inputs = shapes(2, 512, 512, 16)
    extra = {}
    for name in ("pallas_tpu", "xla"):
        report = memory_report(compile_for("v5e", gradient(name), inputs))
        extra[name] = report["peak"] - report["arguments"] - report["outputs"]
    one_input = 2 * 2 * 512 * 512
    assert extra["pallas_tpu"] < 6 * one_input
    assert 5 * extra["pallas_tpu"] < extra["xla"]
