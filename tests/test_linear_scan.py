"""Linear scan: every implementation against the float64 definition, both directions, in pairs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from lintime.kernels_pallas import dispatch
from lintime.kernels_pallas.compat import auto_mesh, enable_x64
from lintime.kernels_pallas.linear_scan import linear_scan, pallas_gpu, pallas_tpu
from lintime.kernels_pallas.linear_scan.sharded import linear_scan_sharded
from lintime.kernels_pallas.time_axis import spread

from .aot import lower_for_cuda
from .kernel_base import (
    Spec,
    assert_close,
    check_padding,
    check_reference,
    check_remat,
    check_vmap,
    kernel_tests,
    to_numpy,
)

B, D = 2, 3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks that a few steps fill and leave, also within the interpreters."""
    monkeypatch.setattr(pallas_tpu, "BLOCK_T", 16)
    monkeypatch.setattr(pallas_tpu, "BLOCK_D", 128)
    monkeypatch.setattr(pallas_gpu, "TILE_BYTES", 4096)


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
GPU = {"pallas_gpu": {"implementation": "pallas_gpu"}}
REVERSE = {"op": turned(linear_scan, "a", "x", "resets")}
PAIRS_REVERSE = PAIRS | {"op": turned(on_pairs, *PAIRS["batch_axis"])}
# What does not depend on the direction, nor on there being pairs, is checked on the real scan.
ONCE = ("vmap", "remat", "shard_map", "state", "no_state", "bfloat16", "prefix", "split")
# On a GPU its kernels run as they are; on a CPU in an interpreter that older jax does not have.
needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams") and jax.config.jax_platforms == "cpu",
    reason="this jax has no interpreter for Mosaic GPU kernels",
)

test_xla = kernel_tests(spec(XLA))
test_xla_pairs = kernel_tests(spec(XLA, **PAIRS, skip=(*ONCE, "reference-T3", "reference-T4")))
test_xla_reverse = kernel_tests(spec(XLA, **REVERSE, skip=(*ONCE, "reference-T3", "reference-T4")))
# The interpreters go neither through vmap nor remat (TPU), remat nor shard_map (GPU): see below.
# They are slow, too: "split" implies "prefix", and how states begin is not up to the kernels.
test_tpu = kernel_tests(
    spec(
        TPU,
        block=8,
        skip=("vmap", "remat", "prefix", "state", "no_state", "reference-T7", "reference-T8"),
    )
)
test_tpu_pairs_reverse = pytest.mark.slow(
    kernel_tests(spec(TPU, block=8, **PAIRS_REVERSE, skip=ONCE))
)
test_gpu = needs_gpu_interpreter(kernel_tests(spec(GPU, block=8, skip=("remat", "shard_map"))))


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_vmap, check_remat])
def test_tpu_kernel_under_vmap_and_remat(check, monkeypatch):
    """By Pallas' plain interpreter, which knows nothing of TPUs but goes through both."""
    monkeypatch.setattr(dispatch, "interpret", lambda platform: True)
    check(spec(TPU, block=8), "pallas_tpu")


@needs_gpu_interpreter
@pytest.mark.parametrize(
    "changes",
    [REVERSE, *(pytest.param(c, marks=pytest.mark.slow) for c in ({}, PAIRS, PAIRS_REVERSE))],
)
def test_gpu_kernel_in_chunks(changes, monkeypatch):
    """Time cut into chunks that are joined again, forwards and backwards; a last one cut short.

    The interpreter looks for races between the threads and the copy engine.
    """
    if dispatch.interpret("gpu"):
        watch = plgpu.InterpretGPUParams(detect_races=True)
        monkeypatch.setattr(dispatch, "interpret", lambda platform: watch)
    monkeypatch.setattr(pallas_gpu, "MIN_TILES", 1)
    monkeypatch.setattr(pallas_gpu, "PROGRAMS", 4)
    of_pairs = "a_re" in changes.get("time_axis", ())
    wide = lambda *args: (make_pairs if of_pairs else make_inputs)(*args, width=130)
    chunked = spec(GPU, block=8, **{**changes, "make": wide})
    check_reference(chunked, "pallas_gpu", 37)
    check_padding(chunked, "pallas_gpu")


def test_gpu_kernel_chooses_chunks():
    """Enough rows and channels: one pass. Too few: at least 264 programs, unless T is too short."""
    assert pallas_gpu.chunk_tiles(programs=128, tiles=256) == 256
    assert 8 * -(-4096 // pallas_gpu.chunk_tiles(programs=8, tiles=4096)) >= 264
    assert pallas_gpu.chunk_tiles(programs=1, tiles=15) == 15
    assert pallas_gpu.chunk_tiles(programs=1, tiles=64) == pallas_gpu.MIN_TILES


def gpu_loss(*args, reverse=False):
    h, last = linear_scan(*args[:2], state=args[2], reverse=reverse, implementation="pallas_gpu")
    return sum(jnp.sum(p.astype(jnp.float32) ** 2) for p in jax.tree.leaves((h, last)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "shape, paired, reverse",
    [((4, 128, 4096), False, False), ((1, 4096, 300), True, True), ((2, 5, 3), False, True)],
)
def test_gpu_kernel_lowers_for_cuda(shape, paired, reverse, dtype):
    """With gradients: one pass, chunks with ragged ends, and less than a tile."""
    one = lambda z: (z, z) if paired else z
    x = one(jax.ShapeDtypeStruct(shape, dtype))
    state = one(jax.ShapeDtypeStruct((shape[0], shape[2]), jnp.float32))
    loss = functools.partial(gpu_loss, reverse=reverse)
    text = lower_for_cuda(jax.value_and_grad(loss, argnums=(0, 1, 2)), x, x, state)
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("how", ["vmap", "remat", "rows", "time"])
def test_gpu_kernel_lowers_under_transformations(how):
    """vmap, jax.checkpoint, and shard_map over rows or time, with gradients."""
    x = jax.ShapeDtypeStruct((2, 64, 256), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((2, 256), jnp.float32)
    args, op = (x, x, state), gpu_loss
    if how == "vmap":
        args = tuple(jax.ShapeDtypeStruct((3, *z.shape), z.dtype) for z in args)
        op = lambda *z: jnp.sum(jax.vmap(gpu_loss)(*z))
    elif how == "remat":
        op = jax.checkpoint(gpu_loss)
    elif how == "rows":
        rows = jax.shard_map(
            lambda *z: gpu_loss(*z)[None], in_specs=P("data"), out_specs=P("data"), check_vma=True
        )
        op = lambda *z: jnp.sum(rows(*z))
    else:
        cut = P(None, "data")
        parts = jax.shard_map(
            lambda a, x, s: linear_scan_sharded(
                a, x, state=s, axis_name="data", implementation="pallas_gpu"
            ),
            in_specs=(cut, cut, P()), out_specs=(cut, P()), check_vma=True,
        )  # fmt: skip
        op = lambda *z: sum(jnp.sum(p.astype(jnp.float32)) for p in parts(*z))
    assert "mosaic_gpu" in lower_for_cuda(jax.grad(op, argnums=(0, 1, 2)), *args)


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
    run = lambda a: linear_scan(a, x, state=jnp.ones((1, 1)))
    h, last = jax.jit(run)(a)
    assert h.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    np.testing.assert_allclose(last, 0.99**400, rtol=1e-4)
    grad = jax.eval_shape(lambda a: jax.vjp(run, a)[1](run(a))[0], a)
    assert grad.dtype == jnp.float32


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
@pytest.mark.parametrize(
    "shards, paired, implementation",
    [
        (8, False, None),
        pytest.param(1, False, None, marks=pytest.mark.slow),
        pytest.param(2, True, None, marks=pytest.mark.slow),
        pytest.param(4, False, None, marks=pytest.mark.slow),
        pytest.param(2, False, "pallas_tpu", marks=pytest.mark.slow),
    ],
)
def test_sharded_time_equals_one_device(shards, paired, implementation, reverse):
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
            a, x, state=s, resets=r, axis_name="time", implementation=implementation, **options
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
