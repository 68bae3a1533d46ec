"""AiM-B on ImageNet 256x256 token codes: 148 M parameters.

Paper: AiM, arXiv 2408.12245, sections 3 and 4; weight decay and an average of the weights as
intended there (the released code applies neither).
Cost: 300 epochs of 626 updates; 158 GFLOP per image and update, codes made beforehand.
Expected: FID 3.52 (repository of the paper), training loss about 7 nats per token.
Command:
  lintime prepare codes IMAGENET --tokenizer vq_ds16_c2i.pt --out imagenet-codes
  lintime train aim/imagenet_b data.path=imagenet-codes data.tokenizer=vq_ds16_c2i.pt
Not run. On several hosts add --distributed to both, and mesh.fsdp=8 to the second; on GPUs
precision.unroll=true makes steps faster and the first compilation some minutes longer.
"""

from ...model.nets.aim import AiMConfig
from ...train.schema import (
    EMA,
    Checkpoint,
    CodeData,
    Eval,
    ImageSample,
    Optim,
    Precision,
    Run,
)

config = Run(
    net=AiMConfig(d_model=768, n_layer=24, conditioning="adaln"),
    data=CodeData(path="imagenet-codes", tokenizer="vq_ds16_c2i.pt"),
    optim=Optim(
        learning_rate=8e-4, schedule="linear", final=0.0, warmup=0, weight_decay=0.05,
        decay_times_lr=True, b2=0.95, eps=1e-8, clip=1.0,
    ),
    ema=EMA(decay=0.9999),
    precision=Precision(compute="bfloat16"),
    sample=ImageSample(guidance=2.0, count=64),
    batch_size=2048,
    steps=187_800,
    checkpoint=Checkpoint(every=5000),
    eval=Eval(every=5000, batches=10),
)  # fmt: skip
