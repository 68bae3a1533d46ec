"""Objectives that make weak modes of a flexible net follow its powerful one (arXiv 2502.20126).

Everything here takes outputs or features, not nets: a task binds those. A *share of the noise* is a
time in the unit of either process: 0 the clean image, 1 noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..layers.patches import Patch
from . import flow, gaussian
from .flow import FlowMatching
from .gaussian import GaussianDiffusion

SIGMAS = (1.0, 2.0, 4.0, 8.0)
LEAST_MEDIAN = 1e-6
KERNELS = ("poly3", "rbf")
FEATURES = ("net", "pixels")
Span = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objectives:
    """What a weak mode learns from, besides what the process says; weights of terms of the loss.

    Attributes:
        denoise: the ordinary loss of the process.
        distill: of following the powerful mode at the same noisy image, time and class.
        distill_variance: of learned variances within that term.
        powerful_share: how often the shared variant trains the base's own mode; the others have
            equal parts of the rest.
        match: of distribution matching: `mmd` between features of the clean images that the weak
            and the powerful mode predict from the same noisy ones. Rows of a micro-batch are
            compared with each other: the more of them, the less noise.
        match_kernel: "poly3", or "rbf" with widths in medians of the distances.
        match_features: "net": of the powerful mode itself, see `nets.flexidit.features`;
            "pixels": the images, or latents, as they are.
        match_steps: deterministic steps on which the powerful mode's prediction is made; 1 predicts
            at once, as the weak mode does.
        match_t_range: shares of the noise (low, high) from which times of this term are drawn.
        train_t_range: shares of the noise on which weak modes train: (low, high) of all of them, or
            a pair for each, the smallest patch first: (low, high, low, high, ..). The powerful mode
            trains on all times. Better for a fixed schedule that uses weak modes there only, at the
            price of other schedules.
    """

    denoise: float = 1.0
    distill: float = 0.0
    distill_variance: float = 1.0
    powerful_share: float = 0.5
    match: float = 0.0
    match_kernel: str = "poly3"
    match_features: str = "net"
    match_steps: int = 1
    match_t_range: tuple[float, ...] = (0.5, 1.0)
    train_t_range: tuple[float, ...] = (0.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexibleDiffusion(Objectives, GaussianDiffusion):
    """Gaussian diffusion in several modes of one net."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexibleFlow(Objectives, FlowMatching):
    """Flow matching in several modes of one net."""


def mode_mixture(
    patch_sizes: Sequence[Patch], base: Patch, variant: str, powerful_share: float = 0.5
) -> dict[Patch, float]:
    """How often each mode is trained: in the shared variant the base mode `powerful_share` of the
    time and the others the rest in equal parts; with adapters (`lora`) the others only, since the
    base mode has nothing to learn.

    Raises:
        ValueError: there is no mode besides the base mode to train with adapters.
    """
    others = [p for p in patch_sizes if p != base]
    if variant == "lora" and not others:
        raise ValueError(f"patch sizes {tuple(patch_sizes)}: no mode besides the base has adapters")
    whole = 1.0 if variant == "lora" else 1.0 - powerful_share
    shares = {p: whole / len(others) for p in others}
    return shares if variant == "lora" else {base: 1.0 - sum(shares.values())} | shares


def draw_mode(mixture: Mapping[Patch, float], seed: int, step: int) -> Patch:
    """The mode of the whole batch of one step: on the host, a function of (seed, step) alone, so
    that every process draws the same and each mode has one compiled program."""
    modes = sorted(mixture)
    shares = np.asarray([mixture[m] for m in modes], np.float64)
    return modes[np.random.default_rng((seed, step)).choice(len(modes), p=shares / shares.sum())]


# ---------------------------------------------------------------- times


def time_spans(process: Objectives, others: Sequence[Patch]) -> dict[Patch, Span]:
    """{patch: (low, high)}: the shares of the noise on which each of the weak modes `others`, the
    smallest patch first, trains.

    Raises:
        ValueError: neither one pair nor one for each, a pair that is empty or beyond 0..1, or one
            without times for the term `match`.
    """
    given, match = process.train_t_range, process.match_t_range
    if len(given) not in {2, 2 * len(others)}:
        raise ValueError(
            f"train_t_range={given}: give low,high, or such a pair for each of the "
            f"{len(others)} weak modes"
        )
    pairs = list(zip(given[::2], given[1::2])) * (1 if len(given) > 2 else len(others))
    named = {"train_t_range": [given[:2], *pairs], "match_t_range": [match]}
    for name, each in named.items():
        for pair in each:
            if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= 1:
                raise ValueError(f"{name}={getattr(process, name)}: give 0 <= low < high <= 1")
    for low, high in pairs:
        if process.match and max(low, match[0]) >= min(high, match[1]):
            raise ValueError(
                f"match_t_range={match} and train_t_range={given} have no times in common; "
                "overlap them, or set match=0"
            )
    return dict(zip(others, pairs))


def times_at(process: GaussianDiffusion | FlowMatching, share: Array) -> Array:
    """Times [B] of a process at shares of the noise [B] in [0, 1]: of S steps floor(share S) as
    int32; of a flow 1 - share, within the times it is trained on, float32."""
    if isinstance(process, FlowMatching):
        low, high = flow.trained_times(process)
        return high - (high - low) * share
    at = jnp.floor(share * process.timesteps).astype(jnp.int32)
    return jnp.clip(at, 0, process.timesteps - 1)


# ---------------------------------------------------------------- one-step predictions


def noised(process: GaussianDiffusion | FlowMatching, x: Array, t: Array, noise: Array) -> Array:
    """x_t: what the process makes of clean x [B, .., C] at times t [B]."""
    if isinstance(process, FlowMatching):
        return flow.interpolate(process, x, t, noise)[0]
    return gaussian.q_sample(gaussian.gaussian_tables(process), x, t, noise)


def clean_and_noise(
    process: GaussianDiffusion | FlowMatching, out: Array, x_t: Array, t: Array
) -> tuple[Array, Array]:
    """The clean image and the noise that a net's output means; inverse of `noised`.

    Args:
        out: [B, .., C or 2C], what the net says of x_t [B, .., C] at times t [B].

    Raises:
        ValueError: channels that do not fit the process.
    """
    if isinstance(process, FlowMatching):
        return flow.ends(process, flow.velocity(process, out, x_t, t), x_t, t)
    tables = gaussian.gaussian_tables(process)
    x = gaussian.predictions(process, tables, out, x_t, t).x_start
    return x, gaussian.eps_from_x_start(tables, x_t, t, x)


def predict_clean(
    process: GaussianDiffusion | FlowMatching,
    denoise: Callable[[Array, Array], Array],
    x_t: Array,
    t: Array,
    steps: int = 1,
) -> Array:
    """The clean image after deterministic steps of equal size (DDIM's) from x_t; 1 is the one-step
    prediction.

    Args:
        denoise: of (x_t, t) -> [B, .., C or 2C]. x_t: [B, .., C]. t: [B].
    """
    begun = t
    for left in range(steps - 1, -1, -1):
        x, noise = clean_and_noise(process, denoise(x_t, t), x_t, t)
        if left:
            if isinstance(process, FlowMatching):
                t = 1 - (1 - begun) * (left / steps)
            else:
                t = begun * left // steps
            x_t = noised(process, x, t, noise)
    return x


# ---------------------------------------------------------------- losses


def distillation_loss(
    weak: Array, powerful: Array, channels: int, *, variance_weight: float = 1.0
) -> tuple[Array, dict[str, Array]]:
    """mean((eps_w - eps_p)^2) + lambda mean((v_w - v_p)^2), no gradient into the powerful mode.

    Args:
        weak, powerful: outputs [B, .., C or 2 C] of both modes at the same x_t, t and labels.
        channels: C, of the data; the channels behind are the learned variance.
        variance_weight: lambda; without it the variance of the weak mode would drift.

    Returns:
        Loss [B] float32, and its parts "distill_eps" and, if there are variances, "distill_var".

    Raises:
        ValueError: outputs of different shapes.
    """
    if weak.shape != powerful.shape:
        raise ValueError(f"outputs of shapes {weak.shape} and {powerful.shape} cannot be compared")
    powerful = lax.stop_gradient(powerful)
    error = jnp.square(weak.astype(jnp.float32) - powerful.astype(jnp.float32))
    mean = lambda e: jnp.mean(e, axis=tuple(range(1, e.ndim)))
    parts = {"distill_eps": mean(error[..., :channels])}
    if error.shape[-1] == channels:
        return parts["distill_eps"], parts
    parts["distill_var"] = mean(error[..., channels:])
    return parts["distill_eps"] + variance_weight * parts["distill_var"], parts


def mmd(
    x: Array,
    y: Array,
    kernel: str = "poly3",
    *,
    sigmas: Sequence[float] = SIGMAS,
    median: bool = False,
) -> Array:
    """Unbiased squared maximum mean discrepancy of two sets of features (Gretton et al. 2012).

    sum_{i != j} k(x_i, x_j) / (n (n - 1)) + the same of y - 2 mean k(x_i, y_j); it may be negative.
    k is (x y / d + 1)^3 ("poly3") or sum_sigma exp(-|x - y|^2 / (2 sigma^2)) ("rbf"). Inside jit
    the rows are those of the whole batch, whatever devices they are on.

    Args:
        x, y: [n, d] and [m, d], n and m at least 2. sigmas: of "rbf".
        median: sigmas count in medians of the distances between features, without gradient; of
            squared distances the median is taken to be `LEAST_MEDIAN` |x|^2 at least.

    Returns:
        [] float32.

    Raises:
        ValueError: an unknown kernel, or too few rows.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}; choose one of {', '.join(KERNELS)}")
    if min(len(x), len(y)) < 2 or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"features {x.shape} and {y.shape}; two rows of each and one width needed")
    x, y = (jnp.asarray(a).astype(jnp.float32) for a in (x, y))
    n, m = len(x), len(y)
    both = jnp.concatenate([x, y])
    products = lambda a: jnp.matmul(a, a.T, precision=lax.Precision.HIGHEST)
    if kernel == "poly3":
        values = (products(both) / x.shape[-1] + 1) ** 3
    else:
        size = jnp.mean(jnp.sum(jnp.square(both), axis=-1))
        both = both - jnp.mean(both, axis=0)  # the same distances, with less rounding
        norms = jnp.sum(jnp.square(both), axis=-1)
        squared = jnp.maximum(norms[:, None] + norms - 2 * products(both), 0)
        unit = 1.0
        if median:
            pairs = lax.stop_gradient(squared)[np.triu_indices(n + m, 1)]
            # Features may all be nearly equal: a new net's predictions are.
            least = LEAST_MEDIAN * lax.stop_gradient(size) + jnp.finfo(jnp.float32).tiny
            unit = jnp.maximum(jnp.median(pairs), least)
        values = sum(jnp.exp(-squared / (2 * s * s * unit)) for s in sigmas)
    values = jnp.where(jnp.eye(n + m, dtype=bool), 0, values)
    return (
        jnp.sum(values[:n, :n]) / (n * (n - 1))
        + jnp.sum(values[n:, n:]) / (m * (m - 1))
        - 2 * jnp.mean(values[:n, n:])
    )
