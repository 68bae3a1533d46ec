"""Transformer-VQ on ImageNet64: 1.2B parameters, 64 x 64 RGB images as 12,288 bytes.

Paper: Transformer-VQ (arXiv 2309.16354), ImageNet64; expected 3.16 bits per dim (from the paper).
Cost: 500,000 updates of 196,608 tokens; meant for a TPU pod. Not run here.
Data: .npy/.npz files of uint8 images, [N, 64, 64, 3] or the published planar [N, 12288].
Command: lintime train transformer_vq/imagenet64 data.path=imagenet64 mesh.fsdp=-1 mesh.data=1
"""

from ...model.nets.transformer_vq import TransformerVQConfig
from ...train.schema import Checkpoint, Data, Eval, Log, Mesh, Optim, Precision, Run, Sample

config = Run(
    net=TransformerVQConfig(
        d_model=2048,
        n_layer=24,
        d_k=128,
        d_v=4096,
        n_code=512,
        block_len=512,
        mem_len=512,
        pe_abs=True,
        tie_embeddings=True,
        out_norm=True,
        logit_scale=0.005,
        dropout_sin=0.1,
        dropout_layer=0.1,
    ),
    data=Data(
        path="imagenet64",
        format="images",
        sequence_len=12_288,
        update_len=1536,
        append_eos=False,
    ),
    optim=Optim(name="adafactor", learning_rate=0.01, warmup=10_000),
    precision=Precision(compute="bfloat16", remat="full"),
    mesh=Mesh(data=1, fsdp=-1),
    batch_size=128,
    steps=500_000,
    checkpoint=Checkpoint(every=1000, keep=5),
    eval=Eval(every=1000, batches=100),
    sample=Sample(length=12_288, top_p=0.999),
    log=Log(every=200),
)
