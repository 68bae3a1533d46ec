"""What mixers along time share of the mixer contract: refusing context, masks, documents."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from ...kernels_pallas.time_axis import last_segment, resets_from_segments


def refuse_context(mixer: Any, *given: Any) -> None:
    """Raise for arguments of the contract (context, its mask, positions) that are not None.

    Raises:
        ValueError: one of them is given.
    """
    if any(argument is not None for argument in given):
        raise ValueError(
            f"{type(mixer).__name__} mixes along time by itself: no context or explicit positions"
        )


def row_lengths(mask: Array | None) -> Array | None:
    """[B] int32 valid tokens per row of a mask [B, T] with padding on the right; None stays."""
    return None if mask is None else jnp.sum(mask != 0, axis=1, dtype=jnp.int32)


def enter_segments(
    segment_ids: Array | None, before: Array, lengths: Array | None
) -> tuple[Array | None, Array]:
    """How documents continue a state.

    Args:
        segment_ids: [B, T] document ids, or None where all belong to the state's document.
        before: [B] int32 document id of the state. lengths: [B] valid tokens, None means T.

    Returns:
        resets [B, T] bool (or None), and the document id [B] after the last valid token.
    """
    if segment_ids is None:
        return None, before
    return (
        resets_from_segments(segment_ids, before),
        last_segment(segment_ids, before, lengths),
    )
