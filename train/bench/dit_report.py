"""How `lintime bench dit` shows its numbers: markdown tables and a picture."""

from __future__ import annotations

import io
import statistics
from typing import Any

from .report import table

HEADERS = {
    "training": ["size", "images/s", "ms/step", "TFLOP/s", "MFU", "GiB"],
    "sampling": ["size", "images/s", "s", "Gmacs", "TFLOP/s", "s at peak", "x peak", "GiB"],
    "flexible": [
        "size", "schedule", "images/s", "s", "Gmacs", "time ratio", "FLOPs ratio", "s at peak",
        "x peak", "GiB",
    ],
}  # fmt: skip


def rows(report: dict[str, Any], part: str) -> list[list[str]]:
    """Cells of all measurements of a part."""
    return [_row(report, p) for p in report["points"] if p["part"] == part]


def _row(report, point) -> list[str]:
    header = HEADERS[point["part"]]
    if point["status"] != "ok":
        text = f"{point['status']} {point.get('message', '')}".strip()
        return [point["size"], text] + ["-"] * (len(header) - 2)
    seconds = statistics.median(point["seconds"])
    gib = f"{point['peak_bytes'] / 2**30:.1f}" if point["peak_bytes"] else "-"
    if point["part"] == "training":
        rate, used = point["model_flops"] / seconds / 1e12, point["mfu"]
        return [
            point["size"], f"{report['batch'] / seconds:.1f}", f"{1e3 * seconds:.1f}",
            f"{rate:.0f}", "-" if used is None else f"{100 * used:.1f}%", gib,
        ]  # fmt: skip
    cells = {
        "size": point["size"], "schedule": point.get("schedule", ""),
        "images/s": f"{report['images'] / seconds:.2f}", "s": f"{seconds:.3f}",
        "Gmacs": f"{point['macs'] / 1e9:,.0f}",
        "TFLOP/s": f"{point['flops'] / seconds / 1e12:.0f}",
        "time ratio": f"{point.get('time_ratio', 1):.3f}",
        "FLOPs ratio": f"{point.get('flops_ratio', 1):.3f}",
        "s at peak": f"{point['peak_s']:.3f}" if "peak_s" in point else "-",
        "x peak": f"{seconds / point['peak_s']:.2f}" if "peak_s" in point else "-", "GiB": gib,
    }  # fmt: skip
    return [cells[name] for name in header]


def markdown(report: dict[str, Any]) -> str:
    """Device, command, a table for every part, and the checks."""
    device = report["device"]
    head = f"{device['kind']}, jax {device['jax']}, Python {report['python']}, {report['date']}"
    draws = (
        f"{report['images']} images at a time, {report['steps']} steps of {report['method']} with "
        f"guidance (twice the rows), {report['dtype']}, median; Gmacs: 10^9 multiply-adds of one "
        "image's whole trajectory (the unit of published tables), at peak: twice as many "
        "operations at the device's bfloat16 peak."
    )
    notes = {
        "training": f"Training, {report['batch']} images a step, compute in {report['dtype']}, "
        "parameters float32, AdamW, median. TFLOP/s and MFU: 3 x forward matmul FLOPs, nothing "
        "recomputed.",
        "sampling": f"Sampling, {draws}",
        "flexible": f"FlexiDiT, adapters merged, weak steps first, {draws} Ratios: of the full "
        "schedule.",
    }
    texts = [f"{head}: `{report['command']}`"]
    for part, header in HEADERS.items():
        cells = rows(report, part)
        if cells:
            texts += [notes[part], table(header, cells)]
    errors = [
        [name, f"{r['error']:.1e}" if "error" in r else r.get("message", r["status"]),
         "yes" if r["ok"] else "NO"] for name, r in report["checks"].items()
    ]  # fmt: skip
    if errors:
        texts += [
            "Samples of small nets, relative L2: against steps one by one in float32, and "
            "(powerful) of a FlexiDiT in the base's mode throughout against the plain DiT."
        ]
        texts += [table(["sampler", "error", "within bounds"], errors)]
    return "\n\n".join(texts)


def picture(report: dict[str, Any]) -> bytes:
    """PNG: milliseconds of a training step, and seconds of a batch of images with what the
    operations take at peak."""
    from matplotlib.figure import Figure

    done = [p for p in report["points"] if p["status"] == "ok"]
    panels = [
        ("ms per training step", 1e3, [p for p in done if p["part"] == "training"]),
        ("s per batch of images", 1.0, [p for p in done if p["part"] != "training"]),
    ]
    panels = [panel for panel in panels if panel[2]]
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(done)), layout="constrained")
    ratios = [len(points) for *_, points in panels]
    grid = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": ratios})
    for axes, (label, scale, points) in zip(grid[:, 0], panels):
        names = [f"{p['size']} {p['part']} {p.get('schedule', '')}".strip() for p in points]
        seconds = [scale * statistics.median(p["seconds"]) for p in points]
        axes.barh(range(len(points)), seconds, label="measured")
        floor = [(i, p["peak_s"]) for i, p in enumerate(points) if "peak_s" in p]
        if floor:
            axes.barh(*zip(*floor), height=0.3, label="operations at peak")
            axes.legend()
        axes.set_yticks(range(len(points)), names)
        axes.invert_yaxis()
        axes.set_xlabel(f"{label}, {report['device']['kind']}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
