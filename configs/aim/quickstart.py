"""Handwritten digits by class: tokenizer, codes and AiM, in three minutes on a CPU.

Paper: AiM, arXiv 2408.12245 (a very small relative on scikit-learn's 1,797 digits, 8x8 pixels).
Command: lintime train aim/quickstart
Measured (2 idle CPU cores, Python 3.11, jax 0.10.2, 2026-11-22): 93 s from start to the grid of
samples; 1.755 nats per token on held-out images, which are 16 tokens of 128 codes.
"""

from ...model.nets.aim import AiMConfig
from ...model.nets.vq_tokenizer import VQTokenizerConfig
from ...model.processes.adversarial import AdversarialReconstruction
from ...train.schema import (
    Checkpoint,
    CodeData,
    Eval,
    ImageData,
    ImageSample,
    Log,
    Optim,
    Run,
)

IMAGES = ImageData(path="builtin:digits", size=16, resize=1.0, filter="bicubic")

tokenizer = Run(
    net=VQTokenizerConfig(
        ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=32, codebook_size=128
    ),
    process=AdversarialReconstruction(perceptual_weight=0.0, disc_weight=0.0),
    data=ImageData(path="", size=16, resize=1.0, filter="bicubic"),
    optim=Optim(learning_rate=2e-3, warmup=20, clip=1.0, b2=0.95),
    sample=ImageSample(count=16),
    batch_size=32,
    steps=250,
    checkpoint=Checkpoint(every=0, keep=1),
    eval=Eval(every=0, batches=0),
    log=Log(every=20),
)

config = Run(
    stages=(tokenizer,),
    net=AiMConfig(
        vocab_size=128, num_classes=10, num_tokens=16, d_model=128, n_layer=4, d_state=32,
        headdim=32, conditioning="adaln_group", num_groups=2, chunk=16, token_drop=0.1,
        mixer_drop=0.2,
    ),
    data=CodeData(images=IMAGES, views="center", resizes=(1.0, 1.0625, 1.125)),
    optim=Optim(
        learning_rate=2e-3, warmup=50, schedule="linear", final=0.0, weight_decay=0.05,
        decay_times_lr=True, b2=0.95, clip=1.0,
    ),
    sample=ImageSample(count=100, columns=10, guidance=1.5, rows=100),
    batch_size=64,
    steps=400,
    checkpoint=Checkpoint(every=0, keep=1),
    eval=Eval(every=0, batches=0),
    log=Log(every=20),
)  # fmt: skip
