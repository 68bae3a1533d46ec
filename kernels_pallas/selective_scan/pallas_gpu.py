"""Selective scan on Hopper GPUs (Pallas Mosaic GPU): a fused kernel each way.

Forward (gpu_forward.py) writes y, the last state and, when a gradient will be taken, the state
before every 16 steps and y before the gate; backward (gpu_backward.py) computes states again from
those. Where rows and channels give too few programs for the chip, time is cut into chunks that
become rows of their own: a pass for each chunk's last state from zero, a join over the chunks, and
the main pass.

Floors, for E = B T D elements, N = 16, bfloat16: bytes 8 E forward (+ 6 E when training), 20 E
backward; exponentials and roots 19 E forward, 33 E backward, of which a multiprocessor makes 16 a
clock; 4 E instructions forward. The special function unit is the bound: E = 2^26
elements take it 0.31 ms forward on 132 multiprocessors at 1.98 GHz, the bytes 0.13 ms. Measured:
benchmarks/README.md.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from .. import dispatch
from ..compat import vary
from ..time_axis import join_chunks, pad_time
from .fused import NO_STEP
from .gpu_backward import SUB, walk_back
from .gpu_forward import CHANNELS, walk
from .gpu_kernels import TILE, WARPS

PROGRAMS = 528  # four for each of 132 multiprocessors
FEW = 128  # programs below which time is cut into chunks
MIN_TILES = 8  # of a chunk
_NAMES = ("u", "delta", "z", "a", "mix", "skip", "bias", "start", "keep")


def chunks(programs: int, tiles: int) -> int:
    """Chunks of time, a power of two: 1 unless there are few programs and many tiles."""
    wanted = 1 if programs >= FEW else min(PROGRAMS // programs, tiles // MIN_TILES)
    return 1 << max(wanted, 1).bit_length() - 1


def selective_scan_gpu(
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
    state: Array | None,
    resets: Array | None,
    reverse: bool,
    split: int | None = None,
) -> tuple[Array, Array]:
    """See `selective_scan`; real A, and B, C [B, T, G, N] over time.

    `split` is the number of chunks of time; None chooses by size. The result does not depend on it.
    """
    (batch, t_len, width), states, groups = u.shape, A.shape[1], B.shape[2]
    per_group = width // groups
    missing = -per_group % CHANNELS
    padded = 16 * (1 << max(0, (states - 1) // 16).bit_length())  # states: 16, 32 or 64
    programs = batch * groups * (per_group + missing) // CHANNELS
    split = split or chunks(programs, -(-t_len // TILE))
    steps = TILE * split  # whole tiles in every chunk

    def channels(x):  # last axis: every group padded to whole blocks
        if x is None or not missing:
            return x
        x = x.reshape(*x.shape[:-1], groups, per_group)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
        return x.reshape(*x.shape[:-2], -1)

    along = lambda x, value=0: None if x is None else channels(pad_time(x, steps, value))

    def weight(x):  # [..., N, D]
        return channels(jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padded - states), (0, 0)]))

    # B and C as [B, G, T, 2, N].
    mix = pad_time(jnp.stack((B, C), axis=3).astype(jnp.float32), steps).swapaxes(1, 2)
    keep = None if resets is None else 1 - pad_time(resets, steps).astype(jnp.float32)
    keep = None if keep is None else jnp.repeat(keep[:, :, None], 4, axis=2)
    vector = lambda x: channels(
        jnp.zeros(width, jnp.float32) if x is None else x.astype(jnp.float32)
    )
    operands = {
        "u": along(u),
        "delta": along(delta, NO_STEP if softplus else 0),
        "z": along(z),
        "a": weight(A.astype(jnp.float32).T),
        "mix": jnp.pad(mix, [(0, 0)] * 4 + [(0, padded - states)]),
        "skip": vector(D),
        "bias": vector(delta_bias),
        "start": None if state is None else weight(state.astype(jnp.float32).mT),
        "keep": keep,
    }
    operands = vary(tuple(operands[name] for name in _NAMES), operands)
    out, last = _scan((softplus, reverse, split), *operands)
    last = last[:, :states]
    if missing:
        kept = lambda x: x.reshape(*x.shape[:-1], groups, -1)[..., :per_group]
        out, last = (kept(x).reshape(*x.shape[:-1], width) for x in (out, last))
    return out[:, :t_len], last.mT


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(static, *operands):
    return _forward(static, operands, False)[:2]


def _scan_fwd(static, *operands):
    out, last, saved = _forward(static, operands, True)
    return (out, last), (operands, saved)


def _cut(x, count, time=1):
    """[B, ..., T, ...] -> [B count, ..., T / count, ...]: chunks of time as rows."""
    if x is None or count == 1:
        return x
    x = x.reshape(*x.shape[:time], count, -1, *x.shape[time + 1 :])
    return jnp.moveaxis(x, time, 1).reshape(-1, *x.shape[1:time], *x.shape[time + 1 :])


def _cut_all(named, count):
    """The operands with chunks as rows, but not `start`."""
    cut = {k: _cut(named[k], count) for k in ("u", "delta", "z", "keep")}
    cut["mix"] = _cut(named["mix"], count, 2)
    return cut | {k: named[k] for k in ("a", "skip", "bias")}


def _decays(named, times, count):
    """The decay over each of `count` chunks, [B, count, N, D], from their sums of step sizes."""
    batch, width = named["u"].shape[0], times.shape[-1]
    decay = jnp.exp(times.reshape(batch, count, 1, width) * named["a"])
    if named["keep"] is not None:
        whole = named["keep"].reshape(batch, count, -1).min(2)  # 0: a step forgets
        decay = decay * whole[:, :, None, None]
    return decay


def _entering(named, cut, first, count, static, mode):
    """The states [B count, N, D] entering the chunks, of the recurrence of `mode`."""
    alone = walk(static, start=None, mode=mode, **cut)
    lasts = alone["last"].reshape(-1, count, *alone["last"].shape[1:])
    first = jnp.zeros_like(lasts[:, 0]) if first is None else first
    decays = _decays(named, alone["time"], count)
    entering, _ = join_chunks(decays, lasts, first, reverse=static[1])
    return entering.reshape(alone["last"].shape)


@dispatch.compiled_once(0, 2)
def _forward(static, operands, save):
    """(out, last state, (saved states, y before the gate) if `save`)."""
    softplus, reverse, count = static
    named = dict(zip(_NAMES, operands, strict=True))
    cut, start = _cut_all(named, count), named["start"]
    rows = start
    if count > 1:
        rows = _entering(named, cut, start, count, (softplus, reverse), "state")
    result = walk((softplus, reverse), start=rows, mode="output", save=save, **cut)
    last = result["last"]
    last = last.reshape(-1, count, *last.shape[1:])[:, 0 if reverse else -1]
    kept = (result["saved"], result.get("plain")) if save else None
    return result["out"].reshape(named["u"].shape), last, kept


@dispatch.compiled_once(0)
def _scan_bwd(static, residuals, cotangents):
    """Gradients of all operands, in their order."""
    operands, (saved, plain) = residuals
    d_out, d_last = cotangents
    softplus, reverse, count = static
    named = dict(zip(_NAMES, operands, strict=True))
    cut = _cut_all(named, count)
    d_out, entering = _cut(d_out, count), d_last
    batch = d_last.shape[0]
    if count > 1:
        # The gradient's own recurrence, against time: the state's gradient leaving each chunk.
        reads = {**cut, "u": d_out}
        entering = _entering(named, reads, d_last, count, (softplus, not reverse), "adjoint")
    by_warp = lambda x: x.reshape(*x.shape[:-2], WARPS, -1, x.shape[-1])
    cut |= {"a": by_warp(cut["a"]), "mix": cut["mix"].reshape(*cut["mix"].shape[:-1], WARPS, -1)}
    given = {"saved": by_warp(saved), "d_last": by_warp(entering), "y": plain, "d_out": d_out}
    grads = walk_back((softplus, reverse), 64 // named["a"].shape[0], **given, **cut)
    grads = {k.removeprefix("d_"): x for k, x in grads.items()}
    many = lambda x: x.reshape(batch, count, *x.shape[1:])
    flat = lambda x: x.reshape(*x.shape[:-3], -1, x.shape[-1])
    for name in ("u", "delta", "z"):
        if name in grads:
            grads[name] = grads[name].reshape(named[name].shape).astype(named[name].dtype)
    mix, groups = grads["mix"], named["mix"].shape[1]  # [B chunks, blocks, T / SUB, 4, 2 SUB J]
    mix = many(mix.reshape(mix.shape[0], groups, -1, *mix.shape[2:]).sum(2))
    mix = mix.reshape(batch, count, groups, -1, WARPS, 2, SUB, mix.shape[-1] // (2 * SUB))
    grads["mix"] = mix.transpose(0, 2, 1, 3, 6, 5, 4, 7).reshape(named["mix"].shape)
    grads["a"] = flat(grads["a"].sum(0))
    grads |= {k: grads[k].sum((0, 1)) for k in ("skip", "bias")}
    first = flat(many(grads["start"])[:, -1 if reverse else 0])
    grads["start"] = None if named["start"] is None else first
    if named["keep"] is not None:
        grads["keep"] = jnp.zeros_like(named["keep"])
    return tuple(grads.get(name) for name in _NAMES)


_scan.defvjp(_scan_fwd, _scan_bwd)
