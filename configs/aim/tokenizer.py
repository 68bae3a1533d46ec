"""VQ-f16, the image tokenizer of AiM and LlamaGen: 72 M parameters, 16,384 codes.

Paper: LlamaGen, arXiv 2406.06525, section 2.2 and its repository's recipe.
Cost: 40 epochs of ImageNet, 400,000 updates; 390 GFLOP per image for encoder and decoder forward.
Expected: rFID 2.19 at 256x256 (repository of LlamaGen).
Command:
  lintime train aim/tokenizer data.path=IMAGENET process.lpips=vgg16.pth,vgg.pth mesh.data=-1
Not run. The two files are torchvision's VGG16 and the linear weights of the lpips package.
"""

from ...model.nets.vq_tokenizer import VQTokenizerConfig
from ...model.processes.adversarial import AdversarialReconstruction
from ...train.schema import EMA, Checkpoint, Eval, ImageData, ImageSample, Optim, Precision, Run

config = Run(
    net=VQTokenizerConfig(),
    process=AdversarialReconstruction(lpips="vgg16.pth,vgg.pth"),
    data=ImageData(
        path="imagenet", resize=1.0, resize_max=1.25, filter="bicubic", flip=True, workers=8
    ),
    optim=Optim(learning_rate=1e-4, schedule="constant", warmup=0, b2=0.95, eps=1e-8, clip=1.0),
    ema=EMA(decay=0.9999),
    precision=Precision(compute="bfloat16"),
    sample=ImageSample(count=32),
    batch_size=128,
    steps=400_000,
    checkpoint=Checkpoint(every=5000),
    eval=Eval(every=5000, batches=20),
)
