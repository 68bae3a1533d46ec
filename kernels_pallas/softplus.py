"""The activation of step sizes, one definition for all state-space ops."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def softplus(x: Array) -> Array:
    """log(1 + e^x), accurate where small; exactly x above 20, as in the published Mamba layers.

    Any float array, any shape, in its own dtype; its derivative is finite everywhere.
    """
    return jnp.where(x > 20, x, jnp.log1p(jnp.exp(jnp.minimum(x, 20))))
