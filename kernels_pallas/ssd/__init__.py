"""SSD, the core of Mamba-2 (arXiv 2405.21060): a linear recurrence with one decay per head.

Head by head, with dt = clamp(softplus(dt + dt_bias)),

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t        S [P, N]
    y_t = S_t C_t + D x_t,   times silu(z_t) if z is given

which over a chunk of time equals a masked matrix product, (L o (C B^T)) (dt x), with
L_ts = exp(sum_{s<j<=t} dt_j A).
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from .. import dispatch
from ..compat import vary
from ..time_axis import fill_invalid, flip_time
from . import prepare
from .pallas_gpu import ssd_pallas_gpu
from .pallas_tpu import ssd_pallas_tpu
from .reference import ssd_reference, step
from .xla import chunk_intermediates, ssd_xla

IMPLEMENTATIONS = {
    "reference": ssd_reference,
    "xla": ssd_xla,
    "pallas_tpu": ssd_pallas_tpu,
    "pallas_gpu": ssd_pallas_gpu,  # see prepare.unable
}


def _check(x, dt, A, B, C, D, z, dt_bias, state, resets, lengths, time: str):
    """Shapes of all arguments; `time` is "T" or "" (a single step)."""
    if x.ndim != 3 + len(time):
        raise ValueError(f"x has shape {x.shape}, expected [B{', T' * len(time)}, H, P]")
    if B.ndim != 3 + len(time):
        raise ValueError(f"B has shape {B.shape}, expected [B{', T' * len(time)}, G, N]")
    sizes = dict(zip(f"B{time}HP", x.shape)) | dict(zip("GN", B.shape[-2:]))
    for name, array, *specs in (
        ("dt", dt, f"B{time}H"), ("A", A, "H"), ("B", B, f"B{time}GN"), ("C", C, f"B{time}GN"),
        ("D", D, "H", "HP"), ("z", z, f"B{time}HP"), ("dt_bias", dt_bias, "H"),
        ("state", state, "BHPN"), ("resets", resets, "BT"), ("lengths", lengths, "B"),
    ):  # fmt: skip
        wanted = [tuple(sizes[axis] for axis in spec) for spec in specs if array is not None]
        if array is not None and tuple(array.shape) not in wanted:
            expected = " or ".join(f"{w} [{', '.join(s)}]" for w, s in zip(wanted, specs))
            raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {expected}")
    if sizes["H"] % sizes["G"]:
        raise ValueError(f"{sizes['H']} heads are not a multiple of {sizes['G']} groups")
    if 0 in sizes.values():
        raise ValueError(f"nothing to compute: sizes {sizes}")


def _skip(D: Array | None, x: Array) -> Array | None:
    """D as [H, P] or [H, 1] in at least float32."""
    return None if D is None else D.reshape(D.shape[0], -1).astype(prepare.wide(x.dtype))


def ssd(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    *,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk: int = 128,
    state: Array | None = None,
    resets: Array | None = None,
    lengths: Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """SSD over T steps, continuing from `state`: any T, any chunk, same result.

    Args:
        x: [B, T, H, P] inputs of H heads of width P.
        dt: [B, T, H] step sizes before bias, softplus and clamp.
        A: [H] float32, negative: the continuous decay of each head.
        B, C: [B, T, G, N]; head h uses group h // (H/G). Used in x's dtype.
        D: [H] or [H, P] skip, or None.
        z: [B, T, H, P] gate, or None.
        dt_bias: [H], added before the softplus.
        dt_softplus: apply softplus (the identity above 20) to dt.
        dt_limit: clamp after the softplus; a clamped step has no gradient.
        chunk: steps per chunk of the matrix form; never changes the result.
        state: [B, H, P, N] float32 state before the first step; None means zeros.
        resets: [B, T] bool, True where nothing from earlier positions enters (with `reverse`:
            from later positions); None means never.
        lengths: [B] int32 valid steps per row (right padding may hold anything, outputs there are
            0, and the state passes through unchanged); None means T.
        reverse: run from the last step to the first; the state enters at the right end.
        implementation: None (best available) or a name in `IMPLEMENTATIONS`; "pallas_gpu" has
            chunks of its own, 64 steps.

    Returns:
        y [B, T, H, P] in x's dtype and the float32 state after the last valid step. dt, decays,
        states and sums are float32; matrix products take operands in x's dtype and accumulate in
        float32. float64 inputs are computed in float64.

    Raises:
        ValueError: shapes that do not fit (with the numbers), an implementation that does not exist
            here, or sizes that a kernel asked for by name cannot compute.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, state, resets, lengths, "T")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    problems = prepare.unable(x, B.shape[-1])
    name = dispatch.resolve("ssd", implementation, IMPLEMENTATIONS, unable=problems, x=x)
    acc = prepare.wide(x.dtype)
    dt = prepare.activate(dt, dt_bias, dt_softplus, dt_limit, lengths).astype(acc)
    if resets is not None:
        resets = fill_invalid(resets, lengths)
    series = (
        *(fill_invalid(v, lengths).astype(x.dtype) for v in (x, B, C)),
        dt,
        dt * A.astype(acc),
        resets,
    )
    x, B, C, dt, a, resets = flip_time(series) if reverse else series
    state = None if state is None else state.astype(acc)
    operands = (x, dt, a, B, C, _skip(D, x), state, resets)
    operands = vary(operands, operands)
    out_dtype = x.dtype if z is None else acc
    y, state = IMPLEMENTATIONS[name](*operands, chunk=chunk, out_dtype=out_dtype)
    if reverse:
        y = flip_time(y)
    if z is not None:
        y = prepare.gate(y, fill_invalid(z, lengths).astype(x.dtype))
    return fill_invalid(y, lengths), state


def ssd_step(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    *,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state: Array | None = None,
) -> tuple[Array, Array]:
    """One step of `ssd`: the same arguments without a time axis, x [B, H, P], dt [B, H].

    Returns y [B, H, P] in x's dtype and the float32 state [B, H, P, N]. Everything between is
    float32.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, state, None, None, "")
    acc = prepare.wide(x.dtype)
    dt = prepare.activate(dt, dt_bias, dt_softplus, dt_limit).astype(acc)
    if state is None:
        state = jnp.zeros((*x.shape, B.shape[-1]), acc)
    parts = (state.astype(acc), x.astype(acc), dt, dt * A.astype(acc), B.astype(acc), C.astype(acc))
    state, y = step(*parts, _skip(D, x))
    return (y.astype(x.dtype) if z is None else prepare.gate(y, z.astype(x.dtype))), state


def chunk_parts(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    *,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk: int = 128,
    state: Array | None = None,
    resets: Array | None = None,
    lengths: Array | None = None,
) -> dict[str, Array]:
    """Intermediate values of the chunked form, for inspection; the arguments are those of `ssd`.

    Returns, for c = ceil(T / chunk) chunks of Q = chunk steps (the last one padded with dt = 0):
        dt_active, dA_cumsum: [B, H, c, Q] activated steps and inclusive sums of dt A in the chunk.
        CB: [B, c, G, Q, Q] C_l . B_s, unmasked.
        chunk_states: [B, c, H, P, N] what each chunk adds to the state at its end.
        states_in: [B, c, H, P, N] the state entering each chunk.
    """
    _check(x, dt, A, B, C, None, None, dt_bias, state, resets, lengths, "T")
    acc = prepare.wide(x.dtype)
    dt = prepare.activate(dt, dt_bias, dt_softplus, dt_limit, lengths).astype(acc)
    x, B, C = (fill_invalid(v, lengths) for v in (x, B, C))
    resets = None if resets is None else fill_invalid(resets, lengths)
    return chunk_intermediates(x, dt, dt * A.astype(acc), B, C, state, resets, chunk)
