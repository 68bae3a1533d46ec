"""The VQ tokenizer: published names and sizes, codes however they are computed, decoding."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lintime.kernels_pallas.compat import set_mesh
from lintime.model.convert import vq_tokenizer as layout
from lintime.model.layers.image_coder import Downsample
from lintime.model.nets.vq_tokenizer import (
    VQTokenizer,
    VQTokenizerConfig,
    init_codebook,
    l2_normalise,
    last_convolution,
    nearest_codes,
)
from lintime.train.mesh import make_mesh
from lintime.train.schema import Mesh
from tests.tiny import assert_close, assert_same, quick

TINY = VQTokenizerConfig(
    ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=16, codebook_size=24, codebook_dim=4
)
NET = VQTokenizer(TINY)


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    """Initial values, moved so that no bias is 0 and no gain 1."""
    values = jax.jit(NET.init)(jax.random.key(0), jnp.zeros((1, 2, 2, 3)))["params"]
    rng = np.random.default_rng(0)
    stir = lambda a: np.asarray(a + 0.1 * rng.standard_normal(a.shape), np.float32)
    return jax.tree.map(stir, values)


@pytest.fixture(scope="module")
def reference(params):
    """The same under the published names."""
    return layout.tokenizer_to_reference(params)


@pytest.fixture(scope="module")
def images():
    return draw(2, 6, 4, 3, seed=1)


@pytest.fixture(scope="module")
def output(params, images):
    return jax.jit(NET.apply)({"params": params}, images)


def apply(net, params, x, method):
    return jax.jit(lambda p, x: net.apply({"params": p}, x, method=method))(params, x)


# ---------------------------------------------------------------- published layouts

# Names and shapes of VQ-f16 that between them fix all of its sizes.
RELEASED = {
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.conv_blocks.0.res.1.norm1.weight": (128,),
    "encoder.conv_blocks.1.downsample.conv.weight": (128, 128, 3, 3),
    "encoder.conv_blocks.2.res.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.conv_blocks.4.res.0.conv1.weight": (512, 256, 3, 3),
    "encoder.conv_blocks.4.attn.1.proj_out.bias": (512,),
    "encoder.mid.1.q.weight": (512, 512, 1, 1),
    "encoder.conv_out.weight": (256, 512, 3, 3),
    "quant_conv.weight": (8, 256, 1, 1),
    "quantize.embedding.weight": (16384, 8),
    "post_quant_conv.weight": (256, 8, 1, 1),
    "decoder.conv_in.weight": (512, 256, 3, 3),
    "decoder.mid.2.norm2.bias": (512,),
    "decoder.conv_blocks.0.attn.2.v.weight": (512, 512, 1, 1),
    "decoder.conv_blocks.0.upsample.conv.weight": (512, 512, 3, 3),
    "decoder.conv_blocks.4.res.2.conv2.weight": (128, 128, 3, 3),
    "decoder.norm_out.weight": (128,),
    "decoder.conv_out.weight": (3, 128, 3, 3),
}
ABSENT = (
    "encoder.conv_blocks.4.downsample.conv.weight", "encoder.conv_blocks.3.attn.0.q.weight",
    "decoder.conv_blocks.4.upsample.conv.weight", "decoder.conv_blocks.1.attn.0.q.weight",
    "decoder.conv_blocks.0.res.3.conv1.weight", "encoder.conv_blocks.0.res.0.nin_shortcut.weight",
)  # fmt: skip


def test_the_released_tokenizer_fits():
    shapes = layout.tokenizer_shapes(VQTokenizerConfig())
    assert {n: shapes[n] for n in RELEASED} == RELEASED
    assert not set(ABSENT) & set(shapes)
    count = lambda prefix: sum(math.prod(s) for n, s in shapes.items() if n.startswith(prefix))
    assert count("") == 71_883_403
    assert (count("encoder."), count("decoder.")) == (29_298_176, 42_449_795)

    arrays = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    assert layout.config_from_shapes(arrays) == VQTokenizerConfig()
    got = jax.eval_shape(layout.tokenizer_from_reference, arrays)
    image = jnp.zeros((1, 16, 16, 3))
    wanted = jax.eval_shape(VQTokenizer(VQTokenizerConfig()).init, jax.random.key(0), image)
    assert jax.tree.map(lambda a: a.shape, got) == jax.tree.map(lambda a: a.shape, wanted["params"])


def test_sizes_are_read_from_shapes():
    odd = dataclasses.replace(
        TINY, ch_mult=(2, 1, 3), num_res_blocks=2, in_channels=1, out_channels=2, z_channels=5
    )
    shapes = layout.tokenizer_shapes(odd)
    assert layout.config_from_shapes({n: np.empty(s) for n, s in shapes.items()}) == odd


def test_every_container_gives_the_same_parameters(reference, params):
    usage = {layout.USAGE: np.zeros(65536, np.float32)}
    other = {n: a + 1 for n, a in reference.items()}
    below = lambda prefix, flat: {prefix + n: a for n, a in flat.items()}
    step2 = {"mamba.lm_head.weight": np.zeros((2, 2)), "mamba.backbone.x": np.zeros(3)}
    both = below("model/", reference | usage) | below("ema/", other)
    for flat in (
        reference | usage,
        both | {"optimizer/state/0/exp_avg": np.zeros(3)},
        below("vqvae.", reference | usage) | step2,
        below("model/vqvae.", reference),
    ):
        assert layout.config_from_shapes(flat) == TINY
        assert_same(layout.tokenizer_from_reference(flat), params)
    assert_same(
        layout.tokenizer_from_reference(both, "ema"), layout.tokenizer_from_reference(other)
    )
    assert_same(layout.tokenizer_to_reference(params), reference)


def test_what_does_not_fit_is_named(reference):
    convert = layout.tokenizer_from_reference
    lacking = {n: a for n, a in reference.items() if n != "decoder.norm_out.bias"}
    with pytest.raises(ValueError, match="missing decoder.norm_out.bias"):
        convert(lacking)
    with pytest.raises(ValueError, match="unknown decoder.extra.bias"):
        convert(reference | {"decoder.extra.bias": np.zeros(2)})
    with pytest.raises(ValueError, match=r"decoder.mid.1.q.weight has shape .*expected \(64, 64"):
        convert(reference | {"decoder.mid.1.q.weight": np.zeros((32, 64, 1, 1))})
    with pytest.raises(ValueError, match="no VQ tokenizer.*backbone.norm_f"):
        convert({"backbone.norm_f.weight": np.zeros(2)})
    with pytest.raises(ValueError, match="no 'ema' weights"):
        convert({f"model/{n}": a for n, a in reference.items()}, "ema")
    with pytest.raises(ValueError, match="gaps"):
        convert({n.replace("conv_blocks.0", "conv_blocks.7"): a for n, a in reference.items()})
    with pytest.raises(ValueError, match=r"\[33, 64\] are no multiples of the first, 32"):
        name = "encoder.conv_blocks.0.res.0.conv1.weight"
        convert(reference | {name: np.zeros((33, 32, 3, 3))})


# ---------------------------------------------------------------- codes


def brute_force(z, codebook):
    """Nearest codes in float64 and how much nearer they are than the second."""
    distance = np.square(z.astype(np.float64)[..., None, :] - codebook.astype(np.float64)).sum(-1)
    ordered = np.sort(distance, axis=-1)
    return distance.argmin(-1), ordered[..., 1] - ordered[..., 0]


@pytest.mark.parametrize("max_distances", [1, 100, 2 * 3 * 24, 10**6])
def test_pieces_of_any_size_give_the_nearest_codes(max_distances):
    z, codebook = draw(2, 3, 5, 4), draw(24, 4, seed=1)
    codes = nearest_codes(jnp.asarray(z), jnp.asarray(codebook), max_distances=max_distances)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, brute_force(z, codebook)[0])


def test_the_distance_matrix_is_cut():
    shape = jax.ShapeDtypeStruct((4, 8, 8, 8), jnp.float32)
    book = jax.ShapeDtypeStruct((512, 8), jnp.float32)
    find = lambda limit: jax.make_jaxpr(lambda z, c: nearest_codes(z, c, max_distances=limit))(
        shape, book
    )

    def largest(jaxpr):
        sizes = [math.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars]
        inner = [
            largest(getattr(p, "jaxpr", p))
            for e in jaxpr.eqns
            for p in e.params.values()
            if hasattr(getattr(p, "jaxpr", p), "eqns")
        ]
        return max(sizes + inner)

    assert largest(find(2**30).jaxpr) == 4 * 64 * 512
    assert largest(find(2**14).jaxpr) <= 2**14


def test_the_first_of_equal_codes_is_taken():
    codebook = jnp.asarray(np.repeat(np.eye(4, dtype=np.float32), 3, axis=0))
    codes = nearest_codes(jnp.eye(4).reshape(1, 2, 2, 4), codebook)
    np.testing.assert_array_equal(codes.reshape(-1), [0, 3, 6, 9])


def test_encoding_decoding_and_the_whole_call_agree(params, images, output):
    assert output.codes.shape == (2, 3, 2) and output.codes.dtype == jnp.int32
    codes = apply(NET, params, images, "encode")
    np.testing.assert_array_equal(codes, output.codes)
    assert len(np.unique(codes)) > 2
    assert_close(apply(NET, params, codes, "decode"), output.recon)
    assert output.recon.dtype == jnp.float32
    assert_close(last_convolution(params, output.features), output.recon)

    z, codebook = np.asarray(output.z), np.asarray(output.codebook)
    np.testing.assert_array_equal(codes, brute_force(z, codebook)[0])
    unit = params["codebook"] / np.linalg.norm(params["codebook"], axis=1, keepdims=True)
    assert_close(codebook, unit, atol=1e-6)
    assert_close(np.linalg.norm(z, axis=-1), np.ones(z.shape[:3]), atol=1e-6)
    np.testing.assert_array_equal(output.z_q, codebook[np.asarray(codes)])


def test_images_do_not_influence_each_other(params, images, output):
    alone = apply(NET, params, images[1:], "encode")
    np.testing.assert_array_equal(alone, output.codes[1:])


def test_without_normalising(params, images):
    net = VQTokenizer(dataclasses.replace(TINY, l2_norm=False))
    out = jax.jit(net.apply)({"params": params}, images)
    np.testing.assert_array_equal(out.codebook, params["codebook"])
    assert np.ptp(np.linalg.norm(out.z, axis=-1)) > 1e-3
    codes, _ = brute_force(np.asarray(out.z), params["codebook"])
    np.testing.assert_array_equal(out.codes, codes)


def test_bfloat16_gives_the_same_codes_where_they_are_far_apart(params):
    images = draw(16, 8, 8, 3, seed=3)
    half = VQTokenizer(TINY, jnp.bfloat16)
    out = jax.jit(NET.apply)({"params": params}, images)
    rough = jax.jit(half.apply)({"params": params}, images)
    assert rough.z.dtype == rough.recon.dtype == jnp.float32
    error = np.linalg.norm(rough.z - out.z, axis=-1)
    assert 0 < error.max() < 0.1
    _, gap = brute_force(np.asarray(out.z), np.asarray(out.codebook))
    # |z' - a|^2 - |z' - b|^2 differs by at most 2 |z' - z| |a - b| <= 4 |z' - z| from z's.
    apart = gap > 4 * error
    assert apart.mean() > 0.5
    np.testing.assert_array_equal(rough.codes[apart], out.codes[apart])


def test_a_batch_on_many_devices_gives_the_same_codes(params):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    images = draw(8, 4, 4, 3, seed=4)
    want = apply(NET, params, images, "encode")
    mesh = make_mesh(Mesh(data=4, fsdp=2))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with set_mesh(mesh):
        got = apply(NET, params, jax.device_put(images, rows), "encode")
    np.testing.assert_array_equal(got, want)


# ---------------------------------------------------------------- gradients and switches


def weighted(net, images, weight):
    """sum of weight * reconstruction, as a function of the parameters."""
    return lambda params: jnp.sum(net.apply({"params": params}, images).recon * weight)


@pytest.fixture(scope="module")
def weight():
    return draw(2, 6, 4, 3, seed=5)


@pytest.fixture(scope="module")
def gradient(params, images, weight):
    return jax.jit(jax.grad(weighted(NET, images, weight)))(params)


def test_gradients_pass_straight_through_the_quantiser(params, images, weight, output, gradient):
    assert not np.any(gradient["codebook"])  # codes learn from the codebook loss alone

    @jax.jit
    def plain(params):
        """At the latents, the decoder's gradient at the codes; from there on the encoder's."""
        decoded = lambda z_q: NET.apply(
            {"params": params}, z_q, method=lambda net, z_q: net._decode(z_q)[0]
        )
        at_codes = jax.grad(lambda z_q: jnp.sum(decoded(z_q) * weight))(output.z_q)
        latents = lambda p: NET.apply({"params": p}, images, method="latents")
        return jax.grad(lambda p: jnp.sum(latents(p) * at_codes))(params)

    want = plain(params)
    for name in ("encoder", "quant_conv"):
        scale = max(np.abs(a).max() for a in jax.tree.leaves(want[name]))
        assert scale > 1e-3
        assert_close(gradient[name], want[name], rtol=1e-3, atol=1e-4 * scale)


def test_normalising():
    x = np.array([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]], np.float32)
    assert_close(l2_normalise(x), np.array([[0.6, 0.8], [0, 0], [1e-8, 0]]), atol=1e-12)
    gradient = jax.grad(lambda x: jnp.sum(l2_normalise(x)))(x)
    assert np.isfinite(gradient).all()
    codebook = init_codebook(jax.random.key(0), (16, 8))
    assert_close(np.linalg.norm(codebook, axis=1), np.ones(16), atol=1e-6)
    assert np.mean(codebook > 0) == pytest.approx(0.5, abs=0.15)


def test_downsampling_pads_right_and_bottom():
    layer = Downsample(jnp.float32)
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    for row in range(3):
        for column in range(3):
            kernel = jnp.zeros((3, 3, 1, 1)).at[row, column].set(1.0)
            y = layer.apply({"params": {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}}, x)
            padded = np.pad(np.asarray(x)[0, :, :, 0], ((0, 1), (0, 1)))
            np.testing.assert_array_equal(
                y[0, :, :, 0], padded[row : row + 4 : 2, column::2][:, :2]
            )


def test_dropout_acts_iff_an_rng_is_given(params, images, output):
    net = VQTokenizer(dataclasses.replace(TINY, dropout=0.5))
    run = jax.jit(lambda rngs: net.apply({"params": params}, images, rngs=rngs).recon)
    assert_close(run(None), output.recon)
    one, two = (run({"dropout": jax.random.key(i)}) for i in range(2))
    assert np.abs(one - output.recon).max() > 1e-3
    assert np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize("remat", [pytest.param("full", marks=pytest.mark.slow), "dots"])
def test_recomputing_changes_no_gradient(params, images, weight, gradient, remat):
    net = VQTokenizer(TINY, remat=remat)
    got = jax.jit(jax.grad(weighted(net, images, weight)))(params)
    scale = max(np.abs(a).max() for a in jax.tree.leaves(gradient))
    assert_close(got, gradient, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "config, shape, match",
    [
        (TINY, (1, 6, 5, 3), "6x5 pixels cannot be cut into tokens of 2x2.*multiples of 2"),
        (VQTokenizerConfig(), (1, 256, 250, 3), "256x250 pixels.*16x16"),
        (TINY, (1, 6, 4, 1), r"shape \(1, 6, 4, 1\), expected \[B, H, W, 3\]"),
        (TINY, (6, 4, 3), "expected"),
        (TINY, (1, 0, 4, 3), "0x4"),
        (dataclasses.replace(TINY, ch=48), (1, 4, 4, 3), "ch=48.*multiples of 32"),
        (dataclasses.replace(TINY, ch_mult=()), (1, 4, 4, 3), "ch_mult"),
    ],
)
def test_wrong_sizes_are_refused(config, shape, match):
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(VQTokenizer(config).init, jax.random.key(0), jnp.zeros(shape))
