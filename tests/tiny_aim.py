"""AiM nets small enough for tests, with random numbers for variables."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lintime.model.nets.aim import AiM, AiMConfig
from tests.golden.quick import quick_jit

SIZES = {
    "vocab_size": 19, "num_classes": 5, "num_tokens": 7, "d_model": 16, "n_layer": 3,
    "headdim": 8, "d_state": 4, "num_groups": 2, "chunk": 4,
}  # fmt: skip
MIXERS = ("mamba2", "mamba1", "attention")
KINDS = ("adaln", "adaln_single", "adaln_group")


def make_config(**changes) -> AiMConfig:
    return AiMConfig(**(SIZES | changes))


def random_variables(net: AiM, seed: int = 0):
    """Variables made of random numbers, without compiling the net's `init`; nothing is zero."""
    codes, labels = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1,), jnp.int32)
    shapes = jax.eval_shape(net.init, {"params": jax.random.key(0)}, codes, labels)
    rng = np.random.default_rng(seed)

    def fill(path, a):
        name = path[-1].key
        numbers = rng.standard_normal(a.shape) / np.sqrt(a.shape[-2] if name == "kernel" else 4)
        return jnp.asarray(numbers + (name == "g"), a.dtype)

    return jax.tree_util.tree_map_with_path(fill, {"params": shapes["params"]})


@functools.cache
def make_net(dtype=jnp.float32, remat: str = "none", **changes):
    """A net and its variables, the same for the same arguments."""
    net = AiM(make_config(**changes), dtype, remat)
    return net, random_variables(net)


@functools.cache
def compiled(net: AiM, *, collect: bool = False, random: bool = False):
    """Jitted (variables, codes, labels[, key]) -> logits, and with `collect` the intermediates."""

    def run(variables, codes, labels, key=None):
        rngs = {"dropout": key} if random else {}
        if not collect:
            return net.apply(variables, codes, labels, rngs=rngs)[0]
        options = dict(rngs=rngs, mutable=["intermediates"])
        (logits, _), kept = net.apply(variables, codes, labels, **options)
        return logits, kept["intermediates"]

    return quick_jit(run)


def some_codes(net: AiM, rows: int = 2, seed: int = 1):
    """Codes [rows, T] and labels [rows], the last one the null class."""
    c, rng = net.config, np.random.default_rng(seed)
    labels = rng.integers(0, c.num_classes, rows)
    labels[-1] = c.num_classes
    codes = rng.integers(0, c.vocab_size, (rows, c.num_tokens))
    return jnp.asarray(codes, jnp.int32), jnp.asarray(labels, jnp.int32)
