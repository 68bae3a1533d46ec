"""What a training step, the loop and the evaluation need to know of a system."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Hashable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ..checkpoint import restore_inference
from ..optimizers import make_optimizer
from ..schema import Run

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """Binds net, process and data kind of a run; a system derives its own from this.

    The functions of arrays (`init`, `loss`, `absorb`, `report`, `evaluate`) are pure.

    Attributes:
        run: the config.
        metric: name of the system's own metric, shown beside the loss.
        unit: what speed is counted in: "tokens", "images" or "videos".
        mode: which of `modes` the functions of arrays compute in.
        optional: top-level parts of `params` and `stats` that a checkpoint named by `init_from` may
            lack; they start new.
        sharded: top-level parts of `stats` that are cut over the mesh as parameters are.
    """

    run: Run
    mode: Hashable = None

    metric = "loss"
    unit = "images"
    optional: ClassVar[tuple[str, ...]] = ()
    sharded: ClassVar[tuple[str, ...]] = ()

    @property
    @abc.abstractmethod
    def net(self):
        """The Flax module that `init` makes variables for."""

    @property
    def dtype(self):
        """Of activations and matmuls."""
        return DTYPES[self.run.precision.compute]

    @property
    def units_per_update(self) -> int:
        """Tokens or images of one update over all processes."""
        return self.run.batch_size

    @property
    def modes(self) -> dict[Hashable, float]:
        """Modes of the training step and their shares of the updates; each is compiled once."""
        return {None: 1.0}

    def mode_at(self, step: int) -> Hashable:
        """The mode of an update, on the host: a pure function of the config and the step."""
        return None

    def in_mode(self, mode: Hashable) -> Task:
        """This task with its functions in another mode."""
        return dataclasses.replace(self, mode=mode)

    def optimizer(self) -> optax.GradientTransformation:
        """Updates of the parameters from their gradients."""
        return make_optimizer(self.run.optim, self.run.steps)

    @abc.abstractmethod
    def init(self, key: Array) -> dict[str, Any]:
        """{"params", "stats"} of a new model."""

    def abstract(self) -> dict[str, Any]:
        """{"params", "stats"} as far as inference needs them, as ShapeDtypeStructs."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def start_from(self, path: str, wanted: dict[str, Any]) -> dict[str, Any]:
        """{"params", "stats"} to begin training with, from another run or a converted checkpoint.

        Args:
            path: its directory. wanted: their shapes and shardings.

        Raises:
            UserError: nothing there, or weights of another model.
        """
        return restore_inference(path, wanted, optional=self.optional)

    def fixed_stats(self) -> dict[str, Any]:
        """Top-level parts of `stats` that never change and come from files, as NumPy arrays.

        They are read anew when a run continues, and are no part of its checkpoints.
        """
        return {}

    def frozen_flops(self) -> int:
        """FLOPs (2 per multiply-add) of the loss of an update that no gradient passes through."""
        return 0

    def init_carry(self, batch_size: int) -> Any:
        """Recurrent state between updates, batch on axis 1 of every leaf; {} if there is none."""
        return {}

    @abc.abstractmethod
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a training batch, without its "step"."""

    @abc.abstractmethod
    def loss(self, params, stats, carry, batch, key) -> tuple[Array, Array, Any, Any, dict]:
        """loss_sum, weight, stats_delta, carry, metrics of some rows of the batch.

        Sums, not means, so that micro-batches and devices add up exactly. `metrics` is
        {"sum": {...}, "mean": {...}}: sums add over micro-batches, means are averaged.
        """

    def absorb(self, stats, delta) -> Any:
        """New `stats` after an update; `delta` is the sum over the whole update."""
        return stats

    def report(self, sums: dict[str, Array]) -> dict[str, Array]:
        """Metrics per token, image, .. from the summed ones."""
        return {}

    @abc.abstractmethod
    def evaluate(self, params, stats, batch) -> dict[str, Array]:
        """Sums over one validation batch, rows that are not valid left out; no dropout."""

    @abc.abstractmethod
    def validation(self, sums: dict[str, Array]) -> dict[str, Array]:
        """{"loss", ...} from the sums of `evaluate` over all batches."""

    @abc.abstractmethod
    def check_data(self, data) -> None:
        """Whether the net fits the data that was opened.

        Raises:
            UserError: it does not, with what to set.
        """

    def yardstick(self, data, batches: int) -> dict[str, float]:
        """Figures of a simple method on the validation data, for comparison; {} if there is none.

        Args:
            data: the validation split. batches: how many of its batches count; 0 = all.
        """
        return {}
