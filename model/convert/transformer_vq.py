"""Parameter layouts of the public Transformer-VQ code (arXiv 2309.16354), in both directions.

Two layouts exist. "main" is the gated, block-recurrent model of the paper; "optimized" adds head
types, the quadratic baseline and layers stacked on two leading axes [n_layer, 1]. Both hold the
codebooks among the parameters; here they are the collection "stats". Names are joined by "/",
arrays are numpy or jax; all functions also run under `jax.eval_shape`, which gives the names and
shapes of a layout without memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax

from .names import (
    Flat,
    array_module,
    below,
    check_names,
    check_shapes,
    flatten,
    nest,
    shape_of,
)
from .transformer_vq_config import (
    MAIN_FIXED,
    OPTIMIZED_FIXED,
    config_from_reference,
    config_to_reference,
)

Variables = dict[str, Any]

# ours -> theirs, within one attention sublayer; main keeps k, v and g in one matrix.
_OPTIMIZED = {
    "q_proj/kernel": "qkvg_producer/q_proj/kernel",
    "k_proj/kernel": "qkvg_producer/k_proj/kernel",
    "v_proj/kernel": "qkvg_producer/v_proj/kernel",
    "g_proj/kernel": "qkvg_producer/g_proj/kernel",
    "r_proj/kernel": "xl_bias_producer/xl_r_proj/kernel",
    "res_proj/kernel": "res_proj/kernel",
    "u": "xl_bias_producer/xl_u",
    "v": "xl_bias_producer/xl_v",
}
_MAIN = {
    "input_ln/g": "input_ln/g",
    "input_ln/b": "input_ln/b",
    "q_proj/kernel": "q_proj/kernel",
    "r_proj/kernel": "r_proj/kernel",
    "res_proj/kernel": "res_proj/kernel",
    "u": "u",
    "v": "v",
}
_QUANTIZER = {"c_sum": "quantizer/c_sum", "c_count": "quantizer/c_count"}
_MLP = {"up/kernel": "Dense_0/kernel", "down/kernel": "Dense_1/kernel"}
_OLD_PREFIX = re.compile(r"^stack/ScannedAttnOld_([01])/ScanVQAttentionOld_0/")


# ---------------------------------------------------------------- layouts


def detect_layout(flat: Flat) -> str:
    """Which layout the names belong to: "main" or "optimized".

    Raises:
        ValueError: neither.
    """
    if "token_embedder/embs" in flat or any(n.startswith("transformer_layers_") for n in flat):
        return "main"
    if any(n.startswith("stack/") for n in flat):
        return "optimized"
    some = ", ".join(sorted(flat)[:4])
    raise ValueError(
        f"not a Transformer-VQ checkpoint: no transformer_layers_<i>/ (main) and no stack/ "
        f"(optimized) among its {len(flat)} names ({some} ...)"
    )


def infer_config(flat: Flat) -> dict[str, Any]:
    """Fields of `TransformerVQConfig` that the names and shapes of a whole checkpoint determine.

    What they cannot tell: block_len, mem_len, logit_scale, pe_lam and the rates; for the optimized
    layout also out_norm (its norms hold no parameters) and d_k of a quadratic mha checkpoint.
    """
    flat = _renamed(flat)
    if detect_layout(flat) == "main":
        first = below(flat, "transformer_layers_0/scanned_attn1/")
        heads, n_code, d_k = shape_of(first, "quantizer/c_sum", 3)
        vocab, d_model = shape_of(flat, "token_embedder/embs", 2)
        return MAIN_FIXED | {
            "vocab_size": vocab,
            "d_model": d_model,
            "n_layer": len(_main_layers(flat)),
            "n_head": heads,
            "d_k": d_k,
            "d_v": shape_of(first, "res_proj/kernel", 2)[0] // heads,
            "n_code": n_code,
            "pe_abs": "position_embedder/scale" in flat,
            "tie_embeddings": _tied(flat),
            "out_norm": "out_ln/g" in flat,
        }
    kind = _attention_class(flat)
    first = below(flat, f"stack/{kind}_0/")
    n_layer, _, d_model, k_width = shape_of(first, "qkvg_producer/k_proj/kernel", 4)
    fields = OPTIMIZED_FIXED | {
        "vocab_size": shape_of(flat, "token_embed/embedding", 2)[0],
        "d_model": d_model,
        "n_layer": n_layer,
        "attention": "vq" if kind == "VQAttention" else "dense",
        "pe_abs": "pos_embed/scale" in flat,
        "tie_embeddings": _tied(flat),
        "head_type": "shga",
        "d_k": k_width,
    }
    if below(flat, "stack/MultiLayerPerceptron_0/"):
        fields["head_type"] = "mha" if k_width == d_model else "mqa"
        if k_width == d_model:
            del fields["d_k"]  # heads of any width, unless a codebook tells
    if kind == "VQAttention":
        fields["n_code"], fields["d_k"] = shape_of(first, "quantizer/c_sum", 5)[3:]
        if fields["d_k"] == k_width == d_model:  # one head: mqa and mha differ in the MLP
            hidden = shape_of(flat, "stack/MultiLayerPerceptron_0/Dense_0/kernel", 4)[-1]
            fields["head_type"] = "mqa" if hidden == 5 * d_model else "mha"
    return fields


# ---------------------------------------------------------------- sublayers


def sublayer_from_main(flat: Flat) -> Variables:
    """Variables of `VQAttention` from one sublayer of the main layout.

    Args:
        flat: input_ln/{g,b} [D], q_proj/kernel [D, H*K], kvg_proj/kernel [D, H*K + 2*H*V] (k, v, g
            in this order), r_proj/kernel [D, H*K], res_proj/kernel [H*V, D], u and v [H*K],
            quantizer/c_sum [H, S, K], quantizer/c_count [H, S].

    Returns:
        {"params", "stats"}.

    Raises:
        ValueError: names every unknown or missing array and every wrong shape.
    """
    heads, n_code, d_k = shape_of(flat, "quantizer/c_sum", 3)
    value_width, d_model = shape_of(flat, "res_proj/kernel", 2)
    keys = heads * d_k
    expected = {
        "input_ln/g": (d_model,), "input_ln/b": (d_model,), "q_proj/kernel": (d_model, keys),
        "kvg_proj/kernel": (d_model, keys + 2 * value_width), "r_proj/kernel": (d_model, keys),
        "res_proj/kernel": (value_width, d_model), "u": (keys,), "v": (keys,),
        "quantizer/c_sum": (heads, n_code, d_k), "quantizer/c_count": (heads, n_code),
    }  # fmt: skip
    check_shapes(flat, expected)
    params = {ours: flat[theirs] for ours, theirs in _MAIN.items()}
    kvg = flat["kvg_proj/kernel"]
    params["k_proj/kernel"] = kvg[:, :keys]
    params["v_proj/kernel"] = kvg[:, keys : keys + value_width]
    params["g_proj/kernel"] = kvg[:, keys + value_width :]
    return {"params": nest(params), "stats": {n: flat[t] for n, t in _QUANTIZER.items()}}


def sublayer_to_main(variables: Variables) -> dict[str, Any]:
    """Inverse of `sublayer_from_main`.

    Raises:
        ValueError: the sublayer is not gated, has no gain and bias in its norm, or has no codebook.
    """
    params, stats = flatten(variables["params"]), variables.get("stats", {})
    reasons = {
        "g_proj/kernel" in params: "head_type=shga (gated attention)",
        "input_ln/g" in params: "norm_affine=True",
        "c_sum" in stats: "attention=vq (a codebook)",
    }
    if False in reasons:
        raise ValueError(f"the main layout cannot hold this model: it needs {reasons[False]}")
    expected = [*_MAIN, "k_proj/kernel", "v_proj/kernel", "g_proj/kernel"]
    check_names(params, expected)
    flat = {theirs: params[ours] for ours, theirs in _MAIN.items()}
    parts = [params[f"{name}_proj/kernel"] for name in "kvg"]
    flat["kvg_proj/kernel"] = array_module(parts).concatenate(parts, axis=-1)
    return flat | {theirs: stats[ours] for ours, theirs in _QUANTIZER.items()}


def sublayer_from_optimized(flat: Flat) -> Variables:
    """Variables of `VQAttention` from one sublayer of the optimized layout, VQ or quadratic.

    Args:
        flat: qkvg_producer/{q,k,v}_proj/kernel and, if gated, g_proj; res_proj/kernel;
            xl_bias_producer/{xl_r_proj/kernel,xl_u,xl_v}; with a codebook quantizer/c_sum
            [h, S, K] and quantizer/c_count [h, S].

    Returns:
        {"params", "stats"}; stats is empty for the quadratic kind.

    Raises:
        ValueError: names every unknown or missing array and every wrong shape.
    """
    d_model, queries = shape_of(flat, "qkvg_producer/q_proj/kernel", 2)
    keys = shape_of(flat, "qkvg_producer/k_proj/kernel", 2)[1]
    gated = _OPTIMIZED["g_proj/kernel"] in flat
    # One gated head has values of any width; plain heads have values as wide as keys.
    values = shape_of(flat, "qkvg_producer/v_proj/kernel", 2)[1] if gated else keys
    expected = {
        "q_proj/kernel": (d_model, keys if gated else queries),
        "k_proj/kernel": (d_model, keys),
        "v_proj/kernel": (d_model, values),
        "r_proj/kernel": (d_model, keys),
        "res_proj/kernel": (values if gated else queries, d_model),
        "u": (queries,),
        "v": (queries,),
    }
    if gated:
        expected["g_proj/kernel"] = (d_model, values)
    expected = {_OPTIMIZED[ours]: shape for ours, shape in expected.items()}
    quantizer = any(name.startswith("quantizer/") for name in flat)
    if quantizer:
        heads, n_code, d_k = shape_of(flat, "quantizer/c_sum", 3)
        expected["quantizer/c_sum"] = (heads, n_code, keys // heads)
        expected["quantizer/c_count"] = (heads, n_code)
    check_shapes(flat, expected)
    params = {ours: flat[theirs] for ours, theirs in _OPTIMIZED.items() if theirs in flat}
    stats = {n: flat[t] for n, t in _QUANTIZER.items()} if quantizer else {}
    return {"params": nest(params), "stats": stats}


def sublayer_to_optimized(variables: Variables) -> dict[str, Any]:
    """Inverse of `sublayer_from_optimized`.

    Raises:
        ValueError: the sublayer has gain and bias in its norm.
    """
    params, stats = flatten(variables["params"]), variables.get("stats", {})
    if "input_ln/g" in params:
        raise ValueError("the optimized layout cannot hold this model: it needs norm_affine=False")
    gated = "g_proj/kernel" in params
    check_names(params, [n for n in _OPTIMIZED if gated or n != "g_proj/kernel"])
    flat = {_OPTIMIZED[ours]: a for ours, a in params.items()}
    return flat | {_QUANTIZER[name]: a for name, a in stats.items()}


# ---------------------------------------------------------------- whole models


def from_reference_main(flat: Flat) -> Variables:
    """{"params", "stats"} of `TransformerVQ` from a whole checkpoint of the main layout.

    Layers are stacked on axis 0. `token_embedder/bias_out` becomes `out_bias` of a tied head; an
    untied model never reads it and it is dropped. A linear map: gradients convert the same way.

    Raises:
        ValueError: names every unknown or missing array and every wrong shape.
    """
    flat = dict(flat)
    vocab, d_model = shape_of(flat, "token_embedder/embs", 2)
    tied = _tied(flat)
    expected = {"token_embedder/embs": (vocab, d_model), "token_embedder/bias_out": (vocab,)}
    if not tied:
        expected |= {"out_proj/kernel": (d_model, vocab), "out_proj/bias": (vocab,)}
    if any(name.startswith("out_ln/") for name in flat):
        expected |= {"out_ln/g": (d_model,), "out_ln/b": (d_model,)}
    if "position_embedder/scale" in flat:
        expected["position_embedder/scale"] = ()
    layers = _main_layers(flat)
    if layers != list(range(len(layers))) or not layers:
        raise ValueError(f"transformer_layers_<i>: found i = {layers}, expected 0..n_layer-1")
    sublayers = tuple(f"transformer_layers_{i}/scanned_attn{j}/" for i in layers for j in (1, 2))
    check_shapes({n: a for n, a in flat.items() if not n.startswith(sublayers)}, expected)
    params = {"embedding": flat["token_embedder/embs"], "layers": {}}
    stats = {}
    for name in ("attn1", "attn2"):
        loaded = []
        for i in layers:
            prefix = f"transformer_layers_{i}/scanned_{name}/"
            loaded.append(_with_prefix(prefix, sublayer_from_main, below(flat, prefix)))
        try:
            stacked = jax.tree.map(lambda *xs: array_module(xs).stack(xs), *loaded)
        except ValueError as error:
            raise ValueError(f"the layers of {name} differ in shape: {error}") from None
        params["layers"][name], stats[name] = stacked["params"], stacked["stats"]
    if "position_embedder/scale" in flat:
        params["pe_scale"] = flat["position_embedder/scale"]
    if "out_ln/g" in flat:
        params["out_ln"] = {"g": flat["out_ln/g"], "b": flat["out_ln/b"]}
    if tied:
        params["out_bias"] = flat["token_embedder/bias_out"]
    else:
        params["out_proj"] = {"kernel": flat["out_proj/kernel"], "bias": flat["out_proj/bias"]}
    return {"params": params, "stats": {"layers": stats}}


def to_reference_main(variables: Variables) -> dict[str, Any]:
    """Inverse of `from_reference_main`; the unused `bias_out` of an untied head is zero.

    Raises:
        ValueError: the main layout cannot hold the model, and what it would need.
    """
    params = variables["params"]
    stats = variables.get("stats", {}).get("layers", {})
    if "attn1" not in params["layers"]:
        raise ValueError("the main layout cannot hold this model: it needs head_type=shga")
    embedding = params["embedding"]
    flat = {"token_embedder/embs": embedding}
    if "pe_scale" in params:
        flat["position_embedder/scale"] = params["pe_scale"]
    n_layer = params["layers"]["attn1"]["u"].shape[0]
    for i in range(n_layer):
        for name in ("attn1", "attn2"):
            sublayer = {"params": params["layers"][name], "stats": stats.get(name, {})}
            one = sublayer_to_main(jax.tree.map(lambda a, i=i: a[i], sublayer))
            flat |= {f"transformer_layers_{i}/scanned_{name}/{n}": a for n, a in one.items()}
    flat |= {f"out_ln/{n}": a for n, a in params.get("out_ln", {}).items()}
    flat |= {f"out_proj/{n}": a for n, a in params.get("out_proj", {}).items()}
    no_bias = array_module([embedding]).zeros(embedding.shape[:1], embedding.dtype)
    flat["token_embedder/bias_out"] = params.get("out_bias", no_bias)
    return flat


def from_reference_optimized(flat: Flat) -> Variables:
    """{"params", "stats"} of `TransformerVQ` from a whole checkpoint of the optimized layout.

    Leaves under `stack` are [n_layer, 1, ...]; the older names with
    stack/ScannedAttnOld_{0,1}/ScanVQAttentionOld_0/ in front are taken too. "stats" is {} for the
    quadratic kind.

    Raises:
        ValueError: names every unknown or missing array and every wrong shape.
    """
    flat = _renamed(flat)
    vocab, d_model = shape_of(flat, "token_embed/embedding", 2)
    tied = _tied(flat)
    kind = _attention_class(flat)
    mlp = below(flat, "stack/MultiLayerPerceptron_0/")
    names = {f"stack/{kind}_0/": "attn1", f"stack/{kind}_1/": "attn2"}
    if mlp:
        names = {f"stack/{kind}_0/": "attn"}
    expected = {"token_embed/embedding": (vocab, d_model)}
    if not tied:
        expected |= {"out_proj/kernel": (d_model, vocab), "out_proj/bias": (vocab,)}
    if "pos_embed/scale" in flat:
        expected["pos_embed/scale"] = ()
    n_layer = shape_of(flat, f"stack/{kind}_0/res_proj/kernel", 4)[0]
    if mlp:
        hidden = shape_of(mlp, "Dense_0/kernel", 4)[-1]
        expected["stack/MultiLayerPerceptron_0/Dense_0/kernel"] = (n_layer, 1, d_model, hidden)
        expected["stack/MultiLayerPerceptron_0/Dense_1/kernel"] = (n_layer, 1, hidden, d_model)
    check_shapes({n: a for n, a in flat.items() if not n.startswith(tuple(names))}, expected)
    params, stats = {"embedding": flat["token_embed/embedding"], "layers": {}}, {}
    for prefix, name in names.items():
        stacked = below(flat, prefix)
        wrong = [f"{prefix}{n}" for n, a in stacked.items() if a.shape[:2] != (n_layer, 1)]
        if wrong:
            raise ValueError(f"leading axes are not [{n_layer}, 1] in {', '.join(sorted(wrong))}")
        one_layer = jax.eval_shape(lambda t: {n: a[0, 0] for n, a in t.items()}, stacked)
        _with_prefix(prefix, sublayer_from_optimized, one_layer)  # names and shapes
        sublayer = {ours: theirs for ours, theirs in _OPTIMIZED.items() if theirs in stacked}
        params["layers"][name] = nest({ours: stacked[t][:, 0] for ours, t in sublayer.items()})
        if kind == "VQAttention":
            stats[name] = {ours: stacked[t][:, 0] for ours, t in _QUANTIZER.items()}
    if mlp:
        params["layers"]["mlp"] = nest({n: mlp[t][:, 0] for n, t in _MLP.items()})
    if "pos_embed/scale" in flat:
        params["pe_scale"] = flat["pos_embed/scale"]
    if not tied:
        params["out_proj"] = {"kernel": flat["out_proj/kernel"], "bias": flat["out_proj/bias"]}
    return {"params": params, "stats": {"layers": stats} if stats else {}}


def to_reference_optimized(variables: Variables) -> dict[str, Any]:
    """Inverse of `from_reference_optimized`.

    Raises:
        ValueError: the optimized layout cannot hold the model, and what it would need.
    """
    params = variables["params"]
    stats = variables.get("stats", {}).get("layers", {})
    for name, need in (("out_bias", "tied_bias=False"), ("out_ln", "norm_affine=False")):
        if name in params:
            raise ValueError(f"the optimized layout cannot hold this model: it needs {need}")
    flat = {"token_embed/embedding": params["embedding"]}
    if "pe_scale" in params:
        flat["pos_embed/scale"] = params["pe_scale"]
    flat |= {f"out_proj/{n}": a for n, a in params.get("out_proj", {}).items()}
    kind = "VQAttention" if stats else "FullAttention"
    for name, sublayer in params["layers"].items():
        if name == "mlp":
            mlp = flatten(sublayer)
            one = {theirs: mlp[ours] for ours, theirs in _MLP.items()}
            prefix = "MultiLayerPerceptron_0"
        else:
            one = sublayer_to_optimized({"params": sublayer, "stats": stats.get(name, {})})
            prefix = f"{kind}_{int(name[-1]) - 1 if name[-1].isdigit() else 0}"
        flat |= {f"stack/{prefix}/{n}": a[:, None] for n, a in one.items()}
    return flat


# ---------------------------------------------------------------- helpers


def parameter_count(variables: Variables, layout: str) -> int:
    """Values in a reference checkpoint of the (possibly abstract) model, codebooks included."""
    to = {"main": to_reference_main, "optimized": to_reference_optimized}[layout]
    return sum(math.prod(a.shape) for a in jax.tree.leaves(jax.eval_shape(to, variables)))


def _renamed(flat: Flat) -> dict[str, Any]:
    return {_OLD_PREFIX.sub(r"stack/VQAttention_\1/", name): a for name, a in flat.items()}


def _tied(flat: Flat) -> bool:
    return not any(name.startswith("out_proj/") for name in flat)


def _attention_class(flat: Flat) -> str:
    full = any(name.startswith("stack/FullAttention") for name in flat)
    return "FullAttention" if full else "VQAttention"


def _main_layers(flat: Flat) -> list[int]:
    found = (re.match(r"transformer_layers_(\d+)/", name) for name in flat)
    return sorted({int(m.group(1)) for m in found if m})


def _with_prefix(prefix: str, convert: Callable[[Flat], Variables], flat: Flat) -> Variables:
    try:
        return convert(flat)
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from None


__all__ = [
    "config_from_reference",
    "config_to_reference",
    "detect_layout",
    "from_reference_main",
    "from_reference_optimized",
    "infer_config",
    "parameter_count",
    "sublayer_from_main",
    "sublayer_from_optimized",
    "sublayer_to_main",
    "sublayer_to_optimized",
    "to_reference_main",
    "to_reference_optimized",
]
