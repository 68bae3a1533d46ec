"""S4D: diagonal state-space layer, time-invariant (arXiv 2206.11893), causal or bidirectional."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ...kernels_pallas.linear_scan import linear_scan
from ...kernels_pallas.time_axis import fill_invalid, resets_from_segments
from ..layers.mlp import uniform_fan_in
from ..partition import constrain
from .contract import enter_segments, refuse_context, row_lengths

INITS = ("lin", "inv", "real")


class S4DState(NamedTuple):
    """What a causal S4D layer remembers.

    Attributes:
        real, imag: [B, D, M] float32 state of each pole; imag is 0 for real poles.
        segment: [B] int32 document id of the last token.
    """

    real: Array
    imag: Array
    segment: Array


def poles(init: str, features: int, d_state: int) -> tuple[Array, Array]:
    """-Re A and Im A [D, M] of the S4D initialisations (arXiv 2206.11893, section 4).

    Args:
        init: "lin" (A = -1/2 + i pi n), "inv" (Im A = N/pi (N/(2n+1) - 1)) or "real"
            (A = -(n+1)).
        features: D. d_state: N; complex kinds keep M = N/2, one of each conjugate pair.

    Raises:
        ValueError: an unknown init, or an odd d_state for complex poles.
    """
    if init not in INITS:
        raise ValueError(f"init={init!r}; choose {', '.join(INITS)}")
    if init != "real" and d_state % 2:
        raise ValueError(f"d_state={d_state} must be even: complex poles come in pairs")
    n = jnp.arange(float(d_state if init == "real" else d_state // 2))
    real, imag = {
        "lin": (jnp.full_like(n, 0.5), math.pi * n),
        "inv": (jnp.full_like(n, 0.5), d_state / math.pi * (d_state / (2 * n + 1) - 1)),
        "real": (n + 1, jnp.zeros_like(n)),
    }[init]
    tile = lambda row: jnp.broadcast_to(row, (features, row.shape[0]))
    return tile(real), tile(imag)


def zero_order_hold(a: Array, dt: Array) -> tuple[Array, Array]:
    """exp(dt A) and (exp(dt A) - 1) / A, complex [D, M], of poles a [D, M] and steps dt [D]."""
    step = a * dt[:, None]
    return jnp.exp(step), jnp.expm1(step) / a


def ssm_kernel(step: Array, weight: Array, length: int) -> Array:
    """K[l] = Re sum_m weight_m exp(step_m l), l = 0..length-1.

    exp(step (Q i + j)) = exp(step Q i) exp(step j), so the sum over poles is a matmul of two tables
    with about sqrt(length) columns each, and [D, M, length] is never made.

    Args:
        step: complex [D, M], dt A. weight: complex [D, M].

    Returns:
        [D, length], real.
    """
    columns = max(1, math.isqrt(length - 1) + 1)
    rows = -(-length // columns)
    table = lambda count, stride: jnp.exp(step[..., None] * (stride * jnp.arange(count)))
    left, right = weight[..., None] * table(rows, columns), table(columns, 1)
    product = lambda a, b: jnp.einsum("dmi,dmj->dij", a, b, precision="highest")
    kernel = product(left.real, right.real) - product(left.imag, right.imag)
    return kernel.reshape(step.shape[0], -1)[:, :length]


def fft_convolve(u: Array, ahead: Array, back: Array | None = None) -> Array:
    """y_t = sum_{j<=t} ahead[t-j] u_j + sum_{j>t} back[j-t-1] u_j, by FFT of length 2 T.

    Args:
        u: [B, T, D] float32. ahead, back: [D, T] float32; `back` may be None.
    """
    t_len = u.shape[1]
    size = 2 * t_len
    kernel = jnp.pad(ahead, ((0, 0), (0, t_len)))
    if back is not None:
        kernel += jnp.pad(back[:, ::-1], ((0, 0), (t_len, 0)))
    spectrum = jnp.fft.rfft(u, size, axis=1) * jnp.fft.rfft(kernel, axis=1).T
    return jnp.fft.irfft(spectrum, size, axis=1)[:, :t_len]


class S4D(nn.Module):
    """out = GLU(W gelu(y)), with y the input filtered by a diagonal state-space model.

        s_t = exp(dt A) s_{t-1} + (exp(dt A) - 1)/A u_t;   y_t = 2 Re(C s_t) + D u_t
        bidirectional: y_t also gets 2 Re(C' s'_{t+1}), s' running from the right

    (real poles: without the factor 2). Whole sequences are filtered by FFT in float32; documents,
    prefill and steps run the recurrence.

    Attributes:
        features: width D of input and output.
        d_state: N real poles, or N/2 complex ones with their conjugates.
        pole_init: see `poles`. bidirectional: see above.
        dt_range: dt is log-uniform in it at the start.
        dtype: of the output projection.
    """

    features: int
    d_state: int = 64
    pole_init: str = "lin"
    bidirectional: bool = True
    dt_range: tuple[float, float] = (1e-3, 0.1)
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        real, imag = poles(self.pole_init, self.features, self.d_state)
        low, high = (math.log(v) for v in self.dt_range)
        log_uniform = lambda key, shape: jax.random.uniform(key, shape, jnp.float32, low, high)
        self.log_dt = self.param("log_dt", log_uniform, (self.features,))
        self.log_A_real = self.param("log_A_real", lambda key: jnp.log(real))
        complex_poles = self.pole_init != "real"
        if complex_poles:
            self.A_imag = self.param("A_imag", lambda key: imag)
        shape = (*real.shape, 2) if complex_poles else real.shape
        normal = nn.initializers.normal(math.sqrt(0.5) if complex_poles else 1.0)
        self.C = self.param("C", normal, shape)
        if self.bidirectional:
            self.C_back = self.param("C_back", normal, shape)
        self.D = self.param("D", nn.initializers.normal(1.0), (self.features,))
        self.out = nn.Dense(2 * self.features, kernel_init=uniform_fan_in, dtype=self.dtype)

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
        """Mix a whole sequence x [B, T, D]: y [B, T, D] and {}.

        Args:
            mask: [B, T] valid tokens; the others are padding on the right, and their outputs are
                those of a zero input.
            segment_ids: [B, T] document ids; nothing crosses a change.
            context, context_mask, positions: of the mixer contract; this mixer takes none.
        """
        refuse_context(self, context, context_mask, positions)
        u = constrain(x, "batch", "seq", None).astype(jnp.float32)
        u = fill_invalid(u, row_lengths(mask))
        if segment_ids is None:
            y = self._filter(u)
        else:
            y, _ = self._scan(u, self.C, None, resets_from_segments(segment_ids), None)
            if self.bidirectional:
                resets = resets_from_segments(segment_ids, reverse=True)
                y += self._scan_back(u, resets)
        return self._output(u, y), {}

    def extend(
        self,
        x: Array,
        state: S4DState,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        segment_ids: Array | None = None,
    ) -> tuple[Array, S4DState, dict[str, Any]]:
        """Continue from `state` with x [B, T, D]: y, new state, {}.

        `lengths` [B] counts valid tokens (`mask` [B, T] says the same).

        Raises:
            ValueError: the layer is bidirectional.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional layer needs the whole sequence; it has no state")
        lengths = row_lengths(mask) if lengths is None else lengths
        resets, segment = enter_segments(segment_ids, state.segment, lengths)
        u = fill_invalid(x.astype(jnp.float32), lengths)
        y, (real, imag) = self._scan(u, self.C, (state.real, state.imag), resets, lengths)
        return self._output(u, y), S4DState(real, imag, segment), {}

    def step(self, x_t: Array, state: S4DState) -> tuple[Array, S4DState]:
        """One token x_t [B, D]: y_t [B, D] and the new state."""
        y, state, _ = self.extend(x_t[:, None], state)
        return y[:, 0], state

    @nn.nowrap
    def init_state(self, batch: int, dtype=None, max_length: int | None = None) -> S4DState:
        """State before the first token, float32 and of one size whatever the arguments."""
        del dtype, max_length
        count = self.d_state if self.pole_init == "real" else self.d_state // 2
        zeros = jnp.zeros((batch, self.features, count), jnp.float32)
        return S4DState(zeros, zeros, jnp.zeros((batch,), jnp.int32))

    def _poles(self) -> tuple[Array, Array]:
        """Complex dt A and (exp(dt A) - 1)/A, [D, M]."""
        a = -jnp.exp(self.log_A_real) + 1j * (self.A_imag if self.pole_init != "real" else 0.0)
        dt = jnp.exp(self.log_dt)
        return a * dt[:, None], zero_order_hold(a, dt)[1]

    def _weights(self, c: Array) -> Array:
        """Complex output weights [D, M]; the conjugate poles double them."""
        return (
            c.astype(jnp.complex64)
            if self.pole_init == "real"
            else 2 * (c[..., 0] + 1j * c[..., 1])
        )

    def _filter(self, u: Array) -> Array:
        step, b = self._poles()
        kernel = lambda c: ssm_kernel(step, self._weights(c) * b, u.shape[1])
        return fft_convolve(u, kernel(self.C), kernel(self.C_back) if self.bidirectional else None)

    def _scan(self, u, c, state, resets, lengths, reverse=False):
        """The recurrence, [B, T, D * M] as pairs: filtered u, and the last state."""
        batch, t_len, _ = u.shape
        step, b = self._poles()
        decay = jnp.exp(step)
        wide = lambda w: jnp.broadcast_to(w.reshape(-1), (batch, t_len, w.size))
        drive = lambda w: (u[..., None] * w).reshape(batch, t_len, -1)
        flat = lambda s: None if s is None else tuple(p.reshape(batch, -1) for p in s)
        (real, imag), last = linear_scan(
            (wide(decay.real), wide(decay.imag)), (drive(b.real), drive(b.imag)),
            state=flat(state), resets=resets, lengths=lengths, reverse=reverse,
        )  # fmt: skip
        weight = self._weights(c)
        shape = lambda s: s.reshape(*s.shape[:-1], *weight.shape)
        mix = lambda s, w: jnp.einsum("btdm,dm->btd", shape(s), w, precision="highest")
        y = mix(real, weight.real) - mix(imag, weight.imag)
        return y, tuple(shape(part) for part in last)

    def _scan_back(self, u, resets):
        """sum_{j>t} K_back[j-t-1] u_j in each document: the scan from the right, a step late."""
        y, _ = self._scan(u, self.C_back, None, resets, None, reverse=True)
        later = jnp.concatenate([y[:, 1:], jnp.zeros_like(y[:, :1])], axis=1)
        return jnp.where(resets[..., None], 0, later)

    def _output(self, u: Array, y: Array) -> Array:
        y = nn.gelu(y + self.D * u, approximate=False).astype(self.dtype)
        value, gate = jnp.split(self.out(y), 2, axis=-1)
        return constrain(value * nn.sigmoid(gate), "batch", "seq", None)
