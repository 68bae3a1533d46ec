"""Mamba-1 and Mamba-2 mixers: gated state-space layers with a short causal convolution.

Parameters carry the names of the published checkpoints (`mamba_ssm`); see `model/convert/mamba.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ...kernels_pallas import ssd_decode
from ...kernels_pallas.causal_conv1d import causal_conv1d
from ...kernels_pallas.selective_scan import selective_scan, selective_scan_step
from ...kernels_pallas.ssd import ssd, ssd_step
from ...kernels_pallas.ssd.prepare import gate
from ...kernels_pallas.time_axis import resets_from_segments
from ..layers.mlp import uniform_fan_in
from ..layers.norms import GatedRMSNorm
from ..layers.parted_dense import PartedDense
from ..partition import constrain
from .contract import enter_segments, refuse_context, row_lengths
from .mamba_decode import CACHES, DualCache, RecurrentCache, conv_step


class MambaState(NamedTuple):
    """What a Mamba mixer remembers; the size does not depend on how much it has read.

    Attributes:
        conv: [B, W-1, C] the last inputs of the convolution, oldest first.
        ssm: state of the recurrence, [B, D, N] (Mamba-1) or [B, H, P, N] (Mamba-2); float32 unless
            asked for otherwise.
        segment: [B] int32 document id of the last token.
    """

    conv: Array
    ssm: Array
    segment: Array


def inverse_softplus_uniform(low: float, high: float, floor: float):
    """Initialiser of dt biases: softplus(bias) is log-uniform in [low, high], at least `floor`
    (arXiv 2312.00752, section 3.6)."""

    def init(key, shape, dtype=jnp.float32):
        log_dt = jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))
        dt = jnp.maximum(jnp.exp(log_dt), floor)
        return dt + jnp.log(-jnp.expm1(-dt))

    return init


def uniform(limit: float):
    """Initialiser U(-limit, limit)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -limit, limit
    )


class CausalConv(nn.Module):
    """Depthwise causal convolution over time with SiLU: parameters `kernel` [W, C] and `bias` [C].

    Attributes:
        width: taps W; tap W-1 meets the current token.
        use_bias: add a bias before the activation.
    """

    width: int = 4
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, **options):
        """y [B, T, C] and the new state; `options` as for `causal_conv1d`.

        A tuple x of arrays of some channels each gives such a tuple y. A single token x [B, C]
        takes the options of `conv_step` instead.
        """
        limit, parts = self.width**-0.5, x if isinstance(x, tuple) else (x,)
        channels = sum(part.shape[-1] for part in parts)
        kernel = self.param("kernel", uniform(limit), (self.width, channels))
        bias = self.param("bias", uniform(limit), (channels,)) if self.use_bias else None
        if parts[0].ndim == 2:
            return conv_step(x, kernel, bias, **options)
        state, outputs, start = options.pop("state", None), [], 0
        for part in parts:
            own = slice(start, start := start + part.shape[-1])
            of_part = lambda a, own=own: None if a is None else a[..., own]
            outputs.append(
                causal_conv1d(
                    part, of_part(kernel), of_part(bias), activation="silu", state=of_part(state),
                    **options,
                )
            )  # fmt: skip
        ys, states = zip(*outputs, strict=True)
        return (ys if isinstance(x, tuple) else ys[0]), jnp.concatenate(states, axis=-1)


class _Recurrent(nn.Module):
    """What both mixers share: the contract, given `_mix(x, state, lengths, resets)` and
    `_one(x, state)`, a single token."""

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
            x: [B, T, d].
            mask: [B, T] valid tokens; the others are padding on the right.
            segment_ids: [B, T] document ids; the state starts afresh where they change.
            context, context_mask, positions: of the mixer contract; this mixer takes none.

        Returns:
            y [B, T, d] and {} (no auxiliary losses).
        """
        refuse_context(self, context, context_mask, positions)
        resets = None
        if segment_ids is not None:
            resets = resets_from_segments(segment_ids, reverse=self.reverse)
        return self._mix(x, None, row_lengths(mask), resets)[0], {}

    def extend(
        self,
        x: Array,
        state: MambaState,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        segment_ids: Array | None = None,
    ) -> tuple[Array, MambaState, dict[str, Any]]:
        """Continue from `state` with x [B, T, d] (prefill, truncated BPTT): y, new state, {}.

        `lengths` [B] counts the valid tokens of each row (`mask` [B, T] says the same). Rows whose
        `segment_ids` differ from the state's start afresh.
        """
        if self.reverse:
            raise ValueError("a mixer with reverse=True reads whole sequences, not step by step")
        lengths = row_lengths(mask) if lengths is None else lengths
        resets, segment = enter_segments(segment_ids, state.segment, lengths)
        y, conv, ssm = self._mix(x, state, lengths, resets)
        return y, MambaState(conv, ssm.astype(state.ssm.dtype), segment), {}

    def step(self, x_t: Array, state):
        """One token x_t [B, d] of the document that `state` is in: y_t [B, d] and the new state.

        `state` is of `init_state` or `extend`, or a cache of `init_cache`, whose dtypes it keeps;
        the arithmetic in between is float32.
        """
        if self.reverse:
            raise ValueError("a mixer with reverse=True reads whole sequences, not step by step")
        return self._one(x_t, state)

    @nn.nowrap
    def init_state(
        self, batch: int, dtype=None, max_length: int | None = None, *, ssm_dtype=None
    ) -> MambaState:
        """State before the first token. Its size is fixed, so `max_length` changes nothing.

        Args:
            dtype: of the convolution's window; None means the mixer's.
            ssm_dtype: of the recurrence's state; None means at least float32. bfloat16 halves the
                traffic of a step, and rounds the state at every step.
        """
        del max_length
        dtype = self.dtype if dtype is None else dtype
        ssm_dtype = jnp.promote_types(dtype, jnp.float32) if ssm_dtype is None else ssm_dtype
        channels, shape = self._state_shapes()
        return MambaState(
            conv=jnp.zeros((batch, self.d_conv - 1, channels), dtype),
            ssm=jnp.zeros((batch, *shape), ssm_dtype),
            segment=jnp.zeros((batch,), jnp.int32),
        )

    @nn.nowrap
    def init_cache(
        self, batch: int, max_length: int, *, kind: str = "recurrent", dtype=None, ssm_dtype=None
    ) -> RecurrentCache | DualCache:
        """What `step` carries fastest, before the first token; see `mamba_decode`.

        Args:
            max_length: slots of the dual form, which keeps every token; `step` past them is the
                caller's error.
            kind: "recurrent" or "dual" (Mamba-2 only).
            dtype, ssm_dtype: as for `init_state`; the dual form keeps its tokens in `dtype`.

        Raises:
            ValueError: there is no such kind for this mixer.
        """
        if kind not in CACHES or (kind == "dual" and not isinstance(self, Mamba2)):
            raise ValueError(f"{type(self).__name__} has no cache {kind!r}")
        dtype = self.dtype if dtype is None else dtype
        state, start = self.init_state(batch, dtype, ssm_dtype=ssm_dtype), jnp.zeros((), jnp.int32)
        if kind == "recurrent":
            return RecurrentCache(state.conv, state.ssm, start)
        sizes = self.sizes()[2], self.headdim, self.ngroups, self.d_state
        tokens = ssd_decode.init_cache(batch, max_length, *sizes, dtype)
        return DualCache(state.conv, tokens, start)

    def _dense(self, features: int, use_bias: bool, scale: float = 1.0) -> nn.Dense:
        init = lambda *a: scale * uniform_fan_in(*a)
        return nn.Dense(features, use_bias=use_bias, kernel_init=init, dtype=self.dtype)


def _after(state: MambaState | RecurrentCache, conv: Array, ssm: Array):
    """The state after one more token."""
    state = state._replace(conv=conv, ssm=ssm.astype(state.ssm.dtype))
    return state if isinstance(state, MambaState) else state._replace(offset=state.offset + 1)


class Mamba1(_Recurrent):
    """Mamba-1 block, W_out (scan(x) silu(z)) (arXiv 2312.00752, section 3.4 and algorithm 2).

        [x | z] = W_in u;   x = silu(conv(x));   [dt | B | C] = W_x x
        delta = softplus(W_dt dt + b_dt);   h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t
        y_t = C_t h_t + D x_t

    Attributes:
        features: width d of the input and output.
        d_state: states N per channel. d_conv: taps W. expand: D = expand * d channels.
        dt_rank: width of dt before its projection; 0 means ceil(d / 16).
        use_bias, conv_bias: biases of the two projections, of the convolution.
        out_scale: factor on the initial W_out (residual branches are scaled by 1/sqrt(layers)).
        dtype: of the matmuls; decays, dt and states are float32.
        implementation: of the scan; None chooses.
        reverse: run from the last token to the first (for `Bidirectional`).
    """

    features: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0
    use_bias: bool = False
    conv_bias: bool = True
    out_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32
    implementation: str | None = None
    reverse: bool = False

    def setup(self):
        inner, n = self.expand * self.features, self.d_state
        self.rank = self.dt_rank or -(-self.features // 16)
        self.in_proj = self._dense(2 * inner, self.use_bias)
        self.conv1d = CausalConv(self.d_conv, self.conv_bias)
        self.x_proj = self._dense(self.rank + 2 * n, False)
        limit = uniform(self.rank**-0.5)
        self.dt_proj = nn.Dense(inner, use_bias=False, kernel_init=limit, dtype=self.dtype)
        self.dt_bias = self.param("dt_bias", inverse_softplus_uniform(1e-3, 0.1, 1e-4), (inner,))
        rows = lambda key, shape: jnp.broadcast_to(jnp.log(jnp.arange(1.0, n + 1)), shape)
        self.A_log = self.param("A_log", rows, (inner, n))
        self.D = self.param("D", nn.initializers.ones, (inner,))
        self.out_proj = self._dense(self.features, self.use_bias, self.out_scale)

    def _state_shapes(self):
        inner = self.expand * self.features
        return inner, (inner, self.d_state)

    def _mix(self, u, state, lengths, resets):
        u = constrain(u, "batch", "seq", None)
        x, z = jnp.split(constrain(self.in_proj(u), "batch", "seq", "features"), 2, axis=-1)
        x, conv = self.conv1d(
            x, state=None if state is None else state.conv, resets=resets, lengths=lengths,
            reverse=self.reverse,
        )  # fmt: skip
        dt, b, c = jnp.split(self.x_proj(x), [self.rank, self.rank + self.d_state], axis=-1)
        y, ssm = selective_scan(
            x, self.dt_proj(dt), -jnp.exp(self.A_log), b, c, self.D, z, delta_bias=self.dt_bias,
            delta_softplus=True, state=None if state is None else state.ssm, resets=resets,
            lengths=lengths, reverse=self.reverse, implementation=self.implementation,
        )  # fmt: skip
        y = constrain(y, "batch", "seq", "features")
        return constrain(self.out_proj(y), "batch", "seq", None), conv, ssm

    def _one(self, u, state):
        x, z = jnp.split(constrain(self.in_proj(u), "batch", "features"), 2, axis=-1)
        x, conv = self.conv1d(x, window=state.conv, offset=getattr(state, "offset", None))
        dt, b, c = jnp.split(self.x_proj(x), [self.rank, self.rank + self.d_state], axis=-1)
        y, ssm = selective_scan_step(
            x, self.dt_proj(dt), -jnp.exp(self.A_log), b, c, self.D, z, dt_bias=self.dt_bias,
            dt_softplus=True, state=state.ssm,
        )  # fmt: skip
        y = self.out_proj(constrain(y, "batch", "features"))
        return constrain(y, "batch", None), _after(state, conv, ssm)


class Mamba2(_Recurrent):
    """Mamba-2 block, W_out norm(SSD(x), z) (arXiv 2405.21060, sections 6 and 7).

        [z0 | x0 | z | xBC | dt] = W_in u;   [x | B | C] = silu(conv(xBC))
        dt = clip(softplus(dt + b_dt));   S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T
        y_t = S_t C_t + D x_t;   gated RMS norm of y with z (or the gate alone)
        out = W_out [silu(z0) x0 | y]        (z0, x0: a gated MLP part, empty if d_ssm = d_inner)

    Attributes:
        features, expand, d_conv, use_bias, conv_bias, out_scale, dtype: as in `Mamba1`.
        d_state: N. headdim: P. ngroups: G, groups that share B and C.
        d_ssm: channels of the state-space part; 0 means all, expand * features.
        rmsnorm: gated RMS norm over groups of d_ssm / G channels; False gates inside the scan.
        norm_before_gate: see `gated_rms_norm`.
        D_has_hdim: one skip weight per channel instead of per head.
        A_range: A = -U(A_range) at the start. dt_range, dt_floor: see `inverse_softplus_uniform`.
        dt_limit: bounds of dt after the softplus; None means (0, inf).
        chunk: chunk length of the scan; changes nothing but speed.
        implementation, reverse: as in `Mamba1`.
    """

    features: int
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    d_ssm: int = 0
    rmsnorm: bool = True
    norm_before_gate: bool = False
    D_has_hdim: bool = False
    A_range: tuple[float, float] = (1.0, 16.0)
    dt_range: tuple[float, float] = (1e-3, 0.1)
    dt_floor: float = 1e-4
    dt_limit: tuple[float, float] | None = None
    use_bias: bool = False
    conv_bias: bool = True
    chunk: int = 128
    out_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32
    implementation: str | None = None
    reverse: bool = False

    @nn.nowrap
    def sizes(self) -> tuple[int, int, int]:
        """Channels of the MLP part, channels of the state-space part, heads.

        Raises:
            ValueError: heads, groups and widths do not divide.
        """
        inner = self.expand * self.features
        d_ssm = self.d_ssm or inner
        if d_ssm > inner:
            raise ValueError(f"d_ssm={d_ssm} exceeds expand * features = {inner}")
        if d_ssm % self.headdim:
            raise ValueError(f"d_ssm={d_ssm} is not divisible by headdim={self.headdim}")
        heads = d_ssm // self.headdim
        if heads % self.ngroups:
            raise ValueError(f"{heads} heads are not divisible by ngroups={self.ngroups}")
        return inner - d_ssm, d_ssm, heads

    def setup(self):
        d_mlp, d_ssm, heads = self.sizes()
        widths = 2 * d_mlp + d_ssm, d_ssm, 2 * self.ngroups * self.d_state + heads
        self.in_proj = PartedDense(widths, self.use_bias, uniform_fan_in, self.dtype)
        self.conv1d = CausalConv(self.d_conv, self.conv_bias)
        self.dt_bias = self.param(
            "dt_bias", inverse_softplus_uniform(*self.dt_range, self.dt_floor), (heads,)
        )
        low, high = self.A_range
        self.A_log = self.param(
            "A_log",
            lambda k, s: jnp.log(jax.random.uniform(k, s, jnp.float32, low, high)),
            (heads,),
        )
        self.D = self.param("D", nn.initializers.ones, (d_ssm if self.D_has_hdim else heads,))
        if self.rmsnorm:
            self.norm = GatedRMSNorm(d_ssm // self.ngroups, self.norm_before_gate)
        self.out_proj = self._dense(self.features, self.use_bias, self.out_scale)

    def _state_shapes(self):
        _, d_ssm, heads = self.sizes()
        channels = d_ssm + 2 * self.ngroups * self.d_state
        return channels, (heads, self.headdim, self.d_state)

    def _split(self, projected):
        """z0, x0, z, [x | B | C] before the convolution, and dt."""
        d_mlp, d_ssm, _ = self.sizes()
        channels, _ = self._state_shapes()
        ends = (d_mlp, 2 * d_mlp, 2 * d_mlp + d_ssm, 2 * d_mlp + d_ssm + channels)
        return jnp.split(projected, ends, axis=-1)

    def _skip(self):
        """D as [H] or [H, P]."""
        return self.D.reshape(-1, self.headdim) if self.D_has_hdim else self.D

    def _mix(self, u, state, lengths, resets):
        batch, t_len, _ = u.shape
        d_mlp, d_ssm, heads = self.sizes()
        u = constrain(u, "batch", "seq", None)
        parts = self.in_proj(u)
        gates, x, bc_dt = (constrain(part, "batch", "seq", "features") for part in parts)
        z0, x0, z = jnp.split(gates, (d_mlp, 2 * d_mlp), axis=-1)
        bc, dt = jnp.split(bc_dt, (2 * self.ngroups * self.d_state,), axis=-1)
        (x, bc), conv = self.conv1d(
            (x, bc), state=None if state is None else state.conv, resets=resets, lengths=lengths,
            reverse=self.reverse,
        )  # fmt: skip
        b, c = jnp.split(bc, 2, axis=-1)
        to_heads = lambda a: a.reshape(batch, t_len, heads, self.headdim)
        to_groups = lambda a: a.reshape(batch, t_len, self.ngroups, self.d_state)
        y, ssm = ssd(
            to_heads(x), dt, -jnp.exp(self.A_log), to_groups(b), to_groups(c),
            self._skip(), None if self.rmsnorm else to_heads(z), dt_bias=self.dt_bias,
            dt_softplus=True, dt_limit=self.dt_limit or (0.0, math.inf), chunk=self.chunk,
            state=None if state is None else state.ssm, resets=resets, lengths=lengths,
            reverse=self.reverse, implementation=self.implementation,
        )  # fmt: skip
        y = constrain(y.reshape(batch, t_len, d_ssm), "batch", "seq", "features")
        if self.rmsnorm:
            y = self.norm(y, z)
        if d_mlp:
            y = jnp.concatenate([nn.silu(z0) * x0, y], axis=-1)
        return constrain(self.out_proj(y), "batch", "seq", None), conv, ssm

    def _one(self, u, state):
        d_mlp, d_ssm, heads = self.sizes()
        z0, x0, z, xbc, dt = self._split(
            constrain(self.in_proj(u, whole=True), "batch", "features")
        )
        xbc, conv = self.conv1d(xbc, window=state.conv, offset=getattr(state, "offset", None))
        to_heads = lambda a: a.reshape(-1, heads, self.headdim)
        to_groups = lambda a: a.reshape(-1, self.ngroups, self.d_state)
        options = dict(
            dt_bias=self.dt_bias, dt_softplus=True, dt_limit=self.dt_limit or (0.0, math.inf)
        )
        A, D = -jnp.exp(self.A_log), self._skip()
        if isinstance(state, DualCache):
            y, tokens = ssd_decode.ssd_decode_step(
                state.tokens, xbc, dt, A, D, index=state.offset, **options
            )
            state = DualCache(conv, tokens, state.offset + 1)
        else:
            x, b, c = jnp.split(xbc, [d_ssm, d_ssm + self.ngroups * self.d_state], axis=-1)
            y, ssm = ssd_step(
                to_heads(x), dt, A, to_groups(b), to_groups(c), D, **options, state=state.ssm
            )
            state = _after(state, conv, ssm)
        if not self.rmsnorm:
            y = gate(y, to_heads(z))
        y = constrain(y.reshape(-1, d_ssm), "batch", "features")
        if self.rmsnorm:
            y = self.norm(y, z)
        if d_mlp:
            y = jnp.concatenate([nn.silu(z0) * x0, y], axis=-1)
        return constrain(self.out_proj(y), "batch", None), state
