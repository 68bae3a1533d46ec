"""Byte-level Mamba-1 on enwik8 (the raw 100,000,000 bytes, split 90/5/5 M).

Paper: Mamba (arXiv 2312.00752); the sizes of its 130M model, which are 91M parameters with an
alphabet of bytes. The paper has no enwik8 result.
Not run here.
Command: lintime train mamba/enwik8 data.path=enwik8 mesh.fsdp=8
"""

from ...model.nets.mamba_lm import MambaConfig
from ...train.schema import Data, Eval, Log, Optim, Precision, Run

config = Run(
    net=MambaConfig(mixer="mamba1", d_model=768, n_layer=24),
    data=Data(path="enwik8", sequence_len=8192, update_len=2048),
    optim=Optim(
        learning_rate=6e-4, warmup=2000, b2=0.95, weight_decay=0.1, decay_times_lr=True, clip=1.0
    ),
    precision=Precision(compute="bfloat16", remat="full"),
    batch_size=64,
    steps=100_000,
    eval=Eval(every=2000, batches=100),
    log=Log(every=100),
)
