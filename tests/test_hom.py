"""The higher-order mixer: masks, padding, streams, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.kernels_pallas.poly_mix import merge_states
from lintime.model.mixers.hom import HigherOrderMixer, running_products
from tests.golden.quick import quick_jit

close = dict(rtol=2e-5, atol=2e-6)


@pytest.fixture(scope="module")
def case():
    layer = HigherOrderMixer(8, degree=3)
    x = np.random.default_rng(0).standard_normal((2, 7, 8)).astype(np.float32)
    params = layer.init(jax.random.key(0), x)["params"]
    noise = lambda a: a + 0.1 * np.random.default_rng(a.size).standard_normal(a.shape)
    return layer, {"params": jax.tree.map(lambda a: jnp.float32(noise(a)), params)}, x


def test_products_are_of_different_parts():
    u = jax.nn.gelu(jnp.array([0.5, 2.0, -1.0]), approximate=False)
    got = running_products(tuple(jnp.array([a]) for a in (0.5, 2.0, -1.0)))
    np.testing.assert_allclose(got, [u[0], u[0] * u[1], u[0] * u[1] * u[2]], rtol=1e-6)


def test_frames_are_their_mask_and_pieces_of_a_stream(case):
    layer, variables, x = case
    lengths = (2, 4, 1)
    frame = np.repeat(np.arange(3), lengths)
    y, _ = layer.apply(variables, x, frames=lengths)
    dense, _ = layer.apply(variables, x, query_mask=frame[None, None] <= frame[None, :, None])
    np.testing.assert_allclose(y, dense, **close)
    state, pieces, published = layer.init_state(2), [], []
    other = layer.init_state(2)
    for part in np.split(x, np.cumsum(lengths)[:-1], axis=1):
        piece, state, aux = layer.apply(variables, part, state, method="extend")
        wrong, other, _ = layer.apply(variables, part, other, count_pieces=True, method="extend")
        pieces.append(piece), published.append(wrong)
        assert aux == {}
    np.testing.assert_allclose(np.concatenate(pieces, 1), y, **close)
    np.testing.assert_array_equal(state.count, [7, 7])
    assert np.abs(np.concatenate(published, 1) - y).max() > 1e-3  # pieces of unequal lengths


def test_steps_are_the_causal_form(case):
    layer, variables, x = case
    causal = HigherOrderMixer(8, degree=3, causal=True)
    y, _ = causal.apply(variables, x)
    state, steps = layer.init_state(2), []
    for t in range(x.shape[1]):
        one, state = layer.apply(variables, x[:, t], state, method="step")
        steps.append(one)
    np.testing.assert_allclose(np.stack(steps, 1), y, **close)
    documents = np.array([[0, 0, 0, 1, 1, 1, 1]] * 2)
    packed, _ = causal.apply(variables, x, segment_ids=documents)
    np.testing.assert_allclose(packed[:, 3:], causal.apply(variables, x[:, 3:])[0], **close)


def test_states_merge(case):
    layer, variables, x = case
    run = lambda part: layer.apply(variables, part, layer.init_state(2), method="extend")[1]
    both = merge_states(run(x[:, :3]), run(x[:, 3:]))
    np.testing.assert_allclose(both.mean, run(x).mean, **close)


def test_padding_may_hold_anything_and_nothing_gives_the_bias(case):
    layer, variables, x = case
    mask = jnp.array([[1, 1, 0.5, 0, 0], [0, 0, 0, 0, 0]])
    context = jnp.where(mask[..., None] != 0, x[:, :5], jnp.nan)

    def loss(variables, context):
        y, _ = layer.apply(variables, x, context=context, context_mask=mask)
        return jnp.sum(y**2), y

    run = quick_jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    grads, y = run(variables, context)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    bias = variables["params"]["ag_proj"]["bias"]
    np.testing.assert_array_equal(y[1], np.broadcast_to(bias, y[1].shape))
    kept, _ = layer.apply(
        variables, x[:1], context=x[:1, :3], context_mask=2 * mask[:1, :3]
    )  # weights count by their ratios
    np.testing.assert_allclose(y[:1], kept, **close)


def test_lengths_of_a_piece_are_its_mask(case):
    layer, variables, x = case
    state = layer.init_state(2)
    lengths = jnp.array([7, 4])
    y, after, _ = layer.apply(variables, x, state, lengths=lengths, method="extend")
    want, _ = layer.apply(variables, x[1:, :4])
    np.testing.assert_allclose(y[1:, :4], want, **close)
    np.testing.assert_array_equal(after.count, lengths)


def test_bfloat16_stays_near(case):
    layer, variables, x = case
    y, _ = layer.apply(variables, x)
    low, _ = HigherOrderMixer(8, degree=3, dtype=jnp.bfloat16).apply(variables, x)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(np.float32), y, atol=0.02 * np.abs(y).max())


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"positions": 1}, "has no positions"),
        ({"context_mask": np.ones((2, 7))}, "context_mask without a context"),
        ({"context": np.ones((2, 3, 8)), "mask": np.ones((2, 7))}, "say nothing about a context"),
        ({"context": np.ones((2, 3, 8)), "frames": (7,)}, "say nothing about a context"),
        ({"frames": (3, 3)}, "add up to N=7"),
    ],
)
def test_what_does_not_belong_together_is_refused(case, told, message):
    layer, variables, x = case
    with pytest.raises(ValueError, match=message):
        layer.apply(variables, x, **told)


def test_a_degree_below_one_is_refused():
    with pytest.raises(ValueError, match="degree=0"):
        HigherOrderMixer(8, degree=0).init(jax.random.key(0), jnp.ones((1, 2, 8)))
