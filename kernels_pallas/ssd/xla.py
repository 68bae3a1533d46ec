"""SSD over chunks of time as matrix products (arXiv 2405.21060, section 6), with its own gradient.

Per chunk of Q steps and head, with cs the inclusive sums of a = dt A in the chunk:

    diagonal       Yd_l = sum_{s<=l} (C_l . B_s) exp(cs_l - cs_s) dt_s x_s
    chunk state    S_c  = sum_s exp(cs_Q - cs_s) dt_s x_s (outer) B_s
    passing        H_{c+1} = exp(cs_Q) H_c + S_c
    off-diagonal   Yo_l = exp(cs_l) H_c C_l,      y = Yd + Yo + D x

C . B is computed once per group. Products with a state take all heads of a group at once,
[Q, N] x [N, K P] with K = H/G, so that x, y and their gradients stay in the layout they come in.
States are passed on by small matrix products over up to 16 chunks, level by level.

Traffic for E = B T H P elements of 2 bytes, besides the 2 E + 2 E that must move: scores in x's
dtype 2 E Q/P written and read, the two parts of y in float32 8 E each, states 4 E N/Q written and
read. Multiply-adds per element: Q (causal half wasted) + Q N / (K P) + 2 N. The backward pass
recomputes the scores and keeps, beside the inputs, the state entering every chunk (2 E N/Q bytes);
dM = dY x^T is rounded to x's dtype.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from .. import dispatch
from ..compat import vary
from ..time_axis import pad_time
from .prepare import cut, join, wide

PASS_GROUP = 16  # chunks whose states are passed on by one matrix product


class Decays(NamedTuple):
    """Decay factors of a chunk [b, c, g, k, q], all at most 1; resets make them 0."""

    cs: Array  # inclusive sums of a
    counts: Array | None  # [b, c, q] resets so far in the chunk
    into: Array  # from the entry of the chunk to after step l: exp(cs_l)
    out_of: Array  # from after step s to the end of the chunk: exp(cs_Q - cs_s)
    log_total: Array  # [b, c, g, k] cs_Q
    closed: Array | None  # [b, c] whether a reset cuts the chunk's end from its entry


def decays(a: Array, resets: Array | None) -> Decays:
    """a [b, c, g, k, q], resets [b, c, q] or None."""
    cs = jnp.cumsum(a, axis=-1)
    into = jnp.exp(jnp.minimum(cs, 0))
    out_of = jnp.exp(jnp.minimum(cs[..., -1:] - cs, 0))
    if resets is None:
        return Decays(cs, None, into, out_of, cs[..., -1], None)
    counts = jnp.cumsum(resets.astype(jnp.int32), axis=-1)
    same = lambda mask, v: jnp.where(mask[:, :, None, None], v, 0)
    into = same(counts == 0, into)
    out_of = same(counts == counts[..., -1:], out_of)
    return Decays(cs, counts, into, out_of, cs[..., -1], counts[..., -1] > 0)


def decay_matrix(d: Decays) -> tuple[Array, Array]:
    """L [b, c, g, k, l, s] = exp(cs_l - cs_s) for s < l, exactly 1 at s = l, else 0; and s < l."""
    q = d.cs.shape[-1]
    row, column = jnp.arange(q)[:, None], jnp.arange(q)
    below = column < row
    if d.counts is not None:
        below = below & (d.counts[..., :, None] == d.counts[..., None, :])[:, :, None, None]
    exponent = jnp.minimum(d.cs[..., :, None] - d.cs[..., None, :], 0)
    off = jnp.exp(jnp.where(below, exponent, -jnp.inf))
    return jnp.where(row == column, 1, off), below


def dot(spec: str, a: Array, b: Array, dtype=None) -> Array:
    """einsum accumulated in at least float32, returned in that or in `dtype`."""
    acc = wide(jnp.promote_types(a.dtype, b.dtype))
    dtype = acc if dtype is None else dtype
    if dispatch.current_device().startswith("cpu"):  # XLA's CPU backend lacks some bfloat16 matmuls
        a, b = a.astype(acc), b.astype(acc)
        return jnp.einsum(spec, a, b, preferred_element_type=acc).astype(dtype)
    return jnp.einsum(spec, a, b, preferred_element_type=dtype)


def pass_states(
    log_total: Array,
    closed: Array | None,
    states: Array,
    first: Array | None,
    *,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """H_{c+1} = exp(log_total_c) H_c + S_c (no H_c if closed): (H_0 .. H_{n-1}, H_n).

    log_total [b, n, g, k], closed [b, n], states [b, n, g, k, p, r], first [b, g, k, p, r].
    With `reverse` it runs from the last chunk to the first.
    """
    n = states.shape[1]
    if n > 2 * PASS_GROUP:
        padded = [pad_time(v, PASS_GROUP) for v in (log_total, states)]
        split = lambda v: v.reshape(-1, PASS_GROUP, *v.shape[2:])
        inner_log, inner_states = map(split, padded)
        inner_closed = None if closed is None else split(pad_time(closed, PASS_GROUP))
        local, ends = pass_states(inner_log, inner_closed, inner_states, None, reverse=reverse)
        merge = lambda v: v.reshape(states.shape[0], -1, *v.shape[1:])
        group_closed = None if closed is None else merge(jnp.any(inner_closed, axis=1))
        group_log = merge(jnp.sum(inner_log, axis=1))
        entering, last = pass_states(group_log, group_closed, merge(ends), first, reverse=reverse)
        _, reach = _pass_weights(inner_log, inner_closed, reverse)
        reach = reach[:, 1:] if reverse else reach[:, :-1]
        local = merge(local) + merge(reach)[..., None, None] * entering[:, :, None]
        return local.reshape(local.shape[0], -1, *local.shape[3:])[:, :n], last
    weights, reach = _pass_weights(log_total, closed, reverse)
    out = jnp.einsum("bgkij,bjgkpr->bigkpr", weights, states, precision="highest")
    if first is not None:
        out = out + reach[..., None, None] * first[:, None]
    return (out[:, 1:], out[:, 0]) if reverse else (out[:, :-1], out[:, -1])


def _pass_weights(log_total, closed, reverse):
    """How S_j enters H_i [b, g, k, n+1, n] and how H_0 does [b, n+1, g, k]; see `pass_states`."""
    flip = lambda v, *axes: jnp.flip(v, axes) if reverse else v
    n = log_total.shape[1]
    before = lambda v: jnp.pad(v, [(0, 0), (1, 0)] + [(0, 0)] * (v.ndim - 2))
    cs = before(jnp.cumsum(flip(log_total, 1), axis=1))
    reach = jnp.exp(jnp.minimum(cs, 0))
    cs = jnp.moveaxis(cs, 1, -1)
    earlier = jnp.arange(n) < jnp.arange(n + 1)[:, None]
    if closed is not None:
        counts = before(jnp.cumsum(flip(closed, 1).astype(jnp.int32), axis=1))
        reach = jnp.where((counts == 0)[..., None, None], reach, 0)
        earlier = earlier & (counts[:, :, None] == counts[:, None, 1:])[:, None, None]
    exponent = jnp.minimum(cs[..., :, None] - cs[..., None, 1:], 0)
    weights = jnp.exp(jnp.where(earlier, exponent, -jnp.inf))
    return flip(weights, -1, -2), flip(reach, 1)


def _by_chunk(x, dt, a, B, C, state, resets, chunk):
    """Cut into chunks and groups: x [b,c,q,g,k,p], dt [b,c,g,k,q], B, C [b,c,q,g,n], state,
    Decays.
    """
    chunk = min(chunk, x.shape[1])
    groups = B.shape[2]
    by_group = lambda v, axis: v.reshape(*v.shape[:axis], groups, -1, *v.shape[axis + 1 :])
    x, dt, a, B, C = (cut(pad_time(v, chunk), chunk) for v in (x, dt, a, B, C))
    dt, a = (by_group(jnp.moveaxis(v, 2, 3), 2) for v in (dt, a))
    resets = None if resets is None else cut(pad_time(resets, chunk), chunk)
    state = None if state is None else by_group(state, 1)
    return by_group(x, 3), dt, B, C, state, decays(a, resets)


def _along(v):
    """[b, c, g, k, q] as [b, c, q, g, k, 1]: a factor per step."""
    return jnp.moveaxis(v, -1, 2)[..., None]


def _scaled_states(x, dt, B, d):
    """Chunk states [b, c, g, k, p, n], float32."""
    scaled = (x * _along(dt * d.out_of)).astype(x.dtype)
    return dot("bcsgkp,bcsgn->bcgkpn", scaled, B)


def _run(x, dt, a, B, C, D, state, resets, chunk, out_dtype):
    """(y, final state, entering states in x's dtype or None if nothing enters)."""
    t_len, dtype, shape = x.shape[1], x.dtype, x.shape
    x, dt, B, C, state, d = _by_chunk(x, dt, a, B, C, state, resets, chunk)
    scores = dot("bclgn,bcsgn->bcgls", C, B)[:, :, :, None] * decay_matrix(d)[0]
    scores = (scores * dt[..., None, :]).astype(dtype)
    y = dot("bcgkls,bcsgkp->bclgkp", scores, x)
    entering = None
    if x.shape[1] == 1 and state is None:
        final = _scaled_states(x, dt, B, d)[:, 0]
    else:
        own = _scaled_states(x, dt, B, d)
        entering, final = pass_states(d.log_total, d.closed, own, state)
        entering = entering.astype(dtype)
        y = y + _along(d.into) * dot("bclgn,bcgkpn->bclgkp", C, entering)
    if D is not None:
        y = y + D.reshape(*y.shape[3:5], -1) * x
    y = join(y.astype(out_dtype), t_len).reshape(shape)
    return y, final.reshape(shape[0], *shape[2:], -1), entering


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _ssd(x, dt, a, B, C, D, state, resets, chunk, out_dtype):
    return _run(x, dt, a, B, C, D, state, resets, chunk, out_dtype)[:2]


def values(args):
    """The arrays that come to the forward rule as (value, perturbed), with symbolic zeros."""
    return jax.tree.map(lambda p: p.value, args, is_leaf=lambda p: hasattr(p, "perturbed"))


def _ssd_fwd(*args):
    operands = values(args[:8])
    y, final, entering = _run(*operands, *args[8:])
    return (y, final), (operands, entering)


def _ssd_bwd(chunk, out_dtype, residuals, cotangents):
    return (*backward(*residuals, *cotangents, chunk), None)


_ssd.defvjp(_ssd_fwd, _ssd_bwd, symbolic_zeros=True)


def backward(operands, entering, dy, dfinal, chunk):
    """Gradients of (x, dt, a, B, C, D, state); dy [B, T, H, P] and dfinal [B, H, P, N] may be
    symbolic zeros: what only an unused final state would need is then left out.

    The gradient of a sums, for every step t, what decays through t: pairs s < t <= l within the
    chunk, what entered the chunk and is read at l >= t, what is written at s < t and leaves it,
    and what passes through. Pairs are counted as differences of row and column sums of one
    float32 array without its diagonal, so what cancels is exactly what does not straddle t.
    """
    x, dt, a, B, C, D, state, resets = operands
    t_len, dtype, shape = x.shape[1], x.dtype, x.shape
    n_state = B.shape[-1]
    by_chunk = lambda v: cut(pad_time(v, min(chunk, t_len)), min(chunk, t_len))
    x, dt, B, C, first, d = _by_chunk(x, dt, a, B, C, state, resets, chunk)
    if isinstance(dy, SymbolicZero):
        dy = vary(jnp.zeros(shape, dtype), x)
    dfinal = None if isinstance(dfinal, SymbolicZero) else dfinal
    dy = by_chunk(dy.astype(dtype)).reshape(x.shape)
    acc = dt.dtype

    cb = dot("bclgn,bcsgn->bcgls", C, B)[:, :, :, None]
    decay, below = decay_matrix(d)
    step = dt[..., None, :]
    dx = dot("bcgkls,bclgkp->bcsgkp", (cb * decay * step).astype(dtype), dy)
    dm = dot("bclgkp,bcsgkp->bcgkls", dy, x, dtype).astype(acc) * decay
    per_step = cb * dm
    ddt = jnp.sum(per_step, axis=-2)
    pairs = jnp.where(below, per_step * step, 0)
    reads = jnp.sum(pairs, axis=-1) - jnp.sum(pairs, axis=-2)
    dcb = jnp.sum(dm * step, axis=3).astype(dtype)
    dB = dot("bcgls,bclgn->bcsgn", dcb, C)
    dC = dot("bcgls,bcsgn->bclgn", dcb, B)

    dfinal = None if dfinal is None else dfinal.reshape(dfinal.shape[0], *x.shape[3:], n_state)
    leaving = None if dfinal is None else dfinal[:, None]
    dstate, da = None, 0
    if entering is not None:
        scaled = (dy * _along(d.into)).astype(dtype)
        dC = dC + dot("bclgkp,bcgkpn->bclgn", scaled, entering)
        carried = dot("bclgn,bcgkpn->bclgkp", C, entering)
        reads = reads + d.into * jnp.moveaxis(jnp.sum(dy * carried, axis=-1), 2, -1)
        own = dot("bclgkp,bclgn->bcgkpn", scaled, C)
        leaving, dstate = pass_states(d.log_total, d.closed, own, dfinal, reverse=True)
        through = jnp.exp(jnp.minimum(d.log_total, 0)) * jnp.sum(leaving * entering, axis=(-1, -2))
        if d.closed is not None:
            through = jnp.where(d.closed[..., None, None], 0, through)
        da = through[..., None]
    if leaving is not None:
        rounded, weight = leaving.astype(dtype), dt * d.out_of
        dB = dB + dot("bcsgkp,bcgkpn->bcsgn", (x * _along(weight)).astype(dtype), rounded)
        back = dot("bcsgn,bcgkpn->bcsgkp", B, rounded)
        dx = dx + _along(weight) * back
        written = d.out_of * jnp.moveaxis(jnp.sum(back * x, axis=-1), 2, -1)
        ddt = ddt + written
        shifted = jnp.pad((dt * written)[..., :-1], [(0, 0)] * 4 + [(1, 0)])
        da = da + jnp.cumsum(shifted, axis=-1)
    da = da + jax.lax.cumsum(reads, axis=reads.ndim - 1, reverse=True)
    dD = None
    if D is not None:
        dx = dx + D.reshape(*x.shape[3:5], -1) * dy
        dD = jnp.sum(dy.astype(acc) * x, axis=(0, 1, 2)).reshape(D.shape[0], -1)
        dD = jnp.sum(dD, axis=1, keepdims=True) if D.shape[1] == 1 else dD

    back_in_time = lambda v, *tail: join(v, t_len).reshape(*shape[:2], *tail)
    per_head = lambda v: back_in_time(jnp.moveaxis(v, -1, 2), shape[2])
    return (
        back_in_time(dx.astype(dtype), *shape[2:]),
        per_head(ddt),
        per_head(da),
        back_in_time(dB.astype(B.dtype), *B.shape[3:]),
        back_in_time(dC.astype(C.dtype), *C.shape[3:]),
        dD,
        None if state is None else dstate.reshape(state.shape),
    )


def ssd_xla(x, dt, a, B, C, D, state, resets, *, chunk, out_dtype) -> tuple[Array, Array]:
    """See `prepare` for the arguments and the module for the equations."""
    return _ssd(x, dt, a, B, C, D, state, resets, chunk, out_dtype)


def chunk_intermediates(x, dt, a, B, C, state, resets, chunk) -> dict[str, Array]:
    """See `chunk_parts`."""
    if x.shape[1] < chunk:
        x, dt, a, B, C = (pad_time(v, chunk) for v in (x, dt, a, B, C))
        resets = None if resets is None else pad_time(resets, chunk)
    x, dt, B, C, state, d = _by_chunk(x, dt, a, B, C, state, resets, chunk)
    own = _scaled_states(x, dt, B, d)
    entering, _ = pass_states(d.log_total, d.closed, own, state)
    per_head = lambda v: jnp.moveaxis(v.reshape(*v.shape[:2], -1, v.shape[-1]), 1, 2)
    heads = lambda v: v.reshape(*v.shape[:2], -1, *v.shape[4:])
    return {
        "dt_active": per_head(dt),
        "dA_cumsum": per_head(d.cs),
        "CB": dot("bclgn,bcsgn->bcgls", C, B),
        "chunk_states": heads(own),
        "states_in": heads(entering),
    }
