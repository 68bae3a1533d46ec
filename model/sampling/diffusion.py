"""Samplers of diffusion and flow models: all steps, with guidance, as one function to be jitted.

    segments = (Segment(steps=150, mode=4), Segment(steps=100, mode=2))
    sampler = jax.jit(make_diffusion_sampler(
        denoise, GaussianDiffusion(), segments=segments, shape=(32, 32, 4), null_label=1000))
    images = sampler(variables, row_keys(jax.random.key(0), 8), labels, guidance=1.5)

A segment is a stretch of iterations in one mode of the net (a patch size of a FlexiDiT) with one
kind of guidance; every stretch is one `lax.scan`, and the state goes from one to the next. Row i's
noise is a function of keys[i] alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..layers.patches import Patch
from ..processes.flow import FlowMatching
from ..processes.gaussian import GaussianDiffusion
from .solvers import SDE, Solver, flow_solver, gaussian_solver, slice_inputs

GUIDES = ("none", "null", "same")

# [B] int32, or of nets that read a text a mapping of arrays [B, ..] by the names of the net's
# arguments: "labels", "context", "context_mask", and "drop" [B], true in rows to be without any
Labels = Array | Mapping[str, Array]
# denoise(variables, x [B, .., C], t [B], labels [B], mode) -> [B, .., C or 2C]
Denoise = Callable[[Any, Array, Array, Labels, Patch | None], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of iterations.

    Attributes:
        steps: how many.
        mode: of the net for the main prediction; None: its own.
        guide: whose labels the guiding prediction gets: "null" (classifier-free guidance, arXiv
            2207.12598), "same" (of a weaker mode: autoguidance, arXiv 2406.02507), or "none": no
            guidance.
        guide_mode: mode of the guiding prediction; None: `mode`.
        scale: strength of guidance here; None: that of the sampler's call.

    Raises:
        ValueError: no steps, an unknown guide, or a guide that is the main prediction itself.
    """

    steps: int
    mode: Patch | None = None
    guide: str = "null"
    guide_mode: Patch | None = None
    scale: float | None = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"a segment of {self.steps} steps; at least 1 is needed")
        if self.guide not in GUIDES:
            raise ValueError(f"guide={self.guide!r}; choose one of {', '.join(GUIDES)}")
        if self.guide == "none" and (self.guide_mode is not None or self.scale is not None):
            raise ValueError("guide='none' has neither guide_mode nor scale")
        if self.guide == "same" and self.guide_mode in (None, self.mode):
            raise ValueError(
                f"guide='same' with guide_mode={self.guide_mode} is the main prediction of "
                f"mode={self.mode} again; set guide_mode to another mode"
            )


def guided_prediction(
    denoise: Denoise,
    variables: Any,
    x: Array,
    t: Array,
    labels: Labels,
    segment: Segment,
    scale: Array | None,
    *,
    null_label: int | None,
    channels: int,
) -> Array:
    """e_g + s (e_m - e_g) on the first `channels` channels, the main prediction on the others.

    Main and guiding prediction see the same x. They are one call of 2B rows if they have the same
    mode (row 2i the main, 2i + 1 the guiding prediction of image i), else two calls.

    Args:
        denoise: see `make_diffusion_sampler`. x: [B, H, W, C]; t: [B]; labels: [B].
        scale: s, scalar or [B]; None: the main prediction alone.

    Returns:
        [B, H, W, C or 2C].
    """
    if scale is None:
        return denoise(variables, x, t, labels, segment.mode)
    guide_mode = segment.mode if segment.guide_mode is None else segment.guide_mode
    others = labels if segment.guide == "same" else _null(labels, null_label)
    if guide_mode == segment.mode:
        # The two of a row are neighbours: rows that are sharded stay where they are.
        pair = lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
        told = jax.tree.map(pair, labels, others)
        both = denoise(variables, pair(x, x), pair(t, t), told, segment.mode)
        both = both.reshape(-1, 2, *both.shape[1:])
        main, guide = both[:, 0], both[:, 1]
    else:
        main = denoise(variables, x, t, labels, segment.mode)
        guide = denoise(variables, x, t, others, guide_mode)
    scale = jnp.asarray(scale, main.dtype)
    scale = scale.reshape(scale.shape + (1,) * (main.ndim - scale.ndim)) if scale.ndim else scale
    guide, led = guide[..., :channels], main[..., :channels]
    return jnp.concatenate([guide + scale * (led - guide), main[..., channels:]], axis=-1)


def _null(labels: Labels, null_label: int | None) -> Labels:
    """Labels of no class, and of no text."""
    if isinstance(labels, Mapping):
        return {**labels, "drop": jnp.ones_like(labels["drop"])}
    return jnp.full_like(labels, null_label)


def guided_iterations(steps: int, interval: tuple[float, float]) -> np.ndarray:
    """[steps] bool: guidance acts where the middle of an iteration's share of the way from 0
    (clean) to 1 (noise) is within (low, high).

    Raises:
        ValueError: an interval out of order or range.
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"interval={tuple(interval)}; it is (low, high) within 0..1")
    middle = (steps - np.arange(steps) - 0.5) / steps
    return (low <= middle) & (middle <= high)


def guides_at(times: tuple[float, float], t: Array | float) -> Array:
    """Whether guidance acts at time t of a flow: low < t < high, and at 0 where low is 0. In
    float32."""
    low, high = (np.float32(a) for a in times)
    t = jnp.asarray(t, jnp.float32)
    return ((t > low) | ((low == 0) & (t == 0))) & (t < high)


def check_guided_times(process, times: tuple[float, float], interval) -> None:
    """Raises ValueError unless `guided_times` are (low, high) within 0..1, of a flow, without an
    `interval`."""
    if not isinstance(process, FlowMatching):
        raise ValueError(f"guided_times={times} are of flow matching; give interval instead")
    if tuple(interval) != (0.0, 1.0):
        raise ValueError(f"interval={tuple(interval)} and guided_times={times}: give one of them")
    if len(times) != 2 or not 0 <= times[0] < times[1] <= 1:
        raise ValueError(f"guided_times={times}; it is (low, high) within 0..1")


def make_trajectory(
    denoise: Denoise,
    process: GaussianDiffusion | FlowMatching | Solver,
    *,
    method: str = "ddpm",
    segments: Sequence[Segment],
    respacing: str | Sequence[int] | None = None,
    eta: float = 0.0,
    clip: bool = False,
    guidance_channels: int = 0,
    interval: tuple[float, float] = (0.0, 1.0),
    guided_times: tuple[float, float] | None = None,
    null_label: int | None = None,
    sde: SDE | None = None,
    reset_history: bool = False,
) -> Callable[..., Any]:
    """The sampler without its random numbers; arguments as in `make_diffusion_sampler`.

    Returns:
        trajectory(variables, start, noise, labels, *, guidance=None, record=False) -> x

        start: initial noise [B, H, W, C]. noise: function of the iteration k (a traced int32
        scalar, 0 the noisiest) -> [B, H, W, C]. record: return also {"x": [K, B, H, W, C], the
        state after every iteration, "x_start": the clean images predicted} ("x_start" of
        Gaussian diffusion only). The dtype is that of `start`, at least float32.

    Raises:
        ValueError: settings that do not fit, see `make_diffusion_sampler`.
    """
    segments = tuple(segments)
    if not segments:
        raise ValueError("no segments; one of all steps is the least")
    ends = np.cumsum([s.steps for s in segments])
    starts, total = ends - [s.steps for s in segments], int(ends[-1])
    solver = _solver(
        process, method, total, respacing=respacing, eta=eta, clip=clip, sde=sde,
        restarts=tuple(int(k) for k in starts) if reset_history else None,
    )  # fmt: skip
    if null_label is None and any(s.guide == "null" and s.scale is not None for s in segments):
        raise ValueError("a segment has a guidance scale, but null_label is not set")

    if guided_times is not None:
        check_guided_times(process, guided_times, interval)
    acts = guided_iterations(total, interval)
    pieces: list[tuple[int, int, Segment, bool]] = []
    for begin, end, segment in zip(starts, ends, segments):
        cuts = [k for k in range(begin + 1, end) if acts[k] != acts[k - 1]]
        for a, b in zip([begin, *cuts], [*cuts, end]):
            pieces.append((int(a), int(b), segment, bool(acts[a]) and segment.guide != "none"))

    def trajectory(variables, start, noise, labels, *, guidance=None, record=False):
        _check_call(start, labels, guidance, segments, null_label, guidance_channels)
        start = jnp.asarray(start)
        start = start.astype(jnp.promote_types(start.dtype, jnp.float32))
        labels = _told(labels, null_label)
        channels = guidance_channels or start.shape[-1]
        state, seen = solver.begin(start), []
        for begin, end, segment, guided in pieces:
            scale = guidance if segment.scale is None else segment.scale
            predict = _bind(
                denoise, variables, labels, segment, scale if guided else None,
                null_label=null_label, channels=channels, times=guided_times,
            )  # fmt: skip

            def one(state, inputs, predict=predict):
                k, at = inputs
                state, found = solver.step(predict, state, at, lambda: noise(k))
                return state, ({"x": solver.sample(state)} | found if record else None)

            numbers = slice_inputs(solver.inputs, begin, end, start.dtype)
            state, found = lax.scan(one, state, (jnp.arange(begin, end), numbers))
            seen.append(found)
        x = solver.sample(state)
        return (x, jax.tree.map(lambda *a: jnp.concatenate(a), *seen)) if record else x

    return trajectory


def make_diffusion_sampler(
    denoise: Denoise,
    process: GaussianDiffusion | FlowMatching | Solver,
    *,
    method: str = "ddpm",
    segments: Sequence[Segment],
    shape: tuple[int, ...],
    respacing: str | Sequence[int] | None = None,
    eta: float = 0.0,
    clip: bool = False,
    guidance_channels: int = 0,
    interval: tuple[float, float] = (0.0, 1.0),
    guided_times: tuple[float, float] | None = None,
    null_label: int | None = None,
    sde: SDE | None = None,
    reset_history: bool = False,
) -> Callable[..., Array]:
    """A pure function that draws images of given classes; to be jitted by the caller.

    Args:
        denoise: (variables, x [B, H, W, C], t [B], labels [B], mode) -> [B, H, W, C or 2C]. t is
            the original timestep, int32, or the flow's time, float32.
        process: `GaussianDiffusion` or `FlowMatching`; or a solver made elsewhere (`level_solver`),
            beside which method, respacing, eta, clip, sde and reset_history stay as they are.
        method: of the former "ddpm", "ddim", "euler", "heun", "dpm++2m" (`gaussian_solver`), of the
            latter "euler", "heun", "sde" (`flow_solver`).
        segments: the iterations, the noisiest first; their steps add up to all of them.
        shape: (H, W, C) of an image.
        respacing: which timesteps are kept, see `gaussian_tables`: as many as there are iterations.
            None: str(iterations). Gaussian diffusion only.
        eta: noise of "ddim". clip: predicted clean images to [-1, 1] (Gaussian diffusion).
        guidance_channels: guidance acts on the first so many channels; 0: on all C. Never on
            variances. The published figures of DiT and SiT were drawn with 3 of 4.
        interval: guidance acts while the iteration's place between 0 (clean) and 1 (noise) is
            within (arXiv 2404.07724); other iterations do not compute the guiding prediction.
        guided_times: instead, in units of the flow's time: guidance acts at every evaluation of the
            net whose time is within, see `guides_at`. The published JiT figures were drawn so.
        null_label: the label of no class.
        sde: settings of "sde".
        reset_history: "dpm++2m" begins anew, at order 1, in every segment.

    Returns:
        sampler(variables, keys, labels, *, guidance=None) -> x [B, H, W, C] float32

        keys: [B] PRNG keys, one per image (`row_keys`); row i starts at fold_in(keys[i], 0), and
        its iteration k draws with fold_in(keys[i], k + 1).
        labels: [B] int32, or `Labels` of a net that reads a text, where "drop" is set by guidance.
        guidance: s of e_g + s (e_m - e_g), a number or [B], traced; None is
            s = 1 without the cost of the guiding prediction, where a segment has no scale of its
            own.

    Raises:
        ValueError: an unknown method, settings that the method does not have, steps that do not add
            up, an interval out of order; at the call, shapes that do not fit, or guidance without
            `null_label`.
    """
    trajectory = make_trajectory(
        denoise, process, method=method, segments=segments, respacing=respacing, eta=eta, clip=clip,
        guidance_channels=guidance_channels, interval=interval, guided_times=guided_times,
        null_label=null_label, sde=sde, reset_history=reset_history,
    )  # fmt: skip
    shape = tuple(shape)

    def sampler(variables, keys, labels, *, guidance=None):
        shape_of = jnp.shape(labels["labels"] if isinstance(labels, Mapping) else labels)
        if len(shape_of) != 1 or keys.shape[:1] != shape_of:
            raise ValueError(
                f"labels have shape {shape_of} and keys {keys.shape}; one of each per image is "
                "needed (row_keys makes keys)"
            )

        def draw(number):
            own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
            return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(own)

        noise = lambda k: draw(k + 1)
        return trajectory(variables, draw(0), noise, labels, guidance=guidance)

    return sampler


def _solver(process, method, steps, *, respacing, eta, clip, sde, restarts) -> Solver:
    """The solver; settings that do not apply are refused.

    Raises:
        ValueError: with the numbers.
    """
    if isinstance(process, Solver):
        if (respacing, eta, clip, sde, restarts) != (None, 0.0, False, None, None):
            raise ValueError("settings of a method beside a solver, which has its own")
        kept = len(jax.tree.leaves(process.inputs)[0])
        if kept != steps:
            raise ValueError(f"the solver has {kept} iterations, the segments have {steps} steps")
        return process
    if restarts is not None and method != "dpm++2m":
        raise ValueError(f"reset_history is of method='dpm++2m', not of {method!r}")
    if isinstance(process, FlowMatching):
        for name, value in (("respacing", respacing), ("eta", eta), ("clip", clip)):
            if value:
                raise ValueError(f"{name}={value!r} is of Gaussian diffusion, not of flow matching")
        return flow_solver(process, method, steps, sde)
    if sde is not None:
        raise ValueError("settings of the SDE are of flow matching, not of Gaussian diffusion")
    solver = gaussian_solver(
        process, method, str(steps) if respacing is None else respacing,
        eta=eta, clip=clip, restarts=restarts or (),
    )  # fmt: skip
    kept = len(solver.inputs["i"])
    if kept != steps:
        raise ValueError(
            f"respacing={respacing!r} keeps {kept} timesteps, the segments have {steps} steps"
        )
    return solver


def _bind(
    denoise, variables, labels, segment, scale, times=None, **options
) -> Callable[[Array, Array], Array]:
    """predict(x, scalar time) -> the guided output of a stretch; see `guided_times`."""

    def predict(x, time):
        t = jnp.full((x.shape[0],), time)
        out = lambda s: guided_prediction(denoise, variables, x, t, labels, segment, s, **options)
        if times is None or scale is None:
            return out(scale)
        return lax.cond(guides_at(times, time), lambda: out(scale), lambda: out(None))

    return predict


def _told(labels: Labels, null_label: int | None) -> Labels:
    """Labels as the net gets them; a mapping says what to drop if the net has learned that."""
    if not isinstance(labels, Mapping):
        return jnp.asarray(labels, jnp.int32)
    drop = {} if null_label is None else {"drop": jnp.zeros(len(labels["labels"]), bool)}
    return {**labels, "labels": jnp.asarray(labels["labels"], jnp.int32), **drop}


def _check_call(start, labels, guidance, segments, null_label, guidance_channels) -> None:
    """Shapes of a call.

    Raises:
        ValueError: with the numbers.
    """
    rows, channels = jnp.shape(start)[0], jnp.shape(start)[-1]
    told = labels if isinstance(labels, Mapping) else {"labels": labels}
    for name, value in told.items():
        if jnp.shape(value)[: None if name == "labels" else 1] != (rows,):
            raise ValueError(f"{name} have shape {jnp.shape(value)}; {rows} images need ({rows},)")
    if not 0 <= guidance_channels <= channels:
        raise ValueError(
            f"guidance_channels={guidance_channels}, but images have {channels}; 0 guides all"
        )
    if guidance is None:
        return
    if jnp.shape(guidance) not in ((), (rows,)):
        raise ValueError(
            f"guidance has shape {jnp.shape(guidance)}; it is a number or one per image ({rows},)"
        )
    if null_label is None and any(s.guide == "null" for s in segments):
        raise ValueError("guidance needs null_label, the label of no class")
