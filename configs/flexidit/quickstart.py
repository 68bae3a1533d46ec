"""Digits by a DiT that is taught a second patch size, drawn at three compute budgets, on a CPU.

Paper: FlexiDiT, arXiv 2502.20126 (a very small relative on scikit-learn's 1,797 digits).
Command: lintime train flexidit/quickstart
"""

import dataclasses

from ...model.nets.flexidit import FlexiDiTConfig
from ...model.processes.flexible import FlexibleFlow
from ...train.schema import (
    EMA,
    Checkpoint,
    Eval,
    FlexibleSample,
    Log,
    Optim,
    Run,
)
from ..dit.quickstart import config as quickstart

dit = dataclasses.replace(quickstart, steps=800)

config = Run(
    stages=(dit,),
    init_from="stage:0",
    net=FlexiDiTConfig(base=dit.net, patch_sizes=(4, 8)),
    process=FlexibleFlow(powerful_share=0.3, distill=1.0),
    data=dit.data,
    optim=Optim(
        learning_rate=1e-3, warmup=20, schedule="cosine", final=0.05, b2=0.99, clip=1.0
    ),
    ema=EMA(decay=0.98),
    sample=FlexibleSample(
        method="euler", steps=25, guidance=2.0, count=30, columns=10, rows=30,
        budgets=(1.0, 0.6, 0.4),
    ),
    batch_size=64,
    steps=300,
    checkpoint=Checkpoint(every=0, keep=1),
    eval=Eval(every=0, batches=0),
    log=Log(every=20),
)  # fmt: skip
