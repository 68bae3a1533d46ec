"""The CLIP score: its definition, resizing, batches, refusals."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lintime.model.convert.clip import clip_from_reference, clip_shapes
from lintime.model.nets.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig
from lintime.train.data.captions import ClipVocab
from lintime.train.errors import UserError
from lintime.train.evaluate.clip_score import LoadedClip, clip_score, load_clip
from tests import text_vectors as vectors
from tests.tiny import quick

WORDS = 512 + len(vectors.MERGES) + 2
CONFIG = ClipConfig(
    text=ClipTextConfig(
        d_model=16, n_layer=1, n_head=2, d_ff=32, vocab_size=WORDS, length=8, eos=WORDS - 1
    ),
    vision=ClipVisionConfig(d_model=24, n_layer=1, n_head=3, d_ff=40, image_size=8, patch_size=4),
    projection=6,
)
CAPTIONS = ["a cat", "dogs", "the theatre", "photo of 3", ""]
rng = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@pytest.fixture(scope="module")
def arrays():
    return {n: vectors.array(n, shape) for n, shape in clip_shapes(CONFIG).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, arrays):
    safetensors = pytest.importorskip("safetensors.numpy")
    folder = tmp_path_factory.mktemp("clip")
    heads = lambda n, **more: {"num_attention_heads": n, **more}
    config = {"text_config": heads(2, eos_token_id=WORDS - 1), "vision_config": heads(3)}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save_file(arrays, folder / "model.safetensors")
    vectors.write_tokenizer(folder)
    return folder


def test_the_score_is_its_definition(folder):
    clip = load_clip(folder)
    assert clip.config == CONFIG
    images = list(rng.integers(0, 256, (5, 8, 8, 3), np.uint8))
    ids, _ = clip.tokenizer.rows(CAPTIONS, 8)
    unit = jnp.asarray(np.stack(images) / 127.5 - 1, jnp.float32)
    logits = np.asarray(Clip(CONFIG).apply({"params": clip.params}, ids, unit), np.float64)
    cosines = np.diag(logits) / np.exp(np.float64(clip.params["logit_scale"]))
    assert 0.1 < cosines.min() < cosines.max() < 0.9
    got = clip_score(clip, iter(images), CAPTIONS, batch_size=2)
    assert got.score == pytest.approx(100 * cosines.mean(), rel=1e-4)
    # A pair that points away counts nothing.
    text = clip.params["text"]
    turned = text | {"projection": {"kernel": -text["projection"]["kernel"]}}
    other = LoadedClip(CONFIG, clip.params | {"text": turned}, clip.tokenizer)
    assert other.fingerprint != clip.fingerprint
    assert clip_score(other, images, CAPTIONS, batch_size=2).score == 0
    assert (got.count, got.size, got.clip) == (5, 8, clip.fingerprint)


def test_images_of_other_sizes_are_resized_and_cut(folder):
    clip = load_clip(folder)
    image = rng.integers(0, 256, (16, 24, 3), np.uint8)
    small = np.asarray(Image.fromarray(image).resize((12, 8), Image.Resampling.BICUBIC))
    one = clip_score(clip, [image], ["a cat"], batch_size=2)
    two = clip_score(clip, [small[:, 2:10]], ["a cat"], batch_size=2)
    assert one.score == two.score


def test_refusals(folder, arrays):
    clip = load_clip(folder)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="^2 images for 3 captions"):
        clip_score(clip, images, CAPTIONS[:3], batch_size=2)
    with pytest.raises(UserError, match="^more than 1 images for 1 captions"):
        clip_score(clip, images, CAPTIONS[:1], batch_size=2)
    with pytest.raises(UserError, match="^0 images for 0 captions"):
        clip_score(clip, [], [])
    text = ClipConfig(text=CONFIG.text, vision=None, projection=6)
    kept = {n: a for n, a in arrays.items() if n.startswith("text_")}
    with pytest.raises(UserError, match="needs both towers of CLIP"):
        LoadedClip(text, clip_from_reference(kept, text), ClipVocab(folder))
