"""Handwritten digits by class with a DiT that mixes by polynomials instead of attention, on a CPU.

Paper: PoM, arXiv 2604.06129, in a DiT, arXiv 2212.09748, trained as SiT, arXiv 2401.08740 (a very
small relative on scikit-learn's 1,797 digits, 8x8 pixels shown at 16x16).
Measured: 155 s on 2 CPU cores that had other work as well, start to samples.
Command: lintime train pom/quickstart
"""

import dataclasses

from ..dit.quickstart import config as attention

config = dataclasses.replace(
    attention, net=dataclasses.replace(attention.net, mixer="pom", n_head=8, degree=3, rope="2d")
)
