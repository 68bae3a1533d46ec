"""FlexiDiT: one DiT that takes its images in patches of several sizes (arXiv 2502.20126).

A *mode* is a patch size: p of an image, (frames, p, p) of a video. In every mode the net is a plain
`DiT` with that patch and effective parameters, pure functions of one tree:

    config = FlexiDiTConfig(base=DiTConfig(patch_size=2, ..), patch_sizes=(2, 4))
    params = flexify(config, dit_params, jax.random.key(0))
    net = DiT(mode_config(config, 4))
    out, _ = net.apply({"params": mode_params(config, params, 4)}, x, t, labels)

The mode of the base's own patch p0 is the net as it was trained. Trees:

    shared: those of a DiT of the underlying patch, and patch_size_embed/p4 [D] of every other mode
    lora:   base/ (the DiT, frozen), and for every other mode modes/p4/: x_embedder, final,
            patch_size_embed [D], lora/<target>/{A [L, in, r], B [L, r, out]}

p4 is p2x4x4 for a video.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from ..layers.context import conditions
from ..layers.flexible import (
    METHODS,
    lift_deembedding,
    lift_embedding,
    resize_deembedding,
    resize_embedding,
)
from ..layers.patches import Patch, patch_name, patch_pixels, patch_sides
from ..partition import path_string
from ..sampling.budget import dit_flops
from .dit import EPSILON, DiT, DiTConfig

VARIANTS = ("shared", "lora")
TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
POM_TARGETS = ("mixer.qc_proj", "mixer.ag_proj", "mlp.fc1", "mlp.fc2")
Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexiDiTConfig:
    """A DiT and the patch sizes it takes.

    Attributes:
        base: the DiT, of images or videos; its own patch p0 is one of the modes.
        patch_sizes: of all modes, p each, or (frames, p, p) for videos; each divides the base's
            sizes.
        variant: "shared": all modes train the same weights. "lora": the base is frozen, every other
            mode has embeddings of its own and adapters of low rank on the blocks.
        underlying: patch p* at which the weights of "shared" are kept; 0: the largest, along every
            axis.
        resize: "area" or "bilinear", how patches of one size become those of another.
        rank, alpha: of the adapters of "lora": W + alpha / rank A B.
        targets: kernels of a block that have adapters, by path; `POM_TARGETS` for mixer="pom".
        detail: of an embedding, the part that patches of the base's size do not have (differences
            within what they average) starts random, this many times as large as Xavier's; 0 starts
            it at zero, as published. Where the output's part is zero as well, the start is a
            saddle: gradients of both are products with the other.
    """

    base: DiTConfig = DiTConfig()
    patch_sizes: tuple[int | tuple[int, int, int], ...] = (2, 4)
    variant: str = "shared"
    underlying: int | tuple[int, int, int] = 0
    resize: str = "area"
    rank: int = 64
    alpha: float = 64.0
    targets: tuple[str, ...] = TARGETS
    detail: float = 0.0

    @property
    def star(self) -> Patch:
        """p*, the underlying patch of the shared variant."""
        if self.underlying or not self.base.frames:
            return self.underlying or max(self.patch_sizes)
        return tuple(map(max, *self.patch_sizes)) if len(self.patch_sizes) > 1 else self.powerful

    @property
    def powerful(self) -> Patch:
        """p0, the mode of the base."""
        return self.base.patch

    @property
    def weak(self) -> Patch:
        """The cheapest mode: that of the largest patch."""
        return max(self.patch_sizes, key=lambda p: (patch_pixels(p), p))

    @property
    def others(self) -> tuple[Patch, ...]:
        """All modes but that of the base, the smallest patch first."""
        return tuple(sorted(p for p in self.patch_sizes if p != self.powerful))


def check_config(config: FlexiDiTConfig) -> None:
    """Raises ValueError, with the numbers, for modes that cannot be had."""
    base, sizes = config.base, config.patch_sizes
    listed = f"({', '.join(map(patch_name, sizes))})"
    if config.variant not in VARIANTS:
        raise ValueError(f"variant={config.variant!r}; choose one of {', '.join(VARIANTS)}")
    if config.resize not in METHODS:
        raise ValueError(f"resize={config.resize!r}; choose one of {', '.join(METHODS)}")
    axes = len(patch_sides(config.powerful))
    for p in (*sizes, *([config.underlying] if config.underlying else [])):
        if isinstance(p, int) == bool(base.frames) or len(patch_sides(p)) != axes:
            form = "(frames, side, side), written 2x4x4" if base.frames else "one number, its side"
            raise ValueError(
                f"patch size {patch_name(p)}: the base takes {'videos' if axes == 3 else 'images'},"
                f" whose patches are {form}"
            )
    if config.powerful not in sizes:
        raise ValueError(
            f"patch_sizes={listed} lack {patch_name(config.powerful)}, the patch size of the base; "
            "add it"
        )
    if len(set(sizes)) != len(sizes) or min(map(min, map(patch_sides, sizes))) < 1:
        raise ValueError(f"patch_sizes={listed}: each is a whole number and named once")
    for p in sizes:
        _check_divides(base, p, f"patch size {patch_name(p)}")
        if base.frames:
            base.with_patch(p)  # raises ValueError unless its frames are square
    if config.variant == "shared":
        largest = sizes[0] if len(sizes) == 1 else tuple(map(max, *map(patch_sides, sizes)))
        if any(a < b for a, b in zip(patch_sides(config.star), patch_sides(largest))):
            largest = largest if base.frames else max(sizes)
            raise ValueError(
                f"underlying={patch_name(config.star)}: it is at least the largest patch size "
                f"{patch_name(largest)} and divides input_size={base.input_size}"
            )
        _check_divides(base, config.star, f"underlying={patch_name(config.star)}")
    if config.variant == "lora" and (config.rank < 1 or not config.targets):
        raise ValueError(f"rank={config.rank}, targets={config.targets}: adapters need both")
    attended = [t for t in config.targets if t.startswith("attn.")]
    if config.variant == "lora" and attended and base.mixer != "attention":
        instead = POM_TARGETS if base.mixer == "pom" else TARGETS[2:]
        raise ValueError(
            f"targets={','.join(attended)}: a net of mixer={base.mixer} has no attention; set "
            f"targets={','.join(instead)}"
        )


def _check_divides(base: DiTConfig, patch: Patch, what: str) -> None:
    """Raises ValueError where a patch does not divide the sizes of the base's inputs."""
    names = ("frames", "input_size", "input_size") if base.frames else ("input_size", "input_size")
    for name, size, side in zip(names, base.shape, patch_sides(patch)):
        if size % side:
            fit = [n for n in range(1, size + 1) if size % n == 0]
            raise ValueError(f"{what} does not divide {name}={size}; {', '.join(map(str, fit))} do")


# ---------------------------------------------------------------- modes


def mode_config(config: FlexiDiTConfig, patch: Patch) -> DiTConfig:
    """The DiT of a mode: the base with another patch, positions counted in patches of the base.

    Raises:
        ValueError: there is no such mode, or `check_config`.
    """
    check_config(config)
    if patch not in config.patch_sizes:
        modes = ", ".join(map(patch_name, sorted(config.patch_sizes)))
        raise ValueError(f"no mode of patch size {patch_name(patch)}; there are {modes}")
    return config.base.with_patch(patch)


def mode_params(config: FlexiDiTConfig, params: Params, patch: Patch) -> dict[str, Any]:
    """Parameters of the DiT of a mode, for training inside jit and grad, or once for inference.

    The patch-size embedding s_p is part of the embedding's bias: adding it to every token is the
    same. Adapters are merged. With "lora" no gradient reaches the base, and the base's own mode is
    the base, bit for bit.

    Args:
        params: tree of the whole FlexiDiT. patch: the mode.

    Raises:
        ValueError: as `mode_config`.
    """
    mode_config(config, patch)
    at_base, key = patch == config.powerful, _key(patch)
    if config.variant == "lora":
        base = jax.tree.map(lax.stop_gradient, dict(params["base"]))
        if at_base:
            return base
        own = params["modes"][key]
        embed, out = own["x_embedder"], own["final"]
        blocks = merge_lora(config, base["blocks"], own["lora"])
        shift = own["patch_size_embed"]
    else:
        base = {name: tree for name, tree in params.items() if name != "patch_size_embed"}
        embed, out, blocks = base["x_embedder"], base["final"], base["blocks"]
        resize = (patch_sides(config.star), patch_sides(patch), config.resize)
        embed = {**embed, "kernel": resize_embedding(embed["kernel"], *resize)}
        out = {n: resize_deembedding(out[n], *resize) for n in ("kernel", "bias")}
        shift = None if at_base else params["patch_size_embed"][key]
    if shift is not None:
        embed = {**embed, "bias": embed["bias"] + shift}
    return {
        **base,
        "x_embedder": embed,
        "blocks": blocks,
        "final": {**base["final"], "kernel": out["kernel"], "bias": out["bias"]},
    }


def materialise(
    config: FlexiDiTConfig, params: Params, patches: Sequence[Patch] = ()
) -> dict[Patch, dict[str, Any]]:
    """{"patch": parameters} of several modes (all of them for ()), for `flexible_denoiser`.

    What modes share is not copied when this runs outside jit.
    """
    return {p: mode_params(config, params, p) for p in patches or config.patch_sizes}


def flexible_denoiser(config: FlexiDiTConfig, **options) -> Callable[..., Array]:
    """denoise(modes, x, t, labels, mode) -> out, as samplers with a mode per segment take it; for
    nets with a context `labels` is a mapping, see `layers.context.conditions`.

    `modes` is what `materialise` gives; mode None is that of the base.

    Args:
        options: of `DiT`: dtype, remat, unroll.
    """
    nets = {p: DiT(mode_config(config, p), **options) for p in config.patch_sizes}

    def denoise(modes, x, t, labels, mode=None):
        mode = mode or config.powerful
        if mode not in nets or mode not in modes:
            named = ", ".join(map(patch_name, sorted(modes)))
            raise ValueError(f"no mode of patch size {patch_name(mode)}; there are {named}")
        return nets[mode].apply({"params": modes[mode]}, x, t, **conditions(labels))[0]

    return denoise


def features(
    config: FlexiDiTConfig,
    params: Params,
    x: Array,
    t: Array,
    labels: Array | Mapping[str, Array],
    *,
    dtype=jnp.float32,
) -> Array:
    """What the base's mode makes of clean images, as a fixed encoder: no gradient reaches `params`.

    The residual stream after half of the blocks, normalised token by token (so that no image's
    features are larger than another's) and averaged over tokens.

    Args:
        params: of the whole FlexiDiT. x: [B, .., C]. t: [B], the least noisy time.
        labels: [B], or a mapping, see `layers.context.conditions`.

    Returns:
        [B, D] float32.
    """
    base = dataclasses.replace(config.base, n_layer=max(1, config.base.n_layer // 2))
    own = jax.tree.map(lax.stop_gradient, mode_params(config, params, config.powerful))
    own = {**own, "blocks": jax.tree.map(lambda a: a[: base.n_layer], own["blocks"])}
    told = conditions(labels)
    _, sown = DiT(base, dtype).apply({"params": own}, x, t, **told, mutable=["intermediates"])
    stream = sown["intermediates"]["blocks"]["out"][0][-1].astype(jnp.float32)
    return jnp.mean(jax.nn.standardize(stream, axis=-1, epsilon=EPSILON), axis=1)


def mode_flops(config: FlexiDiTConfig) -> dict[Patch, float]:
    """{patch: multiply-adds (half the FLOPs) of one image's forward pass} of every mode; see
    `dit_flops`."""
    return {p: dit_flops(mode_config(config, p)) for p in sorted(config.patch_sizes)}


def flops(config: FlexiDiTConfig | DiTConfig, patch: Patch | None = None) -> float:
    """Multiply-adds (half the FLOPs) of one image's forward pass in mode `patch` (the base's if
    None)."""
    if isinstance(config, DiTConfig):
        return dit_flops(config, patch)
    return dit_flops(mode_config(config, patch or config.powerful))


# ---------------------------------------------------------------- making one out of a DiT


def flexify(config: FlexiDiTConfig, dit_params: Params, key: Array) -> dict[str, Any]:
    """The tree of a FlexiDiT from a trained DiT, which its mode p0 reproduces: to rounding with
    "shared", bit for bit with "lora".

    Weights at the underlying patch are the pseudo-inverses of the projections to p0, applied to the
    base's; patch-size embeddings and the adapters' B start at zero, their A uniformly in
    +-1/sqrt(in) (Kaiming, as in LoRA, arXiv 2106.09685).

    Args:
        dit_params: of a DiT of `config.base`. key: for A.

    Raises:
        ValueError: `check_config`, other parameters than the base's, or no such targets.
    """
    check_config(config)
    base, p0 = config.base, config.powerful
    wanted = (patch_pixels(p0) * base.in_channels, base.d_model)
    if tuple(dit_params["x_embedder"]["kernel"].shape) != wanted:
        raise ValueError(
            f"the DiT's patch embedding has shape {dit_params['x_embedder']['kernel'].shape}, "
            f"base.patch_size={patch_name(p0)} needs {wanted}"
        )
    zeros = jnp.zeros((base.d_model,), dit_params["x_embedder"]["bias"].dtype)
    if config.variant == "shared":
        embed, out = _lifted(config, dit_params, config.star, p0, key)
        shifts = {_key(p): zeros for p in config.others}
        return {**dit_params, "x_embedder": embed, "final": out} | (
            {"patch_size_embed": shifts} if shifts else {}
        )
    modes = {}
    for number, p in enumerate(config.others):
        # Straight to the mode's own patch, through the larger of both along every axis.
        own = jax.random.fold_in(key, p if isinstance(p, int) else number)
        larger = tuple(map(max, patch_sides(p), patch_sides(p0)))
        embed, out = _lifted(config, dit_params, larger, p0, jax.random.fold_in(own, 1))
        resize = (larger, patch_sides(p), config.resize)
        out = {n: resize_deembedding(out[n], *resize) for n in ("kernel", "bias")}
        modes[_key(p)] = {
            "x_embedder": {
                "kernel": resize_embedding(embed["kernel"], *resize),
                "bias": embed["bias"],
            },
            "final": out,
            "patch_size_embed": zeros,
            "lora": _new_adapters(config, dit_params["blocks"], own),
        }
    return {"base": dict(dit_params), "modes": modes}


def init_params(config: FlexiDiTConfig, key: Array) -> dict[str, Any]:
    """A FlexiDiT from a DiT that has learned nothing: shapes and names of the tree."""
    base = config.base
    x = jnp.zeros((1, *base.shape))
    one = jnp.zeros((1,), jnp.int32)
    variables = DiT(base).init({"params": key}, x, one, one)
    return flexify(config, variables["params"], jax.random.fold_in(key, 1))


def _lifted(config, params, star: Patch, p0: Patch, key: Array) -> tuple[dict, dict]:
    """Embedding and final layer at patch `star` that project to those of `params` at p0."""
    resize = (patch_sides(star), patch_sides(p0), config.resize)
    embed, out = dict(params["x_embedder"]), dict(params["final"])
    embed["kernel"] = lift_embedding(embed["kernel"], *resize)
    if config.detail and resize[0] != resize[1]:
        kernel = embed["kernel"]
        new = nn.initializers.xavier_uniform()(key, kernel.shape, kernel.dtype)
        seen = lift_embedding(resize_embedding(new, *resize), *resize)
        embed["kernel"] = kernel + config.detail * (new - seen)
    for name in ("kernel", "bias"):
        out[name] = lift_deembedding(out[name], *resize)
    return embed, out


def _key(patch: Patch) -> str:
    return f"p{patch_name(patch)}"


# ---------------------------------------------------------------- adapters


def merge_lora(config: FlexiDiTConfig, blocks: Params, lora: Params) -> dict[str, Any]:
    """Blocks [L, ..] with W + alpha / rank A B in place of W for every target; the others as they
    are. A net of merged blocks computes x W + alpha / rank (x A) B."""
    return _add_lora(config, blocks, lora, config.alpha / config.rank)


def unmerge_lora(config: FlexiDiTConfig, blocks: Params, lora: Params) -> dict[str, Any]:
    """The base's blocks out of merged ones: inverse of `merge_lora`, to rounding."""
    return _add_lora(config, blocks, lora, -config.alpha / config.rank)


def _add_lora(config, blocks, lora, scale: float):
    for target in config.targets:
        pair = _at(lora, target)
        product = jnp.einsum("lir,lro->lio", pair["A"], pair["B"], precision=lax.Precision.HIGHEST)
        kernel = _at(blocks, target)["kernel"]
        blocks = _replaced(blocks, target, {"kernel": kernel + scale * product})
    return dict(blocks)


def _new_adapters(config: FlexiDiTConfig, blocks: Params, key: Array) -> dict[str, Any]:
    """A drawn, B zero, for every target.

    Raises:
        ValueError: a target that is no kernel [L, in, out] of the blocks.
    """
    lora: dict[str, Any] = {}
    leaves = jax.tree_util.tree_leaves_with_path(blocks)
    kernels = {path_string(path): a for path, a in leaves}
    kernels = {n[: -len("/kernel")].replace("/", "."): a for n, a in kernels.items()
               if n.endswith("/kernel") and a.ndim == 3}  # fmt: skip
    for number, target in enumerate(config.targets):
        if target not in kernels:
            raise ValueError(f"no kernel {target} in a block; there are {', '.join(kernels)}")
        kernel = kernels[target]
        layers, width, out = kernel.shape
        bound = 1 / math.sqrt(width)
        shape, own = (layers, width, config.rank), jax.random.fold_in(key, number)
        a = jax.random.uniform(own, shape, kernel.dtype, minval=-bound, maxval=bound)
        pair = {"A": a, "B": jnp.zeros((layers, config.rank, out), kernel.dtype)}
        lora = _replaced(lora, target, pair)
    return lora


def _at(tree: Params, path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree


def _replaced(tree: Params, path: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with `leaves` put into the mapping at `path`, which is made if it is not there."""
    head, _, rest = path.partition(".")
    inner = tree.get(head, {})
    new = _replaced(inner, rest, leaves) if rest else {**inner, **leaves}
    return {**tree, head: new}
