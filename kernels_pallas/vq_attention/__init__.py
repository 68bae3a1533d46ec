"""VQ attention: softmax attention in linear time over vector-quantised keys (arXiv 2309.16354).

For positions t >= j, head by head,

    s(t, j) = (q_t + u) . k^_j + [t - j <= M] (q_t + v) . rho_{t-j}
    o_t     = sum_{j<=t} softmax_j(s(t, .)) v_j

where k^_j is a codeword. Keys older than the window enter only through their code, so all keys of
one code share one score and one mean value: the sum over them is a sum over S codes with log-count
bias.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jax import Array

from .. import dispatch
from .quantize import (
    MIN_COUNT,
    codebook_statistics,
    codewords,
    nearest_code,
    quantize,
    straight_through,
)
from .reference import vq_attention_reference
from .state import VQState, init_state
from .xla import (
    REDUCTIONS,
    block_summaries,
    cache_prefix,
    log_count,
    skew,
    vq_attention_xla,
    window_mask,
)

IMPLEMENTATIONS = {"reference": vq_attention_reference, "xla": vq_attention_xla}


def vq_attention(
    q: Array,
    k: Array,
    codes: Array,
    v: Array,
    codebook: Array,
    *,
    content_bias: Array,
    position_bias: Array,
    rel: Array,
    state: VQState | None = None,
    segment_ids: Array | None = None,
    lengths: Array | None = None,
    block_len: int = 512,
    use_cache: bool = True,
    grad_through_cache: bool = True,
    mask_segments: bool = False,
    reduction: str = "associative",
    implementation: str | None = None,
) -> tuple[Array, VQState]:
    """Causal VQ attention over T tokens, continuing from `state`; any T, any block length, same
    result.

    Args:
        q: [B, H, T, K] queries, already normalised and scaled by K^(-1/4).
        k: [B, h, T, K] quantised keys (straight-through); h divides H, query head i reads head i //
            (H/h).
        codes: [B, h, T] int32 code of each key.
        v: [B, h, T, V] values.
        codebook: [h, S, K] current codewords; a constant (no gradient).
        content_bias, position_bias: u, v of the definition, [H, K], scaled like q.
        rel: [h, M+1, K] position table by distance 0..M, scaled like q. Its length sets M.
        state: where to continue; None starts afresh.
        segment_ids: [B, T] non-decreasing document ids (0 if None); they mask only with
            `mask_segments`.
        lengths: [B] int32 valid tokens per row (the rest is right padding and may hold anything,
            outputs there are 0); None means T.
        block_len: block length L. The output does not depend on it. Key gradients do: pairs further
            back than the window before the query's block are constants.
        use_cache: False is sliding-window attention over M previous keys and oneself.
        grad_through_cache: False cuts gradients to keys and values before the query's own block.
        mask_segments: keys of other documents are invisible.
        reduction: how the cache recurrence is ordered: "serial", "associative" or "matmul".
        implementation: None (best available), "reference" (dense, O(T^2)) or "xla".

    Returns:
        out [B, H, T, V] in q's dtype ("reference": at least float32), and the state after the last
        valid token. Scores, softmax, counts and means are at least float32.
    """
    sizes = chex.Dimensions()
    sizes["BHTK"] = q.shape
    sizes["hS"] = codebook.shape[:2]
    sizes["VN"] = (v.shape[-1], rel.shape[1])
    for name, array, spec in (
        ("k", k, "BhTK"), ("codes", codes, "BhT"), ("v", v, "BhTV"), ("codebook", codebook, "hSK"),
        ("content_bias", content_bias, "HK"), ("position_bias", position_bias, "HK"),
        ("rel", rel, "hNK"),
    ):  # fmt: skip
        if array.shape != tuple(sizes[spec]):
            raise ValueError(
                f"{name} has shape {array.shape}, expected {tuple(sizes[spec])} ({spec})"
            )
    batch, heads, t_len, d_k = q.shape
    if heads % k.shape[1]:
        raise ValueError(f"{heads} query heads are not a multiple of {k.shape[1]} key-value heads")
    if block_len < 1:
        raise ValueError(f"block_len={block_len} must be at least 1")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}; choose one of {', '.join(REDUCTIONS)}")
    name = dispatch.resolve("vq_attention", implementation, IMPLEMENTATIONS)
    if state is None:
        state = init_state(
            batch, k.shape[1], rel.shape[1] - 1, codebook.shape[1], d_k, v.shape[-1], v.dtype
        )
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, t_len), jnp.int32)
    if name == "reference" and lengths is None:
        lengths = jnp.full((batch,), t_len, jnp.int32)
    return IMPLEMENTATIONS[name](
        q, k, codes, v, codebook,
        content_bias=content_bias, position_bias=position_bias, rel=rel, state=state,
        segment_ids=segment_ids, lengths=lengths, block_len=min(block_len, t_len),
        use_cache=use_cache, grad_through_cache=grad_through_cache,
        mask_segments=mask_segments, reduction=reduction,
    )  # fmt: skip


__all__ = [
    "MIN_COUNT",
    "REDUCTIONS",
    "VQState",
    "block_summaries",
    "cache_prefix",
    "codebook_statistics",
    "codewords",
    "init_state",
    "log_count",
    "nearest_code",
    "quantize",
    "skew",
    "straight_through",
    "vq_attention",
    "window_mask",
]
