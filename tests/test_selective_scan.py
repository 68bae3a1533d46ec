"""Selective scan: every implementation against the float64 definition, and its extremes."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from lintime.kernels_pallas import selective_scan as package
from lintime.kernels_pallas.compat import auto_mesh, enable_x64
from lintime.kernels_pallas.selective_scan import (
    fused,
    pallas_gpu,
    pallas_tpu,
    selective_scan,
    selective_scan_step,
)
from lintime.kernels_pallas.selective_scan.sharded import selective_scan_sharded

from .aot import lower_for_cuda
from .kernel_base import Spec, assert_close, kernel_tests

ROWS = 2


def op(*args, sizes=None, **kwargs):
    """The op with chunk or block lengths of its implementations set: {name: {size: value}}."""
    table = package.IMPLEMENTATIONS
    small = {k: functools.partial(table[k], **v) for k, v in (sizes or {}).items()}
    with mock.patch.dict(table, small), mock.patch.object(pallas_tpu, "ROWS", 4):
        return selective_scan(*args, **kwargs)


def make_inputs(
    rng, length, dtype=np.float64, *, width=6, states=3, groups=None, constant=False,
    leave_out=(), complex_a=False,
):  # fmt: skip
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    number = lambda *shape: draw(*shape) + 1j * draw(*shape) if complex_a else draw(*shape)
    if constant:
        mix = lambda: number(width, states)
    elif groups:
        mix = lambda: number(ROWS, length, groups, states)
    else:
        mix = lambda: number(ROWS, length, states)
    weights = np.random.default_rng(5)
    decay = -np.exp(weights.uniform(-2, 2, (width, states)))
    if complex_a:
        decay = decay + 1j * weights.standard_normal((width, states))
    wide = np.float64 if dtype == np.float64 else np.float32
    inputs = {
        "u": draw(ROWS, length, width),
        "delta": draw(ROWS, length, width) - 1,
        "A": decay.astype(np.result_type(wide, np.complex64) if complex_a else wide),
        "B": mix(),
        "C": mix(),
        "D": draw(width).astype(wide),
        "z": draw(ROWS, length, width),
        "delta_bias": draw(width).astype(wide),
        "resets": rng.random((ROWS, length)) < 0.15,
    }
    inputs["state"] = np.zeros((ROWS, width, states), inputs["A"].dtype)
    return {k: v for k, v in inputs.items() if k not in leave_out}


FULL = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "state")
SIZES = {"xla": {"chunk": 4}, "pallas_tpu": {"steps": 4}}


def spec(
    variants, *, block=4, causal=True, sizes=SIZES, skip=(), leave_out=(), shape=None, **options
):
    moving = [k for k in ("u", "delta", "B", "C", "z", "resets") if k not in leave_out]
    return Spec(
        op=functools.partial(op, sizes=sizes),
        make=functools.partial(make_inputs, leave_out=leave_out, **(shape or {})),
        time_axis=dict.fromkeys(moving, 1),
        batch_axis=dict.fromkeys(moving, 0),
        grad=tuple(k for k in FULL if k not in leave_out),
        variants={name: {"implementation": name} for name in variants},
        block=block,
        causal=causal,
        skip=skip,
        options=options,
    )


slow = pytest.mark.slow
# On a GPU its kernels run as they are; on a CPU in an interpreter that older jax does not have.
needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams") and jax.config.jax_platforms == "cpu",
    reason="this jax has no interpreter for Mosaic GPU kernels",
)
# The reversed recurrence differs in its values; the rest does not depend on the direction.
ONCE = ("vmap", "remat", "shard_map", "state", "no_state", "bfloat16")
COSTLY = ("bfloat16", "vmap", "remat", "shard_map", "no_state", "padding", "causality", "split")
LENGTHS = tuple(f"reference-T{n}" for n in (1, 3, 4, 5))

XLA = functools.partial(spec, ("xla",), delta_softplus=True)
MORE = ("reference-T3", "reference-T4", "reference-T5", "prefix", "remat", "no_state")
REST = ("reference-T1", "reference-T11", "state", "bfloat16", "vmap", "shard_map", "padding")
test_forward = kernel_tests(XLA(skip=MORE))
test_forward_more = slow(kernel_tests(XLA(skip=(*REST, "causality", "split"))))
test_reverse = kernel_tests(
    XLA(causal=False, reverse=True, shape={"groups": 2}, skip=(*ONCE, *LENGTHS))
)
# The interpreters are slow: the ordinary run takes every feature once, over several blocks. What
# they do not go through, remat (both) and shard_map (GPU), is compiled or lowered instead.
TPU = functools.partial(spec, ("pallas_tpu",), delta_softplus=True)
test_tpu = kernel_tests(TPU(skip=(*LENGTHS, *COSTLY, "prefix")))
DONE = ("state", "prefix", "remat", "bfloat16", "no_state")
test_tpu_more = slow(kernel_tests(TPU(skip=(*LENGTHS, "reference-T11", *DONE))))
GPU = functools.partial(spec, ("pallas_gpu",), delta_softplus=True, block=16)
AROUND = tuple(f"reference-T{n}" for n in (1, 15, 16))
test_gpu = needs_gpu_interpreter(
    kernel_tests(GPU(skip=(*AROUND, "reference-T17", *COSTLY, "prefix")))
)
test_gpu_more = slow(
    needs_gpu_interpreter(
        kernel_tests(GPU(skip=(*AROUND, "reference-T37", *DONE, "vmap", "shard_map")))
    )
)


def naive(inputs, *, delta_softplus=False, reverse=False):
    """The definition as loops over rows, steps, channels and states, in float64."""
    a = {k: np.asarray(v) for k, v in inputs.items()}
    rows, t_len, width = a["u"].shape
    states = a["A"].shape[1]
    out = np.zeros((rows, t_len, width))
    state = np.array(a.get("state", np.zeros((rows, width, states), a["A"].dtype)))
    entries = lambda m, i, t, d: (
        m[d] if m.ndim == 2 else m[i, t] if m.ndim == 3 else m[i, t, d // (width // m.shape[2])]
    )
    for i, d in np.ndindex(rows, width):
        for t in range(t_len)[:: -1 if reverse else 1]:
            raw = a["delta"][i, t, d] + (a["delta_bias"][d] if "delta_bias" in a else 0)
            dt = raw if not delta_softplus or raw > 20 else np.log1p(np.exp(raw))
            if "resets" in a and a["resets"][i, t]:
                state[i, d] = 0
            y = 0.0
            for n, (b, c) in enumerate(zip(*(entries(a[m], i, t, d) for m in "BC"), strict=True)):
                state[i, d, n] = np.exp(dt * a["A"][d, n]) * state[i, d, n]
                state[i, d, n] += dt * b * a["u"][i, t, d]
                y += c * state[i, d, n]
            y = 2 * y.real if np.iscomplexobj(a["A"]) else y
            y += a["D"][d] * a["u"][i, t, d] if "D" in a else 0
            if "z" in a:
                y *= a["z"][i, t, d] / (1 + np.exp(-a["z"][i, t, d]))
            out[i, t, d] = y
    return out, state


OPTIONS = {
    "plain": ({"leave_out": ("D", "z", "delta_bias", "resets", "state")}, {}),
    "bias alone": ({"leave_out": ("D", "z")}, {}),
    "all, reverse": ({}, {"delta_softplus": True, "reverse": True}),
    "complex": ({"complex_a": True, "groups": 2}, {"delta_softplus": True, "reverse": True}),
    "constant": ({"complex_a": True, "constant": True}, {"delta_softplus": True}),
}


@pytest.mark.parametrize(
    "options",
    [k if k in ("all, reverse", "complex") else pytest.param(k, marks=slow) for k in OPTIONS],
)
def test_equals_the_definition(options):
    """Loops in float64 agree to 1e-12; the XLA form's gradients are those of the reference."""
    shape, flags = OPTIONS[options]
    with enable_x64():
        inputs = make_inputs(np.random.default_rng(3), 11, **shape)
        want = naive(inputs, **flags)
        moving = {k: jnp.asarray(v) for k, v in inputs.items() if k != "resets"}
        rng = np.random.default_rng(4)
        ct = [jnp.asarray(rng.standard_normal(a.shape)) for a in want]

        def loss(moving, implementation):
            fixed = {k: v for k, v in inputs.items() if k == "resets"}
            chosen = {"implementation": implementation, "sizes": SIZES}
            out, state = op(**moving, **fixed, **flags, **chosen)
            total = jnp.sum(out * ct[0]) + jnp.sum((state * ct[1]).real)
            return total, (out, state)

        run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
        results = {name: run(moving, name) for name in ("reference", "xla")}
        for name, (_, result) in results.items():
            for got, value in zip(result, want, strict=True):
                np.testing.assert_allclose(got, value, atol=1e-12, err_msg=name)
        for name, grad in results["xla"][0].items():
            scale = np.abs(results["reference"][0][name]).max()
            error = np.abs(grad - results["reference"][0][name]).max()
            assert error < 1e-12 * max(scale, 1), name


KERNEL_OPTIONS = {
    "plain": ({"leave_out": ("D", "z", "delta_bias", "resets")}, {}, {}),
    "groups, reverse": (
        {"groups": 2, "leave_out": ("D",)},
        {"delta_softplus": True, "reverse": True},
        {},
    ),
    "channel blocks": ({"width": 384, "leave_out": ("z",)}, {"delta_softplus": True}, {}),
    "chunks": ({"length": 90, "states": 20}, {"delta_softplus": True}, {"split": 3}),
    "chunks, reverse": (
        {"length": 90, "groups": 2, "leave_out": ("z",)},
        {"delta_softplus": True, "reverse": True},
        {"split": 2},
    ),
}


@pytest.mark.parametrize(
    "implementation, options",
    [
        *(pytest.param("pallas_tpu", k, marks=slow) for k in ("groups, reverse", "channel blocks")),
        *(
            pytest.param("pallas_gpu", k, marks=(slow, needs_gpu_interpreter))
            for k in KERNEL_OPTIONS
        ),
    ],
)
def test_kernel_options(implementation, options):
    """Outputs, state and gradients of a kernel are those of the definition."""
    shape, flags, sizes = KERNEL_OPTIONS[options]
    shape = {"length": 9, **shape}
    inputs = make_inputs(np.random.default_rng(3), dtype=np.float32, **shape)
    sizes = {**SIZES, "pallas_gpu": sizes}
    if not flags:
        inputs["delta"] = np.abs(inputs["delta"])  # decays, not growth
    rng = np.random.default_rng(4)
    cotangent = [rng.standard_normal(inputs[k].shape).astype(np.float32) for k in ("u", "state")]
    resets = {k: inputs.pop(k) for k in ("resets",) if k in inputs}

    def loss(moving, implementation):
        result = op(**moving, **resets, **flags, implementation=implementation, sizes=sizes)
        return sum(jnp.sum(a * c) for a, c in zip(result, cotangent, strict=True)), result

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    got, want = (jax.tree.map(np.asarray, run(inputs, k)) for k in (implementation, "reference"))
    assert_close(got, want, 1e-5, implementation)


@slow
@needs_gpu_interpreter
def test_gpu_bfloat16():
    """What is rounded stays within bfloat16 of the reference; five states are padded."""
    inputs = make_inputs(np.random.default_rng(3), 37, np.float32, states=5)
    inputs |= {k: jnp.asarray(inputs[k], jnp.bfloat16) for k in ("u", "delta", "B", "C", "z")}
    resets = inputs.pop("resets")

    def loss(inputs, implementation):
        out, state = op(**inputs, resets=resets, delta_softplus=True, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(state), out

    as_float = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float32), tree)
    got, want = (
        as_float(jax.jit(jax.grad(lambda x, k=k: loss(x, k), has_aux=True))(inputs))
        for k in ("pallas_gpu", "reference")
    )
    assert_close(got, want, 0.02, "bfloat16 ")


def extreme_inputs(length, seed=0):
    """Raw step sizes of -40..45 beside the usual 1e-4..10, decay rates up to 55."""
    rng = np.random.default_rng(seed)
    inputs = make_inputs(rng, length, np.float32, states=4, leave_out=("resets",))
    steps = np.exp(rng.uniform(np.log(1e-4), np.log(10), inputs["delta"].shape))
    usual = np.log(np.expm1(steps))
    wild = rng.uniform(-40, 45, steps.shape)
    inputs["delta"] = np.where(rng.random(steps.shape) < 0.3, wild, usual).astype(np.float32)
    inputs["delta_bias"] = 0 * inputs["delta_bias"]
    inputs["A"] = -np.exp(rng.uniform(-6, 4, inputs["A"].shape)).astype(np.float32)
    inputs["z"] = (20 * inputs["z"]).astype(np.float32)
    return inputs


def value_and_grads(inputs, cotangent, **options):
    def loss(moving):
        out, state = op(**moving, delta_softplus=True, **options)
        return sum(jnp.sum(a * c) for a, c in zip((out, state), cotangent, strict=True)), out

    return jax.jit(jax.grad(loss, has_aux=True))(inputs)


def check_extreme(implementation, sizes, length=24):
    inputs = extreme_inputs(length)
    rng = np.random.default_rng(1)
    cotangent = [rng.standard_normal(inputs[k].shape).astype(np.float32) for k in ("u", "state")]
    got = value_and_grads(inputs, cotangent, implementation=implementation, sizes=sizes)
    with enable_x64():
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (inputs, cotangent))
        want = value_and_grads(*wide, implementation="reference")
        want = jax.tree.map(np.asarray, want)
    assert_close(jax.tree.map(np.asarray, got), want, 1e-5, "extreme ")


@pytest.mark.parametrize(
    "implementation",
    [
        "reference",
        "xla",
        pytest.param("pallas_tpu", marks=slow),
        pytest.param("pallas_gpu", marks=(slow, needs_gpu_interpreter)),
    ],
)
def test_extreme_steps_and_decays(implementation):
    check_extreme(implementation, SIZES)


def test_bad_shapes_are_refused():
    inputs = make_inputs(np.random.default_rng(0), 5, np.float32)
    for name, bad in (
        ("delta", inputs["delta"][:, :4]),
        ("D", inputs["D"][:3]),
        ("B", inputs["B"][..., :2]),
        ("C", inputs["C"][:, :, None].repeat(4, axis=2)),
        ("B", inputs["B"] * 1j),
        ("state", inputs["state"][:1]),
    ):
        with pytest.raises(ValueError, match=f"^{name} "):
            selective_scan(**{**inputs, name: bad})


@pytest.mark.parametrize("groups", [None, 2])
def test_steps_equal_the_whole(groups):
    """One step at a time gives the scan's outputs and last state, and keeps the state's dtype."""
    inputs = make_inputs(
        np.random.default_rng(2), 5, np.float32, groups=groups, leave_out=("resets",)
    )
    want, last = selective_scan(**inputs, delta_softplus=True)
    state = jnp.asarray(inputs["state"])
    for t in range(5):
        y, state = selective_scan_step(
            inputs["u"][:, t], inputs["delta"][:, t], inputs["A"], inputs["B"][:, t],
            inputs["C"][:, t], inputs["D"], inputs["z"][:, t],
            dt_bias=inputs["delta_bias"], dt_softplus=True, state=state,
        )  # fmt: skip
        np.testing.assert_allclose(y, want[:, t], atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


def test_backward_keeps_only_boundary_states():
    """The gradient's residuals hold no array with a state for every step."""
    t_len, width, states = 64, 6, 3
    inputs = make_inputs(np.random.default_rng(2), t_len, np.float32, leave_out=("resets",))
    f = lambda moving: op(**moving, delta_softplus=True, sizes={"xla": {"chunk": 16}})
    _, pullback = jax.eval_shape(lambda moving: jax.vjp(f, moving), inputs)
    largest = max(a.size for a in jax.tree.leaves(pullback))
    assert largest <= ROWS * t_len * width < ROWS * t_len * width * states


@pytest.mark.parametrize(
    "shards, reverse",
    [
        (8, False),
        *(pytest.param(*pair, marks=slow) for pair in ((1, True), (2, False), (4, True))),
    ],
)
def test_sharded(shards, reverse):
    """Time split over devices: outputs, state and all gradients are those of one device."""
    inputs = make_inputs(np.random.default_rng(6), 16, np.float32, width=4, states=2)
    inputs["resets"] = (np.arange(16) % 8 == 5) & (np.arange(ROWS)[:, None] == 0)
    rng = np.random.default_rng(7)
    inputs["state"] = rng.standard_normal(inputs["state"].shape).astype(np.float32)
    cotangent = [rng.standard_normal(inputs[k].shape).astype(np.float32) for k in ("u", "state")]
    flags = {"delta_softplus": True, "reverse": reverse}
    mesh = auto_mesh((shards,), ("time",))
    along = {k: P(None, "time") for k in ("u", "delta", "B", "C", "z", "resets")}
    specs = {k: along.get(k, P()) for k in inputs}
    local = lambda a: selective_scan_sharded(**a, axis_name="time", **flags)
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(specs,), out_specs=(P(None, "time"), P()), check_vma=True
    )

    def run(f):
        def loss(moving):
            result = f({**moving, "resets": inputs["resets"]})
            return sum(jnp.sum(a * c) for a, c in zip(result, cotangent, strict=True)), result

        moving = {k: v for k, v in inputs.items() if k != "resets"}
        return jax.tree.map(np.asarray, jax.jit(jax.grad(loss, has_aux=True))(moving))

    assert_close(run(sharded), run(lambda a: selective_scan(**a, **flags)), 1e-5, "sharded ")


def test_short_functions():
    """The kernels' softplus and sigmoid: relative error of e^x by 2^x, no more."""
    x = np.concatenate([np.linspace(-90, 90, 20001), np.linspace(-1, 1, 2001)]).astype(np.float32)
    exact = np.log1p(np.exp(-np.abs(x.astype(np.float64)))) + np.maximum(x, 0)
    bound = 1e-37 + exact * 1e-7 * (4 + np.abs(x))
    assert (np.abs(fused.softplus_short(x) - exact) <= bound).all()
    assert (np.asarray(fused.softplus_short(x))[x > 20] == x[x > 20]).all()
    assert fused.softplus_short(jnp.float32(fused.NO_STEP)) == 0
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    bound = 1e-37 + exact * 1e-7 * (8 + np.abs(x))
    assert (np.abs(fused.sigmoid_short(x) - exact) <= bound).all()
    assert np.isfinite(np.asarray(fused.sigmoid_short(np.float32([-1e4, 1e4])))).all()


def test_gpu_kernel_chooses_chunks():
    """One pass where rows and channels make enough programs, or where T is short."""
    assert pallas_gpu.chunks(programs=256, tiles=128) == 1
    assert pallas_gpu.chunks(programs=32, tiles=4096) == 16
    assert pallas_gpu.chunks(programs=1, tiles=15) == 1


def gpu_loss(inputs, resets=None, **options):
    out, state = selective_scan(
        **inputs, resets=resets, delta_softplus=True, implementation="pallas_gpu", **options
    )
    return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(state)


def described(*args, dtype=jnp.bfloat16, **options):
    """Shapes of inputs, the time-varying ones in `dtype`, without resets."""
    inputs = make_inputs(np.random.default_rng(0), *args, np.float32, **options)
    inputs.pop("resets", None)
    cast = lambda k: dtype if k in ("u", "delta", "B", "C", "z") else jnp.float32
    return {k: jax.ShapeDtypeStruct(v.shape, cast(k)) for k, v in inputs.items()}


@pytest.mark.parametrize("how", ["usual", "options", "remat", "rows", "time", "vmap"])
def test_gpu_kernels_lower_for_cuda(how):
    """With gradients: all options, and inside jax's transformations."""
    inputs, op = described(70, width=256, states=16), gpu_loss
    if how == "options":
        inputs = described(2048, width=130, groups=2, dtype=jnp.float32, leave_out=("z",))
        op = lambda x: gpu_loss(x, resets=x["u"][:, :, 0] > 0, reverse=True)
    elif how == "remat":
        op = jax.checkpoint(gpu_loss)
    elif how == "vmap":
        inputs = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype), inputs)
        op = lambda x: jnp.sum(jax.vmap(gpu_loss)(x))
    elif how == "rows":
        moving = ("u", "delta", "B", "C", "z", "state")
        specs = {k: P("data") if k in moving else P() for k in inputs}
        rows = jax.shard_map(
            lambda x: gpu_loss(x)[None], in_specs=(specs,), out_specs=P("data"), check_vma=True
        )
        op = lambda x: jnp.sum(rows(x))
    elif how == "time":
        cut = P(None, "data")
        specs = {k: cut if k in ("u", "delta", "B", "C", "z") else P() for k in inputs}
        flags = {"axis_name": "data", "delta_softplus": True, "implementation": "pallas_gpu"}
        parts = jax.shard_map(
            lambda x: selective_scan_sharded(**x, **flags),
            in_specs=(specs,), out_specs=(cut, P()), check_vma=True,
        )  # fmt: skip
        op = lambda x: sum(jnp.sum(p.astype(jnp.float32)) for p in parts(x))
    assert "mosaic_gpu" in lower_for_cuda(jax.grad(op), inputs)


def test_kernels_refuse_what_they_do_not_compute():
    for name in ("pallas_tpu", "pallas_gpu"):
        for shape, reason in (
            ({"complex_a": True}, "complex A"),
            ({"constant": True}, "constant over time"),
            ({"states": 200}, "200 states"),
        ):
            inputs = make_inputs(np.random.default_rng(0), 3, np.float32, **shape)
            with pytest.raises(ValueError, match=f"{name} does not take .*{reason}"):
                selective_scan(**inputs, implementation=name)
