"""Causal convolution: every implementation against the float64 definition, and the single step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from lintime.kernels_pallas import compat, dispatch
from lintime.kernels_pallas.causal_conv1d import (
    causal_conv1d,
    causal_conv1d_step,
    pallas_gpu,
    pallas_tpu,
)
from lintime.kernels_pallas.causal_conv1d.sharded import causal_conv1d_sharded
from lintime.kernels_pallas.compat import auto_mesh, enable_x64
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

B, C, W = 2, 3, 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks that a few steps fill and leave, also within the interpreters."""
    monkeypatch.setattr(pallas_tpu, "BLOCK_T", 16)
    monkeypatch.setattr(pallas_tpu, "BLOCK_C", 128)
    monkeypatch.setattr(pallas_gpu, "TILE_BYTES", {"forward": 4096, "backward": 4096})


def make_inputs(rng, length, dtype, channels=C, width=W):
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    return {
        "x": draw(B, length, channels),
        "weight": draw(width, channels),
        "bias": draw(channels),
        "resets": rng.random((B, length)) < 0.2,
        "state": np.zeros((B, width - 1, channels), dtype),
    }


def turn(x, lengths):
    """The valid part of every row in reverse order, the padding where it was."""
    t = jnp.arange(x.shape[1])
    n = x.shape[1] if lengths is None else lengths[:, None]
    index = jnp.broadcast_to(jnp.where(t < n, n - 1 - t, t), x.shape[:2])
    return jnp.take_along_axis(x, spread(index, x), axis=1)


def turned(x, resets, *, lengths=None, **rest):
    """The reverse op on turned inputs, its output turned back: the forward op again."""
    x, resets = turn(x, lengths), turn(resets, lengths)
    y, state = causal_conv1d(x, resets=resets, lengths=lengths, reverse=True, **rest)
    return turn(y, lengths), state


def spec(variants, block=4, **changes):
    forward = Spec(
        op=causal_conv1d,
        make=make_inputs,
        time_axis={"x": 1, "resets": 1},
        batch_axis={"x": 0, "resets": 0},
        grad=("x", "weight", "bias", "state"),
        variants=variants,
        block=block,
        options={"activation": "silu"},
    )
    return dataclasses.replace(forward, **changes)


XLA = {"xla": {"implementation": "xla"}}
TPU = {"pallas_tpu": {"implementation": "pallas_tpu"}}
GPU = {"pallas_gpu": {"implementation": "pallas_gpu"}}
# On a GPU its kernels run as they are; on a CPU in an interpreter that older jax does not have.
needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams") and jax.config.jax_platforms == "cpu",
    reason="this jax has no interpreter for Mosaic GPU kernels",
)

# What does not depend on direction and activation is checked on the forward op with SiLU.
ONCE = ("vmap", "remat", "shard_map", "state", "no_state", "bfloat16", "prefix", "split")

test_forward = kernel_tests(spec(XLA))
test_reverse = kernel_tests(spec(XLA, op=turned, skip=(*ONCE, "reference-T3", "reference-T4")))


def test_gradients_without_activation():
    check_reference(spec(XLA, options={}), "xla", 11)


# The TPU interpreter goes neither through vmap nor remat (see below), and it is slow: "split"
# implies "prefix", and how states begin is not up to the kernel.
test_tpu = kernel_tests(
    spec(
        TPU,
        block=8,
        skip=("vmap", "remat", "prefix", "state", "no_state", "reference-T7", "reference-T8"),
    )
)
# The GPU interpreter goes neither through remat nor shard_map: they are lowered below. It is slow,
# too: "split" implies "prefix" and runs the lengths left out.
test_gpu = needs_gpu_interpreter(
    kernel_tests(
        spec(
            GPU,
            block=8,
            skip=("remat", "shard_map", "state", "prefix", "reference-T7", "reference-T8"),
        )
    )
)


@needs_gpu_interpreter
@pytest.mark.parametrize(
    "width, dtype, op, options",
    [
        (4, "float32", turned, {"activation": "silu"}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (4, "float32", causal_conv1d, {"activation": "silu"}),
                (1, "float32", causal_conv1d, {}),
                (2, "bfloat16", turned, {}),
                (8, "bfloat16", causal_conv1d, {"activation": "silu"}),
            ]
        ),
    ],
)
def test_gpu_kernel_in_chunks(width, dtype, op, options, monkeypatch):
    """Chunks of time that overlap by W-1 steps, two blocks of channels, the last ones cut short.

    The interpreter looks for races between the threads and the copy engine.
    """
    if dispatch.interpret("gpu"):
        watch = plgpu.InterpretGPUParams(detect_races=True)
        monkeypatch.setattr(dispatch, "interpret", lambda platform: watch)
    monkeypatch.setattr(pallas_gpu, "MIN_TILES", 1)
    channels = 130 if dtype == "float32" else 260
    make = lambda rng, length, _: make_inputs(rng, length, jnp.dtype(dtype), channels, width)
    tolerance = {"float32": 1e-5 if dtype == "float32" else 1e-2}
    chunked = spec(GPU, block=8, make=make, op=op, options=options, tolerance=tolerance)
    check_reference(chunked, "pallas_gpu", 45)
    check_padding(chunked, "pallas_gpu")


def test_gpu_kernel_chooses_chunks():
    """As many programs as wanted, unless a chunk would be short; two tiles are the least."""
    assert pallas_gpu.chunk_tiles(programs=4096, tiles=256, wanted=2112) == 256
    assert 1900 < 16 * -(-4096 // pallas_gpu.chunk_tiles(16, tiles=4096, wanted=2112)) < 2200
    assert pallas_gpu.chunk_tiles(1, tiles=64, wanted=2112) == pallas_gpu.MIN_TILES
    assert pallas_gpu.chunk_tiles(1, tiles=3, wanted=2112) == 3


def gpu_loss(inputs, **options):
    y, last = causal_conv1d(**inputs, activation="silu", implementation="pallas_gpu", **options)
    return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(last.astype(jnp.float32))


def described(shape, dtype=jnp.bfloat16, *, state=True):
    describe = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    inputs = {"x": describe(*shape), "weight": describe(W, shape[2]), "bias": describe(shape[2])}
    return inputs | ({"state": describe(shape[0], W - 1, shape[2])} if state else {})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "shape, reverse", [((8, 2048, 4096), False), ((1, 4097, 300), True), ((2, 5, 3), False)]
)
def test_gpu_kernel_lowers_for_cuda(shape, reverse, dtype):
    """With gradients: whole tiles, ragged ends with resets, and less than a tile."""
    loss = gpu_loss
    if reverse:
        loss = lambda i: gpu_loss(i, resets=i["x"][:, :, 0] > 0, reverse=True)
    text = lower_for_cuda(jax.value_and_grad(loss), described(shape, dtype, state=reverse))
    assert text.count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize("how", ["vmap", "remat", "rows", "time"])
def test_gpu_kernel_lowers_under_transformations(how):
    """vmap, jax.checkpoint, and shard_map over rows or time, with gradients."""
    inputs, op = described((2, 64, 256)), gpu_loss
    if how == "vmap":
        inputs = jax.tree.map(lambda z: jax.ShapeDtypeStruct((3, *z.shape), z.dtype), inputs)
        op = lambda i: jnp.sum(jax.vmap(gpu_loss)(i))
    elif how == "remat":
        op = jax.checkpoint(gpu_loss)
    elif how == "rows":
        specs = {"x": P("data"), "weight": P(), "bias": P(), "state": P("data")}
        run = lambda i: gpu_loss(i)[None]
        rows = jax.shard_map(run, in_specs=(specs,), out_specs=P("data"), check_vma=True)
        op = lambda i: jnp.sum(rows(i))
    else:
        cut = P(None, "data")
        specs = {"x": cut, "weight": P(), "bias": P(), "state": P()}
        run = functools.partial(
            causal_conv1d_sharded, axis_name="data", activation="silu", implementation="pallas_gpu"
        )
        parts = jax.shard_map(
            lambda i: run(**i), in_specs=(specs,), out_specs=(cut, P()), check_vma=True
        )
        op = lambda i: sum(jnp.sum(p.astype(jnp.float32)) for p in parts(i))
    assert "mosaic_gpu" in lower_for_cuda(jax.grad(op), inputs)


def test_gpu_kernel_leaves_the_rest_to_xla(monkeypatch):
    """Many taps and wide types are refused by name, and passed over by default on a Hopper GPU."""
    monkeypatch.setattr(compat, "GPU_KERNELS_TRIED", True)  # an older jax lowers them, too
    inputs = described((2, 16, 256)) | {"weight": jax.ShapeDtypeStruct((9, 256), jnp.bfloat16)}
    del inputs["state"]
    with pytest.raises(ValueError, match=r"pallas_gpu does not take 9 taps \(at most 8\)"):
        jax.eval_shape(gpu_loss, inputs)
    assert "mosaic_gpu" not in lower_for_cuda(lambda i: causal_conv1d(**i), inputs)
    inputs["weight"] = jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)
    assert "mosaic_gpu" in lower_for_cuda(lambda i: causal_conv1d(**i), inputs)
    with enable_x64(), pytest.raises(ValueError, match="pallas_gpu does not take float64"):
        jax.eval_shape(gpu_loss, described((2, 16, 256), jnp.float64))


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_vmap, check_remat])
def test_tpu_kernel_under_vmap_and_remat(check, monkeypatch):
    """By Pallas' plain interpreter, which knows nothing of TPUs but goes through both."""
    monkeypatch.setattr(dispatch, "interpret", lambda platform: True)
    check(spec(TPU, block=8), "pallas_tpu")


@pytest.mark.slow
@pytest.mark.parametrize("width, resets", [(1, True), (4, False), (12, True)])
def test_tpu_kernel_of_any_width(width, resets):
    """Several blocks of time and channels, windows longer than a tile, no activation."""

    def make(rng, length, dtype):
        inputs = make_inputs(rng, length, dtype, 130, width)
        return inputs if resets else {**inputs, "resets": None}

    axes = {"x": 1, "resets": 1} if resets else {"x": 1}
    batch = dict.fromkeys(axes, 0)
    changes = {"make": make, "time_axis": axes, "batch_axis": batch, "options": {}}
    check_reference(spec(TPU, block=8, **changes), "pallas_tpu", 37)


def loop(x, weight, bias, state, resets, lengths, silu, reverse):
    """The definition as a loop over steps that keeps the last W-1 inputs, in numpy."""
    y, state = np.zeros_like(x), state.copy()
    for b in range(len(x)):
        steps = range(lengths[b])
        for t in reversed(steps) if reverse else steps:
            if resets[b, t]:
                state[b] = 0
            window = np.concatenate([state[b], x[b, t : t + 1]])
            v = (window * weight).sum(0) + bias
            y[b, t] = v / (1 + np.exp(-v)) if silu else v
            state[b] = window[1:]
    return y, state


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("width, silu", [(1, False), (2, True), (4, True), (7, False)])
def test_equals_the_definition(width, silu, implementation, reverse):
    """Any width, resets, padding, state, lengths below the width: a loop agrees to 1e-12."""
    rng = np.random.default_rng(width)
    inputs = make_inputs(rng, 9, np.float64, width=width)
    inputs["state"] = rng.standard_normal(inputs["state"].shape)
    for lengths in ([9, 2], [0, 7]):
        lengths = np.asarray(lengths, np.int32)
        with enable_x64():
            y, state = jax.jit(
                lambda i, n: causal_conv1d(
                    **i, lengths=n, activation="silu" if silu else None, reverse=reverse,
                    implementation=implementation,
                )
            )(inputs, lengths)  # fmt: skip
            want_y, want_state = loop(**inputs, lengths=lengths, silu=silu, reverse=reverse)
            np.testing.assert_allclose(y, want_y, atol=1e-12)
            np.testing.assert_allclose(state, want_state, atol=1e-12)


def test_steps_equal_the_whole():
    """One step at a time from the state of a prefix gives the rest of the sequence."""
    inputs = make_inputs(np.random.default_rng(0), 9, np.float32)
    x = inputs.pop("x")
    del inputs["resets"]
    want, want_state = causal_conv1d(x, **inputs, activation="silu")
    y, state = causal_conv1d(x[:, :2], **inputs, activation="silu")
    weights = {k: inputs[k] for k in ("weight", "bias")}
    for t in range(2, 9):
        y, state = causal_conv1d_step(x[:, t], **weights, activation="silu", state=state)
        np.testing.assert_allclose(y, want[:, t], atol=1e-6)
    np.testing.assert_array_equal(state, want_state)


def test_wide_weights_of_bfloat16_inputs():
    """float32 taps are used as such: one rounding, at the end."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((B, 50, C)), jnp.bfloat16)
    weight = rng.standard_normal((W, C)).astype(np.float32)
    y, state = causal_conv1d(x, weight)
    want, _ = causal_conv1d(x.astype(jnp.float32), weight)
    assert y.dtype == state.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, want.astype(jnp.bfloat16))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "shards, width, implementation",
    [
        (4, 4, None),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(1, 4, None), (2, 1, None), (2, 4, "pallas_tpu"), (8, 2, None)]
        ),
    ],
)
def test_sharded_time_equals_one_device(shards, width, implementation, reverse):
    """Values and the gradients of everything, with resets and a state; T/n = W-1 the least."""
    inputs = make_inputs(np.random.default_rng(0), 12 if shards == 4 else 8, np.float32, C, width)
    resets = inputs.pop("resets")
    inputs["state"] = np.cos(np.arange(inputs["state"].size).reshape(inputs["state"].shape) + 1)
    inputs["state"] = inputs["state"].astype(np.float32)
    options = {"activation": "silu", "reverse": reverse}
    single = lambda i: causal_conv1d(**i, resets=resets, **options)
    cut = P(None, "time")

    def spread_out(i):
        local = lambda i, r: causal_conv1d_sharded(
            **i, resets=r, axis_name="time", implementation=implementation, **options
        )
        mesh = auto_mesh((shards,), ("time",))
        places = {"x": cut, "weight": P(), "bias": P(), "state": P()}
        specs = {"in_specs": (places, cut), "out_specs": (cut, P())}
        return jax.shard_map(local, mesh=mesh, check_vma=True, **specs)(i, resets)

    def loss(op, i):
        y, state = op(i)
        total = jnp.sum(y * np.sin(inputs["x"])) + jnp.sum(state * inputs["state"])
        return total, (y, state)

    run = lambda op: to_numpy(jax.jit(jax.grad(lambda i: loss(op, i), has_aux=True))(inputs))
    assert_close(run(spread_out), run(single), 1e-5, f"{shards} shards ")


def test_shards_shorter_than_the_halo_are_refused():
    inputs = make_inputs(np.random.default_rng(0), 8, np.float32)
    local = lambda x: causal_conv1d_sharded(x, inputs["weight"], axis_name="time")[0]
    mesh = auto_mesh((4,), ("time",))
    f = jax.shard_map(local, mesh=mesh, in_specs=P(None, "time"), out_specs=P(None, "time"))
    with pytest.raises(ValueError, match="2 steps on each shard of 'time' are fewer than the 3"):
        f(inputs["x"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": np.zeros((W, 5), np.float32)}, r"weight has shape \(4, 5\), expected \(4, 3\)"),
        ({"state": np.zeros((B, W, C), np.float32)}, "state has shape"),
        ({"bias": np.zeros((W,), np.float32)}, "bias has shape"),
        ({"resets": np.zeros((5,), bool)}, "resets has shape"),
        ({"lengths": np.zeros((3,), np.int32)}, "lengths has shape"),
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"implementation": "cuda"}, "'cuda' does not exist"),
    ],
)
def test_mistakes_are_named(change, message):
    inputs = make_inputs(np.random.default_rng(0), 5, np.float32)
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**inputs, **change})
