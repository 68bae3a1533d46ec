"""The definition: every window of W inputs, masked by the number of resets seen, times the taps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def causal_conv1d_reference(
    x: Array, weight: Array, bias: Array, state: Array, resets: Array | None, silu: bool
) -> Array:
    """y_t = act(bias + sum_k weight[k] x[t-(W-1)+k]); arguments as for `causal_conv1d_xla`."""
    t_len, width = x.shape[1], weight.shape[0]
    acc = jnp.promote_types(jnp.result_type(x, weight, bias), jnp.float32)
    source = jnp.arange(t_len)[:, None] + jnp.arange(width)  # [T, W], state included
    windows = jnp.concatenate([state.astype(x.dtype), x], axis=1)[:, source].astype(acc)
    if resets is not None:
        seen = jnp.pad(jnp.cumsum(resets, axis=1), ((0, 0), (width - 1, 0)))
        same = seen[:, source] == seen[:, width - 1 :, None]
        windows = jnp.where(same[..., None], windows, 0)
    y = bias.astype(acc) + jnp.sum(windows * weight.astype(acc), axis=2)
    return (jax.nn.silu(y) if silu else y).astype(x.dtype)
