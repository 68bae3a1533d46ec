"""Handwritten digits by class from pixels with a small JiT, on a CPU.

Paper: JiT, arXiv 2511.13720, with PoM, arXiv 2604.06129 (a very small relative on scikit-learn's
1,797 digits, 8x8 pixels shown at 16x16).
Measured: 189 s of CPU time, start to samples (524 s by the clock on 2 CPU cores that had much other
work); loss 0.126 on held-out digits.
Command: lintime train jit/quickstart
"""

import dataclasses

from ...model.nets.jit import JiTConfig, jit_process
from ...train.schema import DiffusionSample
from ..dit.quickstart import config as dit

config = dataclasses.replace(
    dit,
    net=JiTConfig(
        input_size=16, patch_size=4, bottleneck=32, d_model=128, n_layer=4, n_head=8,
        num_classes=10, context_tokens=4, context_start=1,
    ),
    process=jit_process(16),
    sample=DiffusionSample(
        method="heun", steps=25, guidance=2.0, guided_times=(0.1, 1.0), count=100, columns=10,
        rows=100,
    ),
)  # fmt: skip
