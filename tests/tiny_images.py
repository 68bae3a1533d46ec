"""A pipeline of image tokenizer and AiM that trains in seconds, on images made of noise."""

from __future__ import annotations

import pathlib

import numpy as np

from lintime.model.nets.aim import AiMConfig
from lintime.model.nets.vq_tokenizer import VQTokenizerConfig
from lintime.model.processes.adversarial import AdversarialReconstruction
from lintime.train.override import apply_overrides
from lintime.train.schema import (
    Checkpoint,
    CodeData,
    Eval,
    ImageData,
    ImageSample,
    Log,
    Optim,
    Run,
)

SIZE, CLASSES, CODES = 8, 4, 8
TOKENIZER = VQTokenizerConfig(
    ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, codebook_size=CODES, codebook_dim=4
)
NET = AiMConfig(
    vocab_size=CODES, num_classes=CLASSES, num_tokens=16, d_model=16, n_layer=2, d_state=4,
    headdim=8, chunk=8, conditioning="adaln_group", num_groups=2,
)  # fmt: skip
COMMON = {
    "optim": Optim(learning_rate=1e-2, warmup=2, clip=1.0),
    "checkpoint": Checkpoint(every=0),
    "eval": Eval(every=0, batches=1),
    "log": Log(every=1),
    "batch_size": 8,
}


def write_images(path: pathlib.Path, count: int = 40, seed: int = 0, size: int = SIZE):
    """An .npz of noise around a level for each class."""
    rng, labels = np.random.default_rng(seed), np.arange(count) % CLASSES
    noise = rng.integers(0, 64, (count, size, size, 3)) + 48 * labels[:, None, None, None]
    np.savez(path, images=noise.astype(np.uint8), labels=labels)
    return path


def _images(path) -> ImageData:
    return ImageData(path=str(path), size=SIZE, resize=1.0, validation_fraction=0.2)


def tokenizer_run(images, *overrides: str) -> Run:
    """Stage 1 without perceptual and adversarial losses, three updates."""
    run = Run(
        net=TOKENIZER, data=_images(images), steps=3, sample=ImageSample(count=4),
        process=AdversarialReconstruction(perceptual_weight=0.0, disc_weight=0.0), **COMMON,
    )  # fmt: skip
    return apply_overrides(run, overrides)


def aim_run(images, *overrides: str) -> Run:
    """Both stages, four updates of the second."""
    run = Run(
        stages=(tokenizer_run(""),), net=NET, steps=4, sample=ImageSample(count=4, rows=4),
        data=CodeData(images=_images(images), views="flip", resizes=(1.0,)), **COMMON,
    )  # fmt: skip
    return apply_overrides(run, overrides)
