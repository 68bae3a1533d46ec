"""A 13M-parameter byte-level Transformer-VQ for your own text on one GPU.

Paper: Transformer-VQ (arXiv 2309.16354), scaled down. Cost: about an hour on one data-centre GPU
(estimate). Not run here.
Command: lintime train transformer_vq/text data.path=my_texts/
"""

from ...model.nets.transformer_vq import TransformerVQConfig
from ...train.schema import EMA, Data, Eval, Log, Optim, Precision, Run, Sample

config = Run(
    net=TransformerVQConfig(
        d_model=384,
        n_layer=6,
        d_k=128,
        n_code=256,
        block_len=256,
        mem_len=256,
        out_norm=True,
        dropout_res=0.1,
        dropout_sin=0.1,
    ),
    data=Data(path="my_texts", sequence_len=4096, update_len=2048),
    optim=Optim(learning_rate=1e-3, warmup=500, weight_decay=1e-5, clip=1.0),
    ema=EMA(decay=0.999),
    precision=Precision(compute="bfloat16"),
    batch_size=16,
    steps=20_000,
    sample=Sample(length=1000, temperature=0.9, top_p=0.95),
    eval=Eval(every=1000, batches=50),
    log=Log(every=50),
)
