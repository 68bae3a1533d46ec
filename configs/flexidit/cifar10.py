"""CIFAR-10 pixels at several compute budgets: a small DiT, then taught patches of 4 beside 2.

Paper: FlexiDiT, arXiv 2502.20126 (a small relative: 27 M parameters, 32x32 pixels).
Cost: 5.0 Gmacs (10^9 multiply-adds) forward per image at patch size 2, 1.2 at 4; 12 K updates of
256 for the DiT, 4 K for adapters of patch size 4.
Measured on one H200: the DiT 31 ms an update. The adapters: not run. One set of weights for both
patch sizes (net.variant=shared, process.denoise=1, optim.learning_rate=2e-4) diverged after 1.3 K.
Meant for benchmarks/flexidit_quality.py.
Command: lintime train flexidit/cifar10 data.path=cifar10.npz stages.0.data.path=cifar10.npz
The .npz holds `images` uint8 [N, 32, 32, 3] and `labels` [N].
"""

from ...model.nets.dit import DiTConfig
from ...model.nets.flexidit import FlexiDiTConfig
from ...model.processes.flexible import FlexibleDiffusion
from ...model.processes.gaussian import GaussianDiffusion
from ...train.schema import (
    EMA,
    Checkpoint,
    DiffusionSample,
    Eval,
    FlexibleSample,
    ImageData,
    Log,
    Optim,
    Precision,
    Run,
)

IMAGES = ImageData(
    path="cifar10.npz", size=32, crop="center", resize=1.0, flip=True, workers=4
)  # fmt: skip
PROCESS = {"schedule": "squaredcos_cap_v2"}
DRAWN = {"method": "dpm++2m", "steps": 50, "guidance": 1.5, "clip": True}
COMMON = {
    "data": IMAGES,
    "precision": Precision(compute="bfloat16", unroll=True),
    "batch_size": 256,
    "checkpoint": Checkpoint(every=0, keep=1),
    "log": Log(every=100),
}

dit = Run(
    net=DiTConfig(
        input_size=32, patch_size=2, in_channels=3, d_model=384, n_layer=10, n_head=6,
        num_classes=10,
    ),
    process=GaussianDiffusion(**PROCESS),
    optim=Optim(learning_rate=5e-4, warmup=500, final=0.05, b2=0.99, clip=1.0),
    ema=EMA(decay=0.9995),
    sample=DiffusionSample(**DRAWN, count=100, columns=10, rows=100),
    steps=12_000,
    eval=Eval(every=3000, batches=8),
    **COMMON,
)  # fmt: skip

config = Run(
    stages=(dit,),
    init_from="stage:0",
    net=FlexiDiTConfig(base=dit.net, patch_sizes=(2, 4), variant="lora", detail=1.0),
    process=FlexibleDiffusion(denoise=0.0, distill=1.0, **PROCESS),
    optim=Optim(learning_rate=5e-4, warmup=100, final=0.05, b2=0.99, clip=1.0),
    ema=EMA(decay=0.999),
    sample=FlexibleSample(
        **DRAWN, count=50, columns=10, rows=50, budgets=(1.0, 0.8, 0.6, 0.4)
    ),
    steps=4000,
    eval=Eval(every=1000, batches=8),
    **COMMON,
)  # fmt: skip
