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
