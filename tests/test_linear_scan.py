"""Linear scan: every implementation against the float64 definition, both directions, in pairs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lintime.kernels_pallas import dispatch
from lintime.kernels_pallas.compat import auto_mesh, enable_x64
from lintime.kernels_pallas.linear_scan import linear_scan, pallas_tpu
from lintime.kernels_pallas.linear_scan.sharded import linear_scan_sharded
from lintime.kernels_pallas.time_axis import spread

from .kernel_base import Spec, assert_close, check_remat, check_vmap, kernel_tests, to_numpy

B, D = 2, 3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks that a few steps fill and leave, also within the interpreters."""
    monkeypatch.setattr(pallas_tpu, "BLOCK_T", 16)
    monkeypatch.setattr(pallas_tpu, "BLOCK_D", 128)


def make_inputs(rng, length, dtype, width=D):
    """Decays of both signs and about one; a reset in every fifth place."""
    return {
        "a": rng.uniform(-0.9, 1.05, (B, length, width)).astype(dtype),
        "x": rng.standard_normal((B, length, width)).astype(dtype),
        "resets": rng.random((B, length)) < 0.2,
        "state": np.zeros((B, width), np.float32),
    }


def make_pairs(rng, length, dtype, width=D):
    one, other = (make_inputs(rng, length, dtype, width) for _ in range(2))
    return {
        "a_re": one["a"] * 0.7, "a_im": other["a"] * 0.7, "x_re": one["x"], "x_im": other["x"],
        "resets": one["resets"], "state": (one["state"], other["state"]),
    }  # fmt: skip


def on_pairs(a_re, a_im, x_re, x_im, **rest):
    """The op on pairs; real and imaginary parts of the output side by side."""
    h, state = linear_scan((a_re, a_im), (x_re, x_im), **rest)
    return jnp.concatenate(h, axis=-1), state


def turn(x, lengths):
    """The valid part of every row in reverse order, the padding where it was."""
    t = jnp.arange(x.shape[1])
    index = (
        t[::-1] if lengths is None else jnp.where(t < lengths[:, None], lengths[:, None] - 1 - t, t)
    )
    return jnp.take_along_axis(x, spread(jnp.broadcast_to(index, x.shape[:2]), x), axis=1)


def turned(op, *names):
    """op with reverse=True on turned inputs, its output turned back: the forward op again."""

    def run(*, lengths=None, **inputs):
        inputs = {k: turn(v, lengths) if k in names else v for k, v in inputs.items()}
        out, state = op(**inputs, lengths=lengths, reverse=True)
        return turn(out, lengths), state

    return run


def spec(variants, block=4, **changes):
    real = Spec(
        op=linear_scan,
        make=make_inputs,
        time_axis={"a": 1, "x": 1, "resets": 1},
        batch_axis={"a": 0, "x": 0, "resets": 0},
        grad=("a", "x", "state"),
        variants=variants,
        block=block,
    )
    return dataclasses.replace(real, **changes)


PAIRS = {
    "op": on_pairs,
    "make": make_pairs,
    "time_axis": {"a_re": 1, "a_im": 1, "x_re": 1, "x_im": 1, "resets": 1},
    "batch_axis": {"a_re": 0, "a_im": 0, "x_re": 0, "x_im": 0, "resets": 0},
    "grad": ("a_re", "a_im", "x_re", "x_im", "state"),
}
XLA = {"xla": {"implementation": "xla"}}
TPU = {"pallas_tpu": {"implementation": "pallas_tpu"}}

test_real = kernel_tests(spec(XLA))
test_pairs = kernel_tests(spec(XLA, **PAIRS))
test_reverse = kernel_tests(spec(XLA, op=turned(linear_scan, "a", "x", "resets")))
# The TPU interpreter's callbacks go through neither vmap nor remat: see the test below.
test_tpu_real = kernel_tests(spec(TPU, block=8, skip=("vmap", "remat")))


@pytest.mark.parametrize("check", [check_vmap, check_remat])
def test_tpu_kernel_under_vmap_and_remat(check, monkeypatch):
    """By Pallas' plain interpreter, which knows nothing of TPUs but goes through both."""
    monkeypatch.setattr(dispatch, "interpret", lambda platform: True)
    check(spec(TPU, block=8), "pallas_tpu")


def loop(a, x, state, resets, lengths, reverse):
    """The definition as a loop over steps, in numpy."""
    h, state = np.zeros_like(x), state.copy()
    for b in range(len(x)):
        steps = range(lengths[b])
        for t in reversed(steps) if reverse else steps:
            state[b] = (0 if resets[b, t] else a[b, t] * state[b]) + x[b, t]
            h[b, t] = state[b]
    return h, state


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_equals_the_definition(implementation, reverse):
    """Complex numbers with resets, padding and a state: a loop agrees to 1e-12."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    a, x, state = draw(3, 11, 2) * 0.6, draw(3, 11, 2), draw(3, 2)
    resets, lengths = rng.random((3, 11)) < 0.2, np.array([11, 7, 0], np.int32)
    with enable_x64():
        two = lambda z: (jnp.asarray(z.real), jnp.asarray(z.imag))
        h, last = jax.jit(
            lambda a, x, state: linear_scan(
                a, x, state=state, resets=resets, lengths=lengths, reverse=reverse,
                implementation=implementation,
            )
        )(two(a), two(x), two(state))  # fmt: skip
        h, last = (np.asarray(z[0]) + 1j * np.asarray(z[1]) for z in (h, last))
    want_h, want_last = loop(a, x, state, resets, lengths, reverse)
    np.testing.assert_allclose(h, want_h, atol=1e-12)
    np.testing.assert_allclose(last, want_last, atol=1e-12)


def test_float32_decays_of_bfloat16_inputs():
    """A wide decay stays wide: 0.99 over 400 steps is 0.018, which bfloat16 makes 0.0089."""
    a = jnp.full((1, 400, 1), 0.99, jnp.float32)
    x = jnp.zeros((1, 400, 1), jnp.bfloat16)
    f = lambda a: linear_scan(a, x, state=jnp.ones((1, 1)))
    (h, last), vjp = jax.vjp(f, a)
    assert h.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    np.testing.assert_allclose(last, 0.99**400, rtol=1e-4)
    assert vjp((h, last))[0].dtype == jnp.float32


def test_long_scans_neither_overflow_nor_drift():
    """65,536 steps from a = 1 - 1e-4 to a = 0 and negative: all finite, the last value right."""
    a = jnp.asarray([1 - 1e-4, 0.5, 1e-30, 0.0, -0.99], jnp.float32)
    run = jax.jit(
        lambda a: linear_scan(jnp.broadcast_to(a, (1, 65536, 5)), jnp.ones((1, 65536, 5)))
    )
    h, last = run(a)
    wide = np.asarray(a, np.float64)
    np.testing.assert_allclose(last[0], (1 - wide**65536) / (1 - wide), rtol=1e-4)
    assert np.isfinite(h).all()


def weighted(op, weights):
    """The sum of all that `op` returns, weighted: its gradient is that of every output."""

    def loss(*operands):
        result = op(*operands)
        pairs = zip(jax.tree.leaves(result), jax.tree.leaves(weights), strict=True)
        return sum(jnp.sum(r * w) for r, w in pairs), result

    return loss


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shards, paired", [(1, False), (2, True), (4, False), (8, False)])
def test_sharded_time_equals_one_device(shards, paired, reverse):
    """Values and the gradients of everything, with resets and a state, a shard of one row too."""
    one, other = (make_inputs(np.random.default_rng(i), 8, np.float32) for i in range(2))
    resets = one["resets"]
    pick = lambda name: (one[name], other[name]) if paired else one[name]
    a, x = jax.tree.map(lambda z: z * 0.7, pick("a")), pick("x")
    state = jax.tree.map(lambda z: z[:, 0], x)
    weights = (jax.tree.map(np.cos, x), state)
    options = {"reverse": reverse}
    single = lambda a, x, s: linear_scan(a, x, state=s, resets=resets, **options)
    cut = P(None, "time")

    def spread_out(a, x, s):
        local = lambda a, x, r, s: linear_scan_sharded(
            a, x, state=s, resets=r, axis_name="time", **options
        )
        mesh = auto_mesh((shards,), ("time",))
        specs = {"in_specs": (cut, cut, cut, P()), "out_specs": (cut, P())}
        return jax.shard_map(local, mesh=mesh, check_vma=True, **specs)(a, x, resets, s)

    run = lambda op: to_numpy(
        jax.jit(jax.grad(weighted(op, weights), argnums=(0, 1, 2), has_aux=True))(a, x, state)
    )
    assert_close(run(spread_out), run(single), 1e-5, f"{shards} shards ")


def test_sharded_time_beside_sharded_rows():
    """Rows over one axis, time over another, no state: what begins inside varies as it must."""
    inputs = make_inputs(np.random.default_rng(0), 8, np.float32)
    mesh = auto_mesh((2, 4), ("data", "time"))
    specs = {"in_specs": P("data", "time"), "out_specs": (P("data", "time"), P("data"))}
    local = lambda a, x: linear_scan_sharded(a, x, axis_name="time")
    f = jax.shard_map(local, mesh=mesh, check_vma=True, **specs)
    got = jax.jit(f)(inputs["a"], inputs["x"])
    want = linear_scan(inputs["a"], inputs["x"])
    assert_close(to_numpy(got), to_numpy(want), 1e-5, "")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": np.zeros((B, 4, D), np.float32)}, r"a has shape \(2, 4, 3\), expected \(2, 5, 3\)"),
        ({"state": np.zeros((B, 4), np.float32)}, "state has shape"),
        ({"resets": np.zeros((5,), bool)}, "resets has shape"),
        ({"lengths": np.zeros((3,), np.int32)}, "lengths has shape"),
        ({"state": (np.zeros((B, D)), np.zeros((B, D)))}, "state is a tuple, expected an array"),
        ({"x": np.zeros((B, 5, D), np.int32)}, "x is int32"),
        ({"implementation": "cuda"}, "'cuda' does not exist"),
    ],
)
def test_mistakes_are_named(change, message):
    inputs = make_inputs(np.random.default_rng(0), 5, np.float32)
    with pytest.raises(ValueError, match=message):
        linear_scan(**{**inputs, **change})
