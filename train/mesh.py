"""The device mesh, where state and batches live on it, and which rows a process must read."""

from __future__ import annotations

import math
from collections.abc import Collection

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..kernels_pallas.compat import auto_mesh
from ..model.partition import ACTIVATION_AXES, MESH_AXES, parameter_shardings
from .errors import UserError
from .schema import Mesh, Run
from .state import TrainState

ROWS = PartitionSpec(ACTIVATION_AXES["batch"])


def make_mesh(config: Mesh, devices=None) -> jax.sharding.Mesh:
    """A mesh with axes data, fsdp, tensor, sequence over `devices` (all by default).

    Raises:
        UserError: when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, name) for name in MESH_AXES]
    fixed = math.prod(s for s in sizes if s != -1)
    text = " ".join(f"mesh.{n}={s}" for n, s in zip(MESH_AXES, sizes))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"{text}: sizes are positive, and at most one of them -1 (what remains)")
    if -1 in sizes:
        if len(devices) % fixed:
            raise UserError(f"{text} does not divide the {len(devices)} devices; change a size")
        sizes[sizes.index(-1)] = len(devices) // fixed
    elif fixed != len(devices):
        raise UserError(
            f"{text} needs {fixed} devices, there are {len(devices)}; set one size to -1"
        )
    return auto_mesh(sizes, MESH_AXES, devices)


def check_batch(run: Run, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError unless rows divide by micro-batches and by the data and fsdp axes."""
    cut = math.prod(mesh.shape[a] for a in ACTIVATION_AXES["batch"])
    need = cut * run.optim.accumulate
    if run.batch_size % need:
        near = max(need, round(run.batch_size / need) * need)
        raise UserError(
            f"batch_size={run.batch_size} is not divisible by {cut} (mesh.data x mesh.fsdp) x "
            f"{run.optim.accumulate} (optim.accumulate); set batch_size={near}"
        )


def state_shardings(
    state: TrainState, mesh: jax.sharding.Mesh, sharded: Collection[str] = ()
) -> TrainState:
    """Shardings for an abstract TrainState: parameters and their moments by rule, carry by rows.

    Args:
        sharded: parts of `stats` that are laid out as parameters; the others are whole everywhere.
    """
    everywhere = lambda tree: jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)
    by_row = NamedSharding(mesh, PartitionSpec(None, ACTIVATION_AXES["batch"]))
    return TrainState(
        step=NamedSharding(mesh, PartitionSpec()),
        params=parameter_shardings(state.params, mesh),
        opt=parameter_shardings(state.opt, mesh),
        ema=parameter_shardings(state.ema, mesh),
        stats={
            name: parameter_shardings(tree, mesh) if name in sharded else everywhere(tree)
            for name, tree in state.stats.items()
        },
        carry=jax.tree.map(lambda _: by_row, state.carry),
    )


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
    """Rows of the global batch that this process's devices hold, ascending."""
    index_map = NamedSharding(mesh, ROWS).addressable_devices_indices_map((batch_size,))
    rows = {r for (index,) in index_map.values() for r in range(*index.indices(batch_size))}
    return np.array(sorted(rows), np.int64)


def put_batch(batch: dict, step: int, mesh: jax.sharding.Mesh, batch_size: int) -> dict:
    """Global device arrays from this process's rows (in the order of `local_rows`), and the
    step.
    """
    position = {int(r): i for i, r in enumerate(local_rows(mesh, batch_size))}
    sharding = NamedSharding(mesh, ROWS)

    def place(local):
        def piece(index):
            rows = range(*index[0].indices(batch_size))
            return local[[position[r] for r in rows]]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, piece)

    out = {name: place(array) for name, array in batch.items()}
    everywhere = NamedSharding(mesh, PartitionSpec())
    number = np.asarray(step, np.int32)
    return out | {"step": jax.make_array_from_callback((), everywhere, lambda _: number)}


class OnDevicesOf:
    """Weights, whole on every device that holds a part of given arrays.

    A call takes an array and returns the weights for computing on it, placed once per mesh.
    """

    def __init__(self, params):
        self.params, self._placed = params, {}

    def __call__(self, array):
        sharding = getattr(array, "sharding", None)
        if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
            return self.params
        if sharding.mesh not in self._placed:
            whole = NamedSharding(sharding.mesh, PartitionSpec())
            self._placed[sharding.mesh] = jax.device_put(self.params, whole)
        return self._placed[sharding.mesh]
