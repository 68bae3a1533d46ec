"""FLOPs are counted from the traced function, loops and mapped axes included."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, PartitionSpec

from lintime.train.flops import count_flops, mfu, peak_flops

X = jax.ShapeDtypeStruct((8, 8), jnp.float32)
SQUARE = 2 * 8**3


def square(x):
    return x @ x


def test_matmul_and_batched_einsum():
    a, b = jnp.zeros((4, 3, 5)), jnp.zeros((4, 5, 7))
    assert count_flops(lambda a, b: a @ b, a, b) == 2 * 4 * 3 * 5 * 7
    q, k = jnp.zeros((2, 5, 3, 4)), jnp.zeros((2, 7, 3, 4))
    scores = count_flops(lambda q, k: jnp.einsum("bthd,bshd->bhts", q, k), q, k)
    assert scores == 2 * (2 * 3) * 5 * 7 * 4
    assert count_flops(lambda a: jnp.tanh(a) + 1, a) == 0


def test_convolution_counts_kernel_and_groups():
    x, kernel = jnp.zeros((2, 16, 6)), jnp.zeros((3, 6, 10))

    def conv(x, kernel, groups=1):
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )  # fmt: skip

    assert count_flops(conv, x, kernel) == 2 * (2 * 16 * 10) * (3 * 6)
    depthwise = count_flops(lambda x, k: conv(x, k, 6), x, jnp.zeros((3, 1, 6)))
    assert depthwise == 2 * (2 * 16 * 6) * 3


def test_control_flow():
    def scan(x):
        return jax.lax.scan(lambda c, _: (square(c), None), x, None, length=5)[0]

    def cond(x):
        return jax.lax.cond(x[0, 0] > 0, lambda a: square(square(a)), square, x)

    def loop(x):
        return jax.lax.while_loop(lambda a: a[0, 0] < 3, square, x)

    assert count_flops(scan, X) == 5 * SQUARE
    assert count_flops(lambda x: scan(scan(x)), X) == 10 * SQUARE
    assert count_flops(cond, X) == 2 * SQUARE
    assert count_flops(loop, X) == SQUARE


def test_wrapped_functions_count_once():
    @jax.custom_vjp
    def custom(x):
        return square(x)

    custom.defvjp(lambda x: (square(x), x), lambda x, g: (g @ x + x @ g,))
    for wrapped in (jax.jit(square), jax.checkpoint(square), custom, jax.jit(jax.jit(custom))):
        assert count_flops(wrapped, X) == SQUARE
    assert count_flops(jax.vmap(custom), jnp.zeros((3, 8, 8))) == 3 * SQUARE


def test_training_is_three_times_forward_and_recomputation_shows_only_in_the_trace():
    w, x = jnp.zeros((8, 8)), jnp.zeros((4, 8))

    def loss(w, x, wrap=lambda f: f):
        for _ in range(2):  # the outer gradient with respect to x is needed but for the first
            x = wrap(lambda w, x: jnp.tanh(x @ w))(w, x)
        return x.sum()

    forward = count_flops(loss, w, x)
    assert forward == 2 * 2 * 4 * 8 * 8
    both = jax.grad(loss, argnums=(0, 1))
    assert count_flops(both, w, x) == 3 * forward
    rematted = jax.grad(lambda w, x: loss(w, x, jax.checkpoint), argnums=(0, 1))
    assert count_flops(rematted, w, x) > 3 * forward


def test_shard_map_counts_all_devices():
    devices = jax.devices()
    n = 2 if len(devices) >= 2 else 1
    mesh = Mesh(devices[:n], ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    mapped = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()),
                           out_specs=spec)  # fmt: skip
    x, w = jnp.zeros((4 * n, 8)), jnp.zeros((8, 8))
    assert count_flops(mapped, x, w) == count_flops(jnp.matmul, x, w) == 2 * 4 * n * 8 * 8


def test_pallas_call_counts_its_declared_cost_else_body_times_grid():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] @ x_ref[...]

    def call(x, **kw):
        return pl.pallas_call(
            kernel, out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32), interpret=True, **kw
        )(x)

    cost = pl.CostEstimate(flops=123, bytes_accessed=0, transcendentals=0)
    assert count_flops(lambda x: call(x, cost_estimate=cost), X) == 123
    assert count_flops(jax.vmap(lambda x: call(x, cost_estimate=cost)), jnp.zeros((3, 8, 8))) == 369
    assert count_flops(lambda x: call(x, grid=(4,)), X) == 4 * SQUARE


def test_traced_jaxpr_open_or_closed():
    from lintime.train.flops import jaxpr_flops

    jaxpr = jax.make_jaxpr(square)(X)
    assert jaxpr_flops(jaxpr) == jaxpr_flops(getattr(jaxpr, "jaxpr", jaxpr)) == SQUARE
    assert jaxpr_flops(jax.jit(square).trace(X).jaxpr) == SQUARE


@pytest.mark.parametrize(
    "platform, kind, peak",
    [
        ("gpu", "NVIDIA H100 80GB HBM3", 989e12),
        ("gpu", "NVIDIA H100 PCIe", 756e12),
        ("cuda", "NVIDIA H200", 989e12),
        ("gpu", "NVIDIA A100-SXM4-80GB", 312e12),
        ("gpu", "NVIDIA B200", 2250e12),
        ("gpu", "NVIDIA L4", 121e12),
        ("gpu", "Tesla T4", None),
        ("tpu", "TPU v4", 275e12),
        ("tpu", "TPU v5 lite", 197e12),
        ("tpu", "TPU v5p", 459e12),
        ("tpu", "TPU v5", 459e12),
        ("tpu", "TPU v6 lite", 918e12),
        ("tpu", "TPU7x", 1153.5e12),
        ("tpu", "TPU v3", 61.5e12),
        ("cpu", "cpu", None),
    ],
)
def test_peaks(platform, kind, peak):
    assert peak_flops(types.SimpleNamespace(platform=platform, device_kind=kind)) == peak


def test_mfu():
    h100 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    assert mfu(989e12, 1.0, [h100, h100]) == pytest.approx(0.5)
    assert mfu(1e12, 1.0, jax.devices("cpu")) is None
