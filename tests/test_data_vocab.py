"""Vocabularies, SentencePiece training and the token files made with it."""

import builtins
import pickle

import numpy as np
import pytest

from lintime.train.data import (
    ByteVocab,
    SentencePieceVocab,
    load_vocab,
    open_data,
    prepare_data,
    raw_validation_bytes,
    tokens as tokens_module,
    train_sentencepiece,
)
from lintime.train.errors import UserError
from lintime.train.schema import Data

pytestmark = pytest.mark.host

WORDS = "the cat sat on a mat and  the dog ran\tfar away; naïve façade, 10 €\n".split(" ")


def story(seed, words=400):
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, words)) + "\n"


def test_byte_vocab():
    vocab = load_vocab("bytes")
    assert isinstance(vocab, ByteVocab) and vocab.size == 259 and vocab.eos == 1
    ids = vocab.encode("hé\n")
    assert ids.dtype == np.int32 and ids.tolist() == [107, 198, 172, 13]
    every = bytes(range(256))
    assert vocab.decode(vocab.encode(every)) == every
    assert vocab.decode([1, 107, 0, 2, 108, 1]) == b"hi"
    assert vocab.encode("").shape == (0,) and vocab.decode([]) == b""
    with pytest.raises(ValueError, match="outside the 259"):
        vocab.decode([259])
    assert vocab.fingerprint == ByteVocab().fingerprint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("vocab") / "deep" / "tiny.model"
    train_sentencepiece([story(i) for i in range(8)], 80, path)
    return path


def test_trained_vocab(model):
    vocab = load_vocab(str(model))
    assert vocab.size == 80 and [p.name for p in model.parent.iterdir()] == ["tiny.model"]
    assert (vocab.pad, vocab.eos, vocab.unk) == (0, 1, 2)
    for text in (story(99), "  the  cat\r\n\n\tsat ", ""):
        ids = vocab.encode(text)
        assert ids.dtype == np.int32 and (ids > 2).all()
        assert vocab.decode(ids) == text.encode()  # lossless: spaces and newlines too
    assert len(vocab.encode(story(99))) < 0.5 * len(story(99))
    assert vocab.decode([0, *vocab.encode("the cat"), 1]) == b"the cat"
    parts = [vocab.decode([i]) for i in vocab.encode(story(5))]
    assert b"".join(parts) == story(5).encode()
    assert vocab.encode("日").tolist()[-1] == 2 and vocab.decode([2]) == "\ufffd".encode()
    assert vocab.encode(b"\xff").tolist() == [2]
    with pytest.raises(ValueError, match="outside the 80"):
        vocab.decode([80])
    copy = pickle.loads(pickle.dumps(vocab))
    assert copy.fingerprint == vocab.fingerprint
    assert copy.encode("a mat").tolist() == vocab.encode("a mat").tolist()


def test_large_vocab_falls_back_to_bytes(tmp_path):
    pytest.importorskip("sentencepiece")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 8)) for _ in range(2000)]
    train_sentencepiece(
        [" ".join(words[i : i + 50]) for i in range(0, 2000, 50)], 1024, tmp_path / "m"
    )
    vocab = load_vocab(str(tmp_path / "m"))
    ids = vocab.encode("日本")
    assert (ids > 2).all() and vocab.decode(ids) == "日本".encode()
    assert vocab.fingerprint["size"] == 1024


def test_sizes_that_do_not_fit(tmp_path):
    pytest.importorskip("sentencepiece")
    with pytest.raises(UserError, match=r"train_vocab=5000 .* set data.train_vocab=\d+$"):
        train_sentencepiece(["ab ab c"] * 5, 5000, tmp_path / "m")
    with pytest.raises(UserError, match="train_vocab=10 .* characters alone need"):
        train_sentencepiece([story(0)], 10, tmp_path / "m")
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece(["\n\n"], 10, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_used(tmp_path, model):
    import io

    import sentencepiece

    with pytest.raises(UserError, match="absent.model.*data.train_vocab"):
        load_vocab(str(tmp_path / "absent.model"))
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_vocab(str(tmp_path / "junk.model"))
    other = io.BytesIO()  # the library's own default: unknown 0, BOS 1, EOS 2, no pad
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([story(i) for i in range(4)]),
        model_writer=other, vocab_size=60, model_type="bpe", minloglevel=2,
    )  # fmt: skip
    (tmp_path / "other.model").write_bytes(other.getvalue())
    with pytest.raises(UserError, match="0, 1, 2 are needed"):
        load_vocab(str(tmp_path / "other.model"))


def test_package_missing(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "sentencepiece":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "a.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"lintime\[text\]"):
        load_vocab(str(tmp_path / "a.model"))
    load_vocab("bytes")


@pytest.fixture
def books(tmp_path):
    pytest.importorskip("sentencepiece")
    for split, count in (("train", 6), ("validation", 2), ("test", 1)):
        (tmp_path / "books" / split).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "books" / split / f"{i}.txt").write_text(
                story(hash_free(split) + i), encoding="utf-8"
            )
    return Data(
        path=str(tmp_path / "books"),
        vocab=str(tmp_path / "v" / "books.model"),
        train_vocab=90,
        sequence_len=16,
        shuffle=False,
        cache=str(tmp_path / "cache"),
    )


def hash_free(split):
    return {"train": 0, "validation": 100, "test": 200}[split]


def opened(config, split="train", batch_size=4):
    return open_data(config, split=split, seed=0, batch_size=batch_size)


@pytest.mark.parametrize("first", ["train", "validation"])
def test_pg19_folder_with_a_vocabulary_trained_on_it(books, tmp_path, first):
    opened(books, first)  # either split may be the first to need the vocabulary
    data = opened(books)
    assert data.vocab.size == 90 and data.vocab.fingerprint == load_vocab(books.vocab).fingerprint
    texts = [(tmp_path / "books" / "train" / f"{i}.txt").read_bytes() for i in range(6)]
    want = np.concatenate([[*data.vocab.encode(text), 1] for text in texts])
    assert data.num_tokens == len(want) and data.num_bytes == sum(map(len, texts))
    count = len(want) // 16
    got = np.concatenate([data.batch(i, range(4))["targets"] for i in range(-(-count // 4))])
    np.testing.assert_array_equal(got[:count].ravel(), want[: count * 16])
    held_out = opened(books, "validation")
    text = b"".join((tmp_path / "books" / "validation" / f"{i}.txt").read_bytes() for i in range(2))
    assert raw_validation_bytes(held_out) == text
    assert sum(int(b["mask"].sum()) for b in held_out.iterate(0, range(4))) == held_out.num_tokens
    assert held_out.fingerprint["vocab"] == data.fingerprint["vocab"]
    assert opened(books, "test").num_documents == 1


def test_tokens_are_made_once(books, tmp_path, monkeypatch):
    prepare_data(books)
    files = sorted(p.name for p in (tmp_path / "cache").iterdir())
    assert len(files) == 6 and not [f for f in files if f.endswith(".tmp")]
    expected = opened(books).batch(3, range(4))["targets"]
    with monkeypatch.context() as patch:
        patch.setattr(tokens_module, "_write_tokens", None)  # would fail if called
        np.testing.assert_array_equal(opened(books).batch(3, range(4))["targets"], expected)
    for victim in (tmp_path / "cache").glob("*.bin"):
        victim.write_bytes(victim.read_bytes()[:10])  # a torn file is not trusted
    tokens_module._map_tokens.cache_clear()
    np.testing.assert_array_equal(opened(books).batch(3, range(4))["targets"], expected)
    book = tmp_path / "books" / "train" / "0.txt"
    book.write_text("and " + book.read_text(encoding="utf-8"), encoding="utf-8")
    changed = opened(books)
    assert changed.vocab.decode(changed.batch(0, [0])["targets"]).startswith(b"and ")


def test_interrupted_tokenising_leaves_nothing(books, tmp_path, monkeypatch):
    load = opened(books)  # vocabulary exists
    cache = tmp_path / "other"
    monkeypatch.setattr(
        type(load.vocab),
        "encode_many",
        lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")),
    )
    with pytest.raises(UserError, match="space"):
        tokens_module.tokenise(load.documents, load.vocab, cache)
    assert list(cache.iterdir()) == []


def test_vocabulary_that_is_missing(books):
    from dataclasses import replace

    with pytest.raises(UserError, match="data.train_vocab"):
        opened(replace(books, train_vocab=0))


class Text:
    """One in-memory document."""

    def __init__(self, text):
        self.data = np.frombuffer(text, np.uint8)
        self.lengths = np.array([len(text)])

    def read(self, i, start, stop):
        return self.data[start:stop]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10**6])
def test_chunks_join_to_the_document(monkeypatch, size):
    monkeypatch.setattr(tokens_module, "_CHUNK", size)
    text = "naïve 日本語 text\nwith lines\n\nand a looooooooooooong word €".encode()
    assert "".join(tokens_module.text_chunks(Text(text), 0)).encode() == text
    assert "".join(tokens_module.text_chunks(Text(text[:8]), 0)).endswith("\ufffd")  # torn 日


def test_chunks_do_not_change_the_tokens(model, monkeypatch):
    vocab, text = SentencePieceVocab(model), "".join(story(i, 30) for i in range(5))
    monkeypatch.setattr(tokens_module, "_CHUNK", 200)
    chunks = list(tokens_module.text_chunks(Text(text.encode()), 0))
    assert len(chunks) > 2
    joined = np.concatenate([vocab.encode(chunk) for chunk in chunks])
    np.testing.assert_array_equal(joined, vocab.encode(text))
