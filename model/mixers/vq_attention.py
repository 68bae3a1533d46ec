"""Transformer-VQ attention sublayer: gated single-head (shga), multi-query or multi-head, VQ or
quadratic.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from ...kernels_pallas import vq_attention as vq
from ..layers.codebook import codebook_metrics, quantisation_metrics
from ..layers.embeddings import sinusoids
from ..layers.mlp import fan_in
from ..layers.norms import RMSNorm, rms_normalise
from ..partition import constrain
from .attention import dense_attention, flash_attention, init_dense_state
from .contract import refuse_context

AttentionState = Any  # VQState or DenseState
CODES_NAME = "vq_codes"  # for rematerialisation policies
ATTENTION_KINDS = ("vq", "dense", "flash")


class VQAttention(nn.Module):
    """y = W_res (o * g) with o = VQ attention of normalised q, quantised k, and v (arXiv
    2309.16354).

        x~ = norm(x);  q, k = rms(W_q x~), rms(W_k x~), each times K^(-1/4);  k^ = nearest codeword
        of k gated: v = silu(W_v x~), g = silu(W_g x~);  otherwise v = W_v x~ and no gate

    The codebook is an EMA held in the collection "stats" (c_sum [h, S, K], c_count [h, S]): it
    learns through `aux["stats_delta"]`, not by gradient. Dropout acts iff rngs "dropout" and
    "timeless" are given ("timeless" draws are to be kept for all updates of one sequence).

    Attributes:
        features: width D of x and y.
        num_heads, num_kv_heads: H and h; key_dim, value_dim: K and V per head; gated: as above.
        n_code, block_len, mem_len, use_cache, grad_through_cache, reduction, mask_documents: see
            `kernels_pallas.vq_attention.vq_attention`.
        attention: "vq"; "dense" (unquantised keys, position bias at every distance); "flash"
            (unquantised keys, no position bias, fused kernels). All share the same parameters.
        norm_affine: gain and bias in the input norm. pe_lam: see `sinusoids`.
        dropout_sin, dropout_res: rates on the position table and on the output.
        dtype: of matmul inputs; norms, distances, softmax and statistics are float32.
    """

    features: int
    num_heads: int = 1
    num_kv_heads: int = 1
    key_dim: int = 128
    value_dim: int = 1536
    gated: bool = True
    n_code: int = 512
    block_len: int = 512
    mem_len: int = 512
    attention: str = "vq"
    use_cache: bool = True
    grad_through_cache: bool = True
    reduction: str = "associative"
    mask_documents: bool = False
    norm_affine: bool = True
    pe_lam: float = 100_000.0
    dropout_sin: float = 0.0
    dropout_res: float = 0.0
    dtype: jnp.dtype = jnp.float32
    implementation: str | None = None

    def setup(self):
        if self.attention not in ATTENTION_KINDS:
            raise ValueError(f"attention={self.attention!r}; choose {', '.join(ATTENTION_KINDS)}")
        dense = lambda n: nn.Dense(n, use_bias=False, kernel_init=fan_in, dtype=self.dtype)
        self.input_ln = RMSNorm(self.norm_affine)
        self.q_proj = dense(self.num_heads * self.key_dim)
        self.k_proj = dense(self.num_kv_heads * self.key_dim)
        self.v_proj = dense(self.num_kv_heads * self.value_dim)
        self.r_proj = dense(self.num_kv_heads * self.key_dim)
        self.res_proj = dense(self.features)
        if self.gated:
            self.g_proj = dense(self.num_heads * self.value_dim)
        self.u = self.param("u", nn.initializers.zeros, (self.num_heads * self.key_dim,))
        self.v = self.param("v", nn.initializers.zeros, (self.num_heads * self.key_dim,))
        self.sin_dropout = nn.Dropout(self.dropout_sin, rng_collection="timeless")
        self.res_dropout = nn.Dropout(self.dropout_res)
        if self.attention == "vq":
            shape = (self.num_kv_heads, self.n_code, self.key_dim)
            self.c_sum = self.variable(
                "stats", "c_sum", lambda: fan_in(self.make_rng("params"), shape)
            )
            self.c_count = self.variable("stats", "c_count", jnp.ones, shape[:2])

    def __call__(
        self,
        x: Array,
        *,
        context: None = None,
        context_mask: None = None,
        positions: None = None,
        mask: Array | None = None,
        segment_ids: Array | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Mix a whole sequence.

        Args:
            x: [B, T, D].
            mask: [B, T] tokens that count for the commitment loss and the codebook.
            segment_ids: [B, T] document ids.
            context, context_mask, positions: of the mixer contract; this mixer takes none.

        Returns:
            y [B, T, D] and aux: {"commit": [B, T] masked squared quantisation error summed over
            heads, "stats_delta": sums for `update_codebook`, "metrics": scalars}; empty without a
            codebook.
        """
        refuse_context(self, context, context_mask, positions)
        y, _, aux = self._mix(x, None, None, mask, segment_ids, None)
        return y, aux

    def extend(
        self,
        x: Array,
        state: AttentionState,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        segment_ids: Array | None = None,
        rel: Array | None = None,
    ) -> tuple[Array, AttentionState, dict[str, Any]]:
        """Continue from `state` with x [B, T, D] (prefill, truncated BPTT): y, new state, aux.

        `lengths` [B] counts the valid tokens of each row; `rel` is a table made by `rel_table`.
        """
        return self._mix(x, state, lengths, mask, segment_ids, rel)

    def step(self, x_t: Array, state: AttentionState, *, rel: Array | None = None):
        """One token x_t [B, D]: y_t [B, D] and the new state."""
        y, state, _ = self.extend(x_t[:, None], state, rel=rel)
        return y[:, 0], state

    @nn.nowrap
    def init_state(self, batch: int, dtype=None, max_length: int | None = None) -> AttentionState:
        """State before the first token. The quadratic kinds need `max_length`, their number of
        slots.
        """
        dtype = self.dtype if dtype is None else dtype
        sizes = (self.key_dim, self.value_dim, dtype)
        if self.attention == "vq":
            return vq.init_state(batch, self.num_kv_heads, self.mem_len, self.n_code, *sizes)
        if max_length is None:
            raise ValueError(f"attention={self.attention!r} keeps every key: give max_length")
        return init_dense_state(batch, self.num_kv_heads, max_length, *sizes)

    def rel_table(self, length: int | None = None) -> Array:
        """Projected, scaled sinusoids [h, n, K] by distance 0..n-1; n = M+1 unless given.

        A constant while decoding: compute it once and pass it to `extend` and `step`.
        """
        length = self.mem_len + 1 if length is None else length
        table = sinusoids(jnp.arange(length), self.features, self.pe_lam)
        table = self.sin_dropout(table, deterministic=not self.has_rng("timeless"))
        table = self.r_proj(table).astype(jnp.float32)
        table = table.reshape(length, self.num_kv_heads, self.key_dim)
        return jnp.moveaxis(table, 1, 0) * self.key_dim**-0.25

    def _mix(self, x, state, lengths, mask, segment_ids, rel):
        batch, t_len, _ = x.shape
        scale = self.key_dim**-0.25

        def heads(a, n):  # [B, T, n*d] -> [B, n, T, d]
            a = jnp.moveaxis(a.reshape(batch, t_len, n, -1), 2, 1)
            return constrain(a, "batch", "heads", "seq", None)

        x = constrain(x, "batch", "seq", None)
        h = self.input_ln(x)
        q = heads(self.q_proj(h), self.num_heads)
        k = heads(self.k_proj(h), self.num_kv_heads)
        v = self.v_proj(h)
        v = heads(nn.silu(v) if self.gated else v, self.num_kv_heads)
        q = (rms_normalise(q) * scale).astype(self.dtype)
        k = rms_normalise(k) * scale
        bias = {
            name: a.reshape(self.num_heads, self.key_dim) * scale
            for name, a in (("content_bias", self.u), ("position_bias", self.v))
        }
        for name, a in (("q", q), ("k", k), ("v", v)):
            self.sow("intermediates", name, a)

        mix = {"vq": self._mix_vq, "dense": self._mix_dense, "flash": self._mix_flash}
        out, state, aux = mix[self.attention](q, k, v, bias, state, lengths, mask, segment_ids, rel)

        out = constrain(out, "batch", "heads", "seq", None)
        out = jnp.moveaxis(out, 1, 2).reshape(batch, t_len, -1).astype(self.dtype)
        self.sow("intermediates", "attention", out)
        if self.gated:
            gate = nn.silu(self.g_proj(h))
            self.sow("intermediates", "gate", gate)
            out = out * gate
        y = self.res_dropout(self.res_proj(out), deterministic=not self.has_rng("dropout"))
        return constrain(y, "batch", "seq", None), state, aux

    def _mix_vq(self, q, k, v, bias, state, lengths, mask, segment_ids, rel):
        t_len = q.shape[2]
        codebook = vq.codewords(self.c_sum.value, self.c_count.value)
        codes = checkpoint_name(vq.nearest_code(k, codebook), CODES_NAME)
        k_hat, errors = vq.straight_through(k, codes, codebook)
        self.sow("intermediates", "codes", codes)
        counted = mask
        if lengths is not None:
            valid = jnp.arange(t_len) < lengths[:, None]
            counted = valid if mask is None else valid & (mask != 0)
        commit = jnp.sum(errors, axis=1)
        aux = {
            "commit": commit if counted is None else jnp.where(counted != 0, commit, 0),
            "stats_delta": vq.codebook_statistics(k, codes, counted, self.n_code),
            "metrics": codebook_metrics(self.c_sum.value, self.c_count.value)
            | quantisation_metrics(k, k_hat, errors, min(self.block_len, t_len)),
        }
        out, state = vq.vq_attention(
            q, k_hat, codes, v, codebook, **bias,
            rel=self.rel_table() if rel is None else rel, state=state,
            segment_ids=segment_ids, lengths=lengths, block_len=self.block_len,
            use_cache=self.use_cache, grad_through_cache=self.grad_through_cache,
            mask_segments=self.mask_documents, reduction=self.reduction,
            implementation=self.implementation,
        )  # fmt: skip
        return out, state, aux

    def _mix_dense(self, q, k, v, bias, state, lengths, mask, segment_ids, rel):
        if rel is None:
            rel = self.rel_table(q.shape[2] if state is None else state.keys.shape[2])
        out, state = dense_attention(
            q, k.astype(self.dtype), v, **bias, rel=rel, state=state, segment_ids=segment_ids,
            lengths=lengths, mask_segments=self.mask_documents,
        )  # fmt: skip
        return out, state, {}

    def _mix_flash(self, q, k, v, bias, state, lengths, mask, segment_ids, rel):
        if self.is_initializing():
            self.rel_table(1)  # the same parameters as the other kinds
        k = k.astype(self.dtype)
        if state is None:
            q = q + bias["content_bias"][None, :, None].astype(q.dtype)
            ids = segment_ids if self.mask_documents else None
            return flash_attention(q, k, v, segment_ids=ids), None, {}
        out, state = dense_attention(
            q, k, v, **bias, rel=None, state=state, segment_ids=segment_ids, lengths=lengths,
            mask_segments=self.mask_documents,
        )  # fmt: skip
        return out, state, {}
