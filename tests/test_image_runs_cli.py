"""Image runs as users of the command line meet them."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lintime
from lintime.train.cli import main
from tests.tiny import quick, read_lines, write_config
from tests.tiny_images import CLASSES, SIZE, aim_run, write_images

pytestmark = pytest.mark.host


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    return write_config(aim_run(write_images(folder / "noise.npz")), folder)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> tuple[Path, str]:
    """A pipeline made by `lintime train`, and what that printed."""
    directory, out = tmp_path_factory.mktemp("trained") / "run", io.StringIO()
    stdout, sys.stdout = sys.stdout, out
    try:
        assert main(["train", str(config), "--run", str(directory)]) == 0
    finally:
        sys.stdout = stdout
    return directory, out.getvalue()


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def saved(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and "samples" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# ---------------------------------------------------------------- train


def test_train_writes_a_grid_and_says_what_next(trained):
    directory, out = trained
    (grid,) = (directory / "samples").glob("*.png")
    assert pixels(grid).shape == (2 * 50 + 2, 2 * 50 + 2, 3)  # 4 images of 8, enlarged 6 times
    assert grid.name == "step00000004-seed0.png" and str(grid) in out
    assert "validation after 4 updates:" in out and "bits_per_token" in out
    assert out.index("stages/0: ") < out.index("encoding 40 images") < out.index(f"\n{directory}: ")
    for text in ("train longer", "sample  ", "evaluate", "your own images", "resume", "loss curve"):
        assert text in out
    assert "data.images.path=FOLDER_OF_CLASS_FOLDERS" in out


def test_the_same_command_again_and_a_fresh_one(cli, config, run):
    before = saved(run)
    out = cli("train", config, "--run", run)
    assert "continuing at step 4" in out and "encoding" not in out and "validation after" in out
    after = saved(run)
    assert {k: v for k, v in after.items() if "plots" not in k} == {
        k: v for k, v in before.items() if "plots" not in k
    }
    line = cli.refused("train", config, "net.d_model=32", "--run", run)
    assert "net.d_model (16 -> 32)" in line and "--fresh" in line
    line = cli.refused("train", config, "stages.0.net.ch=64", "--run", run)
    assert "stages.0.net.ch (32 -> 64)" in line
    assert saved(run) == after


@pytest.mark.slow
def test_fresh_starts_the_whole_pipeline_anew(cli, config, run):
    before = saved(run)
    out = cli("train", config, "steps=1", "stages.0.steps=1", "--fresh", "--run", run)
    assert (run.parent / "run-2/stages/0/config.json").is_file() and f"--run {run}-2 " in out
    assert saved(run) == before


# ---------------------------------------------------------------- sample


def test_sample_settings(cli, run):
    out = cli(
        "sample", "--run", run, "sample.classes=3,1", "sample.count=5", "sample.guidance=2",
        "sample.schedule=cosine", "sample.top_k=5", "sample.top_p=0.9", "sample.temperature=0.8",
        "sample.rows=2", "sample.columns=3", "sample.files=true", "sample.npz=true", "--seed", 7,
    )  # fmt: skip
    (stem,) = (path.with_suffix("") for path in (run / "samples").glob("*-seed7*.json"))
    assert re.fullmatch("step00000004-seed7-guidance2-[0-9a-f]{8}", stem.name)
    assert f"5 images: {stem}.png" in out and f"as arrays: {stem}.npz" in out
    assert pixels(f"{stem}.png").shape == (2 * 50 + 2, 3 * 50 + 2, 3)
    names = sorted(p.name for p in stem.parent.glob(f"{stem.name}-*.png"))
    assert names == [f"{stem.name}-{i:05d}-class{c}.png" for i, c in enumerate([3, 1, 3, 1, 3])]
    with np.load(f"{stem}.npz") as file:
        assert file["arr_0"].shape == (5, SIZE, SIZE, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [3, 1, 3, 1, 3]
        np.testing.assert_array_equal(file["arr_0"][1], pixels(stem.parent / names[1]))


def test_samples_of_other_settings_have_other_names(cli, run):
    """The same command writes the same file again, another one never over it."""
    sample = lambda *words: cli("sample", "--run", run, "sample.count=2", *words)
    drawn = lambda: {p.name: p.read_bytes() for p in (run / "samples").glob("*.png")}
    before = drawn()
    for words, name in (
        ((), "count2"),
        (("sample.guidance=2.5",), "guidance2.5-count2"),
        (("sample.top_k=3", "sample.rows=1"), "count2-top_k3"),
        (("sample.classes=3,1", "--seed", 5), "classes3,1-count2"),
    ):
        out = sample(*words)
        seed = 5 if "--seed" in words else 0
        (path,) = drawn().keys() - before.keys()
        assert path == f"step00000004-seed{seed}-{name}.png" and path in out
        assert {k: v for k, v in drawn().items() if k != path} == before
        before = drawn()
    sample("sample.guidance=2.5")
    assert drawn() == before
    # what the name does not tell: the run's own settings were others
    saved_config = json.loads((run / "config.json").read_text())
    saved_config["sample"]["temperature"] = 0.5
    (run / "config.json").write_text(json.dumps(saved_config))
    out = sample("sample.guidance=2.5")
    assert "guidance2.5-count2-2.png" in out and before.items() < drawn().items()
    assert (
        json.loads((run / "samples/step00000004-seed0-guidance2.5-count2-2.json").read_text())[
            "sample"
        ]["temperature"]
        == 0.5
    )


def test_settings_that_would_be_ignored_are_refused(cli, config, run, tmp_path):
    tokenizer = run / "stages/0"
    refused = lambda *words: cli.refused("sample", "--run", tokenizer, *words)
    assert "--seed 3 would be ignored: a tokenizer" in refused("--seed", 3)
    assert "sample.guidance=2.0 would be ignored" in refused("sample.guidance=2")
    assert "sample.classes=(1,) would be ignored" in refused("sample.classes=1")
    assert "stages.0: sample.top_k=5 would be" in cli.refused(
        "train", config, "stages.0.sample.top_k=5"
    )
    assert "eval.samples=9: only" in cli.refused("eval", "--run", tokenizer, "eval.samples=9")
    codes, out = run / "codes", tmp_path / "second"
    train = lambda *words: cli.refused("train", config, f"data.path={codes}", *words, "--run", out)
    for field in ("data.views=ten", "data.resizes=1.1", "data.images.size=16"):
        line = train(field)
        assert line.startswith(f"lintime: {field.partition('=')[0]} says how codes are made")
        assert f"data.path={codes} holds codes already" in line and not out.exists()
    assert "data.images.path says" in train("data.images.path=x", f"data.tokenizer={tokenizer}")


def test_errors_of_images_name_the_field_of_the_run(cli, config, run, tmp_path):
    train = lambda *words: cli.refused("train", config, *words)
    new = ("--run", tmp_path / "new")
    assert "data.images.path='nowhere' does not" in train("data.images.path=nowhere", *new)
    tokenizer = f"data.tokenizer={run / 'stages/0'}"
    line = train("data.images.path=nowhere", tokenizer, "--run", tmp_path / "newer")
    assert "data.images.path='nowhere' does not" in line
    shutil.copytree(run / "codes", tmp_path / "other/codes")
    line = train("data.views=ten", tokenizer, "--run", tmp_path / "other")
    assert "remove it, or start with --fresh" in line and "--out" not in line


def test_an_image_depends_on_its_number_class_and_seed_only(cli, run):
    words = ("sample", "--run", run, "sample.count=5", "sample.guidance=1.5", "sample.files=true")
    folder = run / "samples"
    drawn = lambda: {p.name: p.read_bytes() for p in folder.glob("*-class*.png")}
    cli(*words, "sample.rows=2", "--seed", 1)
    two = drawn()
    shutil.rmtree(folder)
    cli(*words, "sample.rows=3", "--seed", 1)
    assert drawn() == two and len(two) == 5
    shutil.rmtree(folder)
    cli(*words, "sample.rows=3", "--seed", 2)
    assert list(drawn().values()) != list(two.values())
    loaded = lintime.load(run)
    rest = loaded.generate([2, 3], seed=1, start=2, guidance=1.5)
    names = sorted(two)[2:4]
    for image, name in zip(rest, names):
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(two[name]))))


def test_sample_of_a_tokenizer_shows_reconstructions(cli, run):
    out = cli("sample", "--run", run / "stages/0")
    path = run / "stages/0/samples/step00000003-reconstructions.png"
    assert f"reconstructions below them: {path}" in out
    assert pixels(path).shape == (2 * 50 + 2, 4 * 50 + 2, 3)


def test_mistakes_of_sampling(cli, run):
    sample = lambda *words: cli.refused("sample", "--run", run, *words)
    assert f"class {CLASSES} is out of range; this model has classes 0..3" in sample(
        f"sample.classes=0,{CLASSES}"
    )
    assert "class -1 is out of range" in sample("sample.classes=-1")
    assert "sample.schedule=cosin" in sample("sample.schedule=cosin")
    assert "unknown field 'sample.prompt'" in sample("--prompt", "a dog")
    assert "sample.top_p=0.0 is out of range" in sample("sample.top_p=0")
    assert "net.num_classes is part of the trained run" in sample("net.num_classes=9")
    assert "nowhere" in sample("data.tokenizer=nowhere")
    saved_config = json.loads((run / "config.json").read_text())
    saved_config["net"]["d_model"] = 32
    (run / "config.json").write_text(json.dumps(saved_config))
    assert "checkpoints/4 is from another model: params/" in sample()


# ---------------------------------------------------------------- eval


def printed(out: str) -> dict[str, float]:
    figures = {}
    for line in out.splitlines()[1:]:
        words = line.split()
        if len(words) == 2:
            assert words[0] not in figures, f"{words[0]} is printed twice"
            figures[words[0]] = float(words[1])
    return figures


def test_eval_of_both_kinds(cli, run):
    out = cli("eval", "--run", run)
    last = read_lines(run)[-1]
    assert printed(out)["loss"] == pytest.approx(last["val_loss"], rel=1e-4)
    assert "set eval.samples=N eval.inception=FILE" in out
    out = cli("eval", "--run", run, "eval.samples=3")
    assert sum("no Inception weights were given" in line for line in out.splitlines()) == 1
    assert "eval.batches" not in out
    out = cli("eval", "--run", run / "stages/0", "eval.batches=0")
    figures = printed(out)
    assert {"loss", "psnr", "mse", "codebook_usage", "codebook_perplexity"} <= figures.keys()
    assert figures["num_images"] == 8 and "left out rfid" in out
    assert figures["psnr"] == pytest.approx(read_lines(run / "stages/0")[-1]["val_psnr"], abs=0.1)
    assert "none.pth is not there" in cli.refused(
        "eval", "--run", run, "eval.samples=3", "eval.inception=none.pth"
    )


# ---------------------------------------------------------------- prepare


@pytest.mark.slow
def test_prepare_codes_then_train_on_them(cli, config, run, tmp_path):
    saved_config = json.loads((run / "config.json").read_text())
    images, tokenizer, out = (
        saved_config["data"]["images"]["path"],
        run / "stages/0",
        tmp_path / "codes",
    )
    prepare = (
        "prepare", "codes", images, "--tokenizer", tokenizer, "--out", out, "--size", SIZE,
        "--views", "flip", "--resizes", 1, "--filter", "lanczos", "--validation-fraction", 0.2,
    )  # fmt: skip
    said = cli(*prepare)
    fields = said.splitlines()[-1].removeprefix("train on them with ").split()
    assert fields == [f"data.path={out}", f"data.tokenizer={tokenizer}"]
    assert "already holds the codes" in cli(*prepare)
    cli("train", config, *fields, "--run", tmp_path / "second")
    assert read_lines(tmp_path / "second") == read_lines(run)
    assert not (tmp_path / "second/stages").exists()  # nothing refers to the stage
    line = cli.refused("train", config, *fields, "net.vocab_size=4", "--run", tmp_path / "third")
    assert "set net.vocab_size=8" in line and not (tmp_path / "third/config.json").exists()
    # other codes are refused wherever they are named
    cli("train", config, "stages.0.seed=5", "steps=1", "--run", tmp_path / "other")
    other = tmp_path / "other/codes"
    assert "is not the tokenizer whose codes" in cli.refused(
        "train", config, f"data.path={other}", fields[1], "--run", tmp_path / "fourth"
    )
    assert "holds codes of another tokenizer" in cli.refused(
        "eval", "--run", run, f"data.path={other}"
    )
    assert "is not the tokenizer whose codes" in cli.refused(
        "sample", "--run", run, f"data.tokenizer={tmp_path / 'other/stages/0'}"
    )


# ---------------------------------------------------------------- processes


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_make_the_pipeline_of_one(config, trained, tmp_path):
    from tests.test_multiprocess import run_two

    two, one = tmp_path / "two", trained[0]
    outputs = run_two("train", config, "--run", two)
    assert "4 cpu device(s)" in outputs[0] and "images: " in outputs[0]
    assert "step 4/4" not in outputs[1] and "encoding" not in outputs[1]
    for part in ("stages/0", ""):
        a, b = read_lines(two / part), read_lines(one / part)
        assert [line.keys() for line in a] == [line.keys() for line in b]
        for x, y in zip(a, b):
            assert x == pytest.approx(y, rel=1e-3, abs=1e-6)
    assert len(list((two / "samples").glob("*.png"))) == 1
    codes = lambda f: {p.name: np.load(p) for p in sorted((f / "codes").glob("*.codes.npy"))}
    a, b = codes(two), codes(one)
    assert a.keys() == b.keys() and {"train-00000.codes.npy", "validation-00000.codes.npy"} == {*a}
    assert all(np.mean(a[name] == b[name]) > 0.95 for name in a)
