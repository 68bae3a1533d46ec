"""DiT with the features of a text: cross and joint contexts, padding, null contexts, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lintime.model.mixers.full_attention import FullAttention, JointAttention
from lintime.model.nets.dit import DiT
from lintime.model.partition import parameter_shardings
from lintime.train.mesh import ROWS, make_mesh
from lintime.train.schema import Mesh
from tests.golden.quick import quick_jit
from tests.tiny import quick
from tests.tiny_dit import abstract_params, make_config, random_params, some_inputs

S, WIDTH = 3, 6
KINDS = ("cross", "joint")
rng = np.random.default_rng(3)
CONTEXT = rng.standard_normal((2, S, WIDTH)).astype(np.float32)
MASK = np.array([[True, True, False], [True, True, True]])
close = dict(rtol=2e-4, atol=2e-4)


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


def text_config(kind, **changes):
    return make_config(context=kind, context_dim=WIDTH, context_length=S, n_layer=2, **changes)


@functools.cache
def runner(config, dtype=jnp.float32):
    """Jitted (params, x, t, labels, context, mask, drop) -> prediction."""
    net = DiT(config, dtype)

    def run(params, x, t, labels, context, mask, drop):
        return net.apply(
            {"params": params}, x, t, labels, context=context, context_mask=mask, drop=drop
        )[0]

    return quick_jit(run)


def case(kind, **changes):
    config = text_config(kind, **changes)
    params, (x, t, labels) = random_params(config), some_inputs(config)
    labels = jnp.zeros_like(labels)
    run = lambda context, mask, drop, dtype=jnp.float32: runner(config, dtype)(
        params, x, t, labels, context, mask, drop
    )
    return config, params, run


@pytest.mark.parametrize("kind, mixer", [*((k, "attention") for k in KINDS), ("cross", "pom")])
def test_a_context_reaches_its_row_and_padding_reaches_nothing(kind, mixer):
    _, _, run = case(kind, mixer=mixer)
    none = np.zeros(2, bool)
    base = run(CONTEXT, MASK, none)
    assert base.shape == (2, 8, 8, 6) and base.dtype == jnp.float32
    junk = CONTEXT.copy()
    junk[0, 2] = np.nan
    np.testing.assert_allclose(run(junk, MASK, none), base, **close)
    other = CONTEXT.copy()
    other[0, 1] += 1
    change = np.abs(run(other, MASK, none) - base).max(axis=(1, 2, 3))
    assert change[0] > 1e-2 and change[1] == 0
    # A row's null context is that of a net without any text, whatever its text and mask.
    both = run(junk, MASK, np.array([True, False]))
    nothing = run(junk, MASK, np.ones(2, bool))
    np.testing.assert_allclose(both[1], base[1], **close)
    np.testing.assert_allclose(both[0], nothing[0], **close)
    assert np.abs(nothing - base)[0].max() > 1e-2
    assert np.isfinite(nothing).all()
    half = run(CONTEXT, MASK, none, jnp.bfloat16)
    assert np.sqrt(np.mean((half - base) ** 2)) < 0.05 * np.sqrt(np.mean(base**2))


def test_no_context_is_the_null_context():
    config, params, run = case("cross")
    x, t, _ = some_inputs(config)
    net = DiT(config)
    want = run(CONTEXT, None, np.ones(2, bool))
    got = quick_jit(net.apply)({"params": params}, x, t, jnp.full(2, config.num_classes))[0]
    np.testing.assert_allclose(got, want, **close)
    assert params["context_embedder"]["null"].shape == (S, WIDTH)
    zero = text_config("cross", null_context="zero")
    assert "null" not in abstract_params(zero)["context_embedder"]
    blank = params | {"context_embedder": params["context_embedder"] | {"null": jnp.zeros(1)}}
    blank["context_embedder"].pop("null")
    want = run(np.zeros_like(CONTEXT), None, np.zeros(2, bool))
    label = blank | {
        "y_embedder": {"embedding": params["y_embedder"]["embedding"][:1].repeat(6, 0)}
    }
    got = quick_jit(DiT(zero).apply)({"params": label}, x, t, jnp.full(2, 5))[0]
    np.testing.assert_allclose(got, want, **close)


def test_a_text_may_stand_alone():
    """Without classes there is no table of them, and labels are not read."""
    config = text_config("joint", num_classes=0)
    shapes = abstract_params(config)
    assert "y_embedder" not in shapes and "cross" not in shapes["blocks"]
    heads = shapes["blocks"]["attn"]
    assert heads.keys() == {"qkv", "proj", "context_qkv", "context_proj"}
    cross = abstract_params(text_config("cross", mixer="mamba2"))["blocks"]
    assert cross["cross"]["kv"]["kernel"].shape == (2, 16, 32) and "mixer" in cross
    params, inputs = random_params(config), some_inputs(make_config())
    run = runner(config)
    one = run(params, *inputs, CONTEXT, MASK, None)
    two = run(params, inputs[0], inputs[1], inputs[2] + 1, CONTEXT, MASK, None)
    np.testing.assert_array_equal(one, two)


def test_cross_attention_starts_at_zero():
    config = text_config("cross")
    net, inputs = DiT(config), some_inputs(config)
    params = quick_jit(net.init)({"params": jax.random.key(0)}, *inputs)["params"]
    assert not np.any(params["blocks"]["cross"]["proj"]["kernel"])
    assert np.any(params["blocks"]["cross"]["kv"]["kernel"])


def test_joint_attention_is_attention_of_all_tokens():
    """With equal projections it is `FullAttention` of tokens and context put together."""
    x = rng.standard_normal((2, 4, 12)).astype(np.float32)
    context = rng.standard_normal((2, S, 12)).astype(np.float32)
    mixer, whole = JointAttention(12, 3), FullAttention(12, 3)
    params = whole.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda a: a + 0.1 * jnp.arange(a.size).reshape(a.shape) / a.size, params)
    twice = params | {f"context_{name}": tree for name, tree in params.items()}
    got = mixer.apply({"params": twice}, x, context, context_mask=MASK)
    mask = np.concatenate([np.ones((2, 4), bool), MASK], axis=1)
    want, _ = whole.apply({"params": params}, np.concatenate([x, context], axis=1), mask=mask)
    np.testing.assert_allclose(got[0], want[:, :4], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1][1], want[1, 4:], rtol=1e-5, atol=1e-5)
    other = twice | {"context_qkv": jax.tree.map(lambda a: 2 * a, params["qkv"])}
    changed = mixer.apply({"params": other}, x, context, context_mask=MASK)[0]
    assert np.abs(changed - got[0]).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_everything(kind):
    """Texts, the null context and every parameter but the last block's of a joint context."""
    config, params, _ = case(kind)
    inputs = some_inputs(config)
    drop = jnp.array([False, True])

    def loss(params, context):
        out, _ = DiT(config).apply(
            {"params": params}, *inputs, context=context, context_mask=MASK, drop=drop
        )
        return jnp.sum(jnp.sin(3 * out))

    grads, of_context = quick_jit(jax.grad(loss, argnums=(0, 1)))(params, CONTEXT)
    assert np.abs(of_context[0, :2]).min() > 0
    assert not np.any(of_context[1]) and not np.any(of_context[0, 2])
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(g).all(), name
        if "y_embedder" not in name:
            assert np.any(g[0] if "blocks" in name else g), name


def test_what_is_refused():
    def build(**changes):
        abstract_params(make_config(**changes))

    for changes, words in (
        ({"context": "film"}, "context='film'; choose one of none, cross, joint"),
        ({"context": "cross"}, "context=cross with context_dim=0 and context_length=0"),
        ({"context_dim": 4}, "context_dim=4 and context_length=0 without a context"),
        ({"num_classes": 0}, "num_classes=0; a net without a context needs classes"),
    ):
        with pytest.raises(ValueError, match=words):
            build(**changes)
    for mixer in ("mamba2", "pom"):
        with pytest.raises(ValueError, match=f"context=joint takes mixer=attention, not {mixer}"):
            abstract_params(text_config("joint", mixer=mixer))
    with pytest.raises(ValueError, match="null_context='mean'; choose learned or zero"):
        abstract_params(text_config("cross", null_context="mean"))
    shape = lambda config, *args, **kw: jax.eval_shape(
        lambda: DiT(config).init(jax.random.key(0), *args, **kw)
    )
    x, t, labels = some_inputs(make_config())
    never = text_config("cross", class_dropout=0.0)
    variables = {"params": abstract_params(never)}  # making parameters needs no context
    with pytest.raises(ValueError, match="no null context; give it a context"):
        jax.eval_shape(DiT(never).apply, variables, x, t, labels)
    with pytest.raises(ValueError, match="the net reads no context"):
        shape(make_config(), x, t, labels, context=CONTEXT)
    with pytest.raises(ValueError, match=r"a context of shape \(2, 6\); the net has context_len"):
        shape(text_config("cross"), x, t, labels, context=CONTEXT[:, :2])


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_computes_the_same(kind):
    config = text_config(kind, d_model=32, n_head=4, mlp_ratio=4.0)
    params, inputs = random_params(config), some_inputs(config, rows=8)
    context, mask = np.tile(CONTEXT, (4, 1, 1)), np.tile(MASK, (4, 1))
    inputs = (*inputs, context, mask, np.arange(8) % 4 == 0)
    want = runner(config)(params, *inputs)
    with jax.set_mesh(mesh := make_mesh(Mesh(data=2, fsdp=2, tensor=2))):
        args = tuple(jax.device_put(a, NamedSharding(mesh, ROWS)) for a in inputs)
        placed = jax.device_put(params, parameter_shardings(params, mesh))
        got = runner.__wrapped__(config)(placed, *args)  # compiled for this mesh
    np.testing.assert_allclose(got, want, **close)
