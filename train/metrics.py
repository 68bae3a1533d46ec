"""Speed figures of a run."""

from __future__ import annotations

import time

import jax

from . import flops
from .schema import Run


class Clock:
    """Tokens or images per second, seconds per update and model FLOPs utilisation, averaged since
    the last `restart`.

    Validation and saving are left out (`pause`), and so is the first update, which compiles.

    Attributes:
        unit, per_update: "tokens" or "images", and how many an update has over all processes.
        flops: model FLOPs of one update (3 x forward, no recomputation); None where the device's
            peak is unknown, and then no utilisation is reported.
    """

    def __init__(self, task, run: Run, mesh):
        self.unit, self.per_update = task.unit, task.units_per_update
        self.devices = list(mesh.devices.flat)
        self.flops = None
        if flops.peak_flops(self.devices[0]) is not None:
            with jax.set_mesh(mesh):
                self.flops = 3 * forward_flops(task, run) - 2 * task.frozen_flops()
        self.pause()

    def pause(self) -> None:
        """The next update is not timed."""
        self._last, self._seconds, self._updates = None, 0.0, 0

    def restart(self) -> None:
        """Average anew from here."""
        self._seconds, self._updates = 0.0, 0

    def tick(self) -> dict[str, float]:
        """Call after each update; {} until there is something to report."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds += now - self._last
            self._updates += 1
        self._last = now
        if not self._updates:
            return {}
        seconds = self._seconds / self._updates
        out = {f"{self.unit}_per_s": self.per_update / seconds, "step_time": seconds}
        if self.flops is not None:
            out["mfu"] = flops.mfu(self.flops, seconds, self.devices)
        return out


def forward_flops(task, run: Run) -> int:
    """FLOPs (2 per multiply-add) of the loss of one update over the whole batch, counted from the
    jaxpr; the average over the task's modes.
    """
    each = {mode: _forward_flops(task.in_mode(mode), run) for mode in task.modes}
    return round(sum(share * each[mode] for mode, share in task.modes.items()))


def _forward_flops(task, run: Run) -> int:
    batch = task.abstract_batch() | {"step": jax.ShapeDtypeStruct((), "int32")}
    variables = jax.eval_shape(task.init, jax.random.key(0))
    carry = jax.eval_shape(lambda: task.init_carry(run.batch_size))
    loss = lambda p, s, c, b: task.loss(p, s, c, b, jax.random.key(0))[0]
    return flops.count_flops(loss, variables["params"], variables["stats"], carry, batch)
