"""The convolution as a sum of W shifted multiplies; the backward pass recomputes it.

The pre-activation is not kept: what the backward pass needs is x, the taps and the state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def tap_masks(resets: Array | None, width: int) -> list[Array | None]:
    """For j = 0 .. W-1: [B, T, 1] bool, whether no reset lies in (t - j, t]; None means all True.

    Resets before the first step are unknown here; the state has zeros for inputs before them.
    """
    if resets is None:
        return [None] * width
    reach, masks = jnp.ones_like(resets), [None]
    for j in range(width - 1):
        reach = reach & ~jnp.pad(resets, ((0, 0), (j, 0)))[:, : resets.shape[1]]
        masks.append(reach[..., None])
    return masks


def _select(mask: Array | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask, x, 0)


def _accumulate(x, weight, bias, state, masks):
    """The pre-activation, in the accumulator dtype, and the inputs that each tap saw."""
    acc = jnp.promote_types(jnp.result_type(x, weight, bias), jnp.float32)
    t_len, width = x.shape[1], weight.shape[0]
    padded = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    total, seen = bias.astype(acc), []
    for j in range(width - 1, -1, -1):  # oldest first, in the order of the taps
        k = width - 1 - j
        seen.append(_select(masks[j], padded[:, k : k + t_len].astype(acc)))
        total = total + weight[k].astype(acc) * seen[-1]
    return total, seen


def _forward(silu, x, weight, bias, state, resets):
    total, _ = _accumulate(x, weight, bias, state, tap_masks(resets, weight.shape[0]))
    return (jax.nn.silu(total) if silu else total).astype(x.dtype)


_differentiable = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _rule_forward(silu, *operands):
    return _forward(silu, *operands), operands


def _rule_backward(silu, operands, cotangent):
    x, weight, bias, state, resets = operands
    width = weight.shape[0]
    masks = tap_masks(resets, width)
    total, seen = _accumulate(x, weight, bias, state, masks)
    g = cotangent.astype(total.dtype)
    if silu:
        s = jax.nn.sigmoid(total)
        g = g * (s * (1 + total * (1 - s)))
    dweight = jnp.stack([jnp.sum(g * part, axis=(0, 1)) for part in seen])
    dpadded = 0
    for k in range(width):  # padded[t + k] is what tap k saw at t
        part = weight[k].astype(g.dtype) * _select(masks[width - 1 - k], g)
        dpadded = dpadded + jnp.pad(part, ((0, 0), (k, width - 1 - k), (0, 0)))
    dstate, dx = dpadded[:, : width - 1], dpadded[:, width - 1 :]
    grads = (dx, dweight, jnp.sum(g, axis=(0, 1)), dstate)
    return (*(d.astype(like.dtype) for d, like in zip(grads, operands[:4], strict=True)), None)


_differentiable.defvjp(_rule_forward, _rule_backward)


def causal_conv1d_xla(
    x: Array, weight: Array, bias: Array, state: Array, resets: Array | None, silu: bool
) -> Array:
    """y_t = act(bias + sum_k weight[k] x[t-(W-1)+k]), accumulated in at least float32.

    Args:
        x: [B, T, C] inputs.
        weight: [W, C]; tap W-1 multiplies the current input.
        bias: [C].
        state: [B, W-1, C] inputs before the first one, oldest first.
        resets: [B, T] bool or None; a tap counts only if no reset lies in (source, target].
        silu: whether act is SiLU, or the identity.

    Returns:
        y [B, T, C] in x's dtype, rounded once.
    """
    return _differentiable(silu, x, weight, bias, state, resets)
