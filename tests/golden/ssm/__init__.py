"""Adapters for state-space layers, by family: from names and layouts of vectors to modules."""

from .mixers import mamba1_block, mamba2_block, rmsnorm
from .ops import conv1d, scan, ssd

FAMILIES = {
    "conv1d": conv1d,
    "scan": scan,
    "ssd": ssd,
    "rmsnorm": rmsnorm,
    "mamba1_block": mamba1_block,
    "mamba2_block": mamba2_block,
}
