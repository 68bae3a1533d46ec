"""Which implementation of an op runs where: one table; explicit choices are obeyed or refused.

Implementations are "reference" (the definition), "xla", and the Pallas kernels "pallas_tpu" and
"pallas_gpu"; "pallas" names whichever of the two belongs to the device. On a CPU the two run in
Pallas' interpreter, which is for tests: it is slow and shows what the kernel computes.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import AxisType

from . import compat

# op -> {pattern of "platform:device kind": implementations there, the one for None first}. The
# first matching pattern counts. "platform" is cpu, gpu or tpu; the device kind is jax's own name.
_HOPPER = ("pallas_gpu", "xla", "reference")
_EVERYWHERE = {
    "cpu:*": ("xla", "reference", "pallas_tpu", "pallas_gpu"),
    "tpu:*": ("xla", "reference", "pallas_tpu"),
    "gpu:NVIDIA H*": _HOPPER,
    "gpu:NVIDIA GH*": _HOPPER,  # Grace Hopper
    "*": ("xla", "reference"),
}
_GPU_KERNEL = {
    "cpu:*": ("xla", "reference", "pallas_gpu"),
    "gpu:NVIDIA H*": _HOPPER,
    "gpu:NVIDIA GH*": _HOPPER,
    "*": ("xla", "reference"),
}
IMPLEMENTATIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "vq_attention": {"*": ("xla", "reference")},
    "linear_scan": _EVERYWHERE,
    "causal_conv1d": _EVERYWHERE,
    "selective_scan": _EVERYWHERE,
    "ssd": _EVERYWHERE,
    "poly_mix": _EVERYWHERE,
    "ssd_decode": _GPU_KERNEL,
}

# What None does not give a kernel: mostly padding it would be, or more than a grid takes.
FEW_STEPS, FEW_CHANNELS, MANY_ROWS = 8, 64, 65535


def current_device() -> str:
    """The device that the computation being traced is meant for, as "platform:device kind".

    That is the device of the current mesh (which may be the described mesh of a TPU topology), else
    `jax.default_device`, else jax's first device. `implementation=` overrides what follows from it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None) or jax.config.jax_default_device
    if device is None:
        device = jax.devices()[0]
    elif isinstance(device, str):  # "cpu" or "cpu:1"
        device = jax.devices(device.partition(":")[0])[0]
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    return f"{platform}:{device.device_kind}"


def interpret(platform: str) -> Any:
    """What to pass as `interpret=` to a Pallas kernel made for `platform` ("tpu" or "gpu").

    False on that platform; elsewhere the interpreter (see `compat.interpret_mode`).
    """
    return False if current_device().startswith(platform) else compat.interpret_mode(platform)


def must_be_split(x: Any) -> bool:
    """Whether the compiler has to split operations on x over devices, which it cannot for kernels.

    That is so on a mesh of several devices, unless inside a `shard_map` over all of it, and for
    arrays with sharded types. The mesh must be the current one (`set_mesh`), or of x's type.
    """
    meshes = [jax.sharding.get_abstract_mesh()]
    if x is not None:
        meshes.append(jax.typeof(x).sharding.mesh)
    split = lambda size, kind: kind == AxisType.Explicit or size > 1 and kind == AxisType.Auto
    return any(
        split(size, kind)
        for mesh in meshes
        for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )


def _gives_kernels(x: Any, channels: int | None) -> bool:
    """Whether None may give a kernel to operands like x [B, T, ...]; see `resolve`."""
    if must_be_split(x) or not compat.GPU_KERNELS_TRIED:
        return False
    if x is not None and (x.shape[1] < FEW_STEPS or x.shape[0] > MANY_ROWS):
        return False
    return channels is None or channels >= FEW_CHANNELS


def resolve(
    op: str,
    implementation: str | None,
    available: Collection[str],
    *,
    unable: Mapping[str, str | None] = MappingProxyType({}),
    x: Any = None,
    channels: int | None = None,
    device: str | None = None,
    table: Mapping[str, Mapping[str, tuple[str, ...]]] = IMPLEMENTATIONS,
) -> str:
    """Name of the implementation to run.

    Args:
        op: name of the op, a key of `table`.
        implementation: None takes the first of the table's row that is available; a name is obeyed
            or refused, never replaced.
        available: implementations the op has at all (names, or a mapping with the names as keys).
        unable: what an implementation does not take of the operands at hand, None for nothing;
            None passes over such an implementation.
        x: an operand [B, T, ...]. None gives no kernel to rows that are too short (`FEW_STEPS`) or
            too many (`MANY_ROWS`), nor where the compiler would have to split it.
        channels: how many lie side by side; None gives no kernel to less than `FEW_CHANNELS`.
        device: "platform:device kind"; None means `current_device()`.
        table: see `IMPLEMENTATIONS`.

    Raises:
        ValueError: no such implementation for this op, device and operands; says what there is.
    """
    device = current_device() if device is None else device
    row = next((names for key, names in table[op].items() if fnmatchcase(device, key)), ())
    here = [name for name in row if name in available]
    if implementation == "pallas" and f"pallas_{device[:3]}" in here:
        implementation = f"pallas_{device[:3]}"
    if implementation is None:
        kernels = _gives_kernels(x, channels)
        able = [
            name for name in here
            if not unable.get(name) and (kernels or not name.startswith("pallas"))
        ]  # fmt: skip
        if able:
            return able[0]
    elif implementation in here:
        if unable.get(implementation):
            raise ValueError(
                f'{op}: {implementation} does not take {unable[implementation]}; use "xla"'
            )
        return implementation
    choices = ", ".join(repr(name) for name in here) or "nothing"
    reason = "exists, but not for this device" if implementation in available else "does not exist"
    wanted = "no implementation" if implementation is None else f"implementation={implementation!r}"
    raise ValueError(
        f"{op}: {wanted} {'exists' if implementation is None else reason} on {device!r}; "
        f"there is {choices} (None picks the best)"
    )


def compiled_once(*static: int):
    """Decorator of a function that runs GPU kernels: jit, so that a net's many layers of one shape
    share one trace, lowering and compilation of each kernel (seconds apiece), looped or not.

    Args:
        static: positions of arguments that are no arrays.
    """

    def wrap(function):
        @functools.partial(jax.jit, static_argnums=(0, *(i + 1 for i in static)))
        def run(interpreted, *args):
            del interpreted  # another program: in the cache's key
            return function(*args)

        @functools.wraps(function)
        def call(*args):
            return run(bool(interpret("gpu")), *args)

        return call

    return wrap
