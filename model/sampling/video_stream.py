"""Videos frame by frame, at constant memory: sampling of block-causal nets.

All frames of a video have the same noise level at a step, and a frame sees those before it at that
level. So the net's state is kept once for every evaluation of a step, and the frames can be drawn
one after the other: the same video as by `make_trajectory`, of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .diffusion import Labels, Segment, guided_prediction
from .level_solvers import iterations
from .solvers import Solver, slice_inputs

# extend(variables, x [B, f, H, W, C], t [B], labels, frame, state) -> (out, state)
Extend = Callable[[Any, Array, Array, Labels, Array, Any], tuple[Array, Any]]


class VideoStream(NamedTuple):
    """A sampler of frames.

    Attributes:
        init: (rows) -> the states before the first frame, arrays [iterations, evaluations, ..].
        frame: (variables, start [B, f, H, W, C], number, states, labels, *, guidance=None, noise)
            -> (x [B, f, H, W, C], states): frame `number` (traced, 0 the first) out of its initial
            noise. `guidance` as of `make_diffusion_sampler`, None for a stream without; noise(k)
            gives that of iteration k, for solvers that draw.
    """

    init: Callable[[int], Any]
    frame: Callable[..., tuple[Array, Any]]


def make_video_stream(
    extend: Extend,
    init_state: Callable[[int], Any],
    solver: Solver,
    *,
    frame_shape: tuple[int, ...],
    guided: bool,
    null_label: int | None = None,
) -> VideoStream:
    """The pure functions of a stream; `frame` is to be jitted by the caller.

    Args:
        extend: the net by one frame of patches, see `TextVideoDiH.extend`.
        init_state: (rows) -> its state before the first frame, batch of `rows`.
        solver: of the process, e.g. `level_solver`; it evaluates the net a fixed number of times
            per iteration.
        frame_shape: (f, H, W, C) of a frame of patches.
        guided: whether there is guidance, for which rows and states are doubled.
        null_label: the label of no class; nets of texts take any number.

    Raises:
        ValueError: guidance without null_label.
    """
    if guided and null_label is None:
        raise ValueError("guidance needs null_label, the label of no class")
    count, per_row = iterations(solver), 1 + guided
    evaluations = _evaluations(solver, frame_shape)

    def init(rows: int):
        one = init_state(rows * per_row)
        return jax.tree.map(lambda a: jnp.zeros((count, evaluations, *a.shape), a.dtype), one)

    def frame(variables, start, number, states, labels, *, guidance=None, noise=None):
        if (guidance is not None) != guided:
            raise ValueError(f"guidance={guidance!r} in a stream made with guided={guided}")
        start = start.astype(jnp.promote_types(start.dtype, jnp.float32))
        labels = dict(labels) if isinstance(labels, Mapping) else {"labels": labels}
        labels["drop"] = jnp.zeros(len(start), bool)

        def one(state, inputs):
            k, at, before = inputs
            after: list[Any] = []

            def predict(x, time):
                def denoise(variables, x, t, told, mode):
                    own = jax.tree.map(lambda a: a[len(after)], before)
                    out, new = extend(variables, x, t, told, number, own)
                    after.append(new)
                    return out

                return guided_prediction(
                    denoise, variables, x, jnp.full((len(x),), time), labels, Segment(steps=1),
                    guidance, null_label=null_label, channels=x.shape[-1],
                )  # fmt: skip

            draw = (lambda: noise(k)) if noise else (lambda: jnp.zeros_like(start))
            state, _ = solver.step(predict, state, at, draw)
            return state, jax.tree.map(lambda *a: jnp.stack(a), *after)

        numbers = slice_inputs(solver.inputs, 0, count, start.dtype)
        state, states = lax.scan(one, solver.begin(start), (jnp.arange(count), numbers, states))
        return solver.sample(state), states

    return VideoStream(init, frame)


def make_stream_sampler(
    extend: Extend,
    init_state: Callable[[int], Any],
    solver: Solver,
    *,
    shape: tuple[int, ...],
    patch_frames: int,
    guided: bool,
    null_label: int | None = None,
) -> Callable[..., Array]:
    """A pure function that draws whole videos frame by frame; to be jitted by the caller.

    With the keys of `make_diffusion_sampler` the same videos, in the memory that one frame takes
    besides the videos themselves.

    Args:
        extend, init_state, solver, guided, null_label: as of `make_video_stream`.
        shape: (F, H, W, C) of a video, which may be longer than those trained on.
        patch_frames: frames of a patch; divides F.

    Returns:
        sampler(variables, keys [B], labels, *, guidance=None) -> x [B, F, H, W, C] float32, where
        guidance is a number where `guided`, else None.

    Raises:
        ValueError: patches do not divide the video, or guidance without null_label.
    """
    count, *place = shape
    if count % patch_frames:
        raise ValueError(f"{count} frames are not divisible by patch_frames={patch_frames}")
    frames, size = count // patch_frames, (patch_frames, *place)
    stream = make_video_stream(
        extend, init_state, solver, frame_shape=size, guided=guided, null_label=null_label
    )

    def sampler(variables, keys, labels, *, guidance=None):
        def draw(number):
            """Noise of iteration number - 1, by frames [frames, B, f, H, W, C]; 0: at the start."""
            own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
            noise = jax.vmap(lambda key: jax.random.normal(key, tuple(shape), jnp.float32))(own)
            return jnp.moveaxis(noise.reshape(len(keys), frames, *size), 1, 0)

        def one(states, inputs):
            number, start = inputs
            noise = lambda k: draw(k + 1)[number]
            x, states = stream.frame(
                variables, start, number, states, labels, guidance=guidance, noise=noise
            )
            return states, x

        start = (jnp.arange(frames), draw(0))
        _, x = lax.scan(one, stream.init(len(keys)), start)
        return jnp.moveaxis(x, 0, 1).reshape(len(keys), *shape)

    return sampler


def _evaluations(solver: Solver, shape: tuple[int, ...]) -> int:
    """How often a step of the solver evaluates the net."""
    calls: list[Any] = []

    def predict(x, time):
        calls.append(time)
        return x

    def step(x):
        at = jax.tree.map(lambda a: a[0], slice_inputs(solver.inputs, 0, 1, x.dtype))
        return solver.step(predict, solver.begin(x), at, lambda: x)[0]

    jax.eval_shape(step, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    return len(calls)
