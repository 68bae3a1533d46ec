"""A trained DiT with other mixers: what is kept, and what a student follows of its teacher.

Attention is replaced by a mixer of linear cost, all other weights stay, and the new mixers learn
what the old ones did (as SD3 was given PoM, arXiv 2604.06129: mean squared and mean absolute error
on the output of every block and on the final output).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .dit import DiT, DiTConfig

# Fields of a DiTConfig that only its mixers read (n_head: unless a context is attended to).
MIXER_FIELDS = (
    "mixer", "n_head", "degree", "rope", "d_state", "d_conv", "expand", "dt_rank", "headdim",
    "ngroups", "d_ssm", "rmsnorm", "norm_before_gate", "D_has_hdim", "dt_limit", "chunk",
    "use_bias", "conv_bias",
)  # fmt: skip


class Trace(NamedTuple):
    """What a DiT makes on its way.

    Attributes:
        out: [B, .., C_out] float32, of the net.
        inputs, outputs: [n_layer, B, T, D] residual streams before and after every block.
    """

    out: Array
    inputs: Array
    outputs: Array


def check_replacement(teacher: DiTConfig, student: DiTConfig) -> None:
    """Whether the two differ in nothing but their mixers.

    Raises:
        ValueError: a field that differs, or a context that goes through the mixers themselves.
    """
    if teacher.context == "joint":
        raise ValueError(
            "the teacher has context=joint, whose attention mixes image and text; only "
            "context=none or cross can have other mixers"
        )
    free = set(MIXER_FIELDS)
    if teacher.context == "cross":
        free.remove("n_head")
    for field in dataclasses.fields(DiTConfig):
        theirs, own = getattr(teacher, field.name), getattr(student, field.name)
        if field.name not in free and theirs != own:
            raise ValueError(
                f"{field.name}={own} of the student is {theirs} in the teacher; they may differ in "
                f"their mixers only, set {field.name}={theirs}"
            )


def mixer_name(config: DiTConfig) -> str:
    """Name of the mixer's parameters within those of a block."""
    return "attn" if config.mixer == "attention" else "mixer"


def replace_mixers(
    teacher: dict[str, Any], fresh: dict[str, Any], old: DiTConfig, new: DiTConfig
) -> dict[str, Any]:
    """The parameters of `teacher`, a DiT as `old`, with the mixers of `fresh`, one as `new`."""
    blocks = {k: v for k, v in teacher["blocks"].items() if k != mixer_name(old)}
    name = mixer_name(new)
    return {**teacher, "blocks": {**blocks, name: fresh["blocks"][name]}}


def is_mixer(params: dict[str, Any], config: DiTConfig) -> dict[str, Any]:
    """True for the parameters of the mixers, False for all others; of their tree."""
    name = mixer_name(config)
    inside = lambda path, _: [getattr(k, "key", None) for k in path[:2]] == ["blocks", name]
    return jax.tree_util.tree_map_with_path(inside, params)


def trace(net: DiT, params: dict[str, Any], x: Array, t: Array, **told) -> Trace:
    """A call of the net with the residual stream around every block; arguments as of the call."""
    (out, _), seen = net.apply({"params": params}, x, t, **told, mutable=["intermediates"])
    seen = seen["intermediates"]
    first, outputs = seen["embedded"][0], seen["blocks"]["out"][0]
    inputs = jnp.concatenate([first[None].astype(outputs.dtype), outputs[:-1]])
    return Trace(out, inputs, outputs)


def errors(student: Array, teacher: Array, stacked: bool = False) -> tuple[Array, Array]:
    """Mean squared and mean absolute error [B] in at least float32, of arrays [B, ..], or
    `stacked` [n_layer, B, ..]."""
    wide = jnp.promote_types(student.dtype, jnp.float32)
    error = student.astype(wide) - teacher.astype(wide)
    axes = tuple(i for i in range(error.ndim) if i != int(stacked))
    return jnp.mean(jnp.square(error), axis=axes), jnp.mean(jnp.abs(error), axis=axes)
