"""DiTs small enough for tests, with random numbers for variables."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lintime.model.nets.dit import DiT, DiTConfig
from tests.golden.quick import quick_jit

SIZES = {
    "input_size": 8, "patch_size": 2, "in_channels": 3, "d_model": 16, "n_layer": 2, "n_head": 2,
    "mlp_ratio": 2.0, "num_classes": 5, "headdim": 8, "d_state": 4, "chunk": 4,
}  # fmt: skip
MIXERS = ("attention", "pom", "mamba2", "mamba1")


def make_config(**changes) -> DiTConfig:
    return DiTConfig(**(SIZES | changes))


def abstract_params(config: DiTConfig, dtype=jnp.float32):
    """Shapes of the parameters, computed without memory."""
    x = jnp.zeros((1, *config.shape))
    one = jnp.zeros((1,), jnp.int32)
    init = DiT(config, dtype).init
    return jax.eval_shape(init, {"params": jax.random.key(0)}, x, one, one)["params"]


def random_params(config: DiTConfig, seed: int = 0):
    """Parameters made of random numbers, without compiling the net's `init`; nothing is zero."""
    rng = np.random.default_rng(seed)

    def fill(path, a):
        name = path[-1].key
        numbers = rng.standard_normal(a.shape) / np.sqrt(a.shape[-2] if name == "kernel" else 4)
        return jnp.asarray(numbers + (name == "g"), a.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract_params(config))


def some_inputs(config: DiTConfig, rows: int = 2, seed: int = 1):
    """Images or videos [rows, ..], times [rows] and labels [rows], the last one the null class."""
    rng = np.random.default_rng(seed)
    shape = (rows, *config.shape)
    labels = rng.integers(0, config.num_classes, rows)
    if config.class_dropout:
        labels[-1] = config.num_classes
    x = rng.standard_normal(shape).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(rng.integers(0, 1000, rows)), jnp.asarray(labels)


@functools.cache
def compiled(net: DiT, *, collect: bool = False, random: bool = False):
    """Jitted (params, x, t, labels[, key]) -> output, and with `collect` the intermediates."""

    def run(params, x, t, labels, key=None):
        rngs = {"dropout": key} if random else {}
        if not collect:
            return net.apply({"params": params}, x, t, labels, rngs=rngs)[0]
        (out, _), kept = net.apply(
            {"params": params}, x, t, labels, rngs=rngs, mutable=["intermediates"]
        )
        return out, kept["intermediates"]

    return quick_jit(run)


@functools.cache
def gradients(net: DiT):
    """Jitted (params, x, t, labels) -> output and gradient of a weighted sum of it."""

    def objective(params, x, t, labels):
        out, _ = net.apply({"params": params}, x, t, labels)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    def run(*args):
        (_, out), gradient = jax.value_and_grad(objective, has_aux=True)(*args)
        return out, gradient

    return quick_jit(run)
