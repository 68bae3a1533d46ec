"""Features of a text on their way into a net: padding, the null context, the net's width."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ..partition import constrain

NULLS = ("learned", "zero")


def conditions(labels: Array | Mapping[str, Array]) -> dict[str, Array]:
    """What a net is told besides image and time, by the names of its arguments: `labels` [B] alone
    as {"labels": labels}; a mapping as it is, for texts: labels, context, context_mask, drop.
    """
    return dict(labels) if isinstance(labels, Mapping) else {"labels": labels}


class ContextEmbedder(nn.Module):
    """W2 gelu(W1 x) with biases, of features or of the null context (PixArt, arXiv 2310.00426,
    section 2.3).

    Attributes:
        features: width of the result.
        length, width: S and d of the context.
        null: what dropped rows read: "learned" features (parameter `null` [S, d]), "zero", or "":
            no row may be dropped.
        dtype: of the matmuls.
    """

    features: int
    length: int
    width: int
    null: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, context: Array | None, mask: Array | None, drop: Array | None, rows: int
    ) -> tuple[Array, Array | None]:
        """The context in the width of the net, and the mask to attend by.

        Args:
            context: [B, S, d]; None: the null context for all of `rows` rows.
            mask: [B, S] valid tokens, at least one per row; None: all. Others may hold anything.
            drop: [B] bool, rows that read the null context, all of whose tokens are valid.

        Returns:
            [B, S, features] in at least float32; the mask, or None where all tokens are valid.

        Raises:
            ValueError: a context of another shape, or rows to drop without a null context.
        """
        shape = (self.length, self.width)
        if context is None and self.is_initializing():  # parameters do not depend on it
            context = jnp.zeros((rows, *shape))
        if self.null == "learned":
            null = self.param("null", nn.initializers.normal(self.width**-0.5), shape)
        else:
            null = jnp.zeros(shape)
        if not self.null and (context is None or drop is not None):
            raise ValueError("class_dropout=0: the net has no null context; give it a context")
        if context is None:
            context, mask = jnp.broadcast_to(null, (rows, *shape)), None
        elif context.shape[1:] != shape:
            raise ValueError(
                f"a context of shape {context.shape[1:]}; the net has context_length="
                f"{self.length} and context_dim={self.width}"
            )
        elif drop is not None:
            context = jnp.where(drop[:, None, None], null, _valid(context, mask))
            mask = None if mask is None else (mask != 0) | drop[:, None]
        context = constrain(_wide(_valid(context, mask)), "batch", None, None)
        init = nn.initializers.normal(0.02)
        dense = lambda name: nn.Dense(self.features, kernel_init=init, dtype=self.dtype, name=name)
        h = nn.gelu(_wide(dense("fc1")(context)), approximate=True)
        return constrain(_wide(dense("fc2")(h)), "batch", None, None), mask


def _valid(context: Array, mask: Array | None) -> Array:
    """Zeros for padding, by selection."""
    return context if mask is None else jnp.where((mask != 0)[..., None], context, 0)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
