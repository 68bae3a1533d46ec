"""A causal mixer run in both directions."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jax import Array


class Bidirectional(nn.Module):
    """y = forward(x) + backward(x): two copies of a causal mixer, one reading from the right.

    Both see the current token. Padding on the right (`mask`) reaches neither direction.

    Attributes:
        mixer: a mixer with the attribute `reverse`, e.g. Mamba2(features=512).
    """

    mixer: nn.Module

    def setup(self):
        self.forward = self.mixer.clone()
        self.backward = self.mixer.clone(reverse=True)

    def __call__(self, x: Array, **options) -> tuple[Array, dict[str, Any]]:
        """Mix a whole sequence x [B, T, d]: y [B, T, d] and {}; `options` of the mixer contract."""
        ahead, _ = self.forward(x, **options)
        back, _ = self.backward(x, **options)
        return ahead + back, {}
