"""`lintime bench`: training tokens/s and peak memory of dense and VQ attention over lengths.

Every variant is first checked against the reference path; one that fails is not timed. Then the
whole training step (loss, gradients, clipping, AdamW, codebook update) is compiled and timed, at a
constant number of tokens per step. On an accelerator every measurement runs in a process of its
own: a device's peak memory is that of a process's whole life, and running out of memory should cost
one cell only. The first process never touches the device.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from ...model.nets.transformer_vq import TransformerVQConfig
from ..config_files import from_json, to_json
from ..errors import UserError
from ..files import write_atomic
from ..launch import child_environment
from ..override import apply_overrides
from ..schema import Data, Optim, Precision, Run
from ..validate import validate
from .report import ORIGINAL, markdown, parts_markdown, picture

VARIANTS = {
    "dense-flash": {"attention": "flash"},
    "vq-serial": {"attention": "vq", "reduction": "serial"},
    "vq-associative": {"attention": "vq", "reduction": "associative"},
    "vq-matmul": {"attention": "vq", "reduction": "matmul"},
    "dense": {"attention": "dense"},
}
SUITES = ("training", "ssm", "aim", "dit")
ALIASES = {"flash": "dense-flash", "vq-scan": "vq-associative"}
DEFAULT_VARIANTS = ("dense-flash", "vq-serial", "vq-associative", "vq-matmul")
# Options by the suites that have them; the others (--out, --json) are for all.
OPTIONS = {
    "training": (
        "lengths", "variants", "head", "tokens", "steps", "warmup", "remat", "overrides", "devices",
        "op", "original", "isolate",
    ),
    "ssm": ("ops", "variants", "steps"),
    "aim": ("sizes", "batch", "only", "repeats", "steps", "remat", "overrides", "isolate"),
    "dit": ("sizes", "batch", "only", "repeats", "steps", "remat", "overrides", "isolate"),
}  # fmt: skip
TAKEN = {
    "net.attention": "--variants", "net.reduction": "--variants", "net.head_type": "--head",
    "data.sequence_len": "--lengths", "data.update_len": "--lengths", "batch_size": "--tokens",
    "steps": "--steps", "precision.remat": "--remat",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lintime bench` to its (sub)parser."""
    from . import aim as bench_aim

    add = parser.add_argument
    add(
        "suite",
        nargs="?",
        default="training",
        choices=SUITES,
        help="training steps (default); ssm: state-space cores (--ops, --steps, --variants); aim: "
        "images, sampled and trained on (--sizes, --batch, --only, --repeats, --steps, --remat); "
        "dit: the same of diffusion, and FlexiDiT",
    )
    add("--ops", nargs="+", metavar="OP", default=[], help="ssm: which ops (default all)")
    add("--lengths", nargs="+", metavar="T", default=[],
        help="sequence lengths (accelerator: 2048 8192 32768; CPU: 64 256)")  # fmt: skip
    add("--variants", nargs="+", metavar="V", default=[],
        help=f"of {', '.join(VARIANTS)} (default: all but dense)")  # fmt: skip
    add("--head", default="shga", metavar="TYPE", help="head type: shga, mqa or mha")
    add("--tokens", metavar="N",
        help="tokens per step, at least one row (accelerator: 65536; CPU: 512)")  # fmt: skip
    add("--steps", metavar="N", help="timed steps (default 10)")
    add("--warmup", metavar="N", help="steps before these (default 3)")
    add("--remat", metavar="POLICY", help="none, full or dots (accelerator: full; CPU: none)")
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", dest="overrides",
        help="change the configuration, e.g. net.n_layer=24")  # fmt: skip
    add("--devices", metavar="N", help="devices, rows split over them (default 1)")
    add("--op", action="store_true",
        help="time the parts of one attention sublayer instead of training steps")  # fmt: skip
    add("--original", action="store_true",
        help="show the original JAX code's figures besides (H200 at the defaults)")  # fmt: skip
    add("--isolate", action=argparse.BooleanOptionalAction, default=None,
        help="one process per measurement (default: on an accelerator)")  # fmt: skip
    bench_aim.add_arguments(parser)
    add("--out", default="runs/bench", metavar="DIR",
        help="for bench.md, .json, .png (or ssm.*, aim.*, dit.*, op.*)")  # fmt: skip
    add("--json", action="store_true", help="print the JSON instead of the tables")


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the suite that the arguments name.

    Raises:
        UserError: see `bench_training`, `bench_ssm.bench`, `bench_aim.bench`, `bench_dit.bench`;
            or an option of another suite.
    """
    other = {name for names in OPTIONS.values() for name in names}
    other -= set(OPTIONS[arguments.suite])
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    for action in parser._actions:
        if action.dest in other and getattr(arguments, action.dest) != action.default:
            raise UserError(f"{action.option_strings[0]} does not apply to bench {arguments.suite}")
    if arguments.suite == "training":
        return bench_training(arguments)
    from . import aim as bench_aim
    from . import dit as bench_dit
    from . import ssm as bench_ssm

    suite = {"ssm": bench_ssm, "aim": bench_aim, "dit": bench_dit}[arguments.suite]
    steps = _whole(arguments.steps or "10", "--steps")
    return suite.bench(arguments, command_line(arguments), steps)


def bench_training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure whole training steps; prints and writes the report, and returns it.

    Tables and JSON are written after every measurement, so an interrupted benchmark leaves them.

    Raises:
        UserError: bad arguments; or a variant's check failed (the others' figures are still shown).
    """
    variants = _variants(arguments.variants)
    lengths = [_whole(t, "--lengths") for text in arguments.lengths for t in text.split(",") if t]
    steps = _whole(arguments.steps or "10", "--steps")
    warmup = _whole(arguments.warmup or "3", "--warmup")
    devices = _whole(arguments.devices or "1", "--devices")
    tokens = arguments.tokens and _whole(arguments.tokens, "--tokens")
    _check_choices(arguments)

    isolate = arguments.isolate
    if isolate is None and _only_cpu():
        isolate = False
    device = _work({"kind": "device"}, isolate is not False)
    accelerator = device["platform"] != "cpu"
    isolate = accelerator if isolate is None else isolate
    if devices > device["count"]:
        raise UserError(f"--devices {devices}: this machine has {device['count']}; choose fewer")
    lengths = sorted(set(lengths)) or ([2048, 8192, 32768] if accelerator else [64, 256])
    tokens = tokens or (65536 if accelerator else 512)
    base = base_run(accelerator, arguments.head, arguments.remat)
    base = apply_overrides(base, arguments.overrides)
    runs = {(v, n): configure(base, v, n, tokens) for v in variants for n in lengths}
    for run in runs.values():
        validate(run)

    report = {
        "device": device, "devices": devices, "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command_line(arguments), "settings": _settings(base, tokens),
        "config": to_json(base), "tokens": tokens, "steps": steps, "warmup": warmup,
        "isolated": isolate, "lengths": lengths, "variants": variants, "original": None,
        "checks": {}, "points": [],
    }  # fmt: skip
    if not arguments.op:
        report["settings"] += f"; median of {steps} steps after {warmup}"
    if any(v == "dense-flash" for v in variants) and not _fused(device, base):
        report["settings"] += "; dense-flash runs unfused here (fused: GPU and bfloat16)"
    if arguments.original:
        report["original"] = _original(arguments, device, devices, base, tokens)

    _say(f"{device['kind']}: checking {', '.join(variants)} against the reference ...")
    checks = {v: to_json(runs[v, lengths[0]]) for v in variants}
    report["checks"] = _work({"kind": "check", "runs": checks}, isolate)
    for number, ((variant, length), run) in enumerate(runs.items()):
        point = {"variant": variant, "length": length, "rows": run.batch_size}
        if report["checks"][variant]["ok"]:
            _say(f"[{number + 1}/{len(runs)}] {variant}, {run.batch_size} x {length} tokens ...")
            point |= _work(
                {"kind": "parts" if arguments.op else "steps", "run": to_json(run), "steps": steps,
                 "warmup": warmup, "devices": devices, "alone": isolate}, isolate,
            )  # fmt: skip
            _say("    " + _one_line(point))
        else:
            point["status"] = "unchecked"
        report["points"].append(point)
        text = _write(report, Path(arguments.out), arguments.op)
    if not arguments.op:
        write_atomic(Path(arguments.out) / "bench.png", picture(report))
    print(json.dumps(report, indent=1) if arguments.json else text, flush=True)
    _say(f"written to {Path(arguments.out) / ('op' if arguments.op else 'bench')}.*")
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


def command_line(arguments: argparse.Namespace) -> str:
    """The command that gives these arguments, options at their defaults left out."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    words = ["lintime", "bench"]
    for action in parser._actions:
        value = getattr(arguments, action.dest)
        if value == action.default or action.dest == "out":
            continue
        if not action.option_strings:
            words.append(value)
            continue
        if isinstance(value, bool):
            words.append(action.option_strings[0 if value else -1])
        else:
            values = value if isinstance(value, list) else [value]
            words += [action.option_strings[0], *map(str, values)]
    return shlex.join(words)


# ---------------------------------------------------------------- work, here or in a child


def _do(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement in this process; jobs and results are JSON objects."""
    from . import attention_measure as measure

    if job["kind"] == "device":
        return measure.describe_device()
    if job["kind"].startswith("aim-"):
        from . import aim as bench_aim

        return bench_aim.work(job)
    if job["kind"].startswith("dit-"):
        from . import dit as bench_dit

        return bench_dit.work(job)
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


def _work(job: dict[str, Any], isolate: bool) -> dict[str, Any]:
    if not isolate:
        return _do(job)
    child = subprocess.run(
        [sys.executable, "-m", f"{__package__}.attention", "--child"],
        input=json.dumps(job), capture_output=True, text=True,
        # alone on the device; of a pool of 75% the half may be missing in one piece
        env=child_environment({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}),
    )  # fmt: skip
    lines = child.stdout.splitlines()
    if child.returncode == 0 and lines:
        result = json.loads(lines[-1])
        if "user_error" in result:
            raise UserError(result["user_error"])
        return result
    from .attention_measure import is_out_of_memory

    tail = (child.stderr.strip().splitlines() or [f"status {child.returncode}"])[-1][:300]
    if job["kind"] in ("device", "check"):
        sys.stderr.write(child.stderr[-4000:])
        raise UserError(f"the process of the {job['kind']} step failed: {tail}")
    killed = child.returncode == -9  # by the kernel, for the host's memory
    status = "oom" if killed or is_out_of_memory(child.stderr) else "error"
    return {"status": status, "message": tail}


def _child() -> None:
    from ..launch import quiet

    quiet()
    try:
        result = _do(json.loads(sys.stdin.read()))
    except UserError as error:
        result = {"user_error": str(error)}
    print("\n" + json.dumps(result), flush=True)


# ---------------------------------------------------------------- arguments


def _only_cpu() -> bool:
    """Whether JAX was told to use the CPU alone, without starting a backend."""
    import jax

    return jax.config.jax_platforms == "cpu"


def _whole(text: str, flag: str) -> int:
    try:
        number = int(text.replace("_", ""))
        assert number > 0
    except (ValueError, AssertionError):
        raise UserError(f"{flag} {text}: expected a whole number above 0") from None
    return number


def _variants(words: list[str]) -> list[str]:
    names = [w for word in words for w in word.split(",") if w]
    names = [ALIASES.get(n, n) for n in names] or list(DEFAULT_VARIANTS)
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"--variants {name}: choose from {', '.join(VARIANTS)}")
    return list(dict.fromkeys(names))


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
    _say("--original: these figures hold for one H200 at the defaults, shga or mha; left out")
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


def _write(report: dict[str, Any], out: Path, op: bool) -> str:
    """Write tables and JSON of the report so far; returns the tables."""
    text, stem = (parts_markdown(report), "op") if op else (markdown(report), "bench")
    write_atomic(out / f"{stem}.json", json.dumps(report, indent=1) + "\n")
    write_atomic(out / f"{stem}.md", text + "\n")
    return text


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _one_line(point: dict[str, Any]) -> str:
    if point["status"] != "ok":
        return f"{point['status']}: {point.get('message', '')}"
    if "parts" in point:
        time = lambda ms: "OOM" if ms is None else f"{ms:.2f}"
        texts = [f"{k} {'/'.join(map(time, p.values()))}" for k, p in point["parts"].items()]
        return f"{', '.join(texts)} ms"
    return f"{point['median_ms']:.1f} ms/step, {point['tokens_per_s']:,.0f} tokens/s"


def _main() -> int:
    """What `python -m` of this module runs: `lintime bench`, and its child processes."""
    if sys.argv[1:] == ["--child"]:
        _child()
        return 0
    parser = argparse.ArgumentParser(prog="lintime bench", description=__doc__.splitlines()[0])
    add_arguments(parser)
    try:
        bench(parser.parse_args())
    except UserError as error:
        print(f"lintime: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main())
