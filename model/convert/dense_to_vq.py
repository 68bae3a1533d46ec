"""A trained quadratic model as a VQ one: codebooks are the k-means centres of its own keys."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ...kernels_pallas.vq_attention import codebook_statistics, quantize
from ..nets.transformer_vq import TransformerVQ, TransformerVQConfig, attention_names

MIN_EMA_COUNT = 1.0  # rarely used codes start with the count of a fresh codebook


def dense_to_vq(
    variables: Mapping[str, Any],
    config: TransformerVQConfig,
    batches: Iterable[Mapping[str, Any]],
    *,
    key: Array,
    iterations: int = 10,
    tokens_per_update: int = 0,
    dtype=jnp.float32,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Variables of the VQ model nearest to a trained dense one; a short fine-tune should follow.

    Runs the dense model over `batches`, clusters the keys of every sublayer, layer and key-value
    head, and sets c_count = tokens_per_update * (share of the code), c_sum = centre * c_count: the
    fixed point of the EMA, so that training continues without a transient. Use the result with
    `dataclasses.replace(config, attention="vq")`.

    What the conversion changes besides quantising: attention="dense" has a position bias at every
    distance, VQ only up to mem_len. attention="flash" has none and never trained `r_proj`; it is
    set to zero, so that the VQ model starts without a bias too (and learns one). If every key is a
    centre, the VQ model equals the flash model at any length and the dense model up to
    mem_len + 1 tokens.

    Args:
        variables: {"params": ...} of the dense model; "stats" is not read.
        config: of the dense model; n_code is the number of codes to make.
        batches: {"inputs": [B, T] int32, optional "mask" [B, T] (keys at 0 are left out), optional
            "segment_ids" [B, T]} each; whole sequences, one shape; 50 tokens per code or more.
        key: random key.
        iterations: Lloyd iterations.
        tokens_per_update: tokens B*U of one training update; 0 = those of one batch.
        dtype: of the dense model's matmuls.
        report: called with (codebooks done, codebooks in all).

    Returns:
        {"params", "stats"}; params are the given ones but for `r_proj` as said.

    Raises:
        ValueError: the model is a VQ model already, or there are no batches.
    """
    if config.attention == "vq":
        raise ValueError("attention is vq already; only dense or flash attention is converted")
    params = variables["params"]
    collected, weights, per_batch = _collect_keys(params, config, batches, dtype)
    tokens_per_update = tokens_per_update or per_batch
    names = attention_names(config)
    total = sum(a.shape[0] * a.shape[1] for a in collected.values())
    stats, done = {}, 0
    for name in names:
        centres, shares = [], []
        for keys in collected[name]:  # a layer, [h, N, K]
            for head in keys:
                centre, count = kmeans(
                    head, weights, n_code=config.n_code, key=jax.random.fold_in(key, done),
                    iterations=iterations,
                )  # fmt: skip
                centres.append(centre)
                shares.append(count / jnp.maximum(jnp.sum(count), 1))
                done += 1
                if report:
                    report(done, total)
        heads = collected[name].shape[:2]
        count = jnp.stack(shares).reshape(*heads, config.n_code) * tokens_per_update
        count = jnp.maximum(count, MIN_EMA_COUNT)
        centre = jnp.stack(centres).reshape(*heads, config.n_code, config.d_k)
        stats[name] = {"c_sum": centre * count[..., None], "c_count": count}
    if config.attention == "flash":
        without_bias = lambda a: {**a, "r_proj": jax.tree.map(jnp.zeros_like, a["r_proj"])}
        layers = {n: without_bias(a) if n in names else a for n, a in params["layers"].items()}
        params = {**params, "layers": layers}
    return {"params": params, "stats": {"layers": stats}}


@functools.partial(jax.jit, static_argnames=("n_code", "iterations"))
def kmeans(
    points: Array, weights: Array, *, n_code: int, key: Array, iterations: int
) -> tuple[Array, Array]:
    """Lloyd's algorithm in float32 from a k-means++ start; empty clusters move to the worst points.

    Args:
        points: [N, K]; weights: [N], 0 leaves a point out (any other value counts it once).
        n_code: clusters S; key: random key; iterations: Lloyd iterations.

    Returns:
        centres [S, K] and the number of points of each [S], float32. A centre that ends up empty
        keeps its last place. If there are at most S distinct points, every one is a centre.
    """
    points = points.astype(jnp.float32)
    counted = weights != 0
    centres = _kmeans_plus_plus(points, counted, n_code, key)

    def assign(centres):
        codes, _, errors = quantize(points[None, None], centres[None])
        sums = codebook_statistics(points[None, None], codes, counted[None], n_code)
        count = sums["c_count"][0]
        mean = sums["c_sum"][0] / jnp.maximum(count, 1)[:, None]
        moved = jnp.where(count[:, None] > 0, mean, centres)
        return moved, count, jnp.where(counted, errors[0, 0], 0)

    def lloyd(centres, _):
        moved, count, errors = assign(centres)
        empty = count == 0
        worst = jnp.argsort(-errors)
        candidate = worst[jnp.minimum(jnp.cumsum(empty) - 1, len(worst) - 1)]
        reseed = empty & (errors[candidate] > 1e-12)
        return jnp.where(reseed[:, None], points[candidate], moved), None

    centres, _ = lax.scan(lloyd, centres, None, length=iterations)
    centres, count, _ = assign(centres)
    return centres, count


def _kmeans_plus_plus(points: Array, counted: Array, n_code: int, key: Array) -> Array:
    """S of the points, each drawn with probability ~ squared distance to those drawn before."""

    def draw(carry, key):
        distance, _ = carry
        logits = jnp.where(counted, jnp.log(jnp.maximum(distance, 1e-30)), -jnp.inf)
        new = points[jax.random.categorical(key, logits)]
        gap = jnp.sum(jnp.square(points - new), axis=1)  # exactly 0 for equal points
        return (jnp.minimum(distance, gap), new), new

    start = (jnp.ones(points.shape[0], jnp.float32), points[0])
    _, centres = lax.scan(draw, start, jax.random.split(key, n_code))
    return centres


def _collect_keys(params, config, batches, dtype) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
    """Keys {sublayer: [n_layer, h, N, K]} on the host, weights [N], and the tokens of a batch."""
    names = attention_names(config)
    net = TransformerVQ(config, dtype)

    @jax.jit
    def keys_of(params, batch):
        _, sown = net.apply(
            {"params": params}, batch["inputs"], mutable=["intermediates"],
            segment_ids=batch.get("segment_ids"),
        )  # fmt: skip
        flat = lambda k: jnp.moveaxis(k, 1, 2).reshape(*k.shape[:1], k.shape[2], -1, k.shape[-1])
        return {n: flat(sown["intermediates"]["layers"][n]["k"][0]) for n in names}

    parts, weights = [], []
    for batch in batches:
        arrays = {n: batch[n] for n in ("inputs", "segment_ids") if batch.get(n) is not None}
        parts.append(jax.device_get(keys_of(params, arrays)))
        mask = batch.get("mask")
        inputs = np.asarray(batch["inputs"])
        weights.append(np.ones(inputs.shape) if mask is None else np.asarray(mask) != 0)
    if not parts:
        raise ValueError("no batches: the codebooks are made from the keys of some data")
    keys = {n: np.concatenate([p[n] for p in parts], axis=2) for n in names}
    weights = np.stack(weights).astype(np.float32)
    return keys, weights.reshape(-1), weights[0].size
