"""Selective scan on Hopper GPUs (Pallas Mosaic GPU): a fused kernel each way.

Forward writes y, the last state and, when a gradient will be taken, the state before every 16
steps; backward computes states again from those (gpu_kernels.py, gpu_backward.py). Where rows and
channels give too few programs for the chip, time is cut into chunks that become rows of their own:
a pass for each chunk's last state from zero, `join` over the chunks, and the main pass.

Floors, for E = B T D elements, N = 16, bfloat16: bytes 8 E forward (+ 4 E of saved states when
training), 20 E backward; exponentials 16 E forward, 28 E backward, and 3 and 7 E for step sizes and
gates; a multiprocessor makes 16 a clock. Compiled for sm_90a without a spilled register (jax 0.10.2
and 0.12, ptxas 13.0): per 32 channels and step one of the four schedulers of a multiprocessor
issues 155 instructions forward (175 with one channel a lane), beside 152 clocks of exponentials,
and 456 beside 280 backward. Not measured.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..compat import vary
from ..time_axis import pad_time
from .fused import NO_STEP, check_operands
from .gpu_backward import walk_back
from .gpu_kernels import TILE, WARP, WARPS, walk
from .reference import step_size

LANES = 128  # channels are padded to whole multiples
PROGRAMS = 264  # two for each of 132 multiprocessors
FEW = {"forward": 48, "backward": 128}  # programs below which time is cut into chunks
MIN_TILES = 8  # of a chunk
_NAMES = ("u", "delta", "z", "a", "b", "c", "skip", "bias", "start", "keep")


def per_lane(states: int, programs: int | None = None) -> int:
    """Channels per lane: as many as registers hold, fewer to make `programs` (of one per lane)."""
    v = max(1, 64 // states)
    while programs is not None and v > 1 and (v > 2 or programs // v < PROGRAMS):
        v //= 2
    return v


def chunks(programs: int, tiles: int, few: int) -> int:
    """Chunks of time, a power of two: 1 unless there are few programs and many tiles."""
    wanted = 1 if programs >= few else min(PROGRAMS // programs, tiles // MIN_TILES)
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
    state: Array,
    resets: Array | None,
    reverse: bool,
    split: tuple[int, int] | None = None,
) -> tuple[Array, Array]:
    """See `selective_scan`; real A, and B, C [B, T, G, N] over time.

    `split` is the number of chunks of time forward and backward; None chooses by size. The result
    does not depend on it.

    Raises:
        ValueError: complex A, constant B or C, more than 64 states, or float64.
    """
    check_operands("pallas_gpu", u, A, B, C, most_states=64)
    (batch, t_len, width), states, groups = u.shape, A.shape[1], B.shape[2]
    per_group = width // groups
    missing = -per_group % LANES
    j = 4 * (1 << max(0, (states - 1) // 16).bit_length())  # of a warp: 4, 8 or 16
    blocks = batch * groups * (per_group + missing) // WARP
    tiles = -(-t_len // TILE)
    split = split or (
        chunks(blocks // per_lane(WARPS * j, blocks), tiles, FEW["forward"]),
        chunks(blocks // per_lane(WARPS * j), tiles, FEW["backward"]),
    )
    steps = TILE * math.lcm(*split)  # whole tiles in every chunk of both passes

    def channels(x):  # last axis: every group padded to whole blocks
        if x is None or not missing:
            return x
        x = x.reshape(*x.shape[:-1], groups, per_group)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
        return x.reshape(*x.shape[:-2], -1)

    along = lambda x, value=0: None if x is None else channels(pad_time(x, steps, value))

    def weight(x):  # [..., N, D] -> [..., 4, J, D]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, WARPS * j - states), (0, 0)])
        return channels(x.reshape(*x.shape[:-2], WARPS, j, width))

    def mix(x):  # [B, T, G, N] -> [B, G, T, 4, J]
        x = pad_time(x.astype(jnp.float32), steps).transpose(0, 2, 1, 3)
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, WARPS * j - states)])
        return x.reshape(*x.shape[:3], WARPS, j)

    keep = None if resets is None else 1 - pad_time(resets, steps).astype(jnp.float32)
    keep = None if keep is None else jnp.repeat(keep[:, :, None], 4, axis=2)
    vector = lambda x: channels(jnp.zeros(width) if x is None else x.astype(jnp.float32))
    operands = {
        "u": along(u),
        "delta": along(delta, NO_STEP if softplus else 0),
        "z": along(z),
        "a": weight(A.astype(jnp.float32).T),
        "b": mix(B),
        "c": mix(C),
        "skip": vector(D),
        "bias": vector(delta_bias),
        "start": weight(state.mT),
        "keep": keep,
    }
    operands = vary(tuple(operands[name] for name in _NAMES), operands)
    out, last = _scan((softplus, reverse, split), *operands)
    last = last.reshape(batch, WARPS * j, -1)[:, :states]
    if missing:
        kept = lambda x: x.reshape(*x.shape[:-1], groups, -1)[..., :per_group]
        out, last = (kept(x).reshape(*x.shape[:-1], width) for x in (out, last))
    return out[:, :t_len], last.mT


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(static, *operands):
    return _forward(static, operands, save=False)[:2]


def _scan_fwd(static, *operands):
    out, last, saved = _forward(static, operands, save=True)
    return (out, last), (operands, saved)


def _cut(x, count, time=1):
    """[B, ..., T, ...] -> [B count, ..., T / count, ...]: chunks of time as rows."""
    if x is None or count == 1:
        return x
    x = x.reshape(*x.shape[:time], count, -1, *x.shape[time + 1 :])
    return jnp.moveaxis(x, time, 1).reshape(-1, *x.shape[1:time], *x.shape[time + 1 :])


def _cut_all(named, count):
    """The operands with chunks as rows; `start` is left out."""
    cut = {k: _cut(named[k], count) for k in ("u", "delta", "z", "keep")}
    cut |= {k: _cut(named[k], count, 2) for k in ("b", "c")}
    return cut | {k: named[k] for k in ("a", "skip", "bias")}


def _short(named, count):
    """Channels per lane of the forward kernel."""
    batch, _, width = named["u"].shape
    return per_lane(WARPS * named["a"].shape[1], batch * count * width // WARP)


def _decays(named, static, count):
    """The decay over each of `count` chunks, [B, count, 4, J, D]."""
    batch, _, width = named["u"].shape
    dt = step_size(named["delta"], named["bias"] if static[0] else None, static[0])
    total = dt.reshape(batch, count, -1, width).sum(2)[:, :, None, None]
    decay = jnp.exp(total * named["a"])
    if named["keep"] is not None:
        whole = named["keep"].reshape(batch, count, -1).min(2)  # 0: a step forgets
        decay = decay * whole[:, :, None, None, None]
    return decay


def join(decays: Array, lasts: Array, start: Array, down: bool) -> Array:
    """States entering the chunks: s_{i+1} = decays_i s_i + lasts_i from `start`.

    Args:
        decays, lasts: [B, chunks, ...], of each chunk alone.
        start: [B, ...] before the first chunk (the last one, if not `down`).
    """

    def advance(s, chunk):
        decay, last = chunk
        return decay * s + last, s

    first = lambda x: jnp.moveaxis(x, 1, 0)
    _, entering = lax.scan(advance, start, (first(decays), first(lasts)), reverse=not down)
    return jnp.moveaxis(entering, 0, 1)


def _forward(static, operands, save):
    """(out, last state, saved states or None)."""
    softplus, reverse, (count, _) = static
    named = dict(zip(_NAMES, operands, strict=True))
    v = _short(named, count)
    cut, start = _cut_all(named, count), named["start"]
    rows = start
    if count > 1:
        many = lambda x: x.reshape(-1, count, *x.shape[1:])
        zero = jnp.zeros_like(start, shape=(start.shape[0] * count, *start.shape[1:]))
        lasts = walk((softplus, reverse), v, start=vary(zero, start), mode="state", **cut)["last"]
        entering = join(_decays(named, static, count), many(lasts), start, not reverse)
        rows = entering.reshape(zero.shape)
    result = walk((softplus, reverse), v, start=rows, mode="output", save=save, **cut)
    out, last = result["out"].reshape(named["u"].shape), result["last"]
    last = last.reshape(-1, count, *last.shape[1:])[:, 0 if reverse else -1]
    saved = result["saved"].reshape(start.shape[0], -1, *start.shape[1:]) if save else None
    return out, last, saved


def _scan_bwd(static, residuals, cotangents):
    """Gradients of all operands, in their order."""
    operands, saved = residuals
    d_out, d_last = cotangents
    softplus, reverse, (_, count) = static
    named = dict(zip(_NAMES, operands, strict=True))
    cut, start = _cut_all(named, count), named["start"]
    d_out, entering = _cut(d_out, count), d_last
    batch = start.shape[0]
    if count > 1:
        # The gradient's own recurrence, against time: the state's gradient leaving each chunk.
        zero = vary(jnp.zeros_like(start, shape=(batch * count, *start.shape[1:])), start)
        reads = {**cut, "u": d_out, "start": zero}
        v = _short(named, count)
        lasts = walk((softplus, not reverse), v, mode="adjoint", **reads)["last"]
        lasts = lasts.reshape(batch, count, *start.shape[1:])
        entering = join(_decays(named, static, count), lasts, d_last, reverse)
        entering = entering.reshape(zero.shape)
    v = per_lane(WARPS * named["a"].shape[1])
    grads = walk_back(
        (softplus, reverse), v, saved=_cut(saved, count), d_out=d_out, d_last=entering, **cut
    )
    grads = {k.removeprefix("d_"): x for k, x in grads.items()}
    many = lambda x: x.reshape(batch, count, *x.shape[1:])
    for name in ("u", "delta", "z"):
        if name in grads:
            grads[name] = grads[name].reshape(named[name].shape)
    for name in ("b", "c"):
        part = many(grads[name])  # [B, chunks, blocks, T / chunks, 4, J]
        groups = named[name].shape[1]
        part = part.reshape(*part.shape[:2], groups, -1, *part.shape[3:]).sum(3)
        grads[name] = jnp.moveaxis(part, 1, 2).reshape(named[name].shape)
    grads["a"] = grads["a"].sum(0)
    grads |= {k: grads[k].sum((0, 1)) for k in ("skip", "bias")}
    grads["start"] = many(grads["start"])[:, -1 if reverse else 0]
    if named["keep"] is not None:
        grads["keep"] = jnp.zeros_like(named["keep"])
    return tuple(grads.get(name) for name in _NAMES)


_scan.defvjp(_scan_fwd, _scan_bwd)
