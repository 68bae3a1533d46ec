"""Mamba language models (arXiv 2312.00752, 2405.21060): a stack of Mamba mixers, nothing else."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ...kernels_pallas.matmul import matmul
from ..layers.mlp import GatedMLP
from ..layers.norms import RMSNorm
from ..mixers.mamba import Mamba1, Mamba2, MambaState
from ..partition import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Mamba language model; the fields of a mixer are described at `Mamba1` and `Mamba2`.

    Attributes:
        vocab_size: rows of the embedding (bytes: 259).
        d_model: residual width. n_layer: layers.
        mixer: "mamba1" or "mamba2".
        d_state: states per channel; 0 means 16 (mamba1) or 128 (mamba2).
        dt_rank: mamba1 only. headdim, ngroups, d_ssm, rmsnorm, norm_before_gate, D_has_hdim,
            dt_limit, chunk: mamba2 only; dt_limit () means none.
        d_intermediate: hidden width of a gated MLP after every mixer; 0 means no MLP.
        mask_documents: the state starts afresh at document boundaries.
        tie_embeddings: output head = embedding.
        norm_epsilon: of the RMS norms between layers.
        residual_in_fp32: keep the residual stream in float32 whatever the compute dtype.
    """

    vocab_size: int = 259
    d_model: int = 768
    n_layer: int = 24
    mixer: str = "mamba2"
    d_state: int = 0
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0
    headdim: int = 64
    ngroups: int = 1
    d_ssm: int = 0
    rmsnorm: bool = True
    norm_before_gate: bool = False
    D_has_hdim: bool = False
    dt_limit: tuple[float, ...] = ()
    chunk: int = 128
    use_bias: bool = False
    conv_bias: bool = True
    d_intermediate: int = 0
    mask_documents: bool = False
    tie_embeddings: bool = True
    norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True


def make_mixer(config: MambaConfig, dtype=jnp.float32, **module) -> Mamba1 | Mamba2:
    """The mixer of a config; `module` goes to the Flax module (name, parent).

    Raises:
        ValueError: an unknown kind of mixer.
    """
    c = config
    branches = c.n_layer * (2 if c.d_intermediate else 1)
    common = dict(
        features=c.d_model, d_conv=c.d_conv, expand=c.expand, use_bias=c.use_bias,
        conv_bias=c.conv_bias, out_scale=branches**-0.5, dtype=dtype,
    )  # fmt: skip
    if c.mixer == "mamba1":
        return Mamba1(d_state=c.d_state or 16, dt_rank=c.dt_rank, **common, **module)
    if c.mixer == "mamba2":
        return Mamba2(
            d_state=c.d_state or 128, headdim=c.headdim, ngroups=c.ngroups, d_ssm=c.d_ssm,
            rmsnorm=c.rmsnorm, norm_before_gate=c.norm_before_gate, D_has_hdim=c.D_has_hdim,
            dt_limit=c.dt_limit or None, chunk=c.chunk, **common, **module,
        )  # fmt: skip
    raise ValueError(f"mixer={config.mixer!r}; choose mamba1 or mamba2")


class Layer(nn.Module):
    """r + mixer(norm(r)), and with an MLP r + mlp(norm(r)) after it. In scan form."""

    config: MambaConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, r, state, segment_ids, lengths):
        c = self.config
        norm = lambda name: RMSNorm(bias=False, epsilon=c.norm_epsilon, name=name)
        mixer = make_mixer(c, self.dtype, name="mixer")
        h = norm("norm")(r).astype(self.dtype)
        if state is None:
            y, _ = mixer(h, segment_ids=segment_ids)
        else:
            y, state, _ = mixer.extend(h, state, lengths=lengths, segment_ids=segment_ids)
        r = constrain(r + y.astype(r.dtype), "batch", "seq", None)
        if c.d_intermediate:
            branches = (2 * c.n_layer) ** -0.5
            mlp = GatedMLP(c.d_intermediate, out_scale=branches, dtype=self.dtype, name="mlp")
            r = r + mlp(norm("norm2")(r).astype(self.dtype)).astype(r.dtype)
            r = constrain(r, "batch", "seq", None)
        return r, state


REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class MambaLM(nn.Module):
    """Language model of Mamba layers; parameters of all layers are stacked on axis 0.

    Attributes:
        config: sizes and switches.
        dtype: of matmul inputs; logits are float32.
        remat: "none", "full" or "dots": what the backward pass recomputes per layer.
        unroll: compile every layer on its own instead of one in a loop: faster, and slower to
            compile.
    """

    config: MambaConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unroll: bool = False

    state_grows = False  # the state has one size for any context

    def setup(self):
        c = self.config
        layer = Layer
        if self.remat != "none":
            layer = nn.remat(Layer, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.n_layer,
            unroll=c.n_layer if self.unroll else 1,
        )(c, self.dtype)
        self.embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (c.vocab_size, c.d_model)
        )
        self.norm_f = RMSNorm(bias=False, epsilon=c.norm_epsilon)
        if not c.tie_embeddings:
            self.lm_head = self.param(
                "lm_head", nn.initializers.normal(0.02), (c.vocab_size, c.d_model)
            )

    def __call__(self, tokens: Array, *, segment_ids=None) -> tuple[Array, dict]:
        """Logits of whole sequences.

        Args:
            tokens: [B, T] int32; padding on the right changes no logits before it.
            segment_ids: [B, T] document ids; they matter with `mask_documents` only.

        Returns:
            logits [B, T, vocab] float32 (log-softmax them) and {} (no auxiliary losses).
        """
        return self._run(tokens, None, segment_ids, None)[0], {}

    def extend(self, tokens: Array, state, *, lengths=None, segment_ids=None, tables=None):
        """Continue from `state` with tokens [B, T]: logits [B, T, vocab], new state, {}.

        `lengths` [B] counts valid tokens (right padding); `tables` are `decoding_tables`: None.
        """
        del tables
        logits, state = self._run(tokens, state, segment_ids, lengths)
        return logits, state, {}

    def step(self, tokens: Array, state, *, tables=None):
        """One token per row, tokens [B]: logits [B, vocab] and the new state."""
        logits, state, _ = self.extend(tokens[:, None], state)
        return logits[:, 0], state

    @nn.nowrap
    def init_state(self, batch: int, dtype=None, max_length: int | None = None) -> MambaState:
        """State before the first token, stacked over layers (batch is axis 1)."""
        one = make_mixer(self.config, self.dtype, parent=None).init_state(batch, dtype, max_length)
        stack = lambda a: jnp.broadcast_to(a, (self.config.n_layer, *a.shape))
        return jax.tree.map(stack, one)

    @nn.nowrap
    def decoding_tables(self, variables, slots: int | None) -> None:
        """Constants for decoding, made once: none."""
        return None

    def _run(self, tokens, state, segment_ids, lengths):
        c = self.config
        r = jnp.take(self.embedding, tokens, axis=0)
        r = r.astype(jnp.float32 if c.residual_in_fp32 else self.dtype)
        r = constrain(r, "batch", "seq", None)
        segments = segment_ids if c.mask_documents else None
        r, state = self.layers(r, state, segments, lengths)
        h = self.norm_f(r).astype(self.dtype)
        head = self.embedding if c.tie_embeddings else self.lm_head
        logits = matmul("btd,vd->btv", h, head.astype(self.dtype))
        return constrain(logits.astype(jnp.float32), "batch", "seq", None), state
