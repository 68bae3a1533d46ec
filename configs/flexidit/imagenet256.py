"""FlexiDiT from DiT-XL/2 at 256x256: patch sizes 2 and 4 in one set of weights.

Paper: FlexiDiT, arXiv 2502.20126 (shared parameters; its recipe is not public in full, see
docs/dit.md for what was decided here).
Cost: patch size 4 is 29.0 of the 118.6 Gmacs (10^9 multiply-adds) of a forward pass.
Expected: FID 2.25 at 63% of the FLOPs (arXiv 2502.20126 as quoted by later work).
Command:
  lintime convert --from DiT-XL-2-256x256.pt --out runs/dit-xl
  lintime train flexidit/imagenet256 init_from=runs/dit-xl data.path=imagenet-latents
      data.autoencoder=sd-vae-ft-ema
Not run. With adapters and a frozen base: net.variant=lora process.denoise=0 process.distill=1
optim.learning_rate=1e-4.
"""

import dataclasses

from ...model.nets.flexidit import FlexiDiTConfig
from ...model.processes.flexible import FlexibleDiffusion
from ...train.schema import FlexibleSample
from ..dit.imagenet256 import config as base

config = dataclasses.replace(
    base,
    init_from="runs/dit-xl",
    net=FlexiDiTConfig(base=base.net),
    process=FlexibleDiffusion(),
    optim=dataclasses.replace(base.optim, learning_rate=2e-5),
    sample=FlexibleSample(
        guidance=4.0, guidance_channels=3, count=16, rows=16, budgets=(1.0, 0.6, 0.4)
    ),
    steps=200_000,
)
