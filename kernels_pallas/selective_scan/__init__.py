"""Selective scan: the recurrence of Mamba-1 (arXiv 2312.00752, section 3), any implementation.

For every channel d with N states, with dt_t = softplus(delta_t + delta_bias) (or without softplus),

    h_t   = exp(dt_t A) h_{t-1} + dt_t B_t u_t
    y_t   = sum_n C_t[n] h_t[n] + D u_t
    out_t = y_t silu(z_t)

Step sizes, decays and states are float32; states reach memory at chunk boundaries only, the
backward pass computes them again.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from .. import dispatch
from ..compat import vary
from ..time_axis import fill_invalid
from .fused import NO_STEP, unable
from .pallas_gpu import selective_scan_gpu
from .pallas_tpu import selective_scan_tpu
from .reference import selective_scan_reference, selective_scan_step
from .xla import selective_scan_xla

IMPLEMENTATIONS = {
    "reference": selective_scan_reference,
    "xla": selective_scan_xla,
    "pallas_tpu": selective_scan_tpu,
    "pallas_gpu": selective_scan_gpu,
}


def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    *,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    state: Array | None = None,
    resets: Array | None = None,
    lengths: Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Selective scan of the module's equation over T >= 1 steps, continuing from `state`.

    `A` uses the exponential, `B` Euler's rule (dt B), as published. softplus(x) is exactly x above
    20. For complex A the output is y_t = 2 Re(sum_n C_t[n] h_t[n]) + D u_t.

    Args:
        u: [B, T, D] input, in any float type.
        delta: [B, T, D] raw step sizes.
        A: [D, N] negative, used in float32; or complex (reference and xla only).
        B, C: [B, T, N]; [B, T, G, N] with channel d in group d // (D/G); or [D, N], constant over
            time. Complex only beside a complex A.
        D: [D] skip, or None.
        z: [B, T, D] gate, or None.
        delta_bias: [D], added to delta before the softplus, or None.
        delta_softplus: whether the step size is softplus(delta + delta_bias).
        state: [B, D, N] float32 (complex64 for complex A) before the first step; None is zero.
        resets: [B, T] bool, True where nothing from earlier steps (with `reverse`: from later ones)
            enters; None is nowhere.
        lengths: [B] int32 valid steps per row; what follows is padding that may hold anything:
            outputs and gradients there are 0 and the state passes by. None means T.
        reverse: run from the last step to the first; the state enters at the right end.
        implementation: None (best available), "reference", "xla", or a Pallas kernel, which takes
            real A and B, C over time.

    Returns:
        out [B, T, D] in u's dtype, and the state [B, D, N] after the last valid step, in at least
        float32. Gradients of A, D and delta_bias are summed in float32.

    Raises:
        ValueError: shapes that do not fit, or an implementation that cannot do this.
    """
    batch, t_len, width = u.shape
    states = A.shape[-1]
    flags = {"D": D, "delta_bias": delta_bias}
    wanted = {"delta": (delta, u.shape), "A": (A, (width, states))}
    wanted |= {name: (x, (width,)) for name, x in flags.items() if x is not None}
    optional = {
        "z": (z, u.shape),
        "state": (state, (batch, width, states)),
        "resets": (resets, (batch, t_len)),
        "lengths": (lengths, (batch,)),
    }
    wanted |= {name: pair for name, pair in optional.items() if pair[0] is not None}
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    B = _per_group("B", B, A, u)
    C = _per_group("C", C, A, u)
    wide = jnp.promote_types(u.dtype, jnp.float32)
    hidden = jnp.promote_types(A.dtype, wide)
    if delta_bias is not None and not delta_softplus:
        delta, delta_bias = delta.astype(wide) + delta_bias.astype(wide), None
    if lengths is not None:
        u, z, resets = (None if x is None else fill_invalid(x, lengths) for x in (u, z, resets))
        delta = fill_invalid(delta, lengths, NO_STEP if delta_softplus else 0)
        B, C = (x if x.ndim == 2 else fill_invalid(x, lengths) for x in (B, C))
    problems = unable(u, delta, z, A, B, C)
    per_group = width // (B.shape[2] if B.ndim == 4 else 1)
    name = dispatch.resolve(
        "selective_scan", implementation, IMPLEMENTATIONS, unable=problems, x=u, channels=per_group
    )
    if state is None and name != "pallas_gpu":  # which begins from nothing by itself
        state = jnp.zeros((batch, width, states), hidden)
    state = None if state is None else vary(state.astype(hidden), u)
    out, state = IMPLEMENTATIONS[name](
        u, delta, A, B, C, D, z, delta_bias=delta_bias, softplus=delta_softplus, state=state,
        resets=resets, reverse=reverse,
    )  # fmt: skip
    return fill_invalid(out, lengths), state


def _per_group(name: str, x: Array, A: Array, u: Array) -> Array:
    """B or C as [B, T, G, N] or [D, N]."""
    (batch, t_len, width), states = u.shape, A.shape[-1]
    if jnp.iscomplexobj(x) and not jnp.iscomplexobj(A):
        raise ValueError(f"{name} is complex and A is real; make A complex too")
    if x.ndim == 3:
        x = x[:, :, None]
    if x.ndim == 2 and x.shape == (width, states):
        return x
    if x.ndim != 4 or x.shape[:2] != (batch, t_len) or x.shape[3] != states:
        raise ValueError(
            f"{name} has shape {x.shape}, expected ({batch}, {t_len}, {states}), "
            f"({batch}, {t_len}, groups, {states}) or ({width}, {states})"
        )
    if not x.shape[2] or width % x.shape[2]:
        raise ValueError(f"{name} has {x.shape[2]} groups, which do not divide {width} channels")
    return x


__all__ = ["IMPLEMENTATIONS", "selective_scan", "selective_scan_step"]
