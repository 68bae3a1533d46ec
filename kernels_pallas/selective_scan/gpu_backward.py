"""The backward kernel of the selective scan on Hopper GPUs (Pallas Mosaic GPU); see pallas_gpu.py.

A program walks the tiles against the recurrence. Of each tile it computes the states again from the
one that the forward pass saved: once to keep every fourth in shared memory, once more four steps at
a time, whose states and decays then sit in registers while the gradient passes over them:

    g_t   = gy_t C_t + decay_{t+1} g_{t+1}        s_t = decay_t g_t       p_t = s_t h_{t-1}
    dC_t  = sum_d gy_t h_t                        dB_t = sum_d g_t dt_t u_t
    du_t  = dt_t sum_n g_t B_t + D gy_t           ddt_t = u_t sum_n g_t B_t + sum_n p_t A
    dA    = sum_t p_t dt_t

A program is one warpgroup with 32 V channels of a row. The N states of a channel are split over its
four warps, J = N/4 each, and the channels over the lanes, V each. Arrays of states are [4, J, 32,
V] (warp, state of the warp, lane, channel), in memory [4, J, 32 V].

Sums over n go through shared memory. So do sums over the program's channels (dB, dC), once per
block: a lane leaves its own sum over V, and then adds up a row of 32 lanes. XLA adds the programs'
parts. Nothing is added atomically. As the forward pass's y before the gate is read, dz comes first;
the next tile's z, y and gradient of the output are fetched then, the rest when the tile is done.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import dispatch
from .fused import LOG2E, sigmoid_short, softplus_short
from .gpu_kernels import TILE, WARP, WARPS, barrier, call_kernel, estimate

SUB = 4  # steps whose states and decays are in registers
BLOCKS = TILE // SUB


class Layouts:
    """Which thread holds what, for J states a warp and V channels a lane."""

    def __init__(self, j: int, v: int):
        self.channels = WARP * v
        self.shape = (WARPS, j, WARP, v)
        self.interpreted = dispatch.interpret("gpu")
        options = {"warp_dims": (-4,), "lane_dims": (-2,), "vector_dim": -1}
        self.state = plgpu.Layout.TILED(plgpu.Tiling((self.shape,)), **options)
        self.share = self.state.reduce((1,))  # [4, 32, V]: a warp a row
        self.row = self.state.reduce((0, 1))  # [32, V]: the same in every warp
        self.column = self.state.reduce((2, 3))  # [4, J]: the same in every lane
        self.part = self.state.reduce((3,))  # [4, J, 32]: a lane's own sums over channels

    def load(self, ref, layout):
        """[..., 32 V] of shared memory as [..., 32, V]."""
        shape = (*ref.shape[:-1], *self.shape[2:])
        if self.interpreted:  # the interpreter has no reshaped references
            return plgpu.layout_cast(ref[...].reshape(shape), layout)
        return plgpu.layout_cast(ref.reshape(shape)[...], layout)

    def store(self, ref, value):
        """The inverse of `load`, in the type of `ref`; to HBM, too."""
        value = value.astype(ref.dtype)
        if self.interpreted:
            ref[...] = value.reshape(ref.shape)
        else:
            ref.reshape(value.shape)[...] = value

    def rows(self, ref):
        """Four steps [4, 32 V] in float32, a warp a step."""
        return self.load(ref, self.share).astype(jnp.float32)

    def states(self, ref):
        return self.load(ref, self.state)

    def along_states(self, ref):
        """One value per channel, for every state."""
        return self._spread(self.load(ref, self.row), (2, 3))

    def along_channels(self, ref):
        """One value per state, for every channel."""
        return self._spread(plgpu.layout_cast(ref[...], self.column), (0, 1))

    def _spread(self, value, axes):
        return plgpu.layout_cast(lax.broadcast_in_dim(value, self.shape, axes), self.state)

    def over_steps(self, value):
        """[32, V] for four steps."""
        shape = (WARPS, *value.shape)
        return plgpu.layout_cast(lax.broadcast_in_dim(value, shape, (1, 2)), self.share)

    def fetch(self, full, *pieces):
        """Pieces (HBM, shared memory, layout) in registers; the memory may be used again."""
        for source, smem, _ in pieces:
            plgpu.copy_gmem_to_smem(source, smem, full)
        plgpu.barrier_wait(full)
        values = [self.load(smem, layout) for _, smem, layout in pieces]
        barrier()
        # Times one, which the compiler drops: a loop's carry must not be typed as varying.
        ones = lambda x, layout: plgpu.layout_cast(jnp.ones(x.shape, x.dtype), layout)
        return [x * ones(x, piece[-1]) for x, piece in zip(values, pieces, strict=True)]


def short(v, x):
    """Whether rows of 32 V elements are no whole lines of 128 bytes, which jax 0.12 insists on."""
    return WARP * v * x.dtype.itemsize < 128


def step_sizes(refs, lay, rows, bias, use_softplus):
    """Raw and actual step sizes of four steps."""
    raw = lay.rows(refs.at[rows]) + bias
    return raw, softplus_short(raw) if use_softplus else raw


def walk_back(static, v, u, delta, z, a, mix, skip, bias, keep, saved, y, d_out, d_last):
    """Gradients; arguments as for `gpu_forward.walk` and from its results, with N as [4, J].

    Args:
        v: channels per lane. saved: the states before the tiles. y: before the gate, or None.
        d_out, d_last: cotangents of the output and the last state.

    Returns:
        dict of "d_u", "d_delta", "d_z" [R, T, D] (float32 if V = 1); "d_a", "d_start" [R, 4, J, D];
        "d_mix" [R, blocks of channels, T/4, 4, 2 4 J]: dB and dC of four steps; "d_skip", "d_bias"
        [R, 4, D] (sums of every fourth step).
    """
    use_softplus, reverse = static
    j = a.shape[1]
    lay = Layouts(j, v)
    (rows, t_len, width), tiles = u.shape, u.shape[1] // TILE
    blocks = width // lay.channels
    per_group = blocks // mix.shape[1]
    down = not reverse
    streams = {"u": u, "delta": delta, "d_out": d_out, "mix": mix, "saved": saved}
    streams |= {k: x for k, x in (("z", z), ("y", y)) if x is not None}
    weights = {"a": a, "skip": skip, "bias": bias, "d_last": d_last}
    masks = {} if keep is None else {"keep": keep}  # read in place, as no shared memory is left
    moving = {"d_u": u, "d_delta": delta} | ({} if z is None else {"d_z": z})
    sums = 2 * SUB * a.shape[1]  # of a warp and block over channels: dB and dC
    stored = lambda x: jnp.float32 if short(v, x) else x.dtype
    outputs = {k: (x.shape, stored(x)) for k, x in moving.items()}
    outputs |= {"d_mix": ((rows, blocks, t_len // SUB, WARPS, sums), a.dtype)}
    outputs |= dict.fromkeys(("d_a", "d_start"), ((rows, *a.shape), a.dtype))
    outputs |= dict.fromkeys(("d_skip", "d_bias"), ((rows, WARPS, width), a.dtype))
    tile = dict.fromkeys(("u", "delta", "d_out", "z", "y"), (TILE, lay.channels))
    tile |= {"mix": (TILE, 2, *a.shape[:2])}
    scratch = {f"{k}_s": plgpu.SMEM(tile[k], x.dtype) for k, x in streams.items() if k in tile}
    scratch |= {k: plgpu.SMEM((TILE, lay.channels), jnp.float32) for k in ("dt", "x", "gy")}
    whole = (*a.shape[:2], lay.channels)
    scratch |= {"before": plgpu.SMEM((BLOCKS, *whole), jnp.float32)}  # states before blocks
    # Sums over n: g B and p A.
    scratch |= {"shares": plgpu.SMEM((2, SUB, WARPS, lay.channels), jnp.float32)}
    # A lane's parts of the sums over channels. Rows are padded: read without bank conflicts, and
    # still whole 16 bytes, as newer jax stores by matrices.
    scratch |= {"parts": plgpu.SMEM((WARPS, sums, WARP + 4), jnp.float32)}
    tiling = plgpu.Tiling(((WARPS, WARP, 4),))  # a lane a row
    across = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    early = [k for k in streams if k in ("d_out", "z", "y")]  # needed by `gates` alone
    late = [k for k in streams if k not in early]
    scratch |= {"soon": plgpu.Barrier(num_arrivals=len(early))}
    scratch |= {"full": plgpu.Barrier(num_arrivals=len(late))}
    scratch |= {"some": plgpu.Barrier(num_arrivals=len(weights))}

    def body(dt, x, gy, before, shares, parts, soon, full, some, **refs):
        r, d = lax.axis_index("r"), lax.axis_index("d")
        lane = pl.ds(d * lay.channels, lay.channels)
        group = lax.div(d, per_group)
        smem = lambda name: before.at[0] if name == "saved" else refs[f"{name}_s"]
        at = lambda k: tiles - 1 - k if down else k  # place in time of the k-th tile

        def source(name, i):
            ref, rows = refs[name], pl.ds(i * TILE, TILE)
            if name == "mix":
                return ref.at[r, group, rows]
            if name == "saved":
                return ref.at[r, i, :, :, lane]
            return ref.at[r, rows, lane]

        def fetch(names, full, k):
            for name in names:
                plgpu.copy_gmem_to_smem(source(name, at(k)), smem(name), full)

        def send(name, i, rows, value):
            """Four steps of tile i, straight from registers to HBM."""
            to = pl.ds(i * TILE + rows.start, WARPS)
            lay.store(refs[name].at[r, to, lane], value)

        fetch(early, soon, 0)
        fetch(late, full, 0)
        a, s, *vectors = lay.fetch(
            some,
            (refs["a"].at[:, :, lane], before.at[1], lay.state),
            (refs["d_last"].at[r, :, :, lane], before.at[2], lay.state),
            (refs["skip"].at[lane], x.at[0], lay.row),
            (refs["bias"].at[lane], x.at[1], lay.row),
        )
        a = a * LOG2E
        skip, bias = (lay.over_steps(vector) for vector in vectors)

        quarters = [pl.ds(q, WARPS) for q in range(0, TILE, WARPS)]

        def gates(i):
            """Gradients behind the gates of tile i, and of the gates."""
            results = []
            for rows in quarters:
                grad, d_gate = lay.rows(smem("d_out").at[rows]), None
                if z is not None:
                    gate = lay.rows(smem("z").at[rows])
                    open_ = sigmoid_short(gate)
                    passed = gate * open_
                    slope = open_ + passed * (1 - open_)
                    d_gate = grad * lay.rows(smem("y").at[rows]) * slope
                    grad = grad * passed
                results.append((rows, grad, d_gate))
            for rows, grad, d_gate in results:
                lay.store(gy.at[rows], grad)
                if z is not None:
                    send("d_z", i, rows, d_gate)

        def prepare():
            """Step sizes and inputs."""
            results = []
            for rows in quarters:
                _, step = step_sizes(smem("delta"), lay, rows, bias, use_softplus)
                results.append((rows, step, step * lay.rows(smem("u").at[rows])))
            for rows, step, value in results:
                lay.store(dt.at[rows], step)
                lay.store(x.at[rows], value)

        def times(q):
            """Steps of block q in the recurrence's order."""
            return [q * SUB + i if down else TILE - 1 - q * SUB - i for i in range(SUB)]

        def advance(i, t, h):
            decay = jnp.exp2(lay.along_states(dt.at[t]) * a)
            if keep is not None:
                decay = decay * refs["keep"][r, i * TILE + t, 0]
            mix = lay.along_channels(smem("mix").at[t, 0])
            return decay, decay * h + lay.along_states(x.at[t]) * mix

        def again(i, q, h):
            for t in times(q):
                _, h = advance(i, t, h)
            lay.store(before.at[q + 1], h)
            return h

        def block(i, k, carry):
            """Four steps of tile i. One barrier stands between the stores to `shares` and `parts`
            and their loads, the other between these and the next block's stores."""
            s, d_a, d_skip, d_bias = carry
            q = BLOCKS - 1 - k
            ts = times(q)
            base = ts[0] if down else ts[-1]
            hs, decays = [lay.states(before.at[q])], []
            for t in ts:
                decay, h = advance(i, t, hs[-1])
                decays.append(decay)
                hs.append(h)

            def load(t):
                along = [lay.along_states(ref.at[t]) for ref in (dt, x, gy)]
                return *along, *(lay.along_channels(smem("mix").at[t, n]) for n in range(2))

            following = None
            for m in range(SUB)[::-1]:
                row = m if down else SUB - 1 - m
                step, value, grad, mix, read = following or load(ts[m])
                g = grad * read + s
                s = decays[m] * g
                p = s * hs[m]
                d_a = d_a + p * step
                # Before the stores, across which no load is moved, if there are registers for it.
                following = load(ts[m - 1]) if m and j < 16 else None
                lay.store(shares.at[0, row], jnp.sum(g * mix, axis=1))
                lay.store(shares.at[1, row], jnp.sum(p * a, axis=1))
                for n, product in enumerate((g * value, grad * hs[m + 1])):
                    place = pl.ds((n * SUB + row) * j, j)
                    parts[:, place, pl.ds(0, WARP)] = jnp.sum(product, axis=3)
            rows = pl.ds(base, SUB)
            value, grad = lay.rows(smem("u").at[rows]), lay.rows(gy.at[rows])
            raw, _ = step_sizes(smem("delta"), lay, rows, bias, False)
            step = lay.rows(dt.at[rows])
            barrier()
            total = lambda n: sum(lay.rows(shares.at[n, :, w]) for w in range(WARPS))
            by_input, by_decay = total(0), total(1)
            part = plgpu.layout_cast(parts[:, :, pl.ds(0, WARP)], across)
            barrier()
            d_delta = by_input * value + by_decay * (1 / LOG2E)
            if use_softplus:
                d_delta = d_delta * sigmoid_short(raw)
            send("d_u", i, rows, by_input * step + skip * grad)
            send("d_delta", i, rows, d_delta)
            refs["d_mix"][r, d, i * BLOCKS + lax.div(base, SUB)] = jnp.sum(part, axis=2)
            return s, d_a, d_skip + grad * value, d_bias + d_delta

        def one_tile(k, carry):
            plgpu.barrier_wait(soon)
            gates(at(k))
            plgpu.barrier_wait(full)
            prepare()
            barrier()
            more = k + 1 < tiles
            pl.when(more)(functools.partial(fetch, early, soon, k + 1))
            one, two = (functools.partial(f, at(k)) for f in (again, block))
            lax.fori_loop(0, BLOCKS - 1, one, lay.states(before.at[0]))
            carry = lax.fori_loop(0, BLOCKS, two, carry)
            pl.when(more)(functools.partial(fetch, late, full, k + 1))
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
            lay.store(ref, value)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(ref, layout_out)
        barrier()

    inputs = streams | weights | masks
    cost = estimate(u.size, WARPS * a.shape[1], 2, 20, (*inputs.values(), *moving.values()))
    grid = (rows, blocks)
    return call_kernel("selective_scan_backward", body, grid, inputs, outputs, scratch, cost)
