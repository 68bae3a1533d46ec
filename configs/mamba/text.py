"""A 12M-parameter byte-level Mamba-2 for your own text on one GPU.

Paper: Mamba-2 (arXiv 2405.21060), scaled down. Not run here.
Command: lintime train mamba/text data.path=my_texts/
"""

from ...model.nets.mamba_lm import MambaConfig
from ...train.schema import EMA, Data, Eval, Log, Optim, Precision, Run, Sample

config = Run(
    net=MambaConfig(d_model=384, n_layer=12, d_state=128, headdim=64),
    data=Data(path="my_texts", sequence_len=4096, update_len=2048),
    optim=Optim(
        learning_rate=2e-3, warmup=500, b2=0.95, weight_decay=0.1, decay_times_lr=True, clip=1.0
    ),
    ema=EMA(decay=0.999),
    precision=Precision(compute="bfloat16"),
    batch_size=16,
    steps=20_000,
    sample=Sample(length=1000, temperature=0.9, top_p=0.95),
    eval=Eval(every=1000, batches=50),
    log=Log(every=50),
)
