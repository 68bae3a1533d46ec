"""What happens to the operands of a linear scan before an implementation sees them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from ..compat import vary
from ..time_axis import fill_invalid, spread
from .pairs import Parts, accumulator


def unable(state: Parts) -> dict[str, str | None]:
    """What which implementation does not take of prepared operands, as `dispatch.resolve` wants."""
    return {"pallas_gpu": "float64" if state[0].dtype == jnp.float64 else None}


def prepare(
    a: Any, x: Any, state: Any, resets: Array | None, lengths: Array | None
) -> tuple[Parts, Parts, Parts]:
    """a, x and state as tuples of parts that vary alike, checked, resets and padding worked in.

    A reset becomes a = 0; padding becomes a = 1 and x = 0, a step that changes nothing.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    paired = isinstance(x, (tuple, list))
    a, x = _parts("a", a, paired), _parts("x", x, paired)
    if x[0].ndim != 3 or 0 in x[0].shape:
        raise ValueError(f"x has shape {x[0].shape}, expected [B, T, D], none of them 0")
    batch, t_len, width = x[0].shape
    acc = accumulator(*a, *x)
    if state is None:
        state = (jnp.zeros((batch, width), acc),) * len(x)
    else:
        state = tuple(part.astype(acc) for part in _parts("state", state, paired))
    for name, arrays, shape in (
        ("a", a, x[0].shape),
        ("x", x, x[0].shape),
        ("state", state, (batch, width)),
        ("resets", () if resets is None else (resets,), (batch, t_len)),
        ("lengths", () if lengths is None else (lengths,), (batch,)),
    ):
        for array in arrays:
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    if resets is not None:
        a = tuple(jnp.where(spread(resets, part), 0, part) for part in a)
    if lengths is not None:
        a = tuple(fill_invalid(part, lengths, 1 - i) for i, part in enumerate(a))
        x = tuple(fill_invalid(part, lengths) for part in x)
    return vary((a, x, state), (a, x, state))


def _parts(name: str, value: Any, paired: bool) -> Parts:
    """(re, im) or (re,), all of one real floating-point dtype."""
    if isinstance(value, (tuple, list)) != paired or (paired and len(value) != 2):
        wanted = "a pair (re, im), as x is one" if paired else "an array, as x is one"
        raise ValueError(f"{name} is a {type(value).__name__}, expected {wanted}")
    parts = tuple(jnp.asarray(part) for part in (value if paired else (value,)))
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1 or not jnp.issubdtype(parts[0].dtype, jnp.floating):
        found = " and ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(f"{name} is {found}, expected one real floating-point dtype")
    return parts
