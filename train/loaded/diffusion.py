"""A class-conditional diffusion model, loaded for use."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from ...model.nets.dit import DiTConfig
from ...model.sampling.diffusion import Segment, make_diffusion_sampler
from ..encoders.autoencoder import LoadedAutoencoder, check_autoencoder, load_autoencoder
from ..errors import UserError
from ..schema import DiffusionSample, LatentData
from .images import LoadedImages


class LoadedDiffusion(LoadedImages):
    """The weights of a DiT run, and the autoencoder where it draws latents; see `LoadedRun`.

    `autoencoder` is a loaded one or where it is now, if not where `config.data.autoencoder` says.
    """

    def __init__(self, *args, autoencoder: str | LoadedAutoencoder | None = None, **options):
        super().__init__(*args, **options)
        self._autoencoder = autoencoder

    @functools.cached_property
    def autoencoder(self) -> LoadedAutoencoder:
        """What turns latents into pixels.

        Raises:
            UserError: it is missing, or not the one whose latents the net was trained on.
        """
        given = self._autoencoder
        if not isinstance(given, LoadedAutoencoder):
            place = given or self.config.data.autoencoder
            if not place:
                raise UserError(
                    f"{self.path} draws latents; name their autoencoder with "
                    "data.autoencoder=DIR_OR_FILE"
                )
            given = load_autoencoder(place)
        wanted = self.data_fingerprint.get("autoencoder")
        if wanted is not None:
            check_autoencoder(wanted, given, f"{self.path} was trained on")
        return given

    @property
    def decoder_print(self) -> str:
        return self.autoencoder.fingerprint if isinstance(self.config.data, LatentData) else ""

    @property
    def num_classes(self) -> int:
        return self.config.net.num_classes

    def sampler(self, settings: DiffusionSample | None = None) -> Callable:
        """A jitted sampler(variables, keys, labels, *, guidance=None) that gives images [B, H, W,
        C] float32; see `lintime.model.sampling.diffusion.make_diffusion_sampler`.

        Args:
            settings: how, `config.sample` unless given; its guidance is not read, for it is an
                argument of the sampler.
        """
        settings = settings or self.config.sample
        return self._cached(make_sampler, process=self.config.process, **solver_options(settings))

    def drawer(self, settings):
        draw = self.sampler(settings)
        guidance = None if settings.guidance == 1.0 else settings.guidance
        return self._to_pixels(
            lambda keys, labels: draw(self.variables, keys, labels, guidance=guidance)
        )

    def _to_pixels(self, draw: Callable) -> Callable:
        """`draw`, decoded where it gives latents."""
        if not isinstance(self.config.data, LatentData):
            return draw
        decode, scale = self.autoencoder.decode, self.config.data.scaling_factor
        return lambda keys, labels: decode(draw(keys, labels) / scale)


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

    def denoise(variables, x, t, labels, mode):
        return net.apply({"params": variables["params"]}, x, t, labels)[0]

    return jit_sampler(denoise, net.config, process, (Segment(steps=steps),), **options)


def jit_sampler(denoise, dit: DiTConfig, process, segments, **options) -> Callable:
    """The jitted sampler of a denoiser of images or videos as `dit` has them."""
    return jax.jit(
        make_diffusion_sampler(
            denoise,
            process,
            segments=segments,
            shape=dit.shape,
            null_label=dit.num_classes if dit.class_dropout else None,
            **options,
        )  # fmt: skip
    )
