"""What the suites of `lintime bench` share: measurements in child processes, arguments, reports.

On an accelerator every measurement runs in a process of its own: a device's peak memory is that of
a process's whole life, and running out of memory should cost one cell only. The first process never
touches the device.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_atomic
from ..launch import child_environment, quiet

NECESSARY = ("device", "check")  # kinds of jobs without which there is no benchmark


def work(suite: str, job: dict[str, Any], isolate: bool) -> dict[str, Any]:
    """`SUITE.work(job)` of a module beside this one, here or in a child process.

    Args:
        suite: the module's name. job: a JSON object with its "kind"; "device" asks any suite for
            `timing.describe_device`. isolate: in a child process.

    Returns:
        A JSON object; that of a child that died has "status" "oom" or "error", and a "message".

    Raises:
        UserError: the child's, or a `NECESSARY` job's process died.
    """
    if not isolate:
        return _do(suite, job)
    child = subprocess.run(
        [sys.executable, "-m", f"{__package__}.jobs", suite],
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
    from .timing import is_out_of_memory

    tail = (child.stderr.strip().splitlines() or [f"status {child.returncode}"])[-1][:300]
    if job["kind"] in NECESSARY:
        sys.stderr.write(child.stderr[-4000:])
        raise UserError(f"the process of the {job['kind']} step failed: {tail}")
    killed = child.returncode == -9  # by the kernel, for the host's memory
    status = "oom" if killed or is_out_of_memory(child.stderr) else "error"
    return {"status": status, "message": tail}


def _do(suite: str, job: dict[str, Any]) -> dict[str, Any]:
    if job["kind"] == "device":
        from .timing import describe_device

        return describe_device()
    return importlib.import_module(f".{suite}", __package__).work(job)


def _child(suite: str) -> None:
    quiet()
    try:
        result = _do(suite, json.loads(sys.stdin.read()))
    except UserError as error:
        result = {"user_error": str(error)}
    print("\n" + json.dumps(result), flush=True)


def start(suite: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The device, and whether measurements get processes of their own: as told, or on an
    accelerator."""
    isolate = not only_cpu() if arguments.isolate is None else arguments.isolate
    device = work(suite, {"kind": "device"}, isolate)
    if arguments.isolate is None:
        isolate = isolate and device["platform"] != "cpu"
    return device, isolate


def only_cpu() -> bool:
    """Whether JAX was told to use the CPU alone, without starting a backend."""
    import jax

    return jax.config.jax_platforms == "cpu"


def whole(text: str, flag: str) -> int:
    """The whole number above 0 that an option names, or a UserError."""
    try:
        number = int(text.replace("_", ""))
        assert number > 0
    except (ValueError, AssertionError):
        raise UserError(f"{flag} {text}: expected a whole number above 0") from None
    return number


def chosen(words: list[str], flag: str, known: tuple[str, ...]) -> list[str]:
    """The names in an option's words, "a,b" or "a b", each once; a UserError if one is unknown."""
    names = [w for word in words for w in word.split(",") if w]
    for name in names:
        if name not in known:
            raise UserError(f"{flag} {name}: choose from {', '.join(known)}")
    return list(dict.fromkeys(names))


def new_report(device: dict[str, Any], command: str, devices: int = 1) -> dict[str, Any]:
    """What every report says: where, when and how; no checks and no points yet."""
    return {
        "device": device, "devices": devices, "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "command": command,
        "checks": {}, "points": [],
    }  # fmt: skip


def save(report: dict[str, Any], out: str | Path, stem: str, text: str) -> None:
    """Writes OUT/STEM.json and, with the tables `text`, OUT/STEM.md: after every measurement, so an
    interrupted benchmark leaves what it measured."""
    write_atomic(Path(out) / f"{stem}.json", json.dumps(report, indent=1) + "\n")
    write_atomic(Path(out) / f"{stem}.md", text + "\n")


def finish(
    report: dict[str, Any],
    arguments: argparse.Namespace,
    stem: str,
    text: str,
    picture: Callable[[dict[str, Any]], bytes] | None,
) -> None:
    """Draws the picture, if there is anything to draw, and prints tables or JSON."""
    if picture and any(point["status"] == "ok" for point in report["points"]):
        write_atomic(Path(arguments.out) / f"{stem}.png", picture(report))
    print(json.dumps(report, indent=1) if arguments.json else text, flush=True)
    say(f"written to {Path(arguments.out) / stem}.*")


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    _child(sys.argv[1])
