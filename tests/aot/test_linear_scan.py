"""The linear scan's kernels compile for TPUs, need no more memory than promised, lower for GPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lintime.kernels_pallas.linear_scan import linear_scan
from lintime.kernels_pallas.linear_scan.sharded import linear_scan_sharded
from tests.aot import CHIPS, MARKS, compile_for, memory_report

pytestmark = MARKS


def operands(t_len=1000, width=768, dtype=jnp.float32, paired=False, batch=2):
    """Shapes of a, x and the state; neither T nor D fills its blocks."""
    x = jax.ShapeDtypeStruct((batch, t_len, width), dtype)
    state = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    one = lambda z: (z, z) if paired else z
    return one(x), one(x), one(state)


def training(implementation="pallas_tpu", reverse=False):
    """A function of a, x, state: both outputs and every gradient."""

    def loss(a, x, state):
        result = linear_scan(a, x, state=state, reverse=reverse, implementation=implementation)
        return sum(jnp.sum(part.astype(jnp.float32) ** 2) for part in jax.tree.leaves(result))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("paired", [False, True])
def test_compiles_with_gradients(chip, reverse, paired):
    text = compile_for(chip, training(reverse=reverse), *operands(paired=paired)).as_text()
    assert text.count("tpu_custom_call") >= 2


@pytest.mark.slow
@pytest.mark.parametrize("t_len, width", [(1, 1), (7, 128), (256, 100), (300, 1280)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_compiles_at_odd_sizes(t_len, width, dtype):
    compile_for("v5e", training(), *operands(t_len, width, dtype))


def test_float32_decays_of_bfloat16_inputs_vmap_and_remat():
    a, _, state = operands()
    x = jax.ShapeDtypeStruct(a.shape, jnp.bfloat16)
    compile_for("v5e", training(), a, x, state)
    compile_for("v5e", jax.checkpoint(training()), a, x, state)
    many = lambda z: jax.ShapeDtypeStruct((3, *z.shape), z.dtype)
    compile_for("v5e", jax.vmap(training()), *(many(z) for z in (a, x, state)))


@pytest.mark.slow
def test_needs_less_memory_than_associative_scan():
    """Temporaries of a training step: nothing beside h and the cotangent, 2 arrays of 64 MiB."""
    args = operands(2048, 2048, batch=4)
    size = 4 * 2048 * 2048 * 4
    fused = memory_report(compile_for("v5e", training(), *args))["temporaries"]
    plain = memory_report(compile_for("v5e", training("xla"), *args))["temporaries"]
    assert fused < 2.1 * size
    assert fused < 0.7 * plain, (fused, plain)


def compile_split(op, args, in_specs, out_specs, axis):
    """Text of the program for the gradient of all inputs of `op` under shard_map on four chips."""

    def loss(*args):
        split = jax.shard_map(op, check_vma=True, in_specs=in_specs, out_specs=out_specs)
        return sum(jnp.sum(part**2) for part in split(*args))

    grad = jax.grad(loss, argnums=(0, 1, 2))
    options = {"mesh_shape": {axis: 4}, "in_shardings": in_specs}
    return compile_for("v5e:2x2", grad, *args, **options).as_text()


def test_rows_split_over_devices():
    rows = P("data")
    op = lambda a, x, s: linear_scan(a, x, state=s, implementation="pallas_tpu")
    text = compile_split(op, operands(batch=4), (rows, rows, rows), rows, "data")
    assert "tpu_custom_call" in text and "all-gather" not in text


def test_time_split_over_devices():
    """Summaries are gathered once forwards and once backwards; nothing of size T moves."""
    cut = P(None, "time")
    op = lambda a, x, s: linear_scan_sharded(
        a, x, state=s, axis_name="time", implementation="pallas_tpu"
    )
    args = operands(4096, batch=1)
    text = compile_split(op, args, (cut, cut, P()), (cut, P()), "time")
    gathered = [line for line in text.splitlines() if " all-gather" in line and "=" in line]
    assert gathered and not any("1024,768" in line for line in gathered), gathered
    assert "all-to-all" not in text and "collective-permute" not in text
