"""Byte-level Mamba-2 on the text that every Python installation carries.

Paper: Mamba-2, arXiv 2405.21060 (a small relative of its language models).
Command: lintime train mamba/quickstart
Measured (2 CPU cores shared with another job, Python 3.11, jax 0.10.2, 2026-11-22): 217 s from
start to sample; 1.977 bits per byte on the validation split, gzip -9 takes 2.036 on the same bytes.
"""

from ...model.nets.mamba_lm import MambaConfig
from ...train.schema import Checkpoint, Data, Eval, Log, Optim, Run, Sample

config = Run(
    net=MambaConfig(d_model=128, n_layer=3, d_state=32, headdim=32, chunk=64),
    data=Data(sequence_len=512, update_len=256),
    optim=Optim(learning_rate=4e-3, warmup=50, clip=1.0),
    batch_size=4,
    steps=1200,
    checkpoint=Checkpoint(every=200, keep=2),
    eval=Eval(every=0, batches=0),
    sample=Sample(prompt="The ", length=300, temperature=0.8, top_p=0.95),
    log=Log(every=20),
)
