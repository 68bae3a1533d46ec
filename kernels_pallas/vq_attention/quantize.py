"""Vector quantisation of keys: nearest code, straight-through estimator, codebook statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from .. import dispatch

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


def nearest_code(k: Array, codebook: Array) -> Array:
    """z = argmin_s |k - C_s|^2, first index on ties; distances in at least float32, full precision.

    Args:
        k: [B, h, T, K] keys. codebook: [h, S, K].

    Returns:
        [B, h, T] int32; no gradient.
    """
    acc = jnp.promote_types(k.dtype, jnp.float32)
    k, codebook = (lax.stop_gradient(a.astype(acc)) for a in (k, codebook))
    products = jnp.einsum("bhtk,hsk->bhts", k, codebook, precision=lax.Precision.HIGHEST)
    norms = jnp.sum(codebook * codebook, axis=-1)
    return jnp.argmin(norms[None, :, None, :] - 2.0 * products, axis=-1).astype(jnp.int32)


def straight_through(k: Array, codes: Array, codebook: Array) -> tuple[Array, Array]:
    """k^ = sg(C_z) + (k - sg(k)) and the squared errors |k - C_z|^2.

    Args:
        k: [B, h, T, K]; codes: [B, h, T]; codebook: [h, S, K], which receives no gradient.

    Returns:
        quantised keys [B, h, T, K] whose gradient passes on to k, and errors [B, h, T],
        differentiable in k (the commitment loss); both at least float32.
    """
    acc = jnp.promote_types(k.dtype, jnp.float32)
    k, codebook = k.astype(acc), lax.stop_gradient(codebook.astype(acc))
    nearest = jax.vmap(lambda c, z: c[z], in_axes=(0, 1), out_axes=1)(codebook, codes)
    errors = jnp.sum(jnp.square(k - nearest), axis=-1)
    return nearest + (k - lax.stop_gradient(k)), errors


def quantize(k: Array, codebook: Array) -> tuple[Array, Array, Array]:
    """Replace every key by its nearest codeword: `nearest_code`, then `straight_through`.

    Transformer-VQ (arXiv 2309.16354), section 3.1.

    Returns:
        codes [B, h, T] int32, quantised keys [B, h, T, K], squared errors [B, h, T].
    """
    codes = nearest_code(k, codebook)
    return codes, *straight_through(k, codes, codebook)


def codebook_statistics(
    k: Array, codes: Array, mask: Array | None, n_code: int
) -> dict[str, Array]:
    """Sums and counts of the keys assigned to each code; these add up over blocks, rows and
    devices.

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
    if k.dtype == jnp.float32 and not dispatch.current_device().startswith("cpu"):
        parts = jnp.concatenate(_bfloat16_parts(k), axis=-1)
        sums = jnp.einsum(
            "bhts,bhtk->hsk", assigned.astype(parts.dtype), parts, preferred_element_type=acc
        )
        c_sum = sum(jnp.split(sums, 3, axis=-1))
    else:
        c_sum = jnp.einsum("bhts,bhtk->hsk", assigned, k, precision=lax.Precision.HIGHEST)
    return {"c_sum": c_sum, "c_count": jnp.sum(assigned, axis=(0, 2))}


def _bfloat16_parts(x: Array) -> list[Array]:
    """Three bfloat16 arrays that add up to a float32 one, so that tensor cores can sum it without
    loss.

    `reduce_precision` is a rounding the compiler keeps; a pair of casts it may drop.
    """
    parts = []
    for _ in range(3):
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts
