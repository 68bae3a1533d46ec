"""CLIP score: how well images fit their captions (arXiv 2104.08718, with the weight 100)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ...model.nets.clip import Clip, ClipConfig, unit
from ..arrays import config_beside, read_arrays, read_hyperparameters
from ..data.captions import ClipVocab
from ..data.crops import center_crop, to_unit
from ..encoders.text import locate_encoder, tokenizer_folder
from ..encoders.tokenizer import fingerprint_of
from ..errors import UserError


@dataclasses.dataclass(frozen=True)
class ClipScore:
    """The figure and what it depends on.

    Attributes:
        score: mean of 100 max(cos(image, caption), 0).
        count: pairs. size: side at which CLIP saw the images. clip: fingerprint of its weights.
    """

    score: float
    count: int
    size: int
    clip: str


class LoadedClip:
    """Both towers of CLIP and the tokenizer, in float32.

    Attributes:
        config: sizes. params: of `Clip`. tokenizer: of the texts. path: where all came from.

    Raises:
        UserError: a tower or a projection is missing, or the tokenizer has more ids than the net.
    """

    def __init__(self, config: ClipConfig, params, tokenizer: ClipVocab, path=None):
        if not (config.text and config.vision and config.projection):
            raise UserError(
                f"{path or 'these weights'}: a CLIP score needs both towers of CLIP and their "
                "projections; name the folder of a whole CLIPModel"
            )
        if tokenizer.size > config.text.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.size} ids, the CLIP {path or ''} only "
                f"{config.text.vocab_size}; they do not belong together"
            )
        self.config, self.tokenizer, self.path = config, tokenizer, path
        self.params = jax.tree.map(jnp.asarray, params)
        self.net = Clip(config)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of config, weights and tokenizer."""
        return f"{fingerprint_of(self.config, self.params)}-{self.tokenizer.fingerprint}"

    @property
    def size(self) -> int:
        """Side of the images that the net takes."""
        return self.config.vision.image_size

    @functools.cached_property
    def cosines(self):
        """Jitted (params, images [B, size, size, 3] in [-1, 1], ids [B, T]) -> [B] float32."""

        def cosines(params, images, ids):
            net = self.net.bind({"params": params})
            with jax.default_matmul_precision("high"):
                image, text = unit(net.encode_image(images)), unit(net.encode_text(ids).pooled)
            return jnp.sum(image * text, axis=-1)

        return jax.jit(cosines)


def load_clip(path: str | Path, *, tokenizer: str | Path = "") -> LoadedClip:
    """CLIP from published weights in the layout of transformers' CLIPModel.

    Args:
        path: a folder with weights, config.json, vocab.json and merges.txt.
        tokenizer: the folder of the last two, if it is another.

    Raises:
        UserError: nothing there, weights of something else, or no tokenizer.
    """
    from ...model.convert.clip import clip_config, clip_from_reference

    source = locate_encoder(Path(path).expanduser())
    beside = config_beside(source)
    published = read_hyperparameters(beside)[1] if beside else None
    flat = read_arrays(source)
    try:
        config = clip_config(flat, published)
        params = clip_from_reference(flat, config)
    except ValueError as error:
        raise UserError(f"{path} holds no CLIP in the layout of transformers: {error}") from error
    folder = source if source.is_dir() else source.parent
    vocab = ClipVocab(tokenizer_folder(folder, tokenizer, "merges.txt"))
    return LoadedClip(config, params, vocab, path)


def clip_score(
    clip: LoadedClip, images: Iterable[np.ndarray], captions: Sequence[str], *, batch_size: int = 64
) -> ClipScore:
    """Mean of 100 max(cos, 0) over images and their captions.

    Images are seen as CLIP was trained: the shorter side resized to `clip.size` (bicubic), then the
    centre. Captions longer than CLIP's positions are cut.

    Args:
        images: [H, W, 3] uint8 each, as many as captions.
        batch_size: pairs at a time.

    Raises:
        UserError: another number of images than of captions, or none.
    """
    meter, count = ClipMeter(clip, batch_size), 0
    for image in images:
        count += 1
        if count > len(captions):
            break
        meter.add(image, captions[count - 1])
    if count != len(captions) or not count:
        more = "more than " * (count > len(captions))
        raise UserError(
            f"{more}{min(count, len(captions))} images for {len(captions)} captions; give one "
            "caption per image"
        )
    return meter.score()


class ClipMeter:
    """The CLIP score of pairs as they come; see `clip_score`."""

    def __init__(self, clip: LoadedClip, batch_size: int = 64):
        self.clip, self.batch_size = clip, batch_size
        self._total, self._count = 0.0, 0
        self._images: list[np.ndarray] = []
        self._captions: list[str] = []

    def add(self, image: np.ndarray, caption: str) -> None:
        """One more pair; image [H, W, 3] uint8."""
        self._images.append(_seen(image, self.clip.size))
        self._captions.append(caption)
        if len(self._images) == self.batch_size:
            self._close()

    def score(self) -> ClipScore:
        """The mean over all pairs so far, at least one."""
        if self._images:
            self._close()
        clip = self.clip
        return ClipScore(100 * self._total / self._count, self._count, clip.size, clip.fingerprint)

    def _close(self) -> None:
        clip, count = self.clip, len(self._images)
        length = clip.config.text.length
        rows = np.zeros((self.batch_size, clip.size, clip.size, 3), np.float32)
        rows[:count] = to_unit(np.stack(self._images))
        texts = np.zeros((self.batch_size, length), np.int32)
        texts[:count] = clip.tokenizer.rows(self._captions, length)[0]
        cosines = np.asarray(clip.cosines(clip.params, rows, texts))[:count]
        self._total += float(np.maximum(cosines.astype(np.float64), 0).sum())
        self._count += count
        self._images.clear()
        self._captions.clear()


def _seen(image: np.ndarray, size: int) -> np.ndarray:
    """[size, size, 3] uint8: the centre of the image, its shorter side resized to `size`."""
    from PIL import Image

    height, width = image.shape[:2]
    if min(height, width) != size:
        scale = size / min(height, width)
        sides = (int(width * scale + 1e-6), int(height * scale + 1e-6))
        sides = tuple(max(side, size) for side in sides)
        resized = Image.fromarray(image).resize(sides, Image.Resampling.BICUBIC)
        image = np.asarray(resized)
    return center_crop(image, size)
