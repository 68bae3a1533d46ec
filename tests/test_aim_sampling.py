"""Sampling by class: the filters' definition, guidance, and what a row's tokens depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.nets.aim import AiM
from lintime.model.sampling.classes import guidance_schedule, make_class_sampler, row_keys
from lintime.model.sampling.filters import DROPPED, keep_likely, keep_nucleus, keep_top_k
from tests.tiny_aim import compiled, make_config, make_net

CHEAP = {"mixer": "attention", "conditioning": "adaln_group", "n_layer": 2}
LABELS = np.array([0, 3, 4, 1])


@functools.cache
def sampler_of(unroll=None, state_dtype=None, **changes):
    net, variables = make_net(**(CHEAP | changes))
    draw = make_class_sampler(net, unroll=unroll, state_dtype=state_dtype, return_logits=True)
    return functools.partial(draw, variables)


def keys_of(rows=4, seed=0, start=0):
    return row_keys(jax.random.key(seed), rows, start)


# ---------------------------------------------------------------- filters


def top_k_by_definition(x, k):
    """Which entries stay."""
    return x >= np.sort(x)[-min(k, len(x))] if k else np.ones(len(x), bool)


def top_p_by_definition(x, p):
    e = np.exp(x.astype(np.float64) - x.max())
    order = np.argsort(x, kind="stable")
    keep = np.ones(len(x), bool)
    keep[order] = np.cumsum((e / e.sum())[order]) > 1 - p + 1e-9  # away from exact ties of sums
    keep[order[-1]] = True
    return keep


def rows_of_logits(rng, ties):
    numbers = rng.standard_normal((40, 37)).astype(np.float32) * 3
    return np.round(numbers) * np.float32(0.7) if ties else numbers  # with -0 and 0


@pytest.mark.parametrize("ties", [False, True])
def test_top_k_keeps_what_ties_with_the_kth(ties):
    x = rows_of_logits(np.random.default_rng(0), ties)
    assert not ties or np.signbit(x[x == 0]).any()
    for k in (0, 1, 2, 5, 36, 37, 99):
        got = jax.jit(keep_top_k)(x, k)
        want = np.stack([top_k_by_definition(row, k) for row in x])
        np.testing.assert_array_equal(got, np.where(want, x, np.float32(DROPPED)))
        assert not ties or k != 5 or (want.sum(1) > 5).any()
    each = np.arange(40)
    got = jax.jit(keep_top_k)(x, each) > DROPPED  # one k per row
    np.testing.assert_array_equal(got, [top_k_by_definition(r, k) for r, k in zip(x, each)])


@pytest.mark.parametrize("ties", [False, True])
def test_top_p_drops_a_tail_of_at_most_one_minus_p(ties):
    x = rows_of_logits(np.random.default_rng(1), ties)
    for p in (1e-6, 0.05, 0.31, 0.5, 0.87, 0.98):
        got = np.asarray(jax.jit(keep_nucleus)(x, p))
        want = np.stack([top_p_by_definition(row, p) for row in x])
        np.testing.assert_array_equal(got, np.where(want, x, np.float32(DROPPED)))
    np.testing.assert_array_equal(jax.jit(keep_nucleus)(x, 1.0), x)
    each = np.linspace(0.02, 0.99, 40).astype(np.float32)
    got = jax.jit(keep_nucleus)(x, each) > DROPPED
    np.testing.assert_array_equal(got, [top_p_by_definition(r, p) for r, p in zip(x, each)])


def test_top_p_among_equal_entries_keeps_the_later_ones():
    same = jnp.zeros((1, 8))
    run = jax.jit(keep_nucleus)
    kept = lambda p: list(np.flatnonzero(run(same, p)[0] > DROPPED))
    assert kept(0.5) == [4, 5, 6, 7]  # cumulative 1/8 .. 4/8 are at most 1/2
    assert kept(0.51) == [3, 4, 5, 6, 7]
    assert kept(1e-9) == [7]
    assert kept(1.0) == list(range(8))
    assert list(np.flatnonzero(run(jnp.zeros((1, 1)), 0.5)[0] > DROPPED)) == [0]


def test_filters_follow_each_other():
    x = rows_of_logits(np.random.default_rng(2), True)
    got = np.asarray(jax.jit(keep_likely)(x, temperature=0.8, top_k=6, top_p=0.7))
    for row, kept in zip(x / np.float32(0.8), got):
        first = top_k_by_definition(row, 6)
        want = top_p_by_definition(np.where(first, row, np.float32(DROPPED)), 0.7)
        np.testing.assert_array_equal(kept > DROPPED, want)
    np.testing.assert_array_equal(keep_likely(x, temperature=0.0), x)
    for settings, sorts in ((dict(top_k=6, top_p=0.7), 1), (dict(top_p=0.7), 1), ({}, 0)):
        jaxpr = str(jax.make_jaxpr(functools.partial(keep_likely, **settings))(x))
        assert jaxpr.count(" sort[") == sorts and "cumsum" not in jaxpr


def test_filters_with_masked_entries_and_extreme_settings():
    """Each row with its own k and p, many ties, and entries that a mask took out."""
    rng = np.random.default_rng(3)
    for size in (1, 2, 37, 64, 130):
        x = np.round(rng.standard_normal((200, size)) * 2).astype(np.float32) * np.float32(0.7)
        x[:, 1:][rng.random((200, size - 1)) < 0.3] = -np.inf
        x[:, 1:][rng.random((200, size - 1)) < 0.1] = -1e30
        x[:, 1:][rng.random((200, size - 1)) < 0.1] = DROPPED
        k = rng.choice([0, 1, 2, size // 2, size - 1, size, size + 1, 10**9], 200).astype(np.int32)
        p = rng.choice([1e-9, 1e-3, 0.137, 0.613, 0.98, 0.9999, 1.0], 200).astype(np.float32)
        got = np.asarray(jax.jit(keep_likely)(x, top_k=k, top_p=p))
        for row, kept, k_of, p_of in zip(x, got, k, p):
            want = np.where(top_k_by_definition(row, k_of), row, np.float32(DROPPED))
            if p_of < 1:
                want = np.where(top_p_by_definition(want, p_of), want, np.float32(DROPPED))
            np.testing.assert_array_equal(kept, want)


def test_filters_of_a_large_vocabulary():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((24, 16384)).astype(np.float32) * np.repeat([1, 3, 9], 8)[:, None]
    x = x.astype(np.float32)
    x[::2] = np.round(x[::2], 2)  # ties
    both = jax.jit(keep_likely)
    for k, p in ((0, 0.98), (600, 0.98), (600, 0.3), (9000, 0.9), (1, 0.98)):
        got = np.asarray(both(x, top_k=k, top_p=p)) > DROPPED
        for row, kept in zip(x, got):
            left = np.where(top_k_by_definition(row, k), row.astype(np.float64), -np.inf)
            order, e = np.argsort(left, kind="stable"), np.exp(left - left.max())
            reached = np.cumsum(e[order]) / e.sum()
            # Sums are float32: entries at the border may go either way, but only from below.
            clear = np.abs(reached - (1 - p)) > 1e-5
            clear[-1] = True
            want = reached > 1 - p
            np.testing.assert_array_equal(kept[order][clear], want[clear])
            assert (np.diff(kept[order].astype(int)) >= 0).all()
            assert kept.any() and (~clear).sum() < 20


def test_drawn_tokens_have_the_filtered_distribution():
    rows = 3000
    # One token per image; the only one that the class decides.
    draw = sampler_of(num_tokens=1, vocab_size=7)
    labels = np.full(rows, 2)
    settings = dict(guidance=1.5, temperature=1.3, top_k=5, top_p=0.9)
    codes, logits = draw(keys_of(rows), labels, **settings)
    settings.pop("guidance")
    want = jax.nn.softmax(keep_likely(logits[0, :1], **settings))[0]
    got = np.bincount(np.asarray(codes)[:, 0], minlength=7) / rows
    assert (got[np.asarray(want) == 0] == 0).all() and 2 <= (np.asarray(want) > 0).sum() < 6
    np.testing.assert_allclose(got, want, atol=4 * 0.5 / rows**0.5)


# ---------------------------------------------------------------- guidance


def greedy_by_definition(net, variables, labels, guidance):
    """Tokens and logits from whole sequences alone, one token longer each time."""
    c, run = net.config, compiled(net)
    null = jnp.full(len(labels), c.num_classes)
    codes, steps = np.zeros((len(labels), c.num_tokens), np.int32), []
    for t in range(c.num_tokens):
        cond, uncond = (run(variables, codes, rows)[:, t] for rows in (labels, null))
        steps.append(uncond + guidance * (cond - uncond))
        codes[:, t] = np.argmax(steps[-1], axis=-1)
    return codes, np.stack(steps)


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1", "attention"])
def test_greedy_tokens_are_those_of_whole_sequences(mixer):
    net, variables = make_net(**CHEAP | {"mixer": mixer})
    codes, logits = sampler_of(mixer=mixer)(keys_of(), LABELS, guidance=2.5, temperature=0.0)
    want, steps = greedy_by_definition(net, variables, LABELS, 2.5)
    np.testing.assert_array_equal(codes, want)
    np.testing.assert_allclose(logits, steps, rtol=1e-4, atol=1e-4)
    assert codes.dtype == jnp.int32 and len(np.unique(want)) > 2


def test_position_offset_is_a_shift_of_the_position_table():
    net, variables = make_net(**CHEAP)
    params = variables["params"]
    table = jnp.roll(params["position_embedding"], -1, axis=0)
    shifted = {"params": params | {"position_embedding": table}}
    want, steps = greedy_by_definition(net, shifted, LABELS, 1.0)
    released = make_class_sampler(AiM(make_config(position_offset=1, **CHEAP)), return_logits=True)
    codes, logits = released(variables, keys_of(), LABELS, temperature=0)
    np.testing.assert_array_equal(codes, want)
    np.testing.assert_allclose(logits, steps, rtol=1e-4, atol=1e-4)
    plain = sampler_of()(keys_of(), LABELS, temperature=0)[1]
    np.testing.assert_allclose(logits[0], plain[0], rtol=1e-5, atol=1e-5)  # no position there
    assert np.abs(logits[1] - plain[1]).max() > 1e-2


def test_guidance_one_is_no_guidance():
    with_rows, without = (sampler_of()(keys_of(), LABELS, guidance=s) for s in (1.0, None))
    np.testing.assert_array_equal(with_rows[0], without[0])
    np.testing.assert_allclose(with_rows[1], without[1], rtol=1e-4, atol=1e-4)
    assert np.abs(sampler_of()(keys_of(), LABELS, guidance=3.0)[1][0] - without[1][0]).max() > 1e-2


def test_guidance_per_image_and_per_token():
    draw, keys = sampler_of(), keys_of()
    run = lambda guidance: draw(keys, LABELS, guidance=guidance)
    strengths = np.array([1.0, 2.0, 3.5, 0.0], np.float32)
    codes, logits = run(strengths)
    for row in (1, 2):
        want = run(float(strengths[row]))
        np.testing.assert_array_equal(codes[row], want[0][row])
        np.testing.assert_allclose(logits[:, row], want[1][:, row], rtol=1e-4, atol=1e-4)
    # Per token: the logits of token t, given the same tokens before, are those of that strength.
    schedule = guidance_schedule("linear", 3.0, 7)
    codes, logits = run(schedule)
    assert schedule.shape == (7, 1)
    first = run(1.0)[1][0]
    np.testing.assert_allclose(logits[0], first, rtol=1e-4, atol=1e-4)
    both = run(guidance_schedule("linear", np.array([3.0, 1.0, 3.0, 1.0]), 7))
    np.testing.assert_array_equal(both[0][::2], codes[::2])
    np.testing.assert_array_equal(both[0][1::2], run(1.0)[0][1::2])
    assert np.abs(both[1][3] - run(3.0)[1][3]).max() > 1e-2


def test_schedules():
    constant, linear, cosine = (
        np.asarray(guidance_schedule(kind, 3.0, 5))[:, 0]
        for kind in ("constant", "linear", "cosine")
    )
    np.testing.assert_allclose(constant, [3, 3, 3, 3, 3])
    np.testing.assert_allclose(linear, [1, 1.5, 2, 2.5, 3])
    half = 0.5**0.5
    np.testing.assert_allclose(cosine, [1, 2 - half, 2, 2 + half, 3], rtol=1e-6)
    assert guidance_schedule("cosine", 2.0, 1).tolist() == [[2.0]]
    assert guidance_schedule("linear", jnp.array([2.0, 3.0]), 5).shape == (5, 2)
    with pytest.raises(ValueError, match="schedule='step'; choose one of constant, linear, cosine"):
        guidance_schedule("step", 2.0, 5)


# ---------------------------------------------------------------- rows


def test_a_row_depends_on_its_own_key_and_label_only():
    draw = sampler_of()
    settings = dict(guidance=2.0, top_k=9, top_p=0.95)
    whole, _ = draw(keys_of(), LABELS, **settings)
    part, _ = draw(keys_of(2, start=2), LABELS[2:], **settings)
    np.testing.assert_array_equal(part, whole[2:])
    np.testing.assert_array_equal(draw(keys_of(), LABELS, **settings)[0], whole)
    again, _ = draw(keys_of(seed=1), LABELS, **settings)
    assert (np.asarray(again) != np.asarray(whole)).any(axis=1).all()
    same, _ = draw(keys_of(), np.zeros(4, int), **settings)  # one class, four images
    assert len({tuple(row) for row in np.asarray(same).tolist()}) == 4


def test_settings_per_row():
    draw = sampler_of()
    settings = dict(temperature=np.array([0.0, 1, 1, 2]), top_k=np.array([0, 1, 0, 3]),
                    top_p=np.array([1.0, 1, 1e-6, 0.9]))  # fmt: skip
    codes, logits = draw(keys_of(), LABELS, **settings)
    greedy = np.argmax(logits, axis=-1).T
    np.testing.assert_array_equal(codes[:3], greedy[:3])  # three ways to say greedy
    assert (np.asarray(codes[3]) != greedy[3]).any()
    alone, _ = draw(keys_of(1, start=3), LABELS[3:], temperature=2.0, top_k=3, top_p=0.9)
    np.testing.assert_array_equal(alone[0], codes[3])


def test_unrolled_blocks_and_narrow_states():
    want, logits = sampler_of()(keys_of(), LABELS, guidance=2.0)
    unrolled = sampler_of(unroll=True)(keys_of(), LABELS, guidance=2.0)
    np.testing.assert_array_equal(unrolled[0], want)
    np.testing.assert_allclose(unrolled[1], logits, rtol=1e-4, atol=1e-4)
    narrow = sampler_of(state_dtype=jnp.bfloat16)(keys_of(), LABELS, guidance=2.0)[1]
    error = np.abs(narrow[0] - logits[0]).max()
    assert 0 < error < 0.1 * np.abs(logits).max()
    net, _ = make_net(**CHEAP)
    assert net.init_state(2, jnp.bfloat16).keys.dtype == jnp.bfloat16


def test_loops_hold_no_modulation_weights_and_no_unused_logits():
    """Modulation is made before the loop over tokens, and logits are kept only on demand."""
    net, variables = make_net(**CHEAP)

    def loop(sampler, **settings):
        draw = lambda v: sampler(v, keys_of(), jnp.asarray(LABELS), **settings)
        found, todo = [], [jax.make_jaxpr(draw)(variables).jaxpr]
        while todo:
            jaxpr = todo.pop()
            found += [e for e in jaxpr.eqns if e.params.get("length") == net.config.num_tokens]
            inner = [e.params["jaxpr"] for e in jaxpr.eqns if e.primitive.name in ("pjit", "jit")]
            todo += [j.jaxpr for j in inner]
        (scan,) = found
        shapes = lambda variables: {v.aval.shape for v in variables}
        return shapes(scan.invars), shapes(scan.outvars)

    head = variables["params"]["group_modulation"]["kernel"].shape
    read, written = loop(make_class_sampler(net), guidance=2.0)
    assert head not in read and net.config.num_tokens in {s[0] for s in written if s}
    assert (2, 6 // 2, 8, 16) in read  # the vectors: two blocks, eight rows with guidance
    assert not any(s[-1:] == (net.config.vocab_size,) for s in written)
    read, written = loop(make_class_sampler(net, return_logits=True))
    assert (2, 3, 4, 16) in read and (7, 4, net.config.vocab_size) in written


def test_other_settings_compile_nothing(monkeypatch):
    traced = []
    step = AiM.step
    monkeypatch.setattr(AiM, "step", lambda *a: traced.append(1) or step(*a))
    net, variables = make_net(**CHEAP)
    draw = make_class_sampler(net)
    for number, settings in enumerate(
        (
            dict(guidance=2.0, top_k=3),
            dict(guidance=4, top_k=np.int64(5), temperature=0.3),
            dict(guidance=jnp.float32(1.0), top_k=jnp.int32(0), temperature=0),
        )
    ):
        draw(variables, keys_of(seed=number), LABELS, **settings)
        if not number:
            first = len(traced)
    assert len(traced) == first > 0


def test_errors():
    draw = sampler_of()
    for labels, words in (
        ([0, 6], "class id 6 is not in 0..4 .5 stands for no class"),
        ([-1, 0], "class id -1 is not in 0..4"),
    ):
        with pytest.raises(ValueError, match=words):
            draw(keys_of(2), np.array(labels))
    draw(keys_of(1), np.array([5]))
    with pytest.raises(ValueError, match=r"labels have shape \(2,\) and keys \(3,\)"):
        draw(keys_of(3), np.array([0, 1]))
    for guidance in (np.ones(3), np.ones((2, 7)), np.ones((1, 7, 2))):
        with pytest.raises(ValueError, match=r"guidance has shape .*\(7, 1\) or \(7, 2\)"):
            draw(keys_of(2), np.array([0, 1]), guidance=guidance)
