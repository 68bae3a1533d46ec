"""Text encoders from folders as published: tokens, features, fingerprints, errors."""

import io
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.convert import clip as clip_layout, t5 as t5_layout
from lintime.model.nets.clip import Clip, ClipConfig, ClipTextConfig
from lintime.model.nets.t5 import T5Config, T5Encoder
from lintime.train.data.captions import ClipVocab, clean, split_words
from lintime.train.encoders.text import load_text_encoder
from lintime.train.errors import UserError
from tests import text_vectors as vectors
from tests.tiny import quick

VECTORS = np.load(pathlib.Path(__file__).with_name("text_vectors.npz"))
WORDS = 512 + len(vectors.MERGES) + 2  # ids of the tests' CLIP tokenizer
CLIP = ClipConfig(
    text=ClipTextConfig(
        d_model=16, n_layer=1, n_head=2, d_ff=32, vocab_size=WORDS, length=12, eos=WORDS - 1
    ),
    vision=None, projection=6,
)  # fmt: skip
T5 = T5Config(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_kv=4, d_ff=20)
TEXTS = ("a photo of a cat", "two dogs")


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


def save(folder, arrays, config, shards=1):
    safetensors = pytest.importorskip("safetensors.numpy")
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(arrays)
    if shards == 1:
        safetensors.save_file(arrays, folder / "model.safetensors")
        return
    files = {n: f"model-{i % shards}.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        safetensors.save_file({n: arrays[n] for n in names if files[n] == file}, folder / file)
    index = json.dumps({"weight_map": files})
    (folder / "model.safetensors.index.json").write_text(index)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """As a pipeline: text_encoder/ and tokenizer/."""
    root = tmp_path_factory.mktemp("pipeline")
    folder, tokens = root / "text_encoder", root / "tokenizer"
    folder.mkdir(), tokens.mkdir()
    shapes = clip_layout.clip_shapes(CLIP)
    arrays = {n: vectors.array(n, s) for n, s in shapes.items()}
    config = {"model_type": "clip_text_model", "num_attention_heads": 2, "eos_token_id": WORDS - 1}
    save(folder, arrays, config)
    vectors.write_tokenizer(tokens)
    return root


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """In shards, with a SentencePiece model trained as T5's: pad, end and unknown are 0, 1, 2."""
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("t5")
    arrays = {n: vectors.array(n, s) for n, s in t5_layout.t5_shapes(T5).items()}
    save(folder, arrays, {"feed_forward_proj": "gated-gelu"}, shards=2)
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=model, vocab_size=24, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


def test_clip_tokens_are_the_published_ones(clip_folder):
    vocab = ClipVocab(clip_folder / "tokenizer")
    for i, text in enumerate(vectors.TEXTS):
        ids = [vocab.begin, *vocab.encode(text), vocab.end]
        np.testing.assert_array_equal(ids, VECTORS[f"tokens_{i}"], err_msg=text)


def test_words_of_a_text():
    words = lambda text: list(split_words(clean(text)))
    assert words("  It's\n2026 DOGS!! ") == ["it", "'s", "2", "0", "2", "6", "dogs", "!!"]
    assert words("''t _x") == ["''", "t", "_", "x"]
    assert words("") == []


def test_rows_of_clip(clip_folder, tmp_path):
    vocab = ClipVocab(clip_folder / "tokenizer")
    ids, mask = vocab.rows(["dogs", "a" * 50], 6)
    assert ids.dtype == np.int32 and ids.shape == mask.shape == (2, 6)
    np.testing.assert_array_equal(mask[0], [True] * 3 + [False] * 3)
    assert ids[0, 0] == vocab.begin and (ids[0, 2:] == vocab.end).all()  # padded by the end
    assert mask[1].all() and ids[1, 5] == vocab.end and ids[1, 4] != vocab.end
    vectors.write_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "!"}}')
    other = ClipVocab(tmp_path)
    assert other.pad == 0 and other.fingerprint != vocab.fingerprint


def test_clip_features(clip_folder):
    encoder = load_text_encoder(clip_folder)
    assert encoder.config == CLIP
    assert (encoder.length, encoder.width, encoder.pooled_width) == (12, 16, 6)
    features, mask, pooled = encoder.encode(TEXTS)
    assert features.shape == (2, 12, 16) and pooled.shape == (2, 6)
    ids, want = encoder.tokenizer.rows(TEXTS, 12)
    np.testing.assert_array_equal(mask, want)
    net = Clip(CLIP).apply({"params": encoder.params}, ids, method="encode_text")
    np.testing.assert_allclose(features, net.states, atol=1e-5)
    np.testing.assert_allclose(pooled, net.pooled, atol=1e-5)
    same = load_text_encoder(clip_folder / "text_encoder", length=8)
    assert same.fingerprint == encoder.fingerprint and same.length == 8
    shorter = same.encode(TEXTS)
    np.testing.assert_allclose(shorter.features, features[:, :8], atol=1e-5)
    params = {"text": encoder.params["text"] | {"positions": jnp.zeros((12, 16))}}
    other = type(encoder)(encoder.config, params, encoder.tokenizer)
    assert other.fingerprint != encoder.fingerprint


def test_t5_features(t5_folder):
    encoder = load_text_encoder(t5_folder, length=10)
    assert encoder.config == T5
    features, mask, pooled = encoder.encode(TEXTS)
    ids, _ = encoder.tokenizer.rows(TEXTS, 10)
    rows = [encoder.tokenizer.encode(text) for text in TEXTS]
    for i, row in enumerate(rows):
        wanted = (row[:9] + [1] + [0] * 10)[:10]
        np.testing.assert_array_equal(ids[i], wanted)
    n = int(mask[1].sum())
    assert n == len(rows[1]) + 1 < 10
    net = T5Encoder(T5).apply({"params": encoder.params}, ids[1:, :n])
    np.testing.assert_allclose(features[1, :n], net[0], atol=1e-4)
    np.testing.assert_allclose(pooled[1], features[1, :n].mean(0), atol=1e-5)
    assert load_text_encoder(t5_folder).length == 128


def test_what_is_refused(clip_folder, t5_folder, tmp_path):
    with pytest.raises(UserError, match="does not exist; name a folder with config.json"):
        load_text_encoder(tmp_path / "x")
    with pytest.raises(UserError, match="texts of 13 tokens; this encoder takes 2 to 12"):
        load_text_encoder(clip_folder, length=13)
    with pytest.raises(UserError, match="merges.txt is in none of .*x"):
        load_text_encoder(clip_folder, tokenizer=tmp_path / "x")
    with pytest.raises(TypeError, match="not one text"):
        load_text_encoder(clip_folder).encode("a cat")
    save(tmp_path, {"x": np.zeros(2, np.float32)}, {})
    with pytest.raises(UserError, match="holds no text encoder .* neither text_model nor"):
        load_text_encoder(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match="cannot read vocab.json and merges.txt"):
        load_text_encoder(clip_folder, tokenizer=tmp_path)
    small = T5Config(vocab_size=8, d_model=8, n_layer=1, n_head=1, d_kv=4, d_ff=8)
    arrays = {n: vectors.array(n, s) for n, s in t5_layout.t5_shapes(small).items()}
    save(tmp_path, arrays, {})
    with pytest.raises(UserError, match="ids, the text encoder .* only 8; they do not belong"):
        load_text_encoder(tmp_path, tokenizer=t5_folder)
