"""How `lintime bench pom` shows its numbers: markdown tables and a picture."""

from __future__ import annotations

import io
import statistics
from typing import Any

from .report import table

PASSES = ("forward", "forward+backward")
# ms of the layer (B4, d 1024, expand 2, 16 heads), forward and forward+backward: aims.
TARGETS = {("none", 8192): (0.25, 0.85), ("causal", 8192): (0.55, 1.9)}


def _failure(point: dict[str, Any]) -> str:
    return {"oom": "OOM"}.get(point["status"], point["status"])


def one_line(point: dict[str, Any]) -> str:
    """A line of progress."""
    if "mixer" in point:
        if point["status"] != "ok":
            return f"{point['status']} {point.get('message', '')}"
        return f"{1e3 * statistics.median(point['seconds']):.1f} ms/step"
    head = f"{point['part']} {point['mask']} N={point['length']} {point['name']}"
    return f"{head}: {_cell(point)} {point.get('message', '')}"


def _cell(point: dict[str, Any] | None) -> str:
    if point is None:
        return "-"
    if point["status"] != "ok":
        return _failure(point)
    return " / ".join(f"{point[name]:.3f}" for name in PASSES)


def markdown(report: dict[str, Any]) -> str:
    """Device, command, a table for every part and mask, and the models'."""
    device = report["device"]
    head = f"{device['kind']}, jax {device['jax']}, Python {report['python']}, {report['date']}"
    texts = [f"{head}: `{report['command']}`"]
    if report["points"]:
        copy = "" if report["copy"] is None else f"; copy {report['copy'] / 1e12:.2f} TB/s"
        texts.append(
            f"Milliseconds, forward / forward+backward, median of {report['samples']}{copy}. The "
            "cotangent waits for the output. Floor: bytes that must move once, at that bandwidth. "
            "Error: relative L2 of output / worst gradient against the definition in float32."
        )
    for part, mask in dict.fromkeys((p["part"], p["mask"]) for p in report["points"]):
        texts.append(_table(report, part, mask))
    if report["models"]:
        texts.append(_models(report))
    return "\n\n".join(texts)


def _table(report, part: str, mask: str) -> str:
    points = [p for p in report["points"] if (p["part"], p["mask"]) == (part, mask)]
    lengths = sorted({p["length"] for p in points})
    found = {(p["name"], p["length"]): p for p in points}
    names = list(dict.fromkeys(p["name"] for p in points))
    lines = []
    for name in names:
        errors = next((p["error"] for p in points if p["name"] == name and "error" in p), {})
        error = " / ".join(f"{e:.0e}" for e in errors.values())
        lines.append([name, *(_cell(found.get((name, n))) for n in lengths), error])
    if part == "op":
        floors = {p["length"]: p["floors"] for p in points}
        lines.append(["floor", *(" / ".join(f"{f:.3f}" for f in floors[n]) for n in lengths), ""])
    elif (mask, lengths[-1]) in TARGETS and points[0]["width"] == 1024:
        aims = [TARGETS.get((mask, n)) for n in lengths]
        cells = ("-" if aim is None else " / ".join(f"{a:g}" for a in aim) for aim in aims)
        lines.append(["target", *cells, ""])
    shape = "B{batch} d{width} H{heads} {dtype}".format(**points[0])
    title = f"{part}, {'no mask' if mask == 'none' else mask}, {shape}, by N"
    return table([title, *map(str, lengths), "error"], lines)


def _models(report) -> str:
    lines = []
    for p in report["models"]:
        head = [p["mixer"], p["pixels"], p["tokens"], p["batch"]]
        if p["status"] != "ok":
            lines.append([*head, _failure(p), "-", "-", "-"])
            continue
        seconds = statistics.median(p["seconds"])
        memory = p.get("peak_bytes")
        lines.append([
            *head, f"{1e3 * seconds:.1f}", f"{p['batch'] / seconds:.2f}",
            f"{p['batch'] * p['tokens'] / seconds:,.0f}",
            "-" if not memory else f"{memory / 2**30:.1f}",
        ])  # fmt: skip
    header = ["DiT training, mixer", "pixels", "tokens", "images a step", "ms/step", "images/s",
              "tokens/s", "peak GiB"]  # fmt: skip
    return table(header, lines)


def picture(report: dict[str, Any]) -> bytes:
    """PNG: forward+backward milliseconds of layers over lengths; tokens/s of models over pixels."""
    from matplotlib.figure import Figure

    layers = [p for p in report["points"] if p["status"] == "ok" and p["part"] == "layer"]
    layers = layers or [p for p in report["points"] if p["status"] == "ok"]
    masks = list(dict.fromkeys(p["mask"] for p in layers))
    models = [p for p in report["models"] if p["status"] == "ok"]
    figure = Figure(figsize=(5.5 * max(1, len(masks) + bool(models)), 4), layout="constrained")
    panels = figure.subplots(1, max(1, len(masks) + bool(models)), squeeze=False)[0]
    for axes, mask in zip(panels, masks):
        of_mask = [p for p in layers if p["mask"] == mask]
        for name in dict.fromkeys(p["name"] for p in of_mask):
            line = sorted((p["length"], p[PASSES[1]]) for p in of_mask if p["name"] == name)
            axes.plot(*zip(*line, strict=True), marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=mask)
        axes.set_ylabel(f"ms, forward+backward, {report['device']['kind']}")
        axes.legend(fontsize=7)
    if models:
        for mixer in dict.fromkeys(p["mixer"] for p in models):
            line = [(p["pixels"], p["batch"] * p["tokens"] / statistics.median(p["seconds"]))
                    for p in models if p["mixer"] == mixer]  # fmt: skip
            panels[-1].plot(*zip(*line, strict=True), marker="o", label=mixer)
        panels[-1].set(xscale="log", xlabel="pixels", ylabel="training tokens/s", title="DiT")
        panels[-1].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
