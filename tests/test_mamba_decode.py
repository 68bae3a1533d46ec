"""Mamba token by token: every form of the step against whole sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.kernels_pallas.causal_conv1d import causal_conv1d
from lintime.model.mixers.mamba import Mamba1, Mamba2
from lintime.model.mixers.mamba_decode import conv_step, dual_segments, resize
from lintime.model.nets.aim import AiM, AiMConfig
from lintime.model.sampling.classes import make_class_sampler, row_keys
from tests.tiny import assert_close, quick

B, T, WIDTH = 2, 11, 8
SMALL = dict(features=WIDTH, d_state=4)
PLAIN = Mamba2(**SMALL, headdim=4, chunk=4)
MIXERS = {
    "mamba1": Mamba1(**SMALL),
    "mamba1-bias": Mamba1(**SMALL, use_bias=True, conv_bias=False, d_conv=1, dt_rank=3),
    "mamba2": PLAIN,
    "mamba2-groups": Mamba2(
        **SMALL, expand=3, headdim=2, ngroups=2, norm_before_gate=True, d_conv=3
    ),
    "mamba2-mlp": Mamba2(
        **SMALL, headdim=4, d_ssm=8, D_has_hdim=True, use_bias=True, rmsnorm=False, d_conv=2,
        dt_limit=(0.01, 0.05), conv_bias=False,
    ),
}  # fmt: skip
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


def whole_call(mixer, variables, x, **options):
    return jax.jit(lambda x: mixer.apply(variables, x, **options)[0])(x)


def relative(actual, expected):
    """Largest deviation, in units of the largest number."""
    actual, expected = (np.asarray(a, np.float32) for a in (actual, expected))
    return np.abs(actual - expected).max() / np.abs(expected).max()


def begin(mixer, kind, **options):
    if kind == "state":
        return mixer.init_state(B, **options)
    return mixer.init_cache(B, T + 2, kind=kind, **options)


@functools.cache
def case(name):
    """A mixer, its parameters, an input, and the whole call."""
    mixer, x = MIXERS[name], draw(B, T, WIDTH)
    variables = params_of(mixer)
    return mixer, variables, x, whole_call(mixer, variables, x)


@pytest.mark.parametrize("name, kind", CASES)
def test_steps_equal_the_whole_call(name, kind):
    mixer, variables, x, whole = case(name)
    y, state = decode(mixer, variables, x, begin(mixer, kind))
    assert_close(y, whole, 2e-5)
    assert kind == "state" or int(state.offset) == T


def test_a_step_continues_a_prefill_and_its_document():
    """Prefill, step, extend again: the step belongs to the document of the token before it."""
    variables, x = params_of(PLAIN), draw(B, T, WIDTH)
    ids = jnp.asarray([[1] * 3 + [2] * 8, [1] * 5 + [2] * 4 + [3] * 2])
    whole = whole_call(PLAIN, variables, x, segment_ids=ids)
    extend = jax.jit(
        lambda x, s, i: PLAIN.apply(variables, x, s, segment_ids=i, method="extend")[:2]
    )
    first, state = extend(x[:, :6], PLAIN.init_state(B), ids[:, :6])
    one, state = PLAIN.apply(variables, x[:, 6], state, method="step")
    assert state.segment.tolist() == [2, 2]
    last, _ = extend(x[:, 7:], state, ids[:, 7:])
    assert_close(jnp.concatenate([first, one[:, None], last], axis=1), whole, 2e-5)


@pytest.mark.parametrize("piece", [4, 9])
def test_a_dual_cache_grows_between_segments(piece):
    _, variables, x, whole = case("mamba2")
    cache, outs, start = {"layer": [PLAIN.init_cache(B, piece, kind="dual")]}, [], 0
    ends = dual_segments(cache, T, piece)
    assert ends == {4: (4, 8, 11), 9: (9, 11)}[piece]
    for end in ends:
        cache = resize(cache, end)["layer"][0]
        assert cache.tokens.x.shape[2] == end
        y, cache = decode(PLAIN, variables, x[:, start:end], cache)
        outs.append(y)
        start, cache = end, {"layer": [cache]}
    assert_close(jnp.concatenate(outs, axis=1), whole, 2e-5)


@pytest.mark.parametrize(
    "cache, unroll", [("recurrent", None), ("recurrent", True), ("dual", None)]
)
def test_samplers_draw_the_same_with_every_cache(cache, unroll):
    """Guided logits of every step against the net on the whole image."""
    config = AiMConfig(
        vocab_size=11, num_classes=3, num_tokens=10, d_model=WIDTH, n_layer=2, d_state=4, headdim=4,
        chunk=4, conditioning="adaln_group", num_groups=2,
    )  # fmt: skip
    net, labels = AiM(config), jnp.asarray([0, 2])
    variables = net.init(jax.random.key(0), jnp.zeros((1, 10), jnp.int32), labels[:1])
    stir = lambda path, a: a * 4 if path[-1].key in ("kernel", "embedding") else a
    variables = jax.tree_util.tree_map_with_path(stir, variables)
    sampler = make_class_sampler(net, cache=cache, unroll=unroll, piece=4, return_logits=True)
    codes, logits = sampler(variables, row_keys(jax.random.key(1), 2), labels, guidance=1.5)
    forward = jax.jit(lambda codes, labels: net.apply(variables, codes, labels)[0])
    cond, uncond = forward(codes, labels), forward(codes, jnp.full_like(labels, 3))
    assert relative(jnp.moveaxis(logits, 0, 1), uncond + 1.5 * (cond - uncond)) < 1e-4
    assert codes.shape == (2, 10) and relative(cond, uncond) > 1e-2


def test_only_what_reads_empty_slots_is_cut(monkeypatch):
    state = PLAIN.init_cache(B, T)
    assert dual_segments([state, state], T, 4) == (T,)
    assert resize(state, 3) == state
    dual = PLAIN.init_cache(B, T, kind="dual")
    monkeypatch.setattr(
        "lintime.kernels_pallas.ssd_decode.implementation_for", lambda c: "pallas_gpu"
    )
    assert dual_segments([dual], T, 4) == (T,)


def test_long_decays_neither_overflow_nor_lose_the_present():
    """Sums of decays reach hundreds; only their differences count, and dt may be 0."""
    mixer = PLAIN.clone(dt_limit=(0.0, 10.0))
    variables = params_of(mixer)
    variables["params"]["dt_bias"] = jnp.asarray([30.0, 10.0, -100.0, 0.0])
    x = draw(B, T, WIDTH)
    whole = whole_call(mixer, variables, x)
    y, cache = decode(mixer, variables, x, mixer.init_cache(B, T, kind="dual"))
    assert float(jnp.min(cache.tokens.cs)) < -300 and np.isfinite(y).all()
    assert relative(y, whole) < 2e-4


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
@pytest.mark.parametrize("kind", ["state", "recurrent"])
def test_states_in_bfloat16(name, kind):
    """Dtypes are kept, by `extend` too; rounding the state at every step costs what it costs."""
    mixer, variables, x, whole = case(name)
    state = begin(mixer, kind, ssm_dtype=jnp.bfloat16)
    y, state = decode(mixer, variables, x, state)
    assert state.ssm.dtype == jnp.bfloat16 and state.conv.dtype == jnp.float32
    assert 1e-5 < relative(y, whole) < 2e-2
    if kind == "state":
        extend = jax.jit(lambda x, s: mixer.apply(variables, x, s, method="extend")[1])
        state = extend(x, state)
        assert state.ssm.dtype == jnp.bfloat16
    assert begin(mixer, kind, dtype=jnp.bfloat16).ssm.dtype == jnp.float32


@pytest.mark.parametrize("kind", ["recurrent", "dual"])
def test_bfloat16_net(kind):
    mixer = PLAIN.clone(dtype=jnp.bfloat16)
    _, variables, x, whole = case("mamba2")
    y, cache = decode(mixer, variables, x, begin(mixer, kind))
    assert y.dtype == jnp.bfloat16 and cache.conv.dtype == jnp.bfloat16
    assert relative(y, whole) < 2e-2


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("ring", [False, True])
def test_convolution_step(width, ring):
    x, weight, bias = draw(B, T, 6), draw(width, 6, seed=1), draw(6, seed=2)
    want, _ = causal_conv1d(x, weight, bias, activation="silu")
    window = jnp.zeros((B, width - 1, 6), jnp.bfloat16 if width == 2 else jnp.float32)
    dtype = window.dtype
    step = jax.jit(conv_step)
    for t in range(T):
        y, window = step(x[:, t], weight, bias, window, jnp.int32(t) if ring else None)
        assert relative(y, want[:, t]) < (4e-3 if width == 2 else 1e-6)
    assert window.dtype == dtype


def test_what_does_not_exist_is_named():
    with pytest.raises(ValueError, match="Mamba1 has no cache 'dual'"):
        MIXERS["mamba1"].init_cache(B, T, kind="dual")
    with pytest.raises(ValueError, match="Mamba2 has no cache 'ring'"):
        PLAIN.init_cache(B, T, kind="ring")
    with pytest.raises(ValueError, match="needs unroll=True"):
        AiM(AiMConfig(d_model=WIDTH, headdim=4)).init_state(B, cache="dual")
    backward = PLAIN.clone(reverse=True)
    with pytest.raises(ValueError, match="whole sequences"):
        backward.apply(params_of(PLAIN), draw(B, WIDTH), PLAIN.init_state(B), method="step")
