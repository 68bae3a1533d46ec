"""What the conversion tests share: published names and shapes, random arrays, the command."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from lintime.model.convert.names import flatten
from lintime.model.nets.transformer_vq import TransformerVQ
from lintime.train.checkpoint import restore_inference
from lintime.train.config_files import read_config
from lintime.train.convert import command as command
from lintime.train.tasks.table import make_task

MAIN = {
    "dtype": "float32", "block_len": 4, "mem_len": 6, "agg_cache": 1, "grad_thru_cache": 0,
    "d_model": 8, "d_k": 4, "d_v": 6, "n_head": 2, "n_code": 5, "n_layer": 3, "n_vocab": 259,
    "pe_abs": 1, "pe_lam": 100000, "p_dropemb": 0.0, "p_dropsin": 0.2, "p_dropres": 0.5,
    "p_droplyr": 0.3, "p_nucleus": 0.9, "c_beta": 1e-4, "c_gamma": 0.99, "e_tie": 1, "e_preln": 1,
    "e_scale": 0.5, "sequence_len": 64, "update_len": 16, "global_batch_size": 2,
}  # fmt: skip
OPTIMIZED = {
    "head_type": "shga", "attn_type": "vq", "reduction_type": "matmul", "block_len": 4,
    "d_model": 8, "d_k": 4, "n_code": 5, "n_layer": 2, "n_vocab": 259, "pe_abs": False,
    "pe_lam": 100000, "p_dropsin": 0.0, "p_dropres": 0.0, "p_droplyr": 0.0, "c_beta": 1e-4,
    "c_gamma": 0.99, "e_tie": False, "e_preln": True, "e_scale": 1.0,
}  # fmt: skip


def main_shapes(c) -> dict:
    """Names and shapes of the main layout, as published."""
    d, keys, values = c["d_model"], c["n_head"] * c["d_k"], c["n_head"] * c["d_v"]
    sublayer = {
        "input_ln/g": (d,), "input_ln/b": (d,), "q_proj/kernel": (d, keys),
        "kvg_proj/kernel": (d, keys + 2 * values), "r_proj/kernel": (d, keys),
        "res_proj/kernel": (values, d), "u": (keys,), "v": (keys,),
        "quantizer/c_sum": (c["n_head"], c["n_code"], c["d_k"]),
        "quantizer/c_count": (c["n_head"], c["n_code"]),
    }  # fmt: skip
    shapes = {
        "token_embedder/embs": (c["n_vocab"], d),
        "token_embedder/bias_out": (c["n_vocab"],),
    }
    for i in range(c["n_layer"]):
        for j in (1, 2):
            shapes |= {
                f"transformer_layers_{i}/scanned_attn{j}/{n}": s for n, s in sublayer.items()
            }
    if c["pe_abs"]:
        shapes["position_embedder/scale"] = ()
    if c["e_preln"]:
        shapes |= {"out_ln/g": (d,), "out_ln/b": (d,)}
    if not c["e_tie"]:
        shapes |= {"out_proj/kernel": (d, c["n_vocab"]), "out_proj/bias": (c["n_vocab"],)}
    return shapes


def optimized_shapes(c, prefix="stack/{}_{}/") -> dict:
    """Names and shapes of the optimized layout, as published."""
    d, k, head = c["d_model"], c["d_k"], c["head_type"]
    heads, kv = {"shga": (1, 1), "mqa": (d // k, 1), "mha": (d // k, d // k)}[head]
    value, mixed = (2 * d, 2 * d) if head == "shga" else (kv * k, d)
    sublayer = {
        "qkvg_producer/q_proj/kernel": (d, heads * k), "qkvg_producer/k_proj/kernel": (d, kv * k),
        "qkvg_producer/v_proj/kernel": (d, value), "res_proj/kernel": (mixed, d),
        "xl_bias_producer/xl_r_proj/kernel": (d, kv * k), "xl_bias_producer/xl_u": (heads * k,),
        "xl_bias_producer/xl_v": (heads * k,),
    }  # fmt: skip
    if head == "shga":
        sublayer["qkvg_producer/g_proj/kernel"] = (d, 2 * d)
    if c["attn_type"] != "full":
        sublayer["quantizer/c_sum"] = (kv, c["n_code"], k)
        sublayer["quantizer/c_count"] = (kv, c["n_code"])
    name = "FullAttention" if c["attn_type"] == "full" else "VQAttention"
    shapes = {"token_embed/embedding": (c["n_vocab"], d)}
    lead = (c["n_layer"], 1)
    for i in range(2 if head == "shga" else 1):
        shapes |= {prefix.format(name, i) + n: lead + s for n, s in sublayer.items()}
    if head != "shga":
        hidden = {"mqa": 5, "mha": 4}[head] * d
        shapes["stack/MultiLayerPerceptron_0/Dense_0/kernel"] = (*lead, d, hidden)
        shapes["stack/MultiLayerPerceptron_0/Dense_1/kernel"] = (*lead, hidden, d)
    if c["pe_abs"]:
        shapes["pos_embed/scale"] = ()
    if not c["e_tie"]:
        shapes |= {"out_proj/kernel": (d, c["n_vocab"]), "out_proj/bias": (c["n_vocab"],)}
    return shapes


def random_arrays(shapes, seed=0):
    rng = np.random.default_rng(seed)
    positive = lambda n, s: rng.uniform(0.5, 2, s) if n.endswith("c_count") else rng.normal(size=s)
    return {n: np.asarray(positive(n, s), np.float32) for n, s in shapes.items()}


def abstract_variables(config):
    net = TransformerVQ(config)
    tokens = jnp.zeros((1, 4), jnp.int32)
    v = jax.eval_shape(lambda: net.init({"params": jax.random.key(0)}, tokens))
    return {"params": v["params"], "stats": v.get("stats", {})}


def shapes_of(tree):
    return {name: tuple(a.shape) for name, a in flatten(tree).items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def restored(run_dir):
    run = read_config(run_dir / "config.json")
    abstract = jax.eval_shape(make_task(run).init, jax.random.key(0))
    return run, restore_inference(run_dir, abstract)


def cli(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run_command(parser.parse_args([str(a) for a in arguments]))
