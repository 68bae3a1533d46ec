"""Projections of tokens and sums of their polynomials in one: their gradients share matmuls."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from .. import dispatch
from ..compat import row_major
from .pallas_gpu import KERNELS
from .xla import change, moments


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def projected_sums(x, kernel, coeff, weights, kernels):
    """sum_n w_n p(x_n W_h) [B, 1, E] in coeff's dtype, and x W_s [B, N, S], with [W_h, W_s] one.

    The gradients of x W_h and x W_s lie side by side, so that one matmul makes that of x, another
    that of W.

    Args:
        x: [B, N, d]. kernel: W [d, E + S]. coeff: [E, k]. weights: [B, N] or None.
        kernels: by the Pallas kernels for GPUs.
    """
    return _forward(x, kernel, coeff, weights, kernels)[0]


def _forward(x, kernel, coeff, weights, kernels):
    width = coeff.shape[0]
    h, beside = jnp.dot(x, kernel[:, :width]), jnp.dot(x, kernel[:, width:])
    if dispatch.current_device().startswith("gpu"):
        h = row_major(h)
    powers = (KERNELS if kernels else (moments,))[0](
        h, coeff.shape[1], weights, (x.shape[1],), coeff.dtype
    )
    sums = jnp.sum(powers * coeff, axis=-1)
    return (sums, beside), (x, kernel, coeff, weights, h, powers)


def _backward(kernels, saved, cts):
    x, kernel, coeff, weights, h, powers = saved
    ct, beside = cts
    dy = (KERNELS[1] if kernels else change)(h, coeff, weights, ct, beside)
    _, pull = jax.vjp(jnp.dot, x, kernel)
    dcoeff = jnp.sum(ct[..., None] * powers, axis=(0, 1))
    return *pull(dy), dcoeff, None


projected_sums.defvjp(_forward, _backward)
