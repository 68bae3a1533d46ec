"""Byte-level Mamba-2 on the text that every Python installation carries.

Paper: Mamba-2, arXiv 2405.21060 (a small relative of its language models).
Command: lintime train mamba/quickstart
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
