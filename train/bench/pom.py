"""`lintime bench pom`: the polynomial mixer's op, its layer beside flash attention's, and DiT-XL.

Op and layer are first checked, output and gradients, against the definition in float32 on a short
sequence; then forward and forward+backward are timed over lengths. In the latter the output's
gradient waits for the output, as in training: otherwise XLA would merge both passes. The model part
times whole training steps of DiT with attention and with PoM at a constant number of tokens a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from ..config_files import from_json, to_json
from ..errors import UserError
from ..override import apply_overrides
from . import jobs
from .pom_report import markdown, one_line, picture
from .timing import attempt, copy_bandwidth, milliseconds, peak_memory, relative_error

PARTS = ("op", "layer", "model")
MASKS = ("none", "causal")
BATCH, WIDTH, EXPAND, HEADS = 4, 1024, 2, 16  # of the published benchmark
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
DEGREES = (2, 3, 4, 5)
TOKENS = 65536  # of a training step of the model part
PIXELS = (256, 512, 1024, 2048)  # 8 a latent
CHECK_LENGTH = 1100  # enough for every implementation to cut the tokens where it would
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of output and gradients, relative L2


@dataclasses.dataclass(frozen=True)
class Case:
    """An op or a layer at one size.

    Attributes:
        part: "op" or "layer". mask: "none" or "causal". by: an implementation of the op, or
            "attention" (layers). degree: 0 for attention. batch, length, width, heads: B, N, d, H.
        dtype: of inputs and matrices.
    """

    part: str
    mask: str
    by: str
    degree: int
    batch: int
    length: int
    width: int
    heads: int
    dtype: str

    @property
    def name(self) -> str:
        return self.by if not self.degree else f"{self.by} k{self.degree}"


def floor_bytes(case: Case) -> tuple[float, float] | None:
    """Bytes of an op's elements that must cross the memory bus, forward and forward+backward.

    h is read; causal rows are written. The backward pass reads h and those rows' gradient and
    writes that of h. None for layers: matmuls bound them, see `floor_flops`.
    """
    if case.part != "op":
        return None
    elements = case.batch * case.length * EXPAND * case.width * (2 + 2 * (case.dtype == "float32"))
    return (2 * elements, 5 * elements) if case.mask == "causal" else (elements, 3 * elements)


def floor_flops(case: Case) -> float:
    """FLOPs of a layer's matmuls, forward; backward twice that (attention's kernel 2.5 times)."""
    d, n, tokens = case.width, case.length, case.batch * case.length
    wide = EXPAND * d
    if case.by == "attention":
        scores = 4 * n * d * tokens
        return 8 * d * d * tokens + (scores / 2 if case.mask == "causal" else scores)
    out = 2 * wide * d if case.mask == "causal" else 2 * case.heads * d
    return tokens * (2 * d * (wide + case.heads) + out)


# ---------------------------------------------------------------- what is timed


def make_inputs(case: Case) -> tuple[Any, Any]:
    """What is differentiated: {name: array}; and the output's cotangent."""
    import jax

    keys = iter(jax.random.split(jax.random.key(0), 8))
    lead, wide = (case.batch, case.length), EXPAND * case.width
    normal = lambda *shape: jax.random.normal(next(keys), shape).astype(case.dtype)
    if case.part == "op":
        inputs = {"h": normal(*lead, wide), "coeff": jax.random.normal(next(keys), (wide,
            case.degree)) / 4}  # fmt: skip
        if case.mask == "causal":
            inputs["gate"] = jax.random.uniform(next(keys), (*lead, case.heads)).astype(case.dtype)
        rows = case.length if case.mask == "causal" else 1
        return inputs, normal(case.batch, rows, wide)
    x = normal(*lead, case.width)
    layer = make_layer(case)
    params = jax.jit(lambda key: layer.init(key, x[:1, :8])["params"])(next(keys))

    def stored(path, a):  # matrices as in the published benchmark; coefficients stay float32
        name = path[-1].key
        if name == "po_coeff":  # initially 0.001, which would test nothing
            return 300 * a
        return a.astype(case.dtype)

    params = jax.tree_util.tree_map_with_path(stored, params)
    return {"x": x, "params": params}, normal(*lead, case.width)


def make_layer(case: Case):
    """The Flax module of a layer."""
    import jax.numpy as jnp

    from ...model.mixers.pom import PolynomialMixer
    from .attention_layer import AttentionLayer

    dtype, causal = jnp.dtype(case.dtype), case.mask == "causal"
    if case.by == "attention":
        return AttentionLayer(case.width, case.heads, causal, dtype)
    return PolynomialMixer(
        case.width, degree=case.degree, expand=EXPAND, heads=case.heads, causal=causal,
        dtype=dtype, implementation=case.by,
    )  # fmt: skip


def make_function(case: Case) -> Callable[[Any], Any]:
    """inputs -> output."""
    if case.part == "layer":
        layer = make_layer(case)
        return lambda inputs: layer.apply({"params": inputs["params"]}, inputs["x"])[0]
    from ...kernels_pallas.poly_mix import gated_causal_mix, poly_mix

    op = gated_causal_mix if case.mask == "causal" else poly_mix
    return lambda inputs: op(**inputs, implementation=case.by)[0]


def passes(case: Case) -> dict[str, Callable]:
    """The two timed functions of (inputs, cotangent)."""
    import jax

    function = make_function(case)

    def both(inputs, cotangent):
        out, pull = jax.vjp(function, inputs)
        out, cotangent = jax.lax.optimization_barrier((out, cotangent))
        return out, pull(cotangent)[0]

    return {"forward": lambda inputs, cotangent: function(inputs), "forward+backward": both}


@functools.lru_cache(maxsize=2)
def _defined(case: Case):
    """Inputs, cotangent, and the definition's (output, gradients) in float32."""
    import jax
    import jax.numpy as jnp

    inputs, cotangent = make_inputs(case)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), (inputs, cotangent))
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(passes(dataclasses.replace(case, dtype="float32"))["forward+backward"])
        return inputs, cotangent, wanted(*exact)


def check(case: Case) -> dict[str, float]:
    """Relative L2 errors of output and worst gradient against the definition in float32, on a
    short sequence; of layers all gradients of parameters together."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    short = dataclasses.replace(case, length=min(CHECK_LENGTH, case.length), batch=2)
    by = case.by if case.by == "attention" else "reference"
    inputs, cotangent, wanted = _defined(dataclasses.replace(short, by=by))
    precision = "highest" if case.dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        out, grads = jax.jit(passes(short)["forward+backward"])(inputs, cotangent)
    flat = lambda tree: np.concatenate(
        [np.ravel(a.astype(jnp.float32)) for a in jax.tree.leaves(tree)]
    )
    errors = {n: relative_error(flat(grads[n]), flat(wanted[1][n])) for n in grads}
    return {"output": relative_error(flat(out), flat(wanted[0])), "gradient": max(errors.values())}


@functools.cache
def _checked(case: Case) -> dict[str, float]:
    return check(case)


def measure(case: Case, samples: int) -> dict[str, Any]:
    """{"status", "error": .., "forward": ms, "forward+backward": ms}."""
    point = dataclasses.asdict(case) | {"name": case.name}

    def timed():
        length = CHECK_LENGTH if case.length > CHECK_LENGTH else case.length
        point["error"] = error = _checked(dataclasses.replace(case, length=length))
        if not max(error.values()) <= TOLERANCE[case.dtype]:
            return {"status": "wrong"}
        arguments = make_inputs(case)
        for name, function in passes(case).items():
            point[name] = milliseconds(function, arguments, samples)
        return {}

    return point | attempt(timed)


def train(run, steps: int) -> dict[str, Any]:
    """Whole training steps of a DiT on random latents."""
    from . import dit

    return dit.train(run, steps) | peak_memory()


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One training measurement in this process; jobs and results are JSON objects."""
    run = from_json(job["run"])
    return attempt(lambda: train(run, job["steps"]))


# ---------------------------------------------------------------- the benchmark


def bench(arguments: argparse.Namespace, command: str, samples: int) -> dict[str, Any]:
    """Run the benchmark; prints and writes pom.md, pom.json and pom.png, and returns the report.

    Args:
        arguments: only, lengths, variants, degrees, masks, sizes, tokens, overrides, isolate, out
            and json.
        command: for the report. samples: timings (and training steps) of which the median counts.

    Raises:
        UserError: bad arguments, or a result differs from the definition (the others' figures are
            still shown).
    """
    parts = jobs.chosen(arguments.only, "--only", PARTS) or ["op", "layer"]
    masks = jobs.chosen(arguments.masks, "--masks", MASKS) or list(MASKS)
    names = ("xla", "pallas_gpu", "attention", "reference")
    variants = jobs.chosen(arguments.variants, "--variants", names)
    whole = lambda words, flag: sorted(
        {jobs.whole(word, flag) for text in words for word in text.split(",") if word}
    )
    device, isolate = jobs.start("pom", arguments) if "model" in parts else (None, False)
    report = None
    if "model" in parts:  # first: this process holds no device yet
        report = _start(device, command, samples)
        _models(arguments, report, isolate, samples)
    if set(parts) - {"model"}:
        from .timing import describe_device

        report = report or _start(describe_device(), command, samples)
        accelerator = report["device"]["platform"] != "cpu"
        variants = variants or (["xla", "pallas_gpu", "attention"] if accelerator
            else ["xla", "attention"])  # fmt: skip
        lengths = whole(arguments.lengths, "--lengths") or (LENGTHS if accelerator else (16,))
        degrees = whole(arguments.degrees, "--degrees") or (DEGREES if accelerator else (2,))
        sizes = dict(batch=BATCH, width=WIDTH, heads=HEADS, dtype="bfloat16")
        if not accelerator:
            sizes = dict(batch=2, width=32, heads=4, dtype="float32")
        report["copy"] = copy_bandwidth(accelerator, samples)
        rows = cases([p for p in parts if p != "model"], masks, variants, degrees, lengths, sizes)
        for number, case in enumerate(rows):
            point = measure(case, samples)
            if (floors := floor_bytes(case)) is not None:
                point["floors"] = [1e3 * b / report["copy"] for b in floors]
            else:
                point["flops"] = floor_flops(case)
            report["points"].append(point)
            jobs.say(f"[{number + 1}/{len(rows)}] {one_line(point)}")
            jobs.save(report, arguments.out, "pom", markdown(report))
    jobs.finish(report, arguments, "pom", markdown(report), picture)
    wrong = [f"{p['part']} {p['mask']} {p['name']}" for p in report["points"]
        if p["status"] == "wrong"]  # fmt: skip
    if wrong:
        raise UserError(
            f"{', '.join(dict.fromkeys(wrong))}: the result differs from the definition"
        )
    return report


def _start(device, command, samples) -> dict[str, Any]:
    report = jobs.new_report(device, command)
    return report | {"samples": samples, "copy": None, "models": []}


def cases(parts, masks, variants, degrees, lengths, sizes) -> list[Case]:
    """What is measured, the longest first: a run that is cut off has what matters."""
    return [
        Case(part=part, mask=mask, by=by, degree=degree, length=length, **sizes)
        for length in sorted(lengths, reverse=True)
        for part in parts
        for mask in masks
        for by in variants
        for degree in ((0,) if by == "attention" else degrees)
        if part == "layer" or by != "attention"
    ]


def _models(arguments, report, isolate: bool, steps: int) -> None:
    """Training steps of DiT-XL/2 by latent size and mixer, or of a tiny one on a CPU."""
    from .dit import SIZES, make_run

    accelerator = report["device"]["platform"] != "cpu"
    size = "xl" if accelerator else "tiny"
    words = [word for text in arguments.sizes for word in text.split(",") if word]
    pixels = [jobs.whole(w, "--sizes") for w in words] or (PIXELS if accelerator else (64, 128))
    tokens = jobs.whole(arguments.tokens, "--tokens") if arguments.tokens else 0
    tokens = tokens or (TOKENS if accelerator else 64)
    for latent in (p // 8 for p in pixels):
        for mixer in ("attention", "pom"):
            net = dataclasses.replace(SIZES[size], input_size=latent, mixer=mixer)
            count = (latent // net.patch_size) ** 2
            batch = max(1, tokens // count)
            run = make_run(net, batch, "bfloat16" if accelerator else "float32", "none")
            run = apply_overrides(run, arguments.overrides)
            jobs.say(f"{size} {mixer}, {batch} x {count} tokens ...")
            result = jobs.work("pom", {"kind": "training", "run": to_json(run), "steps": steps},
                isolate)  # fmt: skip
            point = {"mixer": mixer, "pixels": 8 * latent, "tokens": count, "batch": batch}
            report["models"].append(point | result)
            jobs.say("    " + one_line(report["models"][-1]))
            jobs.save(report, arguments.out, "pom", markdown(report))
