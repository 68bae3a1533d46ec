"""A FlexiDiT, loaded for use: images at a choice of compute budgets."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax

from ...model.layers.patches import Patch
from ...model.nets.dit import DiT, DiTConfig
from ...model.nets.flexidit import (
    FlexiDiTConfig,
    flexible_denoiser,
    materialise,
    mode_config,
    mode_flops,
)
from ...model.sampling.budget import COUNTED, plan
from ...model.sampling.diffusion import Segment, guided_iterations
from ..errors import UserError
from ..flops import count_flops
from ..schema import FlexibleSample
from .diffusion import LoadedDiffusion, jit_sampler, solver_options


class LoadedFlexible(LoadedDiffusion):
    """The weights of a FlexiDiT run; see `LoadedDiffusion`."""

    @property
    def sizes(self) -> DiTConfig:
        return self.config.net.base

    @property
    def tree(self) -> dict:
        """All parameters, the frozen base of adapters included, as `mode_params` takes them."""
        return {**self.params, **self.stats}

    @property
    def usual(self) -> FlexibleSample:
        """The run's `sample`, of its budgets the first."""
        sample = self.config.sample
        return dataclasses.replace(sample, budgets=sample.budgets[:1])

    @functools.cached_property
    def modes(self) -> dict:
        """{patch: parameters of the DiT of that patch}, adapters merged; what they share is not
        copied."""
        return materialise(self.config.net, self.tree)

    def sampler(self, settings: FlexibleSample | None = None) -> Callable:
        """A jitted sampler(modes, keys, labels, *, guidance=None), see `LoadedDiffusion.sampler`,
        at the one of `settings.budgets`: one compiled program of all its patch sizes.

        Raises:
            UserError: several budgets. `sample_budgets` draws those side by side.
        """
        settings = settings or self.usual
        if len(settings.budgets) != 1:
            listed = ", ".join(f"{b:g}" for b in settings.budgets)
            raise UserError(
                f"budgets={listed}: images are drawn at one of them; name it, such as "
                f"budgets=({settings.budgets[-1]:g},)"
            )
        options = solver_options(settings)
        options.pop("steps")
        return self._cached(
            _make_sampler, config=self.config.net, process=self.config.process,
            segments=flexible_segments(self.config.net, settings, settings.budgets[0]), **options,
        )  # fmt: skip

    def drawer(self, settings):
        draw = self.sampler(settings)
        guidance = None if settings.guidance == 1.0 else settings.guidance
        return self._to_pixels(
            lambda keys, labels: draw(self.modes, keys, labels, guidance=guidance)
        )


def _make_sampler(net: DiT, *, config: FlexiDiTConfig, process, segments, **options) -> Callable:
    denoise = flexible_denoiser(config, dtype=net.dtype, unroll=net.unroll)
    return jit_sampler(denoise, config.base, process, segments, **options)


def flexible_segments(
    config: FlexiDiTConfig, s: FlexibleSample, budget: float
) -> tuple[Segment, ...]:
    """What is done at which step, for one of the budgets of a `FlexibleSample`.

    Raises:
        ValueError: a budget that cannot be met, or no such patch size.
    """
    weak = s.weak or config.weak
    # Without guidance no step of the base's patch size has a guide that would make it cheaper.
    guide = "cfg" if s.guidance == 1.0 else s.guide
    fixed = dict(powerful=config.powerful, weak=weak, guidance=guide)
    segments = plan(s.steps, mode_costs(config), budget=budget, **fixed)
    if not s.weak_guidance:
        return segments
    scales = [s.weak_guidance if part.mode == weak else None for part in segments]
    weak_steps = sum(part.steps for part in segments if part.mode == weak)
    return plan(s.steps, mode_costs(config), weak_steps=weak_steps, scales=scales, **fixed)


def flexible_flops(config: FlexiDiTConfig, s: FlexibleSample, budget: float) -> float:
    """Multiply-adds (half the FLOPs) of one image drawn at a budget, the unit of DiT's "Gflops";
    guiding predictions count where they are made."""
    costs, total = mode_costs(config), 0.0
    parts = [part for part in flexible_segments(config, s, budget) for _ in range(part.steps)]
    for part, acts in zip(parts, guided_iterations(s.steps, s.guidance_interval)):
        scale = s.guidance if part.scale is None else part.scale
        total += costs[part.mode]
        if acts and scale != 1.0 and part.guide != "none":
            total += costs[part.guide_mode or part.mode]
    return (2 if s.method == "heun" else 1) * total


def shown_budget(config: FlexiDiTConfig) -> float | None:
    """A budget below 1 to propose: 0.6, or the least if that is more; None where there is none."""
    costs = mode_costs(config)
    least = costs[config.weak] / costs[config.powerful]
    budget = max(0.6, math.ceil(least * 100) / 100)
    return budget if budget < 1 else None


@functools.lru_cache(maxsize=8)
def mode_costs(config: FlexiDiTConfig) -> dict[Patch, float]:
    """{patch: multiply-adds (half the FLOPs) of a prediction}: DiT's formula, or counted where it
    does not know the mixer."""
    if config.base.mixer in COUNTED:
        return mode_flops(config)

    def counted(patch):
        dit = mode_config(config, patch)
        x = jax.ShapeDtypeStruct((1, *dit.shape), "float32")
        one = jax.ShapeDtypeStruct((1,), "int32")
        net = DiT(dit)
        variables = jax.eval_shape(net.init, jax.random.key(0), x, one, one)
        told = {"labels": one}
        if dit.context != "none":
            shape = (1, dit.context_length, dit.context_dim)
            told["context"] = jax.ShapeDtypeStruct(shape, "float32")
        run = lambda variables, x, t, told: net.apply(variables, x, t, **told)[0]
        return count_flops(run, variables, x, one, told) / 2

    return {patch: counted(patch) for patch in sorted(config.patch_sizes)}
