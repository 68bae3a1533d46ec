"""Solvers of processes by noise level (model/processes/noise_levels.py).

By default they go from pure noise to data on one grid of levels, with steps that are the distances
of its points, and tell the net the time at which it was trained on the level. The samplers of the
published models differ from that, each in its own way; `published` names the code whose steps are
wanted as they are ("homm": images of 256 pixels, "homm_up": larger ones, "homm_t2v": videos). Their
times are those of T = 1000.

Every method is a table of numbers per iteration, made in float64 on the host, and one of two steps
that reads it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..processes.noise_levels import NoiseLevels, noise_variance, shifted
from .solvers import Predict, Solver

METHODS = {"velocity": ("euler", "heun"), "eps": ("ddim", "ddpm", "dpm")}
PUBLISHED = ("homm", "homm_up", "homm_t2v")
PUBLISHED_STEPS = 1000  # T of the published samplers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upscale:
    """Guidance of a large image by the net's own velocity of a small one, of published="homm_up":

        v + weight up(v_small / factor - down(v)),   v_small of down(x)

    Attributes:
        weight: of the guidance.
        factor: by which the small image is smaller; the resizing is bilinear.
        cutoff: it acts at times of at least this share of T.
    """

    weight: float
    factor: int = 2
    cutoff: float = 0.0


def level_solver(
    process: NoiseLevels,
    method: str,
    steps: int,
    *,
    published: str = "",
    schedule: str = "linear",
    clip: float = 0.0,
    upscale: Upscale | None = None,
) -> Solver:
    """The solver of a method, `steps` steps; how many iterations that is, `iterations` tells.

    Velocities: "euler"; "heun", the trapezoidal rule (two evaluations a step).

    Noise: "ddim" (arXiv 2010.02502, eta 0); "ddpm" (arXiv 2006.11239, algorithm 2, variance beta);
    "dpm", second-order multistep in log(signal / noise) on noise (arXiv 2211.01095, appendix B),
    first order where there is no step before or no noise after. They start at the noisiest level
    that was trained, (T - 1) / T of variance, where signal is left to be found.

    Args:
        published: "" or the code whose quirks are wanted:
            "homm" and "homm_t2v", euler: an iteration more than steps, each 1 / steps long, between
            times 999 and 1; heun: there, too, of 1 / steps long steps ("homm") or of the grid's
            ("homm_t2v"). "homm_up": the net is told the level instead of the time; euler
            leaves out the last step. ddim and ddpm: the grid has steps - 1 distances, but levels
            change by 1 / steps; ddpm does not clip the last image. dpm goes from 999 to 1, and
            scales the first step by the noise before it. Nets get the grid's time, whatever the
            schedule makes of it.
        schedule: of noise: where steps are, see `noise_variance`.
        clip: of noise: bound of predicted clean images, 0: none. The published "dpm" had 1.5.
        upscale: see there.

    Raises:
        ValueError: an unknown method, or settings that it does not have.
    """
    if method not in METHODS[process.predict]:
        known = ", ".join(METHODS[process.predict])
        raise ValueError(f"method={method!r}; there are for predict={process.predict!r}: {known}")
    if published and published not in PUBLISHED:
        raise ValueError(f"published={published!r}; choose one of {', '.join(PUBLISHED)}, or none")
    if steps < 1:
        raise ValueError(f"steps={steps}; at least 1 is needed")
    if upscale is not None and (published, method) != ("homm_up", "heun"):
        raise ValueError(
            f"upscale is of published='homm_up' and method='heun', not of {published!r}, {method!r}"
        )
    if process.predict == "velocity":
        if schedule != "linear" or clip:
            raise ValueError(
                f"schedule={schedule!r} and clip={clip} are of predict='eps'; leave them out"
            )
        table = _velocity_table(process, method, steps, published, upscale)
        return _velocity_solver(table, method, upscale)
    if published == "homm_t2v":
        raise ValueError("published='homm_t2v' has velocities only, not predict='eps'")
    table = _noise_table(process, method, steps, published, schedule)
    return _noise_solver(table | {"bound": _bounds(table, method, published, clip)})


def iterations(solver: Solver) -> int:
    """Iterations of a solver: the `steps` of the segments that it needs."""
    return len(jax.tree.leaves(solver.inputs)[0])


# ---------------------------------------------------------------- velocities


def _velocity_table(process, method, steps, published, upscale) -> dict[str, np.ndarray]:
    """t and next: times told to the net before and behind a step; dt: by how much sigma falls.

    Upscaled, also the times of the small image, and whether it acts.
    """
    if not published:
        u = np.linspace(1.0, 0.0, steps + 1)
        return _intervals(process.timesteps * u, shifted(u, process.shift))
    if process.shift != 1 and published != "homm_up":
        raise ValueError(f"published={published!r} has shift=1, not shift={process.shift}")
    if published == "homm_up" and method == "euler" and steps < 2:
        raise ValueError("published='homm_up' leaves out the last step of euler; 2 is the least")
    grid = np.linspace(PUBLISHED_STEPS - 1.0, 1.0, steps + 1)
    u = grid / PUBLISHED_STEPS
    sigma = shifted(u, process.shift)
    if upscale is not None:
        small = shifted(u, process.shift / np.sqrt(upscale.factor))
        acts = grid >= upscale.cutoff * PUBLISHED_STEPS
        return _intervals(PUBLISHED_STEPS * sigma, u) | {
            "small_t": PUBLISHED_STEPS * small[:-1], "small_next": PUBLISHED_STEPS * small[1:],
            "acts_t": acts[:-1], "acts_next": acts[1:],
        }  # fmt: skip
    if published == "homm_up":
        table = _intervals(PUBLISHED_STEPS * sigma, sigma)
        kept = steps - (method == "euler")
        return {name: numbers[:kept] for name, numbers in table.items()}
    if method == "euler":
        return {"t": grid, "dt": np.full(len(grid), 1 / steps)}
    table = _intervals(grid, u)
    return table if published == "homm_t2v" else table | {"dt": np.full(steps, 1 / steps)}


def _intervals(times: np.ndarray, levels: np.ndarray) -> dict[str, np.ndarray]:
    """Of the points of a grid: K + 1 of them make K steps."""
    return {"t": times[:-1], "next": times[1:], "dt": levels[:-1] - levels[1:]}


def _velocity_solver(table: dict[str, np.ndarray], method: str, upscale: Upscale | None) -> Solver:
    """Euler's rule, or Heun's."""

    def velocity(predict: Predict, x: Array, at: dict, when: str) -> Array:
        v = predict(x, at[when])
        if upscale is None or not upscale.weight:
            return v
        led = lambda: v + upscale.weight * _from_small(predict, x, v, at["small_" + when], upscale)
        return lax.cond(at["acts_" + when], led, lambda: v)

    def step(predict, x, at, noise):
        v = velocity(predict, x, at, "t")
        if method == "heun":
            v = 0.5 * (v + velocity(predict, x - at["dt"] * v, at, "next"))
        return x - at["dt"] * v, {}

    return Solver(table, lambda x: x, step)


def _from_small(predict: Predict, x: Array, v: Array, time: Array, upscale: Upscale) -> Array:
    """up(v_small / factor - down(v)), of the shape of v."""
    height, width, m = x.shape[-3], x.shape[-2], upscale.factor
    if height % m or width % m:
        raise ValueError(f"images of {height} x {width} cannot be made {m} times smaller")

    def resized(a: Array, height: int, width: int) -> Array:
        shape = (*a.shape[:-3], height, width, a.shape[-1])
        return jax.image.resize(a, shape, "bilinear", antialias=False)

    down = lambda a: resized(a, height // m, width // m)
    return resized(predict(down(x), time) / m - down(v), height, width)


# ---------------------------------------------------------------- noise


def _noise_table(process, method, steps, published, schedule) -> dict[str, np.ndarray]:
    """The time told to the net, amplitudes of signal and noise in x, and the step

    keep x + push eps + bend (eps - the eps before) + kick noise.
    """
    t, now, after = _variances(process, method, steps, published, schedule)
    signal, noise = np.sqrt(1 - now), np.sqrt(now)
    keep, left = np.sqrt((1 - after) / (1 - now)), np.sqrt(after)
    # x = signal x_start + noise eps at one level and at the next: what DDIM does, and, as
    # left (e^h - 1) = keep noise - left, what every first-order step in log(signal / noise) does.
    push, bend, kick = left - keep * noise, np.zeros(steps), np.zeros(steps)
    if method == "ddpm":
        alpha = np.clip((1 - now) / (1 - after), 0.0, 1.0)
        keep, push = 1 / np.sqrt(alpha), -(1 - alpha) / (noise * np.sqrt(alpha))
        kick = np.where(after > 0, np.sqrt(1 - alpha), 0.0)
    elif method == "dpm":
        bend = 0.5 * push * _growth(now, after)
        if published:
            push[0] *= noise[0] / left[0]
    return {
        "t": t, "signal": signal, "noise": noise, "keep": keep, "push": push, "bend": bend,
        "kick": kick,
    }  # fmt: skip


def _variances(process, method, steps, published, schedule):
    """(time told to the net, variance of noise before a step, and behind it), [steps] each."""
    T = process.timesteps
    if not published:
        levels = np.minimum(noise_variance(schedule, np.linspace(1, 0, steps + 1)), (T - 1) / T)
        levels[-1] = 0.0
        return T * levels[:-1], levels[:-1], levels[1:]
    if method == "dpm":
        grid = np.linspace(PUBLISHED_STEPS - 1.0, 1.0, steps + 1)
        levels = noise_variance(schedule, grid / PUBLISHED_STEPS)
        return grid[:-1], levels[:-1], levels[1:]
    t = np.linspace(T, 0.0, steps)
    variance = lambda t: noise_variance(schedule, np.clip(t, 0, T - 1) / T)
    return t, variance(t), variance(t - T / steps)


def _growth(now: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Width of a step in log(signal / noise) over that of the step before; 0 where either is not
    there: a step of first order."""
    with np.errstate(divide="ignore"):
        place = lambda variance: 0.5 * np.log((1 - variance) / variance)
        width = place(after) - place(now)
    before = np.append(0.0, width[:-1])
    fits = np.isfinite(width) & (before > 0)
    return np.divide(width, before, out=np.zeros_like(width), where=fits)


def _bounds(table, method: str, published: str, clip: float) -> np.ndarray:
    """[K]: of predicted clean images at every iteration."""
    bounds = np.full(len(table["t"]), clip or np.inf)
    if published and method == "ddpm":
        bounds[-1] = np.inf
    return bounds


def _noise_solver(table: dict[str, np.ndarray]) -> Solver:
    """The state is (x, the eps of the iteration before)."""
    clips, draws = np.isfinite(table["bound"]).any(), table["kick"].any()

    def step(predict, state, at, noise):
        x, before = state
        eps = predict(x, at["t"])
        x_start = (x - at["noise"] * eps) / at["signal"]
        if clips:  # and the eps is the one that the clipped image implies
            x_start = jnp.clip(x_start, -at["bound"], at["bound"])
            eps = (x - at["signal"] * x_start) / at["noise"]
        x = at["keep"] * x + at["push"] * eps + at["bend"] * (eps - before)
        if draws:
            x = x + at["kick"] * noise()
        return (x, eps), {"x_start": x_start}

    return Solver(table, lambda x: (x, jnp.zeros_like(x)), step, lambda state: state[0])
