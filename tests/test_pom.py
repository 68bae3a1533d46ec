"""The polynomial mixer layer: equal forms, streaming, and its published layout."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.kernels_pallas.compat import all_eqns
from lintime.model.convert.pom import pom_from_reference, pom_to_reference
from lintime.model.mixers.pom import PolynomialMixer, gate_frequencies, hard_sigmoid
from tests.golden.quick import quick_jit

B, T, D = 2, 12, 16


def tokens(length=T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((B, length, D)), jnp.float32)


def made(rope_inputs=None, seed=0, **fields):
    """A mixer and parameters of ordinary size (those it begins with are nearly zero)."""
    mixer = PolynomialMixer(**{"features": D, "heads": 4} | fields)
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), tokens(), **(rope_inputs or {}))
    rng = np.random.default_rng(seed)
    draw = lambda a: jnp.asarray(rng.standard_normal(a.shape) * 0.5, jnp.float32)
    return mixer, jax.tree.map(draw, shapes["params"])


def close(got, want, tolerance=2e-5):
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert got.shape == want.shape and np.isfinite(got).all()
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def call(mixer, params, x, **options):
    """The mixer in one compiled call; options are constants."""
    return quick_jit(lambda p, x: mixer.apply({"params": p}, x, **options))(params, x)[0]


def in_pieces(mixer, params, x, lengths, **more):
    state, outputs, start = mixer.init_state(B), [], 0
    extend = quick_jit(functools.partial(mixer.apply, method="extend"))
    for length in lengths:
        part = slice(start, start := start + length)
        options = {k: v[:, part] for k, v in more.items()}
        y, state, aux = extend({"params": params}, x[:, part], state, **options)
        assert aux == {}
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), state


@pytest.mark.parametrize("frames", [None, (6, 6), (5, 5, 2)])
def test_rank_of_heads_equals_the_whole_product(frames):
    """The map of rank H and the product with every gate: a matrix of the same mask asks for the
    latter. Gradients agree, and no array of T x E is multiplied by the output kernel."""
    mixer, params = made(use_bias=True)
    ends = np.repeat(np.cumsum(frames or (T,)), frames or (T,))
    matrix = jnp.asarray(np.arange(T) < ends[:, None], jnp.float32)[None]

    def loss(params, x, **form):
        y, _ = mixer.apply({"params": params}, x, **form)
        return jnp.sum(jnp.sin(y)), y

    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
    fast, y = quick_jit(functools.partial(grad, frames=frames))(params, tokens())
    slow, want = quick_jit(grad)(params, tokens(), query_mask=matrix)
    close(y, want)
    jax.tree.map(functools.partial(close, tolerance=1e-4), fast, slow)
    jaxpr = jax.make_jaxpr(functools.partial(loss, frames=frames))(params, tokens())
    wide = [e for e in all_eqns(jaxpr) if e.primitive.name == "dot_general"]
    assert not any(e.invars[0].aval.shape == (B, T, 2 * D) for e in wide)


@pytest.mark.parametrize("rope", ["none", "1d"])
@pytest.mark.parametrize("heads", [1, 4])
def test_pieces_equal_the_whole(rope, heads):
    """Blocks of any length equal block-causal mixing; tokens one by one, and in pieces, causal."""
    mixer, params = made(heads=heads, rope=rope)
    lengths = (3, 1, 6, 2)
    want = call(mixer, params, tokens(), frames=lengths)
    got, state = in_pieces(mixer, params, tokens(), lengths)
    close(got, want)
    assert (state.tokens.count == T).all() and (state.tokens_read == T).all()
    causal = mixer.clone(causal=True)
    want = call(causal, params, tokens())
    close(in_pieces(causal, params, tokens(), lengths)[0], want)
    state, step = causal.init_state(B), quick_jit(functools.partial(causal.apply, method="step"))
    for t in range(4):
        y, state = step({"params": params}, tokens()[:, t], state)
        close(y, want[:, t], 1e-4)


def test_ragged_pieces():
    """Rows of other lengths, padded with NaN, go on where they ended, also in their positions."""
    mixer, params = made(rope="1d", causal=True)
    x, run = tokens(), quick_jit(functools.partial(mixer.apply, method="extend"))
    lengths = jnp.asarray([3, 5])
    padded = jnp.where(jnp.arange(5)[:, None] < lengths[:, None, None], x[:, :5], jnp.nan)
    _, state, _ = run({"params": params}, padded, mixer.init_state(B), lengths=lengths)
    rest = jnp.stack([x[0, 3:7], x[1, 5:9]])
    y, state, _ = run({"params": params}, rest, state)
    want = call(mixer, params, x[:, :9])
    close(y, jnp.stack([want[0, 3:7], want[1, 5:9]]))
    np.testing.assert_array_equal(state.tokens_read, [7, 9])
    np.testing.assert_array_equal(state.tokens.count, [7, 9])


def test_weights_of_a_stream():
    """Hidden tokens count nothing, and a piece that is hidden as a whole leaves the mean alone."""
    mixer, params = made()
    mask = jnp.ones((B, T)).at[0, 3:5].set(0).at[1, :4].set(0)
    want, _ = mixer.apply({"params": params}, tokens(), frames=(4, 1, 7), mask=mask)
    got, state = in_pieces(mixer, params, tokens(), (4, 1, 7), mask=mask)
    close(got, want)
    np.testing.assert_array_equal(state.tokens.count, [10, 8])
    assert not want[1, :4].any()  # these see nothing


def test_nothing_to_see_is_the_bias():
    """An empty text is no NaN: the output is the bias, the context gets no gradient."""
    mixer, params = made(use_bias=True, groups=2)
    context = tokens(5, seed=1).at[0].set(jnp.nan)
    mask = jnp.asarray([[0] * 5, [1, 1, 0, 0, 0]])

    def loss(params, context):
        y, _ = mixer.apply({"params": params}, tokens(), context=context, context_mask=mask)
        return jnp.sum(y**2), y

    grads, y = quick_jit(jax.grad(loss, argnums=1, has_aux=True))(params, context)
    close(y[0], jnp.broadcast_to(params["ag_proj"]["bias"], y[0].shape))
    assert not grads[0].any() and grads[1, :2].any() and not grads[1, 2:].any()


@pytest.mark.parametrize("query_frames", [(0, 2, 0), (0, 1, 1), (1, 0, 0), (0, 0, 12)])
@pytest.mark.parametrize("heads", [1, 4])
def test_frames_without_queries(query_frames, heads):
    """Queries see the frames up to their own, also where there are no more of them than frames."""
    mixer, params = made(heads=heads)
    frames, queries = (2, 1, 3), sum(query_frames)
    options = {"context": tokens(6, seed=1), "frames": frames}
    got = call(mixer, params, tokens(queries), query_frames=query_frames, **options)
    ends = np.repeat(np.cumsum(frames), query_frames)
    matrix = jnp.asarray(np.arange(6) < ends[:, None], jnp.float32)[None]
    close(got, call(mixer, params, tokens(queries), context=options["context"], query_mask=matrix))


def test_documents_in_a_row():
    """Packed documents mix as each alone, both ways."""
    for causal in (False, True):
        mixer, params = made(causal=causal)
        ids = jnp.asarray([[0] * 5 + [1] * 7] * B)
        y = call(mixer, params, tokens(), segment_ids=ids)
        alone = [call(mixer, params, part) for part in (tokens()[:, :5], tokens()[:, 5:])]
        close(y, jnp.concatenate(alone, axis=1))
        ids = jnp.asarray([[2, 0, 2, 1, 1, 0, 2, 0, 0, 1, 2, 1]] * B)
        mask = jnp.ones((B, T)).at[:, 3:6].set(0)
        matrix = (ids[:, :, None] == ids[:, None]) * mask[:, None]
        want = call(mixer, params, tokens(), query_mask=jnp.tril(matrix) if causal else matrix)
        close(call(mixer, params, tokens(), segment_ids=ids, mask=mask), want)


def test_bfloat16():
    """Near float32 in all forms; the state stays float32, whose mean does not drift."""
    mixer, params = made(rope="1d")
    for fields, form in (({}, {}), ({"causal": True}, {}), ({}, {"frames": (6, 6)})):
        want = call(mixer.clone(**fields), params, tokens(), **form)
        y = call(mixer.clone(dtype=jnp.bfloat16, **fields), params, tokens(), **form)
        assert y.dtype == jnp.bfloat16
        close(y, want, 0.05)
    state = mixer.clone(dtype=jnp.bfloat16).init_state(B)
    assert state.tokens.mean.dtype == state.tokens.count.dtype == jnp.float32


def test_positions_of_each_row():
    """Positions may differ from row to row; a shift of all changes a rotated layer."""
    mixer, params = made(rope="2d", rope_inputs={"positions": np.zeros((T, 2), np.int32)})
    grid = jnp.stack(jnp.meshgrid(jnp.arange(3), jnp.arange(4), indexing="ij"), -1).reshape(T, 2)
    both = jnp.stack([grid, grid[::-1]])
    run = lambda x, p: call(mixer, params, x, positions=p)
    y = run(tokens(), both)
    close(y[:1], run(tokens()[:1], grid))
    close(y[1:], run(tokens()[1:], grid[::-1]))
    assert np.abs(run(tokens(), grid) - y)[1].max() > 0.01


def test_gates_turn_with_their_heads():
    """Aligned, pair i of the gates has the frequency of the first channel of head i; as published
    that holds along two axes, and with one it is higher."""
    features = 100.0 ** -(np.arange(32) / 32)
    np.testing.assert_allclose(gate_frequencies(8, 64, 1, 100.0, aligned=True), features[:32:8])
    np.testing.assert_allclose(gate_frequencies(8, 64, 1, 100.0), features[:16:4])
    features = 100.0 ** -(np.arange(16) / 16)
    np.testing.assert_allclose(gate_frequencies(8, 64, 2, 100.0), features[:16:8])
    plain, params = made(rope="1d")
    aligned = plain.clone(aligned_gates=True)
    one, other = (call(m, params, tokens()) for m in (plain, aligned))
    assert np.abs(one - other).max() > 0.01


def test_hard_sigmoid():
    x = jnp.asarray([-4.0, -3.0, 0.0, 3.0, 4.0, jnp.nan])
    np.testing.assert_array_equal(hard_sigmoid(x), [0, 0, 0.5, 1, 1, np.nan])
    slopes = jax.vmap(jax.grad(hard_sigmoid))(x[:5])
    np.testing.assert_allclose(slopes, [0, 0, 1 / 6, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("groups, bias", [(1, False), (4, True)])
def test_initial_parameters(groups, bias):
    """Names, shapes and sizes at the start: U(+-1/sqrt(fan in)), coefficients about 0.001."""
    mixer = PolynomialMixer(features=D, degree=3, heads=4, groups=groups, use_bias=bias)
    params = mixer.init(jax.random.key(0), tokens())["params"]
    shapes = jax.tree.map(jnp.shape, params)
    want = {"po_coeff": (32, 3), "ag_proj": {"kernel": (32, D)} | ({"bias": (D,)} if bias else {})}
    if groups == 1:
        want |= {"qc_proj": {"kernel": (D, 36)}, "se_bias": (4,)}
    else:
        want |= {"po_proj": {"kernel": (4, 4, 8), "bias": (32,)}}
        want |= {"se_proj": {"kernel": (D, 4), "bias": (4,)}}
    assert shapes == want
    kernel = params["qc_proj" if groups == 1 else "po_proj"]["kernel"]
    limit = (D / groups) ** -0.5
    assert 0.9 * limit < jnp.abs(kernel).max() <= limit
    assert (jnp.abs(params["po_coeff"]) <= 0.001).all()
    xavier = mixer.clone(kernel_init=nn.initializers.xavier_uniform())
    assert jax.tree.map(jnp.shape, xavier.init(jax.random.key(0), tokens())["params"]) == want


@pytest.mark.parametrize(
    "fields", [{}, {"groups": 4, "use_bias": True}, {"rope": "1d", "heads": 0}]
)
def test_published_layout_there_and_back(fields):
    mixer, params = made(**fields)
    params = jax.tree.map(np.asarray, params)
    flat = pom_to_reference(params, mixer, (20,) if "rope" in fields else ())
    assert ("freqs_cos" in flat) == ("rope" in fields)
    jax.tree.map(np.testing.assert_array_equal, pom_from_reference(flat, mixer), params)


def test_grouped_projection_takes_its_channels():
    """Group g reads d/G channels and writes E/G: a change of channel 0 moves the first E/G only."""
    mixer, params = made(groups=4, use_bias=True)
    project = lambda x: mixer.apply({"params": params}, x, method="project")[0]
    moved = np.abs(project(tokens()) - project(tokens().at[..., 0].add(1))).max(axis=(0, 1))
    assert moved[:8].all() and not moved[8:].any()
    flat = pom_to_reference(jax.tree.map(np.asarray, params), mixer)
    want = tokens()[0, 0, :4] @ flat["po_proj.weight"][:8, :, 0].T + flat["po_proj.bias"][:8]
    close(project(tokens())[0, 0, :8], want)


def test_names_of_the_forerunner():
    """Two projections of 2025 are the one of 2026."""
    mixer, params = made()
    flat = pom_to_reference(jax.tree.map(np.asarray, params), mixer)
    old = dict(flat)
    both = old.pop("qc_proj.weight")
    old |= {"po_proj.weight": both[:32], "se_proj.weight": both[32:]}
    old["se_proj.bias"] = old.pop("se_bias")
    jax.tree.map(np.testing.assert_array_equal, pom_from_reference(old, mixer), params)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"freqs_cos": np.zeros((4, 16)), "freqs_sin": np.zeros((4, 16))}, "set rope_base"),
        ({"row_cos": np.zeros((4, 8))}, "tables row_cos: rope='1d' has freqs_cos, freqs_sin"),
        ({"po_coeff": np.zeros((32, 3))}, r"po_coeff has shape \(32, 3\), expected \(32, 2\)"),
        ({"extra": np.zeros(3)}, "unknown extra"),
    ],
)
def test_wrong_files_are_refused(change, message):
    mixer, params = made(rope="1d")
    flat = pom_to_reference(jax.tree.map(np.asarray, params), mixer)
    with pytest.raises(ValueError, match=message):
        pom_from_reference(flat | change, mixer)


@pytest.mark.parametrize(
    "fields, options, message",
    [
        ({"groups": 3}, {}, "groups=3 does not divide features=16"),
        ({"heads": 5}, {}, "heads=5 does not divide"),
        ({"rope": "3d"}, {}, "rope='3d', expected one of none, 1d, 2d"),
        ({"rope": "2d", "heads": 2}, {}, "gates of 2 heads"),
        ({"rope": "2d"}, {}, "needs positions"),
        ({}, {"positions": np.arange(T)}, "reads no positions"),
        ({}, {"context_mask": np.ones((B, T))}, "without a context"),
        ({}, {"query_frames": (T,)}, "query_frames go with a context"),
        ({}, {"context": tokens(3), "segment_ids": np.ones((B, T))}, "say nothing about a context"),
        ({}, {"context": tokens(3), "frames": (1, 2)}, "needs query_frames"),
        (
            {},
            {"context": tokens(3), "frames": (1, 2), "query_frames": (13, -1)},
            "not lengths that add up to 12",
        ),
        ({"causal": True}, {"context": tokens(3)}, "3 rows of the mask for 12 queries"),
        ({"degree": 0}, {}, "must be at least 1"),
    ],
)
def test_mistakes_are_named(fields, options, message):
    mixer = PolynomialMixer(**{"features": D, "heads": 4} | fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: mixer.init(jax.random.key(0), x, **options), tokens())
