"""Compile for a TPU topology on a machine without a TPU: the helper that the `aot` tests share.

    pytestmark = MARKS
    compiled = compile_for("v5e:2x2", step, state, batch, mesh_shape={"data": 4}, in_shardings=...)
    assert memory_report(compiled)["peak"] < 2**30

and lower for an NVIDIA GPU on a machine without one (neither ptxas nor a run: tracing and layouts
are checked, no more):

    assert "mosaic_gpu" in lower_for_cuda(f, x)

Trust the memory figures and out-of-memory errors; never `cost_analysis()` of a whole program, which
counts loop bodies once. The environment libtpu needs is set in tests/conftest.py.
"""

import contextlib
import importlib.util

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec as P,
)

from lintime.kernels_pallas.compat import auto_mesh, set_mesh

# Kinds of chip that every kernel is compiled for, one chip each: compile_for("v5e", ...).
# The second Python of .ci/run compiles for the first only.
CHIPS = ("v5e", *(pytest.param(chip, marks=pytest.mark.slow) for chip in ("v5p", "v6e")))
_HOSTS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}  # libtpu describes whole hosts

MARKS = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: uv run --extra aot ... (Linux on x86-64 only)",
    ),
    pytest.mark.skipif(
        jax.config.jax_platforms != "cpu",
        reason="compiling for a described TPU needs JAX_PLATFORMS=cpu",
    ),
]


def topology_devices(topology: str) -> list:
    """Described devices of a topology.

    Args:
        topology: such as "v5e:4x4", "v5p:2x2x2", "v5e:16x16*2" (two slices), or a name of `CHIPS`
            for a single chip.
    """
    if topology in _HOSTS:
        return topology_devices(_HOSTS[topology])[:1]
    name, _, slices = topology.partition("*")
    options = {"num_slices": int(slices)} if slices else {}
    if name.startswith("v4"):
        options["chip_config_name"] = "megacore"  # one device per chip, as on real v4
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def topology_mesh(topology: str, mesh_shape: dict[str, int] | None = None) -> Mesh:
    """Mesh over the devices of a topology: {axis name: size}, by default one axis "data"."""
    devices = topology_devices(topology)
    mesh_shape = mesh_shape or {"data": len(devices)}
    return auto_mesh(tuple(mesh_shape.values()), tuple(mesh_shape), devices)


def compile_for(
    topology: str,
    fn,
    *args,
    mesh_shape: dict[str, int] | None = None,
    in_shardings=P(),
    out_shardings=None,
    donate_argnums=(),
    compiler_options: dict[str, str] | None = None,
):
    """Compile `fn(*args)` for a TPU topology under a mesh of its devices.

    Args:
        topology: see `topology_devices`.
        fn: a function, not yet jitted. Constraints by bare PartitionSpecs refer to the mesh.
        args: pytrees of arrays or `ShapeDtypeStruct`s; only shapes and dtypes are used.
        mesh_shape: {axis name: size}; by default {"data": number of devices}.
        in_shardings: PartitionSpecs, one or a tuple of pytree prefixes as for `jax.jit`; by
            default everything is replicated.
        out_shardings: the same for the outputs; None leaves them to XLA.
        donate_argnums: as for `jax.jit`; see "alias" of `memory_report`.
        compiler_options: e.g. {"xla_tpu_scoped_vmem_limit_kib": "32768"}.

    Returns:
        The `jax.stages.Compiled` (it cannot be run here).

    Raises:
        jax.errors.JaxRuntimeError: it does not compile, or exceeds the chip's memory.
    """
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    mesh = topology_mesh(topology, mesh_shape)
    place = lambda tree: jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), tree, is_leaf=lambda leaf: isinstance(leaf, P)
    )
    options = {"in_shardings": place(in_shardings), "donate_argnums": donate_argnums}
    if out_shardings is not None:
        options["out_shardings"] = place(out_shardings)
    with set_mesh(mesh):  # no eager operation may run in here: the devices are only described
        lowered = jax.jit(fn, **options).trace(*abstract).lower()
        return lowered.compile(compiler_options=compiler_options)


def memory_report(compiled) -> dict[str, int]:
    """Bytes per device: peak, arguments, outputs, temporaries, and alias (donated and reused)."""
    memory = compiled.memory_analysis()
    return {
        "peak": memory.peak_memory_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
    }


@contextlib.contextmanager
def cuda_device(kind: str = "NVIDIA H200"):
    """While it is open, what is traced is meant for this GPU (`dispatch.current_device`).

    No eager operation may run in here: the device is only described.
    """
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def lower_for_cuda(fn, *args, kind: str = "NVIDIA H200") -> str:
    """StableHLO text of `fn(*args)` lowered for CUDA; a Pallas kernel shows as "mosaic_gpu".

    Args:
        fn: a function, not yet jitted.
        args: pytrees of arrays or `ShapeDtypeStruct`s; only shapes and dtypes are used.
        kind: device kind, in jax's words.
    """
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    with cuda_device(kind):
        return jax.jit(fn).trace(*abstract).lower(lowering_platforms=("cuda",)).as_text()
