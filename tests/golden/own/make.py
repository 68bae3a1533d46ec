"""Writes this folder's vectors: `python -m tests.golden.own.make`.

They come from the reference implementation of VQ attention (dense, in float64) and cover what the
runner must cope with: more query than key heads, windows longer and shorter than the block, no
cache, no gradient through it, document masks.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lintime.kernels_pallas.compat import enable_x64
from lintime.kernels_pallas.vq_attention import quantize, vq_attention
from lintime.model.convert.transformer_vq import (
    config_from_reference,
    sublayer_from_main,
    sublayer_from_optimized,
    sublayer_to_main,
    sublayer_to_optimized,
)
from lintime.model.layers.codebook import update_codebook
from lintime.model.nets.transformer_vq import make_mixer

from ..transformer_vq.common import STATE

FOLDER = Path(__file__).parent
NET = dict(
    d_model=8, d_k=4, n_code=5, n_layer=1, n_vocab=11, pe_abs=False, pe_lam=100_000,
    p_dropemb=0.0, p_dropsin=0.0, p_dropres=0.0, p_droplyr=0.0, c_beta=0.01, c_gamma=0.9,
    e_tie=False, e_preln=False, e_scale=1.0, loss_beta=0.3,
)  # fmt: skip


def documents(rng, batch: int, length: int) -> np.ndarray:
    """Non-decreasing document ids from 1."""
    return 1 + np.cumsum(rng.random((batch, length)) < 0.15, axis=1).astype(np.int32)


def state_arrays(prefix: str, state) -> dict:
    """Entries of a state; the position of all rows as one number."""
    arrays = {f"{prefix}/{name}": np.asarray(getattr(state, ours)) for name, ours in STATE.items()}
    return arrays | {f"{prefix}/pos_offset": arrays[f"{prefix}/pos_offset"][0]}


def core(seed, *, heads, kv_heads, length, block_len, mem_len, cache=True, grad=True, masked=False):
    """An attention core and its gradients."""
    rng = np.random.default_rng(seed)
    batch, n_code, d_k, d_v = 1, 5, 4, 3
    normal = lambda *shape: rng.standard_normal(shape)
    q, k = normal(batch, heads, length, d_k), normal(batch, kv_heads, length, d_k)
    v, codebook = normal(batch, kv_heads, length, d_v), normal(kv_heads, n_code, d_k)
    u, w = 0.6 * normal(heads, d_k), 0.6 * normal(heads, d_k)
    rel, cot = 0.6 * normal(kv_heads, mem_len + 1, d_k), normal(batch, length, heads * d_v)
    ids = documents(rng, batch, length)

    def run(q, k, v):
        codes, k_hat, _ = quantize(k, codebook)
        out, state = vq_attention(
            q, k_hat, codes, v, jnp.asarray(codebook), content_bias=u, position_bias=w, rel=rel,
            segment_ids=ids if masked else None, block_len=block_len, use_cache=cache,
            grad_through_cache=grad, mask_segments=masked, implementation="reference",
        )  # fmt: skip
        out = jnp.moveaxis(out, 1, 2).reshape(batch, length, -1)
        return jnp.sum(cot * out), (out, state, codes, k_hat)

    arguments = (jnp.asarray(a) for a in (q, k, v))
    run = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))
    (_, aux), grads = run(*arguments)
    out, state, codes, k_hat = aux
    arrays = dict(
        q=q, v=v, codebook=codebook, shortcodes=codes, k_hat=k_hat, u_scaled=u, v_scaled=w,
        r_table=rel, attn_out=out,
    )  # fmt: skip
    if masked:
        arrays["doc_ids"] = ids
    else:
        arrays |= dict(k=k, cot=cot, grad_q=grads[0], grad_k=grads[1], grad_v=grads[2])
        arrays |= state_arrays("final_state", state)
    config = dict(block_len=block_len, mem_len=mem_len, agg_cache=cache, grad_thru_cache=grad)
    note = "in float64; 2e-5 in float32"
    return config, arrays, {}, {"atol": 1e-9, "rtol": 1e-9, **({} if masked else {"note": note})}


def parameters(rng, config, to) -> dict[str, np.ndarray]:
    """Random, non-zero parameters of a sublayer in a reference layout."""
    mixer = make_mixer(config, jnp.float64)
    shapes = jax.eval_shape(mixer.init, {"params": jax.random.key(0)}, jnp.zeros((1, 4, 8)))
    shapes = jax.eval_shape(to, {name: shapes[name] for name in ("params", "stats")})
    flat = {}
    for name, leaf in shapes.items():
        scale = leaf.shape[0] ** -0.5 if name.endswith("kernel") else 0.6
        values = scale * rng.standard_normal(leaf.shape)
        if name.endswith("/c_count"):
            values = rng.uniform(0.4, 6, leaf.shape)
        flat[name] = (values + name.endswith("ln/g")).astype(np.float32)
    return flat


def sublayer(seed, *, length, blocks, to, back, **fields):
    """A sublayer, its gradients and, on the main branch, its states after each of `blocks`."""
    rng = np.random.default_rng(seed)
    reference = {**NET, **fields}
    config = config_from_reference(reference)
    params = parameters(rng, config, to)
    variables = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), back(params))
    mixer = make_mixer(config, jnp.float64, implementation="reference")
    x = rng.standard_normal((2, length, config.d_model)).astype(np.float32)
    cot = rng.standard_normal(x.shape).astype(np.float32)
    main = "n_head" in fields
    ids = documents(rng, 2, length) if main else np.zeros((2, length), np.int32)
    mask = (np.arange(length) < [[length], [length - 3]]).astype(np.int32)
    options = {"mask": mask, "segment_ids": ids} if main else {}

    def loss(params, x):
        v = {"params": params, "stats": variables["stats"]}
        (y, aux), sown = mixer.apply(v, x, **options, mutable=["intermediates"])
        commit = jnp.mean(aux["commit"])
        return jnp.sum(cot * y) + reference["loss_beta"] * commit, (y, commit, aux, sown)

    wide = jnp.asarray(x, jnp.float64)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (total, aux), (grads, grad_x) = run(variables["params"], wide)
    y, commit, aux, sown = aux
    sown = {name: value[0] for name, value in sown["intermediates"].items()}
    # The optimized branch multiplies its statistics by the number of blocks.
    times = 1 if main else length // config.block_len
    delta = jax.tree.map(lambda d: d * times, aux["stats_delta"])
    update = functools.partial(update_codebook, decay=config.codebook_decay)
    stats = jax.tree.map(jnp.subtract, variables["stats"], update(variables["stats"], delta))
    gradient = to({"params": grads, "stats": stats})
    arrays = {"x": x, "cot": cot, "res": y, "loss": total, "grad_x": grad_x}
    arrays |= {f"gradparam/{name}": value for name, value in gradient.items()}
    if not main:
        arrays["l_commit"] = commit
        return reference, arrays, params, {"atol": 2e-5, "rtol": 2e-4}
    arrays |= {"doc_ids": ids, "loss_mask": mask, "shortcodes": sown["codes"]}
    state = mixer.init_state(2)
    extend = jax.jit(functools.partial(mixer.apply, method="extend"))
    for block in range(length // config.block_len):
        here = slice(block * config.block_len, (block + 1) * config.block_len)
        _, state, aux = extend(
            variables, wide[:, here], state, mask=mask[:, here], segment_ids=ids[:, here]
        )
        if block in blocks:
            arrays |= state_arrays(f"state_after_block{block}", state)
            arrays[f"metric_block{block}_c_entropy"] = aux["metrics"]["c_entropy"]
    return reference, arrays, params, {"atol": 2e-5, "rtol": 2e-4}


def main() -> None:
    """Writes all cases and the manifest."""
    of_main = functools.partial(sublayer, to=sublayer_to_main, back=sublayer_from_main, d_ff=0)
    of_optimized = functools.partial(
        sublayer, to=sublayer_to_optimized, back=sublayer_from_optimized, blocks=()
    )
    cases = {
        "dense_equiv_own_heads": core(
            1, heads=4, kv_heads=2, length=17, block_len=5, mem_len=3
        ),
        "dense_equiv_own_window": core(
            2, heads=2, kv_heads=2, length=13, block_len=4, mem_len=6, cache=False, grad=False
        ),
        "docmask_own": core(
            3, heads=2, kv_heads=1, length=19, block_len=4, mem_len=5, masked=True
        ),
        "attn_own_M7L3": of_main(
            4, length=15, blocks=(0, 3), block_len=3, mem_len=7, n_head=2, d_v=3, agg_cache=True,
            grad_thru_cache=True, n_block=5,
        ),
        "attn_own_nograd": of_main(
            5, length=12, blocks=(2,), block_len=4, mem_len=2, n_head=1, d_v=6, agg_cache=True,
            grad_thru_cache=False, n_block=3,
        ),
        "opt_attn_own_mqa": of_optimized(
            6, length=12, block_len=3, head_type="mqa", attn_type="vq", reduction_type="matmul",
        ),
    }  # fmt: skip
    entries = {}
    for name, (config, arrays, params, tolerance) in cases.items():
        arrays = {k: np.asarray(a) for k, a in arrays.items()}
        if params:  # the sublayers are compared in float32
            narrow = lambda a: a.astype(np.float32) if a.dtype == np.float64 else a
            arrays = {k: narrow(a) for k, a in arrays.items()}
            save_file(params, FOLDER / f"{name}.safetensors")
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays)
        describe = lambda a: {"shape": list(a.shape), "dtype": str(a.dtype)}
        entries[name] = {
            "config": config,
            "tolerance": tolerance,
            "data_file": f"{name}.npz",
            "params_file": f"{name}.safetensors" if params else None,
            "arrays": {k: describe(a) for k, a in arrays.items()},
        }
    content = {
        "system": "Transformer-VQ",
        "generated_with": "tests/golden/own/make.py: the dense reference implementation in float64",
        "cases": entries,
    }
    text = json.dumps(content, separators=(",", ":"))
    (FOLDER / "manifest.json").write_text(text.replace('},"', '},\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    with enable_x64(), jax.default_matmul_precision("highest"):
        main()
