"""SSD's gradient on Hopper GPUs, chunk by chunk: one kernel of warpgroup matrix products.

The states S entering the chunks come from the forward pass, the gradients dH of the states leaving
them from a walk backwards in time (`pallas_gpu`); all chunks are then independent. A program takes
one chunk of 64 steps of one row and a block of heads of one group. One warpgroup brings x, dy, S,
dH of a head through shared memory; two compute from the same tiles, one by written step s, one by
reading step l, so that every first operand is in registers and nothing crosses between them. With
L_ls = exp(cs_l - cs_s) for s <= l, w_s = dt_s exp(cs_Q - cs_s), e_l = exp(cs_l), G = L o dM:

    writer  [s, l]                                   reader  [l, s]
    CB^T = B C^T,  dM^T = x dy^T                     CB = C B^T,  dM = dy x^T
    dx  = (CB o L o dt)^T dy + w o (B dH) + D dy     dC += (G o dt) B + (e o dy) S^T
    dB += (G o dt)^T C + (w o x) dH^T                read = sum_{s<l} CB o G dt
    pairs = sum_l CB o G, with and without l = s            + e o sum_p dy o (C S)
    written = exp(cs_Q - cs) sum_p x o (B dH)        inner = sum_p S o dH

dB and dC of a block of heads stay in registers as float32 accumulators; XLA adds the blocks. Pairs
are counted without the diagonal, so what cancels in the gradient of a is the same sum in another
order. From the sums per step XLA makes what runs along time, and dD (a D per channel: from x, dy).

Products take operands in x's dtype and accumulate in float32; dM is never rounded. HBM bytes for
E = B T H P elements of 2 bytes: 6 E (x, dy, dx) and 4 E N/64 (S, dH), 14 E at N = 128; dB and dC
of a block of all H heads, written and read, 16 E N/(H P). The walk before it reads 2 E (4 E with
segments) and writes 2 E N/64; a dD per
channel reads 4 E. Multiply-adds per element: 3 x 64 + 4 x 64 N/P + 4 N.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import dispatch
from ..compat import gpu_kernel, out_like
from .gpu_tiles import (
    COLUMN,
    ROW,
    Q,
    across,
    down,
    load,
    load_wide,
    positions,
    products,
    tiled,
    zeros,
)

STAGES = 3  # heads in shared memory
SHARED = 220 * 1024  # bytes of shared memory for the stages and what is kept
PROCESSORS = 132  # multiprocessors; a program fills one

PAIRS, OFF_DIAGONAL, WRITTEN, READ, SKIP = range(5)  # sums per step that leave the kernel


def block_of_heads(per_group: int, programs: int) -> int:
    """Heads of a group per program, given the programs if a group is one block.

    Least time for whole waves of programs, one program costing one head more than it has.
    """
    cost = lambda heads: -(-programs * (per_group // heads) // PROCESSORS) * (heads + 1)
    return min((h for h in range(1, per_group + 1) if per_group % h == 0), key=cost)


def _decay(cs_row, cs_column, counts, slot, later):
    """(exp of cs_later - cs_earlier, 1 on and 0 beyond the diagonal; where it is off it).

    `later` says that rows are the later steps.
    """
    shape = (Q, Q)
    row, column = positions()
    within, off = (column <= row, column < row) if later else (row <= column, row < column)
    if counts is not None:
        within = within & (across(load(counts, COLUMN), shape) == down(load(counts, ROW), shape))
    difference = across(cs_row, shape) - down(cs_column, shape)
    exponent = jnp.minimum(difference if later else -difference, 0)
    return jnp.exp2(jnp.where(within, exponent, -jnp.inf)), off


def _pairs(acc, scaled, state, smem, slot, later, interpret):
    """(acc + scaled state^T, L, dM, CB, where off the diagonal, dt as a tile) for one head."""
    own, far = (("c", "dy"), ("b", "x")) if later else (("b", "x"), ("c", "dy"))
    vec, counts = smem["vec"].at[slot], smem.get("counts")
    cb, dm, acc = products(
        interpret,
        (zeros(Q, Q), (smem[own[0]], smem[far[0]].transpose((1, 0)))),
        (zeros(Q, Q), (smem[own[1]].at[slot], smem[far[1]].at[slot].transpose((1, 0)))),
        (acc, (scaled, state.transpose((1, 0)))),
    )
    decay, off = _decay(load(vec.at[0], COLUMN), load(vec.at[0], ROW), counts, slot, later)
    step = down(load(vec.at[1], ROW), (Q, Q)) if later else across(load(vec.at[1], COLUMN), (Q, Q))
    return acc, decay, dm, cb, off, step


def _read(out, smem, slot, at, dc, *, interpret):
    """The reader's part of one head: dC so far, with it."""
    scalars_ref, inner_ref, skip = out
    b, chunk, head = at
    dy, s, dh, vec = (smem[k].at[slot] for k in ("dy", "s", "dh", "vec"))
    dtype, p = smem["dy"].dtype, smem["dy"].shape[-1]
    into = jnp.exp2(load(vec.at[0], COLUMN))
    if "counts" in smem:
        into = jnp.where(load(smem["counts"], COLUMN) == 0, into, 0.0)
    scaled = lambda: (load_wide(dy) * across(into, (Q, p))).astype(dtype)
    dc, decay, dm, cb, off, step = _pairs(dc, scaled, s, smem, slot, True, interpret)
    if skip:
        row, column = positions()
        on_diagonal = jnp.sum(jnp.where(row == column, dm, 0.0), axis=1)
        scalars_ref.at[b, chunk, head, SKIP][...] = on_diagonal
    g = dm * decay * step
    read = jnp.sum(jnp.where(off, cb * g, 0.0), axis=1)
    carried, dc = products(
        interpret, (zeros(Q, p), (smem["c"], s)), (dc, (g.astype(dtype), smem["b"]))
    )
    scalars_ref.at[b, chunk, head, READ][...] = read + into * jnp.sum(
        load_wide(dy) * carried, axis=1
    )
    inner_ref.at[b, chunk, head][...] = jnp.sum(load_wide(s) * load_wide(dh), axis=1)
    return dc


def _write(out, smem, slot, at, db, *, interpret):
    """The writer's part of one head: dB so far, with it."""
    dx_ref, scalars_ref = out
    b, chunk, head = at
    scalar = lambda i: scalars_ref.at[b, chunk, head, i]
    x, dy, dh, vec = (smem[k].at[slot] for k in ("x", "dy", "dh", "vec"))
    dtype, p = smem["x"].dtype, smem["x"].shape[-1]
    dt = load(vec.at[1], COLUMN)
    out_of = jnp.exp2(jnp.minimum(smem["vec"][slot, 0, Q - 1] - load(vec.at[0], COLUMN), 0))
    if "counts" in smem:
        end = smem["counts"][Q - 1]
        out_of = jnp.where(load(smem["counts"], COLUMN) == end, out_of, 0.0)
    scaled = lambda: (load_wide(x) * across(dt * out_of, (Q, p))).astype(dtype)
    db, decay, dm, cb, off, step = _pairs(db, scaled, dh, smem, slot, False, interpret)
    scores = cb * decay
    pairs = scores * dm
    scores = (scores * step).astype(dtype)
    g = (dm * decay * step).astype(dtype)
    scalar(PAIRS)[...] = jnp.sum(pairs, axis=1)
    scalar(OFF_DIAGONAL)[...] = jnp.sum(jnp.where(off, pairs, 0.0), axis=1)
    dx, back, db = products(
        interpret,
        (zeros(Q, p), (scores, dy)),
        (zeros(Q, p), (smem["b"], dh)),
        (db, (g, smem["c"])),
    )
    scalar(WRITTEN)[...] = out_of * jnp.sum(load_wide(x) * back, axis=1)
    dx = dx + across(dt * out_of, (Q, p)) * back
    if "d" in smem:
        dx = dx + load_wide(dy) * down(load(smem["d"].at[slot], ROW), (Q, p))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the last head's
    smem["dx"][...] = dx.astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem["dx"], dx_ref.at[b, pl.ds(chunk * Q, Q), head])
    return db


def _bring(refs, smem, barriers, where, *, heads, stages):
    """The warpgroup that copies tiles to shared memory."""
    x_ref, dy_ref, b_ref, c_ref, s_ref, dh_ref, vec_ref, *rest = refs
    full, empty, once = barriers
    b, chunk, first, group = where
    rows = pl.ds(chunk * Q, Q)
    plgpu.copy_gmem_to_smem(b_ref.at[b, rows, group], smem["b"], once)
    plgpu.copy_gmem_to_smem(c_ref.at[b, rows, group], smem["c"], once)
    if "counts" in smem:
        plgpu.copy_gmem_to_smem(rest.pop(0).at[b, chunk], smem["counts"], once)

    def copy(i):
        slot, head = lax.rem(i, stages), first + i
        send = lambda src, dst: plgpu.copy_gmem_to_smem(src, smem[dst].at[slot], full.at[slot])
        send(x_ref.at[b, rows, head], "x")
        send(dy_ref.at[b, rows, head], "dy")
        send(vec_ref.at[b, chunk, head], "vec")
        send(s_ref.at[b, chunk, head], "s")
        send(dh_ref.at[b, chunk, head], "dh")
        if "d" in smem:
            send(rest[0].at[head], "d")

    for i in range(min(stages, heads)):
        copy(jnp.int32(i))

    @pl.loop(stages, max(stages, heads))
    def _(i):
        plgpu.barrier_wait(empty.at[lax.rem(i, stages)])
        copy(i)


def _call(x, dy, B, C, states, leaving, vec, counts, D, chunks):
    """(dx [B, T, H, P], sums per step [B, c, H, 4 or 5, Q], inner [B, c, H, N], dB, dC
    [B, blocks, T, G, N]) of the first `chunks` chunks; all but dx float32.
    """
    batch, _, heads, p = x.shape
    skip = D is not None and D.shape[1] == 1
    D = None if D is None else jnp.broadcast_to(D, (heads, p))
    groups, n = B.shape[2:]
    block = block_of_heads(heads // groups, batch * chunks * groups)
    blocks = heads // groups // block
    stage = 2 * (2 * Q * p + 2 * n * p) + 4 * (2 * Q + p)
    stages = min(STAGES, block, (SHARED - 2 * Q * (2 * n + p)) // stage)

    def body(*refs):
        ins, (dx_ref, scalars_ref, inner_ref, db_ref, dc_ref) = refs[:-5], refs[-5:]
        b, chunk, program, wg = (lax.axis_index(v) for v in ("rows", "chunks", "heads", "wg"))
        group, part = lax.div(program, blocks), lax.rem(program, blocks)
        scratch = {
            "x": tiled(stages, Q, p, dtype=x.dtype),
            "dy": tiled(stages, Q, p, dtype=x.dtype),
            "s": tiled(stages, n, p, dtype=x.dtype),
            "dh": tiled(stages, n, p, dtype=x.dtype),
            "vec": plgpu.SMEM((stages, 2, Q), jnp.float32),
            "b": tiled(Q, n, dtype=x.dtype),
            "c": tiled(Q, n, dtype=x.dtype),
            "dx": tiled(Q, p, dtype=x.dtype),
        }
        if counts is not None:
            scratch["counts"] = plgpu.SMEM((Q,), jnp.float32)
        if D is not None:
            scratch["d"] = plgpu.SMEM((stages, p), jnp.float32)
        barriers = (
            plgpu.Barrier(num_arrivals=5 + (D is not None), num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2 + (counts is not None)),
        )

        def heads_of(part_of_head, out, ref, smem, barriers):
            plgpu.set_max_registers(240, action="increase")
            full, empty, once = barriers
            plgpu.barrier_wait(once)

            def one(i, acc):
                slot = lax.rem(i, stages)
                plgpu.barrier_wait(full.at[slot])
                at = (b, chunk, program * block + i)
                interpret = bool(dispatch.interpret("gpu"))
                acc = part_of_head(out, smem, slot, at, acc, interpret=interpret)
                plgpu.barrier_arrive(empty.at[slot])
                return acc

            acc = lax.fori_loop(0, block, one, zeros(Q, n))
            ref.at[b, part, pl.ds(chunk * Q, Q), group][...] = acc
            plgpu.wait_smem_to_gmem(0)

        def scoped(smem, barriers):
            @pl.when(wg == 0)
            def _():
                heads_of(_write, (dx_ref, scalars_ref), db_ref, smem, barriers)

            @pl.when(wg == 1)
            def _():
                heads_of(_read, (scalars_ref, inner_ref, skip), dc_ref, smem, barriers)

            @pl.when(wg == 2)
            def _():
                plgpu.set_max_registers(24, action="decrease")
                where = (b, chunk, program * block, group)
                _bring(ins, smem, barriers, where, heads=block, stages=stages)

        pl.run_scoped(scoped, scratch, barriers, collective_axes="wg")

    operands = (x, dy, B, C, states, leaving, vec, counts, D)
    operands = [v for v in operands if v is not None]
    wide = lambda *shape: out_like(x, shape, jnp.float32)
    partial = wide(batch, blocks, chunks * Q, groups, n)
    steps = batch * chunks * Q * heads
    cost = pl.CostEstimate(
        flops=2 * steps * (p * (3 * Q + 4 * n) + 4 * Q * n),
        transcendentals=2 * steps * Q,
        bytes_accessed=2 * steps * p * (3 + 2 * n // Q),
    )
    return gpu_kernel(
        body,
        out_type=[
            out_like(x, (batch, chunks * Q, heads, p), x.dtype),
            wide(batch, chunks, heads, SKIP + skip, Q),
            wide(batch, chunks, heads, n),
            partial,
            partial,
        ],
        grid=(heads // block, chunks, batch), grid_names=("heads", "chunks", "rows"),
        num_threads=3, thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        cost_estimate=cost,
        interpret=dispatch.interpret("gpu"),
    )(*operands)  # fmt: skip


def gradients(x, B, C, D, dy, cs, vec, counts, states, leaving, t_len) -> tuple[Array | None, ...]:
    """Gradients (dx, ddt, da, dB, dC, dD), given S and dH at the chunks [B, c, H, N, P].

    x, dy [B, T, H, P], B, C [B, T, G, N], padded to whole chunks, cs [B, c, H, Q], vec
    [B, c, H, 2, Q] (cs in bits, dt), counts [B, c, Q] of resets or None; dB and dC in the dtype of
    B, ddt and da [B, T, H] float32. `t_len` steps are computed.
    """
    chunks = -(-t_len // Q)
    dx, scalars, inner, dB, dC = _call(x, dy, B, C, states, leaving, vec, counts, D, chunks)
    back_in_time = lambda v: jnp.moveaxis(v, 2, 3).reshape(v.shape[0], -1, v.shape[2])[:, :t_len]
    pairs, off_diagonal, written, read = (scalars[:, :, :, i] for i in range(4))
    dt = vec[:, :chunks, :, 1]
    through = jnp.exp(jnp.minimum(cs[:, :chunks, :, -1], 0)) * jnp.sum(inner, axis=-1)
    if counts is not None:
        through = jnp.where(counts[:, :chunks, None, -1] > 0, 0, through)
    before = jnp.pad((dt * written)[..., :-1], [(0, 0)] * 3 + [(1, 0)])
    da = through[..., None] + jnp.cumsum(before, axis=-1)
    da = da + lax.cumsum(read - dt * off_diagonal, axis=3, reverse=True)
    dB, dC = (jnp.sum(v, axis=1)[:, :t_len].astype(B.dtype) for v in (dB, dC))
    dD = None
    if D is not None and D.shape[1] == 1:
        dD = jnp.sum(scalars[:, :, :, SKIP], axis=(0, 1, 3))[:, None]
    elif D is not None:
        dD = jnp.sum(dy.astype(jnp.float32) * x, axis=(0, 1))
    return dx[:, :t_len], back_in_time(pairs + written), back_in_time(da), dB, dC, dD
