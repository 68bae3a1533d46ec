"""Flow matching by stochastic interpolants: paths, conversions, diffusion forms, loss.

    x_t = alpha(t) x + sigma(t) noise,   from noise at t = 0 to data at t = 1

    velocity  u = alpha' x + sigma' noise

after SiT (arXiv 2401.08740, sections 2 and 3) and arXiv 2303.08797. The net gets t in [0, 1] as it
is; where it gives 2C channels, the second half is not used (it keeps the layout of DiT's weights).
Arrays are channels last, times [B] or scalar, everything at least float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import ndtri

from .gaussian import mean_flat

CHOICES = {
    "path": ("linear", "gvp", "vp"),
    "predict": ("velocity", "noise", "score", "data"),
    "weighting": ("none", "velocity", "likelihood"),
    "times": ("uniform", "logit_normal"),
}
VP_MIN, VP_MAX = 0.1, 20.0  # beta of the variance preserving path at data and noise
EPSILON = 1e-3  # distance from times at which a conversion divides by zero
VP_TRAIN_EPSILON = 1e-5
FLOOR = 0.05  # of 1 - t, where the velocity is computed from the data


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """What is interpolated and learned.

    Attributes:
        path: "linear": (t, 1 - t); "gvp": (sin, cos)(pi t / 2); "vp": variance preserving diffusion
            with beta from 20 (noise) down to 0.1 (data).
        predict: what the net says: "velocity", "noise", "score" (the gradient of log p_t), or, on
            the path "linear", "data": x, whose velocity (x - x_t) / max(1 - t, floor) is what the
            loss compares (JiT, arXiv 2511.13720, section 4).
        weighting: of the squared error of noise or score: 1, "velocity": (d / sigma)^2, or
            "likelihood": d / sigma^2, with d of `score_drift`.
        times: of training: "uniform", or "logit_normal": sigmoid(time_mean + time_std n) with n
            standard normal (arXiv 2403.03206, section 3.1).
        noise_scale: standard deviation of the noise at t = 0; sigma above is in units of it.
        floor: see "data".

    Raises:
        ValueError: an unknown choice, or settings that do not go together.
    """

    path: str = "linear"
    predict: str = "velocity"
    weighting: str = "none"
    times: str = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0
    noise_scale: float = 1.0
    floor: float = FLOOR

    def __post_init__(self):
        for field, names in CHOICES.items():
            if getattr(self, field) not in names:
                raise ValueError(f"{field}={getattr(self, field)!r}; choose {' or '.join(names)}")
        if self.predict in ("velocity", "data") and self.weighting != "none":
            raise ValueError(
                f"weighting={self.weighting!r} is of predict='noise' or 'score'; the velocity's "
                "error has none (weighting='none')"
            )
        if self.predict == "data" and self.path != "linear":
            raise ValueError(f"predict='data' is of path='linear', not of path={self.path!r}")
        if self.predict != "data" and self.floor != FLOOR:
            raise ValueError(f"floor={self.floor} is of predict='data', not of {self.predict!r}")
        if self.times == "uniform" and (self.time_mean, self.time_std) != (0, 1):
            raise ValueError(
                f"time_mean={self.time_mean} and time_std={self.time_std} are of "
                "times='logit_normal', not of 'uniform'"
            )
        for field in ("time_std", "noise_scale", "floor"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field}={getattr(self, field)} is not positive")


class PathCoefficients(NamedTuple):
    """alpha, sigma and their derivatives by t, of the shape of t."""

    alpha: Array
    sigma: Array
    d_alpha: Array
    d_sigma: Array


# ---------------------------------------------------------------- the path


def path_coefficients(path: str, t: Array) -> PathCoefficients:
    """alpha(t), sigma(t), alpha'(t), sigma'(t) (arXiv 2401.08740, section 3.1)."""
    if path == "linear":
        return PathCoefficients(t, 1 - t, jnp.ones_like(t), -jnp.ones_like(t))
    if path == "gvp":
        angle, half = math.pi / 2 * t, math.pi / 2
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        return PathCoefficients(sin, cos, half * cos, -half * sin)
    log_alpha, slope = _vp_log_alpha(t)
    alpha = jnp.exp(log_alpha)
    square = jnp.exp(2 * log_alpha)
    sigma = jnp.sqrt(-jnp.expm1(2 * log_alpha))
    return PathCoefficients(alpha, sigma, alpha * slope, -square * slope / sigma)


def coefficients(process: FlowMatching, t: Array) -> PathCoefficients:
    """Those of the process's path, sigma and sigma' in units of the noise that it is given, which
    has variance 1."""
    alpha, sigma, d_alpha, d_sigma = path_coefficients(process.path, t)
    scale = process.noise_scale
    return PathCoefficients(alpha, scale * sigma, d_alpha, scale * d_sigma)


def _vp_log_alpha(t: Array) -> tuple[Array, Array]:
    """m(t) = log alpha(t) of the variance preserving path, and m'(t)."""
    span, left = VP_MAX - VP_MIN, 1 - t
    return -0.25 * left**2 * span - 0.5 * left * VP_MIN, 0.5 * left * span + 0.5 * VP_MIN


def _alpha_ratio(path: str, t: Array) -> Array:
    """alpha / alpha', finite at t = 0."""
    if path == "linear":
        return t
    if path == "gvp":
        return 2 / math.pi * jnp.tan(math.pi / 2 * t)
    return 1 / _vp_log_alpha(t)[1]


def _like(x: Array, *values: Array) -> tuple[Array, ...]:
    """Values [B] or scalar with axes appended, to be broadcast against x."""
    return tuple(v.reshape(v.shape + (1,) * (x.ndim - v.ndim)) for v in map(jnp.asarray, values))


def interpolate(process: FlowMatching, x: Array, t: Array, noise: Array) -> tuple[Array, Array]:
    """(x_t, u): the noised data and its velocity. x, noise: [B, .., C]; t: [B]."""
    alpha, sigma, d_alpha, d_sigma = _like(x, *coefficients(process, t))
    return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def score_drift(process: FlowMatching, x: Array, t: Array) -> tuple[Array, Array]:
    """(m, d) of velocity = d score - m: m = -(alpha' / alpha) x, [B, .., C]; d = (alpha' / alpha)
    sigma^2 - sigma sigma', of the shape of t (arXiv 2401.08740, appendix A). Infinite at t = 0 of
    the paths "linear" and "gvp".
    """
    rate = 1 / _alpha_ratio(process.path, t)
    if process.path == "vp":
        d = rate * process.noise_scale**2  # m' (sigma^2 + alpha^2), without the cancellation
    else:
        _, sigma, _, d_sigma = coefficients(process, t)
        d = rate * sigma**2 - sigma * d_sigma
    return -_like(x, rate)[0] * x, d


# ---------------------------------------------------------------- conversions


def score_from_velocity(process: FlowMatching, v: Array, x: Array, t: Array) -> Array:
    """(r v - x) / (sigma^2 - r sigma' sigma), r = alpha / alpha'."""
    _, sigma, _, d_sigma = coefficients(process, t)
    ratio = _alpha_ratio(process.path, t)
    ratio, scale = _like(x, ratio, sigma**2 - ratio * d_sigma * sigma)
    return (ratio * v - x) / scale


def noise_from_velocity(process: FlowMatching, v: Array, x: Array, t: Array) -> Array:
    """(r v - x) / (r sigma' - sigma), r = alpha / alpha'."""
    _, sigma, _, d_sigma = coefficients(process, t)
    ratio = _alpha_ratio(process.path, t)
    ratio, scale = _like(x, ratio, ratio * d_sigma - sigma)
    return (ratio * v - x) / scale


def ends(process: FlowMatching, v: Array, x: Array, t: Array) -> tuple[Array, Array]:
    """The data and the noise between which x [B, .., C] moves with velocity v at t [B]: the
    solution of x = alpha data + sigma noise, v = alpha' data + sigma' noise."""
    alpha, sigma, d_alpha, d_sigma = _like(x, *coefficients(process, t))
    scale = alpha * d_sigma - d_alpha * sigma
    return (d_sigma * x - sigma * v) / scale, (alpha * v - d_alpha * x) / scale


def velocity_from_score(process: FlowMatching, score: Array, x: Array, t: Array) -> Array:
    """d score - m, see `score_drift`."""
    m, d = score_drift(process, x, t)
    return _like(x, d)[0] * score - m


def _said(out: Array, x: Array) -> Array:
    """The first C channels of the output, in the dtype of x.

    Raises:
        ValueError: neither C nor 2C channels.
    """
    channels = x.shape[-1]
    if out.shape[-1] not in (channels, 2 * channels):
        raise ValueError(
            f"the net gives {out.shape[-1]} channels for {channels}; {channels} or {2 * channels} "
            "are needed"
        )
    return out[..., :channels].astype(x.dtype)


def velocity(process: FlowMatching, out: Array, x: Array, t: Array) -> Array:
    """The velocity that a net's output means. out: [B, .., C or 2C]; x: [B, .., C]; t: [B] or
    scalar.

    Raises:
        ValueError: wrong channels.
    """
    out = _said(out, x)
    if process.predict == "velocity":
        return out
    if process.predict == "data":
        return (out - x) / _like(x, jnp.maximum(1 - t, process.floor))[0]
    if process.predict == "noise":
        out = -out / _like(x, coefficients(process, t).sigma)[0]
    return velocity_from_score(process, out, x, t)


def score(process: FlowMatching, out: Array, x: Array, t: Array) -> Array:
    """The score that a net's output means; arguments and errors of `velocity`. Infinite at t = 1
    but for a net that says it."""
    out = _said(out, x)
    if process.predict == "velocity":
        return score_from_velocity(process, out, x, t)
    if process.predict == "noise":
        return -out / _like(x, coefficients(process, t).sigma)[0]
    if process.predict == "data":
        alpha, sigma, *_ = _like(x, *coefficients(process, t))
        return (alpha * out - x) / sigma**2
    return out


# ---------------------------------------------------------------- SDE


DIFFUSION_FORMS = (
    "constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing",
)  # fmt: skip


def diffusion(process: FlowMatching, form: str, t: Array, norm: float = 1.0) -> Array:
    """D(t) of dx = (velocity + D score) dt + sqrt(2 D) dw, which has the marginals of the ODE for
    any D >= 0 (arXiv 2401.08740, section 3.3).

    Args:
        form: "constant": c; "sbdm": c d of `score_drift`; "sigma": c sigma; "linear": c (1 - t);
            "decreasing": (c cos(pi t) + 1)^2 / 4; "increasing_decreasing": c sin(pi t)^2.
        t: [B] or scalar. norm: c.

    Raises:
        ValueError: an unknown form.
    """
    if form == "constant":
        return norm * jnp.ones_like(t)
    if form == "sbdm":
        return norm * score_drift(process, t, t)[1]
    if form == "sigma":
        return norm * coefficients(process, t).sigma
    if form == "linear":
        return norm * (1 - t)
    if form == "decreasing":
        return 0.25 * (norm * jnp.cos(math.pi * t) + 1) ** 2
    if form == "increasing_decreasing":
        return norm * jnp.sin(math.pi * t) ** 2
    raise ValueError(f"form={form!r}; choose one of {', '.join(DIFFUSION_FORMS)}")


def sampling_interval(
    process: FlowMatching, *, form: str | None = None, last_size: float = 0.0
) -> tuple[float, float]:
    """(t0, t1) between which a sampler integrates: [0, 1] but for a margin where it would divide by
    zero.

    Args:
        form: the SDE's diffusion form; None: the ODE.
        last_size: of the SDE's last step, which starts at t1 = 1 - last_size.
    """
    divides = process.predict not in ("velocity", "data")
    start = EPSILON if process.path != "vp" and (divides or form == "sbdm") else 0.0
    if last_size:
        return start, 1.0 - last_size
    divides = divides or (form is not None and process.predict == "data")
    return start, 1.0 - EPSILON if divides or process.path == "vp" else 1.0


# ---------------------------------------------------------------- training


def draw_times(process: FlowMatching, key: Array, rows: int) -> Array:
    """[rows] float32, uniform in (0, 1), or off its ends by 0.001 where noise or score are learned,
    or below 1 - 0.00001 on the path "vp"; or logit-normal, clipped there."""
    low, high = trained_times(process)
    if process.times == "logit_normal":
        return _logit_normal(process, jax.random.normal(key, (rows,), jnp.float32))
    return jax.random.uniform(key, (rows,), jnp.float32, low, high)


def _logit_normal(process: FlowMatching, normal: Array) -> Array:
    t = jax.nn.sigmoid(process.time_mean + process.time_std * normal)
    return jnp.clip(t, *trained_times(process))


def spread_times(process: FlowMatching, key: Array, rows: int) -> Array:
    """[rows] float32, one in each of `rows` equal shares of the times of `draw_times`: for losses
    that vary less."""
    low, high = trained_times(process)
    place = (jnp.arange(rows) + jax.random.uniform(key, (rows,))) / rows
    if process.times == "logit_normal":
        return _logit_normal(process, ndtri(place))
    return low + (high - low) * place


def trained_times(process: FlowMatching) -> tuple[float, float]:
    """Lowest and highest time of `draw_times`."""
    if process.path == "vp":
        return 0.0, 1 - VP_TRAIN_EPSILON
    if process.predict in ("noise", "score"):
        return EPSILON, 1 - EPSILON
    return 0.0, 1.0


def training_loss(
    process: FlowMatching,
    denoise: Callable[[Array, Array], Array],
    x: Array,
    t: Array,
    noise: Array,
) -> tuple[Array, dict[str, Array]]:
    """Loss of every row: mean (v - u)^2, w mean (eps - noise)^2, or w mean (sigma s + noise)^2;
    of data, mean ((x' - x) / max(1 - t, floor))^2.

    Args:
        denoise: of (x_t, t [B] float32) -> [B, .., C or 2C].
        x: data [B, .., C]. noise: the same shape, standard normal. t: [B] in (0, 1).

    Returns:
        loss [B] float32, and {"mse": the same without the weight w}.

    Raises:
        ValueError: wrong channels.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x_t, target = interpolate(process, x, t, noise)
    out = _said(denoise(x_t, t), x)
    sigma = coefficients(process, t).sigma
    if process.predict == "velocity":
        error = out - target
    elif process.predict == "data":
        error = (out - x) / _like(x, jnp.maximum(1 - t, process.floor))[0]
    elif process.predict == "noise":
        error = out - noise
    else:
        error = _like(x, sigma)[0] * out + noise
    mse = mean_flat(jnp.square(error))
    if process.weighting == "none":
        return mse, {"mse": mse}
    _, d = score_drift(process, t, t)
    weight = (d / sigma) ** 2 if process.weighting == "velocity" else d / sigma**2
    return weight * mse, {"mse": mse}
