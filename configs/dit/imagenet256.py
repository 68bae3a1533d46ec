"""DiT-XL/2 on ImageNet 256x256 latents: 675 M parameters.

Paper: DiT, arXiv 2212.09748, sections 3 and 4, in bfloat16 (the released code: float32).
Cost: 118.6 Gmacs (10^9 multiply-adds) forward per image, three times that per update; 7 M updates.
Expected: FID 2.27 with guidance 1.5 at 250 steps (repository of the paper); 19.5 without guidance
after 400 K updates.
Command:
  lintime prepare latents IMAGENET --autoencoder sd-vae-ft-ema --out imagenet-latents
  lintime train dit/imagenet256 data.path=imagenet-latents data.autoencoder=sd-vae-ft-ema
Not run. Judged by: lintime eval --run RUN eval.samples=50000 eval.inception=FILE
eval.reference=FILE sample.guidance=1.5. Sizes: net.d_model=384 net.n_layer=12 net.n_head=6 (S),
768 12 12 (B), 1024 24 16 (L); net.patch_size=4 or 8. On several hosts add --distributed and
mesh.fsdp=8.
"""

from ...model.nets.dit import DiTConfig
from ...model.processes.gaussian import GaussianDiffusion
from ...train.schema import (
    EMA,
    Checkpoint,
    DiffusionSample,
    Eval,
    LatentData,
    Optim,
    Precision,
    Run,
)

config = Run(
    net=DiTConfig(),
    process=GaussianDiffusion(),
    data=LatentData(path="imagenet-latents", autoencoder="sd-vae-ft-ema"),
    optim=Optim(learning_rate=1e-4, schedule="constant", warmup=0, b2=0.999, eps=1e-8),
    ema=EMA(decay=0.9999),
    precision=Precision(compute="bfloat16"),
    sample=DiffusionSample(guidance=4.0, guidance_channels=3, count=16, rows=16),
    batch_size=256,
    steps=7_000_000,
    checkpoint=Checkpoint(every=10_000),
    eval=Eval(every=10_000, batches=20),
)
