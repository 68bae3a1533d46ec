"""softmax(q k^T / sqrt(K)) v by the fastest kernel at hand: cuDNN's on GPUs, Pallas' on TPUs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, PartitionSpec as P

from ...kernels_pallas import dispatch
from ..partition import ACTIVATION_AXES, constrain

CUDNN_HEAD_DIM = 128  # cuDNN takes multiples of 8 up to this
TPU_BLOCK = 128  # Pallas' kernel takes lengths in multiples of this


def attend(
    q: Array, k: Array, v: Array, *, valid: Array | None = None, segment_ids: Array | None = None
) -> Array:
    """Attention of all tokens to all tokens of theirs or another sequence.

    On GPUs cuDNN's flash attention (16 bit, even lengths), on TPUs Pallas' (`jax.experimental`;
    lengths in multiples of 128), each device with its rows and heads; else XLA, which writes the
    scores to memory.

    Args:
        q: [B, T, H, K]. k, v: [B, S, H, K].
        valid: [B, S] tokens of k and v that count.
        segment_ids: [B, T]; tokens attend within their segment. For T = S.

    Returns:
        [B, T, H, K] in q's dtype; the softmax is float32.
    """
    if _tpu_takes(q, k):
        y = _tpu_flash(q, k, v, valid, segment_ids)
    else:
        allowed = None if valid is None else valid[:, None, None, :]
        if segment_ids is not None:
            same = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
            allowed = same if allowed is None else same & allowed
        implementation = "cudnn" if _cudnn_takes(q, k) else "xla"
        y = jax.nn.dot_product_attention(q, k, v, mask=allowed, implementation=implementation)
    return constrain(y, "batch", "seq", "heads", None)


def _cudnn_takes(q: Array, k: Array) -> bool:
    """16 bit and, for the gradients, even lengths."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= CUDNN_HEAD_DIM
    return dispatch.current_device().startswith("gpu") and half and even and fits


def _tpu_takes(q: Array, k: Array) -> bool:
    if not dispatch.current_device().startswith("tpu"):
        return False
    whole = q.shape[1] % TPU_BLOCK == 0 and k.shape[1] % TPU_BLOCK == 0
    width = q.shape[-1]
    return whole and (width <= TPU_BLOCK or width % TPU_BLOCK == 0) and _axes(q) is not None


def _axes(q: Array) -> dict[str, tuple[str, ...]] | None:
    """{"batch", "heads": the axes of the mesh that cut them}, none where nothing is to be cut; None
    if they do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if size > 1 and kind != AxisType.Manual
    }
    known = {n: tuple(a for a in ACTIVATION_AXES[n] if a in sizes) for n in ("batch", "heads")}
    for name, length in (("batch", q.shape[0]), ("heads", q.shape[2])):
        if length % math.prod(sizes[axis] for axis in known[name]):
            return None
    return known if sizes else {}


def _tpu_flash(q, k, v, valid, segment_ids):
    """The compiler cannot cut a kernel: on a mesh every device calls it with its rows and heads."""
    if valid is not None or segment_ids is not None:
        ids = [jnp.zeros(x.shape[:2], jnp.int32) for x in (q, k)]
        if segment_ids is not None:
            ids = [segment_ids.astype(jnp.int32)] * 2
        if valid is not None:  # a segment of their own, which no query is in
            ids[1] = jnp.where(valid, ids[1], jnp.iinfo(jnp.int32).min)
        ids = tuple(ids)
    else:
        ids = ()
    axes = _axes(q)
    if not axes:
        return _kernel(q, k, v, *ids)
    rows = P(axes["batch"] or None, None, axes["heads"] or None, None)
    specs = (rows,) * 3 + (P(axes["batch"] or None, None),) * len(ids)
    return jax.shard_map(_kernel, in_specs=specs, out_specs=rows, check_vma=False)(q, k, v, *ids)


def _kernel(q, k, v, *ids):
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu

    def block(length):
        return next(b for b in (512, 256, TPU_BLOCK) if length % b == 0)

    a, b = block(q.shape[1]), block(k.shape[1])
    sizes = tpu.BlockSizes(
        block_q=a, block_k_major=b, block_k=b, block_b=1, block_q_major_dkv=a,
        block_k_major_dkv=b, block_k_dkv=b, block_q_dkv=a, block_k_major_dq=b, block_k_dq=b,
        block_q_dq=a,
    )  # fmt: skip
    to_bhtk = lambda x: jnp.swapaxes(x, 1, 2)
    y = tpu.flash_attention(
        to_bhtk(q), to_bhtk(k), to_bhtk(v), segment_ids=tpu.SegmentIds(*ids) if ids else None,
        sm_scale=q.shape[-1] ** -0.5, block_sizes=sizes,
    )  # fmt: skip
    return to_bhtk(y).astype(q.dtype)
