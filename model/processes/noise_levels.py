"""Processes named by the share of noise: those that PoM's image and video nets were trained with
(arXiv 2411.12663).

Time t runs from 0 (data) to T (noise), and sigma = r(t / T) is the share of noise, of amplitude
where the net learns a velocity, of variance where it learns the noise:

    velocity   x_t = (1 - sigma) x + sigma noise                target noise - x = d x_t / d sigma
    eps        x_t = sqrt(1 - sigma) x + sqrt(sigma) noise      target noise

The net gets t, not t / T. Arrays are channels last, times [B], everything at least float32.
Solvers are in model/sampling/level_solvers.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .gaussian import mean_flat

LEARNED = ("velocity", "eps")
UNSHIFTED_SIDE = 32  # side of the latents for which shift is 1
KARRAS_RHO, KARRAS_LOW, KARRAS_HIGH = 7, 0.01, 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """What is noised how, and what the net says of it.

    Attributes:
        timesteps: T.
        predict: "velocity" or "eps", see above.
        shift: q of sigma = q u / (1 + (q - 1) u), u = t / T: above 1, more of the time is noisy, as
            larger images want (`shift_of_side`). Of velocities.

    Raises:
        ValueError: an unknown choice, too few timesteps, or a shift that does not apply.
    """

    timesteps: int = 1000
    predict: str = "velocity"
    shift: float = 1.0

    def __post_init__(self):
        if self.predict not in LEARNED:
            raise ValueError(f"predict={self.predict!r}; choose {' or '.join(LEARNED)}")
        if self.timesteps < 2:
            raise ValueError(f"timesteps={self.timesteps}; at least 2 are needed")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift={self.shift} is not positive")
        if self.predict == "eps" and self.shift != 1:
            raise ValueError(f"shift={self.shift} is of predict='velocity'; set shift=1")


def shift_of_side(side: int) -> float:
    """The shift for latents of `side` x `side`: sqrt(side / 32), so that an image keeps the ratio
    of signal to noise that its content has at the side 32."""
    return math.sqrt(side / UNSHIFTED_SIDE)


def shifted(u, shift: float):
    """q u / (1 + (q - 1) u): 0 and 1 stay, levels between rise where q > 1. Any array."""
    return shift * u / (1 + (shift - 1) * u)


def noise_level(process: NoiseLevels, t: Array) -> Array:
    """sigma of times t, of their shape, float32 or more."""
    t = jnp.asarray(t)
    u = t.astype(jnp.promote_types(t.dtype, jnp.float32)) / process.timesteps
    return shifted(u, process.shift)


def add_noise(process: NoiseLevels, x: Array, t: Array, noise: Array) -> Array:
    """x_t of data x [B, .., C], times [B] and standard normal noise like x."""
    sigma = noise_level(process, t)
    sigma = sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))
    if process.predict == "velocity":
        return x + sigma * (noise - x)
    return jnp.sqrt(1 - sigma) * x + jnp.sqrt(sigma) * noise


def target(process: NoiseLevels, x: Array, noise: Array) -> Array:
    """What the net should say at any time."""
    return noise - x if process.predict == "velocity" else noise


def draw_times(process: NoiseLevels, key: Array, rows: int) -> Array:
    """[rows] int32, uniform in 0..T-1."""
    return jax.random.randint(key, (rows,), 0, process.timesteps, jnp.int32)


def spread_times(process: NoiseLevels, key: Array, rows: int) -> Array:
    """[rows] int32, one in each of `rows` equal shares of 0..T-1: for losses that vary less."""
    share = (jnp.arange(rows) + jax.random.uniform(key, (rows,))) / rows
    t = jnp.floor(share * process.timesteps).astype(jnp.int32)
    return jnp.minimum(t, process.timesteps - 1)


def training_loss(
    process: NoiseLevels,
    denoise: Callable[[Array, Array], Array],
    x: Array,
    t: Array,
    noise: Array,
) -> tuple[Array, dict[str, Array]]:
    """Mean squared error of every row.

    Args:
        denoise: of (x_t, t [B]) -> [B, .., C].
        x: data [B, .., C]. t: [B] of `draw_times`. noise: like x, standard normal.

    Returns:
        loss [B] float32, and {"mse": the same}.

    Raises:
        ValueError: an output of another shape.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    out = denoise(add_noise(process, x, t, noise), t)
    if out.shape != x.shape:
        raise ValueError(f"the net says {out.shape} of data {x.shape}; both must be the same")
    error = mean_flat(jnp.square(out.astype(x.dtype) - target(process, x, noise)))
    return error, {"mse": error}


# ---------------------------------------------------------------- levels to sample at


def _sigmoid(a):
    return 1 / (1 + np.exp(-a))


def _karras(u):
    high, low = KARRAS_HIGH ** (1 / KARRAS_RHO), KARRAS_LOW ** (1 / KARRAS_RHO)
    return 1 - (high + u * (low - high)) ** KARRAS_RHO


# variance of noise by the place u in 0..1 (1: noise), its least distance from 0, and from 1
SCHEDULES = {
    "linear": (lambda u: u, 1e-6, 1e-6),
    "sine": (lambda u: np.sin(np.pi / 2 * u), 1e-6, 1e-6),
    "cosine": (lambda u: 1 - np.cos(np.pi / 2 * u), 1e-6, 1e-6),
    "sigmoid": (
        lambda u: (_sigmoid(4 * u - 2) - _sigmoid(-2)) / (_sigmoid(2) - _sigmoid(-2)), 1e-6, 1e-6,
    ),
    "karras": (_karras, 1e-6, 1e-6),
    "late_sigmoid": (
        lambda u: 1 - (_sigmoid(6) - _sigmoid((4 * u - 1) / 0.5)) / (_sigmoid(6) - _sigmoid(-2)),
        1e-9, 0.0,
    ),
}  # fmt: skip


def noise_variance(schedule: str, u: np.ndarray) -> np.ndarray:
    """Variance of the noise at places u of a sampling schedule, in float64 on the host.

    Training is "linear"; the others put their steps elsewhere.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}; choose one of {', '.join(SCHEDULES)}")
    of, below, above = SCHEDULES[schedule]
    return np.clip(of(np.asarray(u, np.float64)), below, 1 - above)
