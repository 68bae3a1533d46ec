"""SSD forward on Hopper GPUs: one kernel with warpgroup matrix products (Pallas Mosaic GPU).

A program owns one or two heads of a group and one segment of time; each head has a warpgroup of its
own, a further one brings the tiles of x, B, C and the step sizes through shared memory. Chunks of
64 steps, with the state S^T [N, P] of a head in registers, float32, as the accumulator of its own
update:

    scores = (C B^T) o L o dt    rounded to x's dtype, from registers
    y      = exp(cs) o (C S^T) + scores x + D x
    S^T    = exp(cs_Q) S^T + B^T (exp(cs_Q - cs) dt x)

Where rows and heads are too few to fill the chip, time is split into segments: a first pass makes
each segment's own last state (it reads x and B only), `pass_states` joins them, and the main pass
starts every segment from its true state.

HBM bytes for E = B T H P elements of 2 bytes: 4 E (6 E with segments), and 8 E/P for cs and dt;
multiply-adds per element: 64 + 64 N/P + 2 N. The gradient is that of `xla`; for it the kernel also
writes the states entering the chunks of the gradient, 2 E N/chunk bytes. Lowered for CUDA and run
in the interpreter; its speed is not measured.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import dispatch
from ..compat import gpu_kernel, out_like
from ..time_axis import pad_time
from .prepare import cut
from .xla import backward, entering_states, pass_states, values

Q = 64  # steps per chunk
STAGES = 2  # chunks in shared memory
PROGRAMS = 264  # two per multiprocessor; fewer programs than half of it are split along time
LOG2E = math.log2(math.e)


def check_sizes(x: Array, n: int) -> None:
    """Raises ValueError for what the kernel cannot compute."""
    p = x.shape[-1]
    if x.dtype != jnp.bfloat16:
        raise ValueError(f"pallas_gpu: x is {x.dtype}; it must be bfloat16 (or use xla)")
    if p % 64 or n % 64 or p * n > 8192:
        raise ValueError(
            f"pallas_gpu: head width P={p} and state size N={n} must be multiples of 64 with "
            f"P N <= 8192 (or use xla)"
        )


def segments(batch: int, heads: int, chunks: int) -> int:
    """Segments of time: 1 unless rows and pairs of heads leave half of the chip without work."""
    programs = batch * -(-heads // 2)
    if programs > PROGRAMS // 4:
        return 1
    return max(1, min(PROGRAMS // programs, chunks // 8))


def _tiled(*shape, dtype):
    """Shared memory in the layout that warpgroup products read."""
    lanes = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


_TILE = plgpu.Layout.WGMMA
_ROW, _COLUMN = _TILE.reduce(0), _TILE.reduce(1)  # indexed by column, by row of a tile


def _load(ref, layout):
    return plgpu.layout_cast(ref[...], layout)


def _across(v, shape):
    """A value per row, along the rows of a tile."""
    return lax.broadcast_in_dim(v, shape, (0,))


def _down(v, shape):
    """A value per column, down the columns of a tile."""
    return lax.broadcast_in_dim(v, shape, (1,))


def _parts(v):
    """Three bfloat16 arrays, stacked before the last two axes, whose sum is the float32 v."""
    parts = []
    for _ in range(3):
        part = lax.reduce_precision(v, 8, 7)  # astype and back would be simplified away
        parts.append(part.astype(jnp.bfloat16))
        v = v - part
    return jnp.stack(parts, axis=-3)


def _product(acc, a, b, interpret):
    """acc + a b, of registers; a in registers or shared memory, b in shared memory."""
    if interpret:  # no accumulators with a value and no operands in registers there
        values = (v if isinstance(v, jax.Array) else v[...] for v in (a, b))
        return acc + jnp.dot(*values, preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))


def _compute(
    refs, smem, barriers, where, *, tiles, wgs, has_d, has_state, has_counts, summary, every
):
    """One warpgroup: all chunks of one head and one segment."""
    interpret = bool(dispatch.interpret("gpu"))
    rest = list(refs[4:])
    counts = rest.pop(0) if has_counts else None  # noqa: F841 (comes through shared memory)
    d_ref = rest.pop(0) if has_d else None
    first_ref = rest.pop(0) if has_state else None
    y_ref = None if summary else rest.pop(0)
    states_ref = rest.pop(0) if every else None
    final_ref = rest.pop(0)
    full, empty, once = barriers
    b, seg, pair, wg = where
    head = pair * wgs + wg
    p, n = smem["x"].shape[-1], smem["b"].shape[-1]
    dtype = smem["x"].dtype

    def fetch(src, dst, layout):
        plgpu.copy_gmem_to_smem(src, dst, once.at[wg])
        plgpu.barrier_wait(once.at[wg])
        return _load(dst, layout)

    skip = fetch(d_ref.at[head], smem["d"].at[wg], _ROW) if has_d else None
    state = plgpu.layout_cast(jnp.zeros((n, p), jnp.float32), _TILE)
    for part in range(3 * has_state):
        source = first_ref.at[b, seg, head, part]
        state = state + fetch(source, smem["state"].at[wg], _TILE).astype(jnp.float32)

    def chunk(i, state):
        slot = lax.rem(i, STAGES)
        plgpu.barrier_wait(full.at[slot])
        x_s, b_s = smem["x"].at[slot, wg], smem["b"].at[slot]
        vec = smem["vec"].at[slot, wg]
        cs, dt = _load(vec.at[0], _COLUMN), _load(vec.at[1], _COLUMN)
        end = vec[0, Q - 1]
        total, weight = jnp.exp2(end), dt * jnp.exp2(jnp.minimum(end - cs, 0))
        if has_counts:
            n_at, n_end = _load(smem["counts"].at[slot], _COLUMN), smem["counts"][slot, Q - 1]
            total = jnp.where(n_end == 0, total, 0.0)
            weight = jnp.where(n_at == n_end, weight, 0.0)
        scaled = smem["scaled"].at[wg]
        x = _load(x_s, _TILE).astype(jnp.float32)
        scaled[...] = (x * _across(weight, (Q, p))).astype(dtype)
        if not summary:
            smem["state"].at[wg][...] = state.astype(dtype)
        plgpu.commit_smem()
        at_tile = seg * tiles + i
        if every:

            @pl.when(lax.rem(at_tile, every) == 0)
            def _():
                there = states_ref.at[b, lax.div(at_tile, every), head]
                plgpu.copy_smem_to_gmem(smem["state"].at[wg], there)

        if not summary:
            c_s = smem["c"].at[slot]

            def products(cb, off):
                plgpu.wgmma(cb, c_s, b_s.transpose((1, 0)))
                plgpu.wgmma(off, c_s, smem["state"].at[wg])
                return cb[...], off[...]

            cb, y = pl.run_scoped(
                products, plgpu.ACC((Q, Q), jnp.float32), plgpu.ACC((Q, p), jnp.float32)
            )
            from_, steps = _load(vec.at[0], _ROW), _load(vec.at[1], _ROW)
            at = plgpu.broadcasted_iota(jnp.int32, (Q, Q), 0, layout=_TILE)
            before = plgpu.broadcasted_iota(jnp.int32, (Q, Q), 1, layout=_TILE) <= at
            into = jnp.exp2(cs)
            exponent = jnp.minimum(_across(cs, (Q, Q)) - _down(from_, (Q, Q)), 0)
            decay = jnp.where(before, jnp.exp2(jnp.where(before, exponent, -jnp.inf)), 0.0)
            if has_counts:
                n_from = _load(smem["counts"].at[slot], _ROW)
                same = _across(n_at, (Q, Q)) == _down(n_from, (Q, Q))
                decay = jnp.where(same, decay, 0.0)
                into = jnp.where(n_at == 0, into, 0.0)
            scores = (cb * decay * _down(steps, (Q, Q))).astype(dtype)
            y = y * _across(into, (Q, p))
            if has_d:  # x once more from shared memory: registers are scarce
                y = y + _load(x_s, _TILE).astype(jnp.float32) * _down(skip, (Q, p))
            y = _product(y, scores, x_s, interpret)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the last y and of this state
            y_s = smem["y"].at[wg]
            y_s[...] = y.astype(y_s.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_s, y_ref.at[b, pl.ds(at_tile * Q, Q), head])
        state = _product(state * total, b_s.transpose((1, 0)), scaled, interpret)
        plgpu.barrier_arrive(empty.at[slot])
        return state

    state = lax.fori_loop(0, tiles, chunk, state)
    final_ref.at[b, seg, head][...] = state
    plgpu.wait_smem_to_gmem(0)


def _bring(refs, smem, barriers, where, *, tiles, wgs, per_group, has_counts, summary):
    """The warpgroup that copies tiles to shared memory."""
    x_ref, b_ref, c_ref, vec_ref = refs[:4]
    full, empty, _ = barriers
    b, seg, pair, _ = where
    group = lax.div(pair * wgs, per_group)

    def copy(i):
        slot = lax.rem(i, STAGES)
        rows = pl.ds((seg * tiles + i) * Q, Q)
        send = lambda src, dst: plgpu.copy_gmem_to_smem(src, dst, full.at[slot])
        send(b_ref.at[b, rows, group], smem["b"].at[slot])
        if not summary:
            send(c_ref.at[b, rows, group], smem["c"].at[slot])
        for wg in range(wgs):
            head = pair * wgs + wg
            send(x_ref.at[b, rows, head], smem["x"].at[slot, wg])
            send(vec_ref.at[b, seg * tiles + i, head], smem["vec"].at[slot, wg])
        if has_counts:
            send(refs[4].at[b, seg * tiles + i], smem["counts"].at[slot])

    for i in range(min(STAGES, tiles)):
        copy(jnp.int32(i))

    @pl.loop(STAGES, max(STAGES, tiles))
    def _(i):
        plgpu.barrier_wait(empty.at[lax.rem(i, STAGES)])
        copy(i)


def _call(x, B, C, vec, counts, D, first, *, split, summary, out_dtype, every=0):
    """(y [B, T, H, P], states entering every `every`-th chunk [B, c, H, N, P], states after every
    segment [B, split, H, N, P]); only the last if `summary`, the second only if `every`.
    """
    batch, t_len, heads, p = x.shape
    groups, n = B.shape[2:]
    per_group = heads // groups
    # Two heads of P = 128 with a float32 y would take more shared memory than there is.
    wgs = 2 if per_group % 2 == 0 and p * jnp.dtype(out_dtype).itemsize <= 256 else 1
    tiles = t_len // Q // split
    flags = dict(tiles=tiles, wgs=wgs, has_counts=counts is not None, summary=summary)

    def body(*refs):
        where = [lax.axis_index(name) for name in ("rows", "segments", "heads", "wg")]
        scratch = {
            "x": _tiled(STAGES, wgs, Q, p, dtype=x.dtype),
            "b": _tiled(STAGES, Q, n, dtype=x.dtype),
            "scaled": _tiled(wgs, Q, p, dtype=x.dtype),
            "vec": plgpu.SMEM((STAGES, wgs, 2, Q), jnp.float32),
        }
        if counts is not None:
            scratch["counts"] = plgpu.SMEM((STAGES, Q), jnp.float32)
        if not summary:
            scratch["c"] = _tiled(STAGES, Q, n, dtype=x.dtype)
            scratch["state"] = _tiled(wgs, n, p, dtype=x.dtype)
            scratch["y"] = _tiled(wgs, Q, p, dtype=out_dtype)
        if D is not None:
            scratch["d"] = plgpu.SMEM((wgs, p), jnp.float32)
        arrivals = 1 + (not summary) + 2 * wgs + (counts is not None)
        barriers = (
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=STAGES),
            plgpu.Barrier(num_barriers=wgs),
        )

        def scoped(smem, barriers):
            @pl.when(where[-1] < wgs)
            def _():
                plgpu.set_max_registers(232, action="increase")
                _compute(refs, smem, barriers, where, has_d=D is not None, every=every,
                         has_state=first is not None, **flags)  # fmt: skip

            @pl.when(where[-1] == wgs)
            def _():
                plgpu.set_max_registers(40, action="decrease")
                _bring(refs, smem, barriers, where, per_group=per_group, **flags)

        pl.run_scoped(scoped, scratch, barriers, collective_axes="wg")

    parts = None if first is None else _parts(first)
    operands = [v for v in (x, B, C, vec, counts, D, parts) if v is not None]
    out_type = [out_like(x, (batch, split, heads, n, p), jnp.float32)]
    if every:
        kept = -(-tiles * split // every)
        out_type.insert(0, out_like(x, (batch, kept, heads, n, p), x.dtype))
    if not summary:
        out_type.insert(0, out_like(x, x.shape, out_dtype))
    steps = batch * t_len * heads
    cost = pl.CostEstimate(
        flops=2 * steps * p * (n if summary else Q + Q * n // p + 2 * n),
        transcendentals=steps * Q * (not summary),
        bytes_accessed=steps * p * (2 if summary else 4),
    )
    return gpu_kernel(
        body, out_type=out_type, grid=(heads // wgs, split, batch),
        grid_names=("heads", "segments", "rows"), num_threads=wgs + 1, thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True), cost_estimate=cost,
        interpret=dispatch.interpret("gpu"),
    )(*operands)  # fmt: skip


def _forward(x, dt, a, B, C, D, state, resets, out_dtype, every=0):
    """(y, final state, states entering every `every`-th chunk [B, c, H, N, P] or None)."""
    check_sizes(x, B.shape[-1])
    batch, t_len, heads, p = x.shape
    split = segments(batch, heads, -(-t_len // Q))
    pad = lambda v: pad_time(v, Q * split)
    by_chunk = lambda v: jnp.moveaxis(cut(pad(v), Q), 2, 3)  # [B, c, H, Q]
    cs = jnp.cumsum(by_chunk(a), axis=-1)
    vec = jnp.stack([cs * LOG2E, by_chunk(dt)], axis=3)
    counts = None
    if resets is not None:
        counts = jnp.cumsum(cut(pad(resets), Q).astype(jnp.float32), axis=-1)
    x_, B_, C_ = (pad(v) for v in (x, B, C))
    call = functools.partial(_call, x_, B_, C_, vec, counts, split=split, out_dtype=out_dtype)
    first = None if state is None else state.swapaxes(2, 3)[:, None]
    if split > 1:
        (own,) = call(None, None, summary=True)
        by_segment = lambda v: v.reshape(batch, split, -1, *v.shape[2:])
        log_total = jnp.sum(by_segment(cs[..., -1]), axis=2)[..., None]
        closed = None
        if resets is not None:
            closed = jnp.any(by_segment(counts[..., -1]) > 0, axis=2)
        start = None if state is None else first[:, 0][:, :, None]
        entering, _ = pass_states(log_total, closed, own[:, :, :, None], start)
        first = entering[:, :, :, 0]
    y, *states, final = call(D, first, summary=False, every=every)
    return y[:, :t_len], final[:, -1].swapaxes(2, 3), states[0] if every else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _ssd(x, dt, a, B, C, D, state, resets, chunk, out_dtype):
    return _forward(x, dt, a, B, C, D, state, resets, out_dtype)[:2]


def _ssd_fwd(*args):
    operands, chunk = values(args[:8]), args[8]
    x, B, state = operands[0], operands[3], operands[6]
    t_len = x.shape[1]
    if chunk % Q or (t_len <= chunk and state is None):  # the gradient makes its own, or needs none
        return _ssd(*operands, *args[8:]), (operands, entering_states(operands, chunk))
    y, final, states = _forward(*operands, args[9], every=chunk // Q)
    states = states[:, : -(-t_len // chunk)]
    by_group = states.reshape(*states.shape[:2], B.shape[2], -1, *states.shape[3:])
    return (y, final), (operands, by_group.swapaxes(-1, -2))


def _ssd_bwd(chunk, out_dtype, residuals, cotangents):
    return (*backward(*residuals, *cotangents, chunk), None)


_ssd.defvjp(_ssd_fwd, _ssd_bwd, symbolic_zeros=True)


def ssd_pallas_gpu(x, dt, a, B, C, D, state, resets, *, chunk, out_dtype) -> tuple[Array, Array]:
    """See `prepare` for the arguments. The kernel's chunks are 64 steps; `chunk` is that of the
    gradient.

    Raises:
        ValueError: x is not bfloat16, or P and N are not multiples of 64 with P N <= 8192.
    """
    return _ssd(x, dt, a, B, C, D, state, resets, chunk, out_dtype)
