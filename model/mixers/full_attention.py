"""Attention of every token to every token, or to the tokens of a context."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ..layers.parted_dense import PartedDense
from ..partition import constrain
from .fused_attention import attend


class FullAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v without causality or position bias (arXiv 1706.03762, 3.2).

    Parameters: `qkv` [d, 3 d] (thirds q, k and v, heads inside each), or `q` [d, d] and `kv`
    [d_context, 2 d] where a context is given, and `proj` [d, d]; all with biases. Xavier-uniform.

    Attributes:
        features: width d of the input and output.
        num_heads: H; K = d / H.
        dtype: of the matmuls; the softmax is float32.
        out_init: of `proj`'s kernel.
    """

    features: int
    num_heads: int
    dtype: jnp.dtype = jnp.float32
    out_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        context: Array | None = None,
        context_mask: Array | None = None,
        positions: None = None,
        mask: Array | None = None,
        segment_ids: Array | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Mix whole rows.

        Args:
            x: [B, T, d].
            context: [B, S, d_context]: the tokens that are attended to, instead of x.
            context_mask: [B, S] valid tokens of the context.
            positions: of the mixer contract; this mixer takes none.
            mask: [B, T] valid tokens. No token attends to the others, whose outputs mean nothing.
            segment_ids: [B, T] document ids; tokens attend within their document. Not for contexts.

        Returns:
            y [B, T, d] in `dtype`, and {} (no auxiliary losses).

        Raises:
            ValueError: positions are given, the context's arguments do not belong together, or
                num_heads does not divide the width.
        """
        if positions is not None:
            raise ValueError("FullAttention has no positions: add them to its input")
        if context is None and context_mask is not None:
            raise ValueError("context_mask without a context")
        if context is not None and segment_ids is not None:
            raise ValueError("segment_ids say nothing about a context; give a context_mask")
        check_heads(self.features, self.num_heads)
        x = constrain(_valid(x, mask), "batch", "seq", None)
        if context is None:
            q, k, v = _heads(self, x, 3, "qkv")
            valid = mask
        else:
            (q,) = _heads(self, x, 1, "q")
            k, v = _heads(self, _valid(context, context_mask), 2, "kv")
            valid = context_mask
        valid = None if valid is None else valid != 0
        y = attend(q, k, v, valid=valid, segment_ids=segment_ids).reshape(x.shape)
        y = nn.Dense(self.features, kernel_init=self.out_init, dtype=self.dtype, name="proj")(
            y.astype(self.dtype)
        )
        return constrain(y, "batch", "seq", None), {}


class JointAttention(nn.Module):
    """Attention within tokens and a context put together, each with projections of its own
    (MM-DiT, arXiv 2403.03206, section 4).

    Parameters: `qkv`, `proj` of the tokens and `context_qkv`, `context_proj` of the context, all as
    in `FullAttention`; both have the same width.

    Attributes: as of `FullAttention`.
    """

    features: int
    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, context: Array, *, context_mask: Array | None = None
    ) -> tuple[Array, Array]:
        """Mix whole rows.

        Args:
            x: [B, T, d]. context: [B, S, d].
            context_mask: [B, S] valid tokens of the context. No token attends to the others, whose
                outputs mean nothing.

        Returns:
            y [B, T, d] and y of the context [B, S, d] in `dtype`.

        Raises:
            ValueError: num_heads does not divide the width.
        """
        check_heads(self.features, self.num_heads)
        own = _heads(self, x, 3, "qkv")
        theirs = _heads(self, _valid(context, context_mask), 3, "context_qkv")
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(own, theirs, strict=True))
        valid = None
        if context_mask is not None:
            all_own = jnp.ones(x.shape[:2], bool)
            valid = jnp.concatenate([all_own, context_mask != 0], axis=1)
        y = attend(q, k, v, valid=valid).astype(self.dtype)
        y = y.reshape(*y.shape[:2], self.features)
        init = nn.initializers.xavier_uniform()
        dense = lambda name: nn.Dense(self.features, kernel_init=init, dtype=self.dtype, name=name)
        own, theirs = y[:, : x.shape[1]], y[:, x.shape[1] :]
        own, theirs = dense("proj")(own), dense("context_proj")(theirs)
        return constrain(own, "batch", "seq", None), constrain(theirs, "batch", None, None)


def check_heads(features: int, num_heads: int) -> None:
    """Raises ValueError unless num_heads divides the width."""
    if features % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide width={features}")


def _heads(module, x: Array, parts: int, name: str) -> list[Array]:
    """The projections of x [B, T, .] as n arrays [B, T, H, K], each in memory of its own."""
    dense = PartedDense(
        (module.features,) * parts, True, nn.initializers.xavier_uniform(), module.dtype, name=name
    )
    shape = (*x.shape[:2], module.num_heads, module.features // module.num_heads)
    return [constrain(y.reshape(shape), "batch", "seq", "heads", None) for y in dense(x)]


def _valid(x: Array, mask: Array | None) -> Array:
    """x with zeros for padding, by selection: its values would reach sums even with weight 0."""
    return x if mask is None else jnp.where((mask != 0)[..., None], x, 0)
