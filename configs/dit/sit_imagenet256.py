"""SiT-XL/2 on ImageNet 256x256 latents: the net of DiT-XL/2, trained by flow matching.

Paper: SiT, arXiv 2401.08740, section 4 (linear path, velocity).
Cost: that of dit/imagenet256.
Expected: FID 2.06 with guidance 1.5 and the SDE sampler at 250 steps (repository of the paper).
Command:
  lintime train dit/sit_imagenet256 data.path=imagenet-latents data.autoencoder=sd-vae-ft-ema
Not run.
"""

import dataclasses

from ...model.processes.flow import FlowMatching
from ...train.schema import DiffusionSample
from .imagenet256 import config as base

config = dataclasses.replace(
    base,
    process=FlowMatching(),
    sample=DiffusionSample(method="sde", guidance=4.0, guidance_channels=3, count=16, rows=16),
)
