"""An image tokenizer, loaded for use: from a run directory or from published weights."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ...model.nets.vq_tokenizer import VQTokenizer, VQTokenizerConfig
from ...model.partition import path_string
from ...model.processes.adversarial import AdversarialReconstruction
from ..errors import UserError
from ..loaded.base import LoadedRun
from ..mesh import OnDevicesOf
from ..schema import ImageData, ImageSample, Run

# What a tokenizer without a training run of its own is: weights, nothing to train.
_NO_TRAINING = AdversarialReconstruction(disc_weight=0.0, perceptual_weight=0.0)


class LoadedTokenizer(LoadedRun):
    """A VQ tokenizer: images to codes and back.

    Attributes:
        net: computes in float32, so that codes do not depend on the precision of training.
        codebook_size, downsample: number of codes; pixels per code and side.
    """

    def __init__(self, config: Run, params, stats=None, **options):
        super().__init__(config, params, stats or {}, **options)
        self.net = VQTokenizer(config.net, jnp.float32)
        self.codebook_size, self.downsample = config.net.codebook_size, config.net.downsample
        self._params_for = OnDevicesOf(self.params["tokenizer"])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of config and weights; codes carry it, so that they meet no other tokenizer."""
        return fingerprint_of(self.config.net, self.params["tokenizer"])

    def encode(self, images) -> jax.Array:
        """Codes [B, h, w] int32 of images [B, H, W, 3] in [-1, 1]; computed where the images are.

        Raises:
            ValueError: height or width is not a multiple of `downsample`.
        """
        return self._encode(self._params_for(images), images)

    def decode(self, codes) -> jax.Array:
        """Images [B, H, W, 3] float32, about in [-1, 1], of codes [B, h, w]."""
        return self._decode(self._params_for(codes), codes)

    @functools.cached_property
    def _encode(self):
        def encode(params, images):
            with jax.default_matmul_precision("highest"):  # a flipped code is another picture
                return self.net.apply({"params": params}, images, method="encode")

        return jax.jit(encode)

    @functools.cached_property
    def _decode(self):
        return jax.jit(
            lambda params, codes: self.net.apply({"params": params}, codes, method="decode")
        )


def fingerprint_of(config, params) -> str:
    """Hash of a config and of weights, by name and in float32."""
    digest = hashlib.sha256(repr(config).encode())
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, array in sorted((path_string(p), a) for p, a in leaves):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(array, np.float32).tobytes())
    return digest.hexdigest()[:16]


def load_tokenizer(path: str | Path) -> LoadedTokenizer:
    """A tokenizer from a run directory of stage 1, or from published weights.

    Args:
        path: a run directory, or a file of LlamaGen's or AiM's layout (.pt, .safetensors, .npz).

    Raises:
        UserError: nothing there, or a run or file of something else.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(
            f"the tokenizer {path} does not exist; name a run directory of a tokenizer, or a file "
            "of published weights"
        )
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        from ..loaded.load import load

        loaded = load(path)
        if not isinstance(loaded, LoadedTokenizer):
            raise UserError(f"{path} is a run of another kind of model, not of an image tokenizer")
        return loaded
    from ...model.convert.vq_tokenizer import config_from_shapes, tokenizer_from_reference
    from ..arrays import read_arrays

    flat = read_arrays(path)
    try:
        net = config_from_shapes(flat)
        params = tokenizer_from_reference(flat)
    except ValueError as error:
        raise UserError(f"{path} holds no VQ tokenizer: {error}") from error
    return from_arrays(net, params, path)


def check_fingerprint(codes: str, tokenizer: LoadedTokenizer, what: str) -> None:
    """Raises UserError unless `tokenizer` made the codes whose fingerprint is given."""
    if codes != tokenizer.fingerprint:
        raise UserError(
            f"{tokenizer.path} is not the tokenizer whose codes {what} "
            f"({tokenizer.fingerprint} instead of {codes}); name that one with data.tokenizer"
        )


def from_arrays(net: VQTokenizerConfig, params, path: str | Path | None = None) -> LoadedTokenizer:
    """A tokenizer of these weights, without a training run."""
    params = jax.tree.map(jnp.asarray, params)
    run = tokenizer_run(net)
    return LoadedTokenizer(run, {"tokenizer": params}, path=path and Path(path))


def tokenizer_run(net: VQTokenizerConfig) -> Run:
    """The config of a tokenizer that was not trained here."""
    return Run(net=net, process=_NO_TRAINING, data=ImageData(path=""), sample=ImageSample())
