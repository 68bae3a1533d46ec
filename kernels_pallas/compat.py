"""The one place that knows how jax versions differ (0.10.2, 0.11.2 and 0.12 are supported).

Nothing else in the package looks at a jax version or at names that come and go between versions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh


def auto_mesh(
    shape: Sequence[int], names: Sequence[str], devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with axis types Auto (`jax.make_mesh` alone makes Explicit axes).

    Works for attached devices and for the described devices of a TPU topology. With several TPU
    slices the first axis runs over the slices.

    Args:
        shape: size of each axis.
        names: name of each axis.
        devices: the devices to use, exactly prod(shape) of them; None takes the first prod(shape).

    Raises:
        ValueError: the number of devices does not fit, or slices do not divide the first axis.
    """
    shape, names = tuple(shape), tuple(names)
    if len(shape) != len(names):
        raise ValueError(f"mesh shape {shape} and axis names {names} differ in length")
    size = math.prod(shape)
    if devices is None:
        available = jax.devices()
        if size > len(available):
            raise ValueError(f"mesh {shape} needs {size} devices, found {len(available)}")
        devices = available[:size]
    elif len(devices) != size:
        raise ValueError(f"mesh {shape} needs {size} devices, {len(devices)} were given")
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif shape[0] % slices:
        raise ValueError(
            f"{slices} slices do not divide the first mesh axis {names[0]}={shape[0]}; "
            f"make it a multiple of {slices}"
        )
    else:
        inner = (shape[0] // slices, *shape[1:])
        outer = (slices,) + (1,) * (len(shape) - 1)
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


# The jax from which on the GPU kernels have run on a GPU; before, they are only known to lower.
GPU_KERNELS_TRIED = jax.__version_info__ >= (0, 11)


def set_mesh(mesh: Mesh):
    """Context manager that makes `mesh` the current mesh: `with set_mesh(mesh): ...`."""
    return jax.set_mesh(mesh)


def enable_x64(on: bool = True):
    """Context manager that switches 64-bit types on or off: `with enable_x64(): ...`."""
    return jax.enable_x64(on)


def varying_axes(tree: Any) -> frozenset[str]:
    """Mesh axes of the surrounding `shard_map` over which any array of `tree` varies."""
    found = [jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)]
    return frozenset().union(*found)


def vary(tree: Any, like: Any) -> Any:
    """Mark every array of `tree` as varying over the mesh axes over which `like` varies.

    A kernel with its own gradient rule needs all operands to vary alike under `shard_map` with
    `check_vma=True`: the sum over devices of a replicated operand's gradient is then inserted here,
    by the transpose of this cast, and the kernel itself never sums over devices. Outside of a
    `shard_map` this is the identity.

    Args:
        tree: pytree of arrays.
        like: pytree of arrays, or a set of axis names.
    """
    wanted = frozenset(like) if isinstance(like, (set, frozenset)) else varying_axes(like)

    def cast(x):
        missing = wanted - varying_axes(x)
        return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(cast, tree)


def out_like(x: Any, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a kernel output that varies over the same mesh axes as the array `x`."""
    return jax.ShapeDtypeStruct(
        tuple(shape), dtype, manual_axis_type=jax.typeof(x).manual_axis_type
    )


def row_major(x: Any) -> Any:
    """x, kept in memory with its last axis fastest where a compiler would choose otherwise.

    XLA for GPUs turns the output of a matmul around, by a copy in float32, where a sum over its
    rows follows. Before jax 0.11 it is x itself: of an array on several devices the constraint
    would gather all of it on each.
    """
    if jax.__version_info__ < (0, 11):
        return x
    from jax.experimental.layout import Layout, with_layout_constraint

    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def interpret_mode(platform: str = "tpu") -> Any:
    """What to pass as `interpret=` to run a Pallas kernel of `platform` on any machine.

    Uninitialised memory reads as NaN. On jax 0.10.2 the TPU interpreter deadlocks under `shard_map`
    unless the environment variable NPROC exceeds the number of devices; tests/conftest.py sets it.

    Raises:
        NotImplementedError: this jax has no interpreter for that platform.
    """
    if platform == "tpu":
        from jax.experimental.pallas import tpu

        return tpu.InterpretParams()
    if platform == "gpu":
        from jax.experimental.pallas import mosaic_gpu

        if hasattr(mosaic_gpu, "InterpretGPUParams"):
            return mosaic_gpu.InterpretGPUParams()
    raise NotImplementedError(f"this jax has no Pallas interpreter for {platform}")


def gpu_kernel(
    body: Callable, *, out_type: Any, scratch_types: Any = (), cost_estimate: Any = None, **options
) -> Callable:
    """`plgpu.kernel` (Mosaic GPU), which lowers the same way on every supported version.

    Args:
        body: the kernel; takes input, output and scratch references.
        out_type: pytree of `ShapeDtypeStruct` (see `out_like`).
        scratch_types: scratch memory, as in Pallas.
        cost_estimate: `pl.CostEstimate`; dropped where this jax does not take one.
        options: grid, grid_names, cluster, cluster_names, num_threads, thread_name,
            compiler_params, interpret.
    """
    from jax.experimental.pallas import mosaic_gpu

    if cost_estimate is not None:
        if "cost_estimate" in inspect.signature(mosaic_gpu.kernel).parameters:
            options["cost_estimate"] = cost_estimate
    kernel = mosaic_gpu.kernel(body, out_type=out_type, scratch_types=scratch_types, **options)

    def run(*operands):
        with enable_x64(False):  # else indices of mixed widths meet in the kernel
            return kernel(*operands)

    return run


def gpu_kernel_in_place(
    body: Callable, *, out_type: Any, interpret: Any, compiler_params: Any, **mesh: Any
) -> Callable:
    """A Mosaic GPU kernel that changes some of its operands in place, if nobody else needs them.

    Args:
        body: the kernel; takes references to the changed operands, the others, and the outputs.
        out_type: tuple of `ShapeDtypeStruct` of the outputs.
        interpret, compiler_params: as for `gpu_kernel`.
        mesh: grid, grid_names, num_threads, thread_name.

    Returns:
        run(changed, *operands) -> (outputs, changed), `changed` a tuple of arrays. Not for vmap.
    """
    from jax.experimental import pallas
    from jax.experimental.pallas import mosaic_gpu

    kernel = pallas.kernel(
        body, out_type=out_type, mesh=mosaic_gpu.Mesh(**mesh), interpret=interpret,
        compiler_params=compiler_params,
    )  # fmt: skip

    def run(changed, *operands):
        with enable_x64(False):
            refs = [jax.new_ref(v) for v in changed]
            outputs = kernel(*refs, *operands)
            return tuple(outputs), tuple(jax.freeze(ref) for ref in refs)

    return run


def gpu_load(ref: Any, layout: Any) -> Any:
    """A piece of HBM straight into registers of a Mosaic GPU kernel, in `layout`."""
    from jax.experimental.pallas import mosaic_gpu

    index = inspect.signature(mosaic_gpu.load).parameters.get("idx")
    where = ((),) if index is not None and index.default is inspect.Parameter.empty else ()
    return mosaic_gpu.load(ref, *where, layout=layout, optimized=False)


def gpu_store(ref: Any, value: Any) -> None:
    """Registers to a piece of HBM, or of shared memory, however short, in a Mosaic GPU kernel."""
    from jax.experimental.pallas import mosaic_gpu

    if hasattr(mosaic_gpu, "store"):
        mosaic_gpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def jaxpr_eqns(jaxpr: Any) -> list:
    """Equations of a result of `jax.make_jaxpr`, of `traced.jaxpr`, or of an inner jaxpr."""
    return list(getattr(jaxpr, "jaxpr", jaxpr).eqns)


def all_eqns(jaxpr: Any) -> Iterator[Any]:
    """All equations of `jaxpr`, those of inner jaxprs (loops, calls, custom gradients) included."""
    for eqn in jaxpr_eqns(jaxpr):
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from all_eqns(inner)
