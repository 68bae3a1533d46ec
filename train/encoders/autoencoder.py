"""A KL autoencoder, loaded for use from published weights."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from ...model.nets.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, Posterior
from ..arrays import WEIGHTS, config_beside, read_arrays, read_hyperparameters
from ..errors import UserError
from ..mesh import OnDevicesOf
from .tokenizer import fingerprint_of

# Names of the weights within a folder; the first that is there is read.
FILES = (
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin", *WEIGHTS.values(),
)  # fmt: skip


class LoadedAutoencoder:
    """A KL autoencoder: images to moments, latents to images. Nothing here multiplies by the
    scaling factor.

    Attributes:
        config: sizes. params: of `AutoencoderKL`. path: where they came from, if anywhere.
        net: computes in float32.
        downsample, latent_channels, scaling_factor: see AutoencoderKLConfig.
    """

    def __init__(self, config: AutoencoderKLConfig, params, path: str | Path | None = None):
        self.config, self.path = config, path and Path(path)
        self.params = jax.tree.map(jnp.asarray, params)
        self.net = AutoencoderKL(config)
        self.downsample, self.latent_channels = config.downsample, config.latent_channels
        self.scaling_factor = config.scaling_factor
        self._params_for = OnDevicesOf(self.params)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of config and weights; latents carry it, so that they meet no other autoencoder."""
        return fingerprint_of(self.config, self.params)

    def encode(self, images) -> Posterior:
        """Mean and log variance [B, h, w, C] float32 of images [B, H, W, 3] in [-1, 1]; computed
        where the images are.

        Raises:
            ValueError: height or width is not a multiple of `downsample`.
        """
        return self._encode(self._params_for(images), images)

    def decode(self, latents) -> jax.Array:
        """Images [B, H, W, 3] float32, about in [-1, 1], of latents [B, h, w, C] that are not
        scaled (what a diffusion model made, divided by `scaling_factor`).
        """
        return self._decode(self._params_for(latents), latents)

    @functools.cached_property
    def _encode(self):
        def encode(params, images):
            # TF32 on GPUs, as the published code runs; three passes of bfloat16 on TPUs.
            with jax.default_matmul_precision("high"):
                return self.net.apply({"params": params}, images, method="encode")

        return jax.jit(encode)

    @functools.cached_property
    def _decode(self):
        return jax.jit(
            lambda params, latents: self.net.apply({"params": params}, latents, method="decode")
        )


def load_autoencoder(path: str | Path) -> LoadedAutoencoder:
    """An autoencoder from published weights (the layout of diffusers' AutoencoderKL).

    Args:
        path: a folder with one of FILES and config.json, a folder with such a folder `vae/` (a
            whole pipeline), or a file of weights (.safetensors, .bin, .pt, .npz); the scaling
            factor is read from the config.json beside it, without one it is 0.18215.

    Raises:
        UserError: nothing there, or weights of something else.
    """
    from ...model.convert.autoencoder_kl import autoencoder_config, autoencoder_from_reference

    source = _locate(Path(path).expanduser())
    beside = config_beside(source)
    run, published = read_hyperparameters(beside) if beside else (None, None)
    if run is not None:
        raise UserError(f"{path} is a run of {type(run.net).__name__}, not a KL autoencoder")
    flat = read_arrays(source)
    try:
        config = autoencoder_config(flat, published)
        params = autoencoder_from_reference(flat, config)
    except ValueError as error:
        raise UserError(
            f"{source} holds no KL autoencoder in the layout of diffusers' AutoencoderKL: {error}"
        ) from error
    return LoadedAutoencoder(config, params, path)


def _locate(path: Path) -> Path:
    """The file of weights that `path` means."""
    if path.is_file():
        return path
    for name in FILES:
        for file in (path / name, path / "vae" / name):
            if file.is_file():
                return file
    why = "holds no weights of an autoencoder" if path.exists() else "does not exist"
    raise UserError(
        f"the autoencoder {path} {why}; name a file of weights (.safetensors, .bin, .npz), or a "
        f"folder with one of {', '.join(FILES)} and config.json, itself or in vae/"
    )


def check_autoencoder(latents: str, autoencoder: LoadedAutoencoder, what: str) -> None:
    """Raises UserError unless `autoencoder` made the latents whose fingerprint is given; `what`
    has them ("DIR holds", "the run was trained on").
    """
    if latents != autoencoder.fingerprint:
        raise UserError(
            f"{autoencoder.path} is not the autoencoder whose latents {what} "
            f"({autoencoder.fingerprint} instead of {latents}); name that one with "
            "data.autoencoder"
        )
