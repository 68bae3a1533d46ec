"""AiM-XL on ImageNet 256x256 token codes: 763 M parameters.

Paper: AiM, arXiv 2408.12245, sections 3 and 4; weight decay and an average of the weights as
intended there (the released code applies neither).
Cost: 350 epochs of 626 updates; 1.1 TFLOP per image and update, codes made beforehand.
Expected: FID 2.56 (repository of the paper).
Command:
  lintime prepare codes IMAGENET --tokenizer vq_ds16_c2i.pt --out imagenet-codes
  lintime train aim/imagenet_xl data.path=imagenet-codes data.tokenizer=vq_ds16_c2i.pt
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
    net=AiMConfig(d_model=1536, n_layer=48, conditioning="adaln_group"),
    data=CodeData(path="imagenet-codes", tokenizer="vq_ds16_c2i.pt"),
    optim=Optim(
        learning_rate=8e-4, schedule="linear", final=0.0, warmup=0, weight_decay=0.05,
        decay_times_lr=True, b2=0.95, eps=1e-8, clip=1.0,
    ),
    ema=EMA(decay=0.9999),
    precision=Precision(compute="bfloat16"),
    sample=ImageSample(guidance=1.75, count=64),
    batch_size=2048,
    steps=219_100,
    checkpoint=Checkpoint(every=5000),
    eval=Eval(every=5000, batches=10),
)  # fmt: skip
