"""The kernel checks themselves: a right op passes all of them, and each of them catches its fault.

The op is a masked, weighted running sum, y_t = w * h_t with h_t = h_{t-1} + x_t over the valid
tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

from lintime.kernels_pallas.compat import vary
from tests.kernel_base import Spec, checks_for, kernel_tests

BLOCK = 4


@jax.custom_vjp
def _product(w, h):
    return w * h


_product.defvjp(
    lambda w, h: (w * h, (w, h)),
    lambda saved, g: (jnp.sum(g * saved[1], axis=(0, 1)), g * saved[0]),
)


@jax.custom_batching.custom_vmap
def _wrong_under_vmap(h):
    return h


_wrong_under_vmap.def_vmap(lambda size, batched, h: (2 * h, True))


def running_sum(x, w, *, state=None, lengths=None, implementation=None, fault=""):
    """x: [B, T, D], w: [D], state: [B, D] float32, lengths: [B]. Returns y and the last h."""
    rows, tokens, width = x.shape
    acc = jnp.promote_types(x.dtype, jnp.float32)
    if state is None:
        state = jnp.zeros((rows, width), acc)
        state = state + 1 if fault == "no_state" else state
    start = jnp.zeros_like(state) if fault == "split" else state
    if fault == "gradient":
        start = lax.stop_gradient(start)
    if lengths is None:
        valid = jnp.ones((rows, tokens, 1), bool)
    else:
        valid = (jnp.arange(tokens) < lengths[:, None])[..., None]
    x = x * valid if fault == "padding" else jnp.where(valid, x, 0)
    if fault == "bfloat16":
        acc = x.dtype
    wide = x.astype(acc)
    if implementation == "reference":
        h = start[:, None] + jnp.cumsum(wide, axis=1)
        y = w * h
    else:
        h = start[:, None].astype(acc) + lax.associative_scan(jnp.add, wide, axis=1)
        if fault == "block":
            h = h - (jnp.arange(tokens) >= BLOCK)[:, None] * wide[:, :1]
        if fault == "vmap":
            h = _wrong_under_vmap(h)
        if fault == "remat":
            io_callback(lambda: None, None, ordered=True)
        y = _product(w.astype(acc) if fault == "shard_map" else vary(w.astype(acc), h), h)
        if fault == "causality":
            y = y + 1e-7 * jnp.sum(wide, axis=1, keepdims=True)
        if fault == "prefix":
            y = y * (1 + 0.01 * tokens)
    if fault == "dtype":
        return y, h[:, -1].astype(x.dtype)
    last = h[:, -1]
    if implementation == "reference":
        return y, last
    y = jnp.where(valid, y, 0)
    return y.astype(x.dtype), last.astype(state.dtype)


def make(rng, length, dtype):
    return {
        "x": rng.standard_normal((4, length, 3)).astype(dtype),
        "w": rng.standard_normal(3).astype(dtype),
        "state": np.zeros((4, 3), np.float32),
    }


SPEC = Spec(
    op=running_sum,
    make=make,
    time_axis={"x": 1},
    batch_axis={"x": 0, "lengths": 0},
    grad=("x", "w", "state"),
    variants={"scan": {"implementation": "scan"}, "reference": {"implementation": "reference"}},
    block=BLOCK,
    tolerance={"float32": 1e-5, "bfloat16": 5e-3},
)

test_running_sum = kernel_tests(SPEC)

FAULTS = [
    ("block", "reference-T5"),
    ("gradient", "reference-T4"),
    ("bfloat16", "bfloat16"),
    ("dtype", "state"),
    ("no_state", "no_state"),
    ("vmap", "vmap"),
    ("remat", "remat"),
    ("shard_map", "shard_map"),
    ("padding", "padding"),
    ("causality", "causality"),
    ("prefix", "prefix"),
    ("split", "split"),
]
WRONG = dataclasses.replace(
    SPEC, variants={fault: {"implementation": "scan", "fault": fault} for fault, _ in FAULTS}
)


@pytest.mark.parametrize(("fault", "check"), FAULTS)
def test_check_catches(fault, check):
    with pytest.raises((AssertionError, TypeError, ValueError, NotImplementedError)):
        checks_for(WRONG)[check](WRONG, fault)


def test_every_check_has_a_fault():
    covered = {check.partition("-")[0] for _, check in FAULTS}
    assert covered == {name.partition("-")[0] for name in checks_for(SPEC)}


def test_lengths_surround_the_block_and_end_with_a_prime():
    assert SPEC.all_lengths == (1, 3, 4, 5, 11)


def test_a_skip_that_names_no_check_is_an_error():
    with pytest.raises(AssertionError, match="skip names no check"):
        checks_for(dataclasses.replace(SPEC, skip=("causal",)))
