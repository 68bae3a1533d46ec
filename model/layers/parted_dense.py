"""A dense layer whose output comes in parts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ...kernels_pallas.compat import vary


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dot_parts(x, kernel, bias, ends):
    """x kernel + bias, columns cut at `ends` into arrays of their own; bias may be None."""
    parts = tuple(jnp.dot(x, part) for part in jnp.split(kernel, ends, axis=-1))
    if bias is None:
        return parts
    return tuple(y + b for y, b in zip(parts, jnp.split(bias, ends), strict=True))


def _dot_parts_bwd(ends, operands, parts):
    del ends
    *operands, bias = operands
    _, pull = jax.vjp(jnp.dot, *operands)
    dy = jnp.concatenate(parts, axis=-1)
    if bias is None:
        return *pull(dy), None
    # of the parts: of all in one array the sums would put it together once more
    zero, axes = np.zeros((), dy.dtype), tuple(range(dy.ndim - 1))
    return *pull(dy), jnp.concatenate([lax.reduce(y, zero, lax.add, axes) for y in parts])


_dot_parts.defvjp(
    lambda x, kernel, bias, ends: (_dot_parts(x, kernel, bias, ends), (x, kernel, bias)),
    _dot_parts_bwd,
)


class PartedDense(nn.Module):
    """x W (+ b) as arrays of some columns each: kernels that read them need no copies.

    Parameters, `kernel` [d, sum] and `bias` [sum], and gradients are those of one `nn.Dense`.

    Attributes:
        widths: columns of the parts.
        use_bias, kernel_init, dtype: as in `nn.Dense`.
    """

    widths: tuple[int, ...]
    use_bias: bool
    kernel_init: Callable
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, whole: bool = False) -> Array | tuple[Array, ...]:
        """The parts of x W + b [.., width]; or, `whole`, all in one array."""
        total, ends = sum(self.widths), tuple(itertools.accumulate(self.widths[:-1]))
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], total))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        ends = () if whole else ends
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (total,)).astype(self.dtype)
        operands = (x, kernel, bias)
        parts = _dot_parts(*vary(operands, operands), ends)
        return parts[0] if whole else parts
