"""Flow matching: paths by differentiation, conversions on a known distribution, losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.processes import flow
from lintime.model.processes.flow import FlowMatching
from tests.golden.quick import quick_jit

PATHS = ("linear", "gvp", "vp")
TIMES = jnp.array([0.05, 0.3, 0.7, 0.95])
SHAPE = (4, 2, 2, 3)


def draw(seed):
    return jax.random.normal(jax.random.key(seed), SHAPE)


@pytest.mark.parametrize("path", PATHS)
def test_derivatives(path):
    c = flow.path_coefficients(path, TIMES)
    slope = lambda name: quick_jit(
        jax.vmap(jax.grad(lambda t: getattr(flow.path_coefficients(path, t), name)))
    )
    np.testing.assert_allclose(c.d_alpha, slope("alpha")(TIMES), rtol=2e-5)
    np.testing.assert_allclose(c.d_sigma, slope("sigma")(TIMES), rtol=2e-4)


@pytest.mark.parametrize("path", PATHS)
def test_from_noise_to_data(path):
    start = flow.path_coefficients(path, jnp.array(0.0))
    end = flow.path_coefficients(path, jnp.array(1.0))
    assert float(start.alpha) < 0.01 and float(start.sigma) > 0.99
    assert float(end.alpha) == 1.0 and float(end.sigma) == pytest.approx(0.0, abs=1e-6)
    if path != "linear":  # variance preserving
        c = flow.path_coefficients(path, TIMES)
        np.testing.assert_allclose(c.alpha**2 + c.sigma**2, 1.0, rtol=1e-6)


def known(path, x, t, variance=0.25):
    """Velocity, score and expected noise at x of data N(0, variance)."""
    c = flow.path_coefficients(path, t)
    alpha, sigma, d_alpha, d_sigma = (v.reshape(-1, 1, 1, 1) for v in c)
    total = alpha**2 * variance + sigma**2
    velocity = (d_alpha * alpha * variance + d_sigma * sigma) / total * x
    return {"velocity": velocity, "score": -x / total, "noise": sigma * x / total}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("predict", ["velocity", "noise", "score"])
def test_conversions(path, predict):
    """Whatever a net says of Gaussian data, its velocity and score are the true ones."""
    process = FlowMatching(path=path, predict=predict)
    x = draw(0)
    truth = known(path, x, TIMES)
    scale = 1e-4 * float(jnp.abs(truth["velocity"]).max())
    unused = jnp.full_like(x, jnp.nan)  # the variance half of DiT's layout
    for out in (truth[predict], jnp.concatenate([truth[predict], unused], axis=-1)):
        got = flow.velocity(process, out, x, TIMES)
        np.testing.assert_allclose(got, truth["velocity"], rtol=1e-4, atol=scale)
        got = flow.score(process, out, x, TIMES)
        np.testing.assert_allclose(got, truth["score"], rtol=1e-3, atol=1e-3)
    got = flow.noise_from_velocity(process, truth["velocity"], x, TIMES)
    np.testing.assert_allclose(got, truth["noise"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("predict", ["velocity", "noise", "score"])
def test_loss_of_the_truth(path, predict):
    process = FlowMatching(path=path, predict=predict)
    x, noise = draw(0), draw(1)
    c = flow.path_coefficients(path, TIMES)
    sigma = c.sigma.reshape(-1, 1, 1, 1)
    target = {
        "velocity": flow.interpolate(process, x, TIMES, noise)[1],
        "noise": noise,
        "score": -noise / sigma,
    }[predict]
    loss, _ = flow.training_loss(process, lambda x_t, t: target, x, TIMES, noise)
    np.testing.assert_allclose(loss, 0, atol=1e-9)
    off, parts = flow.training_loss(process, lambda x_t, t: target + 1, x, TIMES, noise)
    np.testing.assert_allclose(off, c.sigma**2 if predict == "score" else 1.0, rtol=1e-4)
    np.testing.assert_array_equal(off, parts["mse"])


@pytest.mark.parametrize("path", PATHS)
def test_weights(path):
    x, noise = draw(0), draw(1)
    rows = {}
    for weighting in ("none", "velocity", "likelihood"):
        process = FlowMatching(path=path, predict="noise", weighting=weighting)
        rows[weighting] = flow.training_loss(process, lambda x_t, t: x_t, x, TIMES, noise)[0]
    sigma = flow.path_coefficients(path, TIMES).sigma
    _, d = flow.score_drift(process, TIMES, TIMES)
    np.testing.assert_allclose(rows["velocity"], rows["none"] * (d / sigma) ** 2, rtol=1e-5)
    np.testing.assert_allclose(rows["likelihood"], rows["none"] * d / sigma**2, rtol=1e-5)


def test_net_sees_time_as_it_is():
    seen = []

    def denoise(x_t, t):
        seen.append(t)
        return x_t

    flow.training_loss(FlowMatching(), denoise, draw(0), TIMES, draw(1))
    np.testing.assert_array_equal(seen[0], TIMES)


def test_draw_times():
    key = jax.random.key(0)
    for process, low, high in (
        (FlowMatching(), 0.0, 1.0),
        (FlowMatching(predict="score"), 1e-3, 1 - 1e-3),
        (FlowMatching(path="vp"), 0.0, 1 - 1e-5),
    ):
        t = flow.draw_times(process, key, 5000)
        assert t.dtype == jnp.float32 and low <= float(t.min()) and float(t.max()) <= high
        assert float(t.min()) < low + 2e-3 and float(t.max()) > high - 2e-3


def test_sampling_interval():
    interval = flow.sampling_interval
    assert interval(FlowMatching()) == (0.0, 1.0)
    assert interval(FlowMatching(predict="noise")) == (1e-3, 1 - 1e-3)
    assert interval(FlowMatching(path="vp")) == (0.0, 1 - 1e-3)
    assert interval(FlowMatching(), form="sigma", last_size=0.04) == (0.0, 0.96)
    assert interval(FlowMatching(), form="sbdm", last_size=0.04) == (1e-3, 0.96)


def test_diffusion_forms():
    process, t = FlowMatching(), jnp.array([0.0, 0.5, 1.0])
    expected = {
        "constant": [2, 2, 2], "sigma": [2, 1, 0], "linear": [2, 1, 0],
        "increasing_decreasing": [0, 2, 0], "decreasing": [2.25, 0.25, 0.25],
    }  # fmt: skip
    for form, values in expected.items():
        got = flow.diffusion(process, form, t, 2.0)
        np.testing.assert_allclose(got, values, atol=1e-6, err_msg=form)
    np.testing.assert_allclose(flow.diffusion(process, "sbdm", t[1:], 2.0), [2, 0])  # 2 (1 - t) / t
    with pytest.raises(ValueError, match="form='x'"):
        flow.diffusion(process, "x", t)


@pytest.mark.parametrize(
    "options",
    [{"path": "cosine"}, {"predict": "eps"}, {"weighting": "snr"}, {"weighting": "likelihood"}],
)
def test_settings_refused(options):
    with pytest.raises(ValueError, match=str(list(options.values())[-1])):
        FlowMatching(**options)


def test_wrong_channels():
    with pytest.raises(ValueError, match="gives 4 channels for 3"):
        flow.velocity(FlowMatching(), jnp.zeros((4, 2, 2, 4)), draw(0), TIMES)
