"""Causal depthwise convolution of a few taps, bias and SiLU (arXiv 2312.00752, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from .. import dispatch
from ..compat import vary
from ..time_axis import fill_invalid, flip_time, spread, valid_mask
from .pallas_gpu import causal_conv1d_gpu, unable
from .pallas_tpu import causal_conv1d_tpu
from .reference import causal_conv1d_reference
from .xla import causal_conv1d_xla


def _turning(core: Callable[..., Array]) -> Callable[..., Array]:
    """A core of ascending time and a state, as one that also takes `reverse`, and state=None."""

    def run(x, weight, bias, state, resets, silu, reverse):
        if state is None:
            shape = (x.shape[0], weight.shape[0] - 1, x.shape[2])
            state = vary(jnp.zeros(shape, x.dtype), x)
        if not reverse:
            return core(x, weight, bias, state, resets, silu)
        x, resets = flip_time((x, resets))
        return flip_time(core(x, weight, bias, state, resets, silu))

    return run


IMPLEMENTATIONS = {
    "reference": _turning(causal_conv1d_reference),
    "xla": _turning(causal_conv1d_xla),
    "pallas_tpu": _turning(causal_conv1d_tpu),
    "pallas_gpu": causal_conv1d_gpu,  # whose kernels walk either way
}
ACTIVATIONS = (None, "silu")


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    state: Array | None = None,
    resets: Array | None = None,
    lengths: Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """y_t = act(bias + sum_{k<W} weight[k] x[t-(W-1)+k]), channel by channel.

    Args:
        x: [B, T, C] inputs.
        weight: [W, C], any W >= 1; tap W-1 multiplies the current input, tap 0 the oldest. Weight
            and bias may be wider than x (float32 beside bfloat16).
        bias: [C] or None.
        activation: None or "silu" (v sigmoid(v)).
        state: [B, W-1, C] the inputs before the first one, oldest first; None is zeros.
        resets: [B, T] bool: True where a new sequence begins: a tap counts only if no reset lies in
            (source, target].
        lengths: [B] int32 valid inputs per row. What stands after them may be anything, NaN
            included: y is 0 there, gradients are 0, and the state is that after the last valid one.
        reverse: the flip of the op on flipped x, y and resets: y_t = act(bias + sum_k weight[k]
            x[t+(W-1)-k]), and the state is in the order of processing, too: given, the W-1 inputs
            right of the last valid one, its last entry the nearest; returned, x[W-2] .. x[0].
        implementation: None (best available), "reference", "xla" (shifted multiplies),
            "pallas_tpu", "pallas_gpu", or "pallas" for this device's kernel.

    Returns:
        y like x, accumulated in float32 (float64 for float64) and rounded once; and the state
        [B, W-1, C] in x's dtype: the last W-1 raw inputs, 0 where a reset lies after them.

    Raises:
        ValueError: shapes that do not fit together, an unknown activation, or an implementation
            that is not there or does not take such operands.
    """
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}, expected [B, T, C], none of them 0")
    batch, t_len, channels = x.shape
    width = weight.shape[0] if weight.ndim else 0
    for name, array, shape in (
        ("weight", weight, (max(width, 1), channels)),
        ("bias", bias, (channels,)),
        ("state", state, (batch, width - 1, channels)),
        ("resets", resets, (batch, t_len)),
        ("lengths", lengths, (batch,)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}; choose one of {ACTIVATIONS}")
    problems = unable(x, weight, bias)
    name = dispatch.resolve(
        "causal_conv1d", implementation, IMPLEMENTATIONS, unable=problems, x=x, channels=channels
    )
    if bias is None:
        bias = jnp.zeros((channels,), weight.dtype)
    enters = None if state is None else state.astype(x.dtype)
    x = fill_invalid(x, lengths)
    if resets is not None and lengths is not None:
        resets = resets & valid_mask(lengths, t_len)
    state = jnp.zeros((batch, width - 1, channels), x.dtype) if enters is None else enters
    if reverse and lengths is not None:
        x, state = _state_after_last(x, state, lengths)
        enters = state
    if reverse:
        last = last_inputs(x, state, resets, reverse=True)
    else:
        last = _last(x, state, resets, lengths)
    operands = vary((x, weight, bias, enters), (x, weight, bias, enters, resets))
    y = IMPLEMENTATIONS[name](*operands, resets, activation == "silu", reverse)
    return fill_invalid(y, lengths), last


def causal_conv1d_step(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    state: Array,
) -> tuple[Array, Array]:
    """One step of `causal_conv1d`: x [B, C], state [B, W-1, C] -> y [B, C] and the next state."""
    y, state = causal_conv1d(
        x[:, None], weight, bias, activation=activation, state=state, implementation="xla"
    )
    return y[:, 0], state


def _state_after_last(x: Array, state: Array, lengths: Array) -> tuple[Array, Array]:
    """x and state of the reverse op, the state moved to just after each row's last valid input."""
    before = state.shape[1]
    whole = jnp.pad(x, ((0, 0), (0, before), (0, 0)))
    at = jnp.arange(whole.shape[1])
    for i in range(before):  # the nearest is the last
        here = at == lengths[:, None] + (before - 1 - i)
        whole = jnp.where(spread(here, whole), state[:, i : i + 1], whole)
    return whole[:, : x.shape[1]], jnp.flip(whole[:, x.shape[1] :], axis=1)


def last_inputs(
    x: Array, state: Array, resets: Array | None = None, *, reverse: bool = False
) -> Array:
    """The state that `causal_conv1d` returns, alone: x [B, T, C], state [B, W-1, C] before it."""
    if reverse:
        x, resets = flip_time((x, resets))
    return _last(x, state, resets, None)


def _last(x: Array, state: Array, resets: Array | None, lengths: Array | None) -> Array:
    """The last W-1 raw inputs, state included, before each row's length; 0 before a reset."""
    t_len, before = x.shape[1], state.shape[1]
    take = lambda whole: whole[:, t_len:]
    if lengths is not None:
        index = lengths[:, None] + jnp.arange(before)
        take = lambda whole: jnp.take_along_axis(whole, spread(index, whole), axis=1)
    last = take(jnp.concatenate([state, x], axis=1))
    if resets is None:
        return last
    begins = take(jnp.pad(resets, ((0, 0), (before, 0)))).astype(jnp.int32)
    later = jnp.flip(jnp.cumsum(jnp.flip(begins, 1), axis=1), 1) - begins  # resets after each
    return jnp.where(spread(later == 0, last), last, 0)


__all__ = ["ACTIVATIONS", "IMPLEMENTATIONS", "causal_conv1d", "causal_conv1d_step"]
