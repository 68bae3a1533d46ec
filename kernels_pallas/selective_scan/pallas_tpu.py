"""Selective scan on TPUs: one kernel forward, one backward; states stay in VMEM.

A program walks the time blocks of Db channels with the state [N, Db] (states in sublanes, channels
in lanes) in scratch memory. B and C come transposed, [N, Tb], so that a step's column [N, 1] is one
lane, brought to the front by a rotation every ROWS steps and spread over the lanes. Forward writes
the state before each block; backward starts from it, computes the block's states again into VMEM
and walks them from last to first. dA, dD and d delta_bias are summed per row of the batch in the
kernel, dB and dC per block of channels; XLA adds the parts. HBM traffic beyond inputs and outputs:
one state per Tb steps, and N / Db of an input for each part of dB and dC.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import dispatch
from ..compat import out_like, vary
from ..softplus import softplus
from ..time_axis import pad_time
from .fused import NO_STEP, sigmoid, softplus_slope

ROWS = 16  # steps unrolled together: a tile of bfloat16 rows
_LANES, _SUBLANES = 128, 8  # of a float32 tile
_STATES_IN_VMEM = 2**20  # of one block in the backward pass, in elements
_NAMES = ("u", "delta", "z", "a", "b", "c", "skip", "bias", "start", "keep")


def block_sizes(t_len: int, width: int, states: int, steps: int | None) -> tuple[int, int]:
    """(steps, channels) per block, for `width` channels in a group."""
    steps = steps or min(-(-t_len // ROWS) * ROWS, _LANES)
    fits = _STATES_IN_VMEM // (steps * states)
    if width % _LANES:
        return steps, width
    return steps, next((d for d in (512, 256) if d <= fits and width % d == 0), _LANES)


def selective_scan_tpu(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    z: Array | None,
    *,
    delta_bias: Array | None,
    softplus: bool,
    state: Array,
    resets: Array | None,
    reverse: bool,
    steps: int | None = None,
) -> tuple[Array, Array]:
    """See `selective_scan`; real A, and B, C [B, T, G, N] over time.

    `steps` per block: None chooses by size, and the chip takes multiples of 128. The result does
    not depend on it.
    """
    (_, t_len, width), states, groups = u.shape, A.shape[1], B.shape[2]
    per_group = width // groups
    missing = 0 if groups == 1 and width <= 512 else -per_group % _LANES
    steps, block = block_sizes(t_len, per_group + missing, states, steps)

    def channels(x):  # last axis: every group padded to whole lanes
        if x is None or not missing:
            return x
        x = x.reshape(*x.shape[:-1], groups, per_group)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
        return x.reshape(*x.shape[:-2], -1)

    fill = lambda x, axis, size: jnp.pad(
        x, [(0, -x.shape[a] % size if a == axis % x.ndim else 0) for a in range(x.ndim)]
    )
    lane = steps if steps < t_len else _LANES  # rotations want whole tiles
    along = lambda x, value=0: None if x is None else channels(pad_time(x, steps, value))
    column = lambda x: fill(
        fill(x.astype(jnp.float32).transpose(0, 2, 3, 1), -1, lane), -2, _SUBLANES
    )
    weight = lambda x: channels(fill(x, -2, _SUBLANES))
    row = lambda x: None if x is None else channels(x.astype(jnp.float32)[None])
    keep = None if resets is None else 1 - fill(resets[:, None].astype(jnp.float32), -1, lane)
    operands = {
        "u": along(u),
        "delta": along(delta, NO_STEP if softplus else 0),
        "z": along(z),
        "a": weight(A.astype(jnp.float32).T),
        "b": column(B),
        "c": column(C),
        "skip": row(D),
        "bias": row(delta_bias),
        "start": weight(state.mT),
        "keep": keep,
    }
    operands = vary(tuple(operands[name] for name in _NAMES), operands)
    out, last = _scan((steps, ROWS, block, softplus, reverse), *operands)
    if missing:
        kept = lambda x: x.reshape(*x.shape[:-1], groups, -1)[..., :per_group]
        out, last = (kept(x).reshape(*x.shape[:-1], width) for x in (out, last))
    return out[:, :t_len], last[:, :states].mT


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(static, *operands):
    out, last, _ = _forward(static, operands, boundaries=False)
    return out, last


def _scan_fwd(static, *operands):
    out, last, bounds = _forward(static, operands, boundaries=True)
    return (out, last), (operands, bounds)


def _scan_bwd(static, saved, cotangents):
    operands, bounds = saved
    return _backward(static, operands, bounds, *cotangents)


_scan.defvjp(_scan_fwd, _scan_bwd)


# Blocks and sizes of the two kernels.


def _grid(static, operands, backward):
    """Grid and block specs by kind of operand; time blocks run in the order of processing."""
    steps, _, block, _, reverse = static
    u, a, b = (operands[_NAMES.index(name)] for name in ("u", "a", "b"))
    (batch, t_len, width), states, groups = u.shape, a.shape[0], b.shape[1]
    blocks, per_group = t_len // steps, width // groups // block
    lanes = b.shape[-1] // blocks
    # Block k of the backward pass is the one that the forward pass took k-th from the end.
    when = lambda k: blocks - 1 - k if reverse != backward else k
    turn = lambda k: blocks - 1 - k if backward else k
    spec = lambda shape, index: pl.BlockSpec(shape, index)
    return {
        "grid": (batch, width // block, blocks),
        "along": spec((1, steps, block), lambda i, d, k: (i, when(k), d)),
        "weight": spec((states, block), lambda i, d, k: (0, d)),
        "column": spec((1, 1, states, lanes), lambda i, d, k: (i, d // per_group, 0, when(k))),
        "part": spec((1, 1, states, lanes), lambda i, d, k: (i, d, 0, when(k))),
        "row": spec((1, block), lambda i, d, k: (0, d)),
        "sum": spec((1, 1, block), lambda i, d, k: (i, 0, d)),
        "state": spec((1, states, block), lambda i, d, k: (i, 0, d)),
        "bound": spec((1, 1, states, block), lambda i, d, k: (i, turn(k), 0, d)),
        "keep": spec((1, 1, lanes), lambda i, d, k: (i, 0, when(k))),
    }


_KINDS = dict(
    zip(
        _NAMES,
        ("along",) * 3 + ("weight",) + ("column",) * 2 + ("row",) * 2 + ("state", "keep"),
        strict=True,
    )
)


def _call(body, grid, inputs, outputs, scratch, cost, name):
    """pallas_call over {name: (kind, array)} and {name: (kind, shape, dtype)}; None is left out."""
    inputs = {k: v for k, v in inputs.items() if v[1] is not None}
    like = next(iter(inputs.values()))[1]
    arrays = [array for _, array in inputs.values()]
    interpret = dispatch.interpret("tpu")
    # The interpreter of jax 0.10.2 does not know the axis that vmap adds.
    params = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
    results = pl.pallas_call(
        lambda *refs: body(
            **dict(zip((*inputs, *outputs, *scratch), refs, strict=True)),
            **dict.fromkeys(set(_NAMES) - set(inputs) - set(outputs)),
        ),
        grid=grid["grid"],
        in_specs=[grid[kind] for kind, _ in inputs.values()],
        out_specs=[grid[kind] for kind, _, _ in outputs.values()],
        out_shape=[out_like(like, shape, dtype) for _, shape, dtype in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=None if interpret else params,
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(*arrays)
    return dict(zip(outputs, results, strict=True))


def _cost(operands, per_state, per_step, passes):
    """`per_state` flops and one exponential per element and state; `passes` arrays like u."""
    size, states = operands[0].size, operands[3].shape[0]
    return pl.CostEstimate(
        flops=size * (states * per_state + per_step),
        transcendentals=size * (states + 4),
        bytes_accessed=passes * size * operands[0].dtype.itemsize,
    )


# The kernels. References hold one block; s counts steps in the order of the recurrence.


def _tile(refs, rows, use_softplus):
    """float32 rows of u, the raw and the actual step size, and the gate z of some steps."""
    u = refs["u"][0, rows, :].astype(jnp.float32)
    raw = refs["delta"][0, rows, :].astype(jnp.float32)
    if refs["bias"] is not None:
        raw = raw + refs["bias"][...]
    z = None if refs["z"] is None else refs["z"][0, rows, :].astype(jnp.float32)
    return u, raw, softplus(raw) if use_softplus else raw, z


def _columns(refs, base):
    """B, C and the reset mask of the block, rotated so that step `base` is the first lane."""
    lanes = refs["b"].shape[-1]
    turned = lambda x: pltpu.roll(x, lax.rem(lanes - base, lanes), axis=1)
    keep = None if refs["keep"] is None else turned(refs["keep"][0])
    return turned(refs["b"][0, 0]), turned(refs["c"][0, 0]), keep


def _step(h, decay, x, b, keep):
    return decay * (h if keep is None else h * keep) + x * b


def _forward(static, operands, boundaries):
    """(out, last state, states before each block or None)."""
    steps, unroll, block, use_softplus, reverse = static
    named = dict(zip(_NAMES, operands, strict=True))
    grid = _grid(static, operands, backward=False)
    u, a = named["u"], named["a"]
    batch, states = u.shape[0], a.shape[0]
    kinds = {"out": ("along", u.shape, u.dtype), "last": ("state", named["start"].shape, a.dtype)}
    if boundaries:
        shape = (batch, grid["grid"][2], *a.shape)
        kinds["bound"] = ("bound", shape, a.dtype)

    def body(out, last, h, ys, bound=None, **refs):
        @pl.when(pl.program_id(2) == 0)
        def _():
            h[...] = refs["start"][0]

        if boundaries:
            bound[0, 0] = h[...]
        a = refs["a"][...]

        def group(i, state):
            base = pl.multiple_of((steps // unroll - 1 - i if reverse else i) * unroll, unroll)
            rows = pl.ds(base, unroll)
            u, _, dt, z = _tile(refs, rows, use_softplus)
            b, c, keep = _columns(refs, base)
            x = dt * u
            for r in range(unroll)[:: -1 if reverse else 1]:
                one = slice(r, r + 1)
                reset = None if keep is None else keep[:, one]
                state = _step(state, jnp.exp(dt[one] * a), x[one], b[:, one], reset)
                ys[one, :] = jnp.sum(state * c[:, one], axis=0, keepdims=True)
            y = ys[...]
            if refs["skip"] is not None:
                y = y + refs["skip"][...] * u
            if z is not None:
                y = y * z * sigmoid(z)
            out[0, rows, :] = y.astype(out.dtype)
            return state

        h[...] = lax.fori_loop(0, steps // unroll, group, h[...])
        last[0] = h[...]

    results = _call(
        body,
        grid,
        {name: (_KINDS[name], array) for name, array in named.items()},
        kinds,
        {"h": pltpu.VMEM((states, block), a.dtype), "ys": pltpu.VMEM((unroll, block), a.dtype)},
        _cost(operands, per_state=6, per_step=12, passes=4),
        "selective_scan_forward",
    )
    return results["out"], results["last"], results.get("bound")


def _backward(static, operands, bounds, d_out, d_last):
    """Gradients of all operands, in their order."""
    steps, unroll, block, use_softplus, reverse = static
    named = dict(zip(_NAMES, operands, strict=True))
    grid = _grid(static, operands, backward=True)
    u, a, b = named["u"], named["a"], named["b"]
    batch, states = u.shape[0], a.shape[0]
    rest = {"bound": ("bound", bounds), "d_out": ("along", d_out), "d_last": ("state", d_last)}
    parts = (batch, grid["grid"][1], *b.shape[2:])
    rows_sum = ("sum", (batch, 1, u.shape[2]), a.dtype)
    kinds = {
        "d_u": ("along", u.shape, u.dtype),
        "d_delta": ("along", u.shape, named["delta"].dtype),
        "d_z": ("along", u.shape, u.dtype if named["z"] is None else named["z"].dtype),
        "d_a": ("state", (batch, *a.shape), a.dtype),
        "d_b": ("part", parts, a.dtype),
        "d_c": ("part", parts, a.dtype),
        "d_skip": rows_sum,
        "d_bias": rows_sum,
        "d_start": ("state", named["start"].shape, a.dtype),
    }
    absent = [k for k in ("z", "skip", "bias") if named[k] is None]
    kinds = {k: v for k, v in kinds.items() if k.removeprefix("d_") not in absent}

    def body(bound, d_out, d_last, hs, ag, ys, gus, gts, **refs):
        first = pl.program_id(2) == 0

        @pl.when(first)
        def _():
            ag[...] = d_last[0]  # decay times gradient of the state of the step that follows
            for name in ("d_a", "d_skip", "d_bias"):
                if name in refs:
                    refs[name][...] = jnp.zeros(refs[name].shape, a.dtype)

        a_block = refs["a"][...]
        hs[0] = bound[0, 0]

        def base_of(i):
            return pl.multiple_of((steps // unroll - 1 - i if reverse else i) * unroll, unroll)

        def again(i, state):
            u, _, dt, _ = _tile(refs, pl.ds(base_of(i), unroll), use_softplus)
            b, _, keep = _columns(refs, base_of(i))
            x = dt * u
            for s in range(unroll):
                r = unroll - 1 - s if reverse else s
                one = slice(r, r + 1)
                reset = None if keep is None else keep[:, one]
                state = _step(state, jnp.exp(dt[one] * a_block), x[one], b[:, one], reset)
                hs[i * unroll + s + 1] = state
            return state

        lax.fori_loop(0, steps // unroll, again, hs[0])
        none = jnp.zeros(refs["b"].shape[2:], a.dtype)
        lanes = lax.broadcasted_iota(jnp.int32, none.shape, 1)

        def group(k, carry):
            i = steps // unroll - 1 - k
            base = base_of(i)
            rows = pl.ds(base, unroll)
            u, raw, dt, z = _tile(refs, rows, use_softplus)
            b, c, keep = _columns(refs, base)
            x = dt * u
            gy = d_out[0, rows, :].astype(jnp.float32)
            if z is not None:
                gate = sigmoid(z)
                gout, gy = gy, gy * z * gate
            g_next, d_a, d_b, d_c = carry
            for s in range(unroll)[::-1]:
                r = unroll - 1 - s if reverse else s
                one = slice(r, r + 1)
                h, before = hs[i * unroll + s + 1], hs[i * unroll + s]
                decay = jnp.exp(dt[one] * a_block)
                if keep is not None:
                    decay = decay * keep[:, one]
                g = gy[one] * c[:, one] + g_next
                g_next = decay * g
                past = g_next * before
                d_a += past * dt[one]
                d_c = jnp.where(lanes == base + r, jnp.sum(gy[one] * h, axis=1, keepdims=True), d_c)
                d_b = jnp.where(lanes == base + r, jnp.sum(g * x[one], axis=1, keepdims=True), d_b)
                gus[one, :] = jnp.sum(g * b[:, one], axis=0, keepdims=True)
                gts[one, :] = jnp.sum(past * a_block, axis=0, keepdims=True)
                if z is not None:
                    ys[one, :] = jnp.sum(h * c[:, one], axis=0, keepdims=True)
            d_u, d_dt = gus[...] * dt, gus[...] * u + gts[...]
            if refs["skip"] is not None:
                d_u = d_u + refs["skip"][...] * gy
                refs["d_skip"][0] += jnp.sum(gy * u, axis=0, keepdims=True)
            if use_softplus:
                d_dt = d_dt * softplus_slope(raw)
            if refs["bias"] is not None:
                refs["d_bias"][0] += jnp.sum(d_dt, axis=0, keepdims=True)
            if z is not None:
                y = ys[...] if refs["skip"] is None else ys[...] + refs["skip"][...] * u
                d_z = gout * y * gate * (1 + z * (1 - gate))
                refs["d_z"][0, rows, :] = d_z.astype(refs["d_z"].dtype)
            refs["d_u"][0, rows, :] = d_u.astype(refs["d_u"].dtype)
            refs["d_delta"][0, rows, :] = d_dt.astype(refs["d_delta"].dtype)
            return g_next, d_a, d_b, d_c

        carry = (ag[...], jnp.zeros_like(a_block), none, none)
        ag[...], d_a, refs["d_b"][0, 0], refs["d_c"][0, 0] = lax.fori_loop(
            0, steps // unroll, group, carry
        )
        refs["d_a"][0] += d_a
        refs["d_start"][0] = ag[...]

    tile = pltpu.VMEM((unroll, block), a.dtype)
    results = _call(
        body,
        grid,
        {name: (_KINDS[name], array) for name, array in named.items() if name != "start"} | rest,
        kinds,
        {
            "hs": pltpu.VMEM((steps + 1, states, block), a.dtype),
            "ag": pltpu.VMEM((states, block), a.dtype),
            "ys": tile,
            "gus": tile,
            "gts": tile,
        },
        _cost(operands, per_state=18, per_step=40, passes=7),
        "selective_scan_backward",
    )
    by_group = lambda x: x.reshape(batch, b.shape[1], -1, *x.shape[2:]).sum(2)
    total = {"a": lambda x: x.sum(0), "b": by_group, "c": by_group}
    total |= dict.fromkeys(("skip", "bias"), lambda x: x.sum(0))
    grads = {k.removeprefix("d_"): v for k, v in results.items()}
    grads = {k: total.get(k, lambda x: x)(v) for k, v in grads.items()}
    if named["keep"] is not None:
        grads["keep"] = jnp.zeros_like(named["keep"])
    return tuple(grads.get(name) for name in _NAMES)
