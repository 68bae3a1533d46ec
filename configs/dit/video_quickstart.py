"""Moving digits by class with a small spatio-temporal DiT, on a CPU.

Paper: DiT, arXiv 2212.09748, with patches of frames, rows and columns and its position table plus
one of time (Latte, arXiv 2401.03048); a very small relative on scikit-learn's 1,797 digits, which
move and bounce: 8 frames of 12x12. It predicts the clean video, which a net as small learns sooner
than noise.
Measured: 89 s on 2 CPU cores, start to samples.
Command: lintime train dit/video_quickstart
"""

from ...model.nets.dit import DiTConfig
from ...model.processes.gaussian import GaussianDiffusion
from ...train.schema import (
    EMA,
    Checkpoint,
    DiffusionSample,
    Eval,
    Log,
    Optim,
    Run,
    VideoData,
)

config = Run(
    net=DiTConfig(
        frames=8, patch_frames=2, input_size=12, patch_size=4, in_channels=3, d_model=128,
        n_layer=4, n_head=4, num_classes=10, learn_sigma=False,
    ),
    process=GaussianDiffusion(
        schedule="squaredcos_cap_v2", predict="x_start", variance="fixed_small"
    ),
    data=VideoData(path="builtin:moving_digits", size=12, frames=8),
    optim=Optim(
        learning_rate=2e-3, warmup=50, schedule="cosine", final=0.05, b2=0.99, clip=1.0
    ),
    ema=EMA(decay=0.99),
    sample=DiffusionSample(
        method="ddim", steps=25, guidance=2.0, clip=True, count=20, columns=10, rows=20
    ),
    batch_size=48,
    steps=900,
    checkpoint=Checkpoint(every=0, keep=1),
    eval=Eval(every=0, batches=0),
    log=Log(every=20),
)  # fmt: skip
