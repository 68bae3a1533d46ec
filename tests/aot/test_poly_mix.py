"""The polynomial mixer's kernels compile for TPUs and keep nothing of size [B, N, E]."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lintime.kernels_pallas.poly_mix import PolyState, poly_mix
from lintime.kernels_pallas.poly_mix.sharded import poly_mix_sharded
from tests.aot import CHIPS, MARKS, compile_for, memory_report

pytestmark = MARKS
FORMS = {"mean": {}, "causal": {"causal": True}, "frames": {"frames": (200,) * 5}}


def operands(n=1000, width=768, dtype=jnp.bfloat16, degree=3, batch=2):
    """Shapes of h, coeff, weights and the state; neither N nor E fills its blocks."""
    shape = jax.ShapeDtypeStruct
    return (
        shape((batch, n, width), dtype), shape((width, degree), jnp.float32),
        shape((batch, n), jnp.float32),
        PolyState(shape((batch, width), jnp.float32), shape((batch,), jnp.float32)),
    )  # fmt: skip


def training(implementation="pallas_tpu", **form):
    """A function of h, coeff and maybe weights and state: outputs and the gradients."""

    def loss(h, coeff, weights=None, state=None):
        result = poly_mix(
            h, coeff, weights=weights, state=state, implementation=implementation, **form
        )
        return sum(jnp.sum(z.astype(jnp.float32) ** 2) for z in jax.tree.leaves(result))

    return jax.value_and_grad(loss, argnums=(0, 1))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("plain", [False, True])
def test_compiles_with_gradients(chip, form, plain):
    """From a state and with weights, or without either."""
    args = operands(dtype=jnp.float32 if plain else jnp.bfloat16)
    text = compile_for(chip, training(**FORMS[form]), *args[: 2 if plain else 4]).as_text()
    assert text.count("tpu_custom_call") >= 2


@pytest.mark.slow
@pytest.mark.parametrize("n, width", [(1, 1), (7, 128), (512, 100), (600, 1280)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_compiles_at_odd_sizes(n, width, dtype, causal):
    compile_for("v5e", training(causal=causal), *operands(n, width, dtype, degree=1))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_high_degrees_vmap_and_remat(form):
    args = operands(degree=8, width=2048)
    compile_for("v5e", training(**FORMS[form]), *operands(degree=16, width=2048))
    compile_for("v5e", jax.checkpoint(training(**FORMS[form])), *args)
    many = jax.tree.map(lambda z: jax.ShapeDtypeStruct((3, *z.shape), z.dtype), args)
    compile_for("v5e", jax.vmap(training(**FORMS[form])), *many)


def peak(implementation, form):
    """Of a training step in bfloat16, in units of h."""
    args = operands(2048, 2048, batch=4)[:3]
    report = memory_report(compile_for("v5e", training(implementation, **form), *args))
    return report["peak"] / (4 * 2048 * 2048 * 2)


@pytest.mark.parametrize(
    "form, most", [({}, 3), ({"frames": (256,) * 8}, 3), ({"causal": True}, 5)]
)
def test_keeps_nothing_in_float32(form, most):
    """h and dh (which counts twice), and causal the rows and their cotangent; [B, N, E] in float32
    would be two more."""
    assert peak("pallas_tpu", form) < most + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("form", [{"frames": (256,) * 8}, {"causal": True}])
def test_needs_less_memory_than_xla(form):
    assert peak("pallas_tpu", form) < 0.9 * peak("xla", form)


def compile_split(op, args, in_specs, out_specs, axis):
    """Text of the program for the gradient of h and coeff under shard_map on four chips."""

    def loss(*args):
        split = jax.shard_map(op, check_vma=True, in_specs=in_specs, out_specs=out_specs)
        return sum(jnp.sum(z.astype(jnp.float32) ** 2) for z in jax.tree.leaves(split(*args)))

    options = {"mesh_shape": {axis: 4}, "in_shardings": in_specs}
    return compile_for("v5e:2x2", jax.grad(loss, (0, 1)), *args, **options).as_text()


@pytest.mark.parametrize("form", [{}, {"causal": True}])
def test_rows_split_over_devices(form):
    rows, kernel = P("data"), {"implementation": "pallas_tpu"}
    op = lambda h, c, w: poly_mix(h, c, weights=w, **kernel, **form)
    text = compile_split(op, operands(batch=4)[:3], (rows, P(), rows), rows, "data")
    assert "tpu_custom_call" in text and "all-gather" not in text


@pytest.mark.parametrize("form", [{}, {"causal": True}, {"frames": (256,) * 4}])
def test_tokens_split_over_devices(form):
    """States are exchanged, nothing of size N."""
    cut, kernel = P(None, "time"), {"implementation": "pallas_tpu"}
    op = lambda h, c, w: poly_mix_sharded(h, c, weights=w, axis_name="time", **kernel, **form)
    args = operands(4096)[:3]
    text = compile_split(op, args, (cut, P(), cut), (cut if form else P(), P()), "time")
    moved = [line for line in text.splitlines() if " all-gather" in line or " all-reduce" in line]
    assert moved and not any("1024,768" in line for line in moved), moved
    assert "tpu_custom_call" in text and "all-to-all" not in text
