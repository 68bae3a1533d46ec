"""Adaptive layer norm: a vector per row shifts, scales and gates every block (arXiv 2212.09748).

The family differs in where the vectors come from (AiM, arXiv 2408.12245, section 3.3):

    adaLN         each block has a head,   v_i = W_i silu(c) + b_i
    adaLN-single  all blocks share one,    v_i = W silu(c) + b + table_i
    adaLN-group   G shared heads,          v_i = W_{i mod G} silu(c) + b_{i mod G} + table_i

A block has three vectors per branch. With several branches the order is shift of every branch,
scale of every branch, gate of every branch: rows.reshape(3, branches, ..) takes them apart.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ...kernels_pallas.compat import vary
from ...kernels_pallas.matmul import matmul
from .mlp import uniform_fan_in
from .norms import rms_normalise

KINDS = ("adaln", "adaln_single", "adaln_group")
TIME_FEATURES = 256


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """x (1 + scale) + shift; shift and scale [.., d] broadcast against x."""
    return x * (1 + scale) + shift


def gated_add(r: Array, gate: Array, y: Array) -> Array:
    """r + gate y in r's dtype; the backward pass keeps y as it came, not its wide copy."""
    add = lambda r, gate, y: r + gate * y.astype(r.dtype)
    return jax.checkpoint(add, prevent_cse=False)(r, gate, y)


class ModulatedRMSNorm(nn.Module):
    """rms(x) g (1 + scale) + shift: RMS norm with gain `g` (init 1), then the condition's vectors.

    Computed in at least float32; the backward pass computes what is in between anew, for keeping it
    costs more memory than all matmuls' inputs.

    Attributes:
        epsilon: added to the mean square.
        dtype: of the result.
    """

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, shift: Array, scale: Array) -> Array:
        """[.., d] in `dtype`; shift and scale [.., d] broadcast against x."""
        gain = self.param("g", nn.initializers.ones, (x.shape[-1],))

        def apply(x, gain, shift, scale):
            y = (rms_normalise(x, self.epsilon) * gain).astype(x.dtype)
            return modulate(y, shift, scale).astype(self.dtype)

        return jax.checkpoint(apply, prevent_cse=False)(x, gain, shift, scale)


def modulated_layer_norm(x: Array, shift: Array, scale: Array, epsilon: float, dtype) -> Array:
    """layer_norm(x) (1 + scale) + shift in `dtype`, without gain and bias of its own.

    Computed in at least float32, the variance as mean(x^2) - mean(x)^2, so that x is read once for
    both. The backward pass keeps x, and mean and deviation of every token; shift and scale [.., d]
    broadcast against x [.., d].
    """
    operands = (x, shift, scale)
    return _modulated_layer_norm(epsilon, jnp.dtype(dtype), *vary(operands, operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _modulated_layer_norm(epsilon, dtype, x, shift, scale):
    return _modulated_layer_norm_fwd(epsilon, dtype, x, shift, scale)[0]


def _modulated_layer_norm_fwd(epsilon, dtype, x, shift, scale):
    wide = _widen(x)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True) - jnp.square(mean)
    inverse = lax.rsqrt(epsilon + jnp.maximum(variance, 0))
    # Behind barriers x is widened anew in each pass, for else its wide copies go through memory.
    x, mean, inverse = lax.optimization_barrier((x, mean, inverse))
    y = modulate((_widen(x) - mean) * inverse, shift, scale).astype(dtype)
    return y, (x, mean, inverse, shift, scale)


def _modulated_layer_norm_bwd(epsilon, dtype, residuals, dy):
    """With n = (x - mean) / deviation, g = dy (1 + scale): dx = (g - mean(g) - n mean(g n)) /
    deviation."""
    del epsilon, dtype
    x, mean, inverse, shift, scale = residuals
    x, mean, inverse, dy = lax.optimization_barrier((x, mean, inverse, dy))
    normed, g = (_widen(x) - mean) * inverse, _widen(dy) * (1 + scale)
    average = lambda a: jnp.mean(a, axis=-1, keepdims=True)
    dx = (inverse * (g - average(g) - normed * average(g * normed))).astype(x.dtype)

    x, mean, inverse, dy = lax.optimization_barrier((x, mean, inverse, dy))
    normed, g = (_widen(x) - mean) * inverse, _widen(dy)
    return dx, _sum_to(g, shift), _sum_to(g * normed, scale)


_modulated_layer_norm.defvjp(_modulated_layer_norm_fwd, _modulated_layer_norm_bwd)


def _widen(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sum_to(x: Array, like: Array) -> Array:
    """The cotangent of an array like `like` that was broadcast to x's shape."""
    x = jnp.sum(x, axis=tuple(range(x.ndim - like.ndim)))
    axes = tuple(i for i, n in enumerate(like.shape) if n == 1 and x.shape[i] != 1)
    return jnp.sum(x, axis=axes, keepdims=True).astype(like.dtype)


def timestep_features(t: Array, width: int = 256) -> Array:
    """[cos(t f_0) .., sin(t f_0) ..] with f_i = 10000^(-2i/w) (DiT, arXiv 2212.09748, section 3.2).

    Args:
        t: [B] int or float, in the units of the process. width: w, even.

    Returns:
        [B, w] in at least float32, the cosines first.
    """
    frequencies = 10000.0 ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    t = t.astype(jnp.promote_types(t.dtype, jnp.float32))
    angles = t[:, None] * jnp.asarray(frequencies, t.dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def groups_of(kind: str, num_groups: int) -> int:
    """Shared heads of a kind of conditioning: 0 means that each block has its own.

    Raises:
        ValueError: an unknown kind, or adaLN-group without a group.
    """
    if kind not in KINDS:
        raise ValueError(f"conditioning={kind!r}; choose one of {', '.join(KINDS)}")
    if kind == "adaln_group" and num_groups < 1:
        raise ValueError(f"num_groups={num_groups}; conditioning=adaln_group needs at least 1")
    return {"adaln": 0, "adaln_single": 1, "adaln_group": num_groups}[kind]


class ModulationHead(nn.Module):
    """W silu(c) + b as rows of vectors: parameters `kernel` [d, rows d] and `bias` [rows d].

    Attributes:
        rows: vectors of width d.
        zero: start at W = 0, so that blocks start as the identity (adaLN-Zero), instead of
            U(-1/sqrt(d), 1/sqrt(d)).
        dtype: of the matmul.
    """

    rows: int
    zero: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, c: Array, flat: bool = False) -> Array:
        """[rows, B, d] in at least float32, from c [B, d]; or, `flat`, [B, rows d].

        To be cut by `jnp.split`, flat vectors are better for a GPU: the others are a transpose, and
        XLA then keeps the whole residual stream that they meet with its channels slowest.
        """
        batch, width = c.shape
        init = nn.initializers.zeros if self.zero else uniform_fan_in
        kernel = self.param("kernel", init, (width, self.rows * width))
        bias = self.param("bias", nn.initializers.zeros, (self.rows * width,))
        h = nn.silu(c).astype(self.dtype)
        vectors = matmul("bd,dk->bk", h, kernel.astype(self.dtype)) + bias
        if flat:
            return vectors
        return jnp.moveaxis(vectors.reshape(batch, self.rows, width), 1, 0)


class BlockModulation(nn.Module):
    """The vectors of one block: a head of its own, or a shared head's plus a table of its own.

    Attributes:
        rows: vectors of the block, 3 per branch.
        dtype: of the matmul.
    """

    rows: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, c: Array, shared: Array | None) -> Array:
        """[rows, B, d] in at least float32.

        Args:
            c: [B, d] condition.
            shared: [rows, B, d] of the block's group; None for a head of its own.
        """
        if shared is None:
            return ModulationHead(self.rows, dtype=self.dtype, name="head")(c)
        width = c.shape[-1]
        table = self.param("table", nn.initializers.normal(width**-0.5), (self.rows, width))
        return shared + table[:, None]


def share_out(shared: Array, n_layer: int, rows: int) -> Array:
    """Pieces of G shared heads for each block: block i gets piece i mod G (interleaved).

    Args:
        shared: [G rows, B, d].

    Returns:
        [n_layer, rows, B, d].
    """
    groups = shared.shape[0] // rows
    pieces = shared.reshape(groups, rows, *shared.shape[1:])
    return pieces[jnp.arange(n_layer) % groups]


class TimeEmbedder(nn.Module):
    """W2 silu(W1 features(t)) with biases, in at least float32."""

    features: int

    @nn.compact
    def __call__(self, t: Array) -> Array:
        """[B, features] of t [B]."""
        dense = lambda name: nn.Dense(
            self.features, kernel_init=nn.initializers.normal(0.02), name=name
        )
        h = timestep_features(t, TIME_FEATURES)
        self.sow("intermediates", "features", h)
        return dense("fc2")(nn.silu(dense("fc1")(h)))
