"""Solvers of diffusion and flow on Gaussian data, whose flow is known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.processes.flow import FlowMatching, path_coefficients
from lintime.model.processes.gaussian import GaussianDiffusion, gaussian_tables
from lintime.model.sampling.classes import row_keys
from lintime.model.sampling.diffusion import Segment, make_diffusion_sampler, make_trajectory
from lintime.model.sampling.solvers import SDE
from tests.golden.quick import quick_jit

SPREAD, CENTRE = 0.5, 0.3  # of the data, N(CENTRE, SPREAD^2) at every pixel


def exact_gaussian(process):
    """(net that knows the expected noise of such data, solution of the flow from step to step)."""
    tables = gaussian_tables(process)

    def denoise(variables, x, t, labels, mode):
        level = jnp.asarray(tables.alphas_cumprod, jnp.float32)[t].reshape(-1, 1, 1, 1)
        centred = x - jnp.sqrt(level) * CENTRE
        return jnp.sqrt(1 - level) * centred / (level * SPREAD**2 + 1 - level)

    def solve(x, start, end, steps):
        a, b = tables.alphas_cumprod[[960 * start // steps, 960 * end // steps]]
        total = lambda level: np.sqrt(level * SPREAD**2 + 1 - level)
        return np.sqrt(b) * CENTRE + (x - np.sqrt(a) * CENTRE) * total(b) / total(a)

    return denoise, solve


@pytest.mark.parametrize("method, order", [("ddim", 1), ("euler", 1), ("heun", 2), ("dpm++2m", 2)])
def test_order_on_gaussian_data(method, order):
    """Halving the steps' length divides the error by 2^order, at the worst of nine times."""
    process = GaussianDiffusion(timesteps=961, variance="fixed_small")
    denoise, solve = exact_gaussian(process)
    start = jax.random.normal(jax.random.key(0), (1, 2, 2, 1))
    errors = []
    for steps in (20, 40, 80):  # kept timesteps are exactly even: 960 is a multiple
        trajectory = make_trajectory(
            denoise, process, method=method, segments=(Segment(steps=steps + 1, guide="none"),),
            guidance_channels=0,
        )  # fmt: skip
        run = quick_jit(
            lambda z, f=trajectory: f(None, z, jnp.zeros_like, jnp.zeros(1, int), record=True)[1]
        )
        found, start64 = np.asarray(run(start)["x"], np.float64), np.asarray(start, np.float64)
        # Index i of the process is that of the state after iteration steps - 1 - i.
        at = steps * np.arange(1, 10) // 10
        off = [found[steps - 1 - i] - solve(start64, steps, i, steps) for i in at]
        errors.append(np.max(np.abs(off)))
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert errors[-1] < (0.02 if order == 1 else 0.001), errors
    assert orders[-1] == pytest.approx(order, abs=0.35), (orders, errors)


def exact_flow(path, predict):
    """A net that knows velocity, noise or score of such data, and the flow's solution."""
    c = lambda t: [v.reshape(-1, 1, 1, 1) for v in path_coefficients(path, t)]

    def denoise(variables, x, t, labels, mode):
        alpha, sigma, d_alpha, d_sigma = c(t)
        total = alpha**2 * SPREAD**2 + sigma**2
        centred = x - alpha * CENTRE
        if predict == "score":
            return -centred / total
        if predict == "noise":
            return sigma * centred / total
        slope = (d_alpha * alpha * SPREAD**2 + d_sigma * sigma) / total
        return d_alpha * CENTRE + slope * centred

    def solve(x, start, end):
        (a0, s0, *_), (a1, s1, *_) = (c(jnp.asarray(float(t))) for t in (start, end))
        total = lambda a, s: np.sqrt(a**2 * SPREAD**2 + s**2)
        return a1 * CENTRE + (x - a0 * CENTRE) * total(a1, s1) / total(a0, s0)

    return denoise, solve


@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_order_of_flows(path, method, order):
    denoise, solve = exact_flow(path, "velocity")
    start = jax.random.normal(jax.random.key(0), (1, 2, 2, 1))
    errors = []
    for steps in (10, 20, 40):
        trajectory = make_trajectory(
            denoise, FlowMatching(path=path), method=method,
            segments=(Segment(steps=steps, guide="none"),), guidance_channels=0,
        )  # fmt: skip
        run = quick_jit(lambda z, f=trajectory: f(None, z, jnp.zeros_like, jnp.zeros(1, int)))
        errors.append(float(jnp.max(jnp.abs(run(start) - solve(start, 0, 1)))))
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert orders[-1] == pytest.approx(order, abs=0.25), (orders, errors)


@pytest.mark.parametrize("path, predict", [("vp", "noise"), ("gvp", "score"), ("vp", "velocity")])
def test_flows_of_every_prediction(path, predict):
    denoise, solve = exact_flow(path, predict)
    process = FlowMatching(path=path, predict=predict)
    start = jax.random.normal(jax.random.key(0), (1, 2, 2, 1))
    trajectory = make_trajectory(
        denoise, process, method="heun", segments=(Segment(steps=100, guide="none"),),
        guidance_channels=0,
    )  # fmt: skip
    run = quick_jit(lambda z: trajectory(None, z, jnp.zeros_like, jnp.zeros(1, int)))
    begin = 0.0 if path == "vp" else 1e-3
    np.testing.assert_allclose(run(start), solve(start, begin, 1 - 1e-3), atol=5e-3)


def moments(process, method, steps, denoise, **options):
    """Mean and spread of 4000 pixels drawn with the exact net."""
    sampler = make_diffusion_sampler(
        denoise, process, method=method, segments=(Segment(steps=steps, guide="none"),),
        shape=(20, 20, 1), guidance_channels=0, **options,
    )  # fmt: skip
    x = quick_jit(lambda k: sampler(None, k, jnp.zeros(10, int)))(row_keys(jax.random.key(0), 10))
    return float(jnp.mean(x)), float(jnp.std(x))


@pytest.mark.parametrize("method, eta", [("ddpm", 0.0), ("ddim", 1.0), ("dpm++2m", 0.0)])
def test_gaussian_samplers_draw_the_data(method, eta):
    process = GaussianDiffusion(timesteps=1000, variance="fixed_small")
    found = moments(process, method, 500, exact_gaussian(process)[0], eta=eta)
    np.testing.assert_allclose(found, (CENTRE, SPREAD), atol=0.02)


@pytest.mark.parametrize(
    "sde",
    [
        SDE(), SDE(form="constant", last="tweedie"), SDE(form="linear", last="euler"),
        SDE(form="increasing_decreasing", last="none"), SDE(form="sbdm", last="mean", norm=0.5),
    ],
)  # fmt: skip
def test_sde_draws_the_data(sde):
    process = FlowMatching()
    found = moments(process, "sde", 150, exact_flow("linear", "velocity")[0], sde=sde)
    # Tweedie's step ends at the posterior mean, which has lost the spread within 4% of the path.
    np.testing.assert_allclose(found, (CENTRE, SPREAD), atol=0.035)


def test_last_steps_of_the_sde():
    """With exact numbers: one step of Euler-Maruyama without noise, then the last one."""
    x, v = 0.8, 0.25  # state and constant velocity of a net
    ends = {}
    for last in ("mean", "euler", "tweedie"):
        trajectory = make_trajectory(
            lambda variables, x, t, labels, mode: jnp.full_like(x, v), FlowMatching(),
            method="sde", segments=(Segment(steps=2, guide="none"),), guidance_channels=0,
            sde=SDE(form="linear", last=last, last_size=0.1),
        )  # fmt: skip
        zero = lambda k: jnp.zeros((1, 1, 1, 1))
        found, seen = trajectory(
            None, jnp.full((1, 1, 1, 1), x), zero, jnp.zeros(1, int), record=True
        )
        ends[last] = float(found.squeeze())
        after = float(seen["x"][0].squeeze())
    score = lambda x, t: (t * v - x) / (1 - t)
    assert after == pytest.approx(x + 0.9 * (v + score(x, 0.0)))
    drift = v + 0.1 * score(after, 0.9)
    assert ends["mean"] == pytest.approx(after + 0.1 * drift)
    assert ends["euler"] == pytest.approx(after + 0.1 * v)
    assert ends["tweedie"] == pytest.approx((after + 0.01 * score(after, 0.9)) / 0.9)
