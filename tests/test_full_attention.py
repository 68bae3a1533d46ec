"""FullAttention: the definition, padding, documents, contexts, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lintime.model.mixers import fused_attention
from lintime.model.mixers.full_attention import FullAttention

MIXER = FullAttention(12, num_heads=3)
close = dict(rtol=2e-5, atol=2e-5)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def variables_for(**kwargs):
    v = MIXER.init(jax.random.key(0), jnp.zeros((1, 2, 12)), **kwargs)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: a + 0.3 * jnp.asarray(rng.standard_normal(a.shape), a.dtype), v)


X = draw(2, 5, 12)
SELF = variables_for()
run = jax.jit(lambda x, **kw: MIXER.apply(SELF, x, **kw)[0])


def definition(x, source, p, allowed):
    """From the definition, in float64."""
    p = jax.tree.map(np.float64, p)
    dense = lambda name, x: np.float64(x) @ p[name]["kernel"] + p[name]["bias"]
    if "qkv" in p:
        q, k, v = np.split(dense("qkv", x), 3, axis=-1)
    else:
        q, (k, v) = dense("q", x), np.split(dense("kv", source), 2, axis=-1)
    out = np.zeros(x.shape)
    for h in range(3):
        part = np.s_[..., 4 * h : 4 * h + 4]
        scores = q[part] @ np.swapaxes(k[part], 1, 2) / 2
        weights = np.exp(np.where(allowed, scores, -np.inf))
        out[part] = weights / weights.sum(-1, keepdims=True) @ v[part]
    return dense("proj", out)


def test_definition():
    want = definition(X, X, SELF["params"], np.ones((2, 5, 5), bool))
    np.testing.assert_allclose(run(X), want, **close)
    assert MIXER.apply(SELF, X)[1] == {}


def test_padding_reaches_nothing():
    """Not even as NaN, forward or backward."""
    mask = np.arange(5) < np.array([[3], [5]])
    junk = np.where(mask[..., None], X, np.nan)
    got = run(junk, mask=mask)
    np.testing.assert_allclose(got[0, :3], run(X[:1, :3])[0], **close)
    np.testing.assert_allclose(got[1], run(X)[1], **close)
    loss = lambda x, v: jnp.sum(jnp.sin(MIXER.apply(v, x, mask=mask)[0]) * mask[..., None])
    for g in jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(junk, SELF)):
        assert np.isfinite(g).all()


def test_documents_attend_to_themselves():
    ids = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 1]])
    got = run(X, segment_ids=ids)
    np.testing.assert_allclose(got[:1, :2], run(X[:1, :2]), **close)
    np.testing.assert_allclose(got[:1, 2:], run(X[:1, 2:]), **close)
    np.testing.assert_allclose(got[1], run(X)[1], **close)
    both = run(X, segment_ids=ids, mask=np.arange(5)[None] < np.array([[4], [5]]))
    np.testing.assert_allclose(both[:1, 2:4], run(X[:1, 2:4]), **close)


def test_context():
    context, mask = draw(2, 4, 7, seed=2), np.arange(4) < np.array([[2], [4]])
    variables = variables_for(context=jnp.zeros((1, 4, 7)))
    assert variables["params"].keys() == {"q", "kv", "proj"}
    assert variables["params"]["kv"]["kernel"].shape == (7, 24)
    apply = lambda **kw: MIXER.apply(variables, X, **kw)[0]
    whole = np.ones((2, 5, 4), bool)
    want = definition(X, context, variables["params"], whole)
    np.testing.assert_allclose(apply(context=context), want, **close)
    want = definition(X, context, variables["params"], whole & mask[:, None])
    junk = np.where(mask[..., None], context, np.nan)
    np.testing.assert_allclose(apply(context=junk, context_mask=mask), want, **close)


def test_bfloat16():
    half = FullAttention(12, num_heads=3, dtype=jnp.bfloat16)
    got = half.apply(SELF, X)[0]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), run(X), atol=0.1)


def test_refuses():
    for kwargs, words in (
        ({"positions": jnp.zeros((2, 5))}, "no positions"),
        ({"context_mask": jnp.ones((2, 5))}, "context_mask without a context"),
        ({"context": X, "segment_ids": jnp.ones((2, 5))}, "segment_ids say nothing"),
    ):
        with pytest.raises(ValueError, match=words):
            MIXER.apply(SELF, X, **kwargs)
    with pytest.raises(ValueError, match="num_heads=5 does not divide width=12"):
        FullAttention(12, num_heads=5).init(jax.random.key(0), X)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_of_tpus_computes_the_same(masked, monkeypatch):
    """Output and gradients in Pallas' interpreter against XLA; a mesh cuts rows and heads."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, w = (jax.random.normal(key, (2, 256, 2, 24)) for key in keys)
    options = {}
    if masked:
        options = dict(valid=jnp.arange(256) < jnp.asarray([[200], [131]]))
        options["segment_ids"] = jnp.repeat(jnp.asarray([[0, 0, 1, 1], [3, 3, 3, 9]]), 64, axis=1)
    kept = options.get("valid", jnp.ones((2, 256), bool))[..., None, None]

    def run(q, k, v):
        out = jnp.where(kept, fused_attention.attend(q, k, v, **options), 0)
        return jnp.sum(out * w), out

    want = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(q, k, v)
    monkeypatch.setattr(fused_attention, "_tpu_takes", lambda q, k: True)
    with pltpu.force_tpu_interpret_mode():
        got = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)
