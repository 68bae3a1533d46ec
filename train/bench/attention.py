"""`lintime bench training`: tokens/s and peak memory of dense and VQ attention over lengths.

Every variant is first checked against the reference path; one that fails is not timed. Then the
whole training step (loss, gradients, clipping, AdamW, codebook update) is compiled and timed, at a
constant number of tokens per step.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ...model.nets.transformer_vq import TransformerVQConfig
from ..config_files import from_json, to_json
from ..errors import UserError
from ..override import apply_overrides
from ..schema import Data, Optim, Precision, Run
from ..validate import validate
from . import jobs
from .report import ORIGINAL, markdown, parts_markdown, picture

VARIANTS = {
    "dense-flash": {"attention": "flash"},
    "vq-serial": {"attention": "vq", "reduction": "serial"},
    "vq-associative": {"attention": "vq", "reduction": "associative"},
    "vq-matmul": {"attention": "vq", "reduction": "matmul"},
    "dense": {"attention": "dense"},
}
ALIASES = {"flash": "dense-flash", "vq-scan": "vq-associative"}
DEFAULT_VARIANTS = ("dense-flash", "vq-serial", "vq-associative", "vq-matmul")
TAKEN = {
    "net.attention": "--variants", "net.reduction": "--variants", "net.head_type": "--head",
    "data.sequence_len": "--lengths", "data.update_len": "--lengths", "batch_size": "--tokens",
    "steps": "--steps", "precision.remat": "--remat",
}  # fmt: skip


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement in this process; jobs and results are JSON objects."""
    from . import attention_measure as measure

    if job["kind"] == "check":
        return {v: _check(measure, from_json(run)) for v, run in job["runs"].items()}
    run = from_json(job["run"])
    if job["kind"] == "parts":
        return measure.time_parts(run, job["steps"], job["warmup"])
    return measure.time_steps(run, job["steps"], job["warmup"], job["devices"], job["alone"])


def _check(measure, run: Run) -> dict[str, Any]:
    import jax

    try:
        return measure.check(run)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        return {"ok": False, "errors": {}, "message": " ".join(str(error).split())[:300]}


def bench(arguments: argparse.Namespace, command: str, steps: int) -> dict[str, Any]:
    """Measure whole training steps; prints and writes the report, and returns it.

    Args:
        arguments: lengths, variants, .., out and json. command: for the report.
        steps: timed training steps.

    Raises:
        UserError: bad arguments; or a variant's check failed (the others' figures are still shown).
    """
    stem = "op" if arguments.op else "bench"
    variants = _variants(arguments.variants)
    words = [word for text in arguments.lengths for word in text.split(",") if word]
    lengths = [jobs.whole(word, "--lengths") for word in words]
    warmup = jobs.whole(arguments.warmup or "3", "--warmup")
    devices = jobs.whole(arguments.devices or "1", "--devices")
    tokens = arguments.tokens and jobs.whole(arguments.tokens, "--tokens")
    _check_choices(arguments)

    device, isolate = jobs.start("attention", arguments)
    work = lambda job: jobs.work("attention", job, isolate)
    accelerator = device["platform"] != "cpu"
    if devices > device["count"]:
        raise UserError(f"--devices {devices}: this machine has {device['count']}; choose fewer")
    lengths = sorted(set(lengths)) or ([2048, 8192, 32768] if accelerator else [64, 256])
    tokens = tokens or (65536 if accelerator else 512)
    base = base_run(accelerator, arguments.head, arguments.remat)
    base = apply_overrides(base, arguments.overrides)
    runs = {(v, n): configure(base, v, n, tokens) for v in variants for n in lengths}
    for run in runs.values():
        validate(run)

    report = jobs.new_report(device, command, devices) | {
        "settings": _settings(base, tokens),
        "config": to_json(base), "tokens": tokens, "steps": steps, "warmup": warmup,
        "isolated": isolate, "lengths": lengths, "variants": variants, "original": None,
    }  # fmt: skip
    if not arguments.op:
        report["settings"] += f"; median of {steps} steps after {warmup}"
    if any(v == "dense-flash" for v in variants) and not _fused(device, base):
        report["settings"] += "; dense-flash runs unfused here (fused: GPU and bfloat16)"
    if arguments.original:
        report["original"] = _original(arguments, device, devices, base, tokens)

    jobs.say(f"{device['kind']}: checking {', '.join(variants)} against the reference ...")
    checks = {v: to_json(runs[v, lengths[0]]) for v in variants}
    report["checks"] = work({"kind": "check", "runs": checks})
    for number, ((variant, length), run) in enumerate(runs.items()):
        point = {"variant": variant, "length": length, "rows": run.batch_size}
        if report["checks"][variant]["ok"]:
            at = f"[{number + 1}/{len(runs)}]"
            jobs.say(f"{at} {variant}, {run.batch_size} x {length} tokens ...")
            point |= work(
                {"kind": "parts" if arguments.op else "steps", "run": to_json(run), "steps": steps,
                 "warmup": warmup, "devices": devices, "alone": isolate}
            )  # fmt: skip
            jobs.say("    " + _one_line(point))
        else:
            point["status"] = "unchecked"
        report["points"].append(point)
        text = parts_markdown(report) if arguments.op else markdown(report)
        jobs.save(report, arguments.out, stem, text)
    jobs.finish(report, arguments, stem, text, None if arguments.op else picture)
    failed = [v for v in variants if not report["checks"][v]["ok"]]
    if failed:
        raise UserError(
            f"{', '.join(failed)}: the result differs from the reference path, so there is no "
            "timing; please report the table of checks with the device and the command"
        )
    return report


def base_run(accelerator: bool, head: str, remat: str | None = None) -> Run:
    """The configuration measured, before variant and length are set.

    On an accelerator Transformer-VQ's throughput configuration with 12 layers: bfloat16, dropout
    of the position table 0.1 and no other, AdamW 4e-4, clipping 0.1, warm-up of 10 updates; each
    layer is recomputed in the backward pass (remat "full"). On a CPU a tiny relative of it.
    """
    sizes = {"n_layer": 12}
    if not accelerator:
        sizes = dict(n_layer=2, d_model=64, d_k=32, n_code=16, block_len=16, mem_len=16)
    compute, policy = ("bfloat16", "full") if accelerator else ("float32", "none")
    return Run(
        net=TransformerVQConfig(head_type=head, dropout_sin=0.1, **sizes),
        data=Data(sequence_len=2048 if accelerator else 64),
        optim=Optim(learning_rate=4e-4, warmup=10, clip=0.1),
        precision=Precision(compute=compute, remat=remat or policy),
    )


def configure(base: Run, variant: str, length: int, tokens: int) -> Run:
    """`base` as one variant at one length, in steps of `tokens` tokens but at least one row."""
    return dataclasses.replace(
        base,
        net=dataclasses.replace(base.net, **VARIANTS[variant]),
        data=dataclasses.replace(base.data, sequence_len=length, update_len=0),
        batch_size=max(1, tokens // length),
    )


# ---------------------------------------------------------------- arguments


def _variants(words: list[str]) -> list[str]:
    names = [ALIASES.get(w, w) for word in words for w in word.split(",") if w]
    return jobs.chosen(names, "--variants", tuple(VARIANTS)) or list(DEFAULT_VARIANTS)


def _check_choices(arguments: argparse.Namespace) -> None:
    if arguments.head not in ("shga", "mqa", "mha"):
        raise UserError(f"--head {arguments.head}: choose shga, mqa or mha")
    if arguments.remat not in (None, "none", "full", "dots"):
        raise UserError(f"--remat {arguments.remat}: choose none, full or dots")
    for override in arguments.overrides:
        field = override.partition("=")[0].strip()
        if field in TAKEN:
            raise UserError(f"--set {field}: use {TAKEN[field]} instead")


# ---------------------------------------------------------------- report


def _original(arguments, device, devices, base, tokens) -> dict | None:
    standard = base == base_run(True, arguments.head) and tokens == 65536 and devices == 1
    if standard and "H200" in device["kind"] and arguments.head in ORIGINAL:
        return ORIGINAL[arguments.head]
    jobs.say("--original: these figures hold for one H200 at the defaults, shga or mha; left out")
    return None


def _fused(device: dict, base: Run) -> bool:
    return device["platform"] == "gpu" and base.precision.compute == "bfloat16"


def _settings(base: Run, tokens: int) -> str:
    net = base.net
    return (
        f"{net.n_layer} layers, d_model {net.d_model}, d_k {net.d_k}, {net.n_code} codes, block "
        f"{net.block_len}, {net.head_type.upper()}, {tokens:,} tokens a step, "
        f"{base.precision.compute}, remat {base.precision.remat}, {base.optim.name}"
    )


def _one_line(point: dict[str, Any]) -> str:
    if point["status"] != "ok":
        return f"{point['status']}: {point.get('message', '')}"
    if "parts" in point:
        time = lambda ms: "OOM" if ms is None else f"{ms:.2f}"
        texts = [f"{k} {'/'.join(map(time, p.values()))}" for k, p in point["parts"].items()]
        return f"{', '.join(texts)} ms"
    return f"{point['median_ms']:.1f} ms/step, {point['tokens_per_s']:,.0f} tokens/s"
