"""DiT-XL/2 on ImageNet 512x512 latents: 675 M parameters, 1,024 tokens.

Paper: DiT, arXiv 2212.09748, section 5.1.
Cost: 524.5 Gmacs (10^9 multiply-adds) forward per image; 3 M updates.
Expected: FID 3.04 with guidance 1.5 at 250 steps (repository of the paper).
Command:
  lintime prepare latents IMAGENET --size 512 --autoencoder sd-vae-ft-ema --out latents-512
  lintime train dit/imagenet512 data.path=latents-512 data.autoencoder=sd-vae-ft-ema
Not run.
"""

import dataclasses

from ...model.nets.dit import DiTConfig
from ...train.schema import LatentData
from .imagenet256 import config as base

config = dataclasses.replace(
    base,
    net=DiTConfig(input_size=64),
    data=LatentData(path="latents-512", autoencoder="sd-vae-ft-ema"),
    steps=3_000_000,
)
