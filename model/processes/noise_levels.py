"""Diffusion and flow matching by the level of noise: PoM's image and video models (arXiv
2411.12663).

The net gets t in 0..T (T = 1000) and sigma = t / T is the level of noise, 0 data and 1 noise.

    "velocity"  x_t = (1 - sigma) x + sigma noise,              the net says noise - x
    "eps"       x_t = sqrt(1 - sigma) x + sqrt(sigma) noise,    the net says noise

The first is flow matching on the linear path of model/processes/flow.py, backwards in time:
velocity -u at 1 - sigma. Arrays are channels last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from .flow import FlowMatching, interpolate
from .gaussian import mean_flat

PREDICT = ("velocity", "eps")
SCHEDULES = ("linear", "sine", "cosine", "sigmoid", "karras", "late_sigmoid")
SMALLEST = 1e-6  # of a noise variance, and of what it leaves
BASE_SIDE = 32  # latent side at which levels are not rescaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """What is noised and learned.

    Attributes:
        timesteps: T; training draws t from 0..T-1.
        predict: see above.
        latent_side: s of sigma = r(t / T), see `rescaled_level`, with predict="velocity": larger
            images get more noise at the same t. 0: sigma = t / T.

    Raises:
        ValueError: an unknown prediction, too few timesteps, or a side with predict="eps".
    """

    timesteps: int = 1000
    predict: str = "velocity"
    latent_side: int = 0

    def __post_init__(self):
        if self.predict not in PREDICT:
            raise ValueError(f"predict={self.predict!r}; choose {' or '.join(PREDICT)}")
        if self.timesteps < 1:
            raise ValueError(f"timesteps={self.timesteps}; at least 1 is needed")
        if self.latent_side < 0 or (self.latent_side and self.predict == "eps"):
            raise ValueError(
                f"latent_side={self.latent_side} with predict={self.predict!r}; levels are "
                "rescaled with predict='velocity' only"
            )


def rescaled_level(u: Array, latent_side: int) -> Array:
    """r(u) = u q / (1 + (q - 1) u), q = sqrt(latent_side / 32); r(0) = 0, r(1) = 1. Of jax's or
    numpy's arrays."""
    q = math.sqrt(latent_side / BASE_SIDE)
    return u * q / (1 + (q - 1) * u)


def noise_variance(schedule: str, u, xp=jnp):
    """The noise variance sigma(u) of samplers of noise predictions, u in 0..1; within 1e-6 of 0 and
    1 at most, so that its logarithm exists ("late_sigmoid": within 1e-9 of 0, and up to 1).

        "linear": u;  "sine": sin(pi u / 2);  "cosine": 1 - cos(pi u / 2);
        "sigmoid": s(4 u - 2) from 0 to 1;  "late_sigmoid": 1 less s(2 - 8 u), from 0 to 1;
        "karras": 1 - (2^(1/7) + u (0.01^(1/7) - 2^(1/7)))^7

    xp: jax.numpy, or numpy for tables in float64.

    Raises:
        ValueError: an unknown schedule.
    """
    s = lambda x: 1 / (1 + xp.exp(-x))
    rho, low, high = 7, 0.01 ** (1 / 7), 2.0 ** (1 / 7)
    one = lambda x: 1 / (1 + math.exp(-x))
    kinds = {
        "linear": lambda: u,
        "sine": lambda: xp.sin(math.pi / 2 * u),
        "cosine": lambda: 1 - xp.cos(math.pi / 2 * u),
        "sigmoid": lambda: (s(4 * u - 2) - one(-2)) / (one(2) - one(-2)),
        "karras": lambda: 1 - (high + u * (low - high)) ** rho,
        "late_sigmoid": lambda: 1 - (one(6) - s((4 * u - 1) / 0.5)) / (one(6) - one(-2)),
    }
    if schedule not in kinds:
        raise ValueError(f"schedule={schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if schedule == "late_sigmoid":
        return xp.clip(kinds[schedule](), 1e-9, 1.0)
    return xp.clip(kinds[schedule](), SMALLEST, 1 - SMALLEST)


def noise_level(process: NoiseLevels, t: Array) -> Array:
    """sigma(t), of the shape of t, at least float32."""
    t = jnp.asarray(t)
    u = t.astype(jnp.promote_types(t.dtype, jnp.float32)) / process.timesteps
    return rescaled_level(u, process.latent_side) if process.latent_side else u


def add_noise(process: NoiseLevels, x: Array, t: Array, noise: Array) -> Array:
    """x_t [B, .., C] of data x and noise, at times t [B]."""
    sigma = noise_level(process, t)
    if process.predict == "velocity":
        return interpolate(FlowMatching(), x, 1 - sigma, noise)[0]
    sigma = sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))
    return jnp.sqrt(1 - sigma) * x + jnp.sqrt(sigma) * noise


def target(process: NoiseLevels, x: Array, noise: Array) -> Array:
    """What the net should say of x_t, whatever t."""
    return noise - x if process.predict == "velocity" else noise


def draw_times(process: NoiseLevels, key: Array, rows: int) -> Array:
    """[rows] int32, uniform in 0..T-1."""
    return jax.random.randint(key, (rows,), 0, process.timesteps)


def spread_times(process: NoiseLevels, key: Array, rows: int) -> Array:
    """[rows] int32, one in each of `rows` equal shares of 0..T-1: for losses that vary less."""
    place = (jnp.arange(rows) + jax.random.uniform(key, (rows,))) / rows
    return jnp.minimum((place * process.timesteps).astype(jnp.int32), process.timesteps - 1)


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
        x: data [B, .., C]. noise: the same shape, standard normal. t: [B] in 0..T-1, which the net
            gets as it is, whether levels are rescaled or not.

    Returns:
        loss [B] float32, and {"mse": the same}.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    out = denoise(add_noise(process, x, t, noise), t).astype(x.dtype)
    mse = mean_flat(jnp.square(out - target(process, x, noise)))
    return mse, {"mse": mse}
