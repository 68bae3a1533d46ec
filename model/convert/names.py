"""Parameter trees as flat dictionaries of names joined by "/", checked strictly."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

Flat = Mapping[str, Any]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as {"a/b/c": leaf}."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    join = lambda name: f"{prefix}/{name}" if prefix else str(name)
    return {
        path: leaf for name, sub in tree.items() for path, leaf in flatten(sub, join(name)).items()
    }


def nest(flat: Flat) -> dict[str, Any]:
    """Inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return tree


def below(flat: Flat, prefix: str) -> dict[str, Any]:
    """The entries under `prefix`, without it."""
    return {n[len(prefix) :]: a for n, a in flat.items() if n.startswith(prefix)}


def array_module(arrays: Iterable[Any]) -> ModuleType:
    """numpy if every array is a numpy array (nothing goes to a device), else jax.numpy."""
    return np if all(isinstance(a, np.ndarray | np.generic) for a in arrays) else jnp


def shape_of(flat: Flat, name: str, ndim: int) -> tuple[int, ...]:
    """Shape of one array.

    Raises:
        ValueError: it is missing or has another number of axes.
    """
    if name not in flat:
        raise ValueError(f"missing {name}; names found: {', '.join(sorted(flat)[:6]) or 'none'}")
    shape = tuple(flat[name].shape)
    if len(shape) != ndim:
        raise ValueError(f"{name} has shape {shape}, expected {ndim} axes")
    return shape


def count_of(flat: Flat, pattern: str) -> int:
    """How many numbers the pattern's group takes.

    Raises:
        ValueError: they are not 0, 1, 2 ...
    """
    found = {int(m[1]) for name in flat if (m := re.match(pattern, name))}
    if found != set(range(len(found))):
        raise ValueError(f"{pattern} is numbered {sorted(found)}: there are gaps")
    return len(found)


def check_names(flat: Flat, expected: Iterable[str]) -> None:
    """Raises ValueError naming all missing and all unknown names."""
    expected = set(expected)
    missing, unknown = sorted(expected - set(flat)), sorted(set(flat) - expected)
    faults = [f"missing {', '.join(missing)}"] if missing else []
    faults += [f"unknown {', '.join(unknown)}"] if unknown else []
    if faults:
        raise ValueError("; ".join(faults))


def check_shapes(flat: Flat, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError naming missing and unknown names, or all arrays of another shape."""
    check_names(flat, expected)
    wrong = [
        f"{name} has shape {tuple(flat[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if tuple(flat[name].shape) != shape
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
