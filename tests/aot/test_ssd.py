"""The TPU kernels of SSD compile for every chip, and hold less in HBM than XLA's program."""

import jax
import jax.numpy as jnp
import pytest

from lintime.kernels_pallas.ssd import ssd

from . import CHIPS, MARKS, compile_for, memory_report

pytestmark = MARKS


def operands(batch, length, heads, p, n, groups=1, dtype=jnp.bfloat16, **more):
    make = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    return {
        "x": make(batch, length, heads, p),
        "dt": make(batch, length, heads),
        "A": make(heads, dtype=jnp.float32),
        "B": make(batch, length, groups, n),
        "C": make(batch, length, groups, n),
        "D": make(heads, dtype=jnp.float32),
        "dt_bias": make(heads, dtype=jnp.float32),
        **{k: make(*shape, dtype=dtype) for k, (dtype, *shape) in more.items()},
    }


def gradient(implementation, chunk):
    """All gradients of the sum of outputs and state."""

    def run(inputs):
        fixed = {k: v for k, v in inputs.items() if v.dtype == bool}

        def loss(moving):
            y, state = ssd(
                **moving, **fixed, dt_softplus=True, chunk=chunk, implementation=implementation
            )
            return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

        return jax.grad(loss)({k: v for k, v in inputs.items() if k not in fixed})

    return run


@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip):
    """Typical sizes, forward and gradient; resets, a state, float32 and several groups too."""
    plain = operands(2, 512, 16, 64, 128)
    stacked = jax.tree.map(lambda v: jax.ShapeDtypeStruct((2, *v.shape), v.dtype), plain)
    run = lambda inputs: ssd(**inputs, dt_softplus=True, implementation="pallas_tpu")
    compile_for(chip, run, plain)
    compile_for(chip, jax.vmap(gradient("pallas_tpu", 128)), stacked)
    compile_for(chip, gradient("pallas_tpu", 256), operands(2, 256, 48, 64, 128))
    state = (jnp.float32, 2, 8, 64, 64)
    packed = operands(2, 300, 8, 64, 64, groups=2, state=state, resets=(bool, 2, 300))
    compile_for(chip, gradient("pallas_tpu", 128), packed)
    compile_for(chip, gradient("pallas_tpu", 128), operands(1, 130, 6, 32, 16, dtype=jnp.float32))


@pytest.mark.slow
def test_holds_less_than_xla():
    """Scores never reach HBM: a small part of the temporaries of XLA's form."""
    inputs = operands(2, 2048, 64, 64, 128)
    temporaries = {
        name: memory_report(compile_for("v5e", gradient(name, 128), inputs))["temporaries"]
        for name in ("xla", "pallas_tpu")
    }
    assert temporaries["pallas_tpu"] < 0.5 * temporaries["xla"], temporaries
