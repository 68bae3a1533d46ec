"""Gaussian diffusion: respacing, tables, distributions, and losses against their definitions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.processes import gaussian
from lintime.model.processes.gaussian import GaussianDiffusion, gaussian_tables, respaced_timesteps
from tests.golden.quick import quick_jit

SHAPE = (4, 3, 3, 2)


def draw(seed, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape)


# ---------------------------------------------------------------- respacing and tables


def test_respacing_by_sections():
    assert respaced_timesteps(1000, "") == tuple(range(1000))
    for count in (2, 250, 1000):
        kept = respaced_timesteps(1000, str(count))
        assert len(kept) == count and kept[0] == 0 and kept[-1] == 999
    assert respaced_timesteps(1000, "1") == (0,)
    # 10 timesteps in sections of 4, 3, 3: the longer first.
    assert respaced_timesteps(10, "2,2,1") == (0, 3, 4, 6, 7)
    # Stride 2.5: halves go to the even neighbour.
    assert respaced_timesteps(11, "5") == (0, 2, 5, 8, 10)


def test_respacing_by_stride():
    assert respaced_timesteps(1000, "ddim50") == tuple(range(0, 1000, 20))
    assert respaced_timesteps(10, "ddim4") == (0, 3, 6, 9)


@pytest.mark.parametrize(
    "text, word",
    [
        ("ddim999", "no stride"), ("11", "wants 11"), ("x", "respacing='x'"), ("0", "'0'"),
        ("ddim2,3", "one number"), ("2,,3", "respacing"), ("4,4,4", "section 2"), ("-3", "'-3'"),
    ],
)  # fmt: skip
def test_respacing_refused(text, word):
    with pytest.raises(ValueError, match=word):
        respaced_timesteps(10, text)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_respacing_keeps_noise_levels(schedule):
    process = GaussianDiffusion(timesteps=100, schedule=schedule)
    whole, part = gaussian_tables(process), gaussian_tables(process, "7")
    assert part.steps == 7 and part.alphas_cumprod.dtype == np.float64
    np.testing.assert_allclose(
        part.alphas_cumprod, whole.alphas_cumprod[part.timestep_map], rtol=1e-10
    )
    assert whole.alphas_cumprod[-1] < 1e-2 or schedule == "linear"
    np.testing.assert_array_equal(gaussian_tables(process, part.timestep_map).betas, part.betas)


def test_schedule_scales_with_length():
    betas = gaussian.noise_schedule(GaussianDiffusion())
    assert betas[0] == 1e-4 and betas[-1] == 0.02
    assert gaussian.noise_schedule(GaussianDiffusion(timesteps=500))[-1] == 0.04
    assert gaussian.noise_schedule(GaussianDiffusion(timesteps=50, schedule="squaredcos_cap_v2"))[
        -1
    ] == pytest.approx(0.999)


def test_one_step():
    tables = gaussian_tables(GaussianDiffusion(), "1")
    assert tables.posterior_log_variance_clipped[0] == np.log(tables.betas[0])
    assert all(np.isfinite(t).all() for t in tables)


def test_timesteps_out_of_order():
    for kept in ((3, 2), (0, 100), (-1, 2), ()):
        with pytest.raises(ValueError, match="ascending"):
            gaussian_tables(GaussianDiffusion(timesteps=100), kept)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "cosine"}, {"predict": "v"}, {"variance": "learned"}, {"loss": "l1"},
        {"timesteps": 0}, {"timesteps": 20}, {"variance": "fixed_small", "loss": "rescaled_mse"},
    ],
)  # fmt: skip
def test_settings_refused(options):
    with pytest.raises(ValueError, match=str(list(options.values())[-1])):
        GaussianDiffusion(**options)


# ---------------------------------------------------------------- distributions


def test_posterior_is_bayes():
    """Product of N(x_t; sqrt(alpha) x, beta) and N(x; sqrt(abar_prev) x_0, 1 - abar_prev) in x."""
    tables = gaussian_tables(GaussianDiffusion(timesteps=30))
    x0, x_t, t = 0.7, -0.3, 12
    beta, prev = tables.betas[t], tables.alphas_cumprod_prev[t]
    precision = (1 - beta) / beta + 1 / (1 - prev)
    mean = (np.sqrt(1 - beta) * x_t / beta + np.sqrt(prev) * x0 / (1 - prev)) / precision
    got = gaussian.posterior(tables, jnp.full((1, 1), x0), jnp.full((1, 1), x_t), jnp.full((1,), t))
    np.testing.assert_allclose(got[0], [[mean]], rtol=1e-5)
    np.testing.assert_allclose(np.exp(got[1]), [[1 / precision]], rtol=1e-5)


def test_predictions_of_each_kind_agree():
    """The same belief, said as noise or as clean image, and mean = that of the posterior."""
    by_eps = GaussianDiffusion(timesteps=50, variance="fixed_small")
    by_x = dataclasses.replace(by_eps, predict="x_start")
    tables = gaussian_tables(by_eps)
    x_t, x0, t = draw(0), draw(1), jnp.array([0, 1, 20, 49])
    eps = gaussian.eps_from_x_start(tables, x_t, t, x0)
    one = gaussian.predictions(by_eps, tables, eps, x_t, t)
    two = gaussian.predictions(by_x, tables, x0, x_t, t)
    truths = (*gaussian.posterior(tables, x0, x_t, t), x0)
    for a, b, truth in zip(one, two, truths):
        np.testing.assert_allclose(a, b, atol=2e-4)
        np.testing.assert_allclose(b, truth, atol=1e-6)
    clipped = gaussian.predictions(by_x, tables, 3 * x0, x_t, t, clip=True)
    np.testing.assert_array_equal(clipped.x_start, jnp.clip(3 * x0, -1, 1))


def test_variances():
    tables = gaussian_tables(GaussianDiffusion(timesteps=50))
    x_t, out, t = draw(0), draw(1), jnp.array([0, 1, 20, 49])
    found = {}
    for variance in ("fixed_small", "fixed_large"):
        process = GaussianDiffusion(timesteps=50, variance=variance)
        found[variance] = gaussian.predictions(process, tables, out, x_t, t).log_variance
    learned = GaussianDiffusion(timesteps=50)
    betas = np.log(tables.betas)[t].reshape(4, 1, 1, 1)
    for v, same in ((-1.0, found["fixed_small"]), (1.0, betas)):
        whole = jnp.concatenate([out, jnp.full_like(out, v)], axis=-1)
        got = gaussian.predictions(learned, tables, whole, x_t, t).log_variance
        np.testing.assert_allclose(got, np.broadcast_to(same, SHAPE), rtol=1e-6)
    large = np.log(np.append(tables.posterior_variance[1], tables.betas[1:]))[t]
    np.testing.assert_allclose(found["fixed_large"][:, 0, 0, 0], large, rtol=1e-6)
    np.testing.assert_allclose(
        found["fixed_small"][:2, 0, 0, 0], np.log(tables.posterior_variance[1]), rtol=1e-6
    )


def test_wrong_channels():
    tables = gaussian_tables(GaussianDiffusion(timesteps=50))
    with pytest.raises(ValueError, match="gives 2 channels.*needs 4"):
        gaussian.predictions(GaussianDiffusion(), tables, draw(0), draw(0), jnp.zeros(4, int))
    fixed = GaussianDiffusion(variance="fixed_large")
    with pytest.raises(ValueError, match="gives 4 channels.*needs 2"):
        gaussian.predictions(fixed, tables, draw(0, (4, 3, 3, 4)), draw(0), jnp.zeros(4, int))


def test_likelihood_of_all_bins_is_one():
    x = jnp.arange(256) * (2 / 255) - 1
    for mean, scale in ((0.1, 0.2), (-0.95, 0.05), (0.99, 0.5)):
        log_p = gaussian.discretised_log_likelihood(x, mean, math.log(scale))
        assert float(jnp.sum(jnp.exp(log_p))) == pytest.approx(1.0, abs=1e-4)
        # Inside, a bin holds about its width times the density.
        at = int(jnp.argmin(jnp.abs(x - mean))) if scale == 0.2 else 128
        z = (float(x[at]) - mean) / scale
        density = math.exp(-0.5 * z * z) / (scale * math.sqrt(2 * math.pi))
        assert float(jnp.exp(log_p[at])) == pytest.approx(2 / 255 * density, rel=0.02, abs=1e-6)


def test_tails_to_the_last_bit():
    """What is left of 1 - tanh in float32 makes the logs of tail probabilities."""
    y = np.linspace(0.6, 9, 2000, dtype=np.float32)
    got = np.asarray(quick_jit(gaussian._tanh)(y))
    exact = np.tanh(y.astype(np.float64)).astype(np.float32)
    assert np.max(np.abs(got - exact)) <= 2.0**-24
    assert np.mean(got != exact) < 0.05
    np.testing.assert_array_equal(quick_jit(gaussian._tanh)(-y), -got)
    slope = quick_jit(jax.vmap(jax.grad(gaussian._tanh)))(jnp.array([-50.0, -0.3, 0.0, 0.3, 1.0]))
    np.testing.assert_allclose(slope, 1 - np.tanh([-50, -0.3, 0, 0.3, 1.0]) ** 2, rtol=1e-5)


# ---------------------------------------------------------------- losses


def constant(out):
    """A net that says `out` whatever it sees."""
    return lambda x_t, t: out


def test_perfect_net_has_no_loss():
    """Truth with the posterior's variance: no squared error, no bits but at t = 0."""
    process = GaussianDiffusion(timesteps=50)
    x, noise, t = 0.5 * draw(0), draw(1), jnp.array([0, 1, 20, 49])
    out = jnp.concatenate([noise, jnp.full_like(noise, -1.0)], axis=-1)
    loss, parts = gaussian.training_loss(process, constant(out), x, t, noise)
    np.testing.assert_array_equal(parts["mse"], 0)
    np.testing.assert_allclose(parts["vb"][1:], 0, atol=1e-4)
    assert parts["vb"][0] > 0.1
    np.testing.assert_allclose(loss, parts["vb"])
    assert loss.dtype == jnp.float32 and loss.shape == (4,)


def test_bound_is_in_bits_per_dimension():
    """At v = 1 the variances differ by a known ratio: KL = (log r - 1 + 1 / r) / 2 nats."""
    process = GaussianDiffusion(timesteps=50)
    tables = gaussian_tables(process)
    x, noise, t = draw(0), draw(1), jnp.array([1, 2, 20, 49])
    out = jnp.concatenate([noise, jnp.ones_like(noise)], axis=-1)
    _, parts = gaussian.training_loss(process, constant(out), x, t, noise)
    ratio = (tables.betas / np.exp(tables.posterior_log_variance_clipped))[t]
    bits = 0.5 * (np.log(ratio) - 1 + 1 / ratio) / np.log(2)
    np.testing.assert_allclose(parts["vb"], bits, rtol=1e-3, atol=1e-6)


def test_the_bound_moves_variances_only():
    x, noise, t = draw(0), draw(1), jnp.array([0, 1, 20, 49])
    out = draw(2, (*SHAPE[:-1], 4))

    def gradient(process, part):
        loss = lambda out: jnp.sum(
            gaussian.training_loss(process, constant(out), x, t, noise)[1][part]
        )
        grad = quick_jit(jax.grad(loss))(out)
        return float(jnp.abs(grad[..., :2]).max()), float(jnp.abs(grad[..., 2:]).max())

    mse = GaussianDiffusion(timesteps=50)
    mean, variance = gradient(mse, "vb")
    assert mean == 0 and variance > 0
    mean, variance = gradient(mse, "mse")
    assert mean > 0 and variance == 0
    mean, variance = gradient(GaussianDiffusion(timesteps=50, loss="kl"), "vb")
    assert mean > 0 and variance > 0


def test_rescaled_losses():
    x, noise, t = draw(0), draw(1), jnp.array([0, 1, 5, 9])
    out = draw(2, (*SHAPE[:-1], 4))

    def loss(name, **options):
        process = GaussianDiffusion(timesteps=200, loss=name, **options)
        return gaussian.training_loss(process, constant(out), x, t, noise, respacing="10")

    total, plain = loss("mse")
    np.testing.assert_allclose(total, plain["mse"] + plain["vb"])
    total, parts = loss("rescaled_mse")
    np.testing.assert_allclose(total, plain["mse"] + plain["vb"] * 10 / 1000, rtol=1e-6)
    np.testing.assert_allclose(loss("kl")[0], plain["vb"], rtol=1e-6)
    np.testing.assert_allclose(loss("rescaled_kl")[0], 10 * plain["vb"], rtol=1e-6)


def test_net_sees_original_timesteps():
    seen = []

    def denoise(x_t, t):
        seen.append(t)
        return jnp.zeros((*x_t.shape[:-1], 4))

    t = jnp.array([0, 1, 2, 3])
    gaussian.training_loss(GaussianDiffusion(), denoise, draw(0), t, draw(1), respacing="4")
    np.testing.assert_array_equal(seen[0], [0, 333, 666, 999])
    assert seen[0].dtype == jnp.int32


def test_draw_times():
    times = gaussian.draw_times(
        GaussianDiffusion(timesteps=5, schedule="squaredcos_cap_v2"), jax.random.key(0), 400
    )
    assert sorted(set(times.tolist())) == [0, 1, 2, 3, 4] and times.dtype == jnp.int32


def test_bits_per_dim():
    """A net that knows the image pays the prior and the last bin only."""
    process = GaussianDiffusion(timesteps=30)
    x = jnp.clip(0.5 * draw(0), -1, 1)
    tables = gaussian_tables(process)

    def denoise(x_t, t):
        eps = gaussian.eps_from_x_start(tables, x_t, t, x)
        return jnp.concatenate([eps, jnp.full_like(eps, -1.0)], axis=-1)

    noise = lambda k: draw(k)
    found = jax.jit(lambda x: gaussian.bits_per_dim(process, denoise, x, noise))(x)
    assert found["vb"].shape == (4, 30)
    np.testing.assert_allclose(found["vb"][:, :-1], 0, atol=1e-3)
    assert (np.asarray(found["vb"][:, -1]) > 0.1).all()
    np.testing.assert_allclose(found["x_start_mse"], 0, atol=1e-6)
    np.testing.assert_allclose(found["mse"], 0, atol=1e-4)
    level = tables.alphas_cumprod[-1]
    moment = jnp.mean(jnp.square(x), axis=(1, 2, 3))
    prior = 0.5 * (-1 - np.log(1 - level) + 1 - level + level * moment) / np.log(2)
    np.testing.assert_allclose(found["prior"], prior, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found["total"], found["prior"] + found["vb"].sum(1), rtol=1e-5)
