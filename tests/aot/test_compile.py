"""The ahead-of-time helper itself: chips, meshes, donation, out-of-memory verdicts."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from tests.aot import CHIPS, MARKS, compile_for, memory_report, topology_devices, topology_mesh

pytestmark = MARKS


@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_each_chip(chip):
    x = jnp.ones((256, 256), jnp.bfloat16)
    compiled = compile_for(chip, lambda x: jnp.tanh(x @ x), x)
    report = memory_report(compiled)
    assert report["arguments"] == 2 * 256 * 256 and report["outputs"] == 2 * 256 * 256
    assert report["peak"] >= report["arguments"]


def test_shardings_and_donation():
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    x = jax.ShapeDtypeStruct((512, 1024), jnp.float32)

    def step(w, x):
        y = jax.lax.with_sharding_constraint(x @ w, P("data"))
        return w - jnp.mean(y)

    specs = {"in_shardings": (P("data"), P("data")), "out_shardings": P("data")}
    compiled = compile_for("v5e:2x2", step, w, x, donate_argnums=0, **specs)
    report = memory_report(compiled)
    assert report["arguments"] == 4 * (1024 * 1024 + 512 * 1024) // 4  # a quarter on each device
    assert report["alias"] == 4 * 1024 * 1024 // 4
    assert "all-gather" in compiled.as_text()


def test_meshes_of_one_and_several_slices():
    mesh = topology_mesh("v5e:4x4*2", {"data": 8, "tensor": 4})
    assert dict(mesh.shape) == {"data": 8, "tensor": 4}
    assert {d.slice_index for d in mesh.devices[:4].flat} == {0}
    assert len(topology_devices("v4:2x2x1")) == 4


def test_a_program_too_large_for_the_chip_is_refused():
    x = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)  # 16 GiB
    with pytest.raises(Exception, match="(?i)exceed.*hbm"):
        compile_for("v5e", lambda x: x + 1, x)
