"""Feed-forward layers."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ...kernels_pallas.compat import vary
from ..partition import constrain
from .norms import RMSNorm

fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # +-1/sqrt(fan_in)


class SquaredReLUMLP(nn.Module):
    """W2 relu(W1 norm(x))^2 without biases (Transformer-VQ's MLP for its mqa and mha head types).

    Attributes:
        hidden: inner width.
        norm_affine: gain and bias in the input norm.
        dtype: of the matmuls.
    """

    hidden: int
    norm_affine: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = lambda n, name: nn.Dense(
            n, use_bias=False, kernel_init=fan_in, dtype=self.dtype, name=name
        )
        h = RMSNorm(self.norm_affine, name="norm")(x)
        h = jnp.square(nn.relu(dense(self.hidden, "up")(h)))
        return dense(x.shape[-1], "down")(h)


class GatedMLP(nn.Module):
    """W2 (y silu(gate)) with [y | gate] = W1 x, without biases (the MLP of Mamba language models).

    Attributes:
        hidden: inner width, rounded up to a multiple of `multiple_of`.
        multiple_of: see above.
        out_scale: factor on the initial W2.
        dtype: of the matmuls.
    """

    hidden: int
    multiple_of: int = 128
    out_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = -(-self.hidden // self.multiple_of) * self.multiple_of
        dense = lambda n, name, init: nn.Dense(
            n, use_bias=False, kernel_init=init, dtype=self.dtype, name=name
        )
        y, gate = jnp.split(dense(2 * hidden, "fc1", uniform_fan_in)(x), 2, axis=-1)
        scaled = lambda *a: self.out_scale * uniform_fan_in(*a)
        return dense(x.shape[-1], "fc2", scaled)(y * nn.silu(gate))


class GeluMLP(nn.Module):
    """W2 gelu(W1 x) with biases (DiT's MLP); the GELU in at least float32.

    Attributes:
        hidden: inner width.
        dtype: of the matmuls.
        exact: the GELU of the error function instead of its tanh form.
    """

    hidden: int
    dtype: jnp.dtype
    exact: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, d] in `dtype`."""
        init = nn.initializers.xavier_uniform()
        product, bias = _Projection(self.hidden, init, self.dtype, name="fc1")(x)
        product = constrain(product, "batch", "seq", "features")
        fc2 = nn.Dense(x.shape[-1], kernel_init=init, dtype=self.dtype, name="fc2")
        return fc2(_gelu(not self.exact, *vary((product, bias), (product, bias))))


class _Projection(nn.Module):
    """x W and b of an `nn.Dense`, whose sum is left to the caller."""

    features: int
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype)), bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gelu(approximate, x, bias):
    """gelu(x + bias) in x's dtype, in between at least float32; of all that only x is kept for the
    backward pass."""
    a = _widen(x) + bias
    return (a * _gate(a, approximate)[0]).astype(x.dtype)


def _gate(a, approximate):
    """(g, g') with gelu(a) = a g: the normal distribution and density, or for the tanh form

    g = (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (a + 0.044715 a^3), as the square
    of a reciprocal root, for which GPUs have an instruction as they have for exp: with tanh, or a
    division, arithmetic took twice as long as reading and writing the tokens.
    """
    if not approximate:
        density = jnp.exp(-jnp.square(a) / 2) / math.sqrt(2 * math.pi)
        return lax.erfc(-math.sqrt(0.5) * a) / 2, density
    root, cubic = math.sqrt(2 / math.pi), 0.044715
    g = jnp.square(lax.rsqrt(1 + jnp.exp(-2 * root * a * (1 + cubic * jnp.square(a)))))
    return g, 2 * root * (1 + 3 * cubic * jnp.square(a)) * (g * (1 - g))


def _gelu_bwd(approximate, operands, dy):
    """gelu' = g + a g'."""
    # The barrier keeps XLA from finding the gate of the forward pass again, kept in float32.
    x, bias, dy = lax.optimization_barrier((*operands, dy))
    a = _widen(x) + bias
    gate, slope = _gate(a, approximate)
    dx = (_widen(dy) * (gate + a * slope)).astype(x.dtype)
    # The sum is a reduction in x's dtype, as that of a dense layer's bias: XLA fuses it, whereas
    # for a wide one it would write the wide gradient.
    axes = tuple(range(x.ndim - 1))
    return dx, lax.reduce(dx, np.zeros((), dx.dtype), lax.add, axes).astype(bias.dtype)


_gelu.defvjp(lambda approximate, x, bias: (_gelu(approximate, x, bias), (x, bias)), _gelu_bwd)


def _widen(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
