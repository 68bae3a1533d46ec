"""Transformer-VQ on PG-19: 1.3B parameters, SentencePiece vocabulary of 32,000.

Paper: Transformer-VQ (arXiv 2309.16354), PG-19; expected test 26.6 word-level perplexity (from the
paper). Cost: 500,000 updates of 262,144 tokens; meant for a TPU pod. Not run here.
Data: a folder with train/, validation/ and test/ folders of .txt books. The vocabulary is trained
on the training books if the file named by data.vocab is not there.
Command: lintime train transformer_vq/pg19 data.path=pg19 data.vocab=pg19.model mesh.fsdp=-1
mesh.data=1
"""

from ...model.nets.transformer_vq import TransformerVQConfig
from ...train.schema import Checkpoint, Data, Eval, Log, Mesh, Optim, Precision, Run, Sample

config = Run(
    net=TransformerVQConfig(
        vocab_size=32_000,
        d_model=2048,
        n_layer=24,
        d_k=128,
        d_v=4096,
        n_code=512,
        block_len=512,
        mem_len=512,
        tie_embeddings=True,
        out_norm=True,
        logit_scale=0.005,
        dropout_sin=0.1,
        dropout_res=0.1,
        dropout_layer=0.1,
    ),
    data=Data(
        path="pg19",
        format="pg19",
        vocab="pg19.model",
        train_vocab=32_000,
        sequence_len=8192,
        update_len=2048,
    ),
    optim=Optim(name="adafactor", learning_rate=0.01, warmup=10_000),
    precision=Precision(compute="bfloat16", remat="full"),
    mesh=Mesh(data=1, fsdp=-1),
    batch_size=128,
    steps=500_000,
    checkpoint=Checkpoint(every=1000, keep=5),
    eval=Eval(every=1000, batches=100),
    sample=Sample(length=500, top_p=0.8),
    log=Log(every=200),
)
