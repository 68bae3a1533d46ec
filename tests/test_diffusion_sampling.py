"""Samplers of diffusion and flow: against exact solutions, segments, guidance, independence."""

import chex
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

SHAPE = (2, 2, 4)
NULL = 9
GAUSSIAN = GaussianDiffusion(timesteps=100, predict="x_start")  # of which the toy stays small
LABELS = jnp.array([0, 3, 5])
METHODS = [
    (GAUSSIAN, "ddpm", {}), (GAUSSIAN, "ddim", {}), (GAUSSIAN, "ddim", {"eta": 0.7}),
    (GAUSSIAN, "euler", {}), (GAUSSIAN, "heun", {}), (GAUSSIAN, "dpm++2m", {}),
    (FlowMatching(), "euler", {}), (FlowMatching(), "heun", {}), (FlowMatching(), "sde", {}),
]  # fmt: skip
ids = lambda x: x if isinstance(x, str) else None


def toy(variables, x, t, labels, mode):
    """A net of 2C channels that depends on all it gets, channel by channel."""
    t = jnp.asarray(t, jnp.float32).reshape(-1, 1, 1, 1)
    labels = labels.reshape(-1, 1, 1, 1)
    strength = 1.0 if mode is None else 1.0 / mode
    said = strength * jnp.tanh(variables * x + 0.2 * labels) + 0.01 * jnp.sin(t)
    return jnp.concatenate([said, jnp.tanh(0.1 * labels + 0.3 * x)], axis=-1)


def keys(count=3, start=0):
    return row_keys(jax.random.key(0), count, start)


def sampler_of(process, method, *segments, denoise=toy, **options):
    return make_diffusion_sampler(
        denoise, process, method=method, segments=segments, shape=SHAPE, null_label=NULL, **options
    )


def sample(process, method, *segments, guidance=None, labels=LABELS, **options):
    sampler = sampler_of(process, method, *segments, **options)
    run = quick_jit(lambda k, y: sampler(1.0, k, y, guidance=guidance))
    return run(keys(len(labels)), labels)


# ---------------------------------------------------------------- exact solutions

SPREAD, CENTRE = 0.5, 0.3  # of the data, N(CENTRE, SPREAD^2) at every pixel


def exact_gaussian(process):
    """(net that knows the expected noise of such data, solution of the flow from step to step)."""
    tables = gaussian_tables(process)

    def denoise(variables, x, t, labels, mode):
        level = jnp.asarray(tables.alphas_cumprod, jnp.float32)[t].reshape(-1, 1, 1, 1)
        centred = x - jnp.sqrt(level) * CENTRE
        return jnp.sqrt(1 - level) * centred / (level * SPREAD**2 + 1 - level)

    def solve(x, start, end):
        a, b = tables.alphas_cumprod[[start, end]]
        total = lambda level: np.sqrt(level * SPREAD**2 + 1 - level)
        return np.sqrt(b) * CENTRE + (x - np.sqrt(a) * CENTRE) * total(b) / total(a)

    return denoise, solve


@pytest.mark.parametrize("method, order", [("ddim", 1), ("euler", 1), ("heun", 2), ("dpm++2m", 2)])
def test_order_on_gaussian_data(method, order):
    """Halving the steps' length divides the error by 2^order; the last step is left out (it goes
    to noise 0, where no order is defined)."""
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
        found = np.asarray(run(start)["x"][-2], np.float64)
        errors.append(np.max(np.abs(found - solve(np.asarray(start, np.float64), 960, 0))))
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert errors[-1] < (0.02 if order == 1 else 0.002), errors
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
    x = quick_jit(lambda k: sampler(None, k, jnp.zeros(10, int)))(keys(10))
    return float(jnp.mean(x)), float(jnp.std(x))


@pytest.mark.parametrize("method, eta", [("ddpm", 0.0), ("ddim", 1.0), ("dpm++2m", 0.0)])
def test_gaussian_samplers_draw_the_data(method, eta):
    process = GaussianDiffusion(timesteps=1000, variance="fixed_small")
    found = moments(process, method, 100, exact_gaussian(process)[0], eta=eta)
    np.testing.assert_allclose(found, (CENTRE, SPREAD), atol=0.035)


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


def test_euler_is_ddim():
    one = sample(GAUSSIAN, "euler", Segment(steps=7), guidance=2.0)
    np.testing.assert_array_equal(one, sample(GAUSSIAN, "ddim", Segment(steps=7), guidance=2.0))


# ---------------------------------------------------------------- segments


@pytest.mark.parametrize("process, method, options", METHODS, ids=ids)
def test_cutting_changes_nothing(process, method, options):
    whole = sample(process, method, Segment(steps=7), guidance=1.7, **options)
    parts = [Segment(steps=3), Segment(steps=2), Segment(steps=2)]
    assert bool(jnp.isfinite(whole).all())
    np.testing.assert_array_equal(whole, sample(process, method, *parts, guidance=1.7, **options))


def test_history():
    """Kept across segments, or dropped: then the first step of a segment is of first order."""
    parts = [Segment(steps=3), Segment(steps=4)]
    kept = sample(GAUSSIAN, "dpm++2m", *parts)
    dropped = sample(GAUSSIAN, "dpm++2m", *parts, reset_history=True)
    assert float(jnp.abs(kept - dropped).max()) > 1e-4
    ones = [Segment(steps=1)] * 7
    first = sample(GAUSSIAN, "dpm++2m", *ones, reset_history=True)
    np.testing.assert_allclose(first, sample(GAUSSIAN, "ddim", *ones), atol=2e-5)


@pytest.mark.parametrize("process, method, options", METHODS, ids=ids)
def test_modes_reach_the_net(process, method, options):
    """Evaluations in the mode of their segment, guided ones in that of the guide."""
    seen = []

    def denoise(variables, x, t, labels, mode):
        seen.append((mode, x.shape[0]))
        return toy(variables, x, t, labels, mode)

    segments = [
        Segment(steps=2, mode=4), Segment(steps=2, mode=2, guide_mode=4),
        Segment(steps=2, mode=2, guide="same", guide_mode=4),
        Segment(steps=2, mode=2, guide="none"),
    ]  # fmt: skip
    sampler = sampler_of(process, method, *segments, denoise=denoise, **options)
    jax.eval_shape(lambda k: sampler(1.0, k, LABELS, guidance=1.5), keys())
    each = [c for i, c in enumerate(seen) if i == 0 or c != seen[i - 1]]
    order = [(4, 6), (2, 3), (4, 3), (2, 3)]
    assert each[0] == order[0] and set(each) == set(order) and each[-1] == (2, 3)
    assert seen.count((4, 6)) * 2 == seen.count((4, 3))


def test_timesteps_reach_the_net():
    def denoise(variables, x, t, labels, mode):
        assert t.dtype == jnp.int32 and t.shape == (3,)
        return jnp.concatenate([jnp.zeros_like(x), jnp.broadcast_to(1.0 * t[0], x.shape)], -1)

    trajectory = make_trajectory(
        denoise, GaussianDiffusion(predict="x_start"), method="ddpm", segments=[Segment(steps=4)],
    )  # fmt: skip
    zeros = lambda k: jnp.zeros((3, *SHAPE))
    _, seen = trajectory(1.0, zeros(0), zeros, LABELS, record=True)
    assert seen["x"].shape == (4, 3, *SHAPE) and seen["x_start"].shape == (4, 3, *SHAPE)
    times = []
    watch = lambda v, x, t, y, m: (
        jax.debug.callback(lambda t: times.append(int(t[0])), t) or toy(v, x, t, y, m)
    )
    sampler_of(GaussianDiffusion(), "ddim", Segment(steps=4), denoise=watch)(1.0, keys(), LABELS)
    jax.effects_barrier()
    assert times == [999, 666, 333, 0]


# ---------------------------------------------------------------- guidance


@pytest.mark.parametrize("process, method, options", METHODS, ids=ids)
def test_guidance_of_one(process, method, options):
    none = sample(process, method, Segment(steps=4), **options)
    one = sample(process, method, Segment(steps=4), guidance=1.0, **options)
    np.testing.assert_allclose(one, none, atol=1e-5)
    two = sample(process, method, Segment(steps=4), guidance=2.0, **options)
    assert float(jnp.abs(two - none)[..., :3].max()) > 1e-3
    off = sample(process, method, Segment(steps=4, guide="none"), guidance=2.0, **options)
    np.testing.assert_array_equal(off, none)


def test_guided_channels():
    """One DDIM step of a net whose channels do not mix: only the first ones are guided."""
    run = lambda **options: sample(GAUSSIAN, "ddim", Segment(steps=3), **options)
    none = run()
    three, all_of_them = run(guidance=3.0), run(guidance=3.0, guidance_channels=0)
    assert float(jnp.abs(three - none)[..., :3].max()) > 1e-3
    np.testing.assert_array_equal(three[..., 3], none[..., 3])
    assert float(jnp.abs(all_of_them - none)[..., 3].max()) > 1e-3
    np.testing.assert_array_equal(all_of_them[..., :3], three[..., :3])


def test_guidance_formula():
    """Predictions of one step against e_g + s (e_m - e_g), by kind of guide."""
    x = jax.random.normal(jax.random.key(3), (3, *SHAPE))
    t = jnp.full((3,), 99)
    process = GaussianDiffusion(timesteps=100, predict="x_start")
    for segment, other in (
        (Segment(steps=1, mode=2), (jnp.full(3, NULL), 2)),
        (Segment(steps=1, mode=2, guide_mode=4), (jnp.full(3, NULL), 4)),
        (Segment(steps=1, mode=2, guide="same", guide_mode=4), (LABELS, 4)),
    ):
        trajectory = make_trajectory(
            toy, process, method="ddim", segments=[segment], respacing=(99,), null_label=NULL
        )
        got = trajectory(1.0, x, lambda k: x, LABELS, guidance=2.5)
        main, guide = toy(1.0, x, t, LABELS, 2)[..., :4], toy(1.0, x, t, *other)[..., :4]
        expected = (guide + 2.5 * (main - guide)).at[..., 3].set(main[..., 3])
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_scale_by_row_and_by_segment():
    scales = jnp.array([1.0, 2.0, 5.0])
    rows = sample(GAUSSIAN, "ddpm", Segment(steps=5), guidance=scales)
    for i, scale in enumerate(scales.tolist()):
        alone = sample(GAUSSIAN, "ddpm", Segment(steps=5), guidance=scale)
        np.testing.assert_array_equal(rows[i], alone[i])
    own = [Segment(steps=2, scale=1.0), Segment(steps=3, scale=4.0)]
    staged = sample(GAUSSIAN, "ddpm", *own)
    np.testing.assert_array_equal(staged, sample(GAUSSIAN, "ddpm", *own, guidance=9.0))
    mixed = sample(GAUSSIAN, "ddpm", own[0], Segment(steps=3), guidance=4.0)
    np.testing.assert_array_equal(staged, mixed)


def test_interval():
    """Guidance within the interval only: the same as segments with and without it."""
    parts = [
        Segment(steps=2, guide="none"), Segment(steps=5), Segment(steps=3, guide="none"),
    ]  # fmt: skip
    cut = sample(GAUSSIAN, "ddpm", *parts, guidance=3.0)
    whole = sample(GAUSSIAN, "ddpm", Segment(steps=10), guidance=3.0, interval=(0.3, 0.8))
    np.testing.assert_array_equal(whole, cut)
    never = sample(GAUSSIAN, "ddpm", Segment(steps=10), guidance=3.0, interval=(0.0, 0.0))
    np.testing.assert_array_equal(never, sample(GAUSSIAN, "ddpm", Segment(steps=10)))


def test_guidance_compiles_once():
    sampler = sampler_of(GAUSSIAN, "ddpm", Segment(steps=3))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(keys, guidance):
        return sampler(1.0, keys, LABELS, guidance=guidance)

    one, two = (run(keys(), jnp.float32(s)) for s in (1.5, 4.0))
    assert float(jnp.abs(one - two).max()) > 1e-3


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("process, method, options", METHODS, ids=ids)
def test_rows_do_not_depend_on_the_batch(process, method, options):
    sampler = sampler_of(process, method, Segment(steps=4), **options)
    run = quick_jit(lambda k, y: sampler(1.0, k, y, guidance=2.0))
    together = run(keys(), LABELS)
    alone = run(keys(1, start=1), LABELS[1:2])  # another program: equal to rounding
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-5, atol=1e-5)
    mixed = run(keys().at[jnp.array([0, 2])].set(keys(2, start=5)), jnp.array([1, 3, 1]))
    np.testing.assert_array_equal(together[1], mixed[1])
    assert (jnp.abs(together - mixed)[jnp.array([0, 2])].max(axis=(1, 2, 3)) > 1e-3).all()


def test_injected_noise():
    """The sampler is the trajectory on noise of its keys; the last step of DDPM adds none."""
    base = jax.random.normal(jax.random.key(1), (5, 3, *SHAPE))
    trajectory = make_trajectory(toy, GAUSSIAN, segments=[Segment(steps=4)])
    run = quick_jit(lambda b: trajectory(1.0, b[4], lambda k: b[k], LABELS))
    first = run(base)
    np.testing.assert_array_equal(first, run(base.at[3].set(jnp.nan_to_num(jnp.inf))))
    assert float(jnp.abs(first - run(base.at[2].add(1.0))).max()) > 1e-3
    assert run(base.astype(jnp.bfloat16)).dtype == jnp.float32


def test_clipping():
    process = GaussianDiffusion(timesteps=100, predict="x_start", variance="fixed_small")
    big = lambda variables, x, t, labels, mode: jnp.full_like(x, 3.0)
    for method in ("ddpm", "ddim", "heun", "dpm++2m"):
        options = dict(denoise=big, clip=True)
        x = sample(process, method, Segment(steps=4), **options)
        np.testing.assert_allclose(x, 1.0, atol=1e-5, err_msg=method)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "process, options, word",
    [
        (GAUSSIAN, {"method": "rk4"}, "ddpm, ddim"),
        (FlowMatching(), {"method": "ddpm"}, "euler, heun, sde"),
        (GAUSSIAN, {"method": "ddpm", "eta": 0.5}, "eta=0.5"),
        (GAUSSIAN, {"method": "ddim", "eta": 1.5}, "eta=1.5"),
        (GAUSSIAN, {"respacing": "5"}, "keeps 5 .* 4 steps"),
        (GAUSSIAN, {"segments": []}, "no segments"),
        (GAUSSIAN, {"segments": [Segment(steps=101)]}, "wants 101 of the 100"),
        (GAUSSIAN, {"interval": (0.5, 0.2)}, "interval"),
        (GAUSSIAN, {"reset_history": True}, "reset_history"),
        (GAUSSIAN, {"sde": SDE()}, "SDE"),
        (FlowMatching(), {"method": "euler", "clip": True}, "clip"),
        (FlowMatching(), {"method": "euler", "sde": SDE()}, "SDE"),
        (FlowMatching(), {"method": "sde", "segments": [Segment(steps=1)]}, "steps=1"),
        (GAUSSIAN, {"segments": [Segment(steps=4, scale=2.0)]}, "null_label"),
    ],
)
def test_settings_refused(process, options, word):
    with pytest.raises(ValueError, match=word):
        make_diffusion_sampler(
            toy, process, **{"segments": [Segment(steps=4)], "shape": SHAPE, **options}
        )


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0}, {"guide": "weak"}, {"guide": "same"}, {"guide": "none", "scale": 2.0},
        {"guide": "same", "mode": 2, "guide_mode": 2},
    ],
)  # fmt: skip
def test_segments_refused(options):
    with pytest.raises(ValueError):
        Segment(**{"steps": 3, **options})


def test_calls_refused():
    sampler = make_diffusion_sampler(toy, GAUSSIAN, segments=[Segment(steps=4)], shape=SHAPE)
    with pytest.raises(ValueError, match="null_label"):
        sampler(1.0, keys(), LABELS, guidance=2.0)
    with pytest.raises(ValueError, match="one of each"):
        sampler(1.0, keys(2), LABELS)
    sampler = sampler_of(GAUSSIAN, "ddpm", Segment(steps=4))
    with pytest.raises(ValueError, match=r"guidance has shape \(2,\)"):
        sampler(1.0, keys(), LABELS, guidance=jnp.ones(2))
    sampler = make_diffusion_sampler(toy, GAUSSIAN, segments=[Segment(steps=4)], shape=(2, 2, 1))
    with pytest.raises(ValueError, match="guidance_channels=3, but images have 1"):
        sampler(1.0, keys(), LABELS)
    for options in ({"form": "x"}, {"last": "x"}, {"last_size": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SDE(**options)
