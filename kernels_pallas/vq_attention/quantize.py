"""Vector quantisation of keys: nearest code, straight-through estimator, codebook statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

MIN_COUNT = 0.01  # codewords are sum / max(count, MIN_COUNT)


def codewords(c_sum: Array, c_count: Array) -> Array:
    """C = sg(c_sum / max(c_count, 0.01)) in at least float32.

    Args:
        c_sum: [..., S, K] running sum of the keys of each code.
        c_count: [..., S] running number of keys of each code.
    """
    acc = jnp.promote_types(c_sum.dtype, jnp.float32)
    denominator = jnp.maximum(c_count.astype(acc), MIN_COUNT)[..., None]
    return lax.stop_gradient(c_sum.astype(acc) / denominator)


def quantize(k: Array, codebook: Array) -> tuple[Array, Array, Array]:
    """Replace every key by its nearest codeword, with a straight-through gradient.

    z = argmin_s |k - C_s|^2 (first index on ties), k^ = sg(C_z) + (k - sg(k)).
    Transformer-VQ (arXiv 2309.16354), section 3.1.

    Args:
        k: [B, h, T, K] keys. Distances are computed in at least float32 at full matmul precision.
        codebook: [h, S, K]; receives no gradient.

    Returns:
        codes [B, h, T] int32; quantised keys [B, h, T, K] in the dtype of `codebook` promoted with `k`;
        squared errors |k - C_z|^2 [B, h, T], differentiable in `k` (the commitment loss).
    """
    acc = jnp.promote_types(k.dtype, jnp.float32)
    k = k.astype(acc)
    codebook = lax.stop_gradient(codebook.astype(acc))
    fixed = lax.stop_gradient(k)
    products = jnp.einsum("bhtk,hsk->bhts", fixed, codebook, precision=lax.Precision.HIGHEST)
    norms = jnp.sum(codebook * codebook, axis=-1)
    codes = jnp.argmin(norms[None, :, None, :] - 2.0 * products, axis=-1).astype(jnp.int32)
    nearest = jax.vmap(lambda c, z: c[z], in_axes=(0, 1), out_axes=1)(codebook, codes)
    errors = jnp.sum(jnp.square(k - nearest), axis=-1)
    return codes, nearest + (k - fixed), errors


def codebook_statistics(k: Array, codes: Array, mask: Array | None, n_code: int) -> dict[str, Array]:
    """Sums and counts of the keys assigned to each code; these add up over blocks, rows and devices.

    c_sum[h,s] = sum_{b,t} mask[b,t] [codes = s] k[b,h,t], c_count[h,s] likewise with 1 for k.

    Args:
        k: [B, h, T, K] keys before quantisation; no gradient flows from the result.
        codes: [B, h, T] int32.
        mask: [B, T] tokens that count (any dtype, non-zero = counts), or None for all.
        n_code: S.

    Returns:
        {"c_sum": [h, S, K], "c_count": [h, S]} in at least float32.
    """
    acc = jnp.promote_types(k.dtype, jnp.float32)
    k = lax.stop_gradient(k.astype(acc))
    assigned = jax.nn.one_hot(codes, n_code, dtype=acc)
    if mask is not None:
        assigned = assigned * (mask != 0).astype(acc)[:, None, :, None]
        k = jnp.where((mask != 0)[:, None, :, None], k, 0)
    c_sum = jnp.einsum("bhts,bhtk->hsk", assigned, k, precision=lax.Precision.HIGHEST)
    return {"c_sum": c_sum, "c_count": jnp.sum(assigned, axis=(0, 2))}
