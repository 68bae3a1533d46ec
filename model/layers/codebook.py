"""EMA codebooks: update, revival of dead codes, diagnostics (arXiv 2309.16354, sections 3.3 and
4).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from ...kernels_pallas.vq_attention import codewords

SPLIT = 0.01  # relative distance between a revived code and the code it was split from


def update_codebook(
    stats: dict[str, Array], delta: dict[str, Array], *, decay: float, revive_below: float = 0.0
) -> dict[str, Array]:
    """c <- decay c + (1 - decay) * (sum over all tokens since the previous update), then revive
    dead codes.

    Args:
        stats: {"c_sum": [..., S, K], "c_count": [..., S]} float32.
        delta: sums of the same shapes over the whole update (all rows, blocks, micro-batches,
            devices).
        decay: gamma.
        revive_below: a code whose count falls under this is replaced by splitting the most used
            codes: both halves keep half the count and move apart by 1%. 0 switches revival off.
    """
    new = jax.tree.map(lambda c, d: decay * c + (1 - decay) * d.astype(c.dtype), stats, delta)
    return _split_codes(new, revive_below) if revive_below > 0 else new


def _split_codes(stats: dict[str, Array], threshold: float) -> dict[str, Array]:
    c_sum, count = stats["c_sum"], stats["c_count"]
    n_code = count.shape[-1]
    order = jnp.argsort(count, axis=-1)
    rank = jnp.argsort(order, axis=-1)
    partner = jnp.take_along_axis(order, n_code - 1 - rank, axis=-1)  # least used <-> most used
    other = jnp.take_along_axis(count, partner, axis=-1)
    dead = (count < threshold) & (other >= 2 * threshold)
    donor = (other < threshold) & (count >= 2 * threshold)
    sign = jnp.where(jnp.arange(c_sum.shape[-1]) % 2 == 0, 1.0, -1.0) * SPLIT
    other_sum = jnp.take_along_axis(c_sum, partner[..., None], axis=-2)
    c_sum = jnp.where(
        dead[..., None],
        0.5 * other_sum * (1 + sign),
        jnp.where(donor[..., None], 0.5 * c_sum * (1 - sign), c_sum),
    )
    count = jnp.where(dead, 0.5 * other, jnp.where(donor, 0.5 * count, count))
    return {"c_sum": c_sum, "c_count": count}


def codebook_metrics(c_sum: Array, c_count: Array) -> dict[str, Array]:
    """Diagnostics of one codebook per head, averaged over heads; no gradient.

    Args:
        c_sum: [h, S, K]; c_count: [h, S].

    Returns:
        Scalars: cosine similarity c_sim_*, distance c_dist_* over pairs of codes, c_norm_*,
        c_usage_* (EMA counts), c_thresh_oob (codes with count under 1 or over 1e6), c_entropy (nats
        of the EMA counts) and c_perplexity = exp(entropy).
    """
    count = lax.stop_gradient(jnp.maximum(c_count, 1e-2))
    code = codewords(c_sum, c_count)
    norm = jnp.maximum(jnp.linalg.norm(code, axis=-1), 1e-2)
    dots = jnp.einsum("hsk,htk->hst", code, code, precision="highest")
    squares = jnp.sum(code * code, axis=-1)
    distance = jnp.sqrt(jnp.maximum(squares[:, :, None] - 2 * dots + squares[:, None, :], 0))
    similarity = dots / (norm[:, :, None] * norm[:, None, :])
    n_code = code.shape[1]
    pair = jnp.tril(jnp.ones((n_code, n_code), bool), k=-1)
    n_pair = n_code * (n_code - 1) / 2

    def over_pairs(x):
        return {
            "min": jnp.min(jnp.where(pair, x, 1e30), axis=(1, 2)),
            "mean": jnp.sum(jnp.where(pair, x, 0), axis=(1, 2)) / n_pair,
            "max": jnp.max(jnp.where(pair, x, -1e30), axis=(1, 2)),
        }

    over_codes = lambda x: {"min": x.min(1), "mean": x.mean(1), "max": x.max(1)}
    groups = {
        "c_sim": over_pairs(similarity),
        "c_dist": over_pairs(distance),
        "c_norm": over_codes(norm),
        "c_usage": over_codes(count),
    }
    metrics = {f"{name}_{k}": v for name, group in groups.items() for k, v in group.items()}
    share = count / jnp.sum(count, axis=1, keepdims=True)
    entropy = -jnp.sum(share * jnp.log(share), axis=1)
    metrics["c_thresh_oob"] = jnp.sum((count < 1) | (count > 1e6), axis=1).astype(count.dtype)
    metrics["c_entropy"] = entropy
    metrics["c_perplexity"] = jnp.exp(entropy)
    return {name: jnp.mean(value) for name, value in metrics.items()}


def quantisation_metrics(k: Array, k_hat: Array, errors: Array, block_len: int) -> dict[str, Array]:
    """Norms of keys and quantised keys, and relative errors sqrt(err)/|k| (per block of block_len
    tokens).

    Args:
        k, k_hat: [B, h, T, K]; errors: [B, h, T] squared errors; block_len: extremes are taken per
            block and averaged (the whole T when block_len does not divide it).
    """
    k, k_hat, errors = (lax.stop_gradient(a) for a in (k, k_hat, errors))
    norm = jnp.maximum(jnp.linalg.norm(k, axis=-1), 1e-2)
    relative = jnp.clip(jnp.sqrt(errors) / norm, 0, 10)
    t_len = relative.shape[-1]
    if t_len % block_len == 0:
        relative = relative.reshape(*relative.shape[:-1], t_len // block_len, block_len)
    return {
        "vec_norm_mean": jnp.mean(norm),
        "vec_hat_norm_mean": jnp.mean(jnp.maximum(jnp.linalg.norm(k_hat, axis=-1), 1e-2)),
        "relative_err_min": jnp.mean(jnp.min(relative, axis=-1)),
        "relative_err_mean": jnp.mean(relative),
        "relative_err_max": jnp.mean(jnp.max(relative, axis=-1)),
    }
