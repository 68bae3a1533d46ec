"""`lintime bench aim`: images per second of sampling and training, beside the bandwidth they need.

Weights are random. Every form of decoding is first checked on a small net: guided logits of each
step against the whole image at once (teacher forcing). Then the whole jitted sampler is timed, and
the whole training step. A step of decoding has to read every weight, and to move what the mixers
carry from token to token; the floor is the time of these bytes, counted, at the device's bandwidth.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import numpy as np

from ...model.nets.aim import AiMConfig
from ..config_files import from_json, to_json
from ..errors import UserError
from ..override import apply_overrides
from ..schema import CodeData, Optim, Precision, Run
from . import jobs
from .aim_report import TRAINING, markdown, picture, row
from .timing import attempt, copy_bandwidth, peak_memory, relative_error, time_updates

COMMON = {"conditioning": "adaln_group", "num_groups": 4}
SIZES = {
    "b": AiMConfig(d_model=768, n_layer=24),
    "l": AiMConfig(d_model=1024, n_layer=48, **COMMON),
    "xl": AiMConfig(d_model=1536, n_layer=48, **COMMON),
    "tiny": AiMConfig(  # for a CPU, where the benchmark shows that it works and nothing else
        vocab_size=64, num_classes=8, num_tokens=8, d_model=32, n_layer=2, d_state=16, headdim=8,
        **COMMON,
    ),
}  # fmt: skip
SMALL = {  # of checks on an accelerator: heads as the kernels want them
    "vocab_size": 128, "num_classes": 8, "num_tokens": 48, "d_model": 256, "n_layer": 2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to decode: `make_class_sampler`'s options, and the net's mixer."""

    mixer: str = "mamba2"
    cache: str = "recurrent"
    state_dtype: str = "bfloat16"


FORMS = {
    "recurrent": Form(),
    "recurrent-float32": Form(state_dtype="float32"),
    "dual": Form(cache="dual"),
    "attention": Form(mixer="attention"),
}
PIECES = {"generation": tuple(FORMS), TRAINING: (TRAINING,)}
# Errors of guided logits, relative L2, in float32 and in bfloat16 (nets of two layers).
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
GUIDANCE = 1.75

# Peak memory bandwidth, bytes/s; the first key found in `device_kind` counts.
BANDWIDTH = {
    "gb200": 8e12, "b200": 8e12, "gh200": 4.0e12, "h200": 4.8e12, "h100 pcie": 2.0e12,
    "h100 nvl": 3.9e12, "h100": 3.35e12, "a100": 2.04e12, "l40s": 0.864e12, "l4": 0.3e12,
    "tpu v6": 1.64e12, "tpu v5 lite": 0.819e12, "tpu v5e": 0.819e12, "tpu v5": 2.765e12,
    "tpu v4": 1.228e12,
}  # fmt: skip


def peak_bandwidth(kind: str) -> float | None:
    """Bytes/s of a device kind's memory, read and written together; None when unknown."""
    return next((peak for key, peak in BANDWIDTH.items() if key in kind.lower()), None)


# ---------------------------------------------------------------- counting


def weight_bytes(config: AiMConfig, width: int) -> int:
    """Bytes of the weights that a step reads once, `width` bytes each.

    All but those that are read once per image: class and position embeddings, modulation heads.
    """
    import jax
    import jax.numpy as jnp

    from ...model.nets.aim import AiM

    codes, labels = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 2), (1,)))
    params = jax.eval_shape(AiM(config).init, jax.random.key(0), codes, labels)["params"]
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        names = [p.key for p in path]
        once = names[0] in ("class_embedding", "position_embedding")
        if not once and not any("modulation" in name for name in names):
            total += leaf.size
    return total * width


def cache_bytes(config: AiMConfig, form: Form, rows: int, width: int) -> float:
    """Bytes that the mixers of a step move, of what they carry, on average over an image.

    recurrent: the state, read and written. dual and attention: all tokens so far read, one written.
    The window of the convolution is left out (W numbers a channel).
    """
    from ...model.nets.aim import make_mixer

    mixer = make_mixer(dataclasses.replace(config, mixer=form.mixer), parent=None)
    tokens = (config.num_tokens + 1) / 2 + 1
    if form.mixer == "attention":
        each = 2 * mixer.heads() * mixer.head_dim * width * tokens
    else:
        _, d_ssm, heads = mixer.sizes()
        if form.cache == "recurrent":
            each = 2 * d_ssm * mixer.d_state * (4 if form.state_dtype == "float32" else 2)
        else:
            each = tokens * ((d_ssm + mixer.ngroups * mixer.d_state) * width + 4 * heads)
    return config.n_layer * rows * each


# ---------------------------------------------------------------- measuring, in a child process


def make_net(config: AiMConfig, form: Form, dtype: str):
    """The net of a form."""
    from ...model.nets.aim import AiM
    from ..tasks.base import DTYPES

    return AiM(dataclasses.replace(config, mixer=form.mixer), DTYPES[dtype])


def make_sampler(net, form: Form, **options):
    """The class sampler of a form."""
    from ...model.sampling.classes import make_class_sampler
    from ..tasks.base import DTYPES

    dtype = DTYPES[form.state_dtype]
    if form.mixer == "attention" or form.cache == "dual":
        dtype = net.dtype
    return make_class_sampler(net, unroll=True, cache=form.cache, state_dtype=dtype, **options)


def check(form: Form, dtype: str, accelerator: bool) -> dict[str, Any]:
    """{"error": relative L2 of all guided logits of a sample} of a small net.

    Against the net in float32 on the codes drawn, class and no class.
    """
    import jax
    import jax.numpy as jnp

    from ...model.sampling.classes import row_keys

    config = dataclasses.replace(AiMConfig(**SMALL, **COMMON) if accelerator else SIZES["tiny"])
    if dtype == "float32":
        form = dataclasses.replace(form, state_dtype="float32")
    net, exact = make_net(config, form, dtype), make_net(config, form, "float32")
    labels = jnp.asarray([0, 5])
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        variables = jax.jit(exact.init)(
            jax.random.key(0), jnp.zeros((1, config.num_tokens), jnp.int32), labels[:1]
        )
        sampler = make_sampler(net, form, piece=32, return_logits=True)
        codes, logits = sampler(
            variables, row_keys(jax.random.key(1), 2), labels, guidance=GUIDANCE
        )
    with jax.default_matmul_precision("highest"):
        forward = jax.jit(lambda v, c, k: exact.apply(v, c, k)[0])
        cond, uncond = (
            forward(variables, codes, k)
            for k in (labels, jnp.full_like(labels, config.num_classes))
        )
    want = uncond + GUIDANCE * (cond - uncond)
    return {"error": relative_error(jnp.swapaxes(logits, 0, 1), want)}


def generate(config: AiMConfig, form: Form, dtype: str, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of the whole sampler with guidance, batch by batch: {"seconds", "compile_s", ..}."""
    import jax
    import jax.numpy as jnp

    from ...model.sampling.classes import row_keys

    net = make_net(config, form, dtype)
    make = lambda key: net.decoding_variables(
        net.init(key, jnp.zeros((1, 2), jnp.int32), jnp.zeros((1,), jnp.int32))
    )
    variables = jax.jit(make)(jax.random.key(0))
    sampler, labels = make_sampler(net, form), jnp.arange(batch) % config.num_classes
    draw = lambda n: jax.block_until_ready(
        sampler(variables, row_keys(jax.random.key(1), batch, n * batch), labels, guidance=GUIDANCE)
    )
    began = time.perf_counter()
    draw(0)
    first, seconds = time.perf_counter() - began, []
    for number in range(repeats):
        began = time.perf_counter()
        draw(1 + number)
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "compile_s": first - min(seconds)} | peak_memory()


def train(run: Run, steps: int, warmup: int = 3) -> dict[str, Any]:
    """`timing.time_updates` of random codes."""

    def draw(random):
        shape = run.batch_size, run.net.num_tokens
        return {
            "codes": random.integers(0, run.net.vocab_size, shape, np.int32),
            "labels": random.integers(0, run.net.num_classes, shape[:1], np.int32),
        }

    return time_updates(run, draw, steps, warmup)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement in this process; jobs and results are JSON objects. What fails says so."""
    kind = job["kind"]
    if kind == "copy":
        return attempt(lambda: {"copy": copy_bandwidth(job["accelerator"], 5)})
    if kind == "train":
        return attempt(lambda: train(from_json(job["run"]), job["steps"]))
    form = Form(**job["form"])
    if kind == "check":
        return attempt(lambda: check(form, job["dtype"], job["accelerator"]))
    config, rest = from_json(job["run"]).net, (job["dtype"], job["batch"], job["repeats"])
    return attempt(lambda: generate(config, form, *rest))


# ---------------------------------------------------------------- the benchmark


def bench(arguments: argparse.Namespace, command: str, steps: int) -> dict[str, Any]:
    """Run the benchmark; prints and writes aim.md, aim.json and aim.png, and returns the report.

    Args:
        arguments: sizes, batch, only, repeats, remat, overrides, isolate, out and json.
        command: for the report. steps: timed training steps.

    Raises:
        UserError: bad arguments; or a form differs from teacher forcing (the others' figures are
            still shown).
    """
    parts = jobs.chosen(arguments.only, "--only", (*PIECES, *FORMS))
    parts = [p for name in parts for p in PIECES.get(name, (name,))] or [*FORMS, TRAINING]
    device, isolate = jobs.start("aim", arguments)
    work = lambda job: jobs.work("aim", job, isolate)
    accelerator = device["platform"] != "cpu"
    sizes = jobs.chosen(arguments.sizes, "--sizes", tuple(SIZES))
    sizes = sizes or ["xl" if accelerator else "tiny"]
    batch = jobs.whole(arguments.batch or ("64" if accelerator else "2"), "--batch")
    repeats = jobs.whole(arguments.repeats or "3", "--repeats")
    dtype = "bfloat16" if accelerator else "float32"
    copy = work({"kind": "copy", "accelerator": accelerator}).get("copy")
    peak = peak_bandwidth(device["kind"])
    report = jobs.new_report(device, command) | {
        "batch": batch, "guidance": GUIDANCE, "dtype": dtype, "copy": copy, "bandwidth": peak
    }  # fmt: skip
    for part in dict.fromkeys(p for p in parts if p != TRAINING):
        form = dataclasses.asdict(FORMS[part])
        for name in dict.fromkeys(("float32", dtype)):
            jobs.say(f"{device['kind']}: checking {part} in {name} ...")
            job = {"kind": "check", "form": form, "dtype": name, "accelerator": accelerator}
            result = work(job)
            fine = result["status"] == "ok" and result["error"] <= TOLERANCE[name]
            report["checks"][f"{part} {name}"] = result | {"ok": bool(fine)}
    wrong = [name for name, result in report["checks"].items() if not result["ok"]]
    for size in sizes:
        run = make_run(SIZES[size], batch, dtype, arguments.remat or "none")
        run = apply_overrides(run, arguments.overrides)
        for part in dict.fromkeys(parts):
            jobs.say(f"{size} {part} ...")
            point = {"size": size, "part": part, "batch": batch, "tokens": run.net.num_tokens}
            job = {"run": to_json(run), "dtype": dtype, "batch": batch, "repeats": repeats}
            if part == TRAINING:
                point |= work(job | {"kind": "train", "steps": steps})
            elif any(name.startswith(f"{part} ") for name in wrong):
                point["status"] = "unchecked"
            else:
                form = FORMS[part]
                job |= {"kind": "generate", "form": dataclasses.asdict(form)}
                point |= floors(run.net, form, 2 * batch, dtype, peak or copy)
                point |= work(job)
            report["points"].append(point)
            text = markdown(report)
            jobs.say("    " + " ".join(map(str, row(report, point)[2:])))
            jobs.save(report, arguments.out, "aim", text)
    jobs.finish(report, arguments, "aim", text, picture)
    if wrong:
        raise UserError(f"{', '.join(wrong)}: the sampler's logits differ from teacher forcing")
    return report


def make_run(config: AiMConfig, batch: int, dtype: str, remat: str) -> Run:
    """The published training recipe (arXiv 2408.12245, section 4) with `batch` images a step."""
    return Run(
        net=config,
        data=CodeData(path="random"),
        optim=Optim(
            learning_rate=1e-4 * batch / 256, schedule="linear", final=0.0, warmup=0,
            weight_decay=0.05, b2=0.95, eps=1e-8, clip=1.0,
        ),
        precision=Precision(compute=dtype, remat=remat),
        batch_size=batch,
    )  # fmt: skip


def floors(
    config: AiMConfig, form: Form, rows: int, dtype: str, bandwidth: float | None
) -> dict[str, float]:
    """{"bytes": of a step of this form, "floor": seconds of all of them, "recurrent_floor": ..}.

    The recurrent floor is that of Mamba-2 with states in bfloat16 (or `dtype`, if wider).
    """
    width = 2 if dtype == "bfloat16" else 4
    plain = Form(state_dtype=dtype)
    total = lambda f: (
        weight_bytes(dataclasses.replace(config, mixer=f.mixer), width)
        + cache_bytes(config, f, rows, width)
    )
    out = {"bytes": total(form)}
    if bandwidth:
        out["floor"] = config.num_tokens * total(form) / bandwidth
        out["recurrent_floor"] = config.num_tokens * total(plain) / bandwidth
    return out
