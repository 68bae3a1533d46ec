"""Metric lines are exact and survive crashes; progress and curves show what they should."""

import io
import json
import math
import struct
import sys

import numpy as np
import pytest

from lintime.train import track
from lintime.train.errors import UserError
from lintime.train.track import Tracker, plot_curves, read_metrics, truncate_metrics

pytestmark = pytest.mark.host


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def fill(run_dir, *, steps=40, tokens=False, bits=True):
    tracker = Tracker(run_dir, total_steps=steps, stream=io.StringIO())
    for step in range(1, steps + 1):
        loss = 2.0 + 3.0 / step
        line = {"loss": loss}
        line |= {"bits_per_byte": loss / math.log(2)} if bits else {}
        line |= {"tokens": step * 1000} if tokens else {}
        tracker.log(step, line)
        if step % 10 == 0:
            tracker.log(step, {f"val_{k}": v + 0.1 for k, v in line.items() if k != "tokens"})
    tracker.close()


# ---------------------------------------------------------------- lines


def test_floats_read_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    singles = rng.integers(0, 2**32, 500, dtype=np.uint32).view(np.float32)
    doubles = rng.integers(0, 2**63, 500).view(np.float64)
    tracker = Tracker(tmp_path, total_steps=1, stream=io.StringIO())
    tracker.log(1, {f"s{i}": v for i, v in enumerate(singles)})
    tracker.log(2, {f"d{i}": v for i, v in enumerate(doubles)})
    tracker.close()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    for i, value in enumerate(singles):
        if not np.isnan(value):
            assert np.float32(first[f"s{i}"]).tobytes() == value.tobytes()
    for i, value in enumerate(doubles):
        if not np.isnan(value):
            assert struct.pack("d", second[f"d{i}"]) == value.tobytes()


def test_lines_are_strict_json_with_the_step_first(tmp_path):
    import jax.numpy as jnp

    tracker = Tracker(tmp_path, total_steps=9, stream=io.StringIO())
    tracker.log(
        np.int64(3),
        {"loss": np.float32("nan"), "a": math.inf, "b": -math.inf, "c": jnp.bfloat16(1.5),
         "d": jnp.float32(0.1), "n": np.int32(7), "flag": True, "text": "x", "none": None,
         "step": 99},
    )  # fmt: skip
    text = (tmp_path / "metrics.jsonl").read_text()  # flushed: readable before close
    tracker.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    record = json.loads(text, parse_constant=refuse)
    assert list(record)[0] == "step" and text.endswith("}\n")
    assert record == {
        "step": 3, "loss": "nan", "a": "inf", "b": "-inf", "c": 1.5,
        "d": float(np.float32(0.1)), "n": 7, "flag": True, "text": "x", "none": None,
    }  # fmt: skip
    (back,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(back["loss"]) and back["a"] == math.inf and back["b"] == -math.inf


def test_lines_are_appended_and_a_torn_line_is_mended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    tracker = Tracker(tmp_path, total_steps=3, resume_step=1, stream=io.StringIO())
    tracker.log(2, {"loss": 1.0})
    tracker.close()
    tracker.close()
    assert lines_of(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_truncate(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 5)
    assert not path.exists()
    good = "".join(f'{{"step": {s}, "loss": 0.1}}\n' for s in range(1, 5))
    path.write_text(good + '{"step": 5, "loss"')
    truncate_metrics(path, 3)
    assert [r["step"] for r in lines_of(path)] == [1, 2, 3]
    assert path.read_text() == good[: len(path.read_text())]  # kept lines are not rewritten
    before = path.stat()
    truncate_metrics(path, 3)
    assert path.stat().st_ino == before.st_ino  # nothing to drop: the file is left alone
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_only_the_primary_process_writes(tmp_path):
    stream = Terminal()
    tracker = Tracker(tmp_path / "r", total_steps=3, primary=False, wandb="x", stream=stream)
    tracker.log(1, {"loss": 1.0})
    tracker.progress(1, {"loss": 1.0})
    tracker.message("hello")
    tracker.close()
    assert list(tmp_path.iterdir()) == [] and stream.getvalue() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_full_disk_is_one_clear_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    tracker = Tracker(tmp_path, total_steps=3, stream=io.StringIO())
    with pytest.raises(UserError) as caught:
        tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert str(caught.value) == (
        f"no space left on device while writing {tmp_path / 'metrics.jsonl'}; nothing already "
        "saved was lost; free space and run the same command again"
    )


def test_an_unwritable_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl"):
        Tracker(tmp_path / "file" / "run", total_steps=1, stream=io.StringIO())


# ---------------------------------------------------------------- other trackers


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboardX")
    tracker = Tracker(tmp_path, total_steps=2, tensorboard=True, stream=io.StringIO())
    tracker.log(1, {"loss": 1.5, "bad": math.nan, "text": "x"})
    tracker.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_wandb_page_is_continued(tmp_path, monkeypatch):
    import types

    calls, logged = [], []
    page = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: None
    )
    fake = types.SimpleNamespace(init=lambda **kw: calls.append(kw) or page)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        tracker = Tracker(tmp_path / "r", total_steps=2, wandb="project", stream=io.StringIO())
        tracker.log(step, {"loss": 0.5})
        tracker.close()
    assert calls[0] == calls[1] and calls[0]["project"] == "project" and calls[0]["name"] == "r"
    assert logged == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]


@pytest.mark.parametrize(
    "options, module", [({"tensorboard": True}, "tensorboardX"), ({"wandb": "p"}, "wandb")]
)
def test_missing_trackers_name_the_extra(tmp_path, monkeypatch, options, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install lintime\[track\]"):
        Tracker(tmp_path, total_steps=1, **options)


# ---------------------------------------------------------------- progress


def test_plain_lines(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(track.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    tracker = Tracker(tmp_path, total_steps=100, stream=stream)
    for step in range(1, 51):
        now[0] += 1.0
        tracker.progress(step, {"loss": 1.25, "bits_per_byte": 1.8, "tokens_per_s": 12345.0})
    shown = stream.getvalue().splitlines()
    assert [line.split()[1] for line in shown] == [f"{s}/100" for s in (1, 11, 21, 31, 41)]
    assert shown[-1] == ("step 41/100 | loss 1.25 | bits per byte 1.8 | 12.3k tokens/s | ETA 00:59")
    tracker.log(50, {"loss": 1.0})  # a log point is always shown, once
    tracker.progress(50, {"loss": 1.0})
    tracker.log(50, {"val_loss": 2.0, "val_bits_per_byte": 2.9})
    tracker.log(50, {"gzip_bits_per_byte": 2.9})
    tracker.message("done")
    tracker.close()
    assert stream.getvalue().splitlines()[len(shown) :] == [
        "step 50/100 | loss 1 | ETA 00:50",
        "step 50/100 | validation | loss 2 | bits per byte 2.9",
        "done",
    ]


def test_bar_on_a_terminal(tmp_path):
    stream = Terminal()
    tracker = Tracker(tmp_path, total_steps=3, resume_step=1, stream=stream)
    for step in (2, 3):
        tracker.progress(step, {"loss": 1.25, "bits_per_byte": 1.8, "tokens_per_s": 2.0e6})
        tracker.log(step, {"loss": 1.25})
    tracker.message("between")
    tracker.close()
    text = stream.getvalue()
    assert "1/3" in text and "\r3/3" in text and "between\n" in text
    assert "loss 1.25 | bits per byte 1.8 | 2M tokens/s | ETA 00:00" in text
    assert "step 3/3" not in text  # the bar shows the training lines


# ---------------------------------------------------------------- curves


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("bits", [False, True])
def test_curves(tmp_path, monkeypatch, tokens, bits):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **kw: figures.append(self) or save(self, *a, **kw)
    )
    fill(tmp_path / "my-run", tokens=tokens, bits=bits)
    with open(tmp_path / "my-run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "gzip_bits_per_byte": 2.5}\n{"step": 41, "lo')
    path = plot_curves(tmp_path / "my-run")
    assert path == tmp_path / "my-run" / "plots" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG") and len(list(path.parent.iterdir())) == 1
    (axes,) = figures[0].axes
    assert axes.get_title() == "my-run"
    assert axes.get_ylabel() == ("bits per byte" if bits else "loss")
    assert axes.get_xlabel() == ("training tokens" if tokens else "step")
    curves = {line.get_label(): line for line in axes.get_lines()}
    factor = 1000 if tokens else 1
    scale = 1 / math.log(2) if bits else 1
    assert np.allclose(curves["training"].get_xdata(), factor * np.arange(1, 41))
    assert np.allclose(curves["training"].get_ydata(), scale * (2 + 3 / np.arange(1, 41)))
    (validation,) = [line for label, line in curves.items() if label.startswith("validation")]
    assert np.allclose(validation.get_xdata(), factor * np.array([10, 20, 30, 40]))
    assert ("gzip -9 (2.500)" in curves) == bits


def test_curves_of_a_diverged_run_and_of_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no loss yet"):
        plot_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": "nan"}\n{"step": 3, "loss": "nan"}\n'
    )
    assert plot_curves(tmp_path).is_file()


def test_smoothing_neither_lags_nor_spreads_nan():
    ramp = np.arange(200.0)
    assert np.allclose(track._smooth(ramp)[50:150], ramp[50:150], atol=0.2)
    noisy = np.random.default_rng(0).normal(size=400)
    assert track._smooth(noisy).std() < 0.5 * noisy.std()
    ramp[10] = math.nan
    assert np.isfinite(track._smooth(ramp)).all()
