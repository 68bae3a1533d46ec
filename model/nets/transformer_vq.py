"""Transformer-VQ (arXiv 2309.16354)."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ..layers.codebook import update_codebook
from ..layers.embeddings import sinusoids
from ..layers.mlp import SquaredReLUMLP, fan_in
from ..layers.norms import RMSNorm
from ..mixers.vq_attention import CODES_NAME, VQAttention
from ..partition import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerVQConfig:
    """Transformer-VQ language model.

    Attributes:
        vocab_size: size of the token vocabulary (bytes: 259).
        d_model: residual width D.
        n_layer: layers; a layer is two attention sublayers (shga) or attention + MLP (mqa, mha).
        head_type: "shga" (gated, `n_head` heads), "mqa" or "mha" (D/d_k query heads, MLP).
        n_head: heads of the gated type; ignored by mqa/mha, whose count is D // d_k.
        d_k, d_v: key and value width per head; d_v applies to shga only, 0 = 2*D/n_head.
        n_code: codes S per key-value head.
        block_len: block length L; the function computed does not depend on it.
        mem_len: uncompressed window M before the block; position bias reaches this far.
        attention: "vq", or the quadratic baselines "dense" (unquantised keys, relative position
            bias at every distance) and "flash" (unquantised keys, no relative bias, fused
            attention).
        cache: attend to the compressive cache (False: sliding window of M keys).
        grad_through_cache: let gradients flow into keys and values of earlier blocks.
        reduction: "serial", "associative" or "matmul": how the cache recurrence is computed.
        mask_documents: keys of other documents are invisible (the reference lets them through).
        norm_affine: gain and bias in the input and output norms.
        pe_abs: add scaled absolute sinusoids to the embeddings.
        pe_lam: largest wavelength of the sinusoids.
        tie_embeddings, out_norm, logit_scale: output head; logit_scale multiplies "logits"
            (including the bias) or "features" as `scale_on` says; tied_bias adds a bias to a tied
            head.
        dropout_*: rates for embeddings, the sinusoid table, residual branches and whole sublayers.
        commit_weight: coefficient of the commitment loss.
        codebook_decay: EMA decay gamma of the codebook.
        revive_below: codes whose EMA count falls under this are replaced by splitting the most
            used codes; 0 = never.
    """

    vocab_size: int = 259
    d_model: int = 768
    n_layer: int = 24
    head_type: str = "shga"
    n_head: int = 1
    d_k: int = 128
    d_v: int = 0
    n_code: int = 512
    block_len: int = 512
    mem_len: int = 512
    attention: str = "vq"
    cache: bool = True
    grad_through_cache: bool = True
    reduction: str = "associative"
    mask_documents: bool = False
    norm_affine: bool = True
    pe_abs: bool = False
    pe_lam: float = 100_000.0
    tie_embeddings: bool = False
    tied_bias: bool = True
    out_norm: bool = False
    logit_scale: float = 1.0
    scale_on: str = "logits"
    dropout_emb: float = 0.0
    dropout_sin: float = 0.0
    dropout_res: float = 0.0
    dropout_layer: float = 0.0
    commit_weight: float = 1e-4
    codebook_decay: float = 0.99
    revive_below: float = 0.0


def head_geometry(config: TransformerVQConfig) -> dict[str, int | bool]:
    """Heads, key-value heads and widths of a head type, as arguments of `VQAttention`."""
    if config.head_type == "shga":
        d_v = config.d_v or 2 * config.d_model // config.n_head
        return dict(num_heads=config.n_head, num_kv_heads=config.n_head, value_dim=d_v, gated=True)
    if config.head_type not in ("mqa", "mha"):
        raise ValueError(f"head_type={config.head_type!r}; choose shga, mqa or mha")
    heads, rest = divmod(config.d_model, config.d_k)
    if rest:
        raise ValueError(f"d_model={config.d_model} is not a multiple of d_k={config.d_k}")
    kv_heads = heads if config.head_type == "mha" else 1
    return dict(num_heads=heads, num_kv_heads=kv_heads, value_dim=config.d_k, gated=False)


def make_mixer(config: TransformerVQConfig, dtype=jnp.float32, **kwargs) -> VQAttention:
    """The attention sublayer of a config, usable on its own."""
    c = config
    return VQAttention(
        features=c.d_model, key_dim=c.d_k, n_code=c.n_code, block_len=c.block_len,
        mem_len=c.mem_len, attention=c.attention, use_cache=c.cache,
        grad_through_cache=c.grad_through_cache, reduction=c.reduction,
        mask_documents=c.mask_documents, norm_affine=c.norm_affine, pe_lam=c.pe_lam,
        dropout_sin=c.dropout_sin, dropout_res=c.dropout_res, dtype=dtype,
        **head_geometry(c), **kwargs,
    )  # fmt: skip


class Layer(nn.Module):
    """Two residual sublayers: attention twice (shga), or attention and an MLP (mqa, mha).

    `states` and `tables` hold one entry per attention sublayer, or None (fresh sequence; made
    here).
    """

    config: TransformerVQConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, states, tables, mask, segment_ids, lengths):
        c = self.config
        layer_drop = nn.Dropout(c.dropout_layer, broadcast_dims=(1, 2), rng_collection="timeless")
        keep_all = not self.has_rng("timeless")
        new_states, aux = {}, {}
        for name in attention_names(c):
            mixer = make_mixer(c, self.dtype, name=name)
            if states is None:
                y, aux[name] = mixer(x, mask=mask, segment_ids=segment_ids)
            else:
                y, new_states[name], aux[name] = mixer.extend(
                    x, states[name], lengths=lengths, mask=mask, segment_ids=segment_ids,
                    rel=None if tables is None else tables[name],
                )  # fmt: skip
            x = x + layer_drop(y, deterministic=keep_all).astype(x.dtype)
            self.sow("intermediates", f"{name}_out", x)
        if c.head_type != "shga":
            hidden = {"mqa": 5, "mha": 4}[c.head_type] * c.d_model
            y = SquaredReLUMLP(hidden, c.norm_affine, self.dtype, name="mlp")(x)
            y = nn.Dropout(c.dropout_res)(y, deterministic=not self.has_rng("dropout"))
            x = x + layer_drop(y, deterministic=keep_all).astype(x.dtype)
            x = constrain(x, "batch", "seq", None)
            self.sow("intermediates", "mlp_out", x)
        return x, (new_states if states is not None else None, aux)


def attention_names(config: TransformerVQConfig) -> tuple[str, ...]:
    """Names of the attention sublayers of a layer."""
    return ("attn1", "attn2") if config.head_type == "shga" else ("attn",)


# "full" recomputes all but the codes: one integer per key saves the search for the nearest code.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.save_only_these_names(CODES_NAME),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class TransformerVQ(nn.Module):
    """Language model over VQ-attention layers; parameters of all layers are stacked on axis 0.

    Variables: "params", and "stats" with the EMA codebooks under stats["layers"][sublayer].
    Dropout acts iff rngs "dropout" (new per update) and "timeless" (one draw per sequence) are
    given.

    Attributes:
        config: sizes and switches.
        dtype: of matmul inputs and the residual stream; logits are float32.
        remat: "none", "full" or "dots": what the backward pass recomputes per layer.
        unroll: compile every layer on its own instead of one in a loop: faster, and slower to
            compile.
    """

    config: TransformerVQConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unroll: bool = False

    def setup(self):
        c = self.config
        layer = Layer
        if self.remat != "none":
            layer = nn.remat(Layer, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0, "stats": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True, "timeless": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.n_layer,
            unroll=c.n_layer if self.unroll else 1,
        )(c, self.dtype)
        self.embedding = self.param(
            "embedding", nn.initializers.normal(1.0), (c.vocab_size, c.d_model)
        )
        if c.pe_abs:
            self.pe_scale = self.param("pe_scale", nn.initializers.zeros, ())
        self.emb_dropout = nn.Dropout(c.dropout_emb)
        if c.out_norm:
            self.out_ln = RMSNorm(c.norm_affine)
        if not c.tie_embeddings:
            self.out_proj = nn.Dense(c.vocab_size, kernel_init=fan_in, dtype=jnp.float32)
        elif c.tied_bias:
            self.out_bias = self.param("out_bias", nn.initializers.zeros, (c.vocab_size,))

    def __call__(self, tokens: Array, *, mask=None, segment_ids=None) -> tuple[Array, dict]:
        """Logits of whole sequences that start at position 0.

        Args:
            tokens: [B, T] int32. mask: [B, T] tokens that count in the commitment loss and
                codebooks.
            segment_ids: [B, T] document ids.

        Returns:
            logits [B, T, vocab] float32 (log-softmax them) and aux: {"commit": [n_layer, B, T] per
            sublayer name, "stats_delta": tree like "stats", "metrics": scalars}.
        """
        logits, _, aux = self._run(tokens, None, None, mask, segment_ids, None)
        return logits, aux

    def extend(
        self, tokens: Array, state, *, lengths=None, mask=None, segment_ids=None, tables=None
    ):
        """Continue from `state` with tokens [B, T]: logits [B, T, vocab], new state, aux.

        `lengths` [B] counts valid tokens (right padding); `tables` come from `rel_tables`.
        """
        return self._run(tokens, state, tables, mask, segment_ids, lengths)

    def step(self, tokens: Array, state, *, tables=None):
        """One token per row, tokens [B]: logits [B, vocab] and the new state."""
        logits, state, _ = self.extend(tokens[:, None], state, tables=tables)
        return logits[:, 0], state

    @nn.nowrap
    def init_state(self, batch: int, dtype=None, max_length: int | None = None):
        """State before the first token: per attention sublayer, stacked over layers (batch is axis
        1).
        """
        mixer = make_mixer(self.config, self.dtype, parent=None)
        one = mixer.init_state(batch, dtype, max_length)
        stack = lambda a: jnp.broadcast_to(a, (self.config.n_layer, *a.shape))
        return {name: jax.tree.map(stack, one) for name in attention_names(self.config)}

    @property
    def state_grows(self) -> bool:
        """Whether `init_state` needs max_length: quadratic attention keeps every key."""
        return self.config.attention != "vq"

    @nn.nowrap
    def decoding_tables(self, variables, slots: int | None):
        """`rel_tables` for decoding with a state of `slots` (None for VQ); None for "flash"."""
        if self.config.attention == "flash":
            return None
        return self.apply(variables, slots, method="rel_tables")

    def rel_tables(self, length: int | None = None):
        """Position tables of all sublayers, stacked over layers; constants while decoding."""
        names = attention_names(self.config)
        params = self.variables["params"]["layers"]

        def table(p, s):
            mixer = make_mixer(self.config, self.dtype, parent=None)
            return mixer.apply({"params": p, "stats": s}, length, method="rel_table")

        stats = self.variables.get("stats", {}).get("layers", {})
        return {n: jax.vmap(table)(params[n], stats.get(n, {})) for n in names}

    def _run(self, tokens, state, tables, mask, segment_ids, lengths):
        c = self.config
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        if c.pe_abs:
            start = 0 if state is None else state[attention_names(c)[0]].offset[0][:, None]
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
            x = x + (self.pe_scale * sinusoids(positions, c.d_model, c.pe_lam)).astype(x.dtype)
        x = self.emb_dropout(x, deterministic=not self.has_rng("dropout"))
        x = constrain(x, "batch", "seq", None)
        self.sow("intermediates", "embedded", x)
        x, (state, aux) = self.layers(x, state, tables, mask, segment_ids, lengths)
        if c.out_norm:
            x = self.out_ln(x)
        x = x.astype(jnp.float32)
        if c.scale_on == "features":
            x = x * c.logit_scale
        if c.tie_embeddings:
            logits = x @ self.embedding.T
            logits = logits + self.out_bias if c.tied_bias else logits
        else:
            logits = self.out_proj(x)
        if c.scale_on == "logits":
            logits = logits * c.logit_scale
        return constrain(logits, "batch", "seq", None), state, _collect(aux)


def _collect(aux: dict) -> dict:
    """From {sublayer: stacked aux} to {"commit", "stats_delta", "metrics"}."""
    aux = {name: a for name, a in aux.items() if a}
    if not aux:
        return {}
    metrics = [a["metrics"] for a in aux.values()]
    return {
        "commit": {name: a["commit"] for name, a in aux.items()},
        "stats_delta": {"layers": {name: a["stats_delta"] for name, a in aux.items()}},
        "metrics": jax.tree.map(lambda *xs: jnp.mean(jnp.stack(xs)), *metrics),
    }


def absorb(config: TransformerVQConfig, stats: dict, delta: dict) -> dict:
    """New codebooks after one update; `delta` sums `aux["stats_delta"]` over everything the update
    saw.
    """
    if not stats:
        return stats
    update = lambda s, d: update_codebook(
        s, d, decay=config.codebook_decay, revive_below=config.revive_below
    )
    return {"layers": {n: update(s, delta["layers"][n]) for n, s in stats["layers"].items()}}
