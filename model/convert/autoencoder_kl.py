"""Layout of published KL autoencoders: the state dict of diffusers' AutoencoderKL (`sd-vae-ft-ema`,
`sd-vae-ft-mse`, the `vae/` folder of Stable Diffusion and SDXL) and its config.json.

    encoder.down_blocks.{i}.resnets.{j}.norm1.bias <-> encoder/conv_blocks_{i}/res_{j}/norm1/bias

Convolutions are (out, in, height, width) there and (height, width, in, out) here; the projections
of attention are matrices (out, in) there and 1x1 convolutions here. Older files name these
projections query, key, value and proj_attn. Arrays may be numpy's, or jax's as in `jax.eval_shape`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..nets.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from .names import Flat, check_shapes, count_of, flatten, nest, shape_of
from .vq_tokenizer import conv_kernel, conv_weight

# Ours -> theirs, in this order; each pattern stands for one part of a name.
_PARTS = (
    (r"encoder/conv_blocks_(\d+)", r"encoder.down_blocks.\1"),
    (r"decoder/conv_blocks_(\d+)", r"decoder.up_blocks.\1"),
    (r"/res_(\d+)", r".resnets.\1"),
    (r"/downsample/", r".downsamplers.0."),
    (r"/upsample/", r".upsamplers.0."),
    (r"/mid_0", r".mid_block.resnets.0"),
    (r"/mid_2", r".mid_block.resnets.1"),
    (r"/mid_1/norm", r".mid_block.attentions.0.group_norm"),
    (r"/mid_1/([qkv])", r".mid_block.attentions.0.to_\1"),
    (r"/mid_1/proj_out", r".mid_block.attentions.0.to_out.0"),
    (r"/nin_shortcut", r".conv_shortcut"),
    (r"/norm_out", r".conv_norm_out"),
    (r"/(kernel|scale)$", r".weight"),
    (r"/", r"."),
)
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# What config.json may say of parts that are not configurable here: the only value that is known.
_FIXED = {
    "act_fn": "silu", "norm_num_groups": 32, "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D", "mid_block_add_attention": True, "use_quant_conv": True,
    "use_post_quant_conv": True, "shift_factor": None, "latents_mean": None, "latents_std": None,
}  # fmt: skip


def _their_name(path: str) -> str:
    for pattern, name in _PARTS:
        path = re.sub(pattern, name, path)
    return path


def _renamed(flat: Flat) -> dict[str, Any]:
    """The arrays under today's names; projections of older files as matrices."""
    pattern = re.compile(rf"(?<=\.mid_block\.attentions\.0\.)({'|'.join(_OLDER)})(?=\.)")
    new = {pattern.sub(lambda m: _OLDER[m[1]], name): array for name, array in flat.items()}
    matrix = lambda n, a: a.reshape(a.shape[:2]) if _is_projection(n) and a.ndim == 4 else a
    return {name: matrix(name, array) for name, array in new.items()}


def _is_projection(name: str) -> bool:
    return ".attentions.0.to_" in name and name.endswith(".weight")


def _ours(array: Any) -> Any:
    if array.ndim == 2:
        return array.transpose(1, 0)[None, None]
    return conv_kernel(array) if array.ndim == 4 else array


def _theirs(name: str, array: Any) -> Any:
    if _is_projection(name):
        return array[0, 0].transpose(1, 0)
    return conv_weight(array) if array.ndim == 4 else array


def autoencoder_config(
    flat: Flat, published: Mapping[str, Any] | None = None
) -> AutoencoderKLConfig:
    """The config of an autoencoder, from names and shapes.

    Args:
        flat: arrays of the layout.
        published: what its config.json says; the scaling factor is read, which shapes do not tell
            (without it: Stable Diffusion's 0.18215), and parts that are not known here are refused.

    Raises:
        ValueError: not this layout, sizes that do not fit together, or unknown parts.
    """
    for name, known in _FIXED.items():
        given = (published or {}).get(name, known)
        values = set(given) if isinstance(given, list | tuple) else {given}
        if values - {known}:
            listed = ", ".join(map(str, sorted(values - {known}, key=str)))
            raise ValueError(f"its config.json has {name}={listed}; only {known} is supported")
    flat = _renamed(flat)
    ch, in_channels, *_ = shape_of(flat, "encoder.conv_in.weight", 4)
    levels = count_of(flat, r"encoder\.down_blocks\.(\d+)\.")
    width = lambda i: shape_of(flat, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 4)[0]
    widths = [width(i) for i in range(levels)]
    if not widths or any(not ch or w % ch for w in widths):
        raise ValueError(f"channels of the levels {widths} are no multiples of the first, {ch}")
    return AutoencoderKLConfig(
        ch=ch,
        ch_mult=tuple(w // ch for w in widths),
        num_res_blocks=count_of(flat, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        latent_channels=shape_of(flat, "post_quant_conv.weight", 4)[0],
        scaling_factor=float((published or {}).get("scaling_factor", 0.18215)),
        in_channels=in_channels,
        out_channels=shape_of(flat, "decoder.conv_out.weight", 4)[0],
    )


def autoencoder_shapes(config: AutoencoderKLConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an autoencoder's parameters in their layout; nothing is computed."""
    shapes = jax.eval_shape(autoencoder_to_reference, _abstract(config))
    return {name: a.shape for name, a in shapes.items()}


def _abstract(config: AutoencoderKLConfig) -> Any:
    side = config.downsample
    image = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    return jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), image)["params"]


def autoencoder_from_reference(flat: Flat, config: AutoencoderKLConfig) -> dict[str, Any]:
    """Parameters of `AutoencoderKL` from arrays under today's or the older names.

    Args:
        config: of `autoencoder_config(flat, ...)`.

    Raises:
        ValueError: names every array that is missing, unknown or of another shape.
    """
    flat = _renamed(flat)
    check_shapes(flat, autoencoder_shapes(config))
    return nest({path: _ours(flat[_their_name(path)]) for path in flatten(_abstract(config))})


def autoencoder_to_reference(params: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `autoencoder_from_reference`, under today's names."""
    named = {_their_name(path): array for path, array in flatten(params).items()}
    return {name: _theirs(name, array) for name, array in named.items()}
