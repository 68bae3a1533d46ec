"""Samplers of diffusion and flow: segments, guidance, rows, and what is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.processes.flow import FlowMatching
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
    sampler = sampler_of(process, method, Segment(steps=4), **options)
    run = quick_jit(lambda g: sampler(1.0, keys(), LABELS, guidance=g))
    none = run(None)
    np.testing.assert_allclose(run(1.0), none, atol=1e-5)
    assert float(jnp.abs(run(2.0) - none)[..., :3].max()) > 1e-3


def test_segment_without_guide():
    off = sample(GAUSSIAN, "ddpm", Segment(steps=4, guide="none"), guidance=2.0)
    np.testing.assert_array_equal(off, sample(GAUSSIAN, "ddpm", Segment(steps=4)))


def test_guided_channels():
    """One DDIM step of a net whose channels do not mix: only the first ones are guided."""
    run = lambda **options: sample(GAUSSIAN, "ddim", Segment(steps=3), **options)
    none = run()
    three, all_of_them = run(guidance=3.0, guidance_channels=3), run(guidance=3.0)
    assert float(jnp.abs(three - none)[..., :3].max()) > 1e-3
    np.testing.assert_allclose(three[..., 3], none[..., 3], atol=1e-6)
    assert float(jnp.abs(all_of_them - none)[..., 3].max()) > 1e-3
    np.testing.assert_allclose(all_of_them[..., :3], three[..., :3], atol=1e-6)


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
            toy, process, method="ddim", segments=[segment], respacing=(99,), null_label=NULL,
            guidance_channels=3,
        )  # fmt: skip
        got = trajectory(1.0, x, lambda k: x, LABELS, guidance=2.5)
        main, guide = toy(1.0, x, t, LABELS, 2)[..., :4], toy(1.0, x, t, *other)[..., :4]
        expected = (guide + 2.5 * (main - guide)).at[..., 3].set(main[..., 3])
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_scale_by_row_and_by_segment():
    scales = jnp.array([1.0, 2.0, 5.0])
    sampler = sampler_of(GAUSSIAN, "ddpm", Segment(steps=5))
    run = quick_jit(lambda g: sampler(1.0, keys(), LABELS, guidance=g))
    rows = run(scales)
    for i, scale in enumerate(scales.tolist()):
        np.testing.assert_allclose(rows[i], run(scale)[i], atol=1e-6)
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


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("times", [(0.0, 1.0), (0.0, 0.5), (0.25, 1.0), (0.1, 0.6)])
def test_guided_times(method, times):
    """Every evaluation of the net asks whether its own time is within; the last step is Euler's."""
    process, steps, scale, said = FlowMatching(predict="data"), 4, 3.0, {9: 0.1, 3: 0.7}
    net = lambda variables, x, t, labels, mode: (
        jnp.where(labels == NULL, said[9], said[3]).reshape(-1, 1, 1, 1) * jnp.ones_like(x)
    )
    start = jax.random.normal(jax.random.key(0), (1, *SHAPE))
    trajectory = make_trajectory(
        net, process, method=method, segments=(Segment(steps=steps),), guided_times=times,
        null_label=NULL,
    )  # fmt: skip
    run = lambda z: trajectory(None, z, jnp.zeros_like, jnp.array([3]), guidance=scale)
    got = quick_jit(run)(start)

    def velocity(x, t):
        within = times[0] < t < times[1] or t == times[0] == 0
        data = said[9] + scale * (said[3] - said[9]) if within else said[3]
        return (data - x) / (1 - t)

    x = np.float64(start)
    for k in range(steps):
        ahead, v = (k + 1) / steps, velocity(x, k / steps)
        if method == "heun" and k < steps - 1:
            v = (v + velocity(x + v / steps, ahead)) / 2
        x = x + v / steps
    np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-6)


def test_start_has_the_size_of_the_noise():
    """One step of a net that says velocity 0 leaves the start."""
    still = lambda variables, x, t, labels, mode: jnp.zeros_like(x)
    options = {"denoise": still}
    one, two = (
        sample(FlowMatching(noise_scale=s), "euler", Segment(steps=1), **options) for s in (1, 2)
    )
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)
    assert 0.5 < float(jnp.std(one)) < 2


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


def test_noise_of_keys():
    """Image i starts at the normal numbers of fold_in(key i, 0); iteration k takes k + 1."""

    def draw(number):
        own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys(), number)
        return jnp.stack([jax.random.normal(key, SHAPE) for key in own])

    drawn = jnp.stack([draw(i) for i in range(5)])
    assert len(np.unique(drawn)) == drawn.size
    trajectory = make_trajectory(toy, GAUSSIAN, segments=[Segment(steps=4)])
    run = quick_jit(lambda d: trajectory(1.0, d[0], lambda k: d[k + 1], LABELS))
    np.testing.assert_allclose(run(drawn), sample(GAUSSIAN, "ddpm", Segment(steps=4)), atol=1e-6)


def test_clipping():
    process = GaussianDiffusion(timesteps=100, predict="x_start", variance="fixed_small")
    big = lambda variables, x, t, labels, mode: jnp.full_like(x, 3.0)
    for method in ("ddpm", "ddim", "heun", "dpm++2m"):
        options = dict(denoise=big, clip=True)
        x = sample(process, method, Segment(steps=4), **options)
        np.testing.assert_allclose(x, 1.0, atol=1e-5, err_msg=method)


def test_noise_is_implied_by_the_clipped_image():
    """DDIM goes on from (x, clipped x_start), not from what the net said of the noise."""
    tables = gaussian_tables(GAUSSIAN, "4")
    big = lambda variables, x, t, labels, mode: jnp.full((*x.shape[:-1], 8), 3.0)
    trajectory = make_trajectory(
        big, GAUSSIAN, method="ddim", segments=[Segment(steps=4)], eta=0.6, clip=True
    )
    x, z = (jax.random.normal(jax.random.key(i), (3, *SHAPE)) for i in (0, 1))
    _, seen = trajectory(1.0, x, lambda k: z, LABELS, record=True)
    level, prev = tables.alphas_cumprod[3], tables.alphas_cumprod_prev[3]
    sigma = 0.6 * np.sqrt((1 - prev) / (1 - level) * (1 - level / prev))
    eps = (x - np.sqrt(level)) / np.sqrt(1 - level)  # of x_start = 1
    expected = np.sqrt(prev) + np.sqrt(1 - prev - sigma**2) * eps + sigma * z
    np.testing.assert_allclose(seen["x"][0], expected, atol=1e-5)
    np.testing.assert_array_equal(seen["x_start"], 1.0)
    np.testing.assert_allclose(seen["x"][-1], 1.0, atol=1e-6)


def test_rows_on_devices():
    """Rows spread over devices are the same images, and stay spread."""
    devices = jax.devices()[:4]
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sampler = sampler_of(GAUSSIAN, "ddpm", Segment(steps=3))
    run = quick_jit(lambda k, y: sampler(1.0, k, y, guidance=2.0))
    labels = jnp.arange(8)
    spread = run(jax.device_put(keys(8), rows), jax.device_put(labels, rows))
    np.testing.assert_allclose(spread, run(keys(8), labels), atol=1e-5)
    assert spread.sharding.is_equivalent_to(rows, spread.ndim)


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
        (GAUSSIAN, {"guided_times": (0.1, 1.0)}, "of flow matching"),
        (FlowMatching(), {"method": "euler", "guided_times": (0.5, 0.1)}, "within 0..1"),
        (
            FlowMatching(),
            {"method": "euler", "guided_times": (0.1, 1.0), "interval": (0.0, 0.9)},
            "give one of them",
        ),
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
    sampler = make_diffusion_sampler(
        toy, GAUSSIAN, segments=[Segment(steps=4)], shape=(2, 2, 1), guidance_channels=3
    )
    with pytest.raises(ValueError, match="guidance_channels=3, but images have 1"):
        sampler(1.0, keys(), LABELS)
    for options in ({"form": "x"}, {"last": "x"}, {"last_size": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SDE(**options)
