"""lintime.load and what a loaded run can do: weights, errors, text as it is drawn."""

import dataclasses
import io
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lintime
from lintime.model.nets.transformer_vq import TransformerVQConfig
from lintime.model.sampling import TextStream
from lintime.train.checkpoint import Checkpoints, save_inference
from lintime.train.config_files import save_config
from lintime.train.data import ByteVocab
from lintime.train.errors import UserError
from lintime.train.loaded.text import continue_text, stream_text
from lintime.train.samples.command import sample_text
from lintime.train.schema import Checkpoint, Data, Run, Sample
from lintime.train.state import TrainState
from lintime.train.tasks.table import make_task

RUN = Run(
    net=TransformerVQConfig(
        d_model=16, n_layer=1, head_type="mqa", d_k=8, n_code=6, block_len=8, mem_len=8
    ),
    sample=Sample(prompt="The ", length=20, temperature=0.9),
)


def random_weights(config):
    """What the net's `init` would return in shape, without compiling it."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(make_task(config).init, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(0.2 * rng.standard_normal(a.shape), a.dtype), shapes)


@pytest.fixture(scope="module")
def variables():
    return random_weights(RUN)


def write_run(path, variables, config=RUN, **kwargs):
    save_config(config, path / "config.json")
    save_inference(path, variables, **kwargs)
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, variables):
    return write_run(tmp_path_factory.mktemp("run"), variables, step=7)


@pytest.fixture(scope="module")
def loaded(run_dir):
    return lintime.load(run_dir)


def equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b))


# ---------------------------------------------------------------- loading


def test_a_loaded_run_holds_what_was_saved(loaded, variables, run_dir):
    assert loaded.config == RUN and loaded.step == 7 and loaded.path == run_dir
    assert equal(loaded.variables, variables)
    logits, _ = jax.eval_shape(loaded.net.apply, loaded.variables, jnp.ones((1, 4), jnp.int32))
    assert logits.shape == (1, 4, 259)
    assert loaded.vocab.encode("a").tolist() == [100]
    assert "step=7" in repr(loaded)


def test_averaged_weights_come_first_and_any_step_can_be_had(tmp_path, variables):
    save_config(RUN, tmp_path / "config.json")
    checkpoints = Checkpoints(tmp_path, Checkpoint(keep=5))
    for step in (1, 2):
        params = jax.tree.map(lambda a: a + step, variables["params"])  # noqa: B023
        ema = jax.tree.map(lambda a: a - step, variables["params"])  # noqa: B023
        checkpoints.save(TrainState(np.int32(step), params, {}, ema, variables["stats"], {}), {})
    checkpoints.close()
    shift = lambda loaded: float(
        (loaded.params["embedding"] - variables["params"]["embedding"])[0, 0]
    )
    assert shift(lintime.load(tmp_path)) == pytest.approx(-2, abs=1e-5)
    assert shift(lintime.load(tmp_path, ema=False)) == pytest.approx(2, abs=1e-5)
    assert shift(lintime.load(tmp_path, step=1)) == pytest.approx(-1, abs=1e-5)
    with pytest.raises(UserError, match="no checkpoint of step 3; it has 1, 2"):
        lintime.load(tmp_path, step=3)


def test_errors_of_the_directory_are_one_line(tmp_path, run_dir, variables):
    def fails(match, path):
        with pytest.raises(UserError, match=match) as info:
            lintime.load(path)
        assert "\n" not in str(info.value)

    fails("is not a directory", tmp_path / "absent")
    fails("is not a run directory: it has no config.json", tmp_path)
    save_config(RUN, tmp_path / "config.json")
    fails("holds no checkpoints", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    fails("holds no complete checkpoint", tmp_path)
    (tmp_path / "config.json").write_text('{"half')
    fails("damaged", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": "of another program"}))
    fails("saved config: unknown field", tmp_path)
    wider = dataclasses.replace(RUN, net=dataclasses.replace(RUN.net, d_model=32))
    other = write_run(tmp_path / "other", variables, config=wider)
    fails("from another model", other)


def test_a_vocabulary_that_does_not_fit_is_refused_when_it_is_used(tmp_path, variables):
    save_config(RUN, tmp_path / "config.json")
    fingerprint = {"train": {"vocab": {"kind": "sentencepiece", "size": 259, "sha256": "0"}}}
    save_inference(tmp_path, variables, meta={"fingerprint": fingerprint})
    run = lintime.load(tmp_path)
    with pytest.raises(UserError, match="is not the one that .* was trained with"):
        run.generate("a")

    small = dataclasses.replace(RUN, net=dataclasses.replace(RUN.net, vocab_size=13))
    run = lintime.load(write_run(tmp_path / "small", random_weights(small), config=small))
    assert run.params["embedding"].shape == (13, 16)  # the weights are of use without it
    with pytest.raises(UserError, match="has 259 ids, but the net of .*vocab_size=13"):
        run.generate("a")
    with pytest.raises(UserError, match="cannot read the vocabulary nowhere.model"):
        lintime.load(tmp_path / "small", vocab="nowhere.model").vocab  # noqa: B018


def test_importing_lintime_imports_no_jax():
    code = "import sys, lintime; sys.exit('jax' in sys.modules or not callable(lintime.load))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- generating


def test_generate_depends_on_prompt_and_seed_only(loaded):
    text = loaded.generate("ab", 20, seed=1)
    assert isinstance(text, str) and text
    assert loaded.generate(b"ab", 20, seed=1) == text
    assert loaded.generate("ab", 20, seed=2) != text
    pair = loaded.generate(["ab", "a longer prompt"], 20, seed=1)
    assert pair[0] == text and len(pair) == 2
    greedy = loaded.generate("ab", 20, temperature=0)
    assert greedy == loaded.generate("ab", 20, temperature=0, seed=5)
    assert greedy == loaded.generate("ab", 20, top_k=1, seed=3)
    with pytest.raises(TypeError, match="not temprature"):
        loaded.generate("ab", temprature=1.0)


def test_sampler_and_generate_draw_the_same_tokens(loaded):
    prompt = np.concatenate([[1], loaded.vocab.encode("ab")])[None]
    sampler = loaded.sampler(length=20)
    tokens, used = sampler(loaded.variables, jax.random.key(1), prompt, temperature=0.9)
    text = loaded.vocab.decode(tokens[0, : used[0]]).decode("utf-8", "replace")
    assert loaded.generate("ab", 20, seed=1) == text
    assert loaded.sampler(length=20) is sampler  # compiled once


def test_sample_text_prints_returns_and_saves_the_same(loaded, run_dir):
    out = io.StringIO()
    sample = dataclasses.replace(RUN.sample, rows=2)
    texts = sample_text(loaded, sample, seed=3, out=out)
    assert out.getvalue() == f"--- 1 of 2\nThe {texts[0]}\n--- 2 of 2\nThe {texts[1]}\n"
    assert texts == loaded.generate(["The "] * 2, seed=3) and texts[0] != texts[1]
    for row, text in enumerate(texts):
        saved = run_dir / "samples" / f"step00000007-seed3-{row}.txt"
        assert saved.read_bytes().decode() == "The " + text
    sample_text(loaded, RUN.sample, seed=4, out=out, save=False)
    assert len(list((run_dir / "samples").iterdir())) == 2


def test_a_run_on_images_writes_images(tmp_path, variables):
    config = dataclasses.replace(RUN, data=Data(format="images", path="x.npy", sequence_len=48))
    run = lintime.load(write_run(tmp_path, variables, config=config))
    out = io.StringIO()
    assert sample_text(run, Sample(rows=2), seed=0, out=out) == []
    paths = sorted((tmp_path / "samples").glob("*.png"))
    assert len(paths) == 2 and out.getvalue().split() == [str(p) for p in paths]
    import matplotlib.image

    images = [matplotlib.image.imread(p) for p in paths]
    assert images[0].shape[:2] == (4, 4) and not np.array_equal(*images)


# ---------------------------------------------------------------- text as it is drawn


def scripted(*rows: bytes | list[int]):
    """A loaded run whose net draws the given bytes (or ids), chunk by chunk, then pads."""
    vocab = ByteVocab()
    ids = [r if isinstance(r, list) else vocab.encode(r).tolist() for r in rows]
    asked = []

    def stream(*, chunk, **_):
        def advance(variables, state, **_):
            asked.append(state)
            start = state * chunk
            part = [(row + [100] * 999)[start : start + chunk] for row in ids]
            return np.array(part), state + 1

        return TextStream(lambda *_: 0, advance)

    return types.SimpleNamespace(
        vocab=vocab,
        stream=stream,
        decoding_variables=None,
        path=None,
        step=0,
        config=RUN,
        net=types.SimpleNamespace(state_grows=False),
        asked=asked,
    )


def sample_of(text, **fields):
    return Sample(**({"length": 40, "prompt": text} | fields))


def test_length_counts_tokens_and_rows_end_at_eos():
    run = scripted(b"0123456789" * 9, [*range(60, 65), 1, 70, 71])
    first, second = continue_text(run, ["", ""], sample_of(""))
    assert first == "0123456789" * 4 and second == "9:;<="
    run = scripted([50, 1], [51, 52, 1])
    assert continue_text(run, ["", ""], sample_of("", length=400)) == ["/", "01"]
    assert len(run.asked) == 1  # all rows ended: nothing more is drawn


@pytest.mark.parametrize("at", range(10, 20))
def test_stop_text_is_found_across_chunks_and_never_shown(at):
    text = b"x" * at + b"END" + b"y" * 40
    run = scripted(text)
    pieces = [new[0] for new in stream_text(run, [""], sample_of("", stop="END"))]
    assert b"".join(pieces) == b"x" * at
    assert len(run.asked) == (2 if at + 3 > 16 else 1)


def test_half_a_stop_text_is_shown_in_the_end():
    assert continue_text(
        scripted(b"x" * 15 + b"EN" + b"z" * 40), [""], sample_of("", stop="END")
    ) == ["x" * 15 + "EN" + "z" * 23]
    assert continue_text(scripted(b"x" * 38 + b"EN"), [""], sample_of("", stop="END")) == [
        "x" * 38 + "EN"
    ]
    ids = [*ByteVocab().encode(b"xxEN").tolist(), 1]
    assert continue_text(scripted(ids), [""], sample_of("", stop="END")) == ["xxEN"]


def test_characters_are_never_cut_between_chunks():
    text = "a" * 15 + "é" * 10 + "x"
    out = io.StringIO()
    writes = []
    out.write = lambda s: writes.append(s)
    texts = sample_text(scripted(text.encode()), sample_of("p", length=36), out=out)
    assert texts == [text] and "".join(writes) == "p" + text + "\n"
    assert not any("\ufffd" in w for w in writes)
    cut = continue_text(scripted("aé".encode()), [""], sample_of("", length=2))
    assert cut == ["a\ufffd"]  # the length ends inside a character


def test_a_terminal_without_the_character_gets_a_question_mark():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    sample_text(scripted("é!".encode()), sample_of("", length=3), out=out)
    assert raw.getvalue() == b"?!\n"


def test_a_terminal_gets_no_control_characters():
    out = io.StringIO()
    texts = sample_text(scripted(b"a\x1b[2Jb\tc\n"), sample_of("", length=9), out=out)
    assert out.getvalue() == "a\x1b[2Jb\tc\n" + "\n"  # a file gets what was drawn
    out = io.StringIO()
    out.isatty = lambda: True
    assert texts == sample_text(scripted(b"a\x1b[2Jb\tc\n"), sample_of("", length=9), out=out)
    assert out.getvalue() == "a\ufffd[2Jb\tc\n" + "\n"
