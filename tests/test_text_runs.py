"""Runs of DiT and FlexiDiT by text: captions to features, training, drawing by prompts, scores."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import lintime
from lintime.model.convert.clip import clip_shapes
from lintime.train import loop
from lintime.train.arrays import encode_arrays
from lintime.train.data.open import open_split
from lintime.train.data.text_features import TextFeatures
from lintime.train.encoders.text import load_text_encoder
from lintime.train.evaluate.clip_score import clip_score, load_clip
from lintime.train.evaluate.runs import image_figures
from lintime.train.finish import finish
from lintime.train.loaded.load import LOADED
from lintime.train.override import apply_overrides
from lintime.train.prepare.text import prepare_text
from lintime.train.samples.budgets import sample_budgets
from lintime.train.schema import Run
from lintime.train.tasks.table import make_task
from lintime.train.validate import validate
from tests import text_vectors as vectors
from tests.test_clip_score import CONFIG, WORDS
from tests.tiny import assert_same, quick, read_lines, refused, saved_state
from tests.tiny_diffusion import dit_run, flexible_run, latent_run, stopped_after
from tests.tiny_images import SIZE

ONE = {"devices": jax.devices()[:1]}
LENGTH, WIDTH = 8, 16  # of the tests' CLIP
READS = (
    "context=cross", f"context_dim={WIDTH}", f"context_length={LENGTH}", "num_classes=0"
)  # fmt: skip
ANIMALS = ("a cat", "dogs")


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


def write_clip(folder: Path, change: float = 0.0) -> Path:
    """A whole random CLIP with its tokenizer, as published."""
    folder.mkdir()
    heads = lambda n, **more: {"num_attention_heads": n, **more}
    config = {"text_config": heads(2, eos_token_id=WORDS - 1), "vision_config": heads(3)}
    arrays = {n: vectors.array(n, shape) + change for n, shape in clip_shapes(CONFIG).items()}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(encode_arrays(arrays, "safetensors"))
    vectors.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """images/ of two classes, a caption beside each; clip/; text/, the features."""
    root = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(20):
        folder = root / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 64, (SIZE, SIZE, 3)) + 128 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{ANIMALS[i % 2]}\nphoto of {ANIMALS[i % 2]}\n")
    write_clip(root / "clip")
    prepare(root)
    return root


def prepare(root: Path) -> None:
    encoder = load_text_encoder(root / "clip")
    data = dit_run(root / "images").data
    prepare_text(data, encoder, root / "text", batch_size=8, say=lambda _: None)


def text_run(root: Path, *overrides: str, flexible: bool = False) -> Run:
    make = flexible_run if flexible else dit_run
    at = "net.base." if flexible else "net."
    reads = [f"{at}{setting}" for setting in READS]
    data = f"data.text={root / 'text'}"
    return make(root / "images", *reads, data, *overrides, flow=True)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A run, its folder, and what training returned."""
    run, folder = text_run(root), tmp_path_factory.mktemp("whole") / "run"
    validate(run)
    return run, folder, loop.train(run, folder, **ONE)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole[1], tmp_path / "copy"))


def pictures(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "samples").glob("*.png")}


# ---------------------------------------------------------------- training


def test_a_run_by_text_continues_bit_for_bit(whole, tmp_path, monkeypatch):
    run, folder, _ = whole
    lines = read_lines(folder)
    assert np.isfinite([line["loss"] for line in lines[:-1]]).all()
    with stopped_after(2, monkeypatch):
        loop.train(run, tmp_path / "run", **ONE)
    loop.train(run, tmp_path / "run", **ONE)
    assert read_lines(tmp_path / "run") == lines
    assert_same(saved_state(run, tmp_path / "run"), saved_state(run, folder))


def scattered(tree, seed=0):
    """Parameters, each with noise: at the start of training no text matters."""
    rng = np.random.default_rng(seed)
    noise = lambda a: np.asarray(a + 0.3 * rng.standard_normal(a.shape), np.float32)
    return jax.tree.map(noise, tree)


@pytest.mark.parametrize("flexible", [False, True])
def test_texts_reach_the_loss_and_are_dropped_in_training(flexible, root):
    at = "net.base" if flexible else "net"
    more = ["process.match=0.1"] if flexible else []
    run = text_run(root, f"{at}.class_dropout=0.999999", *more, flexible=flexible)
    task = make_task(run).in_mode(4 if flexible else None)
    batch = open_split(run, "train", root).batch(0, np.arange(4)) | {"step": np.int32(0)}
    params = scattered(task.init(jax.random.key(0))["params"])

    @jax.jit
    def losses(context):
        rows = batch | {"context": context}
        training = task.loss(params, {}, {}, rows, jax.random.key(1))[0]
        return training, task.evaluate(params, {}, rows)["loss"]

    one, other = losses(batch["context"]), losses(batch["context"][::-1])
    assert one[0] == other[0] and one[1] != other[1]


# ---------------------------------------------------------------- drawing


def test_what_is_printed_at_the_end(whole, copy, capsys):
    run, _, result = whole
    finish(run, dataclasses.replace(result, run_dir=copy), ["lintime", "train", "x.py"])
    out = capsys.readouterr().out
    stem = copy / "samples/step00000004-seed0"
    held = TextFeatures(run.data.text, "validation")
    assert f"4 images: {stem}.png\nof the prompts in {stem}.txt" in out
    assert Path(f"{stem}.txt").read_text().splitlines() == held.captions(range(4))
    assert f"sample --run {copy} --text 'A PROMPT'" in out
    assert "x.py data.path=FOLDER data.text=FEATURES_OF_THEIR_CAPTIONS --run runs/mine" in out


def test_prompts_make_pictures(cli, copy, tmp_path, root):
    words = ("sample", "--run", copy, "--seed", 3, "sample.guidance=2", "sample.files=true")
    out = cli(*words, "--text", "a cat, playing", "--text", "dogs")
    stem = copy / "samples/step00000004-seed3-guidance2"
    name = next(p.name for p in (copy / "samples").glob("*.png") if "cat" in p.name)
    assert f"2 images: {stem}" in out and name.endswith("-00000-a-cat-playing.png")
    drawn = pictures(copy)
    (tmp_path / "prompts").write_text("a cat, playing\n\n dogs\n")
    encoder = ("--text-encoder", root / "clip")
    cli(*words, "--text-file", tmp_path / "prompts", *encoder)
    assert pictures(copy) == drawn
    loaded = lintime.load(copy)
    given = dict(seed=3, guidance=2.0, rows=2)
    cat, dogs = loaded.generate(text=["a cat, playing", "dogs"], **given)
    np.testing.assert_array_equal(cat, np.asarray(Image.open(copy / "samples" / name)))
    other, same = loaded.generate(text=["the theatre", "dogs"], **given)
    np.testing.assert_array_equal(same, dogs)
    assert np.any(other != cat)
    features, mask, _ = load_text_encoder(root / "clip").encode(["a cat, playing", "dogs"])
    again = loaded.generate(context=features, context_mask=mask, **given)
    np.testing.assert_array_equal(again[0], cat)


def test_eval_gives_the_clip_score_of_what_was_drawn(cli, whole, copy, root):
    run, _, _ = whole
    out = cli("eval", "--run", copy, "eval.samples=4", "--clip", root / "clip")
    found = dict(line.split() for line in out.splitlines()[1:] if len(line.split()) == 2)
    assert float(found["loss"]) == pytest.approx(read_lines(copy)[-1]["val_loss"], rel=1e-4)
    loaded = lintime.load(copy)
    wanted = loaded.asked(dataclasses.replace(run.sample, count=4))
    score = clip_score(load_clip(root / "clip"), loaded.generate(wanted), list(wanted.prompts))
    assert float(found["clip_score"]) == pytest.approx(score.score, rel=1e-4)
    assert "clip_score: 4 pairs, images seen at 8x8" in out
    assert found["num_images"] == "4" and "no images were judged" not in out
    note = lambda *o: image_figures(loaded, apply_overrides(run, o), "validation")["notes"][-1]
    assert "no CLIP weights were given" in note("eval.samples=4")
    assert "eval.samples=N eval.clip=DIR" in note()


def random_loaded(run: Run, path: Path):
    params = scattered(make_task(run).init(jax.random.key(0))["params"])
    return LOADED[type(run.net)](run, params, {}, path=path)


def test_a_flexible_net_draws_texts_at_two_budgets(root, tmp_path):
    run = text_run(root, "sample.count=0", "sample.budgets=1,0.7", flexible=True)
    validate(run)
    loaded, out = random_loaded(run, tmp_path), io.StringIO()
    sample_budgets(loaded, dataclasses.replace(run.sample, text=ANIMALS), out=out)
    assert "2 images at 2 budgets" in out.getvalue()
    assert next((tmp_path / "samples").glob("*budgets.txt")).read_text() == "a cat\ndogs\n"
    for budget in (1.0, 0.7):
        first, second = (
            loaded.generate(text=t, budgets=(budget,)) for t in (ANIMALS, ["dogs"] * 2)
        )
        np.testing.assert_array_equal(first[1], second[1])
        assert np.any(first[0] != second[0])


def test_texts_beside_classes_and_padding(root, tmp_path):
    run = text_run(root, "net.num_classes=2")
    validate(run)
    loaded = random_loaded(run, tmp_path)
    features, mask, _ = load_text_encoder(root / "clip").encode(ANIMALS)
    draw = lambda *labels, **mask: loaded.generate(labels, context=features, **mask)
    given = draw(0, 0, context_mask=mask)
    np.testing.assert_array_equal(given, loaded.generate([0, 0], text=ANIMALS))
    other = draw(0, 1, context_mask=mask)
    np.testing.assert_array_equal(given[0], other[0])
    assert np.any(given[1] != other[1]) and np.any(given != draw(0, 0))
    refused("0 classes for 1 texts: this net has 2 classes", loaded.generate, text=["a cat"])
    wanted = loaded.asked(dataclasses.replace(run.sample, count=4))
    assert [ANIMALS[c] for c in wanted.classes] == list(wanted.prompts)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "override, words",
    [
        ("net.context_length=7", "8 tokens of 16 features, the net reads 7 of 16; set "
         "net.context_length=8 net.context_dim=16"),
        ("data.text=", "net.context=cross: the net reads the features of texts, data.text names"),
        ("data.text=nowhere", "nowhere is not a complete folder of features; run"),
        ("data.validation_fraction=0.3", "other train images than the 14 train images of this run"),
        ("net.context=none", "context_dim=16 and context_length=8 without a context"),
        ("net.num_classes=1", "net.num_classes=1, but the data have 2"),
        ("sample.classes=1", "sample.classes=1 would be ignored: the net has no classes"),
        ("sample.text=a data.text_encoder=gone", "has prompts, and their encoder is not at gone"),
        ("eval.clip=x", "eval.clip=x scores images that are drawn; set eval.samples=N"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said_first(override, words, root, tmp_path):
    def train():
        run = text_run(root, *override.split())
        validate(run)
        loop.train(run, tmp_path / "run", **ONE)

    refused(words, train)
    assert not (tmp_path / "run").exists()


def test_runs_without_texts_take_none(root):
    no = lambda words, *o: refused(words, validate, dit_run(root / "images", *o))
    no("data.text=x would be ignored: the net reads no text; set net.context=cross", "data.text=x")
    no("sample.text=a cat is about texts, this net reads none", "sample.text=a cat")
    no("eval.clip=x is about texts", "eval.clip=x")
    latents = latent_run(root / "images", "", "data.images.text=x")
    refused("data.images.text=x would be ignored; set data.text", validate, latents)


def test_mistakes_of_commands_are_one_line(cli, copy, root, tmp_path):
    sample = lambda *words: cli.refused("sample", "--run", copy, *words)
    other = write_clip(tmp_path / "other", change=1e-3)
    assert "is not the text encoder whose features" in sample(
        "--text", "a cat", "--text-encoder", other
    )
    gone = "data.text_encoder=nowhere"
    assert "encoder is not at nowhere; name it with --text-encoder" in sample("--text", "a", gone)
    assert "or give prompts with --text" in sample("data.text=nowhere")
    assert "--text-file nowhere cannot be read" in sample("--text-file", "nowhere")
    assert "sample.classes=1 would be ignored" in sample("sample.classes=1")
    assert "eval.clip=nowhere is not there" in cli.refused(
        "eval", "--run", copy, "eval.samples=2", "--clip", "nowhere"
    )
    loaded = lintime.load(copy)
    refused("draws by text; give text=", loaded.generate, [0])
    longer = lintime.load(copy, text_encoder=load_text_encoder(root / "clip", length=5))
    refused("gives 5 tokens, .* reads 8", longer.generate, text=["a"])
    refused("prompts as a list", loaded.generate, text="a cat")
    refused(r"context of shape \(1, 2, 3\)", loaded.generate, context=np.zeros((1, 2, 3)))
    refused("1 classes for 1 texts: this net has 0 classes", loaded.generate, [0], text=["a"])
