"""The `lintime bench` command: the options of its suites, and which suite runs."""

from __future__ import annotations

import argparse
import importlib
import shlex
from typing import Any

from ..errors import UserError
from .jobs import whole

SUITES = {
    "training": "attention",
    "ssm": "ssm",
    "aim": "aim",
    "dit": "dit",
    "pom": "pom",
}  # and their modules
# Options by the suites that have them; the others (--out, --json) are for all.
OPTIONS = {
    "training": (
        "lengths", "variants", "head", "tokens", "steps", "warmup", "remat", "overrides", "devices",
        "op", "original", "isolate",
    ),
    "ssm": ("ops", "variants", "steps"),
    "aim": ("sizes", "batch", "only", "repeats", "steps", "remat", "overrides", "isolate"),
    "dit": ("sizes", "batch", "only", "repeats", "steps", "remat", "overrides", "isolate"),
    "pom": (
        "lengths", "variants", "degrees", "masks", "sizes", "tokens", "only", "steps", "overrides",
        "isolate",
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lintime bench` to its (sub)parser."""
    add = parser.add_argument
    add(
        "suite",
        nargs="?",
        default="training",
        choices=tuple(SUITES),
        help="training steps (default); ssm: state-space cores (--ops, --steps, --variants); aim: "
        "images, sampled and trained on (--sizes, --batch, --only, --repeats, --steps, --remat); "
        "dit: the same of diffusion, and FlexiDiT; pom: polynomial mixer, op, layer and model "
        "(--only, --lengths, --degrees, --masks, --variants, --steps)",
    )
    add("--ops", nargs="+", metavar="OP", default=[], help="ssm: which ops (default all)")
    add("--lengths", nargs="+", metavar="T", default=[],
        help="sequence lengths (accelerator: 2048 8192 32768; CPU: 64 256)")  # fmt: skip
    add("--variants", nargs="+", metavar="V", default=[],
        help="of dense-flash, vq-serial, vq-associative, vq-matmul, dense (default: without the "
        "last)")  # fmt: skip
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
    add("--sizes", nargs="+", metavar="SIZE", default=[],
        help="aim: of b, l, xl, tiny; dit: the same (CPU: tiny); pom: pixels of its models "
        "(256 512 1024 2048)")  # fmt: skip
    add("--batch", metavar="N",
        help="aim: images at a time (64; CPU: 2); dit: of an update (256; CPU: 4)")  # fmt: skip
    add("--only", nargs="+", metavar="PART", default=[],
        help="aim: of recurrent, recurrent-float32, dual, attention, training, generation; dit: of "
        "training, sampling, flexible (default: all); pom: of op, layer, model (default: the first "
        "two)")  # fmt: skip
    add("--degrees", nargs="+", metavar="K", default=[], help="pom: of the polynomials (2 3 4 5)")
    add(
        "--masks", nargs="+", metavar="MASK", default=[], help="pom: of none, causal (default both)"
    )
    add("--repeats", metavar="N", help="aim, dit: timed batches of images (default 3)")
    add("--out", default="runs/bench", metavar="DIR",
        help="for bench.md, .json, .png (or ssm.*, aim.*, dit.*, pom.*, op.*)")  # fmt: skip
    add("--json", action="store_true", help="print the JSON instead of the tables")


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the suite that the arguments name.

    Raises:
        UserError: see `bench` of the suite; or an option of another suite.
    """
    other = {name for names in OPTIONS.values() for name in names}
    other -= set(OPTIONS[arguments.suite])
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    for action in parser._actions:
        if action.dest in other and getattr(arguments, action.dest) != action.default:
            raise UserError(f"{action.option_strings[0]} does not apply to bench {arguments.suite}")
    suite = importlib.import_module(f".{SUITES[arguments.suite]}", __package__)
    steps = whole(arguments.steps or "10", "--steps")
    return suite.bench(arguments, command_line(arguments), steps)


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
