"""Pixel DiT on CIFAR-10 or other 32x32 images of 10 classes: 48 M parameters, no autoencoder.

Paper: the net of DiT, arXiv 2212.09748; cosine schedule and learned variances of arXiv 2102.09672.
Cost: 8.7 Gmacs (10^9 multiply-adds) forward per image; 200 K updates of 256.
Expected: no published figure for this net.
Command: lintime train dit/cifar10 data.path=cifar10.npz
Not run. The .npz holds `images` uint8 [N, 32, 32, 3] and `labels` [N].
"""

from ...model.nets.dit import DiTConfig
from ...model.processes.gaussian import GaussianDiffusion
from ...train.schema import (
    EMA,
    Checkpoint,
    DiffusionSample,
    Eval,
    ImageData,
    Optim,
    Precision,
    Run,
)

config = Run(
    net=DiTConfig(
        input_size=32, patch_size=2, in_channels=3, d_model=512, n_layer=10, n_head=8,
        num_classes=10,
    ),
    process=GaussianDiffusion(schedule="squaredcos_cap_v2"),
    data=ImageData(path="cifar10.npz", size=32, crop="center", resize=1.0, flip=True),
    optim=Optim(
        learning_rate=3e-4, schedule="constant", warmup=2000, b2=0.999, eps=1e-8, clip=1.0
    ),
    ema=EMA(decay=0.9999),
    precision=Precision(compute="bfloat16"),
    sample=DiffusionSample(method="dpm++2m", steps=50, guidance=1.5, clip=True, count=100),
    batch_size=256,
    steps=200_000,
    checkpoint=Checkpoint(every=5000),
    eval=Eval(every=5000, batches=10),
)  # fmt: skip
