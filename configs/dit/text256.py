"""A DiT-XL/2 that reads text, on 256x256 latents: 829 M parameters.

Paper: PixArt-alpha, arXiv 2310.00426, sections 2.3 and 3.1: every block reads 120 tokens of T5-XXL
by cross-attention. There all blocks share their modulation and the net starts from DiT-XL/2; here
each has its own, as in DiT, and the net starts anew.
Cost: 149.3 Gmacs (10^9 multiply-adds) forward per image; features take 1 MB a caption.
Command:
  lintime prepare latents IMAGES --autoencoder sd-vae-ft-ema --out latents
  lintime prepare text IMAGES --encoder t5-v1_1-xxl --length 120 --out text
  lintime train dit/text256 data.path=latents data.text=text data.autoencoder=sd-vae-ft-ema
  lintime sample --run runs/dit-text256 --text "a dog in the snow" --text "a red cat"
  lintime eval --run runs/dit-text256 eval.samples=1000 --clip clip-vit-large-patch14
Not run. With CLIP's features: --encoder clip-vit-large-patch14, net.context_dim=768
net.context_length=77. net.context=joint mixes both as MM-DiT (arXiv 2403.03206) does.
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
    net=DiTConfig(num_classes=0, context="cross", context_dim=4096, context_length=120),
    process=GaussianDiffusion(),
    data=LatentData(path="latents", text="text", autoencoder="sd-vae-ft-ema"),
    optim=Optim(
        learning_rate=1e-4, schedule="constant", warmup=1000, weight_decay=0.03,
        decay_times_lr=True, b2=0.999, eps=1e-8, clip=1.0,
    ),
    ema=EMA(decay=0.9999),
    precision=Precision(compute="bfloat16"),
    sample=DiffusionSample(method="dpm++2m", steps=20, guidance=4.5, count=16, rows=16),
    batch_size=256,
    steps=500_000,
    checkpoint=Checkpoint(every=10_000),
    eval=Eval(every=10_000, batches=20),
)  # fmt: skip
