"""Gaussian diffusion in discrete time: tables, respacing, distributions, losses in bits.

    q(x_t | x_0) = N( sqrt(abar_t) x_0, (1 - abar_t) I ),   t = 0..S-1  (t = 0 has noise already)

after arXiv 2006.11239 (DDPM) and arXiv 2102.09672 (learned variances, respacing), as DiT (arXiv
2212.09748, section 3.1) uses them. Images are channels last; a net's output has C channels, or 2C
with learned variances (the prediction first). Tables are float64 on the host and float32 where they
meet arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

CHOICES = {
    "schedule": ("linear", "squaredcos_cap_v2"),
    "predict": ("eps", "x_start"),
    "variance": ("learned_range", "fixed_large", "fixed_small"),
    "loss": ("mse", "rescaled_mse", "kl", "rescaled_kl"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianDiffusion:
    """What is diffused and learned.

    Attributes:
        timesteps: S.
        schedule: of the noise: "linear", or "squaredcos_cap_v2" (arXiv 2102.09672, equation 17).
        predict: what the net says: the noise, "eps", or the clean image, "x_start".
        variance: "learned_range": the net's other C channels v interpolate log variances between
            the posterior's (v = -1) and beta (v = 1); "fixed_large": beta; "fixed_small": that of
            the posterior.
        loss: "mse" of the prediction, plus the variational bound's term (bits per dimension, blind
            to the mean) where variances are learned; "rescaled_mse": that term times steps / 1000;
            "kl": the bound's term alone; "rescaled_kl": times the number of steps.

    Raises:
        ValueError: an unknown choice, too few timesteps, or nothing to rescale.
    """

    timesteps: int = 1000
    schedule: str = "linear"
    predict: str = "eps"
    variance: str = "learned_range"
    loss: str = "mse"

    def __post_init__(self):
        for field, names in CHOICES.items():
            if getattr(self, field) not in names:
                raise ValueError(f"{field}={getattr(self, field)!r}; choose {' or '.join(names)}")
        least = 21 if self.schedule == "linear" else 1  # beta = 20 / timesteps < 1
        if self.timesteps < least:
            raise ValueError(
                f"timesteps={self.timesteps}; schedule={self.schedule!r} needs at least {least}"
            )
        if self.loss == "rescaled_mse" and not self.learns_variance:
            raise ValueError(
                f"loss='rescaled_mse' rescales the term of learned variances, but "
                f"variance={self.variance!r}; use loss='mse' or variance='learned_range'"
            )

    @property
    def learns_variance(self) -> bool:
        """Whether the net gives 2C channels."""
        return self.variance == "learned_range"


class GaussianTables(NamedTuple):
    """Float64 arrays [K] of a process of K kept steps; names as in the literature.

    `timestep_map[k]` is the original timestep of step k: what the net sees. The clipped log
    variance of the posterior has at 0, where the variance is 0, its value at 1 (K = 1: log beta_0).
    Means are `coef1` x_0 + `coef2` x_t.
    """

    timestep_map: np.ndarray
    betas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    alphas_cumprod_next: np.ndarray
    sqrt_alphas_cumprod: np.ndarray
    sqrt_one_minus_alphas_cumprod: np.ndarray
    log_one_minus_alphas_cumprod: np.ndarray
    sqrt_recip_alphas_cumprod: np.ndarray
    sqrt_recipm1_alphas_cumprod: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance_clipped: np.ndarray
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray

    @property
    def steps(self) -> int:
        """K."""
        return len(self.betas)


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t): mean, log variance, and the clean image it aims at; all [B, .., C]."""

    mean: Array
    log_variance: Array
    x_start: Array


# ---------------------------------------------------------------- tables


def respaced_timesteps(timesteps: int, text: str) -> tuple[int, ...]:
    """The kept original timesteps, ascending (arXiv 2102.09672, section 4).

    Args:
        timesteps: S.
        text: "n1,n2,..": 0..S-1 in as many sections of (nearly) equal length, the longer ones
            first, with so many steps each, evenly spaced from a section's first to its last
            (rounded half to even); "ddimN": 0, i, 2i, .. with the least i that gives N; "": all.

    Raises:
        ValueError: not such a text, more steps than there are, or no stride for "ddimN".
    """
    counts = text.removeprefix("ddim").split(",") if text.strip() else []
    if not all(c.strip().isdigit() and int(c) > 0 for c in counts):
        raise ValueError(f"respacing={text!r}; it is a number, '10,15,20', 'ddim50', or empty")
    if not counts:
        return tuple(range(timesteps))
    numbers = [int(c) for c in counts]
    if text.startswith("ddim"):
        if len(numbers) > 1:
            raise ValueError(f"respacing={text!r}; 'ddim' goes with one number")
        for stride in range(1, timesteps + 1):
            if len(range(0, timesteps, stride)) == numbers[0]:
                return tuple(range(0, timesteps, stride))
        raise ValueError(
            f"respacing={text!r}: no stride through {timesteps} timesteps gives {numbers[0]} "
            f"steps; take respacing='{numbers[0]}' or another number"
        )
    size, longer = divmod(timesteps, len(numbers))
    kept: list[int] = []
    start = 0
    for i, count in enumerate(numbers):
        length = size + (i < longer)
        if count > length:
            raise ValueError(
                f"respacing={text!r} wants {count} of the {length} timesteps in section {i + 1} "
                f"(of {timesteps} in all)"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        at = 0.0  # a running sum, so that halves round as in the reference
        for _ in range(count):
            kept.append(start + round(at))
            at += stride
        start += length
    return tuple(kept)


def noise_schedule(process: GaussianDiffusion) -> np.ndarray:
    """beta_t of the process before respacing: float64 [S]."""
    steps = process.timesteps
    if process.schedule == "linear":
        scale = 1000 / steps
        return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)
    level = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    ratios = [level((i + 1) / steps) / level(i / steps) for i in range(steps)]
    return np.minimum(1 - np.array(ratios, np.float64), 0.999)


def gaussian_tables(
    process: GaussianDiffusion, respacing: str | Sequence[int] = ""
) -> GaussianTables:
    """Tables of the process, all steps or those kept.

    Args:
        respacing: see `respaced_timesteps`, or the kept timesteps themselves, ascending.

    Raises:
        ValueError: of `respaced_timesteps`, or timesteps out of order or range.
    """
    return _tables(process, respacing if isinstance(respacing, str) else tuple(respacing))


@functools.lru_cache(maxsize=32)
def _tables(process, respacing):
    kept = respaced_timesteps(process.timesteps, respacing) if isinstance(respacing, str) else None
    kept = np.asarray(respacing if kept is None else kept, np.int64)
    inside = kept.size and kept[0] >= 0 and kept[-1] < process.timesteps
    if not inside or np.any(np.diff(kept) <= 0):
        raise ValueError(
            f"timesteps {kept} are not ascending numbers in 0..{process.timesteps - 1}"
        )
    # Merging steps keeps abar at the kept ones.
    kept_cumprod = np.cumprod(1.0 - noise_schedule(process))[kept]
    betas = 1 - kept_cumprod / np.append(1.0, kept_cumprod[:-1])
    cumprod = np.cumprod(1.0 - betas)
    prev, following = np.append(1.0, cumprod[:-1]), np.append(cumprod[1:], 0.0)
    variance = betas * (1 - prev) / (1 - cumprod)
    tables = GaussianTables(
        timestep_map=kept,
        betas=betas,
        alphas_cumprod=cumprod,
        alphas_cumprod_prev=prev,
        alphas_cumprod_next=following,
        sqrt_alphas_cumprod=np.sqrt(cumprod),
        sqrt_one_minus_alphas_cumprod=np.sqrt(1 - cumprod),
        log_one_minus_alphas_cumprod=np.log(1 - cumprod),
        sqrt_recip_alphas_cumprod=np.sqrt(1 / cumprod),
        sqrt_recipm1_alphas_cumprod=np.sqrt(1 / cumprod - 1),
        posterior_variance=variance,
        posterior_log_variance_clipped=np.log(np.append((*variance, *betas)[1], variance[1:])),
        posterior_mean_coef1=betas * np.sqrt(prev) / (1 - cumprod),
        posterior_mean_coef2=(1 - prev) * np.sqrt(1 - betas) / (1 - cumprod),
    )
    for array in tables:
        array.setflags(write=False)  # they are shared by all who ask
    return tables


def _at(table: np.ndarray, t: Array, x: Array) -> Array:
    """table[t] in the dtype of x, to be broadcast against x; t: scalar or [B]."""
    t = jnp.asarray(t)
    picked = jnp.asarray(table, _real(x))[t]
    return picked.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def _real(x: Array):
    """Dtype of computations: float32, or float64 where x has it."""
    return jnp.promote_types(x.dtype, jnp.float32)


# ---------------------------------------------------------------- distributions


def q_sample(tables: GaussianTables, x_start: Array, t: Array, noise: Array) -> Array:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise. x_start, noise: [B, .., C]; t: [B]."""
    signal = _at(tables.sqrt_alphas_cumprod, t, x_start)
    return signal * x_start + _at(tables.sqrt_one_minus_alphas_cumprod, t, x_start) * noise


def posterior(tables: GaussianTables, x_start: Array, x_t: Array, t: Array) -> tuple[Array, Array]:
    """Mean and clipped log variance of q(x_{t-1} | x_t, x_0) (arXiv 2006.11239, equation 7), both
    of the shape of x_t."""
    mean = _at(tables.posterior_mean_coef1, t, x_t) * x_start
    mean = mean + _at(tables.posterior_mean_coef2, t, x_t) * x_t
    log_variance = _at(tables.posterior_log_variance_clipped, t, x_t)
    return mean, jnp.broadcast_to(log_variance, mean.shape)


def x_start_from_eps(tables: GaussianTables, x_t: Array, t: Array, eps: Array) -> Array:
    """sqrt(1 / abar) x_t - sqrt(1 / abar - 1) eps."""
    scaled = _at(tables.sqrt_recip_alphas_cumprod, t, x_t) * x_t
    return scaled - _at(tables.sqrt_recipm1_alphas_cumprod, t, x_t) * eps


def eps_from_x_start(tables: GaussianTables, x_t: Array, t: Array, x_start: Array) -> Array:
    """The inverse of `x_start_from_eps`: the noise for which x_t comes from x_start."""
    scaled = _at(tables.sqrt_recip_alphas_cumprod, t, x_t) * x_t
    return (scaled - x_start) / _at(tables.sqrt_recipm1_alphas_cumprod, t, x_t)


def split_output(process: GaussianDiffusion, out: Array, channels: int) -> tuple[Array, Array]:
    """The prediction [.., C] and v [.., C] (0 channels where variances are fixed).

    Raises:
        ValueError: `out` has another number of channels.
    """
    wanted = 2 * channels if process.learns_variance else channels
    if out.shape[-1] != wanted:
        raise ValueError(
            f"the net gives {out.shape[-1]} channels; variance={process.variance!r} on {channels} "
            f"channels needs {wanted} (the net's learn_sigma={process.learns_variance})"
        )
    return out[..., :channels], out[..., channels:]


def predictions(
    process: GaussianDiffusion,
    tables: GaussianTables,
    out: Array,
    x_t: Array,
    t: Array,
    *,
    clip: bool = False,
) -> Prediction:
    """p(x_{t-1} | x_t) of a net's output.

    Args:
        out: [B, .., C or 2C]. x_t: [B, .., C]. t: scalar or [B], steps of `tables`.
        clip: clip the predicted clean image to [-1, 1] (pixels; not for latents).

    Raises:
        ValueError: channels do not fit, see `split_output`.
    """
    said, v = split_output(process, out.astype(_real(x_t)), x_t.shape[-1])
    x_start = said if process.predict == "x_start" else x_start_from_eps(tables, x_t, t, said)
    if clip:
        x_start = jnp.clip(x_start, -1.0, 1.0)
    mean, least = posterior(tables, x_start, x_t, t)
    if process.learns_variance:
        most = _at(np.log(tables.betas), t, x_t)
        share = (v + 1) / 2
        log_variance = share * most + (1 - share) * least
    elif process.variance == "fixed_large":
        # At 0 beta is far too large a variance: the posterior's at 1 serves, as in the reference.
        first = np.exp(tables.posterior_log_variance_clipped[:1])
        large = np.log(np.append(first, tables.betas[1:]))
        log_variance = jnp.broadcast_to(_at(large, t, x_t), mean.shape)
    else:
        log_variance = least
    return Prediction(mean, log_variance, x_start)


# ---------------------------------------------------------------- losses


def mean_flat(x: Array) -> Array:
    """Mean over all axes but the first."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def normal_kl(mean1: Array, log_variance1: Array, mean2: Array, log_variance2: Array) -> Array:
    """KL( N(mean1, exp log_variance1) || N(mean2, exp log_variance2) ) by element, in nats."""
    ratio = jnp.exp(log_variance1 - log_variance2)
    distance = jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    return 0.5 * (-1.0 + log_variance2 - log_variance1 + ratio + distance)


@jax.custom_jvp
def _tanh(y: Array) -> Array:
    """tanh to the last bit near +-1, where backends' own are a few bits off.

    The logs of tail probabilities below are made of those bits: 1 - tanh is a small multiple of
    2^-24 there.
    """
    size = jnp.abs(y)
    tail = 1 - 2 / (jnp.exp(2 * size) + 1)
    return jnp.where(size > 0.6, jnp.sign(y) * tail, jnp.tanh(y))


@_tanh.defjvp
def _tanh_jvp(primals, tangents):
    value = _tanh(*primals)
    return value, (1 - value * value) * tangents[0]


def discretised_log_likelihood(x: Array, mean: Array, log_scale: Array) -> Array:
    """log P of the bin of width 2/255 around x under N(mean, exp(2 log_scale)), by element.

    The outermost bins (beyond +-0.999) are open, the cdf is 0.5 (1 + tanh(sqrt(2 / pi) (z +
    0.044715 z^3))), and probabilities are at least 1e-12 (arXiv 2006.11239, equation 13, as
    implemented by arXiv 2102.09672).
    """

    def cdf(z):
        return 0.5 * (1 + _tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    log = lambda p: jnp.log(jnp.maximum(p, 1e-12))
    inverse = jnp.exp(-log_scale)
    centred = x - mean
    above = cdf(inverse * (centred + 1 / 255))
    below = cdf(inverse * (centred - 1 / 255))
    inner = jnp.where(x > 0.999, log(1 - below), log(above - below))
    return jnp.where(x < -0.999, log(above), inner)


def bound_term(
    tables: GaussianTables, prediction: Prediction, x_start: Array, x_t: Array, t: Array
) -> Array:
    """Term t of the variational bound, bits per dimension: [B].

    For t > 0 the KL from the posterior to the prediction, at t = 0 minus the discretised
    log-likelihood of x_start. t: [B].
    """
    mean, log_variance = posterior(tables, x_start, x_t, t)
    kl = mean_flat(normal_kl(mean, log_variance, prediction.mean, prediction.log_variance))
    likelihood = discretised_log_likelihood(x_start, prediction.mean, 0.5 * prediction.log_variance)
    return jnp.where(t == 0, -mean_flat(likelihood), kl) / math.log(2.0)


def draw_times(process: GaussianDiffusion, key: Array, rows: int) -> Array:
    """[rows] int32, uniform in 0..S-1."""
    return jax.random.randint(key, (rows,), 0, process.timesteps, jnp.int32)


def spread_times(process: GaussianDiffusion, key: Array, rows: int) -> Array:
    """[rows] int32, one in each of `rows` equal shares of 0..S-1: for losses that vary less."""
    place = (jnp.arange(rows) + jax.random.uniform(key, (rows,))) / rows
    return jnp.minimum((place * process.timesteps).astype(jnp.int32), process.timesteps - 1)


def training_loss(
    process: GaussianDiffusion,
    denoise: Callable[[Array, Array], Array],
    x: Array,
    t: Array,
    noise: Array,
    *,
    respacing: str | Sequence[int] = "",
) -> tuple[Array, dict[str, Array]]:
    """Loss of every row, see `GaussianDiffusion.loss` (arXiv 2102.09672, section 3.1).

    Args:
        denoise: of (x_t, original timesteps [B] int32) -> [B, .., C or 2C].
        x: clean images [B, .., C]. noise: the same shape, standard normal.
        t: [B] int32, steps of the (respaced) process.
        respacing: see `gaussian_tables`; training uses all steps, "".

    Returns:
        loss [B] float32 and its parts: "mse" and, with learned variances, "vb", or "vb" alone.

    Raises:
        ValueError: of `predictions` and `gaussian_tables`.
    """
    tables = gaussian_tables(process, respacing)
    x = x.astype(_real(x))
    x_t = q_sample(tables, x, t, noise)
    out = denoise(x_t, jnp.asarray(tables.timestep_map, jnp.int32)[t]).astype(x.dtype)
    said, v = split_output(process, out, x.shape[-1])
    bound = lambda out: bound_term(tables, predictions(process, tables, out, x_t, t), x, x_t, t)
    if process.loss in ("kl", "rescaled_kl"):
        vb = bound(out)
        return (vb * tables.steps if process.loss == "rescaled_kl" else vb), {"vb": vb}
    mse = mean_flat(jnp.square((x if process.predict == "x_start" else noise) - said))
    if not process.learns_variance:
        return mse, {"mse": mse}
    # The bound must not move the mean: the squared error alone teaches it.
    vb = bound(jnp.concatenate([lax.stop_gradient(said), v], axis=-1))
    if process.loss == "rescaled_mse":
        vb = vb * (tables.steps / 1000)
    return mse + vb, {"mse": mse, "vb": vb}


def bits_per_dim(
    process: GaussianDiffusion,
    denoise: Callable[[Array, Array], Array],
    x: Array,
    noise: Callable[[Array], Array],
    *,
    respacing: str | Sequence[int] = "",
    clip: bool = True,
) -> dict[str, Array]:
    """The variational bound on -log2 p(x) per dimension, term by term, at one draw of noise each.

    Args:
        denoise: as in `training_loss`. x: [B, .., C].
        noise: of the number k of an evaluated step (scalar, traced) -> standard normal [B, .., C].
            Steps are evaluated from the noisiest, k = 0, down.
        respacing, clip: see `gaussian_tables` and `predictions`.

    Returns:
        "total" = sum of "vb" + "prior", both [B]; "vb", "x_start_mse" (of the predicted clean
        image) and "mse" (of the noise it implies), [B, K], column k of step t = K-1-k.
    """
    tables = gaussian_tables(process, respacing)
    x = x.astype(_real(x))
    times = jnp.asarray(tables.timestep_map, jnp.int32)

    def term(_, k):
        t = jnp.full((len(x),), tables.steps - 1 - k, jnp.int32)
        drawn = noise(k).astype(x.dtype)
        x_t = q_sample(tables, x, t, drawn)
        found = predictions(process, tables, denoise(x_t, times[t]), x_t, t, clip=clip)
        eps = eps_from_x_start(tables, x_t, t, found.x_start)
        vb = bound_term(tables, found, x, x_t, t)
        errors = mean_flat(jnp.square(found.x_start - x)), mean_flat(jnp.square(eps - drawn))
        return None, (vb, *errors)

    _, (vb, x_start_mse, mse) = lax.scan(term, None, jnp.arange(tables.steps))
    last = jnp.asarray(tables.steps - 1)
    mean = _at(tables.sqrt_alphas_cumprod, last, x) * x
    log_variance = _at(tables.log_one_minus_alphas_cumprod, last, x)
    prior = mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)
    return {
        "total": jnp.sum(vb, axis=0) + prior,
        "prior": prior,
        "vb": vb.T,
        "x_start_mse": x_start_mse.T,
        "mse": mse.T,
    }
