"""Mamba-1, Mamba-2, S4D: every way of running a mixer gives the same, and the language model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.mixers.bidirectional import Bidirectional
from lintime.model.mixers.mamba import Mamba1, Mamba2
from lintime.model.mixers.s4d import S4D, fft_convolve, ssm_kernel
from lintime.model.nets.mamba_lm import MambaConfig, MambaLM, make_mixer
from lintime.model.sampling import make_sampler, pack_prompts
from lintime.train.optimizers import decays
from lintime.train.override import apply_overrides
from tests.tiny import assert_close, quick, tiny_run, train_lines, values, write_text

B, T, WIDTH = 2, 13, 8
MIXERS = {
    "mamba1": Mamba1(features=WIDTH, d_state=4),
    "mamba2": Mamba2(features=WIDTH, d_state=4, headdim=4, ngroups=2, chunk=4),
    "mamba2-gate": Mamba2(
        features=WIDTH, d_state=4, headdim=4, rmsnorm=False, D_has_hdim=True, d_ssm=8,
        dt_limit=(0.01, 0.05), use_bias=True, conv_bias=False, chunk=4,
    ),
    "s4d": S4D(features=WIDTH, d_state=4, bidirectional=False),
    "s4d-real": S4D(features=WIDTH, d_state=3, pole_init="real", bidirectional=False),
}  # fmt: skip


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


@pytest.fixture(scope="module", params=MIXERS)
def case(request):
    mixer = MIXERS[request.param]
    variables, x = params_of(mixer), draw(B, T, WIDTH)
    call = jax.jit(lambda x, **kw: mixer.apply(variables, x, **kw)[0])
    extend = jax.jit(lambda x, s, **kw: mixer.apply(variables, x, s, method="extend", **kw)[:2])
    step = jax.jit(lambda x, s: mixer.apply(variables, x, s, method="step"))
    return mixer, call, extend, step, x, call(x)


def test_prefill_in_chunks_then_steps_is_the_whole_call(case):
    mixer, _, extend, step, x, whole = case
    state, outs = mixer.init_state(B), []
    for start, stop in ((0, 1), (1, 3), (3, 9)):
        y, state = extend(x[:, start:stop], state)
        outs.append(y)
    for t in range(9, T):
        y, state = step(x[:, t], state)
        outs.append(y[:, None])
    assert_close(np.concatenate(outs, axis=1), whole, 2e-5)


def test_rows_of_different_lengths_prefill_together(case):
    mixer, call, extend, step, x, whole = case
    lengths = jnp.array([5, 9])
    junk = np.where(np.arange(T)[None, :, None] < np.array(lengths)[:, None, None], x, np.nan)
    y, state = extend(junk, mixer.init_state(B), lengths=lengths)
    following = x[np.arange(B), np.array(lengths)]
    after, _ = step(following, state)
    for row, n in enumerate((5, 9)):
        assert_close(y[row, :n], whole[row, :n], 2e-5)
        assert_close(after[row], whole[row, n], 2e-5)


def test_documents_do_not_see_each_other(case):
    mixer, call, extend, _, x, _ = case
    ids = jnp.asarray([[1] * 6 + [2] * 7, [1] * 2 + [2] * 9 + [3] * 2])
    packed = call(x, segment_ids=ids)
    for row, cuts in enumerate(((0, 6, 13), (0, 2, 11, 13))):
        for a, b in zip(cuts, cuts[1:]):
            alone = call(x[row : row + 1, a:b])
            assert_close(packed[row : row + 1, a:b], alone, 2e-5)
    state = mixer.init_state(B)
    first, state = extend(x[:, :4], state, segment_ids=ids[:, :4])
    rest, _ = extend(x[:, 4:], state, segment_ids=ids[:, 4:])
    assert_close(np.concatenate([first, rest], axis=1), packed, 2e-5)


def test_later_tokens_change_nothing_before(case):
    _, call, _, _, x, whole = case
    changed = call(np.concatenate([x[:, :7], draw(B, T - 7, WIDTH, seed=5)], axis=1))
    assert_close(changed[:, :7], whole[:, :7], 1e-6)
    assert np.abs(changed[:, 7:] - whole[:, 7:]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_both_directions(kind):
    """Forward plus the mirrored backward mixer; padding on the right reaches neither."""
    mixer = Bidirectional(MIXERS[kind])
    x = draw(1, T, WIDTH)
    variables = params_of(mixer)
    call = jax.jit(lambda x, **kw: mixer.apply(variables, x, **kw)[0])
    parts = {n: {"params": variables["params"][n]} for n in ("forward", "backward")}
    ahead, _ = MIXERS[kind].apply(parts["forward"], x)
    back, _ = MIXERS[kind].apply(parts["backward"], x[:, ::-1])
    assert_close(call(x), ahead + back[:, ::-1], 2e-5)
    mask = (np.arange(T) < 9)[None]
    padded = np.where(mask[..., None], x, np.nan)
    assert_close(call(padded, mask=mask)[:, :9], call(x[:, :9]), 2e-5)
    ids = jnp.asarray([[1] * 5 + [2] * 8])
    assert_close(call(x, segment_ids=ids)[:, :5], call(x[:, :5]), 2e-5)
    with pytest.raises(ValueError, match="whole sequences"):
        reversed_mixer = MIXERS[kind].clone(reverse=True)
        state = reversed_mixer.init_state(1)
        reversed_mixer.apply(parts["backward"], x, state, method="extend")


@pytest.mark.parametrize("init", ["lin", "inv", "real"])
def test_s4d_is_a_convolution_in_both_directions(init):
    """The FFT form, the recurrence (taken where documents are given), and the definition."""
    mixer = S4D(features=WIDTH, d_state=4, pole_init=init)
    variables, x = params_of(mixer), draw(B, T, WIDTH)
    call = jax.jit(lambda x, **kw: mixer.apply(variables, x, **kw)[0])
    assert_close(call(x, segment_ids=jnp.ones((B, T), jnp.int32)), call(x), 2e-5)
    ids = jnp.asarray([[1] * 6 + [2] * 7] * B)
    assert_close(call(x, segment_ids=ids)[:, :6], call(x[:, :6]), 2e-5)
    assert_close(call(x, segment_ids=ids)[:, 6:], call(x[:, 6:]), 2e-5)
    mask = np.broadcast_to(np.arange(T) < 9, (B, T))
    assert_close(call(np.where(mask[..., None], x, np.nan), mask=mask)[:, :9], call(x[:, :9]), 2e-5)

    u = draw(1, 6, 1)
    ahead, back = draw(1, 6, seed=1), draw(1, 6, seed=2)
    want = [
        sum(ahead[0, t - j] * u[0, j, 0] for j in range(t + 1))
        + sum(back[0, j - t - 1] * u[0, j, 0] for j in range(t + 1, 6))
        for t in range(6)
    ]
    assert_close(np.array(fft_convolve(jnp.asarray(u), ahead, back))[0, :, 0], np.array(want), 1e-5)


@pytest.mark.parametrize("length", [1, 2, 9, 50])
def test_the_kernel_of_a_diagonal_system(length):
    rng = np.random.default_rng(0)
    step = -rng.uniform(0.01, 0.5, (3, 4)) + 1j * rng.uniform(0, 3, (3, 4))
    weight = rng.standard_normal((3, 4)) + 1j * rng.standard_normal((3, 4))
    want = (weight[..., None] * np.exp(step[..., None] * np.arange(length))).sum(1).real
    got = ssm_kernel(step.astype(np.complex64), weight.astype(np.complex64), length)
    assert_close(np.asarray(got), want, 1e-5)


def test_initial_values():
    """dt between 1e-3 and 0.1, decays as published, none of them decayed by the optimiser."""
    for name in ("mamba1", "mamba2"):
        params = MIXERS[name].init(jax.random.key(3), jnp.zeros((1, 4, WIDTH)))["params"]
        dt = jax.nn.softplus(params["dt_bias"])
        assert (dt > 0.99e-3).all() and (dt < 0.101).all()
        a = np.exp(params["A_log"])
        if name == "mamba1":
            assert_close(a, np.broadcast_to(np.arange(1.0, 5), a.shape), 1e-6)
        assert (a >= 1).all() and (a <= 16).all()
        stacked = jax.tree.map(lambda a: a[None], params)
        flat = jax.tree_util.tree_flatten_with_path({"layers": {"mixer": stacked}})[0]
        kept = {path[-1].key for path, leaf in flat if not decays(path, leaf)}
        assert {"A_log", "D", "dt_bias"} <= kept and "kernel" not in kept


CONFIG = MambaConfig(vocab_size=11, d_model=WIDTH, n_layer=2, d_state=4, headdim=4, chunk=4)
NETS = {
    "mamba2": CONFIG,
    "mamba1-mlp": dataclasses.replace(CONFIG, mixer="mamba1", d_intermediate=12),
    "untied": dataclasses.replace(CONFIG, tie_embeddings=False, mask_documents=True),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_language_model_continues_from_its_state(name, dtype):
    config = NETS[name]
    net = MambaLM(config, dtype)
    tokens = np.random.default_rng(0).integers(0, 11, (B, T)).astype(np.int32)
    ids = np.cumsum(tokens == 1, axis=1)
    variables = net.init(jax.random.key(0), tokens[:, :4])
    whole, aux = jax.jit(net.apply)(variables, tokens, segment_ids=ids)
    assert whole.dtype == jnp.float32 and aux == {}
    extend = jax.jit(lambda t, s, i: net.apply(variables, t, s, segment_ids=i, method="extend"))
    state = net.init_state(B)
    one, state, _ = extend(tokens[:, :5], state, ids[:, :5])
    two, state, _ = extend(tokens[:, 5:], state, ids[:, 5:])
    error = 2e-5 if dtype == jnp.float32 else 3e-2
    assert_close(np.concatenate([one, two], axis=1), whole, error)
    assert ("lm_head" in variables["params"]) == (not config.tie_embeddings)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_no_gradient(remat):
    tokens = np.random.default_rng(0).integers(0, 11, (B, T)).astype(np.int32)
    variables = MambaLM(CONFIG).init(jax.random.key(0), tokens[:, :4])
    loss = lambda v, net: jnp.sum(jnp.sin(net.apply(v, tokens)[0]))
    want = jax.jit(jax.grad(lambda v: loss(v, MambaLM(CONFIG))))(variables)
    got = jax.jit(jax.grad(lambda v: loss(v, MambaLM(CONFIG, remat=remat))))(variables)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), got, want)


def test_sizes_that_do_not_fit_are_named():
    for change, words in (
        ({"headdim": 3}, "headdim=3"),
        ({"ngroups": 3}, "ngroups=3"),
        ({"d_ssm": 99}, "d_ssm=99"),
        ({"mixer": "mamba3"}, "mamba1 or mamba2"),
    ):
        with pytest.raises(ValueError, match=words):
            make_mixer(dataclasses.replace(CONFIG, **change), parent=None).sizes()


def test_greedy_text_is_the_argmax_of_whole_sequences():
    """Ragged prefill and decoding with the state, against the net on everything so far."""
    net = MambaLM(NETS["mamba1-mlp"])
    variables = net.init(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))
    variables = jax.tree.map(lambda a: a * 3 if a.ndim > 1 else a, variables)
    prompts, lengths = pack_prompts([[5, 6, 7, 8, 9], [4]], multiple=4)
    sampler = make_sampler(net, length=5, never=(), prefill_chunk=3)
    drawn, _ = sampler(variables, jax.random.key(0), prompts, lengths, temperature=0.0)
    forward = jax.jit(lambda text: net.apply(variables, text)[0][0])
    for row, n in enumerate(lengths):
        text = np.zeros((1, 16), np.int32)  # what follows a token does not change its logits
        text[0, :n] = prompts[row, :n]
        for at, token in enumerate(np.asarray(drawn[row]), n):
            logits = forward(text)[at - 1]
            best = np.sort(logits)[-2:]
            assert int(jnp.argmax(logits)) == token or best[1] - best[0] < 1e-4
            text[0, at] = token


MESHES = {
    "mixed": ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
    "sequence": ("mesh.data=4", "mesh.sequence=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_a_mesh_trains_like_one_device(mixer, tmp_path):
    """Three updates with carried state, on eight devices and on one."""
    net = MambaConfig(mixer=mixer, d_model=32, n_layer=2, d_state=8, headdim=16, chunk=8)
    run = dataclasses.replace(tiny_run(write_text(tmp_path / "text.txt"), "steps=3"), net=net)
    want = train_lines(run, tmp_path / "one", devices=jax.devices()[:1])
    name = "mixed" if mixer == "mamba2" else "sequence"
    lines = train_lines(apply_overrides(run, MESHES[name]), tmp_path / "mesh")
    for key, rtol in (("loss", 2e-5), ("grad_norm", 1e-3), ("val_loss", 2e-4)):
        assert values(lines, key) == pytest.approx(values(want, key), rel=rtol), key
