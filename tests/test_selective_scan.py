"""Selective scan: every implementation against the float64 definition, and its extremes."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lintime.kernels_pallas import selective_scan as package
from lintime.kernels_pallas.compat import auto_mesh, enable_x64
from lintime.kernels_pallas.selective_scan import (
    pallas_tpu,
    selective_scan,
    selective_scan_step,
)
from lintime.kernels_pallas.selective_scan.sharded import selective_scan_sharded

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
        "state": np.zeros((ROWS, width, states), wide) + 0 * decay.astype(decay.dtype)[:0].sum(),
    }
    inputs["state"] = inputs["state"].astype(inputs["A"].dtype)
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


test_forward = kernel_tests(spec(("xla",), delta_softplus=True))
test_reverse = kernel_tests(
    spec(
        ("xla",),
        causal=False,
        delta_softplus=True,
        reverse=True,
        shape={"groups": 2},
        # As forward; the flip does not depend on them.
        skip=("vmap", "remat", "shard_map", "state", "no_state", "bfloat16")
        + ("reference-T3", "reference-T4"),
    )
)


def slow(test):
    return pytest.mark.slow(test)


# The interpreters are slow. The ordinary run takes all features once over several blocks.
LENGTHS = tuple(f"reference-T{n}" for n in (1, 3, 4, 5))
COSTLY = ("bfloat16", "vmap", "remat", "shard_map", "no_state", "padding", "causality", "split")
test_tpu = kernel_tests(
    spec(("pallas_tpu",), delta_softplus=True, skip=(*LENGTHS, *COSTLY, "prefix"))
)
test_tpu_more = slow(
    kernel_tests(
        spec(
            ("pallas_tpu",),
            delta_softplus=True,
            # remat: jax.checkpoint refuses the interpreter's effects; tests/aot compiles it instead.
            skip=("state", "reference-T11", "reference-T3", "reference-T5", "prefix", "remat"),
        )
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
    "groups": ({"groups": 3, "leave_out": ("z",)}, {"delta_softplus": True}),
    "constant": ({"constant": True, "leave_out": ("resets",)}, {"delta_softplus": True}),
    "complex groups": ({"complex_a": True, "groups": 2}, {"delta_softplus": True, "reverse": True}),
    "complex constant": ({"complex_a": True, "constant": True}, {"delta_softplus": True}),
}


@pytest.mark.parametrize("options", OPTIONS)
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
    "plain": ({"leave_out": ("D", "z", "delta_bias", "resets")}, {}),
    "groups, reverse": (
        {"groups": 2, "leave_out": ("D",)},
        {"delta_softplus": True, "reverse": True},
    ),
    "channel blocks": ({"width": 384, "leave_out": ("z",)}, {"delta_softplus": True}),
}


@pytest.mark.parametrize(
    "options",
    ["plain", "groups, reverse", pytest.param("channel blocks", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("implementation", ["pallas_tpu"])
def test_kernel_options(implementation, options):
    """Outputs, state and gradients of a kernel are those of the definition."""
    shape, flags = KERNEL_OPTIONS[options]
    inputs = make_inputs(np.random.default_rng(3), 9, np.float32, **shape)
    if not flags:
        inputs["delta"] = np.abs(inputs["delta"])  # decays, not growth
    rng = np.random.default_rng(4)
    cotangent = [rng.standard_normal(inputs[k].shape).astype(np.float32) for k in ("u", "state")]
    resets = {k: inputs.pop(k) for k in ("resets",) if k in inputs}

    def loss(moving, implementation):
        result = op(**moving, **resets, **flags, implementation=implementation, sizes=SIZES)
        return sum(jnp.sum(a * c) for a, c in zip(result, cotangent, strict=True)), result

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    got, want = (jax.tree.map(np.asarray, run(inputs, k)) for k in (implementation, "reference"))
    assert_close(got, want, 1e-5, implementation)


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
    "implementation", ["reference", "xla", pytest.param("pallas_tpu", marks=pytest.mark.slow)]
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
        (2, True),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, False), (4, True))),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((2, False), (8, True))),
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
