"""Transformer-VQ on Enwik8: 190M parameters, bytes.

Paper: Transformer-VQ (arXiv 2309.16354), Enwik8; expected test 0.99 bits per byte (from the paper).
Cost: 125,000 updates of 262,144 tokens, 24 layers; meant for a TPU pod slice or several GPUs. Not
run here. Command: lintime train transformer_vq/enwik8 data.path=enwik8 mesh.data=-1
"""

from ...model.nets.transformer_vq import TransformerVQConfig
from ...train.schema import Checkpoint, Data, Eval, Log, Optim, Precision, Run, Sample

config = Run(
    net=TransformerVQConfig(
        d_model=768,
        n_layer=24,
        d_k=128,
        d_v=1536,
        n_code=512,
        block_len=512,
        mem_len=512,
        dropout_sin=0.2,
        dropout_res=0.5,
        dropout_layer=0.3,
    ),
    data=Data(path="enwik8", format="enwik8", sequence_len=8192, update_len=2048, append_eos=False),
    optim=Optim(learning_rate=4e-4, warmup=10_000, weight_decay=2e-4, clip=0.1),
    precision=Precision(compute="bfloat16", remat="full"),
    batch_size=128,
    steps=125_000,
    checkpoint=Checkpoint(every=1000, keep=5),
    eval=Eval(every=1000, batches=0),
    sample=Sample(length=1000, top_p=0.9),
    log=Log(every=200),
)
