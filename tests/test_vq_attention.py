"""VQ attention: every implementation against the float64 definition, and the parts it is made
of.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.kernels_pallas import vq_attention as vq
from lintime.kernels_pallas.compat import enable_x64

from .kernel_base import Spec, kernel_tests

B, H, KV, K, V, S = 2, 4, 2, 6, 4, 5


def make_inputs(rng, length, dtype, *, mem, heads=H, kv_heads=KV):
    """Keys are codewords of their codes, as after quantisation."""
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    codebook = np.random.default_rng(99).standard_normal((kv_heads, S, K)).astype(dtype)
    codes = rng.integers(0, S, (B, kv_heads, length)).astype(np.int32)
    lookup = lambda z: np.stack([codebook[h][z[:, h]] for h in range(kv_heads)], 1)
    # Document ids never fall, also from one call to the next: they start to rise late.
    steps = np.cumsum((rng.integers(0, 3, (B, length)) == 0) & (np.arange(length) > 6), axis=1)
    state = vq.init_state(B, kv_heads, mem, S, K, V, dtype)
    return {
        "q": draw(B, heads, length, K),
        "k": lookup(codes).astype(dtype),
        "codes": codes,
        "v": draw(B, kv_heads, length, V),
        "codebook": codebook,
        "content_bias": draw(heads, K),
        "position_bias": draw(heads, K),
        "rel": draw(kv_heads, mem + 1, K),
        "segment_ids": (1 + steps).astype(np.int32),
        "state": state,
    }


def spec(mem, block=4, **options):
    return Spec(
        op=vq.vq_attention,
        make=lambda rng, length, dtype: make_inputs(rng, length, dtype, mem=mem),
        time_axis={"q": 2, "k": 2, "codes": 2, "v": 2, "segment_ids": 1},
        batch_axis={"q": 0, "k": 0, "codes": 0, "v": 0, "segment_ids": 0},
        grad=("q", "k", "v", "content_bias", "position_bias", "rel", "state"),
        constant=("count",),
        variants={r: {"implementation": "xla", "reduction": r} for r in vq.REDUCTIONS},
        block=block,
        options={"block_len": block, **options},
        out_time_axis=2,
        clean_padding=("segment_ids",),
        slow=("serial", "matmul"),
    )


test_kernel = kernel_tests(spec(mem=4))


def naive(inputs, *, mem, mask_segments=False, use_cache=True):
    """The definition as a loop over queries, in float64 numpy; no state."""
    a = {k: np.asarray(v, np.float64) for k, v in inputs.items() if k != "state"}
    heads, t_len = a["q"].shape[1:3]
    group = heads // a["k"].shape[1]
    out = np.zeros((B, heads, t_len, V))
    for b, h, t in np.ndindex(B, heads, t_len):
        kv = h // group
        qc, qp = (a["q"][b, h, t] + a[n][h] for n in ("content_bias", "position_bias"))
        scores = np.full(t_len, -np.inf)
        for j in range(t + 1):
            near = t - j <= mem
            same = a["segment_ids"][b, t] == a["segment_ids"][b, j] or not mask_segments
            if same and (near or use_cache):
                scores[j] = qc @ a["k"][b, kv, j] + (qp @ a["rel"][kv, t - j] if near else 0)
        weights = np.exp(scores - scores.max())
        out[b, h, t] = weights @ a["v"][b, kv] / weights.sum()
    return out


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    "mem, block, options",
    [
        (4, 4, {}),
        (6, 4, {"mask_segments": True}),
        (3, 5, {"mask_segments": True, "reduction": "matmul"}),
        (3, 5, {"use_cache": False}),
        (0, 4, {}),
        (8, 1, {"reduction": "serial"}),
    ],
)
def test_equals_the_definition(implementation, mem, block, options):
    """Any window and block length, documents, no cache: a loop over queries agrees to 1e-12."""
    with enable_x64():
        inputs = make_inputs(np.random.default_rng(3), 19, np.float64, mem=mem)
        del inputs["state"]
        run = jax.jit(
            lambda a: vq.vq_attention(
                **a, block_len=block, implementation=implementation, **options
            )[0]
        )
        naive_options = {k: v for k, v in options.items() if k != "reduction"}
        want = naive(inputs, mem=mem, **naive_options)
        np.testing.assert_allclose(run(inputs), want, atol=1e-12)


def test_multi_query_heads_share_keys():
    """Query head i reads key-value head i // (H/h): the same as repeating the keys."""
    one = make_inputs(np.random.default_rng(1), 9, np.float32, mem=4, heads=4, kv_heads=1)
    four = dict(one)
    for name, axis in (("k", 1), ("codes", 1), ("v", 1), ("codebook", 0), ("rel", 0)):
        four[name] = np.repeat(one[name], 4, axis=axis)
    del one["state"], four["state"]
    run = jax.jit(lambda a: vq.vq_attention(**a, block_len=4)[0])
    np.testing.assert_allclose(run(one), run(four), atol=1e-5)


def test_quantize():
    """Nearest code, first on ties; straight-through gradient; errors pull keys to their code."""
    codebook = jnp.array([[[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]])
    k = jnp.array([[[[0.9, 0.1], [0.1, 0.1], [0.2, 1.9]]]])
    codes, quantised, errors = vq.quantize(k, codebook)
    np.testing.assert_array_equal(codes, [[[1, 0, 3]]])
    np.testing.assert_allclose(quantised, [[[[1, 0], [0, 0], [0, 2]]]], atol=1e-6)
    np.testing.assert_allclose(errors, [[[0.02, 0.02, 0.05]]], atol=1e-6)
    weights = jnp.arange(6.0).reshape(k.shape)
    grad = jax.grad(lambda k: jnp.sum(vq.quantize(k, codebook)[1] * weights))(k)
    np.testing.assert_allclose(grad, weights)
    grad = jax.grad(lambda k: jnp.sum(vq.quantize(k, codebook)[2]))(k)
    np.testing.assert_allclose(grad, 2 * (k - quantised), atol=1e-6)


def test_codebook_statistics_of_masked_tokens():
    """Sums and counts leave out masked tokens, whatever they hold."""
    k = np.random.default_rng(0).standard_normal((2, 1, 5, 3)).astype(np.float32)
    codes = np.array([[[0, 1, 1, 2, 0]], [[2, 2, 0, 1, 1]]], np.int32)
    mask = np.array([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1]])
    k[mask[:, None] == 0] = np.nan
    got = vq.codebook_statistics(jnp.asarray(k), codes, jnp.asarray(mask), 4)
    for s in range(4):
        chosen = (codes[:, 0] == s) & (mask == 1)
        np.testing.assert_allclose(got["c_count"][0, s], chosen.sum())
        np.testing.assert_allclose(got["c_sum"][0, s], k[:, 0][chosen].sum(0), atol=1e-6)


def test_three_bfloat16_parts_hold_a_float32():
    """The parts that tensor cores sum instead of float32 add up to it exactly."""
    from lintime.kernels_pallas.vq_attention.quantize import _bfloat16_parts

    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    parts = jax.jit(lambda x: jnp.stack(_bfloat16_parts(x)))(x)
    assert parts.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(parts, np.float64).sum(0), x)


@pytest.mark.parametrize("name, change", [("v", (2, 2, 9, 4)), ("rel", (1, 5, K))])
def test_shape_errors_name_the_argument(name, change):
    inputs = make_inputs(np.random.default_rng(1), 8, np.float32, mem=4)
    with pytest.raises(ValueError, match=name):
        vq.vq_attention(**{**inputs, name: np.zeros(change, np.float32)})


def test_unknown_choices_are_refused():
    inputs = make_inputs(np.random.default_rng(1), 8, np.float32, mem=4)
    with pytest.raises(ValueError, match="pallas"):
        vq.vq_attention(**inputs, implementation="pallas")
    with pytest.raises(ValueError, match="reduction"):
        vq.vq_attention(**inputs, reduction="parallel")
