"""Where tensors live on the mesh: an axis vocabulary for activations and path rules for parameters.

Mesh axes are `data`, `fsdp`, `tensor` and `sequence`. Activations name what their axes are;
`constrain` turns that into a sharding and refuses unknown names, because a constraint that silently
does nothing costs a pod its memory. Parameters follow path rules: the tensor axis where a rule
names it, then the largest divisible free axis over `fsdp`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import jax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
ACTIVATION_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "seq": ("sequence",),
    "heads": ("tensor",),
    "features": ("tensor",),
    "vocab": ("tensor",),
}
FSDP_MIN_ELEMENTS = 2**12  # smaller parameters are replicated

# (path pattern, axis from the right that the tensor axis cuts); the first match counts.
TENSOR_RULES: tuple[tuple[str, int], ...] = (
    (r"(hom|cross)/(ho|se)_proj/kernel$", -1),
    (r"(hom|cross)/ag_proj/kernel$", -2),
    (r"(^|/)(q|k|v|g)_proj/kernel$", -1),
    (r"res_proj/kernel$", -2),
    (r"mlp/up/kernel$", -1),
    (r"mlp/down/kernel$", -2),
    (r"(attn|cross)/(context_)?(qkv|q|kv)/kernel$", -1),
    (r"(attn|cross)/(context_)?proj/kernel$", -2),
    (r"mixer/((for|back)ward/)?(in_proj|dt_proj)/kernel$", -1),
    (r"mixer/((for|back)ward/)?(x_proj|out_proj)/kernel$", -2),
    (r"mixer/((for|back)ward/)?(conv1d/(kernel|bias)|dt_bias|D)$", -1),
    (r"mixer/((for|back)ward/)?norm/g$", -1),
    (r"mixer/(qc_proj|se_proj)/kernel$", -1),
    (r"mixer/po_proj/kernel$", -3),  # groups
    (r"mixer/(po_coeff|ag_proj/kernel)$", -2),
    (r"mixer/(se_bias|(po|se)_proj/bias)$", -1),
    (r"mlp/fc1/kernel$", -1),
    (r"mlp/fc2/kernel$", -2),
    (r"(embedding|lm_head|out_proj/kernel)$", -1),
)


def constrain(x: Array, *axes: str | None) -> Array:
    """Shard activation `x` by axis names, one per dimension; identity when no mesh is set.

    Raises:
        ValueError: for an unknown name, or when the number of names differs from x.ndim.
    """
    unknown = [a for a in axes if a is not None and a not in ACTIVATION_AXES]
    if unknown:
        raise ValueError(
            f"unknown activation axis {unknown[0]!r}; known: {sorted(ACTIVATION_AXES)}"
        )
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axis names for an array of shape {x.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(mesh.axis_names) >= set(MESH_AXES):
        return x
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes))
    parts = []
    for name, length in zip(axes, x.shape):
        names = ACTIVATION_AXES[name] if name else ()
        fits = names and length % math.prod(sizes[n] for n in names) == 0
        parts.append(names if fits else None)  # e.g. a batch of one at inference stays whole
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts))


def parameter_spec(
    path: str,
    shape: Sequence[int],
    mesh_sizes: dict[str, int],
    rules: Sequence[tuple[str, int]] = TENSOR_RULES,
) -> PartitionSpec:
    """Sharding of one parameter: the tensor axis by rule, the largest divisible free axis over
    fsdp.

    Args:
        path: names joined by "/", e.g. "layers/attn1/q_proj/kernel".
        shape: of the parameter, stacked layer axis included.
        mesh_sizes: size of each mesh axis.
        rules: (pattern, axis from the right) pairs for the tensor axis.
    """
    spec: list[str | None] = [None] * len(shape)
    tensor, fsdp = mesh_sizes.get("tensor", 1), mesh_sizes.get("fsdp", 1)
    if tensor > 1:
        for pattern, axis in rules:
            if re.search(pattern, path) and -axis <= len(shape):
                if shape[axis] % tensor == 0:
                    spec[axis] = "tensor"
                break
    if fsdp > 1 and math.prod(shape) >= FSDP_MIN_ELEMENTS:
        for axis in sorted(range(len(shape)), key=lambda i: (-shape[i], i)):
            if spec[axis] is None and shape[axis] % fsdp == 0:
                spec[axis] = "fsdp"
                break
    return PartitionSpec(*spec)


def path_string(path) -> str:
    """A jax key path as names joined by "/"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def parameter_shardings(tree, mesh, rules: Sequence[tuple[str, int]] = TENSOR_RULES):
    """NamedSharding for every leaf of a (possibly abstract) parameter-like tree.

    Optimiser moments have the paths of their parameters as suffix, so the same rules fit them.
    """
    sizes = dict(mesh.shape)
    spec = lambda path, leaf: parameter_spec(path_string(path), leaf.shape, sizes, rules)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(path, leaf)), tree
    )


def unsharded(tree, mesh, minimum: int = FSDP_MIN_ELEMENTS) -> list[str]:
    """Paths of the parameters of at least `minimum` elements that fsdp could not cut; worth a log
    line.
    """
    if mesh.shape.get("fsdp", 1) == 1:
        return []
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        spec = parameter_spec(path_string(path), leaf.shape, dict(mesh.shape))
        if math.prod(leaf.shape) >= minimum and "fsdp" not in spec:
            found.append(path_string(path))
    return found
