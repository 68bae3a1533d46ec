"""How `lintime bench` shows its numbers: markdown tables and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

COLORS = {
    "dense-flash": "tab:red", "dense": "tab:brown", "vq-serial": "tab:blue",
    "vq-associative": "tab:green", "vq-matmul": "tab:orange",
}  # fmt: skip
# Tokens/s of the original JAX code by length, at the throughput configuration.
ORIGINAL = {
    "shga": {
        "VQ": {2048: 208e3, 8192: 205e3, 32768: 193e3},
        "dense": {2048: 275e3, 8192: 117e3, 32768: 36e3},
    },
    "mha": {
        "VQ": {2048: 191e3, 8192: 185e3, 32768: 180e3},
        "dense": {2048: 223e3, 8192: 73e3, 32768: 18e3},
    },
}
ORIGINAL_SOURCE = "original JAX code, one H200, measured before this project"
NOTES = (
    "ms/step: median, each step timed alone. MFU: 3 x forward matmul FLOPs of the variant's own "
    "program, nothing recomputed, / time / bfloat16 peak; dense-flash counts the whole square of "
    "scores, in SHGA once per slice of the values. Peak: of the process, by the device. Compiled: "
    "arguments, outputs and temporaries of the step."
)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table with aligned columns, the first to the left, the others to the right."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    width = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    pad = lambda row: [row[0].ljust(width[0]), *(c.rjust(w) for c, w in zip(row[1:], width[1:]))]
    rule = ["-" * width[0], *("-" * (w - 1) + ":" for w in width[1:])]
    lines = [pad(cells[0]), rule, *map(pad, cells[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(report: dict[str, Any]) -> str:
    """The whole report: device and settings, tokens/s by length, details, errors."""
    return "\n\n".join([*_head(report), _summary(report), _details(report), NOTES, _checks(report)])


def parts_markdown(report: dict[str, Any]) -> str:
    """The report of `--op`: milliseconds per part, forward / forward+backward."""
    lengths = report["lengths"]
    names: dict[tuple[str, str], dict] = {}
    for point in report["points"]:
        for part, value in point.get("parts", {}).items():
            names.setdefault((point["variant"], part), {})[point["length"]] = value
    time = lambda ms: "OOM" if ms is None else f"{ms:.3f}"
    cell = lambda value: "-" if value is None else " / ".join(map(time, value.values()))
    rows = [
        [variant, part, *(cell(values.get(n)) for n in lengths)]
        for (variant, part), values in names.items()
    ]
    text = table(["variant", "part (ms: forward / forward+backward)", *map(str, lengths)], rows)
    failed = [
        f"{p['variant']} at {p['length']}: {_failure(p)} {p.get('message', '')}"
        for p in report["points"]
        if p["status"] != "ok"
    ]
    return "\n\n".join([*_head(report), _checks(report), text, *failed])


def _head(report) -> list[str]:
    where = f"{_device(report)}, Python {report['python']}, {report['date']}"
    return [f"{where}: `{report['command']}`", report["settings"]]


def _device(report) -> str:
    device, count = report["device"], report["devices"]
    return f"{device['kind']}{f' x {count}' if count > 1 else ''}, jax {device['jax']}"


def _failure(point) -> str:
    return {"oom": "OOM", "unchecked": "check failed"}.get(point["status"], point["status"])


def _checks(report) -> str:
    rows = []
    for variant, result in report["checks"].items():
        for name, (value, gradient, where) in result["errors"].items():
            verdict = "pass" if result["ok"] else "FAIL"
            rows.append([variant, name, f"{value:.1e}", f"{gradient:.1e}", where or "-", verdict])
        if not result["errors"]:
            rows.append([variant, "-", "-", "-", result.get("message", ""), "FAIL"])
    header = ["check (relative L2 error)", "what", "value", "gradient", "worst gradient", "result"]
    return table(header, rows)


def _details(report) -> str:
    gib = lambda n: "-" if n is None else f"{n / 2**30:.2f}"
    rows = []
    for p in report["points"]:
        head = [p["variant"], p["length"], p["rows"]]
        if p["status"] != "ok":
            rows.append([*head, _failure(p), *["-"] * 5])
            continue
        use = "-" if p["mfu"] is None else f"{100 * p['mfu']:.1f}%"
        rows.append(
            [*head, f"{p['median_ms']:.1f}", f"{p['tokens_per_s']:,.0f}", use,
             gib(p["peak_bytes"]), gib(p["compiled_bytes"]), f"{p['compile_s']:.1f}"]
        )  # fmt: skip
    header = ["training step", "length", "rows", "ms/step", "tokens/s", "MFU", "peak GiB",
              "compiled GiB", "compile s"]  # fmt: skip
    return table(header, rows)


def _summary(report) -> str:
    lengths = report["lengths"]
    found = {(p["variant"], p["length"]): p for p in report["points"]}

    def cell(variant, length):
        p = found.get((variant, length))
        if p is None:
            return "-"
        return f"{p['tokens_per_s']:,.0f}" if p["status"] == "ok" else _failure(p)

    rows = [[v, *(cell(v, n) for n in lengths)] for v in report["variants"]]
    for name, values in (report["original"] or {}).items():
        row = [f"{values[n]:,.0f}" if n in values else "-" for n in lengths]
        rows.append([f"{name} ({ORIGINAL_SOURCE})", *row])
    return table(["tokens/s by length", *map(str, lengths)], rows)


def picture(report: dict[str, Any]) -> bytes:
    """PNG: tokens/s against length, one line per variant, the device in the title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, NullLocator

    figure = Figure(figsize=(7, 4.4), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    markers = dict(zip(COLORS, "osv^D"))
    for variant in report["variants"]:
        good = [p for p in report["points"] if p["variant"] == variant and p["status"] == "ok"]
        if good:
            axes.plot(
                [p["length"] for p in good], [p["tokens_per_s"] for p in good], label=variant,
                color=COLORS[variant], marker=markers[variant], linewidth=1.6, markersize=5,
            )  # fmt: skip
    for name, values in (report["original"] or {}).items():
        axes.plot(
            list(values), list(values.values()), "--", color="0.45" if name == "VQ" else "0.7",
            linewidth=1.2, label=f"{name}, {ORIGINAL_SOURCE}",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(report["lengths"], [f"{n:,}" for n in report["lengths"]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sequence length (tokens)")
    axes.set_ylabel("training tokens per second")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=7)
    axes.set_title(f"{_device(report)}, {report['date']}", fontsize=9)
    figure.text(0.01, -0.03, report["settings"], fontsize=6, wrap=True)
    out = io.BytesIO()
    canvas.figure.savefig(out, format="png", bbox_inches="tight")
    return out.getvalue()
