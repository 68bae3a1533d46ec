"""Steps of diffusion samplers, as (numbers per iteration, state, step): what a scan needs.

A solver knows nothing of nets, guidance, or random keys. Iteration k = 0 is the noisiest. All
numbers of a schedule are computed in float64 on the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..processes import flow
from ..processes.flow import FlowMatching
from ..processes.gaussian import (
    GaussianDiffusion,
    GaussianTables,
    eps_from_x_start,
    gaussian_tables,
    predictions,
)

LAST_STEPS = ("mean", "tweedie", "euler", "none")
GAUSSIAN_METHODS = ("ddpm", "ddim", "euler", "heun", "dpm++2m")
FLOW_METHODS = ("euler", "heun", "sde")

# A net's output at (x [B, .., C], the process's time, a scalar).
Predict = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDE:
    """Settings of the sampler "sde" of flow matching (arXiv 2401.08740, section 3.3).

    Attributes:
        form, norm: of D(t), see `flow.diffusion`.
        last: the last step, from t = 1 - `last_size` to the data: "mean" (the drift alone), "euler"
            (the ODE's velocity), "tweedie" (the posterior mean), or "none" (all steps are alike).
        last_size: see above; not used by "none".
    """

    form: str = "sigma"
    norm: float = 1.0
    last: str = "mean"
    last_size: float = 0.04

    def __post_init__(self):
        if self.form not in flow.DIFFUSION_FORMS:
            raise ValueError(f"form={self.form!r}; choose one of {', '.join(flow.DIFFUSION_FORMS)}")
        if self.last not in LAST_STEPS:
            raise ValueError(f"last={self.last!r}; choose one of {', '.join(LAST_STEPS)}")
        if not 0 < self.last_size < 1:
            raise ValueError(f"last_size={self.last_size} is not between 0 and 1")


class Solver(NamedTuple):
    """What a loop over the iterations needs.

    Attributes:
        inputs: tree of arrays [K, ..]: the numbers of every iteration.
        begin: initial noise [B, .., C] -> state.
        step: (predict, state, numbers of the iteration, noise) -> (state, seen); noise() gives
            [B, .., C]; seen: {"x_start": the clean image predicted} where the method has one.
        sample: state -> x [B, .., C].
    """

    inputs: Any
    begin: Callable[[Array], Any]
    step: Callable[..., tuple[Any, dict[str, Array]]]
    sample: Callable[[Any], Array] = lambda state: state


# ---------------------------------------------------------------- Gaussian diffusion


def gaussian_solver(
    process: GaussianDiffusion,
    method: str,
    timesteps: str | Sequence[int],
    *,
    eta: float = 0.0,
    clip: bool = False,
    restarts: Sequence[int] = (),
) -> Solver:
    """Solvers of Gaussian diffusion.

    "ddpm": ancestral sampling (arXiv 2006.11239, algorithm 2). "ddim" (arXiv 2010.02502, equation
    12). With s = sqrt(1 / abar - 1) the flow is d(x / sqrt(abar)) = eps ds: "euler", the same as
    "ddim" at eta 0, and "heun" (arXiv 2206.00364, algorithm 1; two evaluations a step, the last
    has one). "dpm++2m": second-order multistep in log(1 / s) on predicted clean images (arXiv
    2211.01095, algorithm 2), whose first and last step are of first order.

    Args:
        timesteps: see `gaussian_tables`.
        eta: of "ddim": 0 is deterministic, 1 has DDPM's noise.
        clip: predicted clean images to [-1, 1].
        restarts: iterations at which "dpm++2m" forgets its history.

    Raises:
        ValueError: an unknown method, or a setting that the method does not have.
    """
    if method not in GAUSSIAN_METHODS:
        raise ValueError(f"method={method!r}; Gaussian diffusion has {', '.join(GAUSSIAN_METHODS)}")
    if eta and method != "ddim":
        raise ValueError(f"eta={eta} is of method='ddim', not of {method!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} is not between 0 and 1")
    tables = gaussian_tables(process, timesteps)
    times = jnp.asarray(tables.timestep_map, jnp.int32)

    def look(predict: Predict, x: Array, i: Array):
        """The prediction at step i, and the noise it implies after clipping."""
        found = predictions(process, tables, predict(x, times[i]), x, i, clip=clip)
        return found, eps_from_x_start(tables, x, i, found.x_start)

    if method == "ddpm":

        def step(predict, x, at, noise):
            found, _ = look(predict, x, at["i"])
            scale = jnp.exp(0.5 * found.log_variance)
            # The last step is its mean: selected, so that no variance can make it NaN.
            x = found.mean + jnp.where(at["i"] > 0, scale, 0.0) * noise()
            return x, {"x_start": found.x_start}

        return Solver({"i": _downwards(tables)}, lambda x: x, step)

    if method == "dpm++2m":
        return _multistep(tables, look, restarts)

    numbers = _ddim_numbers(tables, eta)

    def step(predict, x, at, noise):
        found, eps = look(predict, x, at["i"])
        if method == "heun":
            euler = at["ratio"] * x + at["delta"] * eps

            def corrected():
                return 0.5 * (eps + look(predict, euler, at["i"] - 1)[1])

            # At the last step there is no noise level left at which to look again.
            eps = lax.cond(at["i"] > 0, corrected, lambda: eps)
            return at["ratio"] * x + at["delta"] * eps, {"x_start": found.x_start}
        x = at["signal"] * found.x_start + at["direction"] * eps
        if eta:
            x = x + at["sigma"] * noise()
        return x, {"x_start": found.x_start}

    return Solver(numbers, lambda x: x, step)


def _downwards(tables: GaussianTables) -> np.ndarray:
    """K-1, .., 0."""
    return np.arange(tables.steps - 1, -1, -1, dtype=np.int32)


def _ddim_numbers(tables: GaussianTables, eta: float) -> dict[str, np.ndarray]:
    """Coefficients of a step: on x_start, eps and noise; and, without noise, on x and eps."""
    level, prev = tables.alphas_cumprod, tables.alphas_cumprod_prev
    sigma = eta * np.sqrt((1 - prev) / (1 - level)) * np.sqrt(1 - level / prev)
    slope = lambda level: np.sqrt(1 / level - 1)
    numbers = {
        "signal": np.sqrt(prev),
        "direction": np.sqrt(np.maximum(1 - prev - sigma**2, 0.0)),
        "sigma": sigma,  # 0 at the last step, where prev is 1
        "ratio": np.sqrt(prev / level),
        "delta": np.sqrt(prev) * (slope(prev) - slope(level)),
    }
    return {"i": _downwards(tables)} | {n: v[::-1] for n, v in numbers.items()}


def _multistep(tables: GaussianTables, look, restarts: Sequence[int]) -> Solver:
    """DPM-Solver++(2M); the state is (x, the clean image predicted in the iteration before)."""
    level, prev = tables.alphas_cumprod[::-1], tables.alphas_cumprod_prev[::-1]
    with np.errstate(divide="ignore"):
        log_ratio = lambda level: 0.5 * np.log(level / (1 - level))
        width = log_ratio(prev) - log_ratio(level)  # infinite at the last step: x = x_start
    before = np.append(np.inf, width[:-1])
    first = np.isinf(width) | np.isinf(before)
    first[list(restarts)] = True
    extra = np.zeros_like(width)
    extra[~first] = 0.5 * width[~first] / before[~first]  # 1 / (2 r)
    numbers = {
        "i": _downwards(tables),
        "keep": np.sqrt((1 - prev) / (1 - level)),
        "move": np.sqrt(prev) * -np.expm1(-width),
        "extra": extra,
    }

    def step(predict, state, at, noise):
        x, last = state
        found, _ = look(predict, x, at["i"])
        target = found.x_start + at["extra"] * (found.x_start - last)
        return (at["keep"] * x + at["move"] * target, found.x_start), {"x_start": found.x_start}

    return Solver(numbers, lambda x: (x, jnp.zeros_like(x)), step, lambda state: state[0])


# ---------------------------------------------------------------- flow matching


def flow_solver(process: FlowMatching, method: str, steps: int, sde: SDE | None = None) -> Solver:
    """Solvers of flow matching, over `steps` iterations on an even grid.

    "euler" and "heun" (two evaluations a step) of the ODE dx = v dt; "sde": Euler-Maruyama, of
    whose iterations the last is the last step of `sde` (arXiv 2401.08740, section 3.3). Where the
    net says the data, the last step of "heun" is one of "euler", for the data have no velocity at
    t = 1 (JiT, arXiv 2511.13720).

    Raises:
        ValueError: an unknown method, settings of the SDE without it, or too few steps.
    """
    if method not in FLOW_METHODS:
        raise ValueError(f"method={method!r}; flow matching has {', '.join(FLOW_METHODS)}")
    if method == "sde":
        return _euler_maruyama(process, steps, sde or SDE())
    if sde is not None:
        raise ValueError(f"settings of the SDE are of method='sde', not of {method!r}")
    start, end = flow.sampling_interval(process)
    grid = np.linspace(start, end, steps + 1)
    numbers = {"t": grid[:-1], "next": grid[1:], "dt": np.diff(grid)}
    numbers["last"] = np.arange(steps) == steps - 1
    data = process.predict == "data"
    velocity_of = lambda predict, x, t: flow.velocity(process, predict(x, t), x, t)

    def step(predict, x, at, noise):
        v = velocity_of(predict, x, at["t"])
        if method == "heun":
            ahead = x + at["dt"] * v
            corrected = lambda: 0.5 * (v + velocity_of(predict, ahead, at["next"]))
            v = lax.cond(at["last"], lambda: v, corrected) if data else corrected()
        return x + at["dt"] * v, {}

    return Solver(numbers, lambda x: process.noise_scale * x, step)


def _euler_maruyama(process: FlowMatching, steps: int, sde: SDE) -> Solver:
    """Between the ends of the interval, and then the last step."""
    with_last = sde.last != "none"
    if steps < 1 + with_last:
        raise ValueError(f"steps={steps}; the SDE with last={sde.last!r} takes {1 + with_last}")
    size = sde.last_size if with_last else 0.0
    start, end = flow.sampling_interval(process, form=sde.form, last_size=size)
    grid = np.linspace(start, end, steps + 1 - with_last)
    times, widths = (grid, np.append(np.diff(grid), size)) if with_last else (
        grid[:-1], np.diff(grid),
    )  # fmt: skip
    noisy = np.ones(steps, bool)
    noisy[-1] = not with_last
    numbers = {"t": times, "dt": widths, "noisy": noisy}

    def step(predict, x, at, noise):
        t, dt = at["t"], at["dt"]
        out = predict(x, t)
        v, score = flow.velocity(process, out, x, t), flow.score(process, out, x, t)
        form = flow.diffusion(process, sde.form, t, sde.norm)
        scale = jnp.where(at["noisy"], jnp.sqrt(2 * form * dt), 0.0)
        new = x + dt * (v + form * score) + scale * noise()
        if sde.last == "euler":
            new = jnp.where(at["noisy"], new, x + dt * v)
        elif sde.last == "tweedie":
            c = flow.coefficients(process, t)
            clean = (x + c.sigma**2 * score) / c.alpha
            new = jnp.where(at["noisy"], new, clean)
        return new, {}

    return Solver(numbers, lambda x: process.noise_scale * x, step)


def slice_inputs(inputs: Any, start: int, end: int, dtype) -> Any:
    """Iterations start..end of a solver's numbers, floats as `dtype`."""
    cut = lambda a: a[start:end].astype(dtype) if a.dtype.kind == "f" else a[start:end]
    return jax.tree.map(lambda a: jnp.asarray(cut(a)), inputs)
