"""The encoder of T5 version 1.1 (arXiv 1910.10683, section 2.1; gated GELU: arXiv 2002.05202).

Pre-norm layers whose norms neither shift nor subtract the mean, attention without a scale, with a
bias per bucket of relative position that all layers share, and no bias anywhere else.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..layers.norms import RMSNorm
from ..layers.parted_dense import PartedDense
from ..partition import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Encoder of T5 v1.1; the defaults are those of XXL, which PixArt and SD3 read texts with.

    Attributes:
        vocab_size: token ids, of which 0 is padding and 1 ends a text.
        d_model: residual width. n_layer: layers.
        n_head: heads. d_kv: channels of a head; n_head d_kv need not be d_model.
        d_ff: hidden width of the gated MLP.
        buckets: of relative positions, half of them for each side.
        max_distance: from which on all positions share the last bucket.
        epsilon: of the norms.
    """

    vocab_size: int = 32128
    d_model: int = 4096
    n_layer: int = 24
    n_head: int = 64
    d_kv: int = 64
    d_ff: int = 10240
    buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6


def relative_buckets(length: int, buckets: int = 32, max_distance: int = 128) -> np.ndarray:
    """Bucket of the position of key j as seen from query i, for attention in both directions.

    Half of the buckets are for keys behind the query (j > i). Of each half, the first half are
    single distances, the others grow as the logarithm up to max_distance.

    Args:
        length: T.

    Returns:
        [T, T] int32 (numpy), row i, column j.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact, distance = half // 2, np.abs(offset)
    # In float32 and this order: the published weights were trained with its rounding.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int64), half - 1)
    return (np.where(distance < exact, distance, far) + half * (offset > 0)).astype(np.int32)


class _Layer(nn.Module):
    """r + attention(norm(r)), then the same with the gated MLP. In scan form."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, r: Array, bias: Array, mask: Array | None):
        c = self.config
        inner = c.n_head * c.d_kv
        norm = lambda name: RMSNorm(bias=False, epsilon=c.epsilon, name=name)
        parted = lambda widths, name: PartedDense(widths, False, _FAN_IN, self.dtype, name=name)
        dense = lambda name: nn.Dense(
            c.d_model, use_bias=False, kernel_init=_FAN_IN, dtype=self.dtype, name=name
        )
        heads = (*r.shape[:2], c.n_head, c.d_kv)
        qkv = parted((inner,) * 3, "qkv")(norm("norm1")(r))
        q, k, v = (constrain(a.reshape(heads), "batch", "seq", "heads", None) for a in qkv)
        # Scores, bias and softmax are float32 whatever the dtype.
        y = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=1.0)
        y = dense("proj")(y.reshape(*r.shape[:2], inner))
        r = constrain(r + y.astype(r.dtype), "batch", "seq", None)
        gate, h = parted((c.d_ff,) * 2, "fc1")(norm("norm2")(r))
        h = nn.gelu(gate.astype(jnp.float32), approximate=True) * h
        y = dense("fc2")(h)
        return constrain(r + y.astype(r.dtype), "batch", "seq", None), None


_FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class T5Encoder(nn.Module):
    """States of every token of a text.

    The residual stream, which grows to thousands in the large published nets, the norms, scores and
    activations are float32, so that bfloat16 costs precision in the matmuls' operands only.

    Attributes:
        config: sizes.
        dtype: of the matmuls.
    """

    config: T5Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Array, mask: Array | None = None) -> Array:
        """[B, T, D] float32 of token ids [B, T] int32.

        Args:
            mask: [B, T] valid tokens, at least one per row; no token attends to the others. None:
                all are valid.
        """
        c = self.config
        embed = nn.Embed(c.vocab_size, c.d_model, embedding_init=_NORMAL, name="tokens")
        r = constrain(embed(ids), "batch", "seq", None)
        table = self.param("relative_bias", _NORMAL, (c.buckets, c.n_head))
        places = relative_buckets(ids.shape[1], c.buckets, c.max_distance)
        bias = jnp.moveaxis(table[places], -1, 0)[None]  # [1, H, T, T]
        allowed = None if mask is None else (mask != 0)[:, None, None, :]
        layers = nn.scan(
            _Layer, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=nn.broadcast, length=c.n_layer,
        )(c, self.dtype, name="layers")  # fmt: skip
        r, _ = layers(r, bias, allowed)
        return RMSNorm(bias=False, epsilon=c.epsilon, name="final_norm")(r)


_NORMAL = nn.initializers.normal(1.0)
