"""What the whole model promises: block length, reduction and way of running do not matter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.layers.codebook import update_codebook
from lintime.model.nets.transformer_vq import TransformerVQ, TransformerVQConfig, absorb
from tests.tiny import assert_close, quick

BASE = TransformerVQConfig(
    vocab_size=20, d_model=16, n_layer=2, d_k=8, d_v=16, n_code=6, block_len=4, mem_len=5,
    out_norm=True, pe_abs=True,
)  # fmt: skip
MHA = dict(head_type="mha", d_v=0)
T = 22  # no multiple of the block


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@functools.cache
def variables_of(**changes):
    """Weights of a config, none of them zero; they do not depend on lengths and switches."""
    net = TransformerVQ(dataclasses.replace(BASE, **changes))
    variables = jax.jit(net.init)({"params": jax.random.key(0)}, jnp.zeros((1, 8), jnp.int32))
    rng = np.random.default_rng(0)
    noise = lambda a: a + 0.1 * jnp.asarray(rng.normal(size=a.shape), a.dtype)
    params = jax.tree.map(noise, variables["params"])
    return {"params": params, "stats": variables["stats"]}


def tokens(seed=0, length=T):
    return np.random.default_rng(seed).integers(0, 20, (2, length)).astype(np.int32)


def run(variables=None, x=None, method=None, **changes):
    heads = {k: v for k, v in changes.items() if k in ("head_type", "d_v", "n_head")}
    net = TransformerVQ(dataclasses.replace(BASE, **changes))
    variables = variables_of(**heads) if variables is None else variables
    return jax.jit(net.apply)(variables, tokens() if x is None else x)


@functools.cache
def expected(**changes):
    return run(**changes)


@pytest.mark.parametrize("heads", [{}, MHA], ids=["shga", "mha"])
@pytest.mark.parametrize("block_len", [1, 7, 64])
def test_the_block_length_does_not_matter(block_len, heads):
    logits, aux = run(block_len=block_len, **heads)
    other, other_aux = expected(**heads)
    assert_close(logits, other, rtol=1e-4, atol=1e-4)
    for key in ("commit", "stats_delta"):
        assert_close(aux[key], other_aux[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reduction", ["serial", "matmul"])
def test_the_order_of_reduction_does_not_matter(reduction):
    assert_close(run(reduction=reduction)[0], expected()[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mem_len", [0, 1, 30])
def test_any_window(mem_len):
    logits = run(mem_len=mem_len)[0]
    assert_close(run(mem_len=mem_len, block_len=9)[0], logits, rtol=1e-4, atol=1e-4)
    assert not np.allclose(logits, expected()[0], atol=1e-3)


@pytest.mark.parametrize(
    "changes", [{}, {"mem_len": 0}, MHA, {"attention": "dense"}], ids=["vq", "M0", "mha", "dense"]
)
def test_prefill_then_decoding_is_decoding_from_the_start(changes):
    net = TransformerVQ(dataclasses.replace(BASE, **changes))
    variables = variables_of(**{k: v for k, v in changes.items() if k in ("head_type", "d_v")})
    x = tokens()
    whole, _ = jax.jit(net.apply)(variables, x)
    extend = jax.jit(functools.partial(net.apply, method="extend"))
    step = jax.jit(functools.partial(net.apply, method="step"))

    def decode(prefill):
        state, out = net.init_state(2, max_length=T), []
        if prefill:
            logits, state, _ = extend(variables, x[:, :prefill], state)
            out = [logits]
        for t in range(prefill, T):
            logits, state = step(variables, x[:, t], state)
            out.append(logits[:, None])
        return jnp.concatenate(out, 1), state

    (from_start, state), (prefilled, other) = decode(0), decode(13)
    assert_close(from_start, whole, rtol=1e-4, atol=1e-4)
    assert_close(prefilled, whole, rtol=1e-4, atol=1e-4)
    assert_close(other, state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["vq", "dense", "flash"])
def test_causality_by_jacobian(attention):
    """d logits[t] / d embedding of token j is zero for j > t, and not for all j <= t."""
    net = TransformerVQ(dataclasses.replace(BASE, attention=attention, vocab_size=T))
    init = jax.jit(net.init)({"params": jax.random.key(0)}, jnp.zeros((1, T), jnp.int32))

    def by_position(embedding):  # token t is row t of the table
        params = init["params"] | {"embedding": embedding}
        logits, _ = net.apply(init | {"params": params}, jnp.arange(T)[None])
        return jnp.sum(logits[0] * jnp.cos(jnp.arange(T)), axis=-1)

    jacobian = jax.jit(jax.jacrev(by_position))(init["params"]["embedding"])  # [T, T, D]
    size = np.abs(jacobian).sum(-1)
    assert (size[np.triu_indices(T, 1)] == 0).all()
    assert (np.diagonal(size) > 0).all() and (np.diagonal(size, -1) > 0).all()


def test_without_cache_the_window_bounds_what_is_seen():
    """Two layers of two sublayers see 4 * M tokens back without the cache, everything with it."""
    x = tokens()
    y = x.copy()
    y[:, 0] = (y[:, 0] + 1) % 20
    moved = lambda **changes: np.abs(run(x=y, **changes)[0] - run(x=x, **changes)[0]).max((0, 2))
    near = moved(cache=False, mem_len=2)
    assert (near[: 4 * 2] > 0).any() and (near[4 * 2 + 1 :] == 0).all()
    assert moved(mem_len=2)[4 * 2 + 1 :].max() > 0
    long = dict(cache=False, mem_len=T)
    assert_close(run(**long)[0], run(mem_len=T)[0], rtol=1e-4, atol=1e-4)


def test_commitment_and_codebook_sums_do_not_depend_on_the_updates():
    net, variables, x = TransformerVQ(BASE), variables_of(), tokens()
    mask = (np.arange(T) < np.array([[T], [15]])).astype(np.int32)
    whole = jax.jit(net.apply)(variables, x, mask=mask)[1]
    state, parts = net.init_state(2), []
    for cut in (slice(0, 9), slice(9, 16), slice(16, T)):
        piece = functools.partial(net.apply, method="extend")
        _, state, aux = jax.jit(piece)(variables, x[:, cut], state, mask=mask[:, cut])
        parts.append(aux)
    delta = jax.tree.map(lambda *a: sum(a), *[p["stats_delta"] for p in parts])
    commit = jax.tree.map(lambda *a: jnp.concatenate(a, -1), *[p["commit"] for p in parts])
    assert_close(delta, whole["stats_delta"], rtol=1e-4, atol=1e-4)
    assert_close(commit, whole["commit"], rtol=1e-4, atol=1e-4)
    assert (np.asarray(whole["commit"]["attn1"])[:, mask == 0] == 0).all()
    counts = whole["stats_delta"]["layers"]["attn1"]["c_count"].sum((-1, -2))
    np.testing.assert_array_equal(counts, [mask.sum()] * 2)
    new = absorb(BASE, variables["stats"], whole["stats_delta"])["layers"]["attn2"]
    old = variables["stats"]["layers"]["attn2"]
    sums = whole["stats_delta"]["layers"]["attn2"]
    assert_close(new, jax.tree.map(lambda a, b: 0.99 * a + 0.01 * b, old, sums))


@pytest.mark.parametrize("attention", ["vq", "dense"])
def test_documents_are_separate_only_with_the_switch(attention):
    x, ids = tokens(), np.where(np.arange(T) < 9, 1, 2)[None].repeat(2, 0)
    y = x.copy()
    y[:, :9] = (y[:, :9] + 1) % 20

    def second(x, **changes):
        net = TransformerVQ(dataclasses.replace(BASE, attention=attention, **changes))
        return np.asarray(jax.jit(net.apply)(variables_of(), x, segment_ids=ids)[0][:, 9:])

    np.testing.assert_array_equal(second(x, mask_documents=True), second(y, mask_documents=True))
    assert np.abs(second(x) - second(y)).max() > 1e-3


def test_dead_codes_are_revived():
    stats = {
        "c_sum": jnp.array([[8.0, 16.0], [0.0, 0.0], [3.0, 3.0]])[None],
        "c_count": jnp.array([[8.0, 0.01, 3.0]]),
    }
    nothing = jax.tree.map(jnp.zeros_like, stats)
    assert_close(update_codebook(stats, nothing, decay=1.0), stats)
    new = update_codebook(stats, nothing, decay=1.0, revive_below=1.0)
    np.testing.assert_allclose(new["c_count"], [[4, 4, 3]])
    code = np.asarray(new["c_sum"] / new["c_count"][..., None])[0]
    np.testing.assert_allclose(code[:2].mean(0), [1, 2], rtol=1e-5)  # halves of the most used one
    assert 0 < np.abs(code[0] - code[1]).max() < 0.1
    np.testing.assert_allclose(code[2], [1, 1])
    few = stats | {"c_count": jnp.array([[1.5, 0.01, 1.2]])}  # nothing is worth splitting
    assert_close(update_codebook(few, nothing, decay=1.0, revive_below=1.0), few)


@pytest.mark.parametrize("attention", ["dense", "flash"])
@pytest.mark.parametrize("heads", [{}, MHA, {"head_type": "mqa", "d_v": 0}], ids=str)
def test_quadratic_attention_has_the_same_parameters(attention, heads):
    shapes = lambda **changes: jax.eval_shape(
        lambda k: TransformerVQ(dataclasses.replace(BASE, **changes)).init(
            {"params": k}, jnp.zeros((1, 4), jnp.int32)
        ),
        jax.random.key(0),
    )
    vq, other = shapes(**heads), shapes(attention=attention, **heads)
    assert other["params"] == vq["params"] and "stats" not in other and "stats" in vq


@pytest.mark.parametrize("attention", ["dense", "flash"])
def test_vq_is_quadratic_attention_where_keys_are_codewords(attention):
    """Within the window (T <= M+1), with every key in the codebook; flash has no position bias."""
    one = dict(n_layer=1, head_type="mqa", d_v=0, n_code=T, mem_len=T)
    variables = variables_of(**one)
    if attention == "flash":
        params = jax.tree_util.tree_map_with_path(
            lambda path, a: a * 0 if "r_proj" in str(path) else a, variables["params"]
        )
        variables = variables | {"params": params}
    x = tokens()[:1]
    net = TransformerVQ(dataclasses.replace(BASE, **one))
    sown = jax.jit(functools.partial(net.apply, mutable=["intermediates"]))(variables, x)[1]
    keys = sown["intermediates"]["layers"]["attn"]["k"][0][:, 0]  # [layer, h, T, K]
    stats = {"layers": {"attn": {"c_sum": keys, "c_count": jnp.ones(keys.shape[:-1])}}}
    variables = {"params": variables["params"], "stats": stats}
    logits, aux = jax.jit(net.apply)(variables, x)
    assert np.abs(aux["commit"]["attn"]).max() < 1e-10
    other = run(variables, x, attention=attention, **one)[0]
    assert_close(logits, other, rtol=1e-4, atol=1e-4)
