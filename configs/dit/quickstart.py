"""Handwritten digits by class with a pixel DiT and flow matching, on a CPU.

Paper: DiT, arXiv 2212.09748, trained as SiT, arXiv 2401.08740 (a very small relative on
scikit-learn's 1,797 digits, 8x8 pixels shown at 16x16).
Measured: 84 s on 2 CPU cores, start to samples.
Command: lintime train dit/quickstart
"""

from ...model.nets.dit import DiTConfig
from ...model.processes.flow import FlowMatching
from ...train.schema import (
    EMA,
    Checkpoint,
    DiffusionSample,
    Eval,
    ImageData,
    Log,
    Optim,
    Run,
)

config = Run(
    net=DiTConfig(
        input_size=16, patch_size=4, in_channels=3, d_model=128, n_layer=4, n_head=4,
        num_classes=10, learn_sigma=False,
    ),
    process=FlowMatching(),
    data=ImageData(path="builtin:digits", size=16, crop="center", resize=1.0, filter="bicubic"),
    optim=Optim(
        learning_rate=2e-3, warmup=50, schedule="cosine", final=0.05, b2=0.99, clip=1.0
    ),
    ema=EMA(decay=0.99),
    sample=DiffusionSample(
        method="euler", steps=25, guidance=2.0, count=100, columns=10, rows=100
    ),
    batch_size=64,
    steps=1200,
    checkpoint=Checkpoint(every=0, keep=1),
    eval=Eval(every=0, batches=0),
    log=Log(every=20),
)  # fmt: skip
