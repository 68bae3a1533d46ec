"""Moving digits by class with a small block-causal net that mixes by products of features instead
of attention, drawn frame by frame, on a CPU.

Paper: arXiv 2411.12663; a very small relative of its text-to-video model on scikit-learn's 1,797
digits, which move and bounce: 8 frames of 12x12. A class is a text of one learned token. Frames see
those before them, so samples are streams: a state of fixed size instead of the frames so far.
Measured: 230 s of CPU time, start to samples (583 s on 2 CPU cores that mostly did other work);
loss on held-out videos 0.272. It draws shapes of the size of digits that move; few can be read.
Command: lintime train pom/video_quickstart
Longer videos of the same net: lintime sample --run runs/pom-video_quickstart sample.frames=16
"""

from ...model.nets.text_video_dih import TextVideoDiHConfig
from ...model.processes.noise_levels import NoiseLevels
from ...train.schema import (
    EMA,
    Checkpoint,
    Eval,
    LevelSample,
    Log,
    Optim,
    Run,
    VideoData,
)

config = Run(
    net=TextVideoDiHConfig(
        frames=8, input_size=12, input_width=0, patch_size=4, patch_frames=2, in_channels=3,
        d_model=128, n_layer=4, expand=1, context_dim=64, num_classes=10, block_causal=True,
    ),
    process=NoiseLevels(),
    data=VideoData(path="builtin:moving_digits", size=12, frames=8),
    optim=Optim(
        learning_rate=2e-3, warmup=50, schedule="cosine", final=0.05, b2=0.99, clip=1.0
    ),
    ema=EMA(decay=0.99, start=50, power=2 / 3),
    sample=LevelSample(
        method="heun", steps=20, guidance=2.0, stream=True, count=20, columns=10, rows=20
    ),
    batch_size=48,
    steps=900,
    checkpoint=Checkpoint(every=0, keep=1),
    eval=Eval(every=0, batches=0),
    log=Log(every=20),
)  # fmt: skip
