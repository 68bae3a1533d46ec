"""Objectives that make weak modes of a flexible net follow its powerful one (arXiv 2502.20126).

Everything here takes outputs or features, not nets: a task binds those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..layers.patches import Patch
from .flow import FlowMatching
from .gaussian import GaussianDiffusion

SIGMAS = (1.0, 2.0, 4.0, 8.0)
KERNELS = ("poly3", "rbf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objectives:
    """What a weak mode learns from, besides what the process says; weights of terms of the loss.

    Attributes:
        denoise: the ordinary loss of the process.
        distill: of following the powerful mode at the same noisy image, time and class.
        distill_variance: of learned variances within that term.
        powerful_share: how often the shared variant trains the base's own mode; the others have
            equal parts of the rest.
    """

    denoise: float = 1.0
    distill: float = 0.0
    distill_variance: float = 1.0
    powerful_share: float = 0.5


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
        median: sigmas count in medians of the distances between features, without gradient.

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
    dot = jnp.matmul(both, both.T, precision=lax.Precision.HIGHEST)
    if kernel == "poly3":
        values = (dot / x.shape[-1] + 1) ** 3
    else:
        norms = jnp.sum(jnp.square(both), axis=-1)
        squared = jnp.maximum(norms[:, None] + norms - 2 * dot, 0)
        unit = 1.0
        if median:
            pairs = lax.stop_gradient(squared)[np.triu_indices(n + m, 1)]
            unit = jnp.maximum(jnp.median(pairs), jnp.finfo(jnp.float32).tiny)
        values = sum(jnp.exp(-squared / (2 * s * s * unit)) for s in sigmas)
    values = jnp.where(jnp.eye(n + m, dtype=bool), 0, values)
    return (
        jnp.sum(values[:n, :n]) / (n * (n - 1))
        + jnp.sum(values[n:, n:]) / (m * (m - 1))
        - 2 * jnp.mean(values[:n, n:])
    )
