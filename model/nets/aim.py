"""AiM: image tokens by class from a stack of Mamba mixers (arXiv 2408.12245).

Token t of an image is predicted from its class and the tokens before it. The class is the first
input of the sequence, and modulates every block (`model/layers/conditioning.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from ...kernels_pallas.matmul import matmul
from ..layers import conditioning
from ..layers.conditioning import (
    BlockModulation,
    ModulatedRMSNorm,
    ModulationHead,
    gated_add,
    modulate,
)
from ..layers.mlp import GatedMLP
from ..layers.norms import RMSNorm
from ..mixers.causal_attention import CausalAttention
from ..partition import constrain
from . import mamba_lm


@dataclasses.dataclass(frozen=True, kw_only=True)
class AiMConfig:
    """AiM's second stage; the fields of a mixer are described at `Mamba1` and `Mamba2`.

    Attributes:
        vocab_size: codes of the tokenizer.
        num_classes: K; class id K is the null class, for guidance.
        num_tokens: T, tokens of an image in raster order.
        d_model: residual width. n_layer: blocks.
        conditioning: "adaln" (a head per block), "adaln_single" (one for all) or "adaln_group"
            (`num_groups`, block i uses number i mod num_groups), the latter two with a table per
            block.
        mixer: "mamba2", "mamba1", or "attention" of equal size (heads of width headdim).
        position_offset: when sampling, the token before number j enters at position
            j - 1 + position_offset. 0 is what training does; the released weights were sampled
            with 1.
        class_dropout: probability that a row trains on the null class.
        token_drop: dropout of token embeddings, before positions are added.
        mixer_drop, mlp_drop: dropout of the branches' outputs.
        d_state, d_conv, .., chunk, use_bias, conv_bias, d_intermediate, tie_embeddings,
            norm_epsilon, residual_in_fp32: as in `MambaConfig`.
    """

    vocab_size: int = 16384
    num_classes: int = 1000
    num_tokens: int = 256
    d_model: int = 768
    n_layer: int = 24
    conditioning: str = "adaln"
    num_groups: int = 4
    mixer: str = "mamba2"
    position_offset: int = 0
    class_dropout: float = 0.1
    token_drop: float = 0.0
    mixer_drop: float = 0.0
    mlp_drop: float = 0.0
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
    tie_embeddings: bool = True
    norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True

    @property
    def branches(self) -> int:
        """Residual branches of a block: the mixer, and the MLP if there is one."""
        return 2 if self.d_intermediate else 1

    @property
    def groups(self) -> int:
        """Shared modulation heads; 0 where each block has its own."""
        return conditioning.groups_of(self.conditioning, self.num_groups)


def make_mixer(config: AiMConfig, dtype=jnp.float32, **module):
    """The mixer of a config; `module` goes to the Flax module (name, parent).

    W_out starts divided by the square root of the number of residual branches, n_layer, or
    2 n_layer with an MLP (which the reference intends, but applies n_layer to such nets).

    Raises:
        ValueError: an unknown kind of mixer.
    """
    if config.mixer != "attention":
        if config.mixer not in ("mamba1", "mamba2"):
            raise ValueError(f"mixer={config.mixer!r}; choose mamba1, mamba2 or attention")
        return mamba_lm.make_mixer(config, dtype, **module)
    scale = (config.branches * config.n_layer) ** -0.5
    return CausalAttention(
        config.d_model, config.headdim, use_bias=config.use_bias, out_scale=scale, dtype=dtype,
        **module,
    )  # fmt: skip


class Modulation(NamedTuple):
    """What the classes of a batch contribute; the same for every token.

    Attributes:
        first: [B, d] float32 class embeddings, the first inputs.
        layers: [n_layer, 3 branches, B, d] shifts, scales and gates.
        final: [2, B, d] shift and scale before the head.
    """

    first: Array
    layers: Array
    final: Array


class Layer(nn.Module):
    """r + gate * mixer(norm(r) (1 + scale) + shift), and with an MLP the same again."""

    config: AiMConfig
    dtype: jnp.dtype

    def setup(self):
        c = self.config
        norm = lambda: ModulatedRMSNorm(c.norm_epsilon, self.dtype)
        self.modulation = BlockModulation(3 * c.branches, self.dtype)
        self.norm = norm()
        self.mixer = make_mixer(c, self.dtype)
        self.mixer_drop = nn.Dropout(c.mixer_drop)
        if c.d_intermediate:
            scale = (2 * c.n_layer) ** -0.5
            self.norm2 = norm()
            self.mlp = GatedMLP(c.d_intermediate, out_scale=scale, dtype=self.dtype)
            self.mlp_drop = nn.Dropout(c.mlp_drop)

    def conditioning(self, c: Array, shared: Array | None):
        """c [B, d] as it is, and the block's vectors [3 branches, B, d]. In scan form."""
        return c, self.modulation(c, shared).astype(self.dtype)

    def __call__(self, r: Array, vectors: Array, state: Any = None):
        """New residual stream and state: whole rows [B, T, d], or a step [B, d] with a state."""
        vectors = vectors.reshape(3, self.config.branches, *vectors.shape[1:])
        vectors = vectors[..., None, :] if state is None else vectors
        # Each is said to follow the rows: left to itself XLA's partitioner takes rows of other
        # devices for some of them on meshes of data, fsdp and tensor (jax 0.10 to 0.12).
        by_row = lambda v: constrain(v, "batch", *[None] * (v.ndim - 1))
        shift, scale, gate = ([by_row(v) for v in kind] for kind in vectors.astype(r.dtype))
        fixed = not self.has_rng("dropout")
        axes = ("batch", "seq", None) if state is None else ("batch", None)

        self.sow("intermediates", "residual", r)
        h = self.norm(r, shift[0], scale[0])
        self.sow("intermediates", "mixer_in", h)
        if state is None:
            y, _ = self.mixer(h)
        else:
            y, state = self.mixer.step(h, state)
        y, r_in = self.mixer_drop(y, deterministic=fixed), r
        r = constrain(gated_add(r, gate[0], y), *axes)
        if self.config.d_intermediate:
            self.sow("intermediates", "residual2", r)
            y = self.mlp(self.norm2(r, shift[1], scale[1]))
            y, r_in = self.mlp_drop(y, deterministic=fixed), r
            r = constrain(gated_add(r, gate[1], y), *axes)
        self.sow("intermediates", "out", r - r_in)
        return r, state


class AiM(nn.Module):
    """Image tokens by class; parameters of all blocks are stacked on axis 0.

    Dropouts (of classes, tokens and branches) act iff an rng "dropout" is given. The collection
    "intermediates", if asked for, holds what the blocks see.

    Attributes:
        config: sizes and switches.
        dtype: of matmul inputs; logits are float32.
        remat: "none", "full" or "dots": what the backward pass recomputes per block.
        unroll: compile every block on its own instead of one in a loop: faster, and slower to
            compile.
    """

    config: AiMConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unroll: bool = False

    def setup(self):
        c, width = self.config, self.config.d_model
        layer = Layer
        if self.remat != "none":
            policy = mamba_lm.REMAT_POLICIES[self.remat]
            layer = nn.remat(Layer, prevent_cse=False, policy=policy)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=0,
            length=c.n_layer,
            unroll=c.n_layer if self.unroll else 1,
            methods=["__call__", "conditioning"],
        )(c, self.dtype)
        table = lambda name, rows: self.param(name, nn.initializers.normal(0.02), (rows, width))
        self.embedding = table("embedding", c.vocab_size)
        # The published tables have one row that neither training nor sampling reads.
        self.position_embedding = table("position_embedding", c.num_tokens + 1)
        self.class_embedding = table("class_embedding", c.num_classes + 1)
        if not c.tie_embeddings:
            self.lm_head = table("lm_head", c.vocab_size)
        if c.groups:
            rows = 3 * c.branches * c.groups
            self.group_modulation = ModulationHead(rows, zero=False, dtype=self.dtype)
        self.token_drop = nn.Dropout(c.token_drop)
        self.norm_f = RMSNorm(bias=False, epsilon=c.norm_epsilon)
        self.norm_final = RMSNorm(bias=False, epsilon=c.norm_epsilon)
        self.final_modulation = ModulationHead(2, dtype=self.dtype)

    def __call__(self, codes: Array, labels: Array) -> tuple[Array, dict]:
        """Logits of every token given its class and the tokens before it.

        Args:
            codes: [B, T] int32, T <= num_tokens; the last one is not read.
            labels: [B] int32 class ids in 0..num_classes (the null class).

        Returns:
            logits [B, T, vocab] float32 (log-softmax them) and {} (no auxiliary losses).

        Raises:
            ValueError: T is 0 or exceeds num_tokens.
        """
        c = self.config
        t_len, random = codes.shape[1], self.has_rng("dropout")
        if not 1 <= t_len <= c.num_tokens:
            raise ValueError(f"{t_len} tokens per image; the net has num_tokens={c.num_tokens}")
        if random and c.class_dropout:
            dropped = jax.random.bernoulli(self.make_rng("dropout"), c.class_dropout, labels.shape)
            labels = jnp.where(dropped, c.num_classes, labels)
        modulation = self.modulation(labels)
        tokens = jnp.take(self.embedding, codes[:, :-1], axis=0)
        tokens = self.token_drop(tokens, deterministic=not random)
        # A gather, as a slice's gradient (a sum over rows) would make XLA lay the residual stream
        # of all blocks out with rows fastest, and transpose it at every matmul.
        position = jnp.arange(t_len - 1)
        tokens = tokens + jnp.take(self.position_embedding, position, axis=0, mode="clip")
        r = jnp.concatenate([modulation.first[:, None], tokens], axis=1)
        r = constrain(r.astype(self._residual_dtype()), "batch", "seq", None)
        self.sow("intermediates", "embedded", r)
        r, _ = self.layers(r, modulation.layers)
        logits = self._logits(r, modulation.final[:, :, None])
        return constrain(logits, "batch", "seq", None), {}

    def modulation(self, labels: Array) -> Modulation:
        """All modulation vectors of classes labels [B] int32: made once, they serve every token."""
        c = self.config
        embedded = jnp.take(self.class_embedding, labels, axis=0)
        shared = None
        if c.groups:
            shared = self.group_modulation(embedded)
            self.sow("intermediates", "shared_vectors", shared)
            shared = conditioning.share_out(shared, c.n_layer, 3 * c.branches)
        _, layers = self.layers.conditioning(embedded, shared)
        return Modulation(embedded, layers, self.final_modulation(embedded).astype(self.dtype))

    def step(self, tokens: Array, index: Array, state: Any, modulation: Modulation):
        """One token per row.

        Args:
            tokens: [B] int32 tokens before number `index`; not read at index 0, where the class is
                the input.
            index: [] int32 number of the token to predict, the same for all rows.
            state: of `init_state` or of the step before. A list has one entry per block: the blocks
                are then unrolled, which takes longer to compile and copies less on accelerators.
            modulation: of the rows' classes.

        Returns:
            logits [B, vocab] float32 and the new state.
        """
        c, params = self.config, self.variables["params"]
        position = jnp.maximum(index - 1 + c.position_offset, 0)
        r = jnp.take(self.embedding, tokens, axis=0) + self.position_embedding[position]
        r = jnp.where(index == 0, modulation.first.astype(r.dtype), r)
        r = constrain(r.astype(self._residual_dtype()), "batch", None)
        layer = Layer(c, self.dtype, parent=None)
        run = lambda p, r, vectors, own: layer.apply({"params": p}, r, vectors, own)

        if isinstance(state, list):
            stacked, state = params["layers"], list(state)
            at = lambda i: jax.tree.map(lambda a: a[i], stacked)
            apart = "0" in stacked
            for i in range(c.n_layer):
                own = stacked[str(i)] if apart else at(i)
                r, state[i] = run(own, r, modulation.layers[i], state[i])
        else:

            def block(carry, inputs):  # the state is a carry, so that it is updated in place
                r, state = carry
                i, p, vectors = inputs
                pick = lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False)
                put = lambda a, new: lax.dynamic_update_index_in_dim(a, new.astype(a.dtype), i, 0)
                r, new = run(p, r, vectors, jax.tree.map(pick, state))
                return (r, jax.tree.map(put, state, new)), None

            inputs = jnp.arange(c.n_layer), params["layers"], modulation.layers
            (r, state), _ = lax.scan(block, (r, state), inputs)
        return constrain(self._logits(r, modulation.final), "batch", None), state

    @nn.nowrap
    def init_state(
        self,
        batch: int,
        dtype=None,
        *,
        unroll: bool = False,
        cache: str = "recurrent",
        slots: int = 0,
    ) -> Any:
        """State before the first token, stacked over blocks (batch is axis 1) or as a list of them.

        Args:
            dtype: of what grows with the context or with d_state. None means float32 for the state
                of a recurrence, and the net's for past tokens.
            unroll: a list, see `step`.
            cache: "recurrent" or "dual", see `mamba_decode`; attention always keeps its tokens.
            slots: tokens that the cache has room for; 0 means num_tokens. Only "dual" can be given
                more of them later.

        Raises:
            ValueError: a dual cache that is not unrolled: every step would copy all of it.
        """
        c = self.config
        if cache == "dual" and not unroll:
            raise ValueError("cache='dual' needs unroll=True: a stacked one would be copied whole")
        mixer, slots = make_mixer(c, self.dtype, parent=None), slots or c.num_tokens
        if c.mixer == "attention":
            one = mixer.init_state(batch, dtype, max_length=slots)
        else:
            kept = {"ssm_dtype" if cache == "recurrent" else "dtype": dtype}
            one = mixer.init_cache(batch, slots, kind=cache, **kept)
        if unroll:
            return [one] * c.n_layer
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (c.n_layer, *a.shape)), one)

    @nn.nowrap
    def decoding_variables(self, variables: dict[str, Any], *, unroll: bool = False) -> dict:
        """Variables as `step` reads them fastest; it computes the same from them.

        Matrices of the blocks are cast to the net's dtype, as their matmuls would do, and so is a
        copy of the head (rows of the embedding are inputs, too, in float32). With `unroll` the
        blocks stand apart.
        """
        params = dict(variables["params"])

        def cast(path, a):  # the convolution's taps are used in float32
            names = [p.key for p in path]
            matrix = names[-1] == "kernel" and "conv1d" not in names
            return a.astype(self.dtype) if matrix else a

        layers = jax.tree_util.tree_map_with_path(cast, params["layers"])
        if unroll:
            at = lambda i: jax.tree.map(lambda a: a[i], layers)
            layers = {str(i): at(i) for i in range(self.config.n_layer)}
        head = params["embedding" if self.config.tie_embeddings else "lm_head"]
        params |= {"layers": layers, "decoding_head": head.astype(self.dtype)}
        return {**variables, "params": params}

    def _residual_dtype(self):
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return wide if self.config.residual_in_fp32 else self.dtype

    def _logits(self, r, final):
        """Norm, norm again, modulation and head: [.., d] to [.., vocab] float32."""
        f = self.norm_f(r)
        self.sow("intermediates", "normed", f)
        shift, scale = final.astype(f.dtype)
        f = modulate(self.norm_final(f), shift, scale).astype(self.dtype)
        self.sow("intermediates", "final", f)
        head = self.embedding if self.config.tie_embeddings else self.lm_head
        head = self.variables["params"].get("decoding_head", head).astype(self.dtype)
        spec = "btd,vd->btv" if f.ndim == 3 else "bd,vd->bv"
        return matmul(spec, f, head).astype(jnp.float32)
