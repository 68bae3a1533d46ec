"""Polynomial mixer: every implementation and form of mask against the float64 definition."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from lintime.kernels_pallas import dispatch, poly_mix as op
from lintime.kernels_pallas.compat import auto_mesh, enable_x64
from lintime.kernels_pallas.poly_mix import PolyState, poly_mix
from lintime.kernels_pallas.poly_mix.aggregate import prefix_sums
from lintime.kernels_pallas.poly_mix.sharded import poly_mix_sharded
from lintime.kernels_pallas.time_axis import valid_mask

from .kernel_base import Spec, assert_close, kernel_tests, to_numpy

B, E, DEGREE = 2, 8, 3
XLA = {"xla": {"implementation": "xla"}}


def make_inputs(rng, length, dtype):
    """Features on all pieces of the activation; weights of all kinds, a zero in every fifth."""
    weights = rng.uniform(0.2, 1.5, (B, length)) * (rng.random((B, length)) < 0.8)
    coeff = rng.standard_normal((E, DEGREE)) * [1, 0.3, 0.05]
    return {
        "h": (4 * rng.standard_normal((B, length, E)) - 1).astype(dtype),
        "coeff": coeff.astype(np.float32),
        "weights": weights.astype(np.float32),
        "state": PolyState(np.zeros((B, E), np.float32), np.zeros((B,), np.float32)),
    }


def frames_of(length):
    """Unequal lengths, two of them the same, as far as they go."""
    lengths = []
    for frame in (2, 3, 3, 1) * length:
        lengths.append(min(frame, length - sum(lengths)))
        if sum(lengths) == length:
            return tuple(lengths)


def mixed(h, *, form, axes=0, lengths=None, weights=None, **rest):
    """The op with a row per token, whatever the form, padding as weights of 0."""
    n = h.shape[1]
    if lengths is not None:
        weights = jnp.where(valid_mask(lengths, n), weights, 0)
    if axes:
        positions = jnp.arange(n) if axes == 1 else jnp.stack([jnp.arange(n), jnp.ones(n)], 1)
        frequencies = op.rope_frequencies(E, axes, 50.0)
        acc = jnp.promote_types(h.dtype, jnp.float32)
        rest["rotation"] = op.rope_rotation(positions.astype(acc), frequencies, axes)
    frames = {"mean": (n,), "frames": frames_of(n), "causal": None}[form]
    if form == "mean":
        out, state = poly_mix(h, weights=weights, **rest)
    else:
        causal = {"causal": True} if form == "causal" else {"frames": frames}
        out, state = poly_mix(h, weights=weights, **causal, **rest)
    return (out if frames is None else op.repeat_frames(out, frames)), state


def spec(form, axes=0, **changes):
    return Spec(
        op=functools.partial(mixed, form=form, axes=axes),
        make=make_inputs,
        time_axis={"h": 1, "weights": 1},
        batch_axis={"h": 0, "weights": 0},
        grad=("h", "coeff", "state"),
        constant=("count",),
        **{"variants": XLA, "block": 4, "causal": form == "causal"} | changes,
    )


# What does not depend on the form is checked on causal rows.
ONCE = ("vmap", "remat", "shard_map", "state", "reference-T3", "reference-T4")
test_causal = kernel_tests(spec("causal"))
test_mean = kernel_tests(spec("mean", skip=("vmap", "remat", "reference-T3")))
test_frames = kernel_tests(spec("frames", skip=("vmap", "remat", "reference-T3")))
test_rotated = kernel_tests(spec("causal", axes=1, skip=(*ONCE, "prefix", "split", "no_state")))
test_rotated_in_two = kernel_tests(spec("mean", axes=2, skip=(*ONCE, "no_state")))


def draw(length=13, seed=0, **changes):
    inputs = make_inputs(np.random.default_rng(seed), length, np.float32)
    inputs.pop("state")
    return {k: jnp.asarray(v) for k, v in inputs.items()} | changes


def loop(h, coeff, sees):
    """Rows as a loop over queries and tokens in numpy; sees [B, R, N]."""
    act = np.clip(np.where(h >= 0, h, 0.01 * h), -0.1, 6)
    p = sum(coeff[:, j] * act ** (j + 1) for j in range(coeff.shape[1]))
    rows = np.zeros((*sees.shape[:2], h.shape[2]))
    for b, r in np.ndindex(*sees.shape[:2]):
        if sees[b, r].sum() > 0:
            rows[b, r] = sees[b, r] @ p[b] / sees[b, r].sum()
    return rows


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("form", ["mean", "causal", "frames", "query"])
def test_equals_the_definition(form, implementation):
    """A loop in numpy agrees to 1e-12, degrees 1, 2 and 6, rows that see nothing included."""
    rng = np.random.default_rng(0)
    n, frames = 9, (4, 2, 3)
    h, weights = 4 * rng.standard_normal((3, n, E)), rng.integers(0, 3, (3, n))
    weights[1, :5] = 0
    weights[2] = 0
    ends = {"mean": [n], "causal": range(1, n + 1), "frames": np.cumsum(frames), "query": []}[form]
    sees = np.stack([np.arange(n) < end for end in ends] or [np.zeros(n)]) * weights[:, None]
    form = {"causal": {"causal": True}, "frames": {"frames": frames}}.get(form, {}) | {
        "weights": jnp.asarray(weights)
    }
    if not len(ends):
        sees = rng.random((3, 5, n)) * (rng.random((3, 5, n)) < 0.4)
        sees[1, 2] = 0
        form = {"query_weights": sees}
    with enable_x64():
        if "query_weights" in form:
            form = {"query_weights": jnp.asarray(sees)}
        for degree in (1, 2, 6):
            coeff = rng.standard_normal((E, degree)) * 0.1
            rows, _ = poly_mix(
                jnp.asarray(h), jnp.asarray(coeff), implementation=implementation, **form
            )
            np.testing.assert_allclose(rows, loop(h, coeff, sees), atol=1e-9)


def test_gradients_of_the_definition():
    """By finite differences in float64, away from the kinks, to the features, the coefficients and
    the state's mean."""
    rng = np.random.default_rng(0)
    with enable_x64():
        h = jnp.asarray(rng.choice([-20, -5, 1.5, 4, 8], (B, 6, E)) + rng.uniform(-1, 1, (B, 6, E)))
        coeff, mean = jnp.asarray(rng.standard_normal((E, 4)) / 8), jnp.ones((B, E))
        weights = jnp.asarray(rng.integers(0, 3, (B, 6)))

        def rows(h, coeff, mean):
            state = PolyState(mean, jnp.asarray([0.0, 2.5]))
            form = {"weights": weights, "causal": True, "implementation": "reference"}
            return poly_mix(h, coeff, state=state, **form)[0]

        check_grads(jax.jit(rows), (h, coeff, mean), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_slopes_at_the_kinks(implementation):
    """The intervals are closed: at 6 and 0 the slope is 1, at -10 it is 0.01, beyond it is 0."""
    h = jnp.asarray([6.0, 6.03125, 0.0, -0.0, -10.0, -10.0625], jnp.bfloat16)
    want = [1, 0, 1, 1, 0.01, 0]
    loss = lambda h: jnp.sum(
        poly_mix(h[None, None], jnp.ones((6, 1)), dtype=jnp.float32, implementation=implementation)[
            0
        ]
    )
    np.testing.assert_allclose(jax.grad(loss)(h), np.asarray(want, jnp.bfloat16))


@pytest.mark.parametrize(
    "form, implementation",
    [
        *itertools.product([{}, {"causal": True}], ["reference", "xla", "pallas_tpu"]),
        *itertools.product([{"frames": (6, 7)}, {"query": True}], ["reference", "xla"]),
        ({"frames": (13,)}, "pallas_tpu"),
    ],
)
def test_rows_that_see_nothing(form, implementation):
    """0, and gradients without NaN, even where h is NaN; the count is 0."""
    inputs = draw()
    h, weights = inputs["h"].at[0].set(jnp.nan), inputs["weights"].at[0].set(0)
    weights = weights.at[1, :7].set(0)
    h = jnp.where(weights[..., None] != 0, h, jnp.nan)
    form = (
        {"query_weights": jnp.stack([weights] * 2, 1)}
        if form.get("query")
        else form | {"weights": weights}
    )

    def loss(h, coeff):
        rows, state = poly_mix(h, coeff, implementation=implementation, **form)
        return jnp.sum(rows**2), (rows, state)

    grads, (rows, state) = jax.grad(loss, (0, 1), has_aux=True)(h, inputs["coeff"])
    assert not rows[0].any() and jnp.isfinite(rows).all() and rows[1, -1].any()
    assert all(jnp.isfinite(g).all() for g in grads) and not grads[0][0].any()
    if state is not None:
        assert state.count[0] == 0 and not state.mean[0].any()


def test_nan_is_not_hidden():
    """In a token that counts: a mean of NaN is NaN, or divergence would go unnoticed."""
    inputs = draw()
    rows, _ = poly_mix(inputs["h"].at[0, 3, 2].set(jnp.nan), inputs["coeff"])
    assert jnp.isnan(rows[0, 0, 2]) and jnp.isfinite(rows[1]).all()


def test_pieces_merge():
    """States of unequal pieces, merged in any order of pairs, are the state of the whole; frames
    continue a state like rows of one call."""
    inputs = draw()
    h, coeff, weights = inputs["h"], inputs["coeff"], inputs["weights"]
    rows, whole = poly_mix(h, coeff, weights=weights, frames=(3, 1, 6, 3))
    states, outs, before, start = [], [], None, 0
    for length in (3, 1, 6, 3):
        part = slice(start, start := start + length)
        piece = functools.partial(poly_mix, h[:, part], coeff, weights=weights[:, part])
        states.append(piece()[1])
        out, before = piece(state=before)
        outs.append(out)
    a, b, c, d = states
    for merged in (
        op.merge_states(op.merge_states(a, b), op.merge_states(c, d)),
        op.merge_states(a, op.merge_states(b, op.merge_states(c, d))),
        before,
    ):
        assert_close(to_numpy(merged), to_numpy(whole), 1e-6, "merged ")
    np.testing.assert_allclose(jnp.concatenate(outs, 1), rows, atol=1e-5)
    nothing = op.init_state(B, E)
    assert_close(to_numpy(op.merge_states(nothing, a)), to_numpy(a), 1e-6, "with nothing before ")


def test_counts_are_exact_in_bfloat16():
    """300 tokens of weight 1 count 300, where bfloat16 stops at 256; long streams stay means."""
    h = jnp.ones((1, 300, 2), jnp.bfloat16)
    weights = jnp.ones((1, 300), jnp.bfloat16)
    rows, state = poly_mix(h, jnp.ones((2, 1)), weights=weights, causal=True)
    assert state.count[0] == 300 and (rows == 1).all() and state.mean.dtype == jnp.float32
    late = PolyState(jnp.full((1, 2), 2.0), jnp.full((1,), 1e6))
    _, state = poly_mix(h, jnp.ones((2, 1)), state=late)
    np.testing.assert_allclose(state.mean, 2 - 300 / 1000300, rtol=1e-6)


@pytest.mark.parametrize("n", [8, 16, 17, 40])
def test_prefix_sums_in_blocks(n, monkeypatch):
    """The form for GPUs, which is that of whole blocks: sums and their gradient."""
    monkeypatch.setattr(dispatch, "current_device", lambda: "gpu:described")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, n, 3)))
    weigh = lambda f: lambda x: jnp.sum(jnp.sin(f(x)))
    np.testing.assert_allclose(prefix_sums(x), jnp.cumsum(x, 1), atol=1e-5)
    got, want = (jax.grad(weigh(f))(x) for f in (prefix_sums, lambda x: jnp.cumsum(x, 1)))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_block_causal_cost_is_linear():
    """Neither form makes an array of N x N, forwards or backwards."""
    n = 64
    h = jax.ShapeDtypeStruct((1, n, 4), jnp.float32)
    coeff = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    for form in ({"causal": True}, {"frames": (16,) * 4}, {"frames": (20, 20, 24)}):
        loss = lambda h, c, form=form: jnp.sum(poly_mix(h, c, **form)[0] ** 2)
        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(h, coeff)
        assert str(n * n) not in str(jaxpr) and f"{n},{n}" not in str(jaxpr)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"coeff": np.ones((3, 2), np.float32)}, r"coeff has shape \(3, 2\), expected \(8, degree"),
        ({"weights": np.ones((B, 4), np.float32)}, "weights has shape"),
        ({"frames": (5, 5)}, "frames .5, 5. are not lengths that add up to N=13"),
        ({"frames": (13,), "causal": True}, "two masks"),
        ({"query_weights": np.ones((1, 2, 13))}, "query_weights say all"),
        ({"query_weights": np.ones((2, 13)), "weights": None}, "query_weights has shape"),
        ({"state": (np.zeros((B, 3)), np.zeros(B))}, "state has shapes"),
        ({"rotation": op.Rotation(*np.zeros((2, 13, 1, 3)))}, "rotation has shape"),
        ({"h": np.ones((B, 13, E), np.int32)}, "h is int32"),
        ({"implementation": "cuda"}, "'cuda' does not exist"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        poly_mix(**draw(**change))


@pytest.mark.parametrize(
    "form, implementation, plain",
    [
        *itertools.product([{}, {"causal": True}, {"frames": (1, 3)}], ["xla"], [False, True]),
        *itertools.product([{}, {"causal": True}, {"frames": (2, 2)}], ["pallas_tpu"], [False]),
        ({"causal": True}, "reference", False),
    ],
)
def test_sharded_tokens_equal_one_device(form, implementation, plain):
    """Values and gradients on eight devices, from a state and with weights, some shards without
    any and NaN there; or without either."""
    inputs = draw(32)
    before = PolyState(inputs["h"][:, 0], jnp.asarray([3.0, 0.0]))
    if plain:
        weights = before = None
    else:
        weights = inputs["weights"].at[1, :8].set(0).at[0, 12:20].set(0)
        inputs["h"] = jnp.where(weights[..., None] != 0, inputs["h"], jnp.nan)
    mesh = auto_mesh((8,), ("time",))
    cut, whole = P(None, "time"), P()
    rows = cut if form else whole
    single = {"frames": form["frames"] * 8} if "frames" in form else form

    def spread_out(h, coeff, weights, state):
        local = functools.partial(
            poly_mix_sharded, axis_name="time", implementation=implementation, **form
        )
        run = lambda h, coeff, weights, state: local(h, coeff, weights=weights, state=state)
        specs = {"in_specs": (cut, whole, cut, whole), "out_specs": (rows, whole)}
        return jax.shard_map(run, mesh=mesh, check_vma=True, **specs)(h, coeff, weights, state)

    def run(op):
        def loss(h, coeff, state):
            rows, last = op(h, coeff, weights, state)
            return jnp.sum(jnp.sin(rows)) + jnp.sum(last.mean**2), (rows, last)

        moving = (0, 1) if plain else (0, 1, 2)
        go = jax.jit(jax.grad(loss, moving, has_aux=True))
        return to_numpy(go(inputs["h"], inputs["coeff"], before))

    want = run(
        lambda h, c, w, s: poly_mix(h, c, weights=w, state=s, implementation="xla", **single)
    )
    (grads, out), (want_grads, want_out) = run(spread_out), want
    assert_close(out, want_out, 1e-5, "sharded ")
    drop = lambda g: g if plain else (*g[:2], g[2].mean)
    assert_close(drop(grads), drop(want_grads), 1e-5, "sharded gradient ")
