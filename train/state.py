"""What a training step reads and writes."""

from __future__ import annotations

from typing import Any

import flax.struct
from jax import Array


@flax.struct.dataclass
class TrainState:
    """One step of training is one optimiser update.

    Attributes:
        step: int32 scalar, updates done; also the number of the batch to train on next.
        params: learned by gradient, float32.
        opt: optimiser state.
        ema: moving average of params, or {} when none is kept.
        stats: learned without gradients (EMA codebooks), {} if the net has none.
        carry: recurrent state between updates of one sequence (truncated BPTT), {} if a sequence is
            one update.
    """

    step: Array
    params: Any
    opt: Any
    ema: Any
    stats: Any
    carry: Any
