"""The `lintime` command."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError

EXAMPLES = """\
examples:
  lintime train transformer_vq/quickstart                  train, evaluate and sample (minutes on a CPU)
  lintime train transformer_vq/quickstart data.path=my.txt --run runs/mine
  lintime train transformer_vq/enwik8 data.path=enwik8 mesh.fsdp=8 precision.compute=bfloat16
  lintime sample --run runs/mine sample.prompt="Once upon" sample.temperature=0.7
  lintime eval --run runs/mine --split test
  lintime bench
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 2 something the user can mend, 1 a bug)."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    from .launch import quiet

    quiet()
    try:
        arguments.command(arguments)
        sys.stdout.flush()
        return 0
    except UserError as error:
        if arguments.debug:
            raise
        print(f"lintime: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lintime: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


def _parser() -> argparse.ArgumentParser:
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog="lintime",
        description="Linear-time and compute-flexible generative models: train, evaluate, sample.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lintime {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    def add(name, function, text, epilog=""):
        sub = commands.add_parser(
            name, help=text.splitlines()[0], description=text, epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(command=function)
        return sub

    sub = add(
        "train", _train,
        "Train a config, then evaluate and sample it; the same command continues an interrupted run.",
        "A config is a name (lintime train --list) or your own .py file that defines `config`.\n"
        "Any field can be set: optim.learning_rate=3e-4 mesh.fsdp=8 (lintime train NAME --help-fields).",
    )  # fmt: skip
    sub.add_argument("config", nargs="?", help="e.g. transformer_vq/quickstart, or my_config.py")
    sub.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. steps=2000")
    sub.add_argument("--run", metavar="DIR", help="run directory (default runs/CONFIG)")
    sub.add_argument("--fresh", action="store_true", help="start a new numbered run")
    sub.add_argument("--list", action="store_true", help="list the configs and leave")
    sub.add_argument("--help-fields", action="store_true", help="list all fields and leave")
    sub.add_argument("--profile", metavar="A:B", help="write a trace of updates A..B to DIR/profile")
    sub.add_argument("--distributed", action="store_true", help="several processes, found by JAX")
    sub.add_argument("--coordinator", default="", metavar="HOST:PORT", help="process 0, by address")
    sub.add_argument("--processes", type=int, default=0, metavar="N")
    sub.add_argument("--process-index", type=int, default=-1, metavar="I")

    sub = add("eval", _eval, "Evaluate a run on a split of its data (or other data: data.path=...).")
    _run_arguments(sub)
    sub.add_argument("--split", default="validation", choices=["validation", "test"])
    sub.add_argument("--step", type=int, help="checkpoint step (default: the newest)")

    sub = add("sample", _sample, "Continue a prompt with a trained run, streaming to the terminal.",
              "Settings are the fields of `sample`: prompt, length, rows, temperature, top_k, top_p, stop.\n"
              'Example: lintime sample --run runs/mine sample.prompt="To be" sample.length=500')  # fmt: skip
    _run_arguments(sub)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--prompt", help="short for sample.prompt=...; - reads standard input")
    sub.add_argument("--step", type=int, help="checkpoint step (default: the newest)")

    sub = add("bench", _bench, "Training tokens/s and peak memory of dense and VQ attention over lengths.",
              "Every variant is checked against the reference path first. Writes a table and a PNG.")  # fmt: skip
    from .bench import add_arguments as bench_arguments

    bench_arguments(sub)

    sub = add("convert", _convert, "Convert checkpoints between layouts, or dense attention into VQ.")
    from .convert import add_arguments as convert_arguments

    convert_arguments(sub)
    return parser


def _run_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--run", metavar="DIR", required=True, help="run directory")
    sub.add_argument("overrides", nargs="*", metavar="field=value")


def _train(arguments: argparse.Namespace) -> None:
    from .config_files import list_configs, load_config, validate
    from .override import apply_overrides, list_fields

    if arguments.list:
        for name, line in list_configs():
            print(f"{name:32} {line}")
        return
    if arguments.config is None:
        raise UserError("name a config; `lintime train --list` shows them")
    run, name = load_config(arguments.config)
    run = apply_overrides(run, arguments.overrides)
    if arguments.help_fields:
        for path, kind, value in list_fields(run):
            print(f"{path:28} {kind:18} {value!r}")
        return
    validate(run)
    profile = _profile(arguments.profile)
    from .launch import join

    join(arguments.coordinator, arguments.processes, arguments.process_index, arguments.distributed)
    from .finish import finish
    from .loop import train

    run_dir = Path(arguments.run) if arguments.run else Path("runs") / name.replace("/", "-")
    if arguments.fresh:
        run_dir = _next_free(run_dir)
    result = train(run, run_dir, profile=profile)
    command = f"lintime train {arguments.config}"
    if arguments.overrides:
        command += " " + " ".join(arguments.overrides)
    finish(run, result, command if not arguments.run else f"{command} --run {run_dir}")


def _eval(arguments: argparse.Namespace) -> None:
    from .finish import evaluate_run

    evaluate_run(arguments.run, arguments.overrides, arguments.split, arguments.step)


def _sample(arguments: argparse.Namespace) -> None:
    from .load import load
    from .override import apply_overrides
    from .sample import sample_text

    loaded = load(arguments.run, step=arguments.step)
    overrides = list(arguments.overrides)
    run = apply_overrides(loaded.config, overrides)
    prompt = arguments.prompt
    if prompt is not None:
        prompt = sys.stdin.read() if prompt == "-" else prompt
        run = apply_overrides(run, [f"sample.prompt={prompt}"])
    sample_text(loaded, run.sample, seed=arguments.seed)


def _bench(arguments: argparse.Namespace) -> None:
    from .bench import bench

    bench(arguments)


def _convert(arguments: argparse.Namespace) -> None:
    from .convert import run_command

    run_command(arguments)


def _profile(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        first, last = (int(t) for t in text.split(":"))
        assert 0 <= first < last
    except (ValueError, AssertionError):
        raise UserError(f"--profile {text}: give two update numbers, e.g. --profile 10:15") from None
    return first, last


def _next_free(run_dir: Path) -> Path:
    number = 2
    candidate = run_dir
    while candidate.exists():
        candidate = run_dir.with_name(f"{run_dir.name}-{number}")
        number += 1
    return candidate


def _wrap(text: str) -> str:
    return textwrap.fill(text, 100)


if __name__ == "__main__":
    sys.exit(main())
