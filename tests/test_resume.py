"""Interrupted runs: continued bit for bit, refused in one line after a change, never lost."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lintime.train import cli, loop
from lintime.train.checkpoint import Checkpoints
from lintime.train.errors import UserError
from lintime.train.schema import Checkpoint
from lintime.train.state import TrainState
from tests.tiny import (
    abstract_state,
    assert_same,
    command,
    quick,
    read_lines,
    saved_state,
    tiny_run,
    train_lines,
    values,
    write_config,
    write_text,
)

ONE = {"devices": jax.devices()[:1]}
BASE = (
    "steps=7", "log.every=2", "checkpoint.every=3", "checkpoint.keep=9", "eval.every=5",
    "ema.decay=0.9", "net.dropout_res=0.1", "net.dropout_layer=0.3", "data.update_len=8",
    "optim.accumulate=2",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """An uninterrupted run; four updates to a sequence, saved at 3, 6 and 7: run, folder, lines."""
    run, folder = tiny_run(text, *BASE), tmp_path_factory.mktemp("whole")
    return run, folder, train_lines(run, folder, **ONE)


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole[1], tmp_path / "copy")


def stopped_after(updates, monkeypatch, number=signal.SIGTERM):
    """Let the process receive a signal once this many batches were handed out."""
    original = loop.put_batch

    def put_batch(batch, step, *rest):
        if step == updates - 1:
            os.kill(os.getpid(), number)
        return original(batch, step, *rest)

    monkeypatch.setattr(loop, "put_batch", put_batch)


@pytest.mark.parametrize("at, number", [(2, signal.SIGTERM), (5, signal.SIGINT)])
def test_a_stopped_run_continues_bit_for_bit(at, number, whole, tmp_path, monkeypatch):
    run, folder, lines = whole
    with monkeypatch.context() as patch:
        stopped_after(at, patch, number)
        result = loop.train(run, tmp_path, **ONE)
    assert (result.stopped, result.step) == (number.name, at)
    assert Checkpoints(tmp_path).latest_step() == at
    assert train_lines(run, tmp_path, **ONE) == lines
    assert_same(saved_state(run, tmp_path), saved_state(run, folder))


def test_a_run_goes_on_from_its_newest_checkpoint(whole, copy):
    """As after kill -9: newer metric lines and a half-written line and save are left behind."""
    run, folder, lines = whole
    for step in (6, 7):
        shutil.rmtree(copy / "checkpoints" / str(step))
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "los')
    leftover = copy / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(copy / "checkpoints" / "3", leftover)
    assert Checkpoints(copy).latest_step() == 3
    assert train_lines(run, copy, **ONE) == lines
    assert_same(saved_state(run, copy), saved_state(run, folder))
    assert not leftover.exists()


def test_a_finished_run_stays_and_can_be_lengthened(whole, copy):
    run, _, lines = whole
    assert train_lines(run, copy, **ONE)[: len(lines)] == lines
    longer = dataclasses.replace(run, steps=8)
    assert loop.train(longer, copy, **ONE).step == 8
    assert values(read_lines(copy), "step")[-1] == 8


@pytest.mark.parametrize("part", ["params", "opt", "meta"])
def test_a_damaged_checkpoint_names_its_folder(part, whole, copy):
    run, folder, lines = whole
    newest = copy / "checkpoints" / "7"
    for path in (newest / part).rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"checkpoints/7 is truncated or damaged; remove") as caught:
        loop.train(run, copy, **ONE)
    assert "\n" not in str(caught.value)
    assert read_lines(copy) == lines  # nothing was touched
    shutil.rmtree(newest)
    assert train_lines(run, copy, **ONE) == lines
    assert_same(saved_state(run, copy), saved_state(run, folder))


def test_a_changed_config_or_text_is_refused(whole, copy, tmp_path):
    run, _, lines = whole
    for override in ("optim.learning_rate=0.5", "net.n_code=16", "batch_size=4"):
        other = tiny_run(run.data.path, *BASE, override)
        with pytest.raises(UserError, match=override.split("=")[0]) as caught:
            loop.train(other, copy, **ONE)
        assert "\n" not in str(caught.value)
    with open(run.data.path) as file:
        before = file.read()
    try:
        with open(run.data.path, "w") as file:
            file.write(before.replace("fox", "cat"))
        with pytest.raises(
            UserError, match="train data is not what this run was trained on.*conte"
        ):
            loop.train(run, copy, **ONE)
    finally:
        with open(run.data.path, "w") as file:
            file.write(before)
    assert read_lines(copy) == lines


def test_a_checkpoint_of_another_model_is_refused_by_parameter(whole):
    run, folder, _ = whole
    other = tiny_run(run.data.path, *BASE, "net.d_v=24")
    with pytest.raises(
        UserError, match=r"another model: params/layers/attn1/\w+/kernel is float32"
    ):
        Checkpoints(folder).restore(abstract_state(other), 7)


def small_state(step):
    ones = {"w": jax.numpy.ones(3)}
    return TrainState(np.int32(step), ones, {}, {}, {}, {})


@pytest.mark.parametrize("reopen", [False, True])
def test_the_latest_and_the_best_are_kept(tmp_path, reopen):
    config = Checkpoint(keep=1, keep_best=1)
    checkpoints = Checkpoints(tmp_path, config)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.5)):
        checkpoints.save(small_state(step), {}, loss)
        if reopen:
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, config)
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "5"]
    reader = Checkpoints(tmp_path)
    assert (reader.latest_step(), reader.best_step()) == (5, 2)


@pytest.mark.parametrize("message", ["No space left on device", "Permission denied"])
def test_a_failing_save_is_one_line(tmp_path, monkeypatch, message, whole, capsys):
    run = dataclasses.replace(whole[0], steps=3)

    def save(self, *args, **kwargs):
        raise OSError(28 if "space" in message else 13, message)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    expected = "no space left on device" if "space" in message else "cannot write"
    with pytest.raises(UserError, match=expected) as caught:
        loop.train(run, tmp_path, **ONE)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_folders_of_fresh_runs_are_numbered(tmp_path):
    assert cli._next_free(tmp_path / "a").name == "a"
    for name in ("a", "a-2"):
        (tmp_path / name).mkdir()
    assert cli._next_free(tmp_path / "a").name == "a-3"


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finish(process):
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    """A run of the command that nothing stops: run, arguments, folder, compiled programs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = tiny_run(text, *BASE, "steps=400", "checkpoint.every=30", "checkpoint.keep=2")
    arguments = ("train", write_config(run, folder), "--run")
    cache = folder / "compiled"
    finish(command(*arguments, folder / "whole", cache=cache))
    return run, arguments, folder / "whole", cache


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_same_command_continues_a_killed_process(number, uninterrupted, tmp_path):
    run, arguments, whole, cache = uninterrupted
    first = command(*arguments, tmp_path / "killed", cache=cache)
    drain = threading.Thread(target=first.stdout.read, daemon=True)
    drain.start()
    checkpoints = tmp_path / "killed" / "checkpoints"

    def saved():
        """Steps with a committed checkpoint: saving is asynchronous, metrics do not tell."""
        names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
        return [int(name) for name in names if name.isdigit()]

    wait_for(saved, first)
    first.send_signal(number)
    drain.join()
    assert first.wait() == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    assert saved() and max(saved()) < 400
    # once with the same compiled program, once with its own
    cache = cache if number == signal.SIGTERM else None
    output = finish(command(*arguments, tmp_path / "killed", cache=cache))
    assert "continuing at step" in output
    assert read_lines(tmp_path / "killed") == read_lines(whole)
    assert_same(saved_state(run, tmp_path / "killed"), saved_state(run, whole))
    meta = json.loads((tmp_path / "killed/checkpoints/400/meta/metadata").read_text())
    assert meta["step"] == 400
