"""What compat and dispatch promise, on whichever jax is installed."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec as P

from lintime.kernels_pallas import compat, dispatch
from lintime.train.bench import ssm as bench_ssm

from .aot import cuda_device


def test_auto_mesh_is_auto_and_takes_some_devices():
    mesh = compat.auto_mesh((2, 2), ("data", "fsdp"))
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2}
    given = compat.auto_mesh((2,), ("data",), jax.devices()[2:4])
    assert [d.id for d in given.devices] == [2, 3]


@pytest.mark.parametrize(
    ("shape", "names", "count", "message"),
    [
        ((16,), ("data",), None, r"needs 16 devices, found 8"),
        ((2,), ("data",), 3, r"needs 2 devices, 3 were given"),
        ((2, 2), ("data",), None, r"differ in length"),
    ],
)
def test_auto_mesh_refuses(shape, names, count, message):
    devices = None if count is None else jax.devices()[:count]
    with pytest.raises(ValueError, match=message):
        compat.auto_mesh(shape, names, devices)


def test_auto_mesh_refuses_slices_that_do_not_divide_the_first_axis():
    devices = [types.SimpleNamespace(slice_index=i // 2) for i in range(6)]
    with pytest.raises(ValueError, match="3 slices do not divide the first mesh axis data=2"):
        compat.auto_mesh((2, 3), ("data", "tensor"), devices)


@jax.custom_vjp
def _scale(w, x):
    return w * x


def _scale_fwd(w, x):
    return w * x, (w, x)


def _scale_bwd(saved, g):
    w, x = saved
    return jnp.sum(g * x, axis=0), g * w  # the sum over the rows of this device only


_scale.defvjp(_scale_fwd, _scale_bwd)


def test_vary_makes_gradients_of_replicated_weights_right_under_shard_map():
    mesh = compat.auto_mesh((4,), ("data",))
    w, x = jnp.arange(1.0, 5.0), jnp.linspace(-1, 1, 32).reshape(8, 4)

    def sharded(w, x):
        local = lambda w, x: _scale(compat.vary(w, like=x), x)
        specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
        return jax.shard_map(local, mesh=mesh, check_vma=True, **specs)(w, x)

    got = jax.jit(jax.grad(lambda w: jnp.sum(jnp.sin(sharded(w, x)))))(w)
    np.testing.assert_allclose(got, jax.grad(lambda w: jnp.sum(jnp.sin(w * x)))(w), rtol=1e-5)


def test_vary_takes_trees_and_names_and_is_the_identity_outside_shard_map():
    x = jnp.ones(3)
    assert compat.vary(x, like=(x, x)) is x
    seen = []

    def local(tree):
        seen.append(compat.varying_axes(compat.vary(tree, like={"data"})["w"]))
        return jnp.zeros(())

    mesh = compat.auto_mesh((2,), ("data",))
    jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P())({"w": x, "b": x})
    assert seen == [frozenset({"data"})]


def _double(x, interpret):
    def body(x_ref, o_ref):
        o_ref[...] = 2 * x_ref[...]

    out = compat.out_like(x, x.shape, jnp.float32)
    return pl.pallas_call(body, out_shape=out, interpret=interpret)(x)


def test_pallas_kernel_in_tpu_interpreter_under_shard_map_on_all_devices():
    mesh = compat.auto_mesh((8,), ("data",))
    f = lambda x: _double(x, compat.interpret_mode())
    f = jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=True)
    x = jnp.arange(64 * 128, dtype=jnp.float32).reshape(64, 128)
    np.testing.assert_array_equal(jax.jit(f)(x), 2 * x)


def test_interpret_mode_of_unknown_platform():
    with pytest.raises(NotImplementedError, match="no Pallas interpreter for npu"):
        compat.interpret_mode("npu")


def test_gpu_kernel_lowers_for_cuda():
    def body(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2

    def f(x):
        cost = pl.CostEstimate(flops=1, bytes_accessed=1, transcendentals=0)
        out = compat.out_like(x, x.shape, x.dtype)
        return compat.gpu_kernel(body, out_type=out, cost_estimate=cost)(x)

    x = jax.ShapeDtypeStruct((128,), jnp.float32)
    text = jax.jit(f).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_enable_x64():
    with compat.enable_x64():
        assert jnp.zeros(1, float).dtype == jnp.float64
        with compat.enable_x64(False):
            assert jnp.zeros(1, float).dtype == jnp.float32
    assert jnp.zeros(1, float).dtype == jnp.float32


def test_set_mesh():
    with compat.set_mesh(compat.auto_mesh((2,), ("data",))):
        assert jax.sharding.get_abstract_mesh().axis_names == ("data",)
    assert jax.sharding.get_abstract_mesh().empty


def test_jaxpr_eqns_and_all_eqns():
    def f(x):
        y, _ = jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, length=3)
        return jax.jit(jnp.cos)(y)

    for jaxpr in (jax.make_jaxpr(f)(1.0), jax.jit(f).trace(1.0).jaxpr):
        top = [e.primitive.name for e in compat.jaxpr_eqns(jaxpr)]
        assert top[0] == "scan" and "sin" not in top
        assert {"scan", "sin", "cos"} <= {e.primitive.name for e in compat.all_eqns(jaxpr)}


TABLE = {
    "op": {
        "gpu:NVIDIA H[12]00*": ("pallas", "xla", "reference"),
        "tpu:*": ("xla", "pallas", "reference"),
        "*": ("xla", "reference"),
    }
}
EVERYTHING = ("reference", "xla", "pallas")


@pytest.fixture
def kernels_tried(monkeypatch):
    """As on a jax with which the GPU kernels have run."""
    monkeypatch.setattr(compat, "GPU_KERNELS_TRIED", True)


@pytest.mark.parametrize(
    ("device", "default"),
    [
        ("cpu:cpu", "xla"),
        ("gpu:NVIDIA H200", "pallas"),
        ("gpu:NVIDIA A100-SXM4-80GB", "xla"),
        ("tpu:TPU v5 lite", "xla"),
    ],
)
def test_resolve_none_takes_the_first_of_the_row(device, default, kernels_tried):
    assert dispatch.resolve("op", None, EVERYTHING, device=device, table=TABLE) == default
    assert dispatch.resolve("op", None, ("reference",), device=device, table=TABLE) == "reference"


def test_resolve_obeys_explicit_choices():
    for name in EVERYTHING:
        assert dispatch.resolve("op", name, EVERYTHING, device="tpu:TPU v4", table=TABLE) == name


def test_resolve_never_falls_back():
    with pytest.raises(ValueError, match=r"op: .*'pallas' exists, but not .*'cpu:cpu'.*'xla', "):
        dispatch.resolve("op", "pallas", EVERYTHING, device="cpu:cpu", table=TABLE)
    with pytest.raises(ValueError, match="'pallas' does not exist on 'tpu:TPU v4'"):
        dispatch.resolve("op", "pallas", ("xla",), device="tpu:TPU v4", table=TABLE)
    with pytest.raises(ValueError, match="'cuda' does not exist"):
        dispatch.resolve("op", "cuda", EVERYTHING, device="cpu:cpu", table=TABLE)


def test_resolve_minds_the_operands(kernels_tried):
    """None passes over what does not take them; a name is refused, with the reason."""
    resolve = functools.partial(dispatch.resolve, "op", device="gpu:NVIDIA H200", table=TABLE)
    assert resolve(None, EVERYTHING, unable={"pallas": "float64"}) == "xla"
    assert resolve(None, EVERYTHING, unable={"pallas": None}) == "pallas"
    sizes = {"enough": (1, dispatch.FEW_STEPS), "few": (1, 1), "rows": (70_000, 8)}
    like = {k: np.broadcast_to(np.float32(0), (*v, 64)) for k, v in sizes.items()}
    chosen = {k: resolve(None, EVERYTHING, x=v) for k, v in like.items()}
    assert chosen == {"enough": "pallas", "few": "xla", "rows": "xla"}
    assert resolve(None, EVERYTHING, x=like["enough"], channels=1) == "xla"
    assert resolve("pallas", EVERYTHING, x=like["few"], channels=1) == "pallas"
    with pytest.raises(ValueError, match='op: pallas does not take float64; use "xla"'):
        resolve("pallas", EVERYTHING, unable={"pallas": "float64"})


def test_resolve_gives_the_partitioner_no_kernel(kernels_tried):
    """A mesh of several devices splits programs by itself, which it cannot do to a kernel."""
    resolve = lambda: dispatch.resolve(
        "op", None, EVERYTHING, device="gpu:NVIDIA H200", table=TABLE
    )
    one, four = (compat.auto_mesh((n,), ("data",)) for n in (1, 4))
    with compat.set_mesh(one):
        assert resolve() == "pallas"
    with compat.set_mesh(four):
        assert resolve() == "xla"
        chosen = []
        jax.shard_map(
            lambda x: (chosen.append(resolve()), x)[1], in_specs=P("data"), out_specs=P("data")
        )(jnp.zeros(4))
        assert set(chosen) == {"pallas"}


@pytest.mark.parametrize("current", [True, False])
def test_resolve_gives_sharded_types_no_kernel(current, kernels_tried):
    """Arrays of a mesh with explicit axes, even of one device: their types are sharded."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.ones((2, 16, 64)), jax.sharding.NamedSharding(mesh, P("data")))
    resolve = lambda x: dispatch.resolve(
        "op", None, EVERYTHING, device="gpu:NVIDIA H200", table=TABLE, x=x
    )
    chosen = []
    with compat.set_mesh(mesh) if current else contextlib.nullcontext():
        jax.jit(lambda x: (chosen.append(resolve(x)), x)[1])(x)
    assert chosen == ["xla"]
    assert resolve(np.ones((2, 16, 64), np.float32)) == "pallas"


def test_kernels_that_never_ran_are_no_default(monkeypatch):
    monkeypatch.setattr(compat, "GPU_KERNELS_TRIED", False)
    for name, chosen in ((None, "xla"), ("pallas", "pallas")):
        got = dispatch.resolve("op", name, EVERYTHING, device="gpu:NVIDIA H200", table=TABLE)
        assert got == chosen


@pytest.mark.parametrize("op", ["linear_scan", "selective_scan", "ssd"])
def test_kernels_of_hopper_are_for_hopper(op, kernels_tried):
    first = lambda kind: dispatch.resolve(
        op, None, ("xla", "pallas_gpu"), device=f"gpu:NVIDIA {kind}"
    )
    assert {first(k) for k in ("H100 80GB HBM3", "H200", "GH200 480GB")} == {"pallas_gpu"}
    assert {first(k) for k in ("GeForce RTX 4090", "A100-SXM4-80GB", "B200")} == {"xla"}


@pytest.mark.parametrize("op", ["linear_scan", "selective_scan", "ssd", "causal_conv1d"])
def test_gpu_kernels_lower_where_64_bit_types_are_on(op):
    """With the fewest operands: what a kernel makes itself must not become 64 bits wide."""
    shape = dict(bench_ssm.TINY)[op]
    if op == "ssd":
        shape = "B1 L1024 H2 P64 N64"
    case = bench_ssm.Case(op, shape, "float32" if op == "linear_scan" else "bfloat16")
    inputs = jax.eval_shape(lambda: bench_ssm.make_inputs(case))
    inputs = {
        k: v for k, v in inputs.items() if k not in ("D", "z", "bias", "delta_bias", "dt_bias")
    }
    if "A" in inputs:  # as it comes from numpy
        inputs["A"] = jax.ShapeDtypeStruct(inputs["A"].shape, jnp.float64)
    run = bench_ssm.make_op(case, "pallas_gpu")
    loss = lambda inputs: jnp.sum(run(inputs).astype(jnp.float32))
    with compat.enable_x64(), cuda_device():
        text = jax.jit(jax.grad(loss)).trace(inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_every_row_of_the_real_table_ends_in_a_catch_all():
    for op, rows in dispatch.IMPLEMENTATIONS.items():
        assert list(rows)[-1] == "*", op
        assert dispatch.resolve(op, None, EVERYTHING, device="gpu:Something New")


def test_current_device_follows_mesh_and_default_device():
    assert dispatch.current_device() == "cpu:cpu"
    described = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H200", num_cores=None, platform="cuda"
    )
    mesh = jax.sharding.AbstractMesh(
        (2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=described
    )
    with jax.sharding.use_abstract_mesh(mesh):
        assert dispatch.current_device() == "gpu:NVIDIA H200"
    with jax.default_device("cpu"):
        assert dispatch.current_device() == "cpu:cpu"
