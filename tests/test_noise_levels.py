"""Processes by noise level: targets, times, solvers that end where they should, streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.processes import noise_levels as levels
from lintime.model.processes.flow import FlowMatching, training_loss
from lintime.model.processes.noise_levels import NoiseLevels
from lintime.model.sampling.diffusion import Segment, make_trajectory
from lintime.model.sampling.level_solvers import Upscale, iterations, level_solver
from lintime.model.sampling.video_stream import make_video_stream
from tests.tiny import quick

DATA = 0.7  # the only image there is: the best net is known


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


def best(process):
    """What the best net says of x_t, as a sampler calls it."""

    def denoise(_, x, t, labels, mode):
        t = t.reshape(-1, *(1,) * (x.ndim - 1))
        sigma = jnp.maximum(levels.noise_level(process, t), 1e-7)
        if process.predict == "velocity":
            return (x - DATA) / sigma
        return (x - jnp.sqrt(1 - sigma) * DATA) / jnp.sqrt(sigma)

    return denoise


def draw(process, solver, **told):
    run = make_trajectory(
        best(process), solver, segments=(Segment(steps=iterations(solver)),), null_label=5
    )
    start = jnp.float32(np.random.default_rng(0).standard_normal((2, 4, 4, 1)))
    noise = lambda k: jax.random.normal(jax.random.key(k), start.shape)
    return run(None, start, noise, jnp.zeros(2, jnp.int32), **told)


def test_velocity_is_flow_matching_backwards():
    rng = np.random.default_rng(0)
    x, noise = (jnp.float32(rng.standard_normal((3, 4, 4, 2))) for _ in "ab")
    t, process = jnp.array([0, 250, 999]), NoiseLevels()
    net = lambda x_t, t: jnp.sin(3 * x_t)
    loss, parts = levels.training_loss(process, net, x, t, noise)
    same, _ = training_loss(FlowMatching(), lambda *a: -net(*a), x, 1 - t / 1000, noise)
    np.testing.assert_allclose(loss, same, rtol=1e-5)
    np.testing.assert_array_equal(parts["mse"], loss)
    eps = NoiseLevels(predict="eps")
    want = np.sqrt(0.75) * x[1] + np.sqrt(0.25) * noise[1]
    np.testing.assert_allclose(levels.add_noise(eps, x, t, noise)[1], want, rtol=1e-5)


def test_times():
    process = NoiseLevels(timesteps=8)
    t = levels.draw_times(process, jax.random.key(0), 400)
    assert set(np.asarray(t)) == set(range(8))
    np.testing.assert_array_equal(levels.spread_times(process, jax.random.key(0), 8), range(8))
    np.testing.assert_allclose(levels.noise_level(process, jnp.array([0, 4])), [0, 0.5])
    large = NoiseLevels(timesteps=8, shift=levels.shift_of_side(128))
    np.testing.assert_allclose(levels.noise_level(large, jnp.array([4])), [2 / 3], rtol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 1.5])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_velocities_end_at_the_data(method, shift):
    process = NoiseLevels(shift=shift)
    x = draw(process, level_solver(process, method, 5))
    if method == "heun":  # which looks at sigma = 0, where the best net is not defined
        assert np.isfinite(x).all()
    else:
        np.testing.assert_allclose(x, DATA, atol=1e-5)


@pytest.mark.parametrize("method", ["ddim", "ddpm", "dpm"])
def test_noise_predictions_end_at_the_data(method):
    process = NoiseLevels(predict="eps")
    x = draw(process, level_solver(process, method, 12, clip=2.0))
    np.testing.assert_allclose(x, DATA, atol=0.02)


@pytest.mark.parametrize("schedule", levels.SCHEDULES)
def test_nets_are_told_the_time_of_the_level(schedule):
    process = NoiseLevels(timesteps=200, predict="eps")
    at = level_solver(process, "dpm", 9, schedule=schedule).inputs
    t, variance = jnp.asarray(at["t"], jnp.float32), at["noise"] ** 2
    np.testing.assert_allclose(levels.noise_level(process, t), variance, rtol=1e-5)
    np.testing.assert_allclose(at["signal"] ** 2 + variance, 1)
    assert t[0] <= 199 and (np.diff(t) <= 0).all()
    assert at["bend"][0] == at["bend"][-1] == 0 and (at["bend"][1:-1] != 0).any()
    grid = level_solver(process, "ddim", 5, schedule=schedule, published="homm").inputs["t"]
    np.testing.assert_allclose(grid, [200, 150, 100, 50, 0])


def test_published_grids():
    process = NoiseLevels()
    assert iterations(level_solver(process, "euler", 4, published="homm")) == 5
    assert iterations(level_solver(process, "euler", 4, published="homm_up")) == 3
    for method in ("euler", "heun"):
        assert iterations(level_solver(process, method, 4)) == 4
    video = level_solver(process, "heun", 3, published="homm_t2v")
    np.testing.assert_allclose(video.inputs["dt"].sum(), 0.998)
    plain = level_solver(process, "heun", 3)
    np.testing.assert_allclose((plain.inputs["t"][0], plain.inputs["dt"].sum()), (1000, 1))


def test_small_images_lead_where_they_act():
    process, steps = NoiseLevels(), 4
    make = lambda **told: level_solver(process, "heun", steps, published="homm_up", **told)
    plain = draw(process, make())
    of = lambda **told: draw(process, make(upscale=Upscale(**told)))
    never, always = of(weight=0.5, cutoff=1.0), of(weight=0.5)
    np.testing.assert_allclose(of(weight=0.0), never)
    assert np.abs(always - never).max() > 1e-3
    assert np.isfinite(plain).all()


@pytest.mark.parametrize(
    ("process", "told", "message"),
    [
        ({}, {"method": "ddim"}, "predict='velocity': euler, heun"),
        ({}, {"method": "euler", "published": "x"}, "published='x'"),
        ({}, {"method": "euler", "clip": 1.0}, "are of predict='eps'"),
        ({}, {"method": "heun", "upscale": Upscale(weight=1.0)}, "upscale is of"),
        ({"predict": "eps"}, {"method": "ddim", "published": "homm_t2v"}, "velocities only"),
        ({"predict": "eps"}, {"method": "ddim", "schedule": "x"}, "schedule='x'"),
    ],
)
def test_what_a_process_does_not_have_is_refused(process, told, message):
    with pytest.raises(ValueError, match=message):
        level_solver(NoiseLevels(**process), steps=4, **told)


def test_processes_and_segments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="predict='x'"):
        NoiseLevels(predict="x")
    with pytest.raises(ValueError, match="shift=1.5"):
        NoiseLevels(predict="eps", shift=1.5)
    solver = level_solver(NoiseLevels(), "euler", 4)
    with pytest.raises(ValueError, match="4 iterations, the segments have 3"):
        make_trajectory(best(NoiseLevels()), solver, segments=(Segment(steps=3),))
    with pytest.raises(ValueError, match="settings of a method beside a solver"):
        make_trajectory(None, solver, segments=(Segment(steps=4),), clip=True)


@pytest.mark.parametrize("guided", [False, True])
def test_a_stream_of_frames_is_the_video(guided):
    """With a net that adds the mean of the frames before, and of labels."""
    process = NoiseLevels()
    solver = level_solver(process, "heun", 3)
    scale = 1.5 if guided else None
    x = jnp.float32(np.random.default_rng(0).standard_normal((2, 3, 2, 2, 1)))

    def whole(_, x, t, told, mode):
        past = jnp.cumsum(x.mean((2, 3, 4), keepdims=True), axis=1)
        return past + jnp.where(told["drop"], 0, told["labels"]).reshape(-1, 1, 1, 1, 1)

    def extend(_, x, t, told, frame, state):
        state = state + x.mean((1, 2, 3, 4))
        own = state + jnp.where(told["drop"], 0, told["labels"])
        return jnp.broadcast_to(own.reshape(-1, 1, 1, 1, 1), x.shape), state

    told = {"labels": jnp.array([1, 2])}
    run = make_trajectory(whole, solver, segments=(Segment(steps=3),), null_label=0)
    want = run(None, x, lambda k: x, told, guidance=scale)
    stream = make_video_stream(
        extend, lambda rows: jnp.zeros(rows), solver, frame_shape=(1, 2, 2, 1), guided=guided,
        null_label=0,
    )  # fmt: skip
    states = stream.init(2)
    assert states.shape == (3, 2, 2 * (1 + guided))
    for frame in range(3):
        part = x[:, frame : frame + 1]
        got, states = stream.frame(None, part, frame, states, told, guidance=scale)
        np.testing.assert_allclose(got, want[:, frame : frame + 1], rtol=1e-5, atol=1e-6)
