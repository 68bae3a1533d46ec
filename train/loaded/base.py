"""What every loaded run has: config, net and weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ..schema import Run
from ..tasks.table import make_task


class LoadedRun:
    """The weights of a run and what is needed to use them.

    Attributes:
        config: the `Run` it was trained with. net: the Flax module.
        params, stats: weights (the moving average where the run keeps one) and codebooks.
        step: update of the checkpoint. path: run directory, or None.
        data_fingerprint: of the training data, {} if unknown.
    """

    def __init__(
        self,
        config: Run,
        params: Any,
        stats: Any,
        *,
        step: int = 0,
        path: Path | None = None,
        data_fingerprint: dict | None = None,
    ):
        self.config, self.params, self.stats = config, params, stats
        self.step, self.path = step, path
        self.data_fingerprint = data_fingerprint or {}
        self.net = make_task(config).net
        self._jitted: dict = {}

    def __repr__(self) -> str:
        n = sum(a.size for a in jax.tree.leaves(self.params))
        name = type(self).__name__
        return f"{name}({str(self.path)!r}, step={self.step}, {n / 1e6:.2f}M parameters)"

    @property
    def variables(self) -> dict[str, Any]:
        """{"params", "stats"}, as `net.apply` and the samplers take them."""
        return {"params": self.params, "stats": self.stats}

    def _cached(self, make: Callable, **options):
        """Each sampler is made, and so compiled, once."""
        name = (make, *sorted(options.items()))
        if name not in self._jitted:
            self._jitted[name] = make(self.net, **options)
        return self._jitted[name]
