"""Following a run: metrics.jsonl, TensorBoard, Weights & Biases, progress bar, loss curve."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from .errors import UserError
from .files import write_atomic, write_error

PLAIN_SECONDS = 10.0  # between plain progress lines
BAR_SECONDS = 0.1  # between updates of the bar


class Tracker:
    """Records the metrics of a run and shows its progress. Only the primary process does anything.

    Args:
        run_dir: run directory; lines are appended to its metrics.jsonl.
        total_steps: updates of the whole run (for the bar and the ETA).
        tensorboard: also write event files under `run_dir`/tensorboard.
        wandb: Weights & Biases project to log to; "" = none.
        task_metric: the task's own metric to show beside the loss.
        primary: whether this process is the one that writes.
        resume_step: step the run continues from.
        stream: where progress goes: a live bar on a terminal, plain lines elsewhere.

    Raises:
        UserError: a tracker was asked for that is not installed, or the disk is full.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        *,
        total_steps: int,
        tensorboard: bool = False,
        wandb: str = "",
        task_metric: str = "bits_per_byte",
        primary: bool = True,
        resume_step: int = 0,
        stream: TextIO | None = None,
    ):
        self.primary = primary
        if not primary:
            return
        self.path = Path(run_dir) / "metrics.jsonl"
        self.total_steps, self.task_metric = total_steps, task_metric
        self._stream = stream or sys.stdout
        self._times = collections.deque(maxlen=100)  # (step, seconds) of recent updates
        self._last_shown = -math.inf
        self._last_line_step = None
        self._writers = []
        if tensorboard:
            self._writers.append(_tensorboard(self.path.parent, resume_step))
        if wandb:
            self._writers.append(_wandb(self.path.parent, wandb))
        truncate_metrics(self.path, math.inf)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", encoding="utf-8")
        except OSError as error:
            raise write_error(error, self.path) from error
        self._bar = None
        if self._stream.isatty():
            known = _columns(self._stream) > 0  # some terminals report no width
            self._bar = tqdm(
                total=total_steps,
                initial=resume_step,
                file=self._stream,
                ncols=None if known else 80,
                nrows=None if known else 20,
                dynamic_ncols=known,
                bar_format="{n_fmt}/{total_fmt} {bar} {desc}",
            )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line `{"step": step, ...}` to metrics.jsonl, flushed.

        Floats are written so that they read back bit for bit; those that are not finite as the
        strings "nan", "inf", "-inf". Validation figures are printed too, and off a terminal the
        headline figures of a training line.

        Args:
            step: updates done.
            metrics: Python, numpy or JAX scalars, strings or None; a key "step" is ignored.

        Raises:
            UserError: the file cannot be written (disk full); earlier lines are intact.
        """
        if not self.primary:
            return
        record = {"step": int(step)}
        record |= {k: plain(v) for k, v in metrics.items() if k != "step"}
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise write_error(error, self.path) from error
        for write, _ in self._writers:
            write(record)
        if any(key.startswith("val_") for key in record):
            figures = {k.removeprefix("val_"): v for k, v in record.items() if k[:4] == "val_"}
            self.message(f"step {step}/{self.total_steps} | validation | {self._figures(figures)}")
        elif "loss" in record and self._bar is None:
            self._line(step, record)

    def progress(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows how far the run is; call it after every update, with numbers on the host."""
        if not self.primary:
            return
        now = time.monotonic()
        self._times.append((step, now))
        if self._bar is not None:
            if now - self._last_shown >= BAR_SECONDS or step >= self.total_steps:
                self._last_shown = now
                self._bar.n = step
                self._bar.set_description_str(self._status(step, metrics), refresh=True)
        elif now - self._last_shown >= PLAIN_SECONDS or step >= self.total_steps:
            self._line(step, metrics)

    def message(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if not self.primary:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Closes the bar, the file and the other trackers; may be called twice."""
        if not self.primary:
            return
        if self._bar is not None:
            self._bar.close()
        with contextlib.suppress(OSError):  # after a full disk the buffer still holds the line
            self._file.close()
        for _, close in self._writers:
            close()
        self._writers = []

    def _line(self, step: int, metrics: Mapping[str, Any]) -> None:
        if step != self._last_line_step:
            self._last_shown, self._last_line_step = time.monotonic(), step
            self.message(f"step {step}/{self.total_steps} | {self._status(step, metrics)}")

    def _status(self, step: int, metrics: Mapping[str, Any]) -> str:
        eta = _eta(self._times, step, self.total_steps)
        return " | ".join(filter(None, [self._figures(metrics), eta]))

    def _figures(self, metrics: Mapping[str, Any]) -> str:
        parts = []
        for key in dict.fromkeys(("loss", self.task_metric)):
            if metrics.get(key) is not None:
                parts.append(f"{key.replace('_', ' ')} {float(metrics[key]):.4g}")
        for key, value in metrics.items():
            if key.endswith("_per_s") and value is not None:
                parts.append(f"{_short(float(value))} {key.removesuffix('_per_s')}/s")
        return " | ".join(parts)


def plain(value: Any) -> int | float | bool | str | None:
    """A scalar as JSON can hold it: floats exact, those not finite as "nan", "inf" or "-inf"."""
    if value is None or isinstance(value, str):
        return value
    value = np.asarray(value).item() if not isinstance(value, bool | int | float) else value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """Lines of a metrics.jsonl, "nan" and "inf" as floats again; unreadable lines left out."""
    special = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
    lines = []
    for raw in Path(path).read_bytes().splitlines():
        record = _parse(raw)
        if record is not None:
            lines.append(
                {k: special.get(v, v) if isinstance(v, str) else v for k, v in record.items()}
            )
    return lines


def truncate_metrics(path: str | os.PathLike, step: float) -> None:
    """Drops the lines of metrics.jsonl past `step`, and a torn last line, atomically.

    After a crash the run goes on from its last checkpoint; the lines it wrote after that step would
    otherwise appear twice. A missing file is left missing.
    """
    path = Path(path)
    if not path.is_file():
        return
    old = path.read_bytes()
    kept = []
    for raw in old.splitlines():
        record = _parse(raw)
        if record is not None and record["step"] <= step:
            kept.append(raw + b"\n")
    new = b"".join(kept)
    if new != old:
        write_atomic(path, new)


def plot_curves(run_dir: str | os.PathLike) -> Path:
    """Draws the training and validation curves of metrics.jsonl to plots/loss.png.

    The x axis is `tokens` where the lines carry it, else `step`; the y axis is bits per byte, else
    the loss. A line with `gzip_bits_per_byte` adds gzip's figure as a horizontal line.

    Returns:
        Path of the PNG.

    Raises:
        UserError: there is nothing to plot yet, or the disk is full.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    run_dir = Path(run_dir)
    path = run_dir / "metrics.jsonl"
    lines = read_metrics(path) if path.is_file() else []
    bits = any("bits_per_byte" in line or "val_bits_per_byte" in line for line in lines)
    metric, label = ("bits_per_byte", "bits per byte") if bits else ("loss", "loss")
    train = [line for line in lines if metric in line]
    validation = [line for line in lines if f"val_{metric}" in line]
    if not train and not validation:
        raise UserError(f"{path} holds no {metric} yet; train for at least log.every steps first")

    per_step = next((r["tokens"] / r["step"] for r in train if r.get("tokens") and r["step"]), 1)
    with_tokens = any("tokens" in line for line in train)

    def points(records: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
        x = [r.get("tokens", r["step"] * per_step) if with_tokens else r["step"] for r in records]
        return np.asarray(x, float), np.asarray([r[key] for r in records], float)

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        x, y = points(train, metric)
        axes.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1, label="training")
        if len(y) > 2:
            axes.plot(x, _smooth(y), color="tab:blue", linewidth=1.8, label="training, smoothed")
    if validation:
        x, y = points(validation, f"val_{metric}")
        axes.plot(x, y, "o-", color="tab:orange", markersize=4, label=f"validation ({y[-1]:.3f})")
    gzip = [line["gzip_bits_per_byte"] for line in lines if "gzip_bits_per_byte" in line]
    if bits and gzip:
        axes.axhline(
            gzip[-1], color="0.3", linestyle="--", linewidth=1, label=f"gzip -9 ({gzip[-1]:.3f})"
        )
    axes.set_title(run_dir.resolve().name)
    axes.set_xlabel("training tokens" if with_tokens else "step")
    axes.set_ylabel(label)
    if with_tokens:
        axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    target = run_dir / "plots" / "loss.png"
    write_atomic(target, image.getvalue())
    return target


def _parse(raw: bytes) -> dict | None:
    try:
        record = json.loads(raw)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _smooth(values: np.ndarray, span: float = 20.0) -> np.ndarray:
    """Exponential moving average over about `span` points (fewer on short curves), run in both
    directions so that it does not lag; values that are not finite are skipped."""
    if not np.isfinite(values).any():
        return values
    decay = 1 - 2 / (1 + min(span, max(2.0, len(values) / 10)))

    def one_way(sequence):
        total = weight = 0.0
        for value in sequence:
            if math.isfinite(value):
                total, weight = decay * total + (1 - decay) * value, decay * weight + 1 - decay
            yield total / weight if weight else math.nan

    forward, backward = list(one_way(values)), list(one_way(values[::-1]))[::-1]
    return np.nanmean([forward, backward], axis=0)


def _eta(times: Sequence[tuple[int, float]], step: int, total: int) -> str:
    """`ETA m:ss` from the recent updates; "" until two have been timed."""
    if len(times) < 2 or times[-1][0] <= times[0][0]:
        return ""
    seconds = (times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0]) * max(0, total - step)
    return f"ETA {tqdm.format_interval(seconds)}"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


def _short(number: float) -> str:
    """12345 -> 12.3k."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def _tensorboard(run_dir: Path, resume_step: int) -> tuple:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise _missing("log.tensorboard", "tensorboardX") from None
    purge = {"purge_step": resume_step + 1} if resume_step else {}
    writer = SummaryWriter(str(run_dir / "tensorboard"), **purge)

    def write(record: dict) -> None:
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                writer.add_scalar(key, value, record["step"])

    return write, writer.close


def _wandb(run_dir: Path, project: str) -> tuple:
    try:
        import wandb
    except ImportError:
        raise _missing("log.wandb", "wandb") from None
    id_file = run_dir / "wandb_id"  # continuing the run continues its page
    if not id_file.is_file():
        write_atomic(id_file, secrets.token_hex(4))
    page = wandb.init(
        project=project,
        dir=str(run_dir),
        name=run_dir.resolve().name,
        id=id_file.read_text(),
        resume="allow",
    )

    def write(record: dict) -> None:
        page.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    return write, page.finish


def _missing(field: str, package: str) -> UserError:
    return UserError(
        f"{field} needs {package}, which is not installed: pip install lintime[track], "
        f"or leave {field} unset"
    )
