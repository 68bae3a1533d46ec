"""SSD on TPU: one fused kernel forward, one backward; scores and decays stay in VMEM.

The grid runs over (row, block of heads, chunk), chunks in order, the state of the block's heads in
scratch memory. The forward kernel writes y, the final state and, for the backward pass, the state
entering every chunk in x's dtype. The backward kernel walks from the last chunk to the first with
the gradient of the state in scratch and recomputes the scores; dB and dC come out per block of
heads in float32 and are summed outside. Equations: `xla` and arXiv 2405.21060, section 6.

HBM bytes for E = B T H P elements of 2 bytes: forward 4 E (+ 2 E N/Q entering states for the
gradient), backward 6 E + 2 E N/Q, and small terms in B, C and dt.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import dispatch
from ..compat import out_like
from ..time_axis import pad_time
from .prepare import cut

HEADS = 16  # heads per program, if the sizes allow; dB and dC partials shrink as it grows


def _dot(a, b, contract):
    """a . b over the axes `contract` = (of a, of b), float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def head_block(heads: int, groups: int, p: int, n: int) -> int:
    """Heads per program: at most `HEADS` if tiles and whole groups allow, else more."""
    per_group = heads // groups

    def fits(h):
        b_groups = max(1, h // per_group)
        return (
            heads % h == 0
            and (per_group % h == 0 or h % per_group == 0)
            and (h * p % 128 == 0 or h == heads)
            and (b_groups * n % 128 == 0 or b_groups == groups)
        )

    sizes = [h for h in range(1, heads + 1) if fits(h)]
    small = [h for h in sizes if h <= HEADS]
    return small[-1] if small else sizes[0]


class _Plan:
    """Sizes, operands in the kernels' layout, and block specs, for one call."""

    def __init__(self, x, dt, a, B, C, resets, chunk):
        batch, t_len, heads, p = x.shape
        groups, n = B.shape[2:]
        q = min(chunk, t_len)
        q += -q % 8
        hb = head_block(heads, groups, p, n)
        self.q, self.hb, self.p, self.n, self.dtype = q, hb, p, n, x.dtype
        self.per_group = min(hb, heads // groups)  # heads of one group in a block
        self.gb = hb // self.per_group  # groups in a block
        self.resets = resets is not None
        self.batch, self.t_len, self.blocks = batch, t_len, heads // hb
        self.chunks = -(-t_len // q)
        self.grid = (batch, self.blocks, self.chunks)
        self.share = heads // groups // self.per_group  # blocks that share a group
        flat = lambda v: pad_time(v.reshape(batch, t_len, -1), q)

        def rows(v):  # [B, blocks, chunks, hb, Q]
            v = cut(pad_time(v, q), q)
            return jnp.moveaxis(v, -1, 2).reshape(batch, self.chunks, -1, hb, q).swapaxes(1, 2)

        cs = jnp.cumsum(rows(a), axis=-1)
        self.flat = flat
        self.operands = [flat(x), flat(B), flat(C), rows(dt), cs]
        if self.resets:
            counts = jnp.cumsum(cut(pad_time(resets, q), q).astype(jnp.float32), axis=-1)
            self.operands.append(counts[:, :, None])

    def specs(self, reverse=False):
        """Block specs by kind; `reverse` walks from the last chunk to the first."""
        last = self.chunks - 1
        c = (lambda i: last - i) if reverse else (lambda i: i)
        hbp = self.hb * self.p
        share = self.share
        series = pl.BlockSpec((1, self.q, hbp), lambda b, h, i: (b, c(i), h))
        group = pl.BlockSpec((1, self.q, self.gb * self.n), lambda b, h, i: (b, c(i), h // share))
        row = pl.BlockSpec((1, 1, 1, self.hb, self.q), lambda b, h, i: (b, h, c(i), 0, 0))
        count = pl.BlockSpec((1, 1, 1, self.q), lambda b, h, i: (b, c(i), 0, 0))
        state = pl.BlockSpec((1, hbp, self.n), lambda b, h, i: (b, h, 0))
        states = pl.BlockSpec((1, 1, hbp, self.n), lambda b, h, i: (b, c(i), h, 0))
        part = pl.BlockSpec((1, 1, self.q, self.gb * self.n), lambda b, h, i: (b, h, c(i), 0))
        lane = pl.BlockSpec((1, hbp), lambda b, h, i: (0, h))
        skip = pl.BlockSpec((1, 1, hbp), lambda b, h, i: (b, 0, h))
        base = [series, group, group, row, row] + [count] * self.resets
        return dict(base=base, series=series, row=row, state=state, states=states, part=part,
                    lane=lane, skip=skip)  # fmt: skip

    def cost(self, scores, states, passes):
        """Estimate from the number of [Q, Q], of [P, N] products and of passes over x."""
        steps = self.batch * self.chunks * self.q * self.blocks * self.hb
        return pl.CostEstimate(
            flops=2 * steps * self.p * (scores * self.q + states * self.n),
            transcendentals=steps * self.q,
            bytes_accessed=passes * steps * self.p * self.dtype.itemsize,
        )


def _factors(refs, plan):
    """Decays of the block's heads from the kernel's operands: see `_decay` and its callers."""
    dt_row, cs_row = refs[3][0, 0, 0], refs[4][0, 0, 0]
    cs, dt = cs_row.T, dt_row.T  # [Q, hb]
    end = cs[-1:]
    into, out_of = jnp.exp(jnp.minimum(cs, 0)), jnp.exp(jnp.minimum(end - cs, 0))
    total = jnp.exp(jnp.minimum(end, 0))  # [1, hb]
    at = lax.broadcasted_iota(jnp.int32, (plan.q, plan.q), 0)
    from_ = lax.broadcasted_iota(jnp.int32, (plan.q, plan.q), 1)
    below = from_ < at
    if plan.resets:
        counts_row = refs[5][0, 0]  # [1, Q]
        counts = jnp.broadcast_to(counts_row, (8, plan.q)).T[:, :1]  # [Q, 1]
        into = jnp.where(counts == 0, into, 0)
        out_of = jnp.where(counts == counts[-1:], out_of, 0)
        total = jnp.where(counts[-1:] == 0, total, 0)
        below = below & (counts == counts_row)
    return dt_row, cs_row, cs, dt * out_of, into, out_of, total, below, from_ == at


def _decay(cs, cs_row, below, diagonal, h):
    """[Q, Q] exp(cs_l - cs_s) below the diagonal, exactly 1 on it."""
    exponent = jnp.minimum(cs[:, h : h + 1] - cs_row[h : h + 1], 0)
    return jnp.where(diagonal, 1.0, jnp.exp(jnp.where(below, exponent, -jnp.inf)))


def _spread(v, plan):
    """[Q or 1, hb] per head as [.., hb P], the value of each head on its lanes."""
    parts = [jnp.broadcast_to(v[:, h : h + 1], (v.shape[0], plan.p)) for h in range(plan.hb)]
    return parts[0] if plan.hb == 1 else jnp.concatenate(parts, axis=1)


def _down(v, plan):
    """[1, hb] per head as [hb P, 1]."""
    parts = [jnp.broadcast_to(v[:, h : h + 1], (plan.p, 1)) for h in range(plan.hb)]
    return parts[0] if plan.hb == 1 else jnp.concatenate(parts, axis=0)


def _group(plan, g):
    """Slices of the g-th group of a block: its N lanes of B and C, its lanes of x, its heads."""
    width = plan.per_group * plan.p
    heads = range(g * plan.per_group, (g + 1) * plan.per_group)
    return slice(g * plan.n, (g + 1) * plan.n), slice(g * width, (g + 1) * width), heads


def _forward_kernel(*refs, plan, has_d, has_state, keep, out_dtype):
    inputs, refs = refs[: 5 + plan.resets], list(refs[5 + plan.resets :])
    d_ref = refs.pop(0) if has_d else None
    first_ref = refs.pop(0) if has_state else None
    y_ref, final_ref = refs[:2]
    state = refs[-1]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = first_ref[0] if has_state else jnp.zeros_like(state)

    if keep:
        refs[2][0, 0] = state[...].astype(plan.dtype)
    x_ref, b_ref, c_ref = inputs[:3]
    dt_row, cs_row, cs, weight, into, _, total, below, diagonal = _factors(inputs, plan)
    x = x_ref[0]
    scaled = (x * _spread(weight, plan)).astype(plan.dtype)
    into, total = _spread(into, plan), _down(total, plan)
    for g in range(plan.gb):
        lanes, wide, heads = _group(plan, g)
        b, c = b_ref[0][:, lanes], c_ref[0][:, lanes]
        cb = _dot(c, b, (1, 1))
        old = state[wide]
        off = _dot(c, old.astype(plan.dtype), (1, 1)) * into[:, wide]
        for i, h in enumerate(heads):
            mine = slice(h * plan.p, (h + 1) * plan.p)
            scores = cb * _decay(cs, cs_row, below, diagonal, h) * dt_row[h : h + 1]
            y = _dot(scores.astype(plan.dtype), x[:, mine], (1, 0))
            y = y + off[:, i * plan.p : (i + 1) * plan.p]
            if has_d:
                y = y + d_ref[:, mine] * x[:, mine]
            y_ref[0, :, mine] = y.astype(out_dtype)
        state[wide] = total[wide] * old + _dot(scaled[:, wide], b, (0, 0))

    @pl.when(pl.program_id(2) == plan.chunks - 1)
    def _():
        final_ref[0] = state[...]


def _call_options():
    """Compiler parameters, or the interpreter (which counts the axes that vmap adds to a grid)."""
    interpret = dispatch.interpret("tpu")
    order = None if interpret else ("parallel", "parallel", "arbitrary")
    params = pltpu.CompilerParams(dimension_semantics=order)
    return {"interpret": interpret, "compiler_params": params}


def _forward(x, dt, a, B, C, D, state, resets, chunk, out_dtype, keep):
    """(y, final state, entering states [B, c, H P, N] in x's dtype or None)."""
    plan = _Plan(x, dt, a, B, C, resets, chunk)
    specs = plan.specs()
    batch, _, heads, p = x.shape
    operands, in_specs = plan.operands, specs["base"]
    if D is not None:
        operands, in_specs = [*operands, D.reshape(1, -1)], [*in_specs, specs["lane"]]
    if state is not None:
        operands = [*operands, state.reshape(batch, heads * p, plan.n)]
        in_specs = [*in_specs, specs["state"]]
    shapes = [
        out_like(x, operands[0].shape, out_dtype),
        out_like(x, (batch, heads * p, plan.n), jnp.float32),
    ]
    out_specs = [specs["series"], specs["state"]]
    if keep:
        shapes.append(out_like(x, (batch, plan.chunks, heads * p, plan.n), x.dtype))
        out_specs.append(specs["states"])
    y, final, *entering = pl.pallas_call(
        functools.partial(
            _forward_kernel, plan=plan, has_d=D is not None, has_state=state is not None,
            keep=keep, out_dtype=out_dtype,
        ),
        grid=plan.grid, in_specs=in_specs, out_specs=out_specs, out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((plan.hb * p, plan.n), jnp.float32)],
        cost_estimate=plan.cost(1, 2, 2), name="ssd_forward", **_call_options(),
    )(*operands)  # fmt: skip
    y = y[:, : plan.t_len].reshape(x.shape)
    return y, final.reshape(batch, heads, p, plan.n), entering[0] if keep else None


def _backward_kernel(*refs, plan, has_d):
    inputs, refs = refs[: 5 + plan.resets], list(refs[5 + plan.resets :])
    d_ref = refs.pop(0) if has_d else None
    dy_ref, entering_ref, dfinal_ref, dx_ref, ddt_ref, da_ref, db_ref, dc_ref, dfirst_ref = refs[:9]
    dd_ref, dstate = (refs[9] if has_d else None), refs[-1]
    first = pl.program_id(2) == 0  # of the walk: the last chunk

    @pl.when(first)
    def _():
        dstate[...] = dfinal_ref[0]

    q, p, dtype = plan.q, plan.p, plan.dtype
    x_ref, b_ref, c_ref = inputs[:3]
    dt_row, cs_row, cs, weight, into, out_of, total, below, diagonal = _factors(inputs, plan)
    x, dy = x_ref[0], dy_ref[0]
    wide_into, wide_weight = _spread(into, plan), _spread(weight, plan)
    scaled_x = (x * wide_weight).astype(dtype)
    scaled_dy = (dy * wide_into).astype(dtype)
    column = lax.broadcasted_iota(jnp.int32, (q, plan.hb), 1)
    row = lax.broadcasted_iota(jnp.int32, (plan.hb, q), 0)
    # Per head: sums over the other index of a pair, and what is read from or written to states.
    reads, written = jnp.zeros((q, plan.hb)), jnp.zeros((q, plan.hb))
    direct, pairs = jnp.zeros((plan.hb, q)), jnp.zeros((plan.hb, q))
    through = jnp.zeros((plan.hb, q))
    for g in range(plan.gb):
        lanes, wide, heads = _group(plan, g)
        b, c = b_ref[0][:, lanes], c_ref[0][:, lanes]
        cb = _dot(c, b, (1, 1))
        dcb = jnp.zeros((q, q))
        leaving, entering = dstate[wide], entering_ref[0, 0, wide]
        rounded = leaving.astype(dtype)
        carried = _dot(c, entering, (1, 1)) * wide_into[:, wide] * dy[:, wide]
        back = _dot(b, rounded, (1, 1))
        back_x = back * x[:, wide]
        crossing = leaving * entering
        for i, h in enumerate(heads):
            mine, local = slice(h * p, (h + 1) * p), slice(i * p, (i + 1) * p)
            step = dt_row[h : h + 1]
            decay = _decay(cs, cs_row, below, diagonal, h)
            scores = (cb * decay * step).astype(dtype)
            dm = _dot(dy[:, mine], x[:, mine], (1, 1)) * decay
            dcb += dm * step
            per_step = cb * dm
            pair = jnp.where(below, per_step * step, 0)
            read = jnp.sum(pair, axis=1, keepdims=True)
            read += jnp.sum(carried[:, local], axis=1, keepdims=True)
            wrote = jnp.sum(back_x[:, local], axis=1, keepdims=True)
            reads = jnp.where(column == h, read, reads)
            written = jnp.where(column == h, wrote, written)
            direct = jnp.where(row == h, jnp.sum(per_step, axis=0, keepdims=True), direct)
            pairs = jnp.where(row == h, jnp.sum(pair, axis=0, keepdims=True), pairs)
            through = jnp.where(row == h, jnp.sum(crossing[local], keepdims=True), through)
            dx = _dot(scores, dy[:, mine], (0, 0)) + wide_weight[:, mine] * back[:, local]
            if has_d:
                dx = dx + d_ref[:, mine] * dy[:, mine]
            dx_ref[0, :, mine] = dx.astype(dx_ref.dtype)
        dcb = dcb.astype(dtype)
        db_ref[0, 0, :, lanes] = _dot(dcb, c, (0, 0)) + _dot(scaled_x[:, wide], rounded, (1, 0))
        dc_ref[0, 0, :, lanes] = _dot(dcb, b, (1, 0)) + _dot(scaled_dy[:, wide], entering, (1, 0))
        dstate[wide] = _down(total, plan)[wide] * leaving + _dot(scaled_dy[:, wide], c, (0, 0))

    written = written * out_of
    ddt_ref[0, 0, 0] = direct + written.T
    at = lax.broadcasted_iota(jnp.int32, (q, q), 0)
    from_ = lax.broadcasted_iota(jnp.int32, (q, q), 1)
    # reads at l >= t, writes at s < t: sums by a triangle of ones.
    later = jnp.where(at >= from_, 1.0, 0.0)
    earlier = jnp.where(at < from_, 1.0, 0.0)
    ending = jnp.broadcast_to(total, (8, plan.hb)).T[:, :1]
    da_ref[0, 0, 0] = (
        _dot(reads.T - pairs, later, (1, 0))
        + _dot(dt_row * written.T, earlier, (1, 0))
        + through * ending
    )
    if has_d:
        dd = jnp.sum(dy.astype(jnp.float32) * x, axis=0, keepdims=True)
        dd_ref[0] = jnp.where(first, dd, dd_ref[0] + dd)

    @pl.when(pl.program_id(2) == plan.chunks - 1)
    def _():
        dfirst_ref[0] = dstate[...]


def _backward(operands, entering, dy, dfinal, chunk):
    x, dt, a, B, C, D, state, resets = operands
    plan = _Plan(x, dt, a, B, C, resets, chunk)
    specs = plan.specs(reverse=True)
    batch, t_len, heads, p = x.shape
    groups, n, rows = B.shape[2], plan.n, plan.operands[3].shape
    inputs, in_specs = plan.operands, specs["base"]
    if D is not None:
        inputs, in_specs = [*inputs, D.reshape(1, -1)], [*in_specs, specs["lane"]]
    inputs = [*inputs, plan.flat(dy.astype(x.dtype)), entering, dfinal.reshape(batch, heads * p, n)]
    in_specs = [*in_specs, specs["series"], specs["states"], specs["state"]]
    padded = plan.operands[0].shape[1]
    part = out_like(x, (batch, plan.blocks, padded, plan.gb * n), jnp.float32)
    shapes = [
        out_like(x, plan.operands[0].shape, x.dtype), out_like(x, rows, jnp.float32),
        out_like(x, rows, jnp.float32), part, part,
        out_like(x, (batch, heads * p, n), jnp.float32),
    ]  # fmt: skip
    kinds = ["series", "row", "row", "part", "part", "state"]
    if D is not None:
        shapes.append(out_like(x, (batch, 1, heads * p), jnp.float32))
        kinds.append("skip")
    dx, ddt, da, dB, dC, dfirst, *dD = pl.pallas_call(
        functools.partial(_backward_kernel, plan=plan, has_d=D is not None),
        grid=plan.grid, in_specs=in_specs, out_specs=[specs[k] for k in kinds], out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((plan.hb * p, n), jnp.float32)],
        cost_estimate=plan.cost(2, 5, 3), name="ssd_backward", **_call_options(),
    )(*inputs)  # fmt: skip
    by_chunk = lambda v: jnp.moveaxis(v, 2, 1).reshape(batch, plan.chunks, heads, plan.q)
    per_step = lambda v: by_chunk(v).swapaxes(2, 3).reshape(batch, -1, heads)[:, :t_len]

    def per_group(v, like):  # sum over the blocks that share a group
        v = v.reshape(batch, plan.blocks // plan.share, plan.share, padded, plan.gb, n).sum(2)
        return v.swapaxes(1, 2)[:, :t_len].reshape(batch, t_len, groups, n).astype(like.dtype)

    return (
        dx[:, :t_len].reshape(x.shape), per_step(ddt), per_step(da),
        per_group(dB, B), per_group(dC, C),
        None if D is None else dD[0].sum((0, 1)).reshape(D.shape),
        None if state is None else dfirst.reshape(state.shape),
        None,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _ssd(x, dt, a, B, C, D, state, resets, chunk, out_dtype):
    return _forward(x, dt, a, B, C, D, state, resets, chunk, out_dtype, keep=False)[:2]


def _ssd_fwd(*args):
    y, final, entering = _forward(*args, keep=True)
    return (y, final), (args[:8], entering)


def _ssd_bwd(chunk, out_dtype, residuals, cotangents):
    return _backward(*residuals, *cotangents, chunk)


_ssd.defvjp(_ssd_fwd, _ssd_bwd)


def ssd_pallas_tpu(x, dt, a, B, C, D, state, resets, *, chunk, out_dtype) -> tuple[Array, Array]:
    """See `prepare` for the arguments; chunks are rounded up to a multiple of 8 steps."""
    D = None if D is None else jnp.broadcast_to(D, x.shape[2:])
    return _ssd(x, dt, a, B, C, D, state, resets, chunk, out_dtype)
