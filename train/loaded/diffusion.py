"""A diffusion model of images by class or text, loaded for use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax

from ...model.layers.context import conditions
from ...model.sampling.diffusion import Segment, make_diffusion_sampler
from ...model.sampling.level_solvers import iterations, level_solver
from ...model.sampling.video_stream import make_stream_sampler
from ..encoders.autoencoder import LoadedAutoencoder, check_autoencoder, load_autoencoder
from ..encoders.text import LoadedTextEncoder
from ..errors import UserError
from ..schema import DiffusionSample, LatentData, LevelSample
from ..tasks.diffusion import Sizes
from .images import LoadedImages
from .prompts import TextReader
from .wanted import Wanted


class LoadedDiffusion(LoadedImages):
    """The weights of a run of a DiT or its like, and the autoencoder where it draws latents; see
    `LoadedRun`.

    `autoencoder` and `text_encoder` are loaded ones or where they are now, if not where
    `config.data` says.
    """

    def __init__(
        self,
        *args,
        autoencoder: str | LoadedAutoencoder | None = None,
        text_encoder: str | LoadedTextEncoder | None = None,
        **options,
    ):
        super().__init__(*args, **options)
        self._autoencoder = autoencoder
        self.texts = (
            TextReader(self, self.sizes, text_encoder) if self.sizes.context != "none" else None
        )

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
    def sizes(self) -> Sizes:
        """Sizes of images or videos, classes and texts."""
        return self.config.net

    @property
    def num_classes(self) -> int:
        return self.sizes.num_classes

    def wanted(
        self, classes: Sequence[int] = (), text: Sequence[str] = (), context=None, context_mask=None
    ) -> Wanted:
        """What images of these classes or texts take; see `generate`.

        Args:
            classes: ids; beside texts only if the net has classes too.
            text: prompts. context, context_mask: features of texts [n, S, D] and which of their
                tokens count [n, S], in place of prompts.

        Raises:
            UserError: what the net does not read, or not all that it does; a class out of range;
                no text encoder, or another one than that of the features trained on.
        """
        if self.texts is None:
            if len(text) or context is not None:
                raise UserError(f"{self.path} draws by class, it reads no text; give classes")
            return super().wanted(classes)
        if isinstance(text, str) or any(isinstance(c, str) for c in classes):
            raise UserError('give prompts as a list: text=["a dog", "a cat"]')
        if bool(len(text)) == (context is not None):
            raise UserError(f"{self.path} draws by text; give text=[..], or features as context=")
        if len(text):
            return self.texts.of_prompts(text, classes)
        return self.texts.of_features(context, context_mask, classes)

    def asked(self, sample: DiffusionSample) -> Wanted:
        return super().asked(sample) if self.texts is None else self.texts.of_sample(sample)

    def sampler(self, settings: DiffusionSample | None = None) -> Callable:
        """A jitted sampler(variables, keys, labels, *, guidance=None) that gives images [B, H, W,
        C] float32; labels as `wanted(..).take(rows)` gives them; see
        `lintime.model.sampling.diffusion.make_diffusion_sampler`.

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
    guided = {"guidance_channels": s.guidance_channels, "interval": s.guidance_interval}
    if s.guided_times:
        guided["guided_times"] = s.guided_times
    if isinstance(s, LevelSample):
        clip = s.clip_to if s.clip else 0.0
        solver = (s.method, s.published, s.noise_schedule, clip)
        stream = (s.frames, s.guidance != 1.0) if s.stream else None
        return {"steps": s.steps, "levels": solver, "stream": stream, **guided}
    return {"method": s.method, "steps": s.steps, "eta": s.eta, "clip": s.clip, **guided}


def make_sampler(
    net,
    *,
    process,
    steps: int,
    levels: tuple[str, str, str, float] | None = None,
    stream: tuple[int, bool] | None = None,
    **options,
) -> Callable:
    """The sampler of a net at its own patch size; `options` as of `make_diffusion_sampler`.

    Args:
        levels: of processes by noise level: method, published, schedule and clip of `level_solver`.
        stream: of videos that are to be drawn frame by frame: how many frames (0: the net's), and
            whether there is guidance.

    Raises:
        ValueError: settings that do not fit each other.
    """
    if levels is not None:
        method, published, schedule, clip = levels
        process = level_solver(
            process, method, steps, published=published, schedule=schedule, clip=clip
        )
        steps = iterations(process)
    if stream is not None:
        return _streamed(net, process, *stream, **options)

    def denoise(variables, x, t, labels, mode):
        return net.apply({"params": variables["params"]}, x, t, **conditions(labels))[0]

    return jit_sampler(denoise, net.config, process, (Segment(steps=steps),), **options)


def _streamed(net, solver, frames: int, guided: bool, **options) -> Callable:
    """The jitted sampler of a block-causal net, frame by frame; options as of `make_sampler`."""
    parts = options.pop("guidance_channels") or options.pop("guided_times", ())
    if parts or tuple(options.pop("interval")) != (0.0, 1.0):
        raise ValueError("a stream guides all channels at all steps")
    sizes = net.config

    def extend(variables, x, t, labels, frame, state):
        params = {"params": variables["params"]}
        return net.apply(params, x, t, frame, state, **conditions(labels), method="extend")

    return jax.jit(
        make_stream_sampler(
            extend, net.init_state, solver, guided=guided,
            shape=(frames or sizes.frames, *sizes.shape[1:]), patch_frames=sizes.patch_frames,
            null_label=sizes.num_classes if sizes.class_dropout else None,
        )
    )  # fmt: skip


def jit_sampler(denoise, sizes: Sizes, process, segments, **options) -> Callable:
    """The jitted sampler of a denoiser of images or videos of these sizes."""
    return jax.jit(
        make_diffusion_sampler(
            denoise,
            process,
            segments=segments,
            shape=sizes.shape,
            null_label=sizes.num_classes if sizes.class_dropout else None,
            **options,
        )  # fmt: skip
    )
