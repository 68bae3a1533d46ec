"""Matmuls in the operands' dtype with float32 accumulation, forward and backward."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from . import dispatch
from .compat import vary


def matmul(spec: str, a: Array, b: Array) -> Array:
    """einsum(spec, a, b) of two operands, accumulated and returned in at least float32.

    The backward pass rounds the cotangent to the operands' dtype first, so that its matmuls run in
    that dtype too: without this a float32 cotangent would turn every bfloat16 matmul of the
    backward pass into a float32 one. For float32 operands it is the plain einsum.
    """
    return _matmul(spec, *vary((a, b), (a, b)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(spec, a, b):
    acc = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    if dispatch.current_device().startswith("cpu"):  # XLA's CPU backend lacks some bfloat16 matmuls
        a, b = a.astype(acc), b.astype(acc)
    return jnp.einsum(spec, a, b, preferred_element_type=acc)


def _matmul_fwd(spec, a, b):
    return _matmul(spec, a, b), (a, b)


def _matmul_bwd(spec, operands, cotangent):
    a, b = operands
    inputs, out = spec.split("->")
    left, right = inputs.split(",")
    da = _matmul(f"{out},{right}->{left}", cotangent.astype(b.dtype), b)
    db = _matmul(f"{left},{out}->{right}", a, cotangent.astype(a.dtype))
    return da.astype(a.dtype), db.astype(b.dtype)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
