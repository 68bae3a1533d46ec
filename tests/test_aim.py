"""AiM: sizes, conditioning, dropouts, and that steps compute what whole sequences do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.convert.aim import to_adaln
from lintime.model.layers import conditioning
from lintime.model.mixers.causal_attention import CausalAttention
from lintime.model.mixers.mamba import Mamba2
from lintime.model.nets.aim import AiM, AiMConfig
from tests.golden.quick import quick_jit
from tests.tiny_aim import KINDS, MIXERS, compiled, make_config, make_net, some_codes

close = dict(rtol=2e-5, atol=2e-5)


def forward(net, variables, codes, labels):
    return compiled(net)(variables, codes, labels)


def intermediates(net, variables, codes, labels):
    return compiled(net, collect=True)(variables, codes, labels)[1]


# ---------------------------------------------------------------- sizes and starts

GROUP = {"conditioning": "adaln_group", "num_groups": 4, "n_layer": 48}


@pytest.mark.parametrize(
    "sizes, total, heads",
    [
        ({"d_model": 768, "n_layer": 24, "conditioning": "adaln"}, 147_622_080, 43_703_808),
        ({"d_model": 1024, **GROUP}, 349_760_000, 14_841_856),
        ({"d_model": 1536, **GROUP}, 763_291_392, 33_272_832),
        ({"d_model": 2048, **GROUP}, 1_335_944_192, 59_043_840),
    ],
    ids=["B", "L", "XL", "1B"],
)
def test_parameters_of_the_published_sizes(sizes, total, heads):
    net = AiM(AiMConfig(**sizes))
    args = {"params": jax.random.key(0)}, jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(net.init, *args)["params"]
    count = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
    assert count(params) == total
    parts = [params["final_modulation"], params["layers"]["modulation"]]
    assert count([*parts, params.get("group_modulation", {})]) == heads


@pytest.mark.parametrize("width", [768, 1024, 1536])
def test_attention_has_the_size_of_mamba2(width):
    x = jax.ShapeDtypeStruct((1, 4, width), jnp.float32)

    def size(mixer):
        tree = jax.eval_shape(mixer.init, jax.random.key(0), x)
        return sum(a.size for a in jax.tree.leaves(tree))

    ours, theirs = size(CausalAttention(width)), size(Mamba2(width))
    assert abs(ours / theirs - 1) < 0.07, (ours, theirs)


def test_initial_values():
    def start(**changes):
        net = AiM(make_config(d_model=64, headdim=16, n_layer=4, mixer="attention", **changes))
        codes, labels = some_codes(net)
        variables = quick_jit(net.init)({"params": jax.random.key(0)}, codes, labels)
        out = intermediates(net, variables, codes, labels)["layers"]["out"][0]
        return variables["params"], out

    params, out = start()
    np.testing.assert_array_equal(out, 0)  # adaLN blocks begin as the identity
    std = lambda a: float(np.std(a))
    for name in ("embedding", "position_embedding", "class_embedding"):
        assert std(params[name]) == pytest.approx(0.02, rel=0.3)
    one = np.abs(params["layers"]["mixer"]["out_proj"]["kernel"]).max()
    assert one == pytest.approx(96**-0.5 / 4**0.5, rel=0.02)
    layers = params["layers"]["mixer"]["in_proj"]["kernel"]
    assert not np.array_equal(layers[0], layers[1])

    params, out = start(conditioning="adaln_group", d_intermediate=32)
    assert np.abs(out).max() > 0
    assert std(params["layers"]["modulation"]["table"]) == pytest.approx(64**-0.5, rel=0.1)
    kernel, bias = (params["group_modulation"][n] for n in ("kernel", "bias"))
    assert np.abs(kernel).max() == pytest.approx(64**-0.5, rel=0.01)
    np.testing.assert_array_equal(bias, 0)
    # With an MLP there are 2 n_layer branches.
    two = np.abs(params["layers"]["mixer"]["out_proj"]["kernel"]).max()
    assert two == pytest.approx(one / 2**0.5, rel=0.05)


def test_errors():
    net, variables = make_net()
    codes, labels = some_codes(net)
    for bad, n in ((jnp.pad(codes, ((0, 0), (0, 1))), 8), (codes[:, :0], 0)):
        with pytest.raises(ValueError, match=f"{n} tokens per image; .*num_tokens=7"):
            forward(net, variables, bad, labels)
    for changes, words in (
        ({"mixer": "mamba3"}, "mixer='mamba3'; choose mamba1, mamba2 or attention"),
        ({"conditioning": "film"}, "conditioning='film'; choose one of adaln, adaln_single"),
        ({"conditioning": "adaln_group", "num_groups": 0}, "num_groups=0"),
    ):
        with pytest.raises(ValueError, match=words):
            AiM(make_config(**changes)).init(jax.random.key(0), codes, labels)


# ---------------------------------------------------------------- conditioning


def test_blocks_take_interleaved_pieces():
    shared = jnp.arange(2 * 3.0)[:, None, None] * jnp.ones((6, 2, 4))  # two groups of three rows
    got = conditioning.share_out(shared, 5, 3)
    assert got.shape == (5, 3, 2, 4)
    rows = [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5], [0, 1, 2]]
    np.testing.assert_array_equal(got[:, :, 1, 3], rows)


@pytest.mark.parametrize("mlp", [0, 20])
@pytest.mark.parametrize(
    "kind, groups", [("adaln_single", 1), ("adaln_group", 2), ("adaln_group", 3)]
)
def test_shared_heads_equal_heads_per_block(kind, groups, mlp):
    net, variables = make_net(conditioning=kind, num_groups=groups, d_intermediate=mlp)
    codes, labels = some_codes(net)
    own, config = to_adaln(variables, net.config)
    assert config.conditioning == "adaln"
    want = forward(net, variables, codes, labels)
    np.testing.assert_allclose(forward(AiM(config), own, codes, labels), want, **close)
    if groups == 3:  # as many as blocks: rows of the shared weight are the blocks' weights
        rows = 6 if mlp else 3
        kernel = variables["params"]["group_modulation"]["kernel"].reshape(16, 3, rows * 16)
        got = own["params"]["layers"]["modulation"]["head"]["kernel"]
        np.testing.assert_array_equal(got, jnp.moveaxis(kernel, 1, 0))


def test_six_vectors_stand_in_the_published_order():
    """shift_mixer, shift_mlp, scale_mixer, scale_mlp, gate_mixer, gate_mlp: each acts where its
    name says."""
    net, variables = make_net(d_intermediate=20, n_layer=1, mixer="attention")
    codes, labels = some_codes(net)
    head = variables["params"]["layers"]["modulation"]["head"]

    def seen(row):
        """Intermediates with every vector 0 but gates of 1, and one row raised."""
        vectors = (
            jnp.repeat(jnp.array([0.0, 0, 0, 0, 1, 1]), 16).at[row * 16 : row * 16 + 16].add(2)
        )
        quiet = {"head": {"kernel": 0 * head["kernel"], "bias": vectors[None]}}
        params = variables["params"]
        params = params | {"layers": params["layers"] | {"modulation": quiet}}
        layer = intermediates(net, {"params": params}, codes, labels)["layers"]
        return {name: values[0][0] for name, values in layer.items()}

    plain = {"mixer_in": True, "residual2": True, "out": True}
    base = seen(6)  # past the end: no row
    for row, name in enumerate(("shift", "shift2", "scale", "scale2", "gate", "gate2")):
        got = seen(row)
        same = {n: bool(np.allclose(got[n], base[n], atol=1e-6)) for n in plain}
        if name in ("shift", "scale"):
            assert not same["mixer_in"] and not same["residual2"]
            more = base["mixer_in"] * 2 if name == "scale" else 2.0
            np.testing.assert_allclose(got["mixer_in"], base["mixer_in"] + more, **close)
        elif name == "gate":
            assert same["mixer_in"]
            update = base["residual2"] - base["residual"]
            np.testing.assert_allclose(got["residual2"], base["residual"] + 3 * update, **close)
        else:
            assert same["mixer_in"] and same["residual2"] and not same["out"]
            if name == "gate2":
                np.testing.assert_allclose(got["out"], 3 * base["out"], **close)


def test_the_class_is_the_first_token_and_has_no_position():
    net, variables = make_net()
    codes, labels = some_codes(net)
    kept = intermediates(net, variables, codes, labels)
    embedded, params = kept["embedded"][0], variables["params"]
    np.testing.assert_array_equal(embedded[:, 0], params["class_embedding"][labels])
    tokens = params["embedding"][codes[:, :-1]] + params["position_embedding"][:6]
    np.testing.assert_array_equal(embedded[:, 1:], tokens)


def test_causal():
    net, variables = make_net()
    codes, labels = some_codes(net)
    other = codes.at[:, 3].add(1)
    a, b = (forward(net, variables, x, labels) for x in (codes, other))
    np.testing.assert_array_equal(a[:, :4], b[:, :4])  # token 3 is input number 4
    assert np.abs(a[:, 4:] - b[:, 4:]).min(axis=-1).max() > 0
    np.testing.assert_allclose(forward(net, variables, codes[:, :1], labels), a[:, :1], **close)


# ---------------------------------------------------------------- steps


def teach(net, variables, codes, labels, *, unroll=False, cast=True):
    """Logits [B, T, V] step by step, each token given."""
    modulation = quick_jit(lambda v: net.apply(v, labels, method="modulation"))(variables)
    state = net.init_state(len(labels), unroll=unroll)
    if cast:
        variables = net.decoding_variables(variables, unroll=unroll)
    step = quick_jit(lambda *a: net.apply(variables, *a, modulation, method="step"))
    logits = []
    for t in range(codes.shape[1]):
        token = codes[:, t - 1] if t else jnp.full_like(codes[:, 0], 3)  # not read
        out, state = step(token, jnp.int32(t), state)
        logits.append(out)
    return jnp.stack(logits, axis=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_steps_equal_the_whole_sequence(mixer, kind):
    net, variables = make_net(mixer=mixer, conditioning=kind)
    codes, labels = some_codes(net)
    want = forward(net, variables, codes, labels)
    np.testing.assert_allclose(teach(net, variables, codes, labels), want, **close)


def test_steps_with_everything_else():
    net, variables = make_net(d_intermediate=20, tie_embeddings=False, residual_in_fp32=False)
    codes, labels = some_codes(net)
    want = forward(net, variables, codes, labels)
    for options in ({"unroll": True}, {"unroll": True, "cast": False}, {"cast": False}):
        np.testing.assert_allclose(teach(net, variables, codes, labels, **options), want, **close)


def test_bfloat16_steps_and_weights_cast_once():
    net, variables = make_net(jnp.bfloat16)
    codes, labels = some_codes(net)
    want = forward(net, variables, codes, labels)
    assert want.dtype == jnp.float32
    exact = forward(make_net()[0], variables, codes, labels)
    error = lambda got: np.abs(got - exact).mean() / np.abs(exact).mean()
    assert 0 < error(want) < 0.03
    one, two = (teach(net, variables, codes, labels, cast=cast) for cast in (True, False))
    np.testing.assert_allclose(one, two, atol=1e-3)  # the same, but for how XLA fuses
    assert 0 < error(one) < 0.03
    cast = net.decoding_variables(variables)["params"]
    assert cast["layers"]["mixer"]["in_proj"]["kernel"].dtype == jnp.bfloat16
    assert cast["layers"]["mixer"]["A_log"].dtype == cast["embedding"].dtype == jnp.float32
    assert net.decoding_variables(variables, unroll=True)["params"]["layers"].keys() == {*"012"}


# ---------------------------------------------------------------- attention


def test_attention_in_pieces():
    mixer = CausalAttention(12, head_dim=4, use_bias=True)
    x = jax.random.normal(jax.random.key(0), (2, 7, 12))
    variables = mixer.init(jax.random.key(1), x)
    want, aux = quick_jit(mixer.apply)(variables, x)
    assert aux == {} and variables["params"]["in_proj"]["kernel"].shape == (12, 3 * 20)
    state = mixer.init_state(2, max_length=9)
    run = quick_jit(lambda x, state: mixer.apply(variables, x, state, method="extend"))
    parts = []
    for piece in (x[:, :3], x[:, 3:4], x[:, 4:]):
        y, state, _ = run(piece, state)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, **close)
    assert int(state.offset) == 7
    np.testing.assert_allclose(mixer.apply(variables, x[:, :1])[0], want[:, :1], **close)

    # From the definition, in numpy.
    p = jax.tree.map(np.float64, variables["params"])
    qkv = (x @ p["in_proj"]["kernel"] + p["in_proj"]["bias"]).reshape(2, 7, 3, 5, 4)
    q, k, v = np.moveaxis(qkv, 2, 0)
    scores = np.einsum("bihk,bjhk->bhij", q, k) / 2
    weights = np.exp(np.where(np.tri(7, dtype=bool), scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bhij,bjhk->bihk", weights, v).reshape(2, 7, 20)
    y = y @ p["out_proj"]["kernel"] + p["out_proj"]["bias"]
    np.testing.assert_allclose(want, y, **close)


def test_attention_refuses_what_it_cannot_do():
    mixer = CausalAttention(12, head_dim=4)
    x = jnp.zeros((1, 3, 12))
    variables = mixer.init(jax.random.key(0), x)
    for name in ("mask", "segment_ids"):
        with pytest.raises(ValueError, match="whole rows of one document"):
            mixer.apply(variables, x, **{name: jnp.ones((1, 3))})
    with pytest.raises(ValueError, match="no context"):
        mixer.apply(variables, x, context=x)
    with pytest.raises(ValueError, match="needs max_length"):
        mixer.init_state(1)
    state = mixer.init_state(1, max_length=2)
    with pytest.raises(ValueError, match="3 tokens do not fit a cache of max_length=2"):
        mixer.apply(variables, x, state, method="extend")
    with pytest.raises(ValueError, match="whole rows"):
        mixer.apply(variables, x[:, :2], state, lengths=jnp.ones(1), method="extend")
    with pytest.raises(ValueError, match="width=10 is not divisible by head_dim=4"):
        CausalAttention(12, head_dim=4, width=10).init(jax.random.key(0), x)


# ---------------------------------------------------------------- training

RATES = ("token_drop", "mixer_drop", "mlp_drop", "class_dropout")
KEY = jax.random.key(0)


@pytest.mark.parametrize("rate", [None, *RATES])
def test_dropouts_act_only_with_an_rng_and_each_by_itself(rate):
    """What is dropped, and that everything else is not."""
    rates = dict.fromkeys(RATES, 0.0) | ({rate: 0.5} if rate else {})
    net, variables = make_net(d_intermediate=20, mixer="attention", n_layer=2, **rates)
    codes, labels = some_codes(net, rows=16)
    want, before = compiled(net, collect=True)(variables, codes, labels)
    run = compiled(net, collect=True, random=True)
    got, kept = run(variables, codes, labels, KEY)
    if rate is None:
        np.testing.assert_array_equal(got, want)
        return
    plain, _ = make_net(d_intermediate=20, mixer="attention", n_layer=2)
    np.testing.assert_array_equal(forward(plain, variables, codes, labels), want)  # no rng
    assert np.abs(got - want).max() > 1e-2
    assert np.abs(run(variables, codes, labels, jax.random.key(1))[0] - got).max() > 1e-2

    params, layers = variables["params"], kept["layers"]
    embedded = kept["embedded"][0]
    tokens = embedded[:, 1:] - params["position_embedding"][:6]
    whole = params["embedding"][codes[:, :-1]]
    none = np.isclose(tokens, 0, atol=1e-6)  # dropped before the position is added
    update = layers["residual2"][0] - layers["residual"][0]
    shares = {
        "token_drop": none.mean(),
        "mixer_drop": (update == 0).mean(),
        "mlp_drop": (layers["out"][0] == 0).mean(),
    }
    others = {n: share for n, share in shares.items() if n != rate}
    assert max(others.values()) < 0.01, others
    if rate == "class_dropout":  # rows are as they were, or rows of the null class
        null = forward(net, variables, codes, jnp.full_like(labels, net.config.num_classes))
        is_null = np.isclose(got, null, atol=1e-4).all((1, 2))
        assert 0 < is_null[:-1].sum() < 15
        np.testing.assert_allclose(got, np.where(is_null[:, None, None], null, want), **close)
        return
    assert 0.4 < shares[rate] < 0.6
    first = params["class_embedding"][labels]
    np.testing.assert_array_equal(embedded[:, 0], first)
    if rate == "token_drop":  # what is kept is doubled
        np.testing.assert_allclose(np.where(none, 2 * whole, tokens), 2 * whole, **close)
    else:
        drawn = np.asarray((update if rate == "mixer_drop" else layers["out"][0]) == 0)
        assert (drawn[0] != drawn[1]).any()  # blocks draw anew
        np.testing.assert_array_equal(embedded, before["embedded"][0])


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_no_gradient(remat):
    changes = {"mixer": "attention", "conditioning": "adaln_group", "mixer_drop": 0.2}
    net, variables = make_net(n_layer=2, **changes)
    codes, labels = some_codes(net)

    def gradient(net):
        run = lambda v: net.apply(v, codes, labels, rngs={"dropout": KEY})[0]
        return quick_jit(jax.grad(lambda v: jnp.sum(jnp.sin(run(v)))))(variables)

    want, got = gradient(net), gradient(make_net(remat=remat, n_layer=2, **changes)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(want))
