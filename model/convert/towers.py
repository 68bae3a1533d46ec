"""What the published layouts of text and image encoders share: layers by number there, stacked on
axis 0 here, and matrices (out, in) there and (in, out) here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .names import array_module

# Of a layer: (path here, name there or names of what stands side by side here).
Table = Sequence[tuple[str, str | tuple[str, ...]]]


def stack_layers(flat: Mapping[str, Any], pattern: str, table: Table, n_layer: int) -> dict:
    """{path: array with the layers on axis 0} of names `pattern.format(layer, name)`.

    Matrices are transposed; the arrays of several names are joined along their last axis.
    """
    xp = array_module(flat.values())
    there = lambda i, name: transposed(flat[pattern.format(i, name)])

    def layer(i: int, names: str | tuple[str, ...]):
        if isinstance(names, str):
            return there(i, names)
        return xp.concatenate([there(i, name) for name in names], axis=-1)

    return {path: xp.stack([layer(i, names) for i in range(n_layer)]) for path, names in table}


def unstack_layers(stacked: Mapping[str, Any], pattern: str, table: Table) -> dict[str, Any]:
    """Inverse of `stack_layers`."""
    flat = {}
    for path, names in table:
        names = (names,) if isinstance(names, str) else names
        xp = array_module([stacked[path]])
        for i in range(stacked[path].shape[0]):
            parts = xp.split(stacked[path][i], len(names), axis=-1)
            for name, part in zip(names, parts, strict=True):
                flat[pattern.format(i, name)] = transposed(part)
    return flat


def transposed(array: Any) -> Any:
    """A matrix the other way round; anything else as it is."""
    return array.T if array.ndim == 2 else array


def pick(published: Mapping[str, Any], what: str, **known: Any) -> None:
    """Refuses values of config.json that are not built here: each name has the one that is.

    Raises:
        ValueError: names the setting, its value and the one that is supported.
    """
    for name, value in known.items():
        if published.get(name, value) != value:
            raise ValueError(
                f"the config.json of {what} has {name}={published[name]}; only {value} is supported"
            )
