"""The convolution's kernels compile for TPUs and need no more memory than promised."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lintime.kernels_pallas.causal_conv1d import causal_conv1d
from lintime.kernels_pallas.causal_conv1d.sharded import causal_conv1d_sharded
from tests.aot import CHIPS, MARKS, compile_for, memory_report

pytestmark = MARKS


def operands(t_len=1000, channels=768, dtype=jnp.float32, width=4, batch=2):
    """Shapes of x, weight, bias, state and resets; neither T nor C fills its blocks."""
    shape = jax.ShapeDtypeStruct
    return (
        shape((batch, t_len, channels), dtype), shape((width, channels), jnp.float32),
        shape((channels,), jnp.float32), shape((batch, width - 1, channels), dtype),
        shape((batch, t_len), bool),
    )  # fmt: skip


def training(implementation="pallas_tpu", **options):
    """A function of the operands: both outputs and every gradient."""

    def loss(x, weight, bias, state, resets=None):
        result = causal_conv1d(
            x, weight, bias, state=state, resets=resets, activation="silu",
            implementation=implementation, **options,
        )  # fmt: skip
        return sum(jnp.sum(part.astype(jnp.float32) ** 2) for part in result)

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("resets", [False, True])
def test_compiles_with_gradients(chip, dtype, resets):
    args = operands(dtype=dtype)
    text = compile_for(chip, training(), *args[: 4 + resets]).as_text()
    assert text.count("tpu_custom_call") >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "t_len, channels, width",
    [(1, 1, 4), (7, 128, 1), (256, 100, 2), (300, 1280, 3), (600, 128, 20)],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_compiles_at_odd_sizes(t_len, channels, width, dtype):
    compile_for("v5e", training(), *operands(t_len, channels, dtype, width))


@pytest.mark.slow
def test_reverse_and_vmap():
    compile_for("v5e", training(reverse=True), *operands())
    many = [jax.ShapeDtypeStruct((3, *z.shape), z.dtype) for z in operands()]
    compile_for("v5e", jax.vmap(training()), *many)


@pytest.mark.slow
def test_needs_less_memory_than_xla():
    """Temporaries of a training step in bfloat16: y and its cotangent, nothing in float32."""
    args = operands(2048, 2048, jnp.bfloat16, batch=4)[:4]
    size = 4 * 2048 * 2048 * 2
    fused = memory_report(compile_for("v5e", training(), *args))["temporaries"]
    plain = memory_report(compile_for("v5e", training("xla"), *args))["temporaries"]
    assert fused < 2.1 * size
    assert fused < plain, (fused, plain)


def compile_split(op, args, in_specs, out_specs, axis):
    """Text of the program for the gradient of x, weight and bias under shard_map on four chips."""

    def loss(*args):
        split = jax.shard_map(op, check_vma=True, in_specs=in_specs, out_specs=out_specs)
        return sum(jnp.sum(part**2) for part in split(*args))

    grad = jax.grad(loss, argnums=(0, 1, 2))
    options = {"mesh_shape": {axis: 4}, "in_shardings": in_specs}
    return compile_for("v5e:2x2", grad, *args, **options).as_text()


def test_rows_split_over_devices():
    rows = P("data")
    op = lambda x, w, b, r: causal_conv1d(
        x, w, b, resets=r, activation="silu", implementation="pallas_tpu"
    )
    x, weight, bias, _, resets = operands(batch=4)
    places = (rows, P(), P(), rows)
    text = compile_split(op, (x, weight, bias, resets), places, rows, "data")
    assert "tpu_custom_call" in text and "all-gather" not in text


def test_time_split_over_devices():
    """The halo of three inputs goes to the neighbour, and back as a gradient; nothing larger."""
    cut = P(None, "time")
    op = lambda x, w, b: causal_conv1d_sharded(
        x, w, b, axis_name="time", activation="silu", implementation="pallas_tpu"
    )
    text = compile_split(op, operands(4096)[:3], (cut, P(), P()), (cut, P()), "time")
    assert "collective-permute" in text and "all-gather" not in text and "all-to-all" not in text
