"""VQ attention: every implementation against the float64 definition, and the parts it is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.kernels_pallas import vq_attention as vq
from lintime.kernels_pallas.compat import enable_x64

from .kernel_base import Spec, kernel_tests

B, H, KV, K, V, S = 2, 4, 2, 6, 4, 5


def make_inputs(rng, length, dtype, *, mem, heads=H, kv_heads=KV):
    """Keys are codewords of their codes, as after quantisation."""
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    codebook = np.random.default_rng(99).standard_normal((kv_heads, S, K)).astype(dtype)
    codes = rng.integers(0, S, (B, kv_heads, length)).astype(np.int32)
    lookup = lambda z: np.stack([codebook[h][z[:, h]] for h in range(kv_heads)], 1)
    # Document ids never fall, also from one call to the next: they start to rise late.
    steps = np.cumsum((rng.integers(0, 3, (B, length)) == 0) & (np.arange(length) > 6), axis=1)
    state = vq.init_state(B, kv_heads, mem, S, K, V, dtype)
    return {
        "q": draw(B, heads, length, K),
        "k": lookup(codes).astype(dtype),
        "codes": codes,
        "v": draw(B, kv_heads, length, V),
        "codebook": codebook,
        "content_bias": draw(heads, K),
        "position_bias": draw(heads, K),
        "rel": draw(kv_heads, mem + 1, K),
        "segment_ids": (1 + steps).astype(np.int32),
        "state": state,
    }


def spec(mem, block=4, **options):
    return Spec(
        op=vq.vq_attention,
        make=lambda rng, length, dtype: make_inputs(rng, length, dtype, mem=mem),
        time_axis={"q": 2, "k": 2, "codes": 2, "v": 2, "segment_ids": 1},
        batch_axis={"q": 0, "k": 0, "codes": 0, "v": 0, "segment_ids": 0},
        grad=("q", "k", "v", "content_bias", "position_bias", "rel", "state"),
        constant=("count",),
        variants={r: {"implementation": "xla", "reduction": r} for r in vq.REDUCTIONS},
        block=block,
        options={"block_len": block, **options},
        out_time_axis=2,
        clean_padding=("segment_ids",),
    )


test_kernel = kernel_tests(spec(mem=4))
test_kernel_masked_documents = kernel_tests(spec(mem=6, mask_segments=True))
