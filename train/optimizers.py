"""Optimisers and schedules of the published recipes, as optax transformations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .schema import Optim


def make_schedule(optim: Optim, steps: int) -> optax.Schedule:
    """Multiplier of the peak learning rate at update `count` (0-based).

    Linear 0 -> 1 over `warmup` updates (the first update has rate 0), then "cosine", "linear" or
    "sqrt" (1 less the square root of the way) down to `final` over the rest of `decay_steps` (or
    `steps`), constant afterwards; "constant" stays at 1.
    """
    total = optim.decay_steps or steps
    span = max(total - optim.warmup, 1)

    def multiplier(count):
        count = jnp.asarray(count, jnp.float32)
        share = jnp.clip((count - optim.warmup) / span, 0, 1)
        decay = {
            "cosine": optim.final + (1 - optim.final) * 0.5 * (1 + jnp.cos(jnp.pi * share)),
            "linear": 1 - (1 - optim.final) * share,
            "sqrt": 1 - (1 - optim.final) * jnp.sqrt(share),
            "constant": jnp.ones_like(share),
        }[optim.schedule]
        warm = count / max(optim.warmup, 1)
        return jnp.where(count < optim.warmup, warm, decay)

    return multiplier


def average_decay(updates, *, limit: float = 0.999, start: int = 10000, power: float = 2 / 3):
    """Decay of an average of weights that warms up: min(limit, 1 - (1 + s)^-power) with s =
    updates - start, and 0, a copy, for s <= 0.

    Args:
        updates: of the weights before this one, a number or an array.

    Returns:
        float32 of the shape of `updates`. (The recipe of arXiv 2411.12663 averages every 10th.)
    """
    s = jnp.maximum(jnp.asarray(updates, jnp.float32) - start, 0)
    return jnp.minimum(limit, 1 - (1 + s) ** -power)


# Names of stacked layers, whose first axis is the layer.
STACKED = ("layers", "blocks", "context_blocks")
# Decay rates, step sizes and skips of state-space layers are never decayed (Mamba, S4D).
UNDECAYED = frozenset({"A_log", "D", "dt_bias", "log_dt", "log_A_real", "A_imag"})


def decays(path, leaf) -> bool:
    """Weight decay covers every parameter with ndim != 1, counted without the stacked layer
    axis, but for `UNDECAYED`.
    """
    if path and getattr(path[-1], "key", None) in UNDECAYED:
        return False
    stacked = bool(path) and getattr(path[0], "key", None) in STACKED
    return leaf.ndim - stacked != 1


def per_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply `tx` to each layer of the stacked parameters under "layers" as if it stood alone.

    Needed where a transformation takes statistics of whole arrays (Adafactor's parameter scale and
    update clipping): those are of one layer's matrix, not of the stack of all layers.
    """

    def parts(tree):
        rest = {k: v for k, v in tree.items() if k != "layers"}
        return rest, tree.get("layers", {})

    def init(params):
        rest, layers = parts(params)
        return {"rest": tx.init(rest), "layers": jax.vmap(tx.init)(layers) if layers else ()}

    def update(updates, state, params=None):
        rest, layers = parts(updates)
        p_rest, p_layers = parts(params)
        rest, s_rest = tx.update(rest, state["rest"], p_rest)
        s_layers = ()
        if layers:
            layers, s_layers = jax.vmap(tx.update)(layers, state["layers"], p_layers)
            rest = {**rest, "layers": layers}
        return rest, {"rest": s_rest, "layers": s_layers}

    return optax.GradientTransformation(init, update)


KVG = ("k_proj", "v_proj", "g_proj")


def fused_kvg(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply `tx` to the k, v and g kernels of a gated sublayer as one matrix, as the reference
    holds them.

    Needed where a transformation takes statistics of whole matrices (Adafactor), so that the
    published recipes are reproduced exactly.
    """

    def fuse(tree):
        if not isinstance(tree, dict):
            return tree
        if not all(name in tree for name in KVG):
            return {name: fuse(sub) for name, sub in tree.items()}
        kernels = [tree[name]["kernel"] for name in KVG]
        rest = {name: sub for name, sub in tree.items() if name not in KVG}
        return rest | {"kvg_proj": {"kernel": jnp.concatenate(kernels, axis=-1)}}

    def split(tree, like):
        if not isinstance(like, dict):
            return tree
        if not all(name in like for name in KVG):
            return {name: split(tree[name], sub) for name, sub in like.items()}
        ends = np.cumsum([like[name]["kernel"].shape[-1] for name in KVG])[:-1]
        parts = jnp.split(tree["kvg_proj"]["kernel"], ends, axis=-1)
        rest = {name: sub for name, sub in tree.items() if name != "kvg_proj"}
        return rest | {name: {"kernel": part} for name, part in zip(KVG, parts)}

    def update(updates, state, params=None):
        out, state = tx.update(fuse(updates), state, None if params is None else fuse(params))
        return split(out, updates), state

    return optax.GradientTransformation(lambda params: tx.init(fuse(params)), update)


def make_optimizer(optim: Optim, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, the named optimiser at its peak rate, the schedule, weight decay; in
    this order.

    Weight decay adds -weight_decay * p outside the schedule (Transformer-VQ section 8), or inside
    it and scaled by the learning rate with `decay_times_lr` (decoupled AdamW). Moments are float32,
    Lion's bfloat16.
    """
    mask = lambda params: jax.tree_util.tree_map_with_path(decays, params)
    decay = []
    if optim.weight_decay > 0:
        decay = [optax.add_decayed_weights(optim.weight_decay, mask)]
    chain = [optax.clip_by_global_norm(optim.clip)] if optim.clip > 0 else []
    if optim.name == "adamw":
        chain += [optax.scale_by_adam(optim.b1, optim.b2, optim.eps, mu_dtype=jnp.float32)]
    elif optim.name == "lion":
        chain += [optax.scale_by_lion(optim.b1, optim.b2, mu_dtype=jnp.bfloat16)]
    elif optim.name == "adafactor":
        chain += [
            per_layer(
                fused_kvg(
                    optax.chain(
                        optax.scale_by_factored_rms(),
                        optax.clip_by_block_rms(1.0),
                        optax.scale_by_param_block_rms(),
                    )
                )
            )
        ]
    else:
        raise ValueError(f"optim.name={optim.name!r}; choose adamw, lion or adafactor")
    if optim.decay_times_lr:
        chain += decay
    chain += [
        optax.scale(-optim.learning_rate),
        optax.scale_by_schedule(make_schedule(optim, steps)),
    ]
    if decay and not optim.decay_times_lr:
        chain += [optax.add_decayed_weights(-optim.weight_decay, mask)]
    return optax.chain(*chain)
