"""Layout of published CLIP weights: the state dict of transformers' CLIPModel, or of one tower
(CLIPTextModel, CLIPTextModelWithProjection: the `text_encoder/` of Stable Diffusion), and its
config.json.

    text_model.encoder.layers.{i}.self_attn.{q,k,v}_proj.weight <-> text/layers/qkv/kernel[i]
    text_model.embeddings.token_embedding.weight                <-> text/tokens/embedding
    vision_model.pre_layrnorm.weight (their spelling)           <-> vision/first_norm/scale
    {text,visual}_projection.weight                             <-> {text,vision}/projection/kernel

Arrays may be numpy's, or jax's as in `jax.eval_shape`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..nets.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig
from .names import Flat, below, check_shapes, count_of, flatten, nest, shape_of
from .towers import pick, stack_layers, transposed, unstack_layers

_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
_PARTS = (
    ("norm1", "layer_norm1"), ("qkv", _QKV), ("proj", "self_attn.out_proj"),
    ("norm2", "layer_norm2"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"),
)  # fmt: skip
_OURS = {"bias": "bias", "weight": "kernel"}


def _layer_table():
    """(path here, name or names there) of every array of a layer."""
    for ours, theirs in _PARTS:
        for leaf in ("weight", "bias"):
            here = "scale" if leaf == "weight" and "norm" in ours else _OURS[leaf]
            names = (theirs,) if isinstance(theirs, str) else theirs
            names = tuple(f"{name}.{leaf}" for name in names)
            yield f"{ours}/{here}", names[0] if len(names) == 1 else names


_LAYER = tuple(_layer_table())
# Outside the layers: (path here, name there), per tower.
_TEXT = (
    ("tokens/embedding", "text_model.embeddings.token_embedding.weight"),
    ("positions", "text_model.embeddings.position_embedding.weight"),
    ("final_norm/scale", "text_model.final_layer_norm.weight"),
    ("final_norm/bias", "text_model.final_layer_norm.bias"),
    ("projection/kernel", "text_projection.weight"),
)
_VISION = (
    ("class_token", "vision_model.embeddings.class_embedding"),
    ("patches/kernel", "vision_model.embeddings.patch_embedding.weight"),
    ("positions", "vision_model.embeddings.position_embedding.weight"),
    ("first_norm/scale", "vision_model.pre_layrnorm.weight"),
    ("first_norm/bias", "vision_model.pre_layrnorm.bias"),
    ("final_norm/scale", "vision_model.post_layernorm.weight"),
    ("final_norm/bias", "vision_model.post_layernorm.bias"),
    ("projection/kernel", "visual_projection.weight"),
)
_TOWERS = (
    ("text", _TEXT, "text_model.encoder.layers.{}.{}"),
    ("vision", _VISION, "vision_model.encoder.layers.{}.{}"),
)
_TABLES = {"tokens/embedding", "positions"}  # matrices that stand there as they do here


def renamed(flat: Flat) -> dict[str, Any]:
    """The arrays under the names of a whole CLIPModel, without the numbers of positions that older
    files hold. A single tower's file may have its names without the tower's.
    """
    kept = {n: a for n, a in flat.items() if not n.endswith("position_ids")}
    for name, tower in (("token_embedding", "text_model"), ("class_embedding", "vision_model")):
        if any(n.startswith(f"embeddings.{name}") for n in kept):
            bare = lambda n: "projection" not in n
            kept = {f"{tower}.{n}" if bare(n) else n: a for n, a in kept.items()}
    return kept


def text_arrays(flat: Flat) -> dict[str, Any]:
    """The text tower's arrays, and its projection."""
    return {n: a for n, a in renamed(flat).items() if n.startswith("text_")}


def _tower_settings(published: Mapping[str, Any], tower: str) -> Mapping[str, Any]:
    """What config.json says of a tower: in a part of its own, or all of it where it is alone."""
    if f"{tower}_config" not in published and f"{tower}_config_dict" not in published:
        return published
    parts = (published.get(f"{tower}_config{end}") or {} for end in ("", "_dict"))
    return {name: value for part in parts for name, value in part.items()}


def _sizes(flat: Flat, published: Mapping[str, Any], tower: str, heads: int) -> dict[str, Any]:
    """Fields of TowerConfig; `heads` is what a config.json that does not say means."""
    stem = f"{tower}_model.encoder.layers."
    d_ff, d_model = shape_of(flat, f"{stem}0.mlp.fc1.weight", 2)
    read = _tower_settings(published, tower)
    return {
        "d_model": d_model,
        "n_layer": count_of(flat, rf"{tower}_model\.encoder\.layers\.(\d+)\."),
        # Without a config.json at all, heads of 64 channels, as all but the largest have.
        "n_head": int(read.get("num_attention_heads", heads if published else d_model // 64)),
        "d_ff": d_ff,
        "act": str(read.get("hidden_act", "quick_gelu")),
        "epsilon": float(read.get("layer_norm_eps", 1e-5)),
    }


def clip_config(flat: Flat, published: Mapping[str, Any] | None = None) -> ClipConfig:
    """The config of CLIP weights, from names and shapes.

    Args:
        flat: arrays of the layout.
        published: what its config.json says: numbers of heads, activations, epsilons and the id at
            which texts are pooled, which shapes do not tell.

    Raises:
        ValueError: not this layout, or sizes that do not fit together.
    """
    flat, published = renamed(flat), published or {}
    text = vision = None
    if any(n.startswith("text_model.") for n in flat):
        vocab_size, _ = shape_of(flat, _TEXT[0][1], 2)
        eos = _tower_settings(published, "text").get("eos_token_id", 49407)
        if not isinstance(eos, int):
            raise ValueError(f"its config.json has eos_token_id={eos}; one id is needed")
        text = ClipTextConfig(
            vocab_size=vocab_size, length=shape_of(flat, _TEXT[1][1], 2)[0], eos=eos,
            **_sizes(flat, published, "text", 8),
        )  # fmt: skip
    if any(n.startswith("vision_model.") for n in flat):
        pick(_tower_settings(published, "vision"), "CLIP", num_channels=3)
        patch = shape_of(flat, _VISION[1][1], 4)[-1]
        side = round((shape_of(flat, _VISION[2][1], 2)[0] - 1) ** 0.5)
        vision = ClipVisionConfig(
            image_size=patch * side, patch_size=patch, **_sizes(flat, published, "vision", 12)
        )
    if not text and not vision:
        raise ValueError(
            f"neither text_model nor vision_model; names found: {', '.join(sorted(flat)[:6])}"
        )
    names = ("text_projection.weight", "visual_projection.weight")
    widths = {flat[name].shape[0] for name in names if name in flat}
    if len(widths) > 1:
        raise ValueError(f"projections to different widths, {sorted(widths)}")
    return ClipConfig(text=text, vision=vision, projection=widths.pop() if widths else 0)


def _abstract(config: ClipConfig) -> Any:
    one = lambda *shape, dtype: jax.ShapeDtypeStruct((1, *shape), dtype)
    ids = one(1, dtype=jnp.int32) if config.text else None
    side = config.vision.image_size if config.vision else 0
    images = one(side, side, 3, dtype=jnp.float32) if config.vision else None
    init = lambda ids, images: Clip(config).init(jax.random.key(0), ids, images, method="encode")
    return jax.eval_shape(init, ids, images)["params"]


def clip_shapes(config: ClipConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters in their layout; nothing is computed."""
    shapes = jax.eval_shape(clip_to_reference, _abstract(config))
    return {name: a.shape for name, a in shapes.items()}


def clip_from_reference(flat: Flat, config: ClipConfig) -> dict[str, Any]:
    """Parameters of `Clip` from arrays of the layout.

    Args:
        config: of `clip_config(flat, ...)`.

    Raises:
        ValueError: names every array that is missing, unknown or of another shape.
    """
    flat = renamed(flat)
    check_shapes(flat, clip_shapes(config))
    ours = {}
    for tower, table, layers in _TOWERS:
        sizes = getattr(config, tower)
        if not sizes:
            continue
        found = stack_layers(flat, layers, _LAYER, sizes.n_layer)
        ours |= {f"{tower}/layers/{path}": array for path, array in found.items()}
        for path, name in table:
            if name in flat:
                ours[f"{tower}/{path}"] = _turned(path, flat[name], (2, 3, 1, 0))
    if "logit_scale" in flat:
        ours["logit_scale"] = flat["logit_scale"]
    return nest(ours)


def clip_to_reference(params: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `clip_from_reference`, under the names of a whole CLIPModel."""
    flat, theirs = flatten(params), {}
    for tower, table, layers in _TOWERS:
        mine = below(flat, f"{tower}/")
        if not mine:
            continue
        theirs |= unstack_layers(below(mine, "layers/"), layers, _LAYER)
        theirs |= {
            name: _turned(path, mine[path], (3, 2, 0, 1)) for path, name in table if path in mine
        }
    if "logit_scale" in flat:
        theirs["logit_scale"] = flat["logit_scale"]
    return theirs


def _turned(path: str, array: Any, kernel: tuple[int, ...]) -> Any:
    """An array outside the layers in the other layout; `kernel`: how a convolution's axes go."""
    if path in _TABLES:
        return array
    return array.transpose(kernel) if array.ndim == 4 else transposed(array)
