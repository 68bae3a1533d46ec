"""Digits by a DiT that is taught a second patch size, drawn at three compute budgets, on a CPU.

Paper: FlexiDiT, arXiv 2502.20126 (a very small relative on scikit-learn's 1,797 digits, 8x8 pixels
shown at 16x16). Stage 0 is the DiT. Both predict the clean image: of noise, an 8x8 patch of three
channels has more than the 128 numbers of a token.
Measured: 92 s on 2 CPU cores, start to samples.
Command: lintime train flexidit/quickstart
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
    Run,
)

IMAGES = ImageData(path="builtin:digits", size=16, crop="center", resize=1.0, filter="bicubic")
PROCESS = {"schedule": "squaredcos_cap_v2", "predict": "x_start", "variance": "fixed_small"}

dit = Run(
    net=DiTConfig(
        input_size=16, patch_size=4, in_channels=3, d_model=128, n_layer=4, n_head=4,
        num_classes=10, learn_sigma=False,
    ),
    process=GaussianDiffusion(**PROCESS),
    data=IMAGES,
    optim=Optim(learning_rate=2e-3, warmup=50, final=0.05, b2=0.99, clip=1.0),
    ema=EMA(decay=0.99),
    sample=DiffusionSample(method="ddim", steps=25, guidance=2.0, clip=True),
    batch_size=64,
    steps=800,
    checkpoint=Checkpoint(every=0, keep=1),
    eval=Eval(every=0, batches=0),
    log=Log(every=20),
)  # fmt: skip

config = Run(
    stages=(dit,),
    init_from="stage:0",
    net=FlexiDiTConfig(base=dit.net, patch_sizes=(4, 8), detail=1.0),
    process=FlexibleDiffusion(powerful_share=0.5, distill=1.0, **PROCESS),
    data=IMAGES,
    optim=Optim(learning_rate=1e-3, warmup=20, final=0.05, b2=0.99, clip=1.0),
    ema=EMA(decay=0.98),
    sample=FlexibleSample(
        method="ddim", steps=25, guidance=2.0, clip=True, count=30, columns=10, rows=30,
        budgets=(1.0, 0.6, 0.4),
    ),
    batch_size=64,
    steps=400,
    checkpoint=Checkpoint(every=0, keep=1),
    eval=Eval(every=0, batches=0),
    log=Log(every=20),
)  # fmt: skip
