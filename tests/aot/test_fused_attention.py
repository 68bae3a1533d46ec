"""Dense attention on a TPU is one kernel, on one chip and on a mesh, forward and backward."""

import jax
import jax.numpy as jnp
import pytest

from lintime.model.mixers.full_attention import FullAttention, JointAttention

from . import CHIPS, MARKS, compile_for

pytestmark = MARKS


def loss(module, *shapes):
    """(gradient of the sum of squares, its abstract operands); masks are bool."""
    make = lambda s: jax.ShapeDtypeStruct(s, bool if len(s) == 2 else jnp.bfloat16)
    tokens, mask, context = (None if s is None else make(s) for s in (*shapes, *[None] * 3)[:3])
    if isinstance(module, JointAttention):
        call = lambda v, x, m, c: module.apply(v, x, c, context_mask=m)[0]
        init = lambda k: module.init(k, jnp.zeros(tokens.shape), jnp.zeros(context.shape))
    else:
        call = lambda v, x, m, c: module.apply(v, x, mask=m)[0]
        init = lambda k: module.init(k, jnp.zeros(tokens.shape))
    variables = jax.eval_shape(init, jax.random.key(0))
    total = lambda v, *a: jnp.sum(jnp.square(call(v, *a).astype(jnp.float32)))
    return jax.grad(total), (variables, tokens, mask, context)


@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_to_kernels(chip):
    """DiT-XL's head width, with and without padding: one kernel forward, two backward."""
    for mask in (None, (2, 256)):
        gradient, operands = loss(FullAttention(1152, 16, jnp.bfloat16), (2, 256, 1152), mask)
        text = compile_for(chip, gradient, *operands).as_text()
        assert text.count("tpu_custom_call") >= 3


@pytest.mark.parametrize("module", [FullAttention, JointAttention])
def test_each_device_takes_its_rows_and_heads(module):
    shapes, length = [(4, 256, 256)], 256
    if module is JointAttention:
        shapes, length = [*shapes, (4, 128), (4, 128, 256)], 384
    gradient, operands = loss(module(256, 4, jnp.bfloat16), *shapes)
    mesh = {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 1}
    text = compile_for("v5e:2x2", gradient, *operands, mesh_shape=mesh).as_text()
    assert "tpu_custom_call" in text and f"bf16[2,2,{length},64]" in text


def test_lengths_that_do_not_fit_go_through_xla():
    gradient, operands = loss(FullAttention(128, 2, jnp.bfloat16), (2, 100, 128))
    assert "tpu_custom_call" not in compile_for("v5e", gradient, *operands).as_text()
