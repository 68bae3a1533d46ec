"""What the fused kernels share: the operands they take and the scalar functions inside."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

# Raw step size of padding: its softplus is exactly 0 in every float type.
NO_STEP = -1e4


MOST_STATES = {"pallas_tpu": 128, "pallas_gpu": 64}  # per channel


def unable(
    u: Array, delta: Array, z: Array | None, A: Array, B: Array, C: Array
) -> dict[str, str | None]:
    """What the kernels do not take of the operands, as `dispatch.resolve` wants it."""
    problem = None
    if jnp.iscomplexobj(A):
        problem = "complex A"
    elif B.ndim != 4 or C.ndim != 4:
        problem = "B or C constant over time"
    elif B.shape[2] != C.shape[2]:
        problem = f"{B.shape[2]} groups of B and {C.shape[2]} of C"
    for x in (u, delta, z):
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            problem = problem or str(x.dtype)
    too_many = lambda most: f"{A.shape[1]} states per channel (at most {most})"
    return {
        name: problem or (too_many(most) if A.shape[1] > most else None)
        for name, most in MOST_STATES.items()
    }


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x); finite for every x."""
    return 1 / (1 + jnp.exp(-x))


def softplus_slope(x: Array) -> Array:
    """Derivative of `softplus`."""
    return jnp.where(x > 20, 1, sigmoid(x))


# log(1 + e) / e on [0, 1], relative error 4e-8: Chebyshev interpolation of degree 8.
_LOG1P = (
    0.999999966, -0.49999445, 0.333181217, -0.24835399, 0.190768807,
    -0.136022476, 0.0775160868, -0.0290740647, 0.00512610214,
)  # fmt: skip
LOG2E = 1.4426950408889634


def softplus_short(x: Array) -> Array:
    """`softplus` with one exponential and multiply-adds, for float32: to 1e-7 (4 + |x|) of it."""
    e = jnp.exp2(-LOG2E * jnp.abs(x))
    p = _LOG1P[-1]
    for c in _LOG1P[-2::-1]:
        p = p * e + c
    return jnp.maximum(x, 0) + e * p


def sigmoid_short(x: Array) -> Array:
    """`sigmoid` with one exponential and one root, for float32: to 1e-7 (8 + |x|) of it."""
    root = lax.rsqrt(1 + jnp.exp2(-LOG2E * x))
    return root * root
