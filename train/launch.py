"""Process start: backend settings, several processes, signals."""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from .errors import UserError


def quiet() -> None:
    """Silence start-up chatter of libraries; real warnings of this package stay."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import logging

    for name in ("absl", "orbax", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="orbax")


def program() -> list[str]:
    """The words that start this program again: under `uv run` it is not on the user's PATH."""
    return ["uv", "run", "lintime"] if "UV" in os.environ else ["lintime"]


def child_environment(defaults: dict[str, str]) -> dict[str, str]:
    """The environment of a child process: this one's, and `defaults` where it says nothing."""
    return defaults | os.environ


def join(
    coordinator: str = "", processes: int = 0, index: int = -1, distributed: bool = False
) -> None:
    """Join a multi-process run before the first use of a device.

    Args:
        coordinator: host:port of process 0, with `processes` and `index`; or
        distributed: let JAX find the others (TPU pods, SLURM, Kubernetes set the needed variables).

    Raises:
        UserError: incomplete addresses, or the others could not be reached.
    """
    if not coordinator and not distributed:
        return
    if coordinator and (processes < 1 or not 0 <= index < processes):
        raise UserError(
            "--coordinator needs --processes N and --process-index I, 0 <= I < N, on every process"
        )
    arguments = {}
    if coordinator:
        arguments = dict(coordinator_address=coordinator, num_processes=processes, process_id=index)
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error


def agree(flag: bool, how: Callable = all) -> bool:
    """`how` (all, any) of the flags of all processes, the same answer in each."""
    if jax.process_count() == 1:
        return bool(flag)
    return bool(how(multihost_utils.process_allgather(np.array([bool(flag)])).ravel().tolist()))


class StopRequest:
    """Set by the first SIGTERM or Ctrl-C; a second one acts as usual."""

    def __init__(self):
        self.signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While active, SIGTERM and SIGINT only set the yielded StopRequest (main thread only)."""
    request, before = StopRequest(), {}

    def note(number, _frame):
        request.signal = signal.Signals(number).name
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread (a notebook kernel's worker): nothing to install
        pass
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
