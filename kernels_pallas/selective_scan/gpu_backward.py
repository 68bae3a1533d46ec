"""The backward kernel of the selective scan on Hopper GPUs; layouts as in gpu_kernels.py.

A program walks the tiles against the recurrence. Of each tile it computes the states again from the
one that the forward pass saved: once to keep every fourth in shared memory, once more four steps at
a time, whose states and decays then sit in registers while the gradient passes over them:

    g_t   = gy_t C_t + decay_{t+1} g_{t+1}        s_t = decay_t g_t       p_t = s_t h_{t-1}
    dC_t  = sum_d gy_t h_t                        dB_t = sum_d g_t dt_t u_t
    du_t  = dt_t sum_n g_t B_t + D gy_t           ddt_t = u_t sum_n g_t B_t + sum_n p_t A
    dA    = sum_t p_t dt_t

Sums over n go through shared memory as the forward pass's do; sums over the program's channels are
made within a warp, by shuffles, and XLA adds the programs' parts. Nothing is added atomically.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .fused import LOG2E, sigmoid_short
from .gpu_kernels import SUB, TILE, WARPS, Layouts, _call, _cost, _steps

BLOCKS = TILE // SUB


def walk_back(static, v, u, delta, z, a, b, c, skip, bias, keep, saved, d_out, d_last):
    """Gradients; arguments as for `gpu_kernels.walk`, `saved` and `d_last` like its results.

    Returns:
        dict of "d_u", "d_delta", "d_z" [R, T, D]; "d_a", "d_start" [R, 4, J, D]; "d_b", "d_c"
        [R, blocks of channels, T, 4, J]; "d_skip", "d_bias" [R, 4, D] (sums of every fourth step).
    """
    use_softplus, reverse = static
    lay = Layouts(a.shape[1], v)
    (rows, t_len, width), tiles = u.shape, u.shape[1] // TILE
    blocks = width // lay.channels
    per_group = blocks // b.shape[1]
    down = not reverse
    streams = {"u": u, "delta": delta, "d_out": d_out, "b": b, "c": c, "saved": saved}
    streams |= {k: x for k, x in (("z", z), ("keep", keep)) if x is not None}
    weights = {"a": a, "skip": skip, "bias": bias, "d_last": d_last}
    moving = {"d_u": u, "d_delta": delta} | ({} if z is None else {"d_z": z})
    parts = ((rows, blocks, t_len, *a.shape[:2]), a.dtype)
    outputs = {k: (x.shape, x.dtype) for k, x in moving.items()} | {"d_b": parts, "d_c": parts}
    outputs |= dict.fromkeys(("d_a", "d_start"), ((rows, *a.shape), a.dtype))
    outputs |= dict.fromkeys(("d_skip", "d_bias"), ((rows, WARPS, width), a.dtype))
    tile = dict.fromkeys(("u", "delta", "d_out", "z"), (TILE, lay.channels))
    tile |= dict.fromkeys(("b", "c"), (TILE, *a.shape[:2]))
    tile |= {"keep": (TILE, 4)}
    scratch = {f"{k}_s": plgpu.SMEM(tile[k], x.dtype) for k, x in streams.items() if k in tile}
    scratch |= {k: plgpu.SMEM((TILE, lay.channels), jnp.float32) for k in ("dt", "x", "gy")}
    scratch |= {"before": plgpu.SMEM((BLOCKS, *lay.shape), jnp.float32)}  # states before blocks
    kinds = 2 if z is None else 3  # sums over n: g B, p A, C h
    scratch |= {"shares": plgpu.SMEM((kinds, SUB, WARPS, lay.channels), jnp.float32)}
    scratch |= {f"{k}_s": plgpu.SMEM((TILE, *a.shape[:2]), jnp.float32) for k in ("d_b", "d_c")}
    scratch |= {"full": plgpu.Barrier(num_arrivals=len(streams))}
    scratch |= {"one": plgpu.Barrier(num_arrivals=1)}

    def body(dt, x, gy, before, shares, full, one, **refs):
        r, d = lax.axis_index("r"), lax.axis_index("d")
        lane = pl.ds(d * lay.channels, lay.channels)
        group = lax.div(d, per_group)
        smem = lambda name: before.at[0] if name == "saved" else refs[f"{name}_s"]
        at = lambda k: tiles - 1 - k if down else k  # place in time of the k-th tile

        def place(name, i):
            ref, rows = refs[name], pl.ds(i * TILE, TILE)
            if name in ("b", "c"):
                return ref.at[r, group, rows]
            if name in ("d_b", "d_c"):
                return ref.at[r, d, rows]
            if name == "saved":
                return ref.at[r, i, :, :, lane]
            return ref.at[r, rows] if name == "keep" else ref.at[r, rows, lane]

        def fetch(k):
            for name in streams:
                plgpu.copy_gmem_to_smem(place(name, at(k)), smem(name), full)

        first = before.at[0]
        a = lay.once(refs["a"].at[:, :, lane], first, one, lay.state) * LOG2E
        s = lay.once(refs["d_last"].at[r, :, :, lane], first, one, lay.state)
        vector = lambda ref: lay.over_steps(lay.once(ref.at[lane], x.at[0], one, lay.row))
        skip, bias = vector(refs["skip"]), vector(refs["bias"])
        fetch(0)

        def prepare():
            loaded = []
            for k in range(TILE // WARPS):
                rows = pl.ds(WARPS * k, WARPS)
                _, step = _steps(smem("delta"), lay, rows, bias, use_softplus)
                value, grad = lay.rows(smem("u").at[rows]), lay.rows(smem("d_out").at[rows])
                if z is not None:
                    gate = lay.rows(smem("z").at[rows])
                    grad = grad * gate * sigmoid_short(gate)
                loaded.append((rows, step, step * value, grad))
            for rows, step, value, grad in loaded:
                dt[rows], x[rows], gy[rows] = step, value, grad

        def times(q):
            """Steps of block q in the recurrence's order."""
            return [q * SUB + i if down else TILE - 1 - q * SUB - i for i in range(SUB)]

        def advance(t, h):
            decay = jnp.exp2(lay.along_states(dt.at[t]) * a)
            if keep is not None:
                decay = decay * smem("keep")[t, 0]
            mix = lay.along_channels(smem("b").at[t])
            return decay, decay * h + lay.along_states(x.at[t]) * mix

        def again(q, h):
            for t in times(q):
                _, h = advance(t, h)
            before[q + 1] = h
            return h

        def block(k, carry):
            s, d_a, d_skip, d_bias = carry
            q = BLOCKS - 1 - k
            ts = times(q)
            base = ts[0] if down else ts[-1]
            hs, decays = [lay.states(before.at[q])], []
            for t in ts:
                decay, h = advance(t, hs[-1])
                decays.append(decay)
                hs.append(h)
            for i in range(SUB)[::-1]:
                t, row = ts[i], i if down else SUB - 1 - i
                grad, step = lay.along_states(gy.at[t]), lay.along_states(dt.at[t])
                read = lay.along_channels(smem("c").at[t])
                g = grad * read + s
                s = decays[i] * g
                p = s * hs[i]
                d_a = d_a + p * step
                shares[0, row] = jnp.sum(g * lay.along_channels(smem("b").at[t]), axis=1)
                shares[1, row] = jnp.sum(p * a, axis=1)
                if z is not None:
                    shares[2, row] = jnp.sum(hs[i + 1] * read, axis=1)
                smem("d_c")[t] = jnp.sum(grad * hs[i + 1], axis=2)
                smem("d_b")[t] = jnp.sum(g * lay.along_states(x.at[t]), axis=2)
            plgpu.commit_smem()
            rows = pl.ds(base, SUB)
            total = lambda n: sum(lay.rows(shares.at[n, :, w]) for w in range(WARPS))
            value, grad = lay.rows(smem("u").at[rows]), lay.rows(gy.at[rows])
            raw, _ = _steps(smem("delta"), lay, rows, bias, False)
            by_input = total(0)
            d_delta = by_input * value + total(1) * (1 / LOG2E)
            if use_softplus:
                d_delta = d_delta * sigmoid_short(raw)
            results = {"u": by_input * lay.rows(dt.at[rows]) + skip * grad, "delta": d_delta}
            if z is not None:
                gate = lay.rows(smem("z").at[rows])
                open_ = sigmoid_short(gate)
                y = total(2) + skip * value
                slope = open_ * (1 + gate * (1 - open_))
                results["z"] = lay.rows(smem("d_out").at[rows]) * y * slope
            for name, result in results.items():  # in place: a thread's own elements
                smem(name)[rows] = result.astype(smem(name).dtype)
            plgpu.commit_smem()
            return s, d_a, d_skip + grad * value, d_bias + d_delta

        def one_tile(k, carry):
            plgpu.barrier_wait(full)
            prepare()
            plgpu.commit_smem()
            lax.fori_loop(0, BLOCKS - 1, again, lay.states(first))
            carry = lax.fori_loop(0, BLOCKS, block, carry)
            for name in moving:
                plgpu.copy_smem_to_gmem(smem(name.removeprefix("d_")), place(name, at(k)))
            for name in ("d_b", "d_c"):
                plgpu.copy_smem_to_gmem(smem(name), place(name, at(k)))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pl.when(k + 1 < tiles)(functools.partial(fetch, k + 1))
            return carry

        carry = (s, s * 0, skip * 0, skip * 0)
        s, d_a, d_skip, d_bias = lax.fori_loop(0, tiles, one_tile, carry)
        whole = pl.ds(0, WARPS)
        for ref, value, layout_out in (
            (before.at[0], d_a, refs["d_a"].at[r, :, :, lane]),
            (before.at[1], s, refs["d_start"].at[r, :, :, lane]),
            (dt.at[whole], d_skip, refs["d_skip"].at[r, :, lane]),
            (x.at[whole], d_bias, refs["d_bias"].at[r, :, lane]),
        ):
            ref[...] = value
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(ref, layout_out)
        plgpu.wait_smem_to_gmem(0)

    inputs = streams | weights
    cost = _cost(u.size, WARPS * a.shape[1], 2, 20, (*inputs.values(), *moving.values()))
    grid = (rows, blocks)
    return _call("selective_scan_backward", body, grid, inputs, outputs, scratch, cost)
