"""Next-token prediction as a process: p(x) = prod_t p(x_t | x_<t)."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive:
    """Autoregressive likelihood.

    Attributes:
        normalise: "positions" divides the masked sum of negative log-likelihoods by all positions,
            padding included, as the Transformer-VQ reference does; "tokens" divides by the unmasked
            ones.
    """

    normalise: str = "positions"
