"""Layout of published encoders of T5 v1.1: the state dict of transformers' T5EncoderModel, or of a
whole T5 of which the encoder is read, and its config.json.

    encoder.block.{i}.layer.0.SelfAttention.{q,k,v}.weight <-> layers/qkv/kernel[i]
    encoder.block.{i}.layer.1.DenseReluDense.wi_{0,1}.weight <-> layers/fc1/kernel[i]
    encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight <-> relative_bias
    shared.weight (encoder.embed_tokens.weight is the same) <-> tokens/embedding
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..nets.t5 import T5Config, T5Encoder
from .names import Flat, below, check_shapes, count_of, flatten, nest, shape_of
from .towers import pick, stack_layers, unstack_layers

_ATTENTION, _MLP = "layer.0.SelfAttention", "layer.1.DenseReluDense"
_LAYER = (
    ("norm1/g", "layer.0.layer_norm.weight"),
    ("qkv/kernel", tuple(f"{_ATTENTION}.{name}.weight" for name in "qkv")),
    ("proj/kernel", f"{_ATTENTION}.o.weight"),
    ("norm2/g", "layer.1.layer_norm.weight"),
    ("fc1/kernel", (f"{_MLP}.wi_0.weight", f"{_MLP}.wi_1.weight")),
    ("fc2/kernel", f"{_MLP}.wo.weight"),
)
_LAYERS = "encoder.block.{}.{}"
_OUTSIDE = {
    "tokens/embedding": "shared.weight",
    "relative_bias": f"encoder.block.0.{_ATTENTION}.relative_attention_bias.weight",
    "final_norm/g": "encoder.final_layer_norm.weight",
}


def encoder_arrays(flat: Flat) -> dict[str, Any]:
    """The encoder's arrays, with one name for the table of tokens."""
    kept = {n: a for n, a in flat.items() if n == "shared.weight" or n.startswith("encoder.")}
    table = kept.pop("encoder.embed_tokens.weight", None)
    return kept if table is None else {"shared.weight": table, **kept}


def t5_config(flat: Flat, published: Mapping[str, Any] | None = None) -> T5Config:
    """The config of an encoder, from names and shapes.

    Args:
        flat: arrays of the layout.
        published: what its config.json says, of which epsilon and the largest distance are read.

    Raises:
        ValueError: not this layout, or T5 of another version.
    """
    flat, published = encoder_arrays(flat), published or {}
    if f"encoder.block.0.{_MLP}.wi.weight" in flat:
        raise ValueError("a T5 of version 1.0 (its MLP has no gate); version 1.1 is supported")
    pick(published, "T5", feed_forward_proj="gated-gelu")
    vocab_size, d_model = shape_of(flat, "shared.weight", 2)
    buckets, n_head = shape_of(flat, _OUTSIDE["relative_bias"], 2)
    inner, _ = shape_of(flat, f"encoder.block.0.{_ATTENTION}.q.weight", 2)
    return T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layer=count_of(flat, r"encoder\.block\.(\d+)\."),
        n_head=n_head,
        d_kv=inner // n_head,
        d_ff=shape_of(flat, f"encoder.block.0.{_MLP}.wi_0.weight", 2)[0],
        buckets=buckets,
        max_distance=int(published.get("relative_attention_max_distance", 128)),
        epsilon=float(published.get("layer_norm_epsilon", 1e-6)),
    )


def t5_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters in their layout; nothing is computed."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids)["params"]
    return {n: a.shape for n, a in jax.eval_shape(t5_to_reference, params).items()}


def t5_from_reference(flat: Flat, config: T5Config) -> dict[str, Any]:
    """Parameters of `T5Encoder` from arrays of the layout; a decoder's are passed over.

    Args:
        config: of `t5_config(flat, ...)`.

    Raises:
        ValueError: names every array that is missing, unknown or of another shape.
    """
    flat = encoder_arrays(flat)
    check_shapes(flat, t5_shapes(config))
    layers = stack_layers(flat, _LAYERS, _LAYER, config.n_layer)
    ours = {f"layers/{path}": array for path, array in layers.items()}
    return nest(ours | {path: flat[name] for path, name in _OUTSIDE.items()})


def t5_to_reference(params: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `t5_from_reference`."""
    flat = flatten(params)
    theirs = unstack_layers(below(flat, "layers/"), _LAYERS, _LAYER)
    return theirs | {name: flat[path] for path, name in _OUTSIDE.items()}
