"""The `lintime` command."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .errors import UserError

EXAMPLES = """\
examples:
  lintime train transformer_vq/quickstart              train, evaluate, sample (minutes on a CPU)
  lintime train transformer_vq/quickstart data.path=my.txt --run runs/mine
  lintime train transformer_vq/enwik8 data.path=enwik8 mesh.fsdp=8 precision.compute=bfloat16
  lintime sample --run runs/mine sample.prompt="Once upon" sample.temperature=0.7
  lintime train aim/quickstart                         images by class
  lintime sample --run runs/aim-quickstart sample.classes=3,8 sample.files=true
  lintime eval --run runs/mine --split test
  lintime prepare codes IMAGES --tokenizer RUN --out codes
  lintime prepare latents IMAGES --autoencoder DIR --out latents
  lintime prepare text IMAGES --encoder DIR --out text
  lintime distill runs/dit --mixer pom --out runs/dit-pom
  lintime bench
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 2 something the user can mend, 1 a bug)."""
    arguments = _parse(argv)
    from .launch import quiet

    quiet()
    if not arguments.debug:
        _one_voice()
    try:
        arguments.command(arguments)
        sys.stdout.flush()
        return 0
    except UserError as error:
        if arguments.debug:
            raise
        return _complain(error)
    except KeyboardInterrupt:
        print("lintime: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lintime ... | head`: nobody reads on, nor need the interpreter flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if arguments.debug or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        from .files import write_error

        return _complain(write_error(error, error.filename or "the output"))


def _complain(error: UserError) -> int:
    print(f"lintime: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _one_voice() -> None:
    """A failed save is told once, by its UserError, not by every writer of the libraries."""
    for name in ("absl", "asyncio", "orbax"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


class _Parser(argparse.ArgumentParser):
    """Errors take one line, like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"lintime: {message}; see `{self.prog} --help`\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of a command; field=value words may stand before, between and after its options."""
    arguments, rest = _parser().parse_known_args(argv)
    unknown = [a for a in rest if a.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        arguments.parser.error(f"unknown argument {unknown[0]}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> _Parser:
    from .. import __version__

    parser = _Parser(
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
        sub.set_defaults(command=function, parser=sub)
        return sub

    sub = add(
        "train", _train,
        "Train a config, then evaluate and sample it. The same command continues a run.",
        "A config is a name (lintime train --list) or your own .py file that defines `config`.\n"
        "Any field can be set: optim.learning_rate=3e-4 mesh.fsdp=8. All, with values:\n"
        "  lintime train transformer_vq/quickstart --help-fields\n"
        "Example: lintime train transformer_vq/quickstart data.path=my.txt --run runs/mine",
    )  # fmt: skip
    sub.add_argument("config", nargs="?", help="e.g. transformer_vq/quickstart, or my_config.py")
    sub.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. steps=2000")
    sub.add_argument("--run", metavar="DIR", help="run directory (default runs/CONFIG)")
    sub.add_argument("--fresh", action="store_true", help="start a new numbered run")
    sub.add_argument("--list", action="store_true", help="list the configs and leave")
    sub.add_argument("--help-fields", action="store_true", help="list all fields and leave")
    sub.add_argument("--profile", metavar="A:B", help="trace updates A..B to DIR/profile")
    _process_arguments(sub)

    sub = add(
        "eval", _eval,
        "Evaluate a run on a split of its data (or other data: data.path=...).",
        "Settings are the fields of `data`, `eval`, `mesh`, `precision` and `sample`, and\n"
        "batch_size. Examples, the whole split, and FID of 50,000 images:\n"
        "  lintime eval --run runs/mine --split test eval.batches=0\n"
        "  lintime eval --run runs/aim eval.samples=50000 eval.inception=FILE eval.reference=FILE",
    )  # fmt: skip
    _run_arguments(sub)
    sub.add_argument("--split", default="validation", choices=["validation", "test"])
    sub.add_argument(
        "--clip", metavar="DIR", help="short for eval.clip=DIR: published CLIP weights, for the "
        "CLIP score of eval.samples images drawn by text",
    )  # fmt: skip
    sub.add_argument("--step", type=int, help="checkpoint step (default: the newest)")

    sub = add(
        "sample", _sample,
        "Draw from a trained run: text to the terminal, images to PNG files.",
        "Settings are the fields of `sample`. Text: prompt, length, rows, temperature, top_k,\n"
        "top_p, stop. Images: classes, count, guidance, rows, columns, files, npz, and of codes\n"
        "schedule, temperature, top_k, top_p, of diffusion method, steps, guidance_channels,\n"
        "guidance_interval, eta, clip, with several patch sizes budgets, weak, guide,\n"
        "weak_guidance.\n"
        "Where a vocabulary, tokenizer or autoencoder has moved: data.vocab=FILE,\n"
        "data.tokenizer=DIR, data.autoencoder=DIR, data.text_encoder=DIR.\n"
        'Examples: lintime sample --run runs/mine --prompt "To be" sample.length=500\n'
        "          lintime sample --run runs/aim sample.classes=207,360 sample.guidance=4\n"
        "          lintime sample --run runs/flexidit --budget 1,0.6\n"
        '          lintime sample --run runs/dit-text256 --text "a dog" --text "a cat"',
    )  # fmt: skip
    _run_arguments(sub)
    sub.add_argument("--seed", type=int, help="the same seed draws the same (default: 0)")
    sub.add_argument("--prompt", help="short for sample.prompt=...; - reads standard input")
    sub.add_argument(
        "--budget", metavar="B", help="short for sample.budgets=B: share of the full compute, of a "
        "net of several patch sizes; 1,0.6 draws both beside each other",
    )  # fmt: skip
    sub.add_argument(
        "--text", metavar="PROMPT", action="append", default=[],
        help="what an image is to show, of a net that reads a text; may be given several times",
    )  # fmt: skip
    sub.add_argument("--text-file", metavar="FILE", help="prompts, one in a line")
    sub.add_argument("--text-encoder", metavar="DIR", help="short for data.text_encoder=DIR")
    sub.add_argument("--step", type=int, help="checkpoint step (default: the newest)")

    sub = add(
        "bench", _bench,
        "Training tokens/s and peak memory of dense and VQ attention over lengths.",
        "Every variant is checked against the reference path first. Writes a table and a PNG.\n"
        "Example: lintime bench --lengths 2048 8192 --variants dense-flash vq-serial",
    )  # fmt: skip
    from .bench.command import add_arguments as bench_arguments

    bench_arguments(sub)

    sub = add("prepare", _prepare, "Encode images or their captions once, to train on.")
    from .prepare.command import add_arguments as prepare_arguments

    prepare_arguments(sub)

    sub = add("convert", _convert, "Published checkpoints to runs and back; dense attention to VQ.")
    from .convert.command import add_arguments as convert_arguments

    convert_arguments(sub)

    sub = add("flexify", _flexify, "Turn a trained DiT into one that takes several patch sizes.")
    from .convert.flexify import add_arguments as flexify_arguments

    flexify_arguments(sub)

    sub = add(
        "distill", _distill,
        "Replace the attention of a trained DiT, and train what replaces it to do the same.",
    )  # fmt: skip
    from .convert.distill import add_arguments as distill_arguments

    distill_arguments(sub)
    _process_arguments(sub)
    return parser


def _process_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--distributed", action="store_true", help="several processes, found by JAX")
    sub.add_argument("--coordinator", default="", metavar="HOST:PORT", help="process 0, by address")
    sub.add_argument("--processes", type=int, default=0, metavar="N", help="with --coordinator")
    sub.add_argument("--process-index", type=int, default=-1, metavar="I", help="0 .. N-1")


def _run_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--run", metavar="DIR", required=True, help="run directory")
    sub.add_argument("overrides", nargs="*", metavar="field=value")


def _train(arguments: argparse.Namespace) -> None:
    from .config_files import list_configs, load_config
    from .override import apply_overrides, list_fields
    from .validate import check_overrides, validate

    if arguments.list:
        for name, line in list_configs():
            print(f"{name:32} {line}")
        return
    if arguments.config is None:
        raise UserError("name a config; `lintime train --list` shows them")
    if "=" in arguments.config:
        raise UserError(f"name a config before {arguments.config} (lintime train --list)")
    run, name = load_config(arguments.config)
    run = apply_overrides(run, arguments.overrides)
    if arguments.help_fields:
        for path, kind, value in list_fields(run):
            print(f"{path:28} {kind:18} {value!r}")
        return
    validate(run)
    check_overrides(run, arguments.overrides)
    profile = _profile(arguments.profile)
    from .launch import join, program

    join(arguments.coordinator, arguments.processes, arguments.process_index, arguments.distributed)
    from .finish import finish
    from .loop import train

    run_dir = Path(arguments.run) if arguments.run else Path("runs") / name.replace("/", "-")
    if arguments.fresh:
        run_dir = _next_free(run_dir)
    result = train(run, run_dir, profile=profile)
    words = [*program(), "train", arguments.config, *arguments.overrides]
    words += ["--distributed"] if arguments.distributed else []
    # --run last: the printed commands are made by inserting before it
    words += ["--run", str(run_dir)] if arguments.run or arguments.fresh else []
    finish(run, result, words)


def _eval(arguments: argparse.Namespace) -> None:
    from .finish import evaluate_run

    evaluate_run(
        arguments.run, arguments.overrides, arguments.split, arguments.step, arguments.clip
    )


def _sample(arguments: argparse.Namespace) -> None:
    from .finish import sample_run

    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    overrides = arguments.overrides + ([] if prompt is None else [f"sample.prompt={prompt}"])
    if arguments.text_encoder is not None:
        overrides.append(f"data.text_encoder={arguments.text_encoder}")
    text = [*arguments.text, *_lines(arguments.text_file)]
    sample_run(arguments.run, overrides, arguments.seed, arguments.step, arguments.budget, text)


def _lines(file: str | None) -> list[str]:
    """The lines of a file that are not empty; none without a file.

    Raises:
        UserError: it cannot be read, or has no such line.
    """
    if file is None:
        return []
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--text-file {file} cannot be read ({error})") from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError(f"--text-file {file} is empty; write a prompt in every line")
    return lines


def _bench(arguments: argparse.Namespace) -> None:
    from .bench.command import bench

    bench(arguments)


def _convert(arguments: argparse.Namespace) -> None:
    from .convert.command import run_command

    run_command(arguments)


def _flexify(arguments: argparse.Namespace) -> None:
    from .convert.flexify import run_command

    run_command(arguments)


def _distill(arguments: argparse.Namespace) -> None:
    from .convert.distill import run_command

    run_command(arguments)


def _prepare(arguments: argparse.Namespace) -> None:
    from .prepare.command import run_command

    run_command(arguments)


def _profile(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        first, last = (int(t) for t in text.split(":"))
        assert 0 <= first < last
    except (ValueError, AssertionError):
        raise UserError(f"--profile {text}: give two updates, e.g. --profile 10:15") from None
    return first, last


def _next_free(run_dir: Path) -> Path:
    number = 2
    candidate = run_dir
    while candidate.exists():
        candidate = run_dir.with_name(f"{run_dir.name}-{number}")
        number += 1
    return candidate


if __name__ == "__main__":
    sys.exit(main())
