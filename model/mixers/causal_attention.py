"""Causal multi-head attention of the size of a Mamba-2 mixer: what it is compared with.

With expand = 2 a Mamba-2 mixer of width d has about 6 d^2 parameters. Four projections between d
and an attention of width 1.5 d have as many.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from ..layers.mlp import uniform_fan_in
from ..partition import constrain
from .contract import refuse_context


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens read so far; all rows have read equally many.

    Attributes:
        offset: [] int32 tokens read.
        keys, values: [B, N, H, K] for N = max_length tokens.
    """

    offset: Array
    keys: Array
    values: Array


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v over the tokens up to the present one (arXiv 1706.03762, section
    3.2), without position bias; rows are whole: no padding, no documents.

    Attributes:
        features: width d of the input and output.
        head_dim: K.
        width: of the attention; 0 means 1.5 d, rounded to whole heads (at least one).
        use_bias: biases of the projections.
        out_scale: factor on the initial W_out.
        dtype: of the matmuls; the softmax is float32.
    """

    features: int
    head_dim: int = 64
    width: int = 0
    use_bias: bool = False
    out_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.nowrap
    def heads(self) -> int:
        """Number of heads.

        Raises:
            ValueError: head_dim does not divide the width.
        """
        if self.width % self.head_dim:
            raise ValueError(f"width={self.width} is not divisible by head_dim={self.head_dim}")
        nearest = (3 * self.features + self.head_dim) // (2 * self.head_dim)
        return self.width // self.head_dim or max(1, nearest)

    def setup(self):
        inner = self.heads() * self.head_dim
        dense = lambda n, init: nn.Dense(
            n, use_bias=self.use_bias, kernel_init=init, dtype=self.dtype
        )
        self.in_proj = dense(3 * inner, uniform_fan_in)
        self.out_proj = dense(self.features, lambda *a: self.out_scale * uniform_fan_in(*a))

    def __call__(
        self,
        x: Array,
        *,
        context: None = None,
        context_mask: None = None,
        positions: None = None,
        mask: None = None,
        segment_ids: None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Mix whole rows x [B, T, d]: y [B, T, d] and {} (no auxiliary losses).

        Raises:
            ValueError: any other argument of the mixer contract is given.
        """
        refuse_context(self, context, context_mask, positions)
        self._refuse_ragged(mask, segment_ids)
        q, k, v = self._project(x)
        # cuDNN's fused kernels take 16-bit types and, for their gradients, even lengths.
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        fused = jax.default_backend() == "gpu" and half and x.shape[1] % 2 == 0
        y = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn" if fused else "xla"
        )
        return self._out(y), {}

    def extend(
        self,
        x: Array,
        state: KeyValueCache,
        *,
        lengths: None = None,
        mask: None = None,
        segment_ids: None = None,
    ) -> tuple[Array, KeyValueCache, dict[str, Any]]:
        """Continue from `state` with x [B, T, d]: y, new state, {}.

        Raises:
            ValueError: padding or documents are given, or T exceeds the cache. Reading more tokens
                in all than the cache has room for is the caller's error and is not noticed.
        """
        self._refuse_ragged(lengths, mask, segment_ids)
        t_len, slots = x.shape[1], state.keys.shape[1]
        if t_len > slots:
            raise ValueError(f"{t_len} tokens do not fit a cache of max_length={slots}")
        q, k, v = self._project(x)
        write = lambda cache, new: lax.dynamic_update_slice_in_dim(
            cache, new.astype(cache.dtype), state.offset, axis=1
        )
        keys, values = write(state.keys, k), write(state.values, v)
        seen = jnp.arange(slots) <= (state.offset + jnp.arange(t_len))[:, None]
        y = jax.nn.dot_product_attention(
            q, keys.astype(q.dtype), values.astype(q.dtype), mask=seen[None, None],
            implementation="xla",
        )  # fmt: skip
        return self._out(y), KeyValueCache(state.offset + t_len, keys, values), {}

    def step(self, x_t: Array, state: KeyValueCache) -> tuple[Array, KeyValueCache]:
        """One token x_t [B, d]: y_t [B, d] and the new state."""
        y, state, _ = self.extend(x_t[:, None], state)
        return y[:, 0], state

    @nn.nowrap
    def init_state(self, batch: int, dtype=None, max_length: int | None = None) -> KeyValueCache:
        """An empty cache for `max_length` tokens.

        Raises:
            ValueError: no max_length is given.
        """
        if max_length is None:
            raise ValueError("attention keeps every token: init_state needs max_length")
        shape = (batch, max_length, self.heads(), self.head_dim)
        zeros = jnp.zeros(shape, self.dtype if dtype is None else dtype)
        return KeyValueCache(jnp.zeros((), jnp.int32), zeros, zeros)

    def _refuse_ragged(self, *given: Any) -> None:
        if any(argument is not None for argument in given):
            raise ValueError(
                "CausalAttention takes whole rows of one document: no mask, lengths or segment_ids"
            )

    def _project(self, x):
        x = constrain(x, "batch", "seq", None)
        qkv = self.in_proj(x).reshape(*x.shape[:2], 3, self.heads(), self.head_dim)
        return tuple(constrain(qkv[:, :, i], "batch", "seq", "heads", None) for i in range(3))

    def _out(self, y):
        y = constrain(y, "batch", "seq", "heads", None)
        y = self.out_proj(y.reshape(*y.shape[:2], -1).astype(self.dtype))
        return constrain(y, "batch", "seq", None)
