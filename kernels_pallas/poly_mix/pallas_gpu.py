"""The polynomial mixer on Hopper GPUs (Pallas Mosaic GPU): tiles through shared memory, sums in
registers.

A program is one warpgroup that owns 256 channels of one row, two to a thread, and walks a chunk of
the tokens serially. Tiles [tokens, 256] arrive through the bulk copy engine, a few ahead; results
leave by it, too. Tokens are cut into as many chunks as fill the chip, in two passes without
atomics: sums of the chunks; then every chunk from the sums before it.

Bytes of h's elements over HBM, 16 bit: mean forward 2, backward 4 (elementwise); causal
forward 4 and in chunks 6, backward 6 and in chunks 8, with gates by head 10 (a . dy, which XLA adds
up within heads, leaves as well).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from .. import dispatch
from ..compat import vary
from .aggregate import counts, rows_from_sums
from .gpu_call import (
    LANES,
    Call,
    Marks,
    Plan,
    act,
    constant,
    held,
    load,
    polynomial,
    slope,
    with_derivative,
)
from .operands import Operands
from .state import PolyState, reciprocal
from .xla import weighted_sums

MOST_DEGREES = 8  # whose sums fit into registers


def unable(operands: Operands, causal: bool, frames, gate: Array | None = None) -> str | None:
    """What the kernels do not take, None for nothing."""
    h, coeff, weights, rotation, _, query_weights = operands
    if h.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{h.dtype}"
    if h.shape[2] % LANES or h.shape[2] == LANES:
        return f"{h.shape[2]} channels (a multiple of {LANES}, from {2 * LANES} on)"
    if coeff.shape[1] > MOST_DEGREES:
        return f"degree {coeff.shape[1]} (up to {MOST_DEGREES})"
    if rotation is not None or query_weights is not None or frames is not None:
        return "rotations, query_weights and frames"
    if gate is not None:
        heads = gate.shape[2]
        size = h.shape[2] // heads
        if heads % 4 or (LANES % size and size % LANES):
            return f"{heads} gates of {size} channels"
    return None


def _columns(hbm, lane, degree):
    return [held(hbm["coeff"], (j, lane)) for j in range(degree)]


def _weigh(value, weight, inside, ins, r):
    """The value of a token times its weight, 0 where that is 0: there it may be NaN."""
    if weight:
        w = ins["marks"][r, 0]
        wide = jnp.broadcast_to(w != 0, (LANES,))
        return jnp.where(wide, value * w, constant(0))
    if inside is not None:
        return jnp.where(jnp.broadcast_to(inside, (LANES,)), value, constant(0))
    return value


def _sums(h: Array, marks: Array | None, coeff: Array | None, degree: int) -> Array:
    """Sums over the tokens of every chunk of w p(h) [B, chunks, 1, E], or of the w act(h)^j
    [B, chunks, degree, E] if `coeff` [degree, E] is None."""
    call = Call("sums", h).stream(h=h, marks=marks).hold(coeff=coeff)
    many = 1 if coeff is not None else degree

    def body(hbm, b, c, lane, walk):
        known = None if coeff is None else _columns(hbm, lane, degree)

        def step(r, inside, ins, outs, sums):
            a = act(load(ins["h"], r))
            weigh = functools.partial(_weigh, weight=marks is not None, inside=inside, ins=ins, r=r)
            if known is not None:
                return (sums[0] + weigh(polynomial(a, known)),)
            if marks is not None or inside is not None:
                term, a = weigh(a), weigh_nothing(a, ins, inside, r)
            else:
                term = a
            new = []
            for j, total in enumerate(sums):
                term = term * a if j else term
                new.append(total + term)
            return tuple(new)

        def weigh_nothing(a, ins, inside, r):
            keep = inside if marks is None else ins["marks"][r, 0] != 0
            return jnp.where(jnp.broadcast_to(keep, (LANES,)), a, constant(0))

        sums = walk(step, (constant(0),) * many)
        for j, value in enumerate(sums):
            hbm["sums"][b, c, j, lane] = value

    return call.give(sums=(many,)).run(body, flops=4 + 2 * degree)["sums"]


def gpu_moments(h, degree, weights, frames, dtype):
    """As `xla.moments`, for one frame."""
    del frames, dtype
    return _moments(h, weights, degree)


@dispatch.compiled_once(2)
def _moments(h, weights, degree):
    sums = _sums(h, None if weights is None else _marks(weights, None), None, degree)
    return jnp.moveaxis(jnp.sum(sums, axis=1, keepdims=True), 2, 3)


@dispatch.compiled_once()
def gpu_change(h, coeff, weights, ct, beside):
    """As `xla.change`, for one frame."""
    degree = coeff.shape[1]
    known = ct * (coeff * jnp.arange(1, degree + 1, dtype=coeff.dtype)).T
    marks = None if weights is None else _marks(weights, None)
    call = Call("change", h).stream(h=h, marks=marks, beside=beside).hold(coeff=known)

    def body(hbm, b, c, lane, walk):
        known = [held(hbm["coeff"], (b, j, lane)) for j in range(degree)]

        def step(r, inside, ins, outs, carry):
            wide = load(ins["h"], r)
            a, value = act(wide), known[-1]
            for factor in known[-2::-1]:
                value = value * a + factor
            value = _weigh(value * slope(wide), weights is not None, inside, ins, r)
            outs["dh"][r] = value.astype(h.dtype)
            return carry

        walk(step, ())

    result = call.leave(dh=h.dtype).run(
        body, flops=10 + 2 * degree, beside=None if beside is None else "beside"
    )
    return result["dh"]


def _marks(weights: Array, share: Array | None) -> Array:
    """[B, N, 4] of [B, N] weights and 1 / count."""
    zero = jnp.zeros_like(weights)
    return jnp.stack([weights, zero if share is None else share, zero, zero], axis=-1)


def _heads(gate: Array | None, width: int) -> tuple[int, Array | None]:
    """Channels of a head; and which of its program's heads a channel belongs to."""
    if gate is None:
        return 1, None
    size = width // gate.shape[2]
    return size, (jnp.arange(LANES) // size).astype(jnp.float32)


def _gates(hbm, size, ins, lane):
    """`Marks` of a tile."""
    if "gate" not in ins:
        return Marks(ins["marks"], None, None, 0, 0)
    count = max(1, LANES // size)
    first = lax.div(lax.axis_index("d") * LANES, size)
    return Marks(ins["marks"], ins["gate"], None, count, first)


@dispatch.compiled_once(5, 6)
def _forward(h, coeff, gate, marks, start, weighted, dtype):
    """out [B, N, E] and the sums after every chunk [B, chunks, E]."""
    degree, columns = coeff.shape[1], coeff.T
    plan = Plan("forward", *h.shape)
    entering = start[:, None]
    if plan.chunks > 1:
        sums = _sums(h, marks if weighted else None, columns, degree)[:, :-1, 0]
        sums = jnp.concatenate([entering, sums], axis=1)
        entering = jnp.cumsum(sums, axis=1)
    size, heads = _heads(gate, h.shape[2])
    call = Call("forward", h).stream(h=h, marks=marks, gate=gate)
    call.hold(coeff=columns, entering=entering, heads=heads)

    def body(hbm, b, c, lane, walk):
        known = _columns(hbm, lane, degree)
        which = None if heads is None else held(hbm["heads"], (pl.ds(0, LANES),))

        def step(r, inside, ins, outs, carry):
            (total,) = carry
            value = polynomial(act(load(ins["h"], r)), known)
            total = total + _weigh(value, weighted, inside, ins, r)
            out = total * ins["marks"][r, 1]
            if gate is not None:
                out = out * _gates(hbm, size, ins, lane)._replace(heads=which).gate(r)
            outs["out"][r] = out.astype(dtype)
            return (total,)

        (total,) = walk(step, (held(hbm["entering"], (b, c, lane)),))
        hbm["last"][b, c, lane] = total

    call.leave(out=dtype).give(last=())
    result = call.run(body, flops=8 + 2 * degree)
    return result["out"], result["last"]


@dispatch.compiled_once(7)
def _backward(h, coeff, gate, marks, last, ct, ct_last, weighted):
    """dh, dcoeff, a . ct (None without gates) and the gradient of the sums before all tokens."""
    degree, columns = coeff.shape[1], coeff.T
    plan = Plan("backward", *h.shape)
    size, heads = _heads(gate, h.shape[2])
    pulled = lambda ins, which, hbm, lane, r, g: (
        (g if gate is None else g * _gates(hbm, size, ins, lane)._replace(heads=which).gate(r))
        * ins["marks"][r, 1]
    )

    def held_heads(hbm):
        return None if heads is None else held(hbm["heads"], (pl.ds(0, LANES),))

    entering = ct_last[:, None]
    if plan.chunks > 1:

        def sum_up(hbm, b, c, lane, walk):
            which = held_heads(hbm)

            def step(r, inside, ins, outs, carry):
                g = pulled(ins, which, hbm, lane, r, load(ins["ct"], r))
                return (carry[0] + _weigh(g, False, inside, ins, r),)

            hbm["sums"][b, c, lane] = walk(step, (constant(0),))[0]

        call = Call("suffix", h).stream(ct=ct, marks=marks, gate=gate).hold(heads=heads)
        sums = call.give(sums=()).run(sum_up, flops=3)["sums"][:, 1:]
        sums = jnp.concatenate([sums, entering], axis=1)
        entering = lax.cumsum(sums, axis=1, reverse=True)

    def body(hbm, b, c, lane, walk):
        known, which = _columns(hbm, lane, degree), held_heads(hbm)

        def step(r, inside, ins, outs, carry):
            suffix, total, *dcoeff = carry
            wide, ct = load(ins["h"], r), load(ins["ct"], r)
            ct = _weigh(ct, False, inside, ins, r)
            suffix = suffix + pulled(ins, which, hbm, lane, r, ct)
            a = act(wide)
            value, change = with_derivative(a, known)
            dp = _weigh(suffix, weighted, inside, ins, r)
            if gate is not None:
                outs["dot"][r] = (total * ins["marks"][r, 1] * ct).astype(ct_dtype)
                total = total - _weigh(value, weighted, inside, ins, r)
            dh = dp * change * slope(wide)
            if weighted or inside is not None:
                keep = ins["marks"][r, 0] != 0 if weighted else inside
                keep = jnp.broadcast_to(keep, (LANES,))
                dh, a = (jnp.where(keep, z, constant(0)) for z in (dh, a))
            outs["dh"][r] = dh.astype(h.dtype)
            new, term = [], dp
            for before in dcoeff:
                term = term * a
                new.append(before + term)
            return suffix, total, *new

        suffix = held(hbm["entering"], (b, c, lane))
        total = constant(0) if gate is None else held(hbm["last"], (b, c, lane))
        suffix, _, *dcoeff = walk(step, (suffix, total, *(constant(0),) * degree))
        hbm["left"][b, c, lane] = suffix
        for j, value in enumerate(dcoeff):
            hbm["dcoeff"][b, c, j, lane] = value

    ct_dtype = None if gate is None else ct.dtype
    call = Call("backward", h).stream(h=h, ct=ct, marks=marks, gate=gate)
    call.hold(coeff=columns, entering=entering, heads=heads, last=None if gate is None else last)
    call.leave(dh=h.dtype, dot=ct_dtype).give(left=(), dcoeff=(degree,))
    result = call.run(body, down=False, flops=12 + 5 * degree)
    dcoeff = jnp.sum(result["dcoeff"], axis=(0, 1)).T
    return result["dh"], dcoeff, result.get("dot"), result["left"][:, 0]


KERNELS = (gpu_moments, gpu_change)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _causal(h, coeff, gate, marks, start, weighted, dtype):
    out, last = _forward(h, coeff, gate, marks, start, weighted, dtype)
    return out, last[:, -1]


def _causal_forward(h, coeff, gate, marks, start, weighted, dtype):
    out, last = _forward(h, coeff, gate, marks, start, weighted, dtype)
    return (out, last[:, -1]), (h, coeff, gate, marks, last)


def _causal_backward(weighted, dtype, saved, cts):
    h, coeff, gate, marks, last = saved
    dh, dcoeff, dot, dstart = _backward(h, coeff, gate, marks, last, *cts, weighted)
    if gate is not None:
        dot = dot.reshape(*gate.shape, -1)
        dot = jnp.sum(dot.astype(jnp.float32), axis=-1)
    return dh, dcoeff, dot, None, dstart


_causal.defvjp(_causal_forward, _causal_backward)


def poly_mix_gpu(
    operands: Operands, causal: bool, frames, out_dtype, gate: Array | None = None
) -> tuple[Array, PolyState]:
    """Rows [B, R, E] and state of `poly_mix` by the kernels above; see `unable`.

    Args:
        gate: [B, N, H] for causal rows: each is multiplied with its token's gate, head by head.
    """
    h, coeff, weights, _, state, _ = operands
    batch, n, width = h.shape
    if not causal:
        sums = weighted_sums(h, coeff, weights, (n,), KERNELS)
        count = counts(n, weights, False, (n,), coeff.dtype)
        rows, last = rows_from_sums(sums, count, state)
        return rows.astype(out_dtype), last
    count = counts(n, weights, True, None, coeff.dtype)
    start = vary(jnp.zeros((batch, width), jnp.float32), h)
    if state is not None:
        before = lax.stop_gradient(state.count)
        count, start = before[:, None] + count, before[:, None] * state.mean
    count = jnp.broadcast_to(count, (batch, n))
    share = reciprocal(count)
    marks = _marks(jnp.ones_like(share) if weights is None else weights, share)
    gate = None if gate is None else gate.astype(jnp.float32)
    marks, gate = vary((marks, gate), h)
    rows, last = _causal(h, coeff, gate, marks, start, weights is not None, jnp.dtype(out_dtype))
    return rows, PolyState(last * share[:, -1:], count[:, -1])
