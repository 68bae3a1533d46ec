"""Schedules by formula, weight decay by rule, Adafactor by layer, clipping without codebooks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lintime.train.optimizers import decays, make_optimizer, make_schedule
from lintime.train.schema import Optim


@pytest.mark.parametrize("name", ["cosine", "linear", "sqrt", "constant"])
@pytest.mark.parametrize("warmup, decay_steps, steps", [(10, 0, 50), (0, 30, 50), (7, 0, 7)])
def test_schedule_by_formula(name, warmup, decay_steps, steps):
    schedule = make_schedule(Optim(schedule=name, warmup=warmup, decay_steps=decay_steps), steps)
    total = decay_steps or steps

    def by_hand(n):
        if n < warmup:
            return n / warmup
        share = min((n - warmup) / max(total - warmup, 1), 1)
        falls = {"cosine": 0.5 - 0.5 * np.cos(np.pi * share), "linear": share, "sqrt": share**0.5}
        return 1 - 0.9 * falls.get(name, 0)

    counts = range(60)
    np.testing.assert_allclose([schedule(n) for n in counts], [by_hand(n) for n in counts], 1e-5)
    if warmup:
        assert schedule(0) == 0


PARAMS = {
    "embedding": np.full((5, 4), 2.0, np.float32),
    "pe_scale": np.float32(2.0),
    "out_bias": np.full((5,), 2.0, np.float32),
    "layers": {
        "attn": {
            "kernel": np.full((3, 4, 2), 2.0, np.float32),
            "u": np.full((3, 2), 2.0, np.float32),
            "v": np.full((3, 2), 2.0, np.float32),
        }
    },
}
DECAYED = {"embedding", "pe_scale", "kernel"}  # ndim != 1 in one layer's terms


def name_of(path):
    return path[-1].key


def test_decay_mask():
    mask = jax.tree_util.tree_map_with_path(decays, PARAMS)
    for path, value in jax.tree_util.tree_leaves_with_path(mask):
        assert value == (name_of(path) in DECAYED), path


def run_updates(optim, count=1, grads=None):
    tx = make_optimizer(optim, 100)
    params = jax.tree.map(jnp.asarray, PARAMS)
    grads = jax.tree.map(jnp.zeros_like, params) if grads is None else grads
    state = tx.init(params)
    for _ in range(count):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_decay_is_not_scaled_by_the_learning_rate(name):
    """Zero gradients: p <- p * (1 - weight_decay), even in the first update, whose rate is 0."""
    optim = Optim(name=name, learning_rate=1e-3, warmup=10, weight_decay=0.1)
    for path, p in jax.tree_util.tree_leaves_with_path(run_updates(optim, 2)):
        expected = 2 * 0.9**2 if name_of(path) in DECAYED else 2.0
        np.testing.assert_allclose(p, expected, 1e-6, err_msg=str(path))


def test_decay_scaled_by_the_learning_rate_on_request():
    optim = Optim(learning_rate=0.5, warmup=0, schedule="constant", weight_decay=0.1,
                  decay_times_lr=True)  # fmt: skip
    for path, p in jax.tree_util.tree_leaves_with_path(run_updates(optim)):
        expected = 2 * (1 - 0.5 * 0.1) if name_of(path) in DECAYED else 2.0
        np.testing.assert_allclose(p, expected, 1e-6, err_msg=str(path))


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_the_first_update_has_rate_zero(name):
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    before = run_updates(Optim(name=name, warmup=5), 1, grads)
    jax.tree.map(np.testing.assert_array_equal, before, PARAMS)


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), tree)


def test_adafactor_treats_each_layer_as_if_alone():
    scale = np.array([0.1, 1, 100], np.float32)[:, None, None]
    layers = random_like({"attn": {"kernel": np.zeros((3, 130, 140)), "w": np.zeros((3, 4, 2))}}, 0)
    layers = jax.tree.map(lambda a: a * scale, layers)
    rest = random_like({"embedding": np.zeros((5, 4))}, 1)
    optim = Optim(name="adafactor", learning_rate=0.1, warmup=0, schedule="constant")

    def train(params):
        tx, state = make_optimizer(optim, 100), None
        state = tx.init(params)
        for n in range(3):
            grads = jax.tree.map(lambda p, n=n: p * p * 0.1 * (n + 1), params)
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    together = train({**rest, "layers": layers})
    alone = [train(jax.tree.map(lambda a, i=i: a[i], layers)) for i in range(3)]
    stacked = jax.tree.map(lambda *a: np.stack(a), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), together["layers"], stacked)
    np.testing.assert_allclose(together["embedding"], train(rest)["embedding"], 1e-6)


@pytest.mark.parametrize("factor, clipped", [(0.01, False), (100.0, True)])
def test_clipping_by_the_global_norm(factor, clipped):
    """Lion's sign hides it, Adam's first step too; eps as large as the gradients shows it."""
    grads = jax.tree.map(lambda a: factor * jnp.asarray(a), random_like(PARAMS, 2))
    norm = float(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))))
    assert (norm > 1) == clipped
    common = dict(learning_rate=1.0, warmup=0, schedule="constant", eps=1.0)
    got = run_updates(Optim(**common, clip=1.0), 1, grads)
    by_hand = jax.tree.map(lambda g: g / max(norm, 1.0), grads)
    expected = run_updates(Optim(**common), 1, by_hand)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), got, expected)


def test_unknown_optimisers_are_refused():
    with pytest.raises(ValueError, match="choose adamw, lion or adafactor"):
        make_optimizer(Optim(name="sgd"), 10)
