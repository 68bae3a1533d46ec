"""Byte-level Transformer-VQ on the text that every Python installation carries.

Paper: Transformer-VQ, arXiv 2309.16354 (a small relative of its Enwik8 model).
Command: lintime train transformer_vq/quickstart
Measured (2 CPU cores, Python 3.11, jax 0.10.2, 2026-11-22): 112 s from start to sample; 2.027 bits
per byte on the validation split, gzip -9 takes 2.036 on the same bytes.
"""

from ...model.nets.transformer_vq import TransformerVQConfig
from ...train.schema import Checkpoint, Data, Eval, Log, Optim, Run, Sample

config = Run(
    net=TransformerVQConfig(
        d_model=128,
        n_layer=3,
        d_k=32,
        d_v=128,
        n_code=64,
        block_len=64,
        mem_len=64,
        out_norm=True,
    ),
    data=Data(sequence_len=512, update_len=256),
    optim=Optim(learning_rate=4e-3, warmup=50, clip=1.0),
    batch_size=4,
    steps=1100,
    checkpoint=Checkpoint(every=200, keep=2),
    eval=Eval(every=0, batches=0),
    sample=Sample(prompt="The ", length=300, temperature=0.8, top_p=0.95),
    log=Log(every=20),
)
