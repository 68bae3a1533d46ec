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


@pytest.mark.parametrize(
    "path, predict",
    [(p, says) for p in PATHS for says in ("velocity", "noise", "score")] + [("linear", "data")],
)
def test_scaled_noise_is_the_usual_one_in_other_units(path, predict):
    """A net for noise of size s on data x is one for noise of size 1 on x / s."""
    scale = 2.5
    usual = FlowMatching(path=path, predict=predict)
    scaled = FlowMatching(path=path, predict=predict, noise_scale=scale)
    x, out, noise = draw(0), draw(1), draw(2)
    said = {"velocity": scale * out, "noise": out, "score": out / scale, "data": scale * out}
    by_velocity = lambda f: lambda p, out, x, t: f(p, flow.velocity(p, out, x, t), x, t)
    pairs = [
        (flow.velocity, scale), (flow.score, 1 / scale),
        (by_velocity(flow.score_from_velocity), 1 / scale),
        (by_velocity(flow.noise_from_velocity), 1.0),
        (by_velocity(lambda *a: flow.ends(*a)[0]), scale),
        (by_velocity(lambda *a: flow.ends(*a)[1]), 1.0),
        (lambda p, out, x, t: flow.interpolate(p, x, t, noise)[0], scale),
        (lambda p, out, x, t: flow.interpolate(p, x, t, noise)[1], scale),
    ]  # fmt: skip
    for convert, factor in pairs:
        got, want = convert(scaled, said[predict], scale * x, TIMES), convert(usual, out, x, TIMES)
        size = float(jnp.abs(want).max())
        np.testing.assert_allclose(got / factor, want, rtol=1e-3, atol=1e-4 * size)
    loss = lambda process, out, x: flow.training_loss(process, lambda *_: out, x, TIMES, noise)[0]
    factor = {"velocity": scale**2, "data": scale**2}.get(predict, 1.0)
    np.testing.assert_allclose(
        loss(scaled, said[predict], scale * x) / factor, loss(usual, out, x), rtol=1e-4
    )


def test_data_have_a_velocity():
    """That of the best guess of Gaussian data; near t = 1 as if 1 - t were `floor`."""
    process, x = FlowMatching(predict="data"), draw(0)
    truth = known("linear", x, TIMES)
    total = (TIMES**2 * 0.25 + (1 - TIMES) ** 2).reshape(-1, 1, 1, 1)
    out = TIMES.reshape(-1, 1, 1, 1) * 0.25 / total * x
    np.testing.assert_allclose(flow.velocity(process, out, x, TIMES), truth["velocity"], atol=1e-4)
    np.testing.assert_allclose(flow.score(process, out, x, TIMES), truth["score"], rtol=1e-3)
    late = flow.velocity(process, out, x, jnp.array(0.99))
    np.testing.assert_allclose(late, (out - x) / 0.05, rtol=1e-5)


def test_loss_of_data_is_that_of_their_velocity():
    process, x, noise = FlowMatching(predict="data", floor=0.1), draw(0), draw(1)
    loss, _ = flow.training_loss(process, lambda x_t, t: x, x, TIMES, noise)
    np.testing.assert_array_equal(loss, 0)
    off, parts = flow.training_loss(process, lambda x_t, t: x + 1, x, TIMES, noise)
    np.testing.assert_allclose(off, 1 / np.array([0.95, 0.7, 0.3, 0.1]) ** 2, rtol=1e-4)
    np.testing.assert_array_equal(off, parts["mse"])


def test_logit_normal_times():
    process = FlowMatching(times="logit_normal", time_mean=-0.8, time_std=0.8)
    drawn = flow.draw_times(process, jax.random.key(0), 20000)
    spread = flow.spread_times(process, jax.random.key(0), 1000)
    for t in (drawn, spread):
        assert t.dtype == jnp.float32
        logits = np.log(t) - np.log1p(-np.float64(t))
        assert np.mean(logits) == pytest.approx(-0.8, abs=0.02)
        assert np.std(logits) == pytest.approx(0.8, abs=0.02)
    assert np.all(np.diff(spread) > 0)


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
    assert interval(FlowMatching(predict="data")) == (0.0, 1.0)
    assert interval(FlowMatching(predict="data"), form="sigma") == (0.0, 1 - 1e-3)
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
    [
        {"path": "cosine"}, {"predict": "eps"}, {"weighting": "snr"}, {"weighting": "likelihood"},
        {"times": "normal"}, {"time_mean": -0.8}, {"times": "logit_normal", "time_std": 0.0},
        {"noise_scale": -1.0}, {"floor": 0.1}, {"predict": "data", "floor": 0.0},
        {"predict": "data", "path": "vp"}, {"predict": "data", "weighting": "velocity"},
    ],
)  # fmt: skip
def test_settings_refused(options):
    with pytest.raises(ValueError, match=str(list(options.values())[-1])):
        FlowMatching(**options)


def test_wrong_channels():
    with pytest.raises(ValueError, match="gives 4 channels for 3"):
        flow.velocity(FlowMatching(), jnp.zeros((4, 2, 2, 4)), draw(0), TIMES)
