"""What weak modes of a FlexiDiT learn from: matched distributions, and times of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.nets.dit import DiT
from lintime.model.nets.flexidit import features, init_params, mode_config, mode_params
from lintime.model.processes.flexible import (
    FlexibleDiffusion,
    FlexibleFlow,
    clean_and_noise,
    mmd,
    noised,
    predict_clean,
    time_spans,
    times_at,
)
from lintime.train.errors import UserError
from lintime.train.step import init_state, make_train_step
from lintime.train.tasks.flexible import split_base
from lintime.train.tasks.table import make_task
from lintime.train.validate import validate
from tests.tiny import quick
from tests.tiny_diffusion import flexible_run

ROWS = 6
ALONE = ("process.denoise=0", "process.distill=0", "process.match=2")


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


def by_hand(x, y, kernel):
    """MMD^2 in float64, pair by pair."""
    x, y = np.float64(x), np.float64(y)
    both = [*x, *y]
    squares = [np.sum((a - b) ** 2) for i, a in enumerate(both) for b in both[i + 1 :]]
    unit = np.median(squares)

    def k(a, b):
        if kernel == "poly3":
            return (a @ b / len(a) + 1) ** 3
        return sum(np.exp(-np.sum((a - b) ** 2) / (2 * s * s * unit)) for s in (1, 2, 4, 8))

    within = lambda z: np.mean(
        [k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]
    )
    return within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])


def arrays(run, seed=0):
    """A tree without zeros, images and noise, and labels."""
    draw = np.random.default_rng(seed)
    tree = init_params(run.net, jax.random.key(0))
    tree = jax.tree.map(lambda a: a + 0.2 * draw.normal(size=a.shape).astype("f"), tree)
    x, noise = draw.normal(size=(2, ROWS, *run.net.base.shape)).astype("f")
    return tree, x, noise, jnp.arange(ROWS) % 4


@pytest.mark.parametrize("kernel", ["poly3", "rbf"])
def test_mmd_by_hand(kernel):
    x, y = np.random.default_rng(0).normal(size=(2, 5, 3)) + [[[0]], [[1]]]
    np.testing.assert_allclose(mmd(x, y, kernel, median=True), by_hand(x, y, kernel), rtol=1e-5)


def test_mmd_of_features_that_are_nearly_equal():
    """As of a new net: a step must not be lost to 0 / 0, nor to a gradient beyond float32."""
    noise = np.random.default_rng(0).normal(size=(2, 4, 32))
    near, nearer, same = (1 + scale * noise for scale in (1e-3, 1e-7, 0))
    np.testing.assert_allclose(mmd(*near, "rbf", median=True), by_hand(*near, "rbf"), rtol=1e-3)
    for x, y in (nearer, same, 0 * same):
        gradient = jax.grad(lambda x, y=y: mmd(x, y, "rbf", median=True))(jnp.float32(x))
        assert float(jnp.abs(gradient).max()) < 1


@pytest.mark.parametrize(
    "process",
    [
        FlexibleDiffusion(timesteps=50),
        FlexibleDiffusion(timesteps=50, predict="x_start", variance="fixed_small"),
        FlexibleFlow(),
        FlexibleFlow(path="gvp", predict="noise"),
        FlexibleFlow(path="vp"),
    ],
    ids=["eps", "x_start", "velocity", "noise", "vp"],
)
def test_clean_images_from_what_a_net_says(process):
    x, noise = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 1)).astype("f")
    t = times_at(process, jnp.array([0.2, 0.5, 0.9]))

    def exact(x_t, t):
        if process.predict == "velocity":
            moved = lambda s: noised(process, x, s, noise)
            return jax.jvp(moved, (t,), (jnp.ones_like(t),))[1]
        out = jnp.asarray(x if process.predict == "x_start" else noise)
        if isinstance(process, FlexibleDiffusion) and process.learns_variance:
            out = jnp.concatenate([out, jnp.zeros_like(out)], -1)
        return out

    x_t = noised(process, x, t, noise)
    clean, eps = clean_and_noise(process, exact(x_t, t), x_t, t)
    np.testing.assert_allclose(clean, x, atol=1e-4)
    np.testing.assert_allclose(eps, noise, atol=1e-4)
    for steps in (1, 3):
        np.testing.assert_allclose(predict_clean(process, exact, x_t, t, steps), x, atol=1e-3)


def test_steps_of_the_powerful_mode():
    """What they see, at a velocity of x: x_{t + h} = (1 + h) x_t."""
    seen = []
    velocity = lambda x, t: seen.append(float(t[0])) or x
    x = jnp.ones((1, 1, 1, 1))
    out = predict_clean(FlexibleFlow(), velocity, x, jnp.array([0.4]), 3)
    np.testing.assert_allclose(seen, [0.4, 0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(out.item(), 1.2**3, rtol=1e-6)


@pytest.mark.parametrize("source", ["pixels", "net"])
def test_the_term_by_hand(source):
    choice = [f"process.match_features={source}", "process.match_kernel=rbf"]
    run = flexible_run("x", *ALONE, *choice, "net.base.class_dropout=0", flow=True)
    tree, x, noise, labels = arrays(run)
    task, key = make_task(run).in_mode(4), jax.random.key(3)
    t = jnp.linspace(0.1, 0.9, ROWS)
    split = split_base(tree)
    losses, parts = jax.jit(task._losses)(
        split["params"], split["stats"], x, {"labels": labels}, t, noise, {"dropout": key}
    )

    share = jax.random.uniform(jax.random.fold_in(key, 1), (ROWS,), minval=0.5, maxval=1.0)
    t = (1 - share)[:, None, None, None]
    x_t = t * x + (1 - t) * noise

    @functools.partial(jax.jit, static_argnums=0)
    def clean(patch):
        net, own = DiT(mode_config(run.net, patch)), mode_params(run.net, tree, patch)
        out = x_t + (1 - t) * net.apply({"params": own}, x_t, 1 - share, labels)[0]
        if source == "pixels":
            return out.reshape(ROWS, -1)
        # half of two blocks, of the powerful mode
        net, own = DiT(mode_config(run.net, 2)), mode_params(run.net, tree, 2)
        _, sown = net.apply({"params": own}, out, jnp.ones(ROWS), labels, mutable=["intermediates"])
        r = sown["intermediates"]["blocks"]["out"][0][0]
        r = (r - r.mean(-1, keepdims=True)) / jnp.sqrt(r.var(-1, keepdims=True) + 1e-6)
        return r.mean(1)

    expected = by_hand(clean(4), clean(2), "rbf")
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(parts["match"], expected, rtol=1e-3)
    np.testing.assert_allclose(losses, 2 * expected, rtol=1e-3)


def test_the_encoder_is_fixed():
    run = flexible_run("x", flow=True)
    tree, x, _, labels = arrays(run)
    f = lambda tree, x: jnp.sum(features(run.net, tree, x, jnp.ones(ROWS), labels) ** 2)
    to_net, to_images = jax.jit(jax.grad(f, argnums=(0, 1)))(tree, x)
    assert not any(jnp.any(g) for g in jax.tree.leaves(to_net))
    assert jnp.all(jnp.any(to_images != 0, axis=(1, 2, 3)))


def test_matching_alone_brings_the_distributions_together():
    run = flexible_run(
        "x", *ALONE, "optim.learning_rate=0.01", "optim.schedule=constant", "ema.decay=0",
        "batch_size=16", "process.match_steps=2", flow=True, variant="lora",
    )  # fmt: skip
    tree, *_ = arrays(run)
    task, split = make_task(run).in_mode(4), split_base(tree)
    state = jax.jit(lambda k: init_state(task, run, k))(jax.random.key(0))
    state = state.replace(params=split["params"], stats=split["stats"])
    step = jax.jit(make_train_step(task, run))
    images = np.random.default_rng(1).normal(size=(16, *run.net.base.shape)).astype("f")
    batch = {"images": images, "labels": np.arange(16, dtype=np.int32) % 4}
    far = []
    for number in range(40):
        state, metrics = step(state, batch | {"step": jnp.int32(number)})
        assert metrics["ok"]
        far.append(float(metrics["match"]))
        assert float(metrics["loss"]) == pytest.approx(2 * far[-1], rel=1e-5, abs=1e-4)
    assert np.mean(far[-5:]) < 0.5 * np.mean(far[:5])


# ---------------------------------------------------------------- times of weak modes


def test_shares_of_the_noise():
    share = jnp.array([0.0, 0.25, 1.0])
    np.testing.assert_array_equal(times_at(FlexibleDiffusion(timesteps=40), share), [0, 10, 39])
    np.testing.assert_array_equal(times_at(FlexibleFlow(), share), [1, 0.75, 0])
    np.testing.assert_allclose(
        times_at(FlexibleFlow(predict="noise"), share), [0.999, 0.7495, 0.001], atol=1e-6
    )
    assert time_spans(FlexibleFlow(), (4, 8)) == {4: (0, 1), 8: (0, 1)}
    each = FlexibleFlow(train_t_range=(0.25, 1.0, 0.5, 1.0))
    assert time_spans(each, (4, 8)) == {4: (0.25, 1), 8: (0.5, 1)}


@pytest.mark.parametrize("flow", [True, False])
def test_weak_modes_train_where_they_are_said_to(flow):
    run = flexible_run("x", "process.train_t_range=0.6,0.9", flow=flow)
    validate(run)
    task, key, whole = make_task(run), jax.random.key(0), (0, 1) if flow else (0, 999)
    inside = np.sort([0.4, 0.1] if flow else [600, 899])
    mine = np.asarray(task.in_mode(4)._draw_times(key, 4000))
    np.testing.assert_allclose([mine.min(), mine.max()], inside, atol=2e-3 * whole[1])
    np.testing.assert_allclose(mine.mean(), inside.mean(), atol=0.01 * whole[1])
    every = np.asarray(task.in_mode(2)._draw_times(key, 4000))
    np.testing.assert_allclose([every.min(), every.max()], whole, atol=2e-3 * whole[1])
    # validation as well
    spread = {p: np.asarray(t) for p, t in task._spread_times(key, 10).items()}
    assert inside[0] <= spread[4].min() < spread[4].max() <= inside[1]
    assert spread[2].min() < 0.2 * whole[1] and spread[2].max() > 0.8 * whole[1]


@pytest.mark.parametrize(
    "overrides, words",
    [
        ("process.match=-1", "process.match=-1.* must be >= 0"),
        ("process.match_steps=0", "process.match_steps=0.* must be >= 1"),
        ("process.match_kernel=linear", "choose one of poly3, rbf"),
        ("process.match_features=clip", "choose one of net, pixels"),
        ("process.match=1 batch_size=8 optim.accumulate=8", "which has 1; set batch_size=16"),
        ("process.match_t_range=1,0.5", "match_t_range=.*give 0 <= low < high <= 1"),
        ("process.train_t_range=0.5", "train_t_range=.*low,high, or such a pair for each of the 1"),
        ("process.train_t_range=0,0.5,0,1", "such a pair for each"),
        ("process.train_t_range=0.5,1.5", "give 0 <= low < high <= 1"),
        ("process.match=1 process.train_t_range=0,0.4", "have no times in common"),
        # 53 of 100 weak steps, down to 48% of the noise
        (
            "process.train_t_range=0.6,1 sample.steps=100 sample.budgets=0.6",
            "sample.budgets=0.6 uses patch size 4 from 1 to 0.4[0-9] of the noise, but it trains "
            "on 0.6 to 1 .process.train_t_range",
        ),
    ],
)
def test_settings_that_cannot_be(overrides, words):
    with pytest.raises(UserError, match=words):
        validate(flexible_run("x", *overrides.split(), flow=True))
