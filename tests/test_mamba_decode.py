"""Mamba token by token: every form of the step against whole sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.kernels_pallas.causal_conv1d import causal_conv1d
from lintime.model.mixers.mamba import Mamba1, Mamba2
from lintime.model.mixers.mamba_decode import conv_step, heads_together, with_length
from tests.tiny import assert_close, quick

B, T, WIDTH = 2, 11, 8
SMALL = dict(features=WIDTH, d_state=4)
PLAIN = Mamba2(**SMALL, headdim=4, chunk=4)
MIXERS = {
    "mamba1": Mamba1(**SMALL),
    "mamba1-bias": Mamba1(**SMALL, use_bias=True, conv_bias=False, d_conv=1, dt_rank=3),
    "mamba2": PLAIN,
    "mamba2-groups": Mamba2(**SMALL, headdim=4, ngroups=2, norm_before_gate=True, d_conv=3),
    "mamba2-many-heads": Mamba2(**SMALL, expand=3, headdim=2, d_conv=2),
    "mamba2-mlp": Mamba2(**SMALL, headdim=4, d_ssm=8, D_has_hdim=True, use_bias=True),
    "mamba2-gate": Mamba2(
        **SMALL, headdim=4, rmsnorm=False, dt_limit=(0.01, 0.05), conv_bias=False
    ),
}
CASES = [(name, "state") for name in MIXERS] + [(name, "recurrent") for name in MIXERS]
CASES += [(name, "dual") for name in MIXERS if name.startswith("mamba2")]


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def params_of(mixer):
    variables = mixer.init(jax.random.key(0), jnp.zeros((1, 4, WIDTH)))
    rng = np.random.default_rng(1)
    stir = lambda a: a + 0.1 * jnp.asarray(rng.standard_normal(a.shape), a.dtype)
    return {"params": jax.tree.map(stir, variables["params"])}


def decode(mixer, variables, x, state):
    """All steps in one scan, as a sampler does it."""

    def one(state, x_t):
        y, state = mixer.apply(variables, x_t, state, method="step")
        return state, y

    state, y = jax.jit(lambda x, s: jax.lax.scan(one, s, jnp.moveaxis(x, 1, 0)))(x, state)
    return jnp.moveaxis(y, 0, 1), state


def begin(mixer, kind, **options):
    if kind == "state":
        return mixer.init_state(B, **options)
    return mixer.init_cache(B, T + 2, kind=kind, **options)


@pytest.mark.parametrize("name, kind", CASES)
def test_steps_equal_the_whole_call(name, kind):
    mixer = MIXERS[name]
    variables, x = params_of(mixer), draw(B, T, WIDTH)
    whole, _ = mixer.apply(variables, x)
    y, state = decode(mixer, variables, x, begin(mixer, kind))
    assert_close(y, whole, 2e-5)
    assert kind == "state" or int(state.index) == T


def test_a_step_continues_a_prefill_and_its_document():
    """Prefill, step, extend again: the step belongs to the document of the token before it."""
    variables, x = params_of(PLAIN), draw(B, T, WIDTH)
    ids = jnp.asarray([[1] * 3 + [2] * 8, [1] * 5 + [2] * 4 + [3] * 2])
    whole, _ = PLAIN.apply(variables, x, segment_ids=ids)
    extend = lambda x, s, i: PLAIN.apply(variables, x, s, segment_ids=i, method="extend")[:2]
    first, state = extend(x[:, :6], PLAIN.init_state(B), ids[:, :6])
    one, state = PLAIN.apply(variables, x[:, 6], state, method="step")
    assert state.segment.tolist() == [2, 2]
    last, _ = extend(x[:, 7:], state, ids[:, 7:])
    assert_close(jnp.concatenate([first, one[:, None], last], axis=1), whole, 2e-5)


@pytest.mark.parametrize("pieces", [(4, 4, 3), (1, 10), (2, 9)])
def test_a_dual_cache_reads_as_many_slots_as_it_is_told(pieces):
    """In pieces whose ends bound what is read; what lies beyond, NaN here, is not looked at."""
    variables, x = params_of(PLAIN), draw(B, T, WIDTH)
    whole, _ = PLAIN.apply(variables, x)
    cache, outs, start = PLAIN.init_cache(B, T, kind="dual"), [], 0
    for size in pieces:
        stop = start + size
        nan = jnp.where(jnp.arange(T) < stop, 0.0, jnp.nan)
        cache = dataclasses.replace(
            cache,
            x=cache.x + nan[:, None],
            b=cache.b + nan[:, None, None],
            weight=cache.weight + nan,
        )
        cache = with_length({"layer": [cache]}, stop)["layer"][0]
        assert cache.length == stop
        y, cache = decode(PLAIN, variables, x[:, start:stop], cache)
        cache = jax.tree.map(lambda a: jnp.where(jnp.isnan(a), 0, a), cache)
        empty = jnp.where(jnp.arange(T) < stop, cache.weight, -jnp.inf)
        cache = dataclasses.replace(cache, weight=empty)
        outs.append(y)
        start = stop
    assert_close(jnp.concatenate(outs, axis=1), whole, 2e-5)


def test_long_decays_neither_overflow_nor_lose_the_present():
    """Sums of decays reach thousands; only their differences count, and dt may be 0."""
    mixer = PLAIN.clone(dt_limit=(0.0, 50.0))
    variables = params_of(mixer)
    variables["params"]["dt_bias"] = jnp.asarray([30.0, 10.0, -100.0, 0.0])
    x = draw(B, T, WIDTH)
    whole, _ = mixer.apply(variables, x)
    y, cache = decode(mixer, variables, x, mixer.init_cache(B, T, kind="dual"))
    assert float(jnp.min(cache.decay)) < -1000 and np.isfinite(y).all()
    assert_close(y, whole, 1e-4)


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
@pytest.mark.parametrize("kind", ["state", "recurrent"])
def test_states_in_bfloat16(name, kind):
    """Dtypes are kept, by `extend` too; rounding the state at every step costs what it costs."""
    mixer = MIXERS[name]
    variables, x = params_of(mixer), draw(B, T, WIDTH)
    whole, _ = mixer.apply(variables, x)
    state = begin(mixer, kind, ssm_dtype=jnp.bfloat16)
    y, state = decode(mixer, variables, x, state)
    assert state.ssm.dtype == jnp.bfloat16 and state.conv.dtype == jnp.float32
    error = np.abs(y - whole).max() / np.abs(whole).max()
    assert 1e-5 < error < 2e-2
    if kind == "state":
        _, state, _ = mixer.apply(variables, x, state, method="extend")
        assert state.ssm.dtype == jnp.bfloat16
    assert begin(mixer, kind, dtype=jnp.bfloat16).ssm.dtype == jnp.float32


@pytest.mark.parametrize("kind", ["recurrent", "dual"])
def test_bfloat16_net(kind):
    mixer = PLAIN.clone(dtype=jnp.bfloat16)
    variables, x = params_of(PLAIN), draw(B, T, WIDTH)
    whole, _ = PLAIN.apply(variables, x)
    y, cache = decode(mixer, variables, x, begin(mixer, kind))
    assert y.dtype == jnp.bfloat16 and cache.conv.dtype == jnp.bfloat16
    assert_close(np.asarray(y, np.float32), whole, 4e-2)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("ring", [False, True])
def test_convolution_step(width, ring):
    x, weight, bias = draw(B, T, 6), draw(width, 6, seed=1), draw(6, seed=2)
    want, _ = causal_conv1d(x, weight, bias, activation="silu")
    window = jnp.zeros((B, width - 1, 6), jnp.bfloat16 if width == 2 else jnp.float32)
    dtype = window.dtype
    for t in range(T):
        y, window = conv_step(x[:, t], weight, bias, window, jnp.int32(t) if ring else None)
        assert_close(y, want[:, t], 1e-2 if width == 2 else 1e-5)
    assert window.dtype == dtype


def test_heads_lie_together_in_equal_numbers():
    assert [heads_together(h) for h in (1, 2, 6, 12, 24, 48, 13, 22)] == [1, 2, 6, 6, 8, 8, 1, 2]


def test_what_does_not_exist_is_named():
    with pytest.raises(ValueError, match="Mamba1 has no cache 'dual'"):
        MIXERS["mamba1"].init_cache(B, T, kind="dual")
    with pytest.raises(ValueError, match="Mamba2 has no cache 'ring'"):
        PLAIN.init_cache(B, T, kind="ring")
    backward = PLAIN.clone(reverse=True)
    with pytest.raises(ValueError, match="whole sequences"):
        backward.apply(params_of(PLAIN), draw(B, WIDTH), PLAIN.init_state(B), method="step")
