"""JiT-B/16 with polynomial mixers on the pixels of ImageNet 256x256: 117 M parameters.

Paper: JiT, arXiv 2511.13720, with PoM, arXiv 2604.06129, in place of attention.
Cost: 18.0 Gmacs (10^9 multiply-adds) forward per image, three times that per update; 600 epochs.
Expected: no published figure for this net.
Command: lintime train jit/imagenet256 data.path=IMAGENET
Not run. Judged by: lintime eval --run RUN eval.samples=50000 eval.inception=FILE
eval.reference=FILE. No random crops: the centre, and its mirror image at random. The averages are
0.9999 and 0.9996 as published; here one run keeps one of them: ema.decay=0.9996 for the other. The
strength of guidance is chosen here.
"""

from ...model.nets.jit import jit_config, jit_process
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

EPOCH = 1_281_167 // 512  # updates

config = Run(
    net=jit_config("B"),
    process=jit_process(256),
    data=ImageData(
        path="imagenet", size=256, crop="center", resize=1.0, filter="bicubic", flip=True, workers=8
    ),
    optim=Optim(
        learning_rate=1e-4, schedule="constant", warmup=5 * EPOCH, b1=0.9, b2=0.95, eps=1e-8
    ),
    ema=EMA(decay=0.9999),
    precision=Precision(compute="bfloat16"),
    sample=DiffusionSample(
        method="heun", steps=50, guidance=3.0, guided_times=(0.1, 1.0), count=16, rows=16
    ),
    batch_size=512,
    steps=600 * EPOCH,
    checkpoint=Checkpoint(every=10_000),
    eval=Eval(every=10_000, batches=20),
)
