"""JiT-B/32 with polynomial mixers on the pixels of ImageNet 512x512, with twice the noise.

Paper: JiT, arXiv 2511.13720, with PoM, arXiv 2604.06129, in place of attention.
Cost: 18.5 Gmacs (10^9 multiply-adds) forward per image, nearly that of 256 pixels: as many tokens.
Expected: no published figure for this net.
Command: lintime train jit/imagenet512 data.path=IMAGENET
Not run.
"""

import dataclasses

from ...model.nets.jit import jit_config, jit_process
from .imagenet256 import config as smaller

config = dataclasses.replace(
    smaller,
    net=jit_config("B", input_size=512, patch_size=32),
    process=jit_process(512),
    data=dataclasses.replace(smaller.data, size=512),
)
