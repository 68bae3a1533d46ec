"""Hyperparameters of the public Transformer-VQ code as `TransformerVQConfig`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..nets.transformer_vq import TransformerVQConfig, head_geometry

_SHARED_FIELDS = {
    "n_vocab": "vocab_size", "d_model": "d_model", "n_layer": "n_layer", "d_k": "d_k",
    "n_code": "n_code", "block_len": "block_len", "pe_abs": "pe_abs", "pe_lam": "pe_lam",
    "p_dropsin": "dropout_sin", "p_dropres": "dropout_res", "p_droplyr": "dropout_layer",
    "c_beta": "commit_weight", "c_gamma": "codebook_decay", "e_tie": "tie_embeddings",
    "e_preln": "out_norm", "e_scale": "logit_scale",
}  # fmt: skip
_MAIN_FIELDS = _SHARED_FIELDS | {
    "d_v": "d_v", "n_head": "n_head", "mem_len": "mem_len", "agg_cache": "cache",
    "grad_thru_cache": "grad_through_cache", "p_dropemb": "dropout_emb",
}  # fmt: skip
_CHOICES = {  # of the optimized branch: their name -> our name, {their value: our value}
    "head_type": ("head_type", {"shga": "shga", "mqa": "mqa", "mha": "mha"}),
    "attn_type": ("attention", {"vq": "vq", "vq_old": "vq", "full": "dense"}),
    "reduction_type": ("reduction", {
        "serial": "serial", "matmul": "matmul", "assoc_scan": "associative", "sum": "associative",
    }),
}  # fmt: skip

# What each branch always is.
MAIN_FIXED = {
    "head_type": "shga", "attention": "vq", "norm_affine": True, "scale_on": "logits",
    "tied_bias": True,
}  # fmt: skip
OPTIMIZED_FIXED = {
    "n_head": 1, "d_v": 0, "norm_affine": False, "scale_on": "features", "tied_bias": False,
}  # fmt: skip


def config_from_reference(cfg: Mapping[str, Any], **overrides: Any) -> TransformerVQConfig:
    """The config that computes what the reference computes with its hyperparameters `cfg`.

    Args:
        cfg: the reference's names. With a `head_type` it is the optimized branch, whose window is
            one block (mem_len = block_len); without, the main branch. 0 and 1 may stand for
            booleans. Names that do not describe the net (batch size, optimiser ...) are ignored.
        overrides: fields of `TransformerVQConfig`, applied last; they also stand in for missing
            names.

    Raises:
        ValueError: names every missing hyperparameter, a value that is no number, or an unknown
            choice.
    """
    optimized = "head_type" in cfg
    names = _SHARED_FIELDS if optimized else _MAIN_FIELDS
    missing = sorted(n for n, ours in names.items() if n not in cfg and ours not in overrides)
    if missing:
        raise ValueError(f"the reference config lacks {', '.join(missing)}; add them")
    fields = {}
    for name, ours in names.items():
        if name in cfg:
            if not isinstance(cfg[name], bool | int | float):
                raise ValueError(f"{name}={cfg[name]!r} in the reference config is not a number")
            kind = type(getattr(TransformerVQConfig, ours))
            fields[ours] = kind(cfg[name])
    if optimized:
        fields |= OPTIMIZED_FIXED
        for name, (ours, known) in _CHOICES.items():
            value = cfg.get(name, next(iter(known)))
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
            fields[ours] = known[value]
        if "block_len" in cfg:
            fields["mem_len"] = fields["block_len"]
    else:
        fields |= MAIN_FIXED
    return TransformerVQConfig(**(fields | overrides))


def config_to_reference(config: TransformerVQConfig, layout: str) -> dict[str, Any]:
    """Hyperparameters with which the reference computes what `config` computes.

    Args:
        config: of the model.
        layout: "main" or "optimized", the reference's branch.

    Raises:
        ValueError: names every field whose value that branch cannot express.
    """
    c = config
    scale_moves = c.logit_scale != 1 and (not c.tie_embeddings or c.tied_bias)
    scale_fits = lambda on: c.scale_on == on or not scale_moves
    if layout == "main":
        needs = {
            "head_type=shga": c.head_type == "shga",
            "attention=vq": c.attention == "vq",
            "norm_affine=True": c.norm_affine,
            "scale_on=logits": scale_fits("logits"),
            "mem_len >= 1": c.mem_len >= 1,
        }
    else:
        geometry = head_geometry(c)
        plain = c.n_head == 1 and geometry["value_dim"] == 2 * c.d_model
        needs = {
            "attention=vq or dense": c.attention in ("vq", "dense"),
            "norm_affine=False": not c.norm_affine,
            "scale_on=features": scale_fits("features"),
            "tied_bias=False": not (c.tie_embeddings and c.tied_bias),
            "n_head=1 and d_v=2*d_model": c.head_type != "shga" or plain,
            "mem_len=block_len": c.attention != "vq" or c.mem_len == c.block_len,
            "cache=True": c.attention != "vq" or c.cache,
        }
    needs["mask_documents=False"] = not c.mask_documents
    unmet = [need for need, met in needs.items() if not met]
    if unmet:
        raise ValueError(f"the {layout} layout needs {', '.join(unmet)}")
    names = _MAIN_FIELDS if layout == "main" else _SHARED_FIELDS
    cfg = {name: getattr(c, ours) for name, ours in names.items()}
    if layout == "main":
        cfg["d_v"] = head_geometry(c)["value_dim"]
    else:
        for name, (ours, known) in _CHOICES.items():
            cfg[name] = next(theirs for theirs, value in known.items() if value == getattr(c, ours))
    return cfg
