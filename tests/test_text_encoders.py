"""CLIP and T5: the published implementation's numbers, names and sizes, and what is refused."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.convert import clip as clip_layout, t5 as t5_layout
from lintime.model.nets.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig, end_of_text
from lintime.model.nets.t5 import T5Config, T5Encoder, relative_buckets
from tests import text_vectors as vectors
from tests.tiny import quick

VECTORS = np.load(pathlib.Path(__file__).with_name("text_vectors.npz"))
KINDS = (("quick_gelu", vectors.EOS), ("gelu", 2))  # as published, and OpenCLIP's with legacy ids
T5 = T5Config(
    vocab_size=40, d_model=16, n_layer=2, n_head=3, d_kv=6, d_ff=20, buckets=8, max_distance=12
)


def clip_config(act="quick_gelu", eos=vectors.EOS) -> ClipConfig:
    return ClipConfig(
        text=ClipTextConfig(
            d_model=16, n_layer=2, n_head=2, d_ff=32, vocab_size=40, length=8, act=act, eos=eos
        ),
        vision=ClipVisionConfig(
            d_model=24, n_layer=2, n_head=3, d_ff=40, image_size=8, patch_size=4, act=act
        ),
        projection=vectors.PROJECTION,
    )


CLIP = clip_config()


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@pytest.fixture(scope="module")
def clip_arrays():
    shapes = clip_layout.clip_shapes(CLIP)
    return {name: vectors.array(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def clip_params(clip_arrays):
    return clip_layout.clip_from_reference(clip_arrays, CLIP)


@pytest.fixture(scope="module")
def t5_arrays():
    return {n: vectors.array(n, shape) for n, shape in t5_layout.t5_shapes(T5).items()}


@pytest.fixture(scope="module")
def t5_params(t5_arrays):
    return t5_layout.t5_from_reference(t5_arrays, T5)


def run_clip(params, config, dtype=jnp.float32):
    """(states, text, images, logits) of the vectors' inputs."""

    def run(params, ids, images):
        net = Clip(config, dtype).bind({"params": params})
        text = net.encode_text(ids)
        return *text, net.encode_image(images), net(ids, images)

    return jax.jit(run)(params, vectors.clip_ids(), vectors.images())


def close(got, wanted, tolerance=2e-5):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def published_clip(act="quick_gelu", eos=vectors.EOS) -> dict:
    """What config.json of the vectors' CLIP says."""
    more = {"hidden_act": act, "eos_token_id": eos}
    return {
        "text_config": vectors.TEXT | more,
        "vision_config": vectors.VISION | {"hidden_act": act},
        "projection_dim": vectors.PROJECTION,
    }


@pytest.mark.parametrize("act, eos", KINDS)
def test_clip_is_the_published_one(clip_params, act, eos):
    names = ("states", "text", "image", "logits")
    for name, got in zip(names, run_clip(clip_params, clip_config(act, eos)), strict=True):
        close(got, VECTORS[f"{name}_{act}"])
    assert np.abs(VECTORS["logits_gelu"] - VECTORS["logits_quick_gelu"]).max() > 1e-2


def test_clip_in_bfloat16_is_near(clip_params):
    states, text, image, _ = run_clip(clip_params, CLIP, jnp.bfloat16)
    close(states, VECTORS["states_quick_gelu"], 0.05)
    close(text, VECTORS["text_quick_gelu"], 0.05)
    close(image, VECTORS["image_quick_gelu"], 0.05)


def test_where_texts_are_pooled():
    ids = vectors.clip_ids()
    np.testing.assert_array_equal(end_of_text(ids, vectors.EOS), [4, 6, 7])
    np.testing.assert_array_equal(end_of_text(ids, 2), [4, 6, 3])


def test_padding_after_a_text_reaches_nothing(clip_params):
    ids = jnp.asarray(vectors.clip_ids()[:1])
    apply = jax.jit(
        lambda ids: Clip(CLIP).apply({"params": clip_params}, ids, method="encode_text")
    )
    whole, cut, other = apply(ids), apply(ids[:, :5]), apply(ids.at[:, 5:].set(7))
    np.testing.assert_allclose(cut.states, whole.states[:, :5], atol=1e-5)
    np.testing.assert_allclose(cut.pooled, whole.pooled, atol=1e-5)
    np.testing.assert_allclose(other.pooled, whole.pooled, atol=1e-5)
    assert np.abs(other.states - whole.states)[:, 5:].max() > 0.1
    with pytest.raises(ValueError, match="texts of 9 tokens; the net has length=8"):
        apply(jnp.zeros((1, 9), jnp.int32))
    with pytest.raises(ValueError, match=r"images of shape \(4, 8, 3\); the net takes 8x8x3"):
        Clip(CLIP).apply({"params": clip_params}, jnp.zeros((1, 4, 8, 3)), method="encode_image")


def test_t5_is_the_published_one(t5_params):
    ids, mask = vectors.t5_ids()
    apply = jax.jit(lambda net, *a: net.apply({"params": t5_params}, *a), static_argnums=0)
    got = apply(T5Encoder(T5), ids, mask)
    close(got, VECTORS["t5"])
    # Padding reaches nothing: the same text without it.
    close(apply(T5Encoder(T5), ids[1:, :13])[0], VECTORS["t5"][1, :13])
    half = apply(T5Encoder(T5, jnp.bfloat16), ids, mask)
    assert half.dtype == jnp.float32
    assert rms(half - VECTORS["t5"]) < 0.03 * rms(VECTORS["t5"])  # scores are not scaled: sharp


def test_t5_in_bfloat16_keeps_large_residuals(t5_params):
    """The residual stream of the published nets reaches thousands; what is added to it is not lost
    to its size."""
    ids, mask = vectors.t5_ids()
    loud = t5_params | {"tokens": jax.tree.map(lambda a: a + 4096, t5_params["tokens"])}
    gain = t5_params["final_norm"]["g"]
    apply = lambda dtype: T5Encoder(T5, dtype).apply({"params": loud}, ids, mask) / gain
    wide, half = (
        (a - a.mean(-1, keepdims=True)) * 4096 for a in map(apply, (jnp.float32, jnp.bfloat16))
    )
    assert 0.5 < rms(wide) < 5
    assert rms(half - wide) < 0.1 * rms(wide)


def test_buckets_of_relative_positions():
    reach = vectors.DISTANCES
    for row, (buckets, far) in zip(VECTORS["buckets"], ((32, 128), (8, 12)), strict=True):
        table = relative_buckets(reach + 1, buckets, far)
        np.testing.assert_array_equal(table[-1, ::-1], row[: reach + 1][::-1])  # keys before
        np.testing.assert_array_equal(table[0], row[reach:])  # keys behind


def listed(name: str) -> dict:
    lines = str(VECTORS[f"released_{name}"]).splitlines()
    return {n: ast.literal_eval(s) for n, s in (line.split(" ", 1) for line in lines)}


def test_released_names_and_sizes():
    released = listed("clip")
    assert clip_layout.clip_shapes(ClipConfig()) == released
    arrays = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in released.items()}
    assert clip_layout.clip_config(arrays) == ClipConfig()  # heads of 64 without a config.json
    assert clip_layout.clip_config(arrays, {"text_config": {"eos_token_id": 2}}).text.eos == 2

    released = listed("t5")
    arrays = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in released.items()}
    assert t5_layout.t5_config(arrays) == T5Config()
    del released["encoder.embed_tokens.weight"]
    assert t5_layout.t5_shapes(T5Config()) == released


def test_clip_there_and_back(clip_arrays, clip_params):
    back = clip_layout.clip_to_reference(clip_params)
    assert back.keys() == clip_arrays.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, clip_arrays[name], err_msg=name)
    for act, eos in KINDS:
        assert clip_layout.clip_config(clip_arrays, published_clip(act, eos)) == clip_config(
            act, eos
        )
    older = {"text_config": {}, "text_config_dict": published_clip()["text_config"]}
    older["vision_config"] = {"num_attention_heads": 3}
    assert clip_layout.clip_config(clip_arrays, older) == CLIP


def test_one_tower_of_clip(clip_arrays, clip_params):
    """As in pipelines: text_model.* with or without its prefix and projection, and old buffers."""
    text = {n: a for n, a in clip_arrays.items() if n.startswith("text_")}
    text["text_model.embeddings.position_ids"] = np.arange(8)[None]
    settings = published_clip()["text_config"]
    config = clip_layout.clip_config(text, settings)
    assert config == ClipConfig(text=CLIP.text, vision=None, projection=12)
    got = clip_layout.clip_from_reference(text, config)
    jax.tree.map(np.testing.assert_array_equal, got, {"text": clip_params["text"]})

    bare = {n.removeprefix("text_model."): a for n, a in text.items() if "projection" not in n}
    config = clip_layout.clip_config(bare, settings)
    assert config == ClipConfig(text=CLIP.text, vision=None, projection=0)
    params = clip_layout.clip_from_reference(bare, config)
    apply = lambda ids: Clip(config).apply({"params": params}, ids, method="encode_text")
    states, pooled = apply(vectors.clip_ids())
    close(states, VECTORS["states_quick_gelu"])
    close(pooled, VECTORS["pooled_quick_gelu"])


def test_t5_there_and_back(t5_arrays, t5_params):
    back = t5_layout.t5_to_reference(t5_params)
    assert back.keys() == t5_arrays.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, t5_arrays[name], err_msg=name)
    # Of a whole T5 the encoder is read; the table of tokens may have either name.
    whole = t5_arrays | {"decoder.final_layer_norm.weight": np.ones(16), "lm_head.weight": 0}
    whole["encoder.embed_tokens.weight"] = whole.pop("shared.weight")
    settings = {"relative_attention_max_distance": 12, "feed_forward_proj": "gated-gelu"}
    assert t5_layout.t5_config(whole, settings) == T5
    got = t5_layout.t5_from_reference(whole, T5)
    jax.tree.map(np.testing.assert_array_equal, got, t5_params)


def test_arrays_that_do_not_fit(clip_arrays, t5_arrays):
    cut = {n: a for n, a in clip_arrays.items() if n != "text_model.final_layer_norm.bias"}
    with pytest.raises(ValueError, match="missing text_model.final_layer_norm.bias$"):
        clip_layout.clip_from_reference(cut, CLIP)
    with pytest.raises(ValueError, match="neither text_model nor vision_model"):
        clip_layout.clip_config({"x": np.zeros(1)})
    with pytest.raises(ValueError, match="num_channels=1; only 3"):
        clip_layout.clip_config(clip_arrays, {"vision_config": {"num_channels": 1}})
    with pytest.raises(ValueError, match="act='silu'; choose one of quick_gelu, gelu"):
        clip_layout.clip_shapes(clip_config("silu"))
    with pytest.raises(ValueError, match="missing encoder.final_layer_norm.weight$"):
        cut = {n: a for n, a in t5_arrays.items() if "final" not in n}
        t5_layout.t5_from_reference(cut, T5)
    with pytest.raises(ValueError, match="feed_forward_proj=gated-silu; only gated-gelu"):
        t5_layout.t5_config(t5_arrays, {"feed_forward_proj": "gated-silu"})
    first = {"encoder.block.0.layer.1.DenseReluDense.wi.weight": np.zeros((2, 2))}
    with pytest.raises(ValueError, match="version 1.0"):
        t5_layout.t5_config(first)
