"""DiH-XL/2 on ImageNet 256x256 latents: 832.6 M parameters.

Paper: arXiv 2411.12663, by the configs of its code, in bfloat16. DiH mixes patches by products of
features instead of attention.
Cost: 152 Gmacs (10^9 multiply-adds) forward per image, three times that per update; 300 K updates
of the default config. The papers' own overrides are not known.
Expected: nothing that could be checked; the code has no figures. Its default learning rate is high
for a net of this size: the schedule of the paper may differ.
Command:
  lintime prepare latents IMAGENET --autoencoder sd-vae-ft-ema --out imagenet-latents
  lintime train dih/imagenet256 data.path=imagenet-latents data.autoencoder=sd-vae-ft-ema
Not run. Judged by: lintime eval --run RUN eval.samples=50000 eval.inception=FILE
eval.reference=FILE (another protocol than the code's, which compares with its training images).
Sizes: net.d_model=384 net.n_layer=12 net.mlp_ratio=3 (S), 768 12 3 (B), 1024 24 2 (L);
net.patch_size=4. DiH++: net.positions=learned net.registers=16 net.clamp=255
net.resize_by_count=true. Larger images: net.input_size=64 net.positions=shifted
process.shift=1.4142. The baseline with attention: net.mixer=attention net.mlp_ratio=4. Differs from
the code: embeddings decay as other weights do, and an update that is not finite stops the run.
"""

from ...model.nets.dih import DiHConfig
from ...model.processes.noise_levels import NoiseLevels
from ...train.schema import (
    EMA,
    Checkpoint,
    Eval,
    LatentData,
    LevelSample,
    Optim,
    Precision,
    Run,
)

config = Run(
    net=DiHConfig(),
    process=NoiseLevels(),
    data=LatentData(path="imagenet-latents", autoencoder="sd-vae-ft-ema"),
    optim=Optim(
        learning_rate=1e-3, warmup=10_000, schedule="cosine", final=0.0, weight_decay=0.01,
        decay_times_lr=True, b2=0.999, eps=1e-8, clip=1.0,
    ),
    ema=EMA(decay=0.999, interval=10, start=10_000, power=2 / 3),
    precision=Precision(compute="bfloat16"),
    sample=LevelSample(method="heun", steps=125, guidance=2.5, count=16, rows=16),
    seed=3407,
    batch_size=128,
    steps=300_000,
    checkpoint=Checkpoint(every=10_000),
    eval=Eval(every=10_000, batches=20),
)  # fmt: skip
