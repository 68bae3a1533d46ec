"""`lintime bench ssm`: milliseconds of the state-space cores, beside their byte floors.

Every implementation of every op is first checked against the definition in float32 on a short
relative of the shape (output and gradients), then timed forward and forward+backward. The floor is
the time of the bytes that must move once, at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import math
from collections.abc import Callable
from typing import Any

from ..errors import UserError
from .jobs import finish, new_report, save, say
from .report import table
from .timing import attempt, copy_bandwidth, describe_device, milliseconds, relative_error

# (forward, forward+backward) ms of the official CUDA and Triton kernels (mamba_ssm), bfloat16, and
# of jax.lax.associative_scan for the linear scan; and what this project aims at. One H200, jax
# 0.11.2, torch 2.11, triton 3.6, measured before this project.
PEERS = {
    ("selective_scan", "B8 L2048 D4096 N16"): ((1.16, 5.69), (0.40, 2.0)),
    ("selective_scan", "B64 L256 D3072 N16"): ((0.86, 5.04), (0.29, 1.8)),
    ("selective_scan", "B1 L65536 D4096 N16"): ((5.95, 26.4), (2.0, 9.5)),
    ("ssd", "B8 L2048 H64 P64 N128"): ((0.56, 4.42), (0.20, 1.2)),
    ("ssd", "B64 L256 H48 P64 N128"): ((0.72, 4.07), (0.24, 1.2)),
    ("ssd", "B1 L65536 H64 P64 N128"): ((2.51, 10.0), (0.9, 3.5)),
    ("linear_scan", "B8 L4096 D2048"): ((0.66, None), (0.22, 0.70)),
    ("linear_scan", "B1 L65536 D1024"): ((0.65, None), (0.35, 1.0)),
}
SHAPES = (*PEERS, ("causal_conv1d", "B8 L2048 C4096 W4"), ("causal_conv1d", "B1 L65536 C4096 W4"))
TINY = (  # for a CPU, where the benchmark shows that it works and nothing else
    ("selective_scan", "B2 L64 D32 N4"),
    ("ssd", "B2 L64 H4 P8 N8"),
    ("linear_scan", "B2 L64 D32"),
    ("causal_conv1d", "B2 L64 C32 W4"),
)
OPS = tuple(dict.fromkeys(op for op, _ in SHAPES))
CHECK_LENGTH = 1100  # enough for every implementation to cut time where it would
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2}  # of output and gradients, relative L2


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op, shape: names. sizes: {"B": 8, "L": 2048, ..}. dtype: of the inputs.
    """

    op: str
    shape: str
    dtype: str

    @property
    def sizes(self) -> dict[str, int]:
        return {word[0]: int(word[1:]) for word in self.shape.split()}

    def at_length(self, length: int) -> Case:
        words = [f"L{length}" if w[0] == "L" else w for w in self.shape.split()]
        return dataclasses.replace(self, shape=" ".join(words))


def cases(ops: list[str], accelerator: bool, dtype: str) -> list[Case]:
    """What is measured; the linear scan always in float32, as a core of the other ops."""
    rows = SHAPES if accelerator else TINY
    width = lambda op: "float32" if op == "linear_scan" else dtype
    return [Case(op, shape, width(op)) for op, shape in rows if op in ops]


def floor_bytes(case: Case) -> tuple[int, int]:
    """Bytes that must cross the memory bus, forward and forward+backward.

    Every input and output once per pass; the backward pass reads inputs and cotangents and writes
    gradients, and recomputes all else.
    """
    s, width = case.sizes, 4 if case.dtype == "float32" else 2
    tokens = s["B"] * s["L"]
    if case.op == "linear_scan":  # a, x -> h; h, a, dh -> da, dx
        return 3 * width * tokens * s["D"], 8 * width * tokens * s["D"]
    if case.op == "causal_conv1d":  # x -> y; x, dy -> dx
        return 2 * width * tokens * s["C"], 5 * width * tokens * s["C"]
    if case.op == "selective_scan":  # u, delta, z -> y; those and dy -> three gradients
        narrow = 2 * tokens * s["N"] * width
        forward = 4 * width * tokens * s["D"] + narrow
        return forward, forward + 7 * width * tokens * s["D"] + 2 * narrow
    small = tokens * (2 * s["N"] + s["H"]) * width  # B, C, dt
    wide = tokens * s["H"] * s["P"] * width
    return 2 * wide + small, 5 * wide + 3 * small


def make_inputs(case: Case) -> dict[str, Any]:
    """Random inputs of an op, steps and decays as in a freshly initialised layer."""
    import jax
    import jax.numpy as jnp

    s, dtype = case.sizes, jnp.dtype(case.dtype)
    keys = iter(jax.random.split(jax.random.key(0), 12))
    normal = lambda *shape: jax.random.normal(next(keys), shape).astype(dtype)
    lead = (s["B"], s["L"])
    bias = lambda n: jnp.log(jnp.expm1(jnp.exp(jax.random.uniform(next(keys), (n,),
        minval=math.log(1e-3), maxval=math.log(0.1)))))  # fmt: skip
    if case.op == "linear_scan":
        decay = jnp.exp(-jnp.exp(jax.random.normal(next(keys), (*lead, s["D"])) - 3))
        return {"a": decay.astype(dtype), "x": normal(*lead, s["D"])}
    if case.op == "causal_conv1d":
        weight = jax.random.normal(next(keys), (s["W"], s["C"]))
        return {"x": normal(*lead, s["C"]), "weight": weight, "bias": jnp.ones((s["C"],))}
    if case.op == "selective_scan":
        wide = (*lead, s["D"])
        return {
            "u": normal(*wide), "delta": 0.5 * normal(*wide), "z": normal(*wide),
            "A": -jnp.broadcast_to(jnp.arange(1.0, s["N"] + 1), (s["D"], s["N"])) + 0.0,
            "B": normal(*lead, s["N"]), "C": normal(*lead, s["N"]), "D": jnp.ones((s["D"],)),
            "delta_bias": bias(s["D"]),
        }  # fmt: skip
    return {
        "x": normal(*lead, s["H"], s["P"]), "dt": normal(*lead, s["H"]),
        "A": -jax.random.uniform(next(keys), (s["H"],), minval=1.0, maxval=16.0),
        "B": normal(*lead, 1, s["N"]), "C": normal(*lead, 1, s["N"]),
        "D": jnp.ones((s["H"],)), "dt_bias": bias(s["H"]),
    }  # fmt: skip


def make_op(case: Case, implementation: str | None) -> Callable[..., Any]:
    """{name: input} -> the op's output (states dropped)."""
    from ...kernels_pallas import causal_conv1d, linear_scan, selective_scan, ssd

    op, options = {
        "linear_scan": (linear_scan.linear_scan, {}),
        "causal_conv1d": (causal_conv1d.causal_conv1d, {"activation": "silu"}),
        "selective_scan": (selective_scan.selective_scan, {"delta_softplus": True}),
        "ssd": (ssd.ssd, {"dt_softplus": True}),
    }[case.op]
    return lambda inputs: op(**inputs, **options, implementation=implementation)[0]


def _passes(case: Case, implementation: str | None) -> dict[str, Callable]:
    """The two timed functions of (inputs, cotangent)."""
    import jax

    op = make_op(case, implementation)

    def both(inputs, cotangent):
        out, pull = jax.vjp(op, inputs)
        return out, pull(cotangent)[0]

    return {"forward": lambda inputs, cotangent: op(inputs), "forward+backward": both}


def _cotangent(case: Case, inputs: dict[str, Any]):
    import jax

    shape = next(inputs[name].shape for name in ("x", "u") if name in inputs)
    return jax.random.normal(jax.random.key(1), shape).astype(case.dtype)


@functools.lru_cache(maxsize=1)
def _defined(case: Case):
    """Inputs, cotangent, and the definition's (output, gradients) in float32."""
    import jax
    import jax.numpy as jnp

    inputs = make_inputs(case)
    cotangent = _cotangent(case, inputs)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), (inputs, cotangent))
    with jax.default_matmul_precision("highest"):
        return inputs, cotangent, jax.jit(_passes(case, "reference")["forward+backward"])(*exact)


def check(case: Case, implementation: str) -> dict[str, float]:
    """Relative L2 errors of output and worst gradient against the definition in float32.

    On a short relative of the shape with the same numbers: float32 references of rounded inputs.
    """
    import jax
    import jax.numpy as jnp

    short = case.at_length(min(CHECK_LENGTH, case.sizes["L"]))
    inputs, cotangent, wanted = _defined(short)
    precision = "highest" if case.dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        out, grads = jax.jit(_passes(short, implementation)["forward+backward"])(inputs, cotangent)
    as_float = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    errors = {n: relative_error(as_float(grads[n]), wanted[1][n]) for n in grads}
    return {"output": relative_error(as_float(out), wanted[0]), "gradient": max(errors.values())}


def measure(case: Case, implementation: str, samples: int) -> dict[str, Any]:
    """{"status", "error": .., "forward": ms, "forward+backward": ms} of one implementation."""
    point: dict[str, Any] = {"op": case.op, "shape": case.shape, "implementation": implementation}

    def timed():
        point["error"] = error = check(case, implementation)
        if not max(error.values()) <= TOLERANCE[case.dtype]:
            return {"status": "wrong"}
        inputs = make_inputs(case)
        arguments = inputs, _cotangent(case, inputs)
        for name, function in _passes(case, implementation).items():
            point[name] = milliseconds(function, arguments, samples)
        return {}

    return point | attempt(timed)


def bench(arguments: argparse.Namespace, command: str, samples: int) -> dict[str, Any]:
    """Run the benchmark; prints and writes ssm.md, ssm.json and ssm.png, and returns the report.

    Args:
        arguments: ops, variants, out and json. command: for the report.
        samples: timings of which the median counts.

    Raises:
        UserError: bad arguments, or an implementation differs from the definition (the others'
            figures are still shown).
    """
    from ...kernels_pallas import dispatch

    unknown = [op for op in arguments.ops if op not in OPS]
    if unknown:
        raise UserError(f"--ops {unknown[0]}: choose from {', '.join(OPS)}")
    device = describe_device()
    accelerator = device["platform"] != "cpu"
    kernels = "pallas" if accelerator else "xla"
    names = arguments.variants or list(dict.fromkeys(["xla", kernels]))
    report = new_report(device, command)
    report |= {"samples": samples, "copy": copy_bandwidth(accelerator, samples)}
    rows = cases(arguments.ops or list(OPS), accelerator, "bfloat16" if accelerator else "float32")
    for number, case in enumerate(rows):
        floors = [1e3 * b / report["copy"] for b in floor_bytes(case)]
        for name in names:
            available = _available(case.op)
            try:
                dispatch.resolve(case.op, name, available)
            except ValueError as error:
                if arguments.variants:
                    raise UserError(str(error)) from None
                continue
            say(f"[{number + 1}/{len(rows)}] {case.op} {case.shape} {case.dtype}, {name} ...")
            point = {"dtype": case.dtype, "floors": floors} | measure(case, name, samples)
            say("    " + _cell(point))
            report["points"].append(point)
            text = markdown(report)
            save(report, arguments.out, "ssm", text)
    finish(report, arguments, "ssm", text, picture)
    wrong = [f"{p['op']} {p['implementation']}" for p in report["points"] if p["status"] == "wrong"]
    if wrong:
        raise UserError(
            f"{', '.join(dict.fromkeys(wrong))}: the result differs from the definition"
        )
    return report


def _available(op: str) -> dict[str, Any]:
    import importlib

    return importlib.import_module(f"...kernels_pallas.{op}", __package__).IMPLEMENTATIONS


def _cell(point: dict[str, Any]) -> str:
    if point["status"] != "ok":
        return f"{point['status']} {point.get('message', '')}".strip()
    return f"{point['forward']:.3f} / {point['forward+backward']:.3f} ms"


def _pair(pair: tuple | None) -> str:
    if pair is None:
        return "-"
    return " / ".join("-" if value is None else f"{value:.3g}" for value in pair)


def markdown(report: dict[str, Any]) -> str:
    """Device, command, and one row per op, shape and implementation."""
    device = report["device"]
    head = f"{device['kind']}, jax {device['jax']}, Python {report['python']}, {report['date']}"
    lines = []
    for p in report["points"]:
        peers = PEERS.get((p["op"], p["shape"]), (None, None))
        done = p["status"] == "ok"
        times = (p["forward"], p["forward+backward"]) if done else ()
        ratio = " / ".join(f"{t / f:.1f}" for t, f in zip(times, p["floors"])) if done else "-"
        error = p.get("error", {}).values()
        lines.append([
            f"{p['op']} {p['shape']} {p['dtype']}", p["implementation"],
            f"{times[0]:.3f} / {times[1]:.3f}" if done else p["status"], _pair(p["floors"]), ratio,
            *map(_pair, peers), " / ".join(f"{e:.1e}" for e in error),
        ])  # fmt: skip
    header = ["op", "by", "ms", "floor", "times the floor", "official", "target", "error"]
    return "\n\n".join([
        f"{head}: `{report['command']}`",
        f"Milliseconds, forward / forward+backward, median of {report['samples']}; copy bandwidth "
        f"{report['copy'] / 1e12:.2f} TB/s; floor: bytes moved once at that bandwidth; official: "
        "CUDA and Triton kernels of mamba_ssm (linear scan: jax.lax.associative_scan), one H200, "
        "measured before this project; error: relative L2 of output / worst gradient.",
        table(header, lines),
    ])  # fmt: skip


def picture(report: dict[str, Any]) -> bytes:
    """PNG: forward+backward milliseconds of each implementation, official kernels and floors."""
    from matplotlib.figure import Figure

    points = [p for p in report["points"] if p["status"] == "ok"]
    keys = list(dict.fromkeys((p["op"], p["shape"]) for p in points))
    names = list(dict.fromkeys(p["implementation"] for p in points))
    bars = {n: [next((p["forward+backward"] for p in points
        if (p["op"], p["shape"], p["implementation"]) == (*k, n)), None) for k in keys]
        for n in names}  # fmt: skip
    bars["official"] = [PEERS.get(k, ((None, None),))[0][1] for k in keys]
    bars["floor"] = [
        next(p["floors"][1] for p in points if (p["op"], p["shape"]) == k) for k in keys
    ]
    figure = Figure(figsize=(9, 1 + 0.7 * len(keys)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(bars)
    for number, (name, values) in enumerate(bars.items()):
        at = [i + number * height for i, v in enumerate(values) if v is not None]
        axes.barh(at, [v for v in values if v is not None], height, label=name)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(keys))], [" ".join(k) for k in keys])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"ms, forward+backward, {report['device']['kind']}")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
