"""Solvers of processes by noise level (model/processes/noise_levels.py), and their published forms.

Published samplers of these models have grids that miss the ends, or a step too many or too few
(`published`); the forms by default go from noise to data on one grid. All numbers are computed in
float64 on the host. Iteration k = 0 is the noisiest.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..processes.noise_levels import NoiseLevels, noise_variance, rescaled_level
from .solvers import Predict, Solver

PUBLISHED = ("", "homm", "homm_up", "homm_t2v")
METHODS = {"velocity": ("euler", "heun"), "eps": ("ddim", "ddpm", "dpm")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upscale:
    """Guidance of a large image by the net's own prediction for a small one (of "heun", published
    as "homm_up").

    Attributes:
        weight: of the difference. factor: m, by which the small image is smaller.
        cutoff: it acts at times of at least cutoff T.
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
    """The solver of a process.

    predict="velocity": "euler" and "heun" of dx = v d sigma. predict="eps": "ddim" (arXiv
    2010.02502, eta 0), "ddpm" (arXiv 2006.11239), and "dpm", multistep of second order in
    log(signal / noise) on noise predictions (arXiv 2206.00927, 2211.01095), whose first step is of
    first order.

    Args:
        steps: n. There are n iterations but for "euler": n + 1 as published by "homm" and
            "homm_t2v", n - 1 by "homm_up".
        published: "" is the plain form. "homm": velocities from T-1 to 1 in steps of 1/n, noise
            predictions with steps of T/n on a grid of n - 1; "homm_up": differences of a rescaled
            grid, the rescaled time told to the net; "homm_t2v": as "homm", with differences of the
            grid in "heun".
        schedule: noise variance of "eps", see `noise_variance`.
        clip: bound of predicted clean images, 0: none (predict="eps").
        upscale: see there.

    Raises:
        ValueError: an unknown name, too few steps, or a setting that the process does not have.
    """
    if method not in METHODS[process.predict]:
        names = ", ".join(METHODS[process.predict])
        raise ValueError(f"method={method!r}; processes of predict={process.predict!r}: {names}")
    if published not in PUBLISHED:
        raise ValueError(f"published={published!r}; choose one of {', '.join(PUBLISHED[1:])}")
    least = 2 if published == "homm_up" or (published and method in ("ddim", "ddpm")) else 1
    if steps < least:
        raise ValueError(f"steps={steps}; method={method!r} takes at least {least}")
    if upscale and (method, published) != ("heun", "homm_up"):
        raise ValueError("upscale is of method='heun' with published='homm_up'")
    if process.predict == "velocity":
        if clip or schedule != "linear":
            raise ValueError("clip and schedule are of predict='eps'")
        return _velocity_solver(process, method, steps, published, upscale)
    if published in ("homm_up", "homm_t2v"):
        raise ValueError(f"published={published!r} has velocities only; choose homm")
    if method == "dpm":
        return _multistep(process, steps, bool(published), schedule, clip)
    return _variance_solver(process, method, steps, bool(published), schedule, clip)


def iterations(solver: Solver) -> int:
    """How many iterations a solver has."""
    return len(jax.tree.leaves(solver.inputs)[0])


# ---------------------------------------------------------------- velocities


def _velocity_numbers(process, method, steps, published, upscale) -> dict[str, np.ndarray]:
    """Times told to the net at a step's two ends, and its width."""
    total, side = process.timesteps, process.latent_side
    level = lambda u: rescaled_level(u, side) if side else u
    if not published:
        u = np.linspace(1, 0, steps + 1)
        at, sigma = total * u, level(u)
        return {"t": at[:-1], "next": at[1:], "dt": -np.diff(sigma)}
    grid = np.linspace(total - 1, 1, steps + 1)
    if published == "homm_up":
        sigma = level(grid / total)
        width = -np.diff(grid / total if upscale else sigma)
        told = total * sigma
        kept = steps - 1 if method == "euler" else steps
        return {"t": told[:-1][:kept], "next": told[1:][:kept], "dt": width[:kept]}
    even = np.full(steps, 1 / steps)
    if method == "euler":
        return {"t": grid, "next": grid, "dt": np.full(steps + 1, 1 / steps)}
    width = even if published == "homm" else -np.diff(grid) / total
    return {"t": grid[:-1], "next": grid[1:], "dt": width}


def _velocity_solver(process, method, steps, published, upscale) -> Solver:
    numbers = _velocity_numbers(process, method, steps, published, upscale)
    if upscale:
        numbers |= _upscale_numbers(process, steps, upscale)

    def velocity(predict: Predict, x: Array, at: dict, end: str) -> Array:
        v = predict(x, at[end])[..., : x.shape[-1]].astype(x.dtype)
        if not upscale or not upscale.weight:
            return v
        led = lambda: v + upscale.weight * _difference(predict, x, v, at[f"low_{end}"], upscale)
        return lax.cond(at[f"acts_{end}"], led, lambda: v)

    def step(predict, x, at, noise):
        v = velocity(predict, x, at, "t")
        if method == "heun":
            v = 0.5 * (v + velocity(predict, x - at["dt"] * v, at, "next"))
        return x - at["dt"] * v, {}

    return Solver(numbers, lambda x: x, step)


def _upscale_numbers(process, steps, upscale) -> dict[str, np.ndarray]:
    """Times told to the net with the small image, and where that acts, at a step's two ends."""
    total = process.timesteps
    grid = np.linspace(total - 1, 1, steps + 1)
    low = total * rescaled_level(grid / total, (process.latent_side or 32) / upscale.factor)
    acts = grid >= upscale.cutoff * total
    return {
        "low_t": low[:-1], "low_next": low[1:], "acts_t": acts[:-1], "acts_next": acts[1:],
    }  # fmt: skip


def _difference(predict: Predict, x: Array, v: Array, time: Array, upscale: Upscale) -> Array:
    """The small image's velocity / m less that of the large one made small, made large."""
    m, (batch, *_, rows, columns, channels) = upscale.factor, x.shape
    if rows % m or columns % m:
        raise ValueError(f"images of {rows} x {columns} cannot be made {m} times smaller")
    small, large = (batch, rows // m, columns // m, channels), x.shape
    resize = lambda a, shape: jax.image.resize(a, shape, "linear", antialias=False)
    low = predict(resize(x, small), time)[..., :channels].astype(x.dtype)
    return resize(low / m - resize(v, small), large)


# ---------------------------------------------------------------- noise predictions


def _look(predict: Predict, x: Array, at: dict, clip: float) -> tuple[Array, Array]:
    """The predicted clean image, within `clip`, and the noise that it leaves."""
    eps = predict(x, at["t"])[..., : x.shape[-1]].astype(x.dtype)
    signal, noise = jnp.sqrt(1 - at["now"]), jnp.sqrt(at["now"])
    clean = (x - noise * eps) / signal
    if not clip:
        return clean, eps
    bounded = jnp.where(at["clips"], jnp.clip(clean, -clip, clip), clean)
    return bounded, jnp.where(at["clips"], (x - signal * bounded) / noise, eps)


def _variance_solver(process, method, steps, published, schedule, clip) -> Solver:
    """DDIM and DDPM between noise variances `now` and `next`."""
    total = process.timesteps
    variance = lambda t: noise_variance(schedule, np.clip(t, 0, total - 1) / total, np)
    if published:
        told = np.linspace(total, 0, steps)
        after = told - total / steps
    else:
        grid = np.linspace(total - 1, 0, steps + 1)
        told, after = grid[:-1], grid[1:]
    clips = np.ones(steps, bool)
    if published and method == "ddpm":
        clips = told > 0
    numbers = {"t": told, "now": variance(told), "next": variance(after), "clips": clips}
    numbers["kept"] = np.clip((1 - numbers["now"]) / (1 - numbers["next"]), 0, 1)
    # in float64: where little changes, 1 - kept would lose its digits
    numbers["lost"] = 1 - numbers["kept"]
    numbers["drawn"] = np.sqrt(numbers["lost"])
    if not published:
        numbers["drawn"][-1] = 0  # the last step is its mean

    def step(predict, x, at, noise):
        clean, eps = _look(predict, x, at, clip)
        if method == "ddim":
            x = jnp.sqrt(1 - at["next"]) * clean + jnp.sqrt(at["next"]) * eps
        else:
            mean = (x - at["lost"] / jnp.sqrt(at["now"]) * eps) / jnp.sqrt(at["kept"])
            x = mean + at["drawn"] * noise()
        return x, {"x_start": clean}

    return Solver(numbers, lambda x: x, step)


def _multistep(process, steps, published, schedule, clip) -> Solver:
    """The state is (x, the noise predicted in the iteration before)."""
    total = process.timesteps
    grid = np.linspace(total - 1, 1 if published else 0, steps + 1)
    variance = noise_variance(schedule, grid / total, np)
    log_ratio = 0.5 * np.log((1 - variance) / variance)
    width = np.diff(log_ratio)
    extra = np.zeros(steps)
    extra[1:] = 0.5 * width[1:] / width[:-1]  # 1 / (2 r)
    level = np.sqrt(variance[1:])
    if published:
        level[0] = np.sqrt(variance[0])
    numbers = {
        "t": grid[:-1], "now": variance[:-1], "clips": np.ones(steps, bool),
        "keep": np.sqrt((1 - variance[1:]) / (1 - variance[:-1])),
        "move": level * np.expm1(width), "extra": extra,
    }  # fmt: skip

    def step(predict, state: Any, at, noise):
        x, last = state
        clean, eps = _look(predict, x, at, clip)
        ahead = eps + at["extra"] * (eps - last)
        return (at["keep"] * x - at["move"] * ahead, eps), {"x_start": clean}

    return Solver(numbers, lambda x: (x, jnp.zeros_like(x)), step, lambda state: state[0])
