"""A text encoder, loaded for use from published weights: CLIP's text tower or T5's encoder."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ...model.nets.clip import Clip, ClipConfig
from ...model.nets.t5 import T5Config, T5Encoder
from ..arrays import config_beside, read_arrays, read_hyperparameters
from ..data.captions import ClipVocab, T5Vocab
from ..errors import UserError
from .tokenizer import fingerprint_of

T5_LENGTH = 128  # tokens of a text unless asked otherwise; CLIP has as many as positions
SENTENCEPIECE = "spiece.model"
# Of a pipeline's folder: where its text encoders lie, each with the folder of its tokenizer.
PIPELINE = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))


class TextEncoding(NamedTuple):
    """Of B texts: features [B, T, D] float32 of every token, mask [B, T] bool of those that belong
    to the text (its begin and end too), pooled [B, P] float32.
    """

    features: jax.Array
    mask: jax.Array
    pooled: jax.Array


class LoadedTextEncoder:
    """Texts to features.

    What is pooled is, of CLIP, the projected state at the end of the text (not projected where the
    weights have no projection), and of T5 the mean of the text's tokens.

    Attributes:
        config: sizes. params: of `Clip` (its text tower) or `T5Encoder`.
        tokenizer: `ClipVocab` or `T5Vocab`.
        length: T, tokens of every text; longer ones are cut.
        width, pooled_width: D and P.
        path: where the weights came from, if anywhere.
    """

    def __init__(
        self,
        config: ClipConfig | T5Config,
        params,
        tokenizer: ClipVocab | T5Vocab,
        *,
        length: int = 0,
        dtype=jnp.float32,
        path: str | Path | None = None,
    ):
        """
        Args:
            length: 0: as many as CLIP has positions, 128 for T5.
            dtype: of the matmuls.

        Raises:
            UserError: a length that the encoder does not have, or a tokenizer with more ids than
                the encoder.
        """
        self.config, self.tokenizer, self.path = config, tokenizer, path and Path(path)
        self.params = jax.tree.map(jnp.asarray, params)
        is_clip = isinstance(config, ClipConfig)
        sizes = config.text if is_clip else config
        self.width = self.pooled_width = sizes.d_model
        if is_clip:
            self.pooled_width = config.projection or self.width
        self.length = length or (sizes.length if is_clip else T5_LENGTH)
        if self.length < 2 or (is_clip and self.length > sizes.length):
            most = f"2 to {sizes.length}" if is_clip else "at least 2"
            raise UserError(f"texts of {self.length} tokens; this encoder takes {most}")
        if tokenizer.size > sizes.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.size} ids, the text encoder {path or ''} only "
                f"{sizes.vocab_size}; they do not belong together"
            )
        self.net = Clip(config, dtype) if is_clip else T5Encoder(config, dtype)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of config, weights and tokenizer; features carry it, so that they meet no other
        encoder. The length is not part of it.
        """
        own = fingerprint_of(self.config, self.params)
        return f"{own}-{self.tokenizer.fingerprint}"

    def encode(self, texts: Sequence[str]) -> TextEncoding:
        """Features of texts. Compiles once per number of texts."""
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, not one text")
        return self._encode(self.params, *self.tokenizer.rows(texts, self.length))

    @functools.cached_property
    def _encode(self):
        def clip(params, ids, mask):
            states, pooled = self.net.apply({"params": params}, ids, method="encode_text")
            return TextEncoding(states, mask, pooled)

        def t5(params, ids, mask):
            states = self.net.apply({"params": params}, ids, mask)
            weight = mask[..., None].astype(jnp.float32)
            pooled = jnp.sum(states * weight, axis=1) / jnp.sum(weight, axis=1)
            return TextEncoding(states, mask, pooled)

        encode = clip if isinstance(self.config, ClipConfig) else t5

        def run(params, ids, mask):
            with jax.default_matmul_precision("high"):  # TF32 on GPUs
                return encode(params, ids, mask)

        return jax.jit(run)


def load_text_encoder(
    path: str | Path, *, tokenizer: str | Path = "", length: int = 0, dtype=jnp.float32
) -> LoadedTextEncoder:
    """A text encoder from published weights in the layout of transformers.

    Args:
        path: a folder with weights (model.safetensors, in shards too, or pytorch_model.bin) and
            config.json, or a pipeline's with such a folder `text_encoder/`, or a file of weights.
        tokenizer: the folder of vocab.json and merges.txt (CLIP) or spiece.model (T5), where it is
            not the folder of the weights, `tokenizer/` in it, or beside it.
        length, dtype: see `LoadedTextEncoder`.

    Raises:
        UserError: nothing there, weights of something else, or no tokenizer.
    """
    source = locate_encoder(Path(path).expanduser())
    beside = config_beside(source)
    run, published = read_hyperparameters(beside) if beside else (None, None)
    if run is not None:
        raise UserError(f"{path} is a run of {type(run.net).__name__}, not a text encoder")
    config, params = read_weights(source, published)
    folder = source if source.is_dir() else source.parent
    if isinstance(config, T5Config):
        model = tokenizer_folder(folder, tokenizer, SENTENCEPIECE) / SENTENCEPIECE
        vocab = T5Vocab(model)
    else:
        vocab = ClipVocab(tokenizer_folder(folder, tokenizer, "merges.txt"))
    return LoadedTextEncoder(config, params, vocab, length=length, dtype=dtype, path=path)


def read_weights(source: Path, published: dict | None) -> tuple[ClipConfig | T5Config, dict]:
    """Config and parameters of a text encoder; of a whole CLIP the text's part.

    Raises:
        UserError: weights of something else.
    """
    from ...model.convert import clip, t5

    flat = read_arrays(source)
    try:
        if any(name.startswith("encoder.block.") for name in flat):
            config = t5.t5_config(flat, published)
            return config, t5.t5_from_reference(flat, config)
        flat = clip.text_arrays(flat)
        config = clip.clip_config(flat, published)
        return config, clip.clip_from_reference(flat, config)
    except ValueError as error:
        raise UserError(
            f"{source} holds no text encoder in the layout of transformers' CLIP or T5: {error}"
        ) from error


def locate_encoder(path: Path) -> Path:
    """The folder or file of weights that `path` means."""
    if not path.exists():
        raise UserError(
            f"the text encoder {path} does not exist; name a folder with config.json and "
            "model.safetensors"
        )
    inner = path / PIPELINE[0][0]
    return inner if path.is_dir() and inner.is_dir() else path


def tokenizer_folder(folder: Path, given: str | Path, file: str) -> Path:
    """The first folder that has the tokenizer's file.

    Raises:
        UserError: none has.
    """
    beside = dict(PIPELINE).get(folder.name, "tokenizer")
    places = [folder, folder / "tokenizer", folder.parent / beside]
    places = [Path(given).expanduser()] if given else places
    for place in places:
        if (place / file).is_file():
            return place
    listed = ", ".join(map(str, places))
    raise UserError(f"no tokenizer: {file} is in none of {listed}; fetch it, or name its folder")
