"""How `lintime bench aim` shows its numbers: markdown tables and a picture."""

from __future__ import annotations

import io
import statistics
from typing import Any

from .report import table

TRAINING = "training"  # the part that is not sampling


def row(report: dict[str, Any], point: dict[str, Any]) -> list[str]:
    """Cells of one measurement, generation or training."""
    if point["status"] != "ok":
        message = point.get("message", "")
        return [point["size"], point["part"], f"{point['status']} {message}".strip()]
    seconds = statistics.median(point["seconds"])
    gib = point["peak_bytes"] and f"{point['peak_bytes'] / 2**30:.1f}"
    head = [point["size"], point["part"], f"{point['batch'] / seconds:.1f}"]
    if point["part"] == TRAINING:
        rate = point["model_flops"] / seconds / 1e12
        used = "-" if point["mfu"] is None else f"{100 * point['mfu']:.1f}%"
        return [*head, f"{1e3 * seconds:.1f}", f"{rate:.0f}", used, gib or "-"]
    per_step = 1e3 * seconds / point["tokens"]
    bound = [f"{seconds / point[k]:.2f}" if k in point else "-"
        for k in ("recurrent_floor", "floor")]  # fmt: skip
    floor = f"{point['floor']:.3f}" if "floor" in point else "-"
    moved = f"{point['bytes'] / 1e9:.2f}"
    return [*head, f"{seconds:.3f}", f"{per_step:.2f}", moved, floor, *bound, gib or "-"]


def markdown(report: dict[str, Any]) -> str:
    """Device, command, a table of sampling, a table of training, and the checks."""
    device = report["device"]
    head = f"{device['kind']}, jax {device['jax']}, Python {report['python']}, {report['date']}"
    peak, copy = (f"{v / 1e12:.2f}" if v else "?" for v in (report["bandwidth"], report["copy"]))
    sampling = [p for p in report["points"] if p["part"] != TRAINING]
    training = [p for p in report["points"] if p["part"] == TRAINING]
    texts = [f"{head}: `{report['command']}`"]
    if sampling:
        header = ["size", "form", "images/s", "s", "ms/step", "GB/step", "floor s",
            "x recurrent floor", "x own floor", "GiB"]  # fmt: skip
        rows = [row(report, p) for p in sampling]
        rows = [r + ["-"] * (len(header) - len(r)) for r in rows]
        texts += [
            f"Sampling {report['batch']} images at a time with guidance (twice the rows), "
            f"{report['dtype']}; median. Floor: weights read once and caches moved, counted, at "
            f"{peak} TB/s (peak; a copy measured here: {copy} TB/s, used where the peak is "
            "unknown); the recurrent floor is that of Mamba-2 with bfloat16 states.",
            table(header, rows),
        ]
    if training:
        header = ["size", "", "images/s", "ms/step", "TFLOP/s", "MFU", "GiB"]
        rows = [row(report, p) for p in training]
        rows = [r + ["-"] * (len(header) - len(r)) for r in rows]
        texts += [
            f"Training, {report['batch']} images a step, compute in {report['dtype']}, parameters "
            "float32, AdamW. TFLOP/s and MFU: 3 x forward matmul FLOPs, nothing recomputed.",
            table(header, rows),
        ]
    errors = [
        [name, f"{r['error']:.1e}" if "error" in r else r.get("message", r["status"]),
         "yes" if r["ok"] else "NO"] for name, r in report["checks"].items()
    ]  # fmt: skip
    if errors:
        texts += ["Guided logits of a small net against teacher forcing, relative L2:"]
        texts += [table(["form", "error", "within bounds"], errors)]
    return "\n\n".join(texts)


def picture(report: dict[str, Any]) -> bytes:
    """PNG: seconds of a batch of images by form, own floors marked; training images/s in the title
    of a second panel.
    """
    from matplotlib.figure import Figure

    done = [p for p in report["points"] if p["status"] == "ok"]
    panels = [
        ("s per batch of images", [p for p in done if p["part"] != TRAINING]),
        ("ms per training step", [p for p in done if p["part"] == TRAINING]),
    ]
    panels = [panel for panel in panels if panel[1]]
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(done)), layout="constrained")
    ratios = [len(points) for _, points in panels]
    grid = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": ratios})
    for axes, (label, points) in zip(grid[:, 0], panels):
        scale = 1e3 if points[0]["part"] == TRAINING else 1.0
        at, names = range(len(points)), [f"{p['size']} {p['part']}" for p in points]
        axes.barh(at, [scale * statistics.median(p["seconds"]) for p in points], label="measured")
        floor = [(i, p["floor"]) for i, p in enumerate(points) if "floor" in p]
        if floor:
            axes.barh(*zip(*floor), height=0.3, label="own floor")
            axes.legend()
        axes.set_yticks(at, names)
        axes.invert_yaxis()
        axes.set_xlabel(f"{label}, batch {report['batch']}, {report['device']['kind']}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
