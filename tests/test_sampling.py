"""Filters, prefill and decode: what is drawn, from what, and that nothing else matters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.nets.transformer_vq import TransformerVQ, TransformerVQConfig
from lintime.model.sampling import (
    cast_weights,
    draw,
    filter_logits,
    init_stream,
    make_sampler,
    make_stream,
    next_logits,
    nucleus_filter,
    pack_prompts,
    push,
    text,
    top_k_filter,
)

VOCAB = 61  # a size that no other axis has
ALLOWED = 50  # ids that the shared sampler may draw
EOS = 1


def make_net(dtype=jnp.float32, **changes):
    """A small net and variables made of random numbers, without compiling its `init`."""
    sizes = {"d_model": 16, "n_layer": 2, "d_k": 8, "n_code": 6, "block_len": 4, "mem_len": 4}
    cheap = {"vocab_size": VOCAB, "head_type": "mqa", "reduction": "matmul"}
    net = TransformerVQ(TransformerVQConfig(**(sizes | cheap | changes)), dtype)
    tokens = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(net.init, {"params": jax.random.key(0)}, tokens)
    rng = np.random.default_rng(0)

    def fill(path, a):
        width = a.shape[-2] if path[-1].key == "kernel" else 4
        numbers = rng.standard_normal(a.shape) / np.sqrt(width)
        numbers += path[-1].key in ("g", "c_count")
        return jnp.asarray(np.abs(numbers) if path[-1].key == "c_count" else numbers, a.dtype)

    shapes = {name: shapes.get(name, {}) for name in ("params", "stats")}
    return net, jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def small():
    return make_net()


@pytest.fixture(scope="module")
def sampler(small):
    """One sampler for the whole file: it compiles once for the prompts below."""
    return make_sampler(small[0], length=8, prefill_chunk=4, vocab_size=ALLOWED)


def ragged_prompts():
    rng = np.random.default_rng(0)
    return pack_prompts([rng.integers(3, VOCAB, n) for n in (9, 0, 4)], multiple=4)


# ---------------------------------------------------------------- filters


def kept(filtered):
    return (np.asarray(filtered) > -1e9).astype(int).tolist()


def test_nucleus_keeps_the_smallest_set_that_reaches_p():
    logits = jnp.log(jnp.array([0.3, 0.1, 0.4, 0.2]))
    assert kept(nucleus_filter(logits, 0.5)) == [1, 0, 1, 0]
    assert kept(nucleus_filter(logits, 0.75)) == [1, 0, 1, 1]
    assert kept(nucleus_filter(logits, 0.95)) == [1, 1, 1, 1]
    assert kept(nucleus_filter(logits, 0.0)) == [0, 0, 1, 0]
    out = nucleus_filter(logits, 0.5)
    np.testing.assert_array_equal(out[jnp.array([0, 2])], logits[jnp.array([0, 2])])
    np.testing.assert_array_equal(out[jnp.array([1, 3])], np.float32(-1e10))
    np.testing.assert_array_equal(kept(nucleus_filter(logits + 5, 0.5)), [1, 0, 1, 0])


def test_nucleus_breaks_ties_towards_the_later_index_and_takes_p_per_row():
    uniform = jnp.zeros((2, 3, 5))
    assert kept(nucleus_filter(uniform, 0.5)[0, 0]) == [0, 0, 1, 1, 1]
    p = jnp.array([[0.1, 0.5, 0.99]])
    assert np.sum(kept(nucleus_filter(uniform, p)), -1).tolist() == [[1, 3, 5]] * 2


def test_even_p_of_one_drops_the_last_ten_thousandth():
    logits = jnp.log(jnp.array([1 - 3e-5, 3e-5]))
    assert kept(nucleus_filter(logits, 1.0)) == [1, 0]
    assert kept(filter_logits(logits, top_p=1.0)) == [1, 1]  # the sampler's 1 is off


def test_top_k_keeps_exactly_k_and_the_first_of_equals():
    logits = jnp.array([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert kept(top_k_filter(logits, 1)) == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert kept(top_k_filter(logits, 3)) == [[0, 1, 1, 1], [1, 1, 1, 0]]
    assert kept(top_k_filter(logits, 0)) == [[1] * 4] * 2
    assert kept(top_k_filter(logits, 9)) == [[1] * 4] * 2
    assert kept(top_k_filter(logits, jnp.array([2, 1]))) == [[0, 1, 1, 0], [1, 0, 0, 0]]


def test_settings_may_differ_by_row():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])), (4, 4))
    out = filter_logits(
        logits, temperature=jnp.array([1, 1, 1, 0.5]), top_k=jnp.array([0, 2, 0, 0]),
        top_p=jnp.array([1, 1, 0.3, 1.0]),
    )  # fmt: skip
    assert kept(out) == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    squared = np.array([0.01, 0.04, 0.09, 0.16]) / 0.3
    np.testing.assert_allclose(np.exp(out[3]), squared, rtol=1e-5)


def test_draws_follow_the_filtered_distribution():
    n = 4000
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])), (n, 4))
    keys = jax.random.split(jax.random.key(3), n)
    count = lambda **s: np.bincount(draw(keys, logits, **s), minlength=4) / n
    np.testing.assert_allclose(count(), [0.1, 0.2, 0.3, 0.4], atol=0.03)
    np.testing.assert_allclose(count(top_k=2), [0, 0, 3 / 7, 4 / 7], atol=0.03)
    np.testing.assert_allclose(count(temperature=0.5), np.array([1, 4, 9, 16]) / 30, atol=0.03)
    np.testing.assert_array_equal(count(temperature=0.0), [0, 0, 0, 1])


# ---------------------------------------------------------------- prefill and decode

KINDS = {
    "documents": {"head_type": "shga", "mask_documents": True, "pe_abs": True, "mem_len": 6},
    "no_cache": {"cache": False, "tie_embeddings": True, "out_norm": True},
    "dense": {"attention": "dense", "mask_documents": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decode_give_the_logits_of_the_full_forward(kind):
    """Teacher forcing past two documents, from prompts of different lengths, in small prefill
    chunks."""
    net, variables = make_net(**KINDS[kind])
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, VOCAB, (3, 21))
    tokens[:, 0] = EOS
    tokens[0, 5] = tokens[1, 12] = tokens[2, 3] = EOS
    segments = np.cumsum(tokens == EOS, axis=1)
    whole, _ = jax.jit(net.apply)(variables, tokens, segment_ids=segments)

    lengths = np.array([11, 1, 6])
    prompts = np.where(np.arange(11) < lengths[:, None], tokens[:, :11], 59)  # junk as padding
    stream = make_stream(net, max_new=10, prefill_chunk=4).init(
        variables, jax.random.key(0), prompts, lengths
    )
    step = jax.jit(lambda stream: next_logits(net, variables, stream))
    for t in range(10):
        logits, state = step(stream)
        at = lengths + t
        np.testing.assert_allclose(
            logits, whole[np.arange(3), at - 1], rtol=2e-4, atol=2e-5, err_msg=f"{t=}"
        )
        stream = push(stream, state, jnp.asarray(tokens[np.arange(3), at]))


def test_flash_decodes_without_position_bias():
    net, variables = make_net(attention="flash", d_v=16)
    tokens = np.random.default_rng(1).integers(3, VOCAB, (2, 9))
    whole, _ = jax.jit(net.apply)(variables, tokens)
    stream = make_stream(net, max_new=1, prefill_chunk=5).init(variables, jax.random.key(0), tokens)
    logits, _ = jax.jit(lambda stream: next_logits(net, variables, stream))(stream)
    np.testing.assert_allclose(logits, whole[:, -1], rtol=2e-4, atol=2e-5)


def test_quadratic_attention_needs_a_bound():
    net, variables = make_net(attention="dense")
    with pytest.raises(ValueError, match="give max_new"):
        init_stream(net, variables, jax.random.key(0), np.ones((1, 3), np.int32))


def test_prompts_are_packed_with_a_document_start():
    tokens, lengths = pack_prompts([[5, 6, 7], [], [9]], multiple=4)
    assert tokens.tolist() == [[1, 5, 6, 7, 0], [1, 0, 0, 0, 0], [1, 9, 0, 0, 0]]
    assert lengths.tolist() == [4, 1, 2] and tokens.dtype == lengths.dtype == np.int32
    assert pack_prompts([[]])[0].tolist() == [[1]]
    assert pack_prompts([[3] * 5], multiple=4)[0].shape == (1, 9)
    with pytest.raises(ValueError, match="at least one token"):
        pack_prompts([[]], start=())


def test_rows_do_not_depend_on_each_other(small, sampler):
    """Ragged rows equal rows run alone, with more or less padding, and whatever the batch size."""
    net, variables = small
    prompts, lengths = ragged_prompts()
    key = jax.random.key(5)
    tokens, used = sampler(variables, key, prompts, lengths, temperature=1.3)
    assert tokens.shape == (3, 8) and used.tolist() == [8] * 3
    two, _ = sampler(variables, key, prompts[1:, :5], lengths[1:], rows=[1, 2], temperature=1.3)
    np.testing.assert_array_equal(two, tokens[1:])
    first, _ = sampler(variables, key, prompts[1:2, :1], rows=[1], temperature=1.3)
    np.testing.assert_array_equal(first[0], tokens[1])
    same = np.repeat(prompts[:1], 3, axis=0)
    tokens, _ = sampler(variables, key, same, temperature=1.3)
    assert len({tuple(row) for row in tokens.tolist()}) == 3  # but rows draw different numbers
    other, _ = sampler(variables, jax.random.key(6), same, temperature=1.3)
    assert not np.array_equal(tokens, other)


def test_padding_of_a_quadratic_cache_changes_nothing():
    net, variables = make_net(**KINDS["dense"])
    prompts, lengths = ragged_prompts()
    sampler = make_sampler(net, length=6, prefill_chunk=4)
    tokens, _ = sampler(variables, jax.random.key(1), prompts, lengths)
    alone, _ = sampler(variables, jax.random.key(1), prompts[2:, :5], rows=[2])
    np.testing.assert_array_equal(alone[0], tokens[2])


def test_greedy_equals_the_argmax_of_full_forwards(small, sampler):
    net, variables = small
    prompts, lengths = ragged_prompts()
    greedy, _ = sampler(variables, jax.random.key(0), prompts, lengths, temperature=0)
    forward = jax.jit(lambda tokens: net.apply(variables, tokens)[0])
    rows = np.pad(prompts, ((0, 0), (0, 8)))  # causal: what follows a token does not matter
    for t in range(8):
        logits = np.array(forward(rows))[np.arange(3), lengths - 1 + t]
        logits[:, [0, 2, *range(ALLOWED, VOCAB)]] = -np.inf
        rows[np.arange(3), lengths + t] = np.argmax(logits, axis=-1)
        np.testing.assert_array_equal(greedy[:, t], rows[np.arange(3), lengths + t])
    assert len(np.unique(greedy)) > 3
    top_1, _ = sampler(variables, jax.random.key(9), prompts, lengths, temperature=2.0, top_k=1)
    np.testing.assert_array_equal(top_1, greedy)
    tiny_p, _ = sampler(variables, jax.random.key(9), prompts, lengths, top_p=1e-3)
    np.testing.assert_array_equal(tiny_p, greedy)


def test_special_ids_are_never_drawn(small, sampler):
    _, variables = small
    bias = jnp.zeros(VOCAB).at[jnp.array([0, 2, 58])].set(100.0)
    dense = variables["params"]["out_proj"]
    params = {**variables["params"], "out_proj": {**dense, "bias": dense["bias"] + bias}}
    for settings in ({"temperature": 9.0}, {"temperature": 0.0}):
        tokens, _ = sampler(
            {**variables, "params": params}, jax.random.key(0), *ragged_prompts(), **settings
        )
        assert not np.isin([0, 2], tokens).any() and tokens.max() < ALLOWED


def test_a_stop_id_ends_its_row_only(small, sampler):
    net, variables = small
    prompts, lengths = ragged_prompts()
    free, _ = sampler(variables, jax.random.key(2), prompts, lengths)
    free = np.asarray(free)
    stops = (int(free[0, 3]), int(free[2, 6]))
    options = {"length": 8, "prefill_chunk": 4, "vocab_size": ALLOWED}
    stopping = make_sampler(net, stop_ids=stops, **options)
    tokens, used = stopping(variables, jax.random.key(2), prompts, lengths)
    ends = [next((t + 1 for t in range(8) if row[t] in stops), 8) for row in free]
    assert used.tolist() == ends and min(ends) < 8
    for row, free_row, end in zip(np.asarray(tokens), free, ends):
        assert row[:end].tolist() == free_row[:end].tolist()  # the stop token is kept
        assert not row[end:].any()


def test_the_state_does_not_grow_with_the_context(small):
    net, variables = small
    stream = make_stream(net, chunk=30)

    def shapes(width):
        prompts = jnp.ones((2, width), jnp.int32)
        start = lambda: stream.init(variables, jax.random.key(0), prompts)
        later = lambda: stream.next(variables, start())[1]
        sizes = lambda f: jax.tree.map(lambda a: (a.shape, a.dtype), jax.eval_shape(f))
        return sizes(start), sizes(later)

    short, short_later = shapes(2)
    assert (short, short) == shapes(300) and short == short_later


def test_a_long_prompt_never_has_logits(small):
    """Prefill computes no logits: not even the head's weights are read."""
    net, variables = small
    prompts = np.ones((2, 40), np.int32)
    init = jax.jit(lambda v, p: init_stream(net, v, jax.random.key(0), p, prefill_chunk=16))
    program = init.lower(variables, prompts).compile().as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", program)}
    with_vocabulary = {shape for shape in shapes if VOCAB in shape}
    assert with_vocabulary == {(VOCAB, 16)}  # the embedding


def test_settings_and_prompt_lengths_compile_nothing_anew(small, sampler, monkeypatch):
    _, variables = small
    prompts, lengths = ragged_prompts()
    sampler(variables, jax.random.key(0), prompts, lengths)
    traces = []
    monkeypatch.setattr(text, "next_tokens", lambda *a, **k: traces.append(1))
    several = {"top_k": 4}, {"top_p": np.float32(0.5)}, {"temperature": 0}, {"temperature": 0.3}
    results = set()
    for i, settings in enumerate(several):
        short = np.minimum(lengths, i + 1)
        tokens, _ = sampler(variables, jax.random.key(i), prompts, short, **settings)
        results.add(tuple(np.ravel(tokens).tolist()))
    assert not traces and len(results) == len(several)


def test_streaming_in_chunks_equals_one_call(small, sampler):
    net, variables = small
    prompts, lengths = ragged_prompts()
    settings = {"temperature": 0.9, "top_k": 20, "top_p": 0.95}
    whole, _ = sampler(variables, jax.random.key(4), prompts, lengths, **settings)
    stream = make_stream(net, chunk=2, vocab_size=ALLOWED, donate=True)
    state = stream.init(variables, jax.random.key(4), prompts, lengths)
    pieces = []
    for _ in range(4):
        tokens, state = stream.next(variables, state, **settings)
        pieces.append(np.asarray(tokens))
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)
    assert int(state.drawn) == 8
    assert state.net_state["attn"].offset[0].tolist() == (lengths + 7).tolist()


def test_casting_weights_once_changes_no_output():
    net, variables = make_net(jnp.bfloat16)
    cast = cast_weights(net, variables)
    forward = jax.jit(lambda v: net.apply(v, jnp.arange(10)[None])[0])
    np.testing.assert_array_equal(forward(variables), forward(cast))
    layer = cast["params"]["layers"]["attn"]
    assert layer["q_proj"]["kernel"].dtype == jnp.bfloat16 and layer["u"].dtype == jnp.float32
    assert cast["stats"]["layers"]["attn"]["c_sum"].dtype == jnp.float32
    assert cast["params"]["embedding"].dtype == jnp.bfloat16
    assert cast["params"]["out_proj"]["kernel"].dtype == jnp.float32
    tied, variables = make_net(jnp.bfloat16, tie_embeddings=True)
    assert cast_weights(tied, variables)["params"]["embedding"].dtype == jnp.float32
    assert net.init_state(1)["attn"].values.dtype == jnp.bfloat16
