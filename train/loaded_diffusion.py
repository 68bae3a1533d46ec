"""A class-conditional diffusion model, loaded for use."""

from __future__ import annotations

from collections.abc import Callable

import jax

from ..model.sampling.diffusion import Segment, make_diffusion_sampler
from .loaded_images import LoadedImages
from .schema import DiffusionSample


class LoadedDiffusion(LoadedImages):
    """The weights of a DiT run; see `LoadedRun`."""

    @property
    def num_classes(self) -> int:
        return self.config.net.num_classes

    def sampler(self, settings: DiffusionSample) -> Callable:
        """A jitted sampler(variables, keys, labels, *, guidance=None) that gives images [B, H, W,
        C] float32; see `lintime.model.sampling.diffusion.make_diffusion_sampler`.

        Args:
            settings: how; its guidance is not read, for it is an argument of the sampler.
        """
        return self._cached(make_sampler, process=self.config.process, **solver_options(settings))

    def drawer(self, settings):
        draw = self.sampler(settings)
        guidance = None if settings.guidance == 1.0 else settings.guidance
        return lambda keys, labels: draw(self.variables, keys, labels, guidance=guidance)


def solver_options(s: DiffusionSample) -> dict:
    """Of a `DiffusionSample`, what a sampler is made from."""
    return {
        "method": s.method, "steps": s.steps, "eta": s.eta, "clip": s.clip,
        "guidance_channels": s.guidance_channels, "interval": s.guidance_interval,
    }  # fmt: skip


def make_sampler(net, *, process, steps: int, **options) -> Callable:
    """The sampler of a net at its own patch size; `options` as of `make_diffusion_sampler`.

    Raises:
        ValueError: settings that do not fit each other.
    """
    c = net.config

    def denoise(variables, x, t, labels, mode):
        return net.apply({"params": variables["params"]}, x, t, labels)[0]

    return jax.jit(
        make_diffusion_sampler(
            denoise, process, segments=(Segment(steps=steps),),
            shape=(c.input_size, c.input_size, c.in_channels),
            null_label=c.num_classes if c.class_dropout else None, **options,
        )  # fmt: skip
    )
