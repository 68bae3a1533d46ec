"""Polynomial mixer within the documents of packed rows: the scan against the matrix of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lintime.kernels_pallas import poly_mix as op
from lintime.kernels_pallas.compat import auto_mesh
from lintime.kernels_pallas.poly_mix import poly_mix

from .kernel_base import assert_close, to_numpy
from .test_poly_mix import B, E, draw


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "ids",
    [
        [[0] * 5 + [1] * 8, [3] * 12 + [4]],  # packed
        [[2, 2, 0, 2, 1, 1, 2, 0, 0, 0, 5, 2, 0], list(range(13))],  # in pieces, backwards, alone
        [[7, 7, 7, 7, 7, 1, 1, 1, 1, -1, -1, -1, -1]],  # the same in all rows, falling
    ],
)
def test_documents(ids, causal, rotated):
    """Values and gradients equal those of the matrix of weights, for ids in any order."""
    inputs, ids = draw(), jnp.asarray(ids)
    h, coeff, weights = inputs["h"], inputs["coeff"], inputs["weights"].at[0, 5:].set(0)
    h = jnp.where(weights[..., None] != 0, h, jnp.nan)
    rotation = op.rope_rotation(jnp.arange(13), op.rope_frequencies(E)) if rotated else None
    seed = jnp.asarray(np.random.default_rng(1).standard_normal(h.shape), jnp.float32)

    def run(implementation):
        def loss(h, coeff):
            rows = op.poly_mix_segments(
                h, coeff, ids, weights=weights, causal=causal, rotation=rotation,
                implementation=implementation,
            )  # fmt: skip
            return jnp.sum(rows * seed), rows

        return to_numpy(jax.jit(jax.grad(loss, (0, 1), has_aux=True))(h, coeff))

    assert_close(run("xla"), run("reference"), 1e-5, "documents ")
    if not causal and len(ids) == 2:  # every document alone, without weights
        h = inputs["h"]
        rows = jax.jit(op.poly_mix_segments)(h, coeff, ids)
        for document in set(ids[0].tolist()):
            one = np.asarray(ids[0] == document)
            want, _ = poly_mix(h[:1, one], coeff)
            np.testing.assert_allclose(rows[0, one], want[0].repeat(one.sum(), 0), atol=1e-5)


def test_documents_do_not_touch():
    """NaN stays in its document, forwards and backwards; later tokens do not change earlier."""
    inputs, ids = draw(), jnp.asarray([[0] * 5 + [1] * 8])
    for causal in (False, True):

        def loss(h, causal=causal):
            rows = op.poly_mix_segments(h, inputs["coeff"], ids, causal=causal)
            return jnp.sum(rows[:, :5] ** 2), rows

        go = jax.jit(jax.grad(loss, has_aux=True))
        _, rows = go(inputs["h"].at[:, 9].set(jnp.nan))
        clean = jnp.isfinite(rows).all((0, 2))
        np.testing.assert_array_equal(clean, jnp.arange(13) < (9 if causal else 5))
        gradient, _ = go(inputs["h"])
        assert gradient[:, :5].any((0, 2)).all() and not gradient[:, 5:].any()


def test_documents_split_over_devices_and_cost():
    """Rows over devices under shard_map; no array of T x T; a stream of bfloat16 sums exactly."""
    inputs = draw(32)
    ids = jnp.sort(jnp.asarray(np.random.default_rng(0).integers(0, 5, (B, 32))), axis=1)
    loss = lambda h, c, i: jnp.sum(op.poly_mix_segments(h, c, i, causal=True) ** 2)[None]
    split = jax.shard_map(
        loss, mesh=auto_mesh((2,), ("data",)), check_vma=True,
        in_specs=(P("data"), P(), P("data")), out_specs=P("data"),
    )  # fmt: skip
    grad = lambda f: jax.grad(lambda h, c: jnp.sum(f(h, c, ids)), (0, 1))
    args = inputs["h"], inputs["coeff"]
    got, want = to_numpy(jax.jit(grad(split))(*args)), to_numpy(jax.jit(grad(loss))(*args))
    assert_close(got, want, 1e-5, "split ")
    assert "32,32" not in str(jax.make_jaxpr(grad(loss))(*args))
    ones = jnp.ones((1, 300, 2), jnp.bfloat16)
    one = lambda h: op.poly_mix_segments(h, jnp.ones((2, 1)), jnp.zeros((1, 300), jnp.int32))
    rows = jax.jit(one)(ones)
    assert rows.dtype == jnp.bfloat16 and (rows == 1).all()


def test_mistakes_about_documents():
    inputs = draw()
    for change, message in (
        (
            {"segment_ids": jnp.zeros((B, 4), jnp.int32)},
            r"segment_ids has shape \(2, 4\), expected",
        ),
        ({"implementation": "pallas_tpu"}, "does not exist on 'cpu"),
    ):
        options = {"segment_ids": jnp.zeros((B, 13), jnp.int32)} | change
        with pytest.raises(ValueError, match=message):
            op.poly_mix_segments(inputs["h"], inputs["coeff"], **options)
