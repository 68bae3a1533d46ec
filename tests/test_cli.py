"""The command line as its users meet it: what it prints, exit status, one line per mistake."""

import errno
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import lintime
from lintime.train.cli import main
from lintime.train.errors import UserError
from lintime.train.launch import program

pytestmark = pytest.mark.host

CONFIG = "transformer_vq/quickstart"
COMMANDS = ("train", "eval", "sample", "bench", "convert")
NET = (
    "net.d_model=32 net.n_layer=1 net.d_k=16 net.d_v=32 net.n_code=8 net.block_len=16 "
    "net.mem_len=16 data.sequence_len=64 data.update_len=32"
).split()
ROWS = f"batch_size={jax.device_count()}"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text("".join(f"line {i} of a text about little, {i * i}.\n" for i in range(2000)))
    return path


@pytest.fixture(scope="module")
def words(text) -> list[str]:
    """A minuscule experiment; a space in one value."""
    few = "steps=4 eval.batches=1 checkpoint.every=2 sample.length=20 log.every=1".split()
    return [CONFIG, *NET, ROWS, *few, f"data.path={text}", "sample.prompt=To be"]


@pytest.fixture(scope="module")
def trained(words, tmp_path_factory) -> tuple[Path, str]:
    """A run made by `lintime train`, and what that printed. Never changed: see `run`."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    out = io.StringIO()
    stdout, sys.stdout = sys.stdout, out
    try:
        assert main(["train", *words, "--run", str(directory)]) == 0
    finally:
        sys.stdout = stdout
    return directory, out.getvalue()


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained run, to do harm to."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


@pytest.fixture
def cli(capfd, monkeypatch):
    """cli(*words, stdin=None) -> (exit status, stdout, stderr)."""

    def call(*arguments, stdin: str | None = None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as leave:  # argparse
            status = leave.code
        out, err = capfd.readouterr()
        return status, out, err

    return call


@pytest.fixture
def refused(cli):
    """refused(*words) -> the one line; checks that it is one, and the exit status."""

    def call(*arguments, **options) -> str:
        status, _, err = cli(*arguments, **options)
        assert status == 2
        assert err.startswith("lintime: ") and err.count("\n") == 1, err
        return err

    return call


def contents(directory: Path) -> dict[str, bytes]:
    """Everything saved: checkpoints, metrics and config."""
    files = [directory / "metrics.jsonl", directory / "config.json"]
    files += (p for p in (directory / "checkpoints").rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def truncate(folder: Path) -> None:
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_describes_itself_with_an_example(cli, command):
    status, out, err = cli(command, "--help")
    assert status == 0 and not err
    assert f"usage: lintime {command}" in out and f"  lintime {command}" in out.replace(
        "xample: ", "  "
    ).replace("split: ", "  ")
    assert "--debug" in out


def test_main_help_and_version(cli):
    status, out, _ = cli("--help")
    assert status == 0 and all(f"\n    {c} " in out for c in COMMANDS) and "examples:" in out
    assert cli("--version")[1] == f"lintime {lintime.__version__}\n"


def test_train_list_and_fields(cli):
    status, out, _ = cli("train", "--list")
    assert status == 0 and CONFIG in out and "transformer_vq/enwik8" in out
    status, out, _ = cli("train", CONFIG, "steps=7", "--help-fields")
    assert status == 0
    fields = {line.split()[0]: line.split(maxsplit=2)[1:] for line in out.splitlines()}
    assert fields["steps"] == ["int", "7"]
    assert fields["optim.learning_rate"][0] == "float"


def test_as_a_process():
    """The installed command's own way in, its exit status, and nothing but one line on stderr."""
    start = "import sys; from lintime.train.cli import main; sys.exit(main())"
    call = lambda *words: subprocess.run(
        [sys.executable, "-c", start, *words], capture_output=True, text=True, timeout=120
    )
    good, bad = call("train", "--list"), call("train", CONFIG, "step=3")
    assert (good.returncode, good.stderr) == (0, "") and CONFIG in good.stdout
    assert bad.returncode == 2
    assert bad.stderr == "lintime: unknown field 'step'; did you mean steps?\n"


def test_train_leaves_a_complete_run_and_says_what_next(trained):
    directory, out = trained
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert "val_bits_per_byte" in lines[-1]
    assert (directory / "plots/loss.png").stat().st_size and list(directory.glob("samples/*.txt"))
    for text in ("bits per byte", "gzip -9", "To be", "train longer", "resume"):
        assert text in out


def test_printed_commands_can_be_pasted_into_a_shell(trained, words):
    directory, out = trained
    start = program()  # "lintime", or "uv run lintime"
    command = lambda name: shlex.split(
        next(line for line in out.splitlines() if line.startswith(f"  {name} "))[len(name) + 2 :],
        comments=False,
    )
    resume = command("resume")
    assert resume[: len(words) + 4 + len(start) - 1] == [
        *start, "train", *words, "--run", str(directory),
    ]  # fmt: skip
    longer = command("train longer")
    assert (
        "steps=8" in longer and "steps=4" not in longer and longer[-2:] == ["--run", str(directory)]
    )
    mine = command("your own text")
    assert "sample.prompt=To be" in mine and mine[-3:] == ["data.path=my.txt", "--run", "runs/mine"]
    assert command("sample")[: 3 + len(start)] == [*start, "sample", "--run", str(directory)]


def test_same_command_on_a_finished_run_changes_nothing_saved(cli, run, words):
    before = contents(run)
    status, out, _ = cli("train", words[0], "--run", run, *words[1:])  # fields after the option
    assert status == 0 and "continuing at step 4" in out
    after = contents(run)
    assert {k: v for k, v in after.items() if k.startswith("checkpoints")} == {
        k: v for k, v in before.items() if k.startswith("checkpoints")
    }


@pytest.mark.slow
def test_fresh_starts_a_numbered_run_and_names_it(cli, run, words):
    before = contents(run)
    status, out, _ = cli("train", *words, "steps=1", "--fresh", "--run", run)
    assert status == 0 and (run.parent / "run-2/config.json").is_file()
    assert f"--run {run}-2   (after" in out
    assert contents(run) == before


def test_eval(cli, run):
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    status, out, _ = cli("eval", "--run", run)
    printed = dict(line.split()[:2] for line in out.splitlines()[1:])
    assert status == 0
    assert float(printed["bits_per_byte"]) == pytest.approx(last["val_bits_per_byte"], rel=1e-4)
    status, out, _ = cli("eval", "eval.batches=2", "--run", run, "--split", "test", "--step", "2")
    assert status == 0 and "on test of" in out and f"{2 * 64 * jax.device_count()}" in out


def test_sample_prompts_and_seeds(cli, run):
    sample = lambda *a, **k: cli("sample", "--run", run, *a, **k)
    status, first, _ = sample("--seed", "1")
    assert status == 0 and first.startswith("To be")  # the run's own prompt
    assert sample("--seed", "1")[1] == first != sample("--seed", "2")[1]
    greedy = sample("sample.temperature=0", "--prompt", "a = b", "--seed", "1")[1]
    assert greedy.startswith("a = b")
    assert (
        sample("sample.temperature=0", "--prompt", "-", "--seed", "2", stdin="a = b")[1] == greedy
    )


@pytest.mark.slow
def test_sample_rows_and_stop(cli, run):
    one = cli("sample", "sample.length=12", "--run", run, "sample.temperature=0", "--prompt", "x")[
        1
    ]
    status, rows, _ = cli(
        "sample", "--run", run, "sample.rows=2", "sample.temperature=0", "sample.length=12",
        "--prompt", "x",
    )  # fmt: skip
    assert status == 0 and rows == f"--- 1 of 2\n{one}--- 2 of 2\n{one}"
    assert len(list((run / "samples").glob("step00000004-seed0-*.txt"))) == 2
    text = one[1:-1]
    stop = next(c for c in text if c.isascii() and c.isprintable())
    status, cut, _ = cli(
        "sample", "--run", run, "sample.temperature=0", "sample.length=12", "--prompt", "x",
        f"sample.stop={stop}",
    )  # fmt: skip
    assert status == 0 and cut[1:-1] == text[: text.index(stop)]


def test_convert_out_and_in(cli, run, text, tmp_path):
    assert cli("convert", "--run", run, "--to", "npz", "--out", tmp_path / "x.npz")[0] == 0
    status, out, _ = cli(
        "convert", "--from", tmp_path / "x.npz", "--config", tmp_path / "x.json", "--out",
        tmp_path / "back", f"data.path={text}",
    )  # fmt: skip
    assert status == 0 and "lintime eval" in out
    options = ("eval.batches=1", ROWS)
    figures = [
        cli("eval", "--run", d, *options)[1].splitlines()[1:3] for d in (run, tmp_path / "back")
    ]
    assert figures[0] == figures[1] and "bits_per_byte" in figures[0][1]


@pytest.mark.slow
def test_bench_prints_a_table(cli, tmp_path):
    status, out, _ = cli(
        "bench", "--lengths", "32", "--variants", "vq-serial", "--tokens", "32", "--steps", "1",
        "--warmup", "1", "--out", tmp_path, "--set", "net.d_model=32", "net.n_layer=1",
        "net.d_k=16", "net.n_code=8", "net.block_len=8", "net.mem_len=8",
    )  # fmt: skip
    assert status == 0 and "vq-serial" in out and (tmp_path / "bench.png").is_file()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((), "required: command"),
        (("trian",), "invalid choice: 'trian'"),
        (("train",), "name a config"),
        (("train", "steps=3"), "name a config before steps=3"),
        (("train", CONFIG, "--runs"), "unknown argument --runs; see `lintime train --help`"),
        (("train", CONFIG, "--processes", "two"), "invalid int value: 'two'"),
        (("train", "transformer_vq/quikstart"), "did you mean transformer_vq/quickstart?"),
        (("train", "quickstart"), "did you mean aim/quickstart, dit/quickstart or"),
        (("train", "missing.py"), "missing.py does not exist"),
        (("train", CONFIG, "optim.learning_rat=1"), "did you mean optim.learning_rate?"),
        (("train", CONFIG, "steps=many"), "steps: expected int, got 'many'"),
        (("train", CONFIG, "net.cache=perhaps"), "net.cache: expected bool"),
        (("train", CONFIG, "optim.learning_rate=nan"), "optim.learning_rate: expected float"),
        (("train", CONFIG, "steps"), "has no '='"),
        (("train", CONFIG, "net.head_type=mhaa"), "choose one of shga, mqa, mha"),
        (("train", CONFIG, "batch_size=0"), "batch_size=0 is out of range"),
        (("train", CONFIG, "data.update_len=100"), "not divisible by data.update_len=100"),
        (("train", CONFIG, "--profile", "9"), "--profile 9: give two updates"),
        (("sample",), "required: --run; see `lintime sample --help`"),
        (("sample", "--run", "nowhere"), "nowhere"),
        (("eval", "--run", "nowhere", "--split", "train"), "invalid choice: 'train'"),
        (("eval", "--run", "nowhere"), "nowhere"),
        (("convert", "--from", "none.npz", "--out", "x"), "none.npz does not exist"),
        (("bench", "--stray"), "unknown argument --stray; see `lintime bench --help`"),
        (("bench", "stray"), "invalid choice: 'stray' (choose from"),
    ],
)  # fmt: skip
def test_mistakes_in_the_words(refused, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(*arguments)
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize(
    "source, says",
    [
        ("config = Run(\n", "mine.py, line 1: SyntaxError"),
        ("import nothing_of_that_name\n", "mine.py, line 1: ModuleNotFoundError"),
        ("\nx = 1 / 0\n", "mine.py, line 2: ZeroDivisionError"),
        ("config = 3\n", "must define `config = Run(...)`"),
    ],
)
def test_mistakes_in_a_config_file(refused, tmp_path, monkeypatch, source, says):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(source)
    assert says in refused("train", "mine.py")


def test_settings_a_command_would_ignore_are_refused(refused, run):
    assert "net.d_model is part of the trained run" in refused(
        "eval", "--run", run, "net.d_model=64"
    )
    assert "steps is part of the trained run" in refused("sample", "--run", run, "steps=3")
    assert "sample.temperature=-1.0 is out of range" in refused(
        "sample", "--run", run, "sample.temperature=-1"
    )
    assert "no checkpoint of step 3; it has 2, 4" in refused("sample", "--run", run, "--step", "3")


def test_directory_that_is_no_run(refused, tmp_path):
    for command in ("eval", "sample"):
        assert "config.json" in refused(command, "--run", tmp_path)
    (tmp_path / "config.json").write_text('{"net": ')
    for command in ("eval", "sample"):
        assert "config.json is damaged" in refused(command, "--run", tmp_path)


def test_data_that_is_missing_empty_or_short(refused, words, tmp_path):
    refuse = lambda path: refused("train", *words, f"data.path={path}", "--run", tmp_path / "run")
    assert "does not exist" in refuse(tmp_path / "none.txt")
    (tmp_path / "empty.txt").touch()
    assert "is empty (0 bytes)" in refuse(tmp_path / "empty.txt")
    (tmp_path / "short.txt").write_text("abc")
    assert "less than one sequence (data.sequence_len=64)" in refuse(tmp_path / "short.txt")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(jax.device_count() < 2, reason="one device divides every batch")
def test_batch_and_mesh_that_do_not_divide(refused, words, tmp_path):
    n = jax.device_count()
    refuse = lambda field: refused("train", *words, field, "--run", tmp_path / "run")
    assert f"batch_size={n + 1} is not divisible by {n}" in refuse(f"batch_size={n + 1}")
    assert f"does not divide the {n} devices" in refuse(f"mesh.fsdp={n + 1}")
    assert f"needs {2 * n} devices, there are {n}" in refuse(f"mesh.data={2 * n}")
    assert not (tmp_path / "run").exists()


def test_changed_field_of_a_run_is_refused_by_name(refused, words, run):
    before = contents(run)
    line = refused("train", *words, "net.d_model=64", "--run", run)
    assert "net.d_model (32 -> 64)" in line and "--fresh" in line
    assert contents(run) == before


def test_changed_data_of_a_run_is_refused(refused, words, run, tmp_path):
    before = contents(run)
    saved = json.loads((run / "config.json").read_text())
    other = tmp_path / "small.txt"
    other.write_text("something else entirely\n" * 3000)
    saved["data"]["path"] = str(other)
    (run / "config.json").write_text(json.dumps(saved))
    line = refused("train", *words, f"data.path={other}", "steps=6", "--run", run)
    assert "data is not what this run was trained on" in line
    assert contents(run) | {"config.json": b""} == before | {"config.json": b""}


def test_vocabulary_that_does_not_match(refused, words, run, tmp_path):
    assert "set net.vocab_size=259" in refused(
        "train", *words, "net.vocab_size=300", "--run", tmp_path / "new"
    )
    before = contents(run)
    for command in ("eval", "sample"):
        assert "none.model" in refused(command, "--run", run, "data.vocab=none.model")
    pytest.importorskip("sentencepiece")
    from lintime.train.data.vocab import load_vocab, train_sentencepiece

    model = tmp_path / "pieces.model"
    train_sentencepiece(["some text to learn pieces of, and some more\n"] * 50, 40, model)
    assert load_vocab(str(model)).size == 40
    for command in ("eval", "sample"):
        line = refused(command, "--run", run, f"data.vocab={model}")
        assert "(40 ids) is not the one" in line and "(259 ids)" in line
    assert contents(run) == before


def test_init_from_another_model(refused, words, run, tmp_path):
    before = contents(run)
    line = refused("train", *words, "net.d_model=64", f"init_from={run}", "--run", tmp_path / "new")
    assert "is from another model: params/" in line and "[259, 32] there" in line
    assert "holds no checkpoints" in refused(
        "train", *words, f"init_from={tmp_path / 'none'}", "--run", tmp_path / "new"
    )
    assert contents(run) == before


# ---------------------------------------------------------------- damage, full disks, bugs


@pytest.mark.slow
def test_truncated_checkpoint_is_named_and_the_one_before_still_serves(refused, cli, words, run):
    truncate(run / "checkpoints/4/params")
    before = contents(run)
    for command in (("train", *words, "steps=6"), ("eval",), ("sample",)):
        line = refused(*command, "--run", run)
        assert f"{run}/checkpoints/4 is truncated or damaged; remove that folder" in line
    assert contents(run) == before
    assert cli("sample", "--run", run, "--step", "2")[0] == 0
    shutil.rmtree(run / "checkpoints/4")  # what the line says
    status, out, _ = cli("train", *words, "--run", run)
    assert status == 0 and "continuing at step 2" in out


def test_interrupted_save_is_not_mistaken_for_a_checkpoint(cli, words, run, trained):
    before = contents(run)
    torn = shutil.copytree(run / "checkpoints/4", run / "checkpoints/6.orbax-checkpoint-tmp")
    truncate(torn)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')  # the process died while writing
    status, out, _ = cli("train", *words, "--run", run)
    assert status == 0 and "continuing at step 4" in out
    assert not torn.exists()
    saved = contents(run)
    for name, data in before.items():
        if name.startswith("checkpoints"):
            assert saved[name] == data
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 4


def test_no_space_for_a_checkpoint(refused, words, run, monkeypatch):
    import orbax.checkpoint as ocp

    before = contents(run)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    line = refused("train", *words, "steps=6", "--run", run)
    assert "no space left on device while writing" in line and "/checkpoints/6" in line
    after = contents(run)
    for name, data in before.items():
        if name.startswith("checkpoints"):
            assert after[name] == data
    assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])


def test_error_before_the_first_metric_line_is_the_one_told(refused, words, tmp_path):
    line = refused(
        "train", *words, "log.every=3", "optim.learning_rate=1e38", "optim.warmup=0",
        "optim.clip=0", "--run", tmp_path / "run",
    )  # fmt: skip
    assert "not finite" in line and (tmp_path / "run/failed").is_dir()


def test_no_space_for_small_files(refused, words, run, monkeypatch):
    before = contents(run)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lintime.train.files.os.replace", full)
    line = refused("sample", "--run", run)
    assert "no space left on device while writing" in line and "/samples/" in line
    line = refused("train", *words, "steps=6", "--run", run)
    assert "no space left on device while writing" in line and "config.json" in line
    assert contents(run) == before


def test_full_disk_anywhere_else_is_one_line_too(refused, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "cache/tokens.bin")

    monkeypatch.setattr("lintime.train.config_files.list_configs", full)
    assert "no space left on device while writing cache/tokens.bin" in refused("train", "--list")


def test_debug_shows_the_traceback(cli):
    with pytest.raises(UserError, match="unknown config"):
        cli("train", "nonsense/nonsense", "--debug")


def test_unexpected_errors_keep_their_traceback(cli, monkeypatch):
    def bug(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("lintime.train.config_files.list_configs", bug)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli("train", "--list")


def test_interrupt_is_quiet(cli, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lintime.train.config_files.list_configs", stop)
    assert cli("train", "--list") == (130, "", "lintime: interrupted\n")
