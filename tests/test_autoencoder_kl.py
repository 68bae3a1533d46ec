"""The KL autoencoder: published names and sizes, the published implementation's numbers, errors."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.convert import autoencoder_kl as layout
from lintime.model.nets.autoencoder_kl import (
    AutoencoderKL,
    AutoencoderKLConfig,
    sample_posterior,
)
from tests import autoencoder_vectors as vectors
from tests.tiny import quick

VECTORS = np.load(pathlib.Path(__file__).with_name("autoencoder_vectors.npz"))
SMALL = AutoencoderKLConfig(ch=32, ch_mult=(1, 2, 3), num_res_blocks=1, latent_channels=3)


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@pytest.fixture(scope="module")
def published():
    shapes = layout.autoencoder_shapes(SMALL)
    return {name: vectors.array(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def params(published):
    return layout.autoencoder_from_reference(published, SMALL)


def apply(params, x, method, net=None):
    net = net or AutoencoderKL(SMALL)
    return jax.jit(lambda p, x: net.apply({"params": p}, x, method=method))(params, x)


def close(got, wanted, tolerance=2e-5):
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=0, atol=tolerance * scale)


def test_the_released_autoencoder_has_these_names_and_sizes():
    lines = str(VECTORS["released"]).splitlines()
    released = {n: ast.literal_eval(s) for n, s in (line.split(" ", 1) for line in lines)}
    assert layout.autoencoder_shapes(AutoencoderKLConfig()) == released

    net = AutoencoderKL(AutoencoderKLConfig())
    image = jax.ShapeDtypeStruct((1, 32, 16, 3), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), image)["params"]
    count = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
    assert count(params) == 83_653_863
    assert {name: count(tree) for name, tree in params.items()} == {
        "encoder": 34_163_592, "decoder": 49_490_179, "quant_conv": 72, "post_quant_conv": 20,
    }  # fmt: skip
    recon, posterior = jax.eval_shape(lambda p, x: net.apply({"params": p}, x), params, image)
    assert recon.shape == (1, 32, 16, 3)
    assert posterior.mean.shape == posterior.logvar.shape == (1, 4, 2, 4)

    arrays = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in released.items()}
    assert layout.autoencoder_config(arrays) == AutoencoderKLConfig()
    got = jax.eval_shape(
        lambda a: layout.autoencoder_from_reference(a, AutoencoderKLConfig()), arrays
    )
    shapes = lambda tree: jax.tree.map(lambda a: a.shape, tree)
    assert shapes(got) == shapes(params)


def test_encoding_is_the_published_one(params):
    mean, logvar = apply(params, vectors.images(), "encode")
    assert mean.dtype == logvar.dtype == jnp.float32
    close(mean, VECTORS["mean"])
    close(logvar, VECTORS["logvar"])


def test_decoding_is_the_published_one(params):
    images = apply(params, vectors.latents(), "decode")
    assert images.dtype == jnp.float32
    close(images, VECTORS["decoded"])


def test_the_whole_call_decodes_the_mean(params):
    recon, posterior = apply(params, vectors.images(), None)
    close(recon, np.asarray(apply(params, posterior.mean, "decode")))


def test_bfloat16_is_near(params):
    net = AutoencoderKL(SMALL, jnp.bfloat16)
    mean, _ = apply(params, vectors.images(), "encode", net)
    images = apply(params, vectors.latents(), "decode", net)
    assert mean.dtype == images.dtype == jnp.float32
    close(mean, VECTORS["mean"], 0.05)
    close(images, VECTORS["decoded"], 0.05)


def test_log_variance_is_clamped(params):
    loud = {**params, "quant_conv": jax.tree.map(lambda a: 1000 * a, params["quant_conv"])}
    mean, logvar = apply(loud, vectors.images(), "encode")
    assert logvar.min() == -30 and logvar.max() == 20
    close(mean, 1000 * VECTORS["mean"])


def test_a_draw_of_the_posterior():
    mean, logvar = jnp.array([1.0, -2.0]), jnp.array([0.0, np.log(9.0)])
    draw = sample_posterior(mean, logvar, jnp.array([0.5, -1.0]))
    np.testing.assert_allclose(draw, [1.5, -5.0], rtol=1e-6)
    half = sample_posterior(mean.astype(jnp.float16), logvar.astype(jnp.float16), jnp.zeros(2))
    assert half.dtype == jnp.float32


def test_older_names_and_kernels_of_projections(published, params):
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for convolutions in (False, True):
        flat = {}
        for name, array in published.items():
            for new, old in older.items():
                name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
            matrix = array.ndim == 2
            flat[name] = array[:, :, None, None] if matrix and convolutions else array
        assert sum(".query." in name for name in flat) == 4  # two attentions
        assert layout.autoencoder_config(flat) == SMALL
        got = layout.autoencoder_from_reference(flat, SMALL)
        jax.tree.map(np.testing.assert_array_equal, got, params)


def test_there_and_back(published, params):
    back = layout.autoencoder_to_reference(params)
    assert back.keys() == published.keys()
    for name in back:
        np.testing.assert_array_equal(back[name], published[name], err_msg=name)


def test_what_config_json_says(published):
    read = lambda **fields: layout.autoencoder_config(published, fields)
    assert read(scaling_factor=0.13025).scaling_factor == 0.13025
    assert read(norm_num_groups=32, down_block_types=["DownEncoderBlock2D"] * 3) == SMALL
    assert read(shift_factor=None, mid_block_add_attention=True) == SMALL
    with pytest.raises(ValueError, match="config.json has shift_factor=0.1; only None"):
        read(shift_factor=0.1)
    with pytest.raises(ValueError, match="up_block_types=AttnUpDecoderBlock2D; only UpDecoder"):
        read(up_block_types=["UpDecoderBlock2D", "AttnUpDecoderBlock2D"])


def test_arrays_that_do_not_fit(published):
    read = lambda flat: layout.autoencoder_from_reference(flat, SMALL)
    missing = {n: a for n, a in published.items() if n != "decoder.conv_out.bias"}
    with pytest.raises(ValueError, match="missing decoder.conv_out.bias$"):
        read(missing)
    with pytest.raises(ValueError, match="unknown loss.logvar$"):
        read({**published, "loss.logvar": np.zeros(1)})
    with pytest.raises(ValueError, match=r"quant_conv.bias has shape \(7,\), expected \(6,\)"):
        read({**published, "quant_conv.bias": np.zeros(7)})
    with pytest.raises(ValueError, match="missing encoder.conv_in.weight; names found: x"):
        layout.autoencoder_config({"x": np.zeros(1)})
    odd = {**published, "encoder.down_blocks.1.resnets.0.conv1.weight": np.zeros((48, 32, 3, 3))}
    with pytest.raises(ValueError, match=r"\[32, 48, 96\] are no multiples of the first, 32"):
        layout.autoencoder_config(odd)


def test_shapes_that_do_not_fit(params):
    with pytest.raises(ValueError, match="18x16 pixels cannot be cut into latents of 4x4"):
        apply(params, jnp.zeros((1, 18, 16, 3)), "encode")
    with pytest.raises(ValueError, match=r"expected \[B, H, W, 3\]"):
        apply(params, jnp.zeros((1, 16, 16, 4)), "encode")
    with pytest.raises(ValueError, match=r"latents have shape \(1, 4, 4, 4\), expected .*3\]"):
        apply(params, jnp.zeros((1, 4, 4, 4)), "decode")
    with pytest.raises(ValueError, match="all must be multiples of 32"):
        AutoencoderKL(AutoencoderKLConfig(ch=48)).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
