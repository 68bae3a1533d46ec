"""Polynomial mixer: the TPU kernels in Pallas' interpreter against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.kernels_pallas import dispatch, poly_mix as op
from lintime.kernels_pallas.poly_mix import PolyState, pallas_tpu, poly_mix

from .kernel_base import assert_close, check_remat, check_vmap, kernel_tests, to_numpy
from .test_poly_mix import B, draw, spec

TPU = {"pallas_tpu": {"implementation": "pallas_tpu"}}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of two chunks of two tiles, that a few tokens fill and leave."""
    monkeypatch.setattr(pallas_tpu, "BLOCK_T", 32)
    monkeypatch.setattr(pallas_tpu, "CHUNK", 16)


# The TPU's interpreter goes neither through vmap nor remat (see below), and it is slow. "split"
# implies "prefix", and states without tokens are not up to the kernels.
APART = ("vmap", "remat", "prefix", "state", "no_state", "reference-T15", "reference-T16")
test_causal_tpu = kernel_tests(spec("causal", variants=TPU, block=16, skip=APART))
test_mean_tpu = kernel_tests(
    spec("mean", variants=TPU, block=16, skip=(*{*APART} - {"prefix"}, "bfloat16"))
)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_vmap, check_remat])
@pytest.mark.parametrize("form", ["mean", "causal"])
def test_tpu_kernels_under_vmap_and_remat(check, form, monkeypatch):
    """By Pallas' plain interpreter, which knows nothing of TPUs but goes through both."""
    monkeypatch.setattr(dispatch, "interpret", lambda platform: True)
    check(spec(form, variants=TPU, block=16), "pallas_tpu")


@pytest.mark.parametrize(
    "form, degree, dtype",
    [
        ({}, 8, jnp.float32),
        ({"causal": True}, 8, jnp.float32),
        ({"frames": (9,) * 5}, 1, jnp.float32),
        ({"frames": (40, 40)}, 4, jnp.bfloat16),
        slow({"causal": True}, 1, jnp.float32),
        slow({"causal": True}, 4, jnp.bfloat16),
        slow({}, 4, jnp.bfloat16),
        slow({}, 1, jnp.float32),
        slow({"frames": (40, 40)}, 8, jnp.float32),
    ],
)
def test_tpu_kernels_at_odd_sizes(form, degree, dtype, monkeypatch):
    """Values and gradients of all degrees and forms, of more channels than a block, with and
    without weights and states; NaN where there is no weight."""
    monkeypatch.setattr(pallas_tpu, "BLOCK_E", 128)
    rng, width = np.random.default_rng(3), 131
    n = sum(form.get("frames", (37,)))
    h = jnp.asarray(4 * rng.standard_normal((B, n, width)) - 1, dtype)
    coeff = jnp.asarray(rng.standard_normal((width, degree)) / 4.0 ** np.arange(degree), "float32")
    state = PolyState(jnp.asarray(rng.standard_normal((B, width)), "float32"), jnp.array([0.0, 7]))
    weights = jnp.asarray(rng.integers(0, 3, (B, n))).at[1, : n // 2].set(0)
    seed = jnp.asarray(rng.standard_normal((B, n, width)), jnp.float32)

    def run(implementation, plain):
        def loss(h, coeff, state):
            options = {} if plain else {"weights": weights, "state": state}
            rows, last = poly_mix(h, coeff, implementation=implementation, **options, **form)
            rows = rows.astype(jnp.float32)
            total = jnp.sum(rows * seed[:, : rows.shape[1]]) + jnp.sum(last.mean * seed[:, 0])
            return total, (rows, last)

        x = h if plain else jnp.where(weights[..., None] != 0, h, jnp.nan)
        grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, coeff, state)
        return to_numpy((out, grads[:2], grads[2].mean))

    for plain in (False, True):
        tolerance = 2e-5 if dtype == jnp.float32 else 2e-2
        got, want = run("pallas_tpu", plain), run("reference", plain)
        assert_close(got, want, tolerance, f"plain={plain} ")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frames": (6, 7)}, "pallas_tpu does not take frames of different lengths; use .xla"),
        ({"query_weights": np.ones((1, 2, 13)), "weights": None}, "does not take query_weights"),
        ({"rotation": op.Rotation(*np.zeros((2, 13, 1, 4)))}, "does not take a rotation"),
    ],
)
def test_what_the_tpu_kernels_do_not_take(change, message):
    with pytest.raises(ValueError, match=message):
        poly_mix(**draw(**change), implementation="pallas_tpu")
    rows, _ = poly_mix(**draw(**change))
    assert jnp.isfinite(rows).all()
