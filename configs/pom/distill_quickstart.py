"""Attention of a trained DiT replaced by PoM and distilled, on handwritten digits and a CPU.

Paper: PoM, arXiv 2604.06129, which distils SD3 so; here a very small relative on scikit-learn's
1,797 digits, 8x8 pixels shown at 16x16. Stage 0 trains the teacher, a DiT with attention; stage 1
the mixers that take its attention's place, layer by layer; then all of it end to end. Ends with one
picture: teacher, student right after the replacement, after stage 1 and at the end.
Measured: losses 0.1813, 0.3966, 0.2172, 0.1859 in this order, in 260 s of CPU time (of user and
system together) on 2 cores that had much other work.
Command: lintime train pom/distill_quickstart
"""

import dataclasses

from ...train.schema import Distill, Optim
from ..dit.quickstart import config as dit

teacher = dataclasses.replace(dit, steps=1000)

layers = dataclasses.replace(
    teacher,
    net=dataclasses.replace(dit.net, mixer="pom", n_head=8, degree=3, rope="2d"),
    init_from="stage:../0",
    distill=Distill(teacher="stage:../0", layers=True),
    optim=Optim(learning_rate=2e-3, warmup=20, final=0.05, b2=0.99, clip=1.0),
    steps=300,
)

config = dataclasses.replace(
    layers,
    stages=(teacher, layers),
    init_from="stage:1",
    distill=Distill(teacher="stage:0"),
    optim=Optim(learning_rate=5e-4, warmup=20, final=0.05, b2=0.99, clip=1.0),
)
