"""The polynomial mixer's kernels for Hopper GPUs, and gated causal rows by every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from lintime.kernels_pallas import dispatch
from lintime.kernels_pallas.poly_mix import (
    PolyState,
    gated_causal_mix,
    gpu_call,
    poly_mix,
    projected_mean,
    rope_frequencies,
    rope_rotation,
)

from .aot import lower_for_cuda
from .kernel_base import assert_close, to_numpy

# On a GPU the kernels run as they are; on a CPU in an interpreter that older jax does not have.
needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams") and jax.config.jax_platforms == "cpu",
    reason="this jax has no interpreter for Mosaic GPU kernels",
)
HEADS = 4


def draw(n, weighted=False, carried=False, batch=1, width=512, degree=2, dtype=jnp.float32):
    """Features on all pieces of the activation; NaN where the weight is 0."""
    rng = np.random.default_rng(0)
    h = 4 * rng.standard_normal((batch, n, width)) - 1
    weights = rng.uniform(0.2, 1.5, (batch, n)) * (rng.random((batch, n)) < 0.8)
    h = np.where(weights[..., None] != 0, h, np.nan) if weighted else h
    arrays = {
        "h": jnp.asarray(h, dtype),
        "coeff": jnp.asarray(rng.standard_normal((width, degree)) * 0.3, jnp.float32),
        "gate": jnp.asarray(rng.random((batch, n, HEADS)), dtype),
    }
    if weighted:
        arrays["weights"] = jnp.asarray(weights, jnp.float32)
    if carried:
        mean = jnp.asarray(rng.standard_normal((batch, width)), jnp.float32)
        arrays["state"] = PolyState(mean, jnp.full((batch,), 3.0))
    return arrays


def value_and_grads(arrays, mask, implementation):
    """(rows, state) and the gradients of all but the weights, of sums of both."""
    fixed = {k: v for k, v in arrays.items() if k == "weights"}
    if mask != "gated":
        arrays = {k: v for k, v in arrays.items() if k != "gate"}

    def loss(moving):
        options = moving | fixed | {"implementation": implementation}
        if mask == "gated":
            rows, state = gated_causal_mix(**options)
        else:
            rows, state = poly_mix(**options, causal=mask == "causal")
        wave = jnp.cos(jnp.arange(rows.size, dtype=jnp.float32)).reshape(rows.shape)
        return jnp.sum(rows.astype(jnp.float32) * wave) + jnp.sum(jnp.sin(state.mean)), (
            rows,
            state,
        )

    moving = {k: v for k, v in arrays.items() if k not in fixed}
    return to_numpy(jax.jit(jax.grad(loss, has_aux=True))(moving))


def compare(arrays, mask, implementation, tolerance):
    got, want = (value_and_grads(arrays, mask, i) for i in (implementation, "reference"))
    for part in got[0]:
        assert_close(got[0][part], want[0][part], tolerance, f"gradient of {part} ")
    assert_close(got[1], want[1], tolerance, "result ")


@needs_interpreter
@pytest.mark.parametrize("mask", ["mean", "causal", "gated"])
def test_kernels_agree_with_the_definition(mask, monkeypatch):
    """In chunks that are joined again, the last cut short, with weights and from a state; the
    interpreter looks for races between the threads and the copy engine."""
    if dispatch.interpret("gpu"):
        watch = plgpu.InterpretGPUParams(detect_races=True)
        monkeypatch.setattr(dispatch, "interpret", lambda platform: watch)
    monkeypatch.setattr(gpu_call, "PROGRAMS", 8)
    compare(draw(70, weighted=True, carried=True), mask, "pallas_gpu", 1e-5)


@pytest.mark.slow
@needs_interpreter
@pytest.mark.parametrize("mask, n", [("mean", 37), ("causal", 5), ("gated", 32)])
def test_kernels_without_weights(mask, n):
    compare(draw(n), mask, "pallas_gpu", 1e-5)


def mean_of_projection(arrays, implementation):
    """(row, gates, state) of `projected_mean` and the gradients of x, kernel and coefficients."""
    fixed = {k: v for k, v in arrays.items() if k in ("weights", "state")}
    moving = {k: v for k, v in arrays.items() if k not in fixed}

    def loss(moving):
        out = projected_mean(**moving, **fixed, implementation=implementation)
        wave = jnp.cos(jnp.arange(out[1].size, dtype=jnp.float32)).reshape(out[1].shape)
        return jnp.sum(jnp.sin(out[0])) + jnp.sum(out[1] * wave), out

    return to_numpy(jax.jit(jax.grad(loss, has_aux=True))(moving))


@pytest.mark.parametrize(
    "implementation, weighted",
    [("xla", True), ("xla", False)]
    + [pytest.param("pallas_gpu", w, marks=needs_interpreter) for w in (True, False)],
)
def test_projected_mean(implementation, weighted):
    """Both products and the mean as by two matmuls; a weight of 0 hides nothing but a token."""
    rng = np.random.default_rng(1)
    arrays = draw(37, weighted=weighted, carried=weighted)
    arrays.pop("gate")
    arrays["x"] = jnp.asarray(rng.standard_normal((1, 37, 16)), jnp.float32)
    arrays["kernel"] = jnp.asarray(rng.standard_normal((16, 512 + 8)), jnp.float32)
    arrays.pop("h")
    got, want = (mean_of_projection(arrays, i) for i in (implementation, "reference"))
    for part in got[0]:
        assert_close(got[0][part], want[0][part], 2e-5, f"gradient of {part} ")
    assert_close(got[1], want[1], 1e-5, "result ")
    given = {k: v for k, v in arrays.items() if k in ("weights", "state", "coeff")}
    h = arrays["x"] @ arrays["kernel"][:, :512]
    assert_close(got[1][0], to_numpy(poly_mix(h, **given)[0]), 1e-5, "mean ")


@needs_interpreter
def test_kernels_in_bfloat16():
    arrays = draw(32, dtype=jnp.bfloat16)
    (grads, (rows, _)) = value_and_grads(arrays, "gated", "pallas_gpu")
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), arrays)
    want, (want_rows, _) = value_and_grads(wide, "gated", "reference")
    error = lambda a, b: np.linalg.norm(np.float32(a) - b) / np.linalg.norm(b)
    assert error(rows, want_rows) < 5e-3
    assert all(error(grads[k], want[k]) < 1e-2 for k in grads)


@pytest.mark.parametrize("gates", [HEADS, 512])
def test_gated_rows_are_rows_times_gates(gates):
    """By head or by channel, values and gradients, with weights and from a state."""
    arrays = draw(9, weighted=True, carried=True)
    arrays["gate"] = jnp.cos(jnp.arange(9 * gates, dtype=jnp.float32)).reshape(1, 9, gates)
    rows, _ = poly_mix(**{k: v for k, v in arrays.items() if k != "gate"}, causal=True)
    gated, _ = gated_causal_mix(**arrays)
    wide = jnp.repeat(arrays["gate"], 512 // gates, axis=2)
    np.testing.assert_allclose(gated, rows * wide, rtol=1e-6)
    compare(arrays, "gated", "xla", 1e-5)


def test_gates_of_another_shape_are_named():
    with pytest.raises(ValueError, match="gate has shape"):
        gated_causal_mix(**draw(9) | {"gate": jnp.ones((1, 9, 3))})


SHAPES = [(4, 2048, 2048), (1, 1021, 768)]


@pytest.mark.parametrize("shape", [SHAPES[0], pytest.param(SHAPES[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("mask, kernels", [("mean", 2), ("causal", 2), ("gated", 4)])
def test_kernels_lower_for_cuda(mask, kernels, shape):
    batch, n, width = shape
    h = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    coeff = jax.ShapeDtypeStruct((width, 3), jnp.float32)
    gate = jax.ShapeDtypeStruct((batch, n, width // 64), h.dtype)
    if mask == "gated":
        op = lambda h, c, g: gated_causal_mix(h, c, g, implementation="pallas_gpu")[0]
    else:
        op = lambda h, c, g: poly_mix(h, c, causal=mask == "causal", implementation="pallas_gpu")[0]
    loss = lambda *a: jnp.sum(op(*a).astype(jnp.float32))
    text = lower_for_cuda(jax.grad(loss, (0, 1)), h, coeff, gate)
    assert text.count("custom_call @mosaic_gpu") == kernels


@pytest.mark.parametrize("how", ["vmap", "remat", "shard_map"])
def test_kernels_lower_under_transformations(how):
    h = jax.ShapeDtypeStruct((2, 64, 512), jnp.bfloat16)
    coeff = jax.ShapeDtypeStruct((512, 2), jnp.float32)
    gate = jax.ShapeDtypeStruct((2, 64, HEADS), jnp.bfloat16)
    loss = lambda h, c, g: sum(
        jnp.sum(out[0].astype(jnp.float32))
        for out in (
            gated_causal_mix(h, c, g, implementation="pallas_gpu"),
            poly_mix(h, c, implementation="pallas_gpu"),
        )
    )
    if how == "vmap":
        op = lambda h, c, g: jnp.sum(jax.vmap(loss, (0, None, 0))(h[:, None], c, g[:, None]))
    elif how == "remat":
        op = jax.checkpoint(loss)
    else:
        cut = P("data")
        run = functools.partial(jax.shard_map, check_vma=True)
        run = run(lambda *a: loss(*a)[None], in_specs=(cut, P(), cut), out_specs=cut)
        op = lambda *a: jnp.sum(run(*a))
    assert "mosaic_gpu" in lower_for_cuda(jax.grad(op, (0, 1, 2)), h, coeff, gate)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"h": jnp.ones((1, 9, 320))}, "320 channels"),
        ({"h": jnp.ones((1, 9, 256))}, "256 channels"),
        ({"coeff": jnp.ones((512, 9))}, "degree 9"),
        ({"frames": (4, 5)}, "frames"),
        ({"query_weights": jnp.ones((1, 2, 9))}, "query_weights"),
        ({"rotation": rope_rotation(jnp.arange(9), rope_frequencies(512))}, "rotations"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(change, message):
    """And by no name another implementation is chosen."""
    arrays = {"h": jnp.ones((1, 9, 512)), "coeff": jnp.ones((512, 2))} | change
    if "h" in change:
        arrays["coeff"] = jnp.ones((change["h"].shape[2], 2))
    with pytest.raises(ValueError, match=f"pallas_gpu does not take.*{message}"):
        poly_mix(**arrays, implementation="pallas_gpu")
    poly_mix(**arrays)
