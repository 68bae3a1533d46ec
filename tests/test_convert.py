"""Layouts and hyperparameters of the public Transformer-VQ code, in both directions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.convert import transformer_vq as layouts
from lintime.model.convert.names import flatten
from lintime.model.nets.transformer_vq import TransformerVQConfig, make_mixer
from lintime.train.convert.transformer_vq import FROM
from tests.conversion import (
    MAIN,
    OPTIMIZED,
    abstract_variables,
    assert_same,
    main_shapes,
    optimized_shapes,
    random_arrays,
    shapes_of,
)


@pytest.mark.parametrize("change", [{}, {"e_tie": 0, "e_preln": 0, "pe_abs": 0}, {"n_head": 1}])
def test_main_layout_both_ways(change):
    cfg = MAIN | change
    flat = random_arrays(main_shapes(cfg))
    config = layouts.config_from_reference(cfg)
    variables = layouts.from_reference_main(flat)
    assert shapes_of(variables) == shapes_of(abstract_variables(config))
    back = layouts.to_reference_main(variables)
    if not cfg["e_tie"]:  # the reference's net never reads it
        assert not back["token_embedder/bias_out"].any()
        flat["token_embedder/bias_out"] = back["token_embedder/bias_out"]
    assert_same(back, flat)
    inferred = layouts.infer_config(flat)
    assert {n: getattr(config, n) for n in inferred} == inferred
    assert layouts.detect_layout(flat) == "main"
    sublayer = variables["params"]["layers"]["attn2"]
    fused = flat["transformer_layers_1/scanned_attn2/kvg_proj/kernel"]
    keys, values = cfg["n_head"] * cfg["d_k"], cfg["n_head"] * cfg["d_v"]
    for name, part in zip("kvg", np.split(fused, [keys, keys + values], axis=1)):
        np.testing.assert_array_equal(sublayer[f"{name}_proj"]["kernel"][1], part)


@pytest.mark.parametrize("head", ["shga", "mqa", "mha"])
@pytest.mark.parametrize("kind", ["vq", "full"])
def test_optimized_layout_both_ways(head, kind):
    tied = head == "shga"
    cfg = OPTIMIZED | {"head_type": head, "attn_type": kind, "e_tie": tied, "pe_abs": tied}
    flat = random_arrays(optimized_shapes(cfg))
    config = layouts.config_from_reference(cfg)
    variables = layouts.from_reference_optimized(flat)
    assert shapes_of(variables) == shapes_of(abstract_variables(config))
    assert_same(layouts.to_reference_optimized(variables), flat)
    inferred = layouts.infer_config(flat)
    assert {n: getattr(config, n) for n in inferred} == inferred
    assert ("d_k" in inferred) == ((head, kind) != ("mha", "full"))
    assert layouts.detect_layout(flat) == "optimized"


def test_older_names_of_the_optimized_layout():
    old = optimized_shapes(OPTIMIZED, "stack/ScannedAttnOld_{1}/ScanVQAttentionOld_0/")
    old = random_arrays(old)
    new = dict(zip(optimized_shapes(OPTIMIZED), old.values()))
    assert layouts.infer_config(old) == layouts.infer_config(new)
    a, b = layouts.from_reference_optimized(old), layouts.from_reference_optimized(new)
    assert_same(flatten(a), flatten(b))


@pytest.mark.parametrize("branch", ["main", "optimized"])
def test_single_sublayers_fit_the_mixer(branch):
    if branch == "main":
        config, shapes = layouts.config_from_reference(MAIN), main_shapes(MAIN)
        prefix = "transformer_layers_0/scanned_attn1/"
        load, store = layouts.sublayer_from_main, layouts.sublayer_to_main
    else:
        cfg = OPTIMIZED | {"head_type": "mqa"}
        config, shapes = layouts.config_from_reference(cfg), optimized_shapes(cfg)
        shapes = {n: s[2:] for n, s in shapes.items() if n.startswith("stack/")}
        prefix = "stack/VQAttention_0/"
        load, store = layouts.sublayer_from_optimized, layouts.sublayer_to_optimized
    flat = random_arrays(
        {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
    )
    variables = load(flat)
    y, aux = jax.jit(make_mixer(config).apply)(variables, jnp.ones((1, 6, 8)))
    assert y.shape == (1, 6, 8) and np.isfinite(y).all() and aux["stats_delta"]
    assert_same(store(variables), flat)


def test_wrong_names_and_shapes_are_named():
    flat = random_arrays(main_shapes(MAIN))
    name = "transformer_layers_1/scanned_attn2/r_proj/kernel"
    without = {n: a for n, a in flat.items() if n != name}
    with pytest.raises(ValueError, match="layers_1/scanned_attn2/.*missing r_proj/kernel"):
        layouts.from_reference_main(without)
    with pytest.raises(ValueError, match="unknown extra/thing"):
        layouts.from_reference_main(flat | {"extra/thing": flat[name]})
    with pytest.raises(ValueError, match=r"scanned_attn2/.*r_proj/kernel has shape \(8, 7\)"):
        layouts.from_reference_main(flat | {name: flat[name][:, :7]})
    gap = {n: a for n, a in flat.items() if not n.startswith("transformer_layers_1/")}
    with pytest.raises(ValueError, match=r"found i = \[0, 2\]"):
        layouts.from_reference_main(gap)
    with pytest.raises(ValueError, match="not a Transformer-VQ checkpoint"):
        layouts.detect_layout({"encoder/kernel": np.zeros(3)})

    flat = random_arrays(optimized_shapes(OPTIMIZED))
    name = "stack/VQAttention_1/qkvg_producer/g_proj/kernel"
    with pytest.raises(ValueError, match="stack/VQAttention_1/: .*"):
        layouts.from_reference_optimized({n: a for n, a in flat.items() if n != name})
    with pytest.raises(ValueError, match="leading axes are not"):
        layouts.from_reference_optimized(flat | {name: flat[name][:1]})
    with pytest.raises(ValueError, match="unknown stack/VQAttention_2/u"):
        layouts.from_reference_optimized(flat | {"stack/VQAttention_2/u": flat[name]})


def test_models_a_layout_cannot_hold_are_refused():
    shga = TransformerVQConfig(d_model=8, d_k=4, n_layer=1, n_code=4)
    mqa = dataclasses.replace(shga, head_type="mqa", norm_affine=False)
    dense = dataclasses.replace(shga, attention="dense")
    for config, to, need in (
        (mqa, layouts.to_reference_main, "head_type=shga"),
        (dense, layouts.to_reference_main, "attention=vq"),
        (shga, layouts.to_reference_optimized, "norm_affine=False"),
    ):
        with pytest.raises(ValueError, match=need):
            jax.eval_shape(to, abstract_variables(config))
    with pytest.raises(ValueError, match="head_type=shga, norm_affine=True"):
        layouts.config_to_reference(mqa, "main")
    scaled = dataclasses.replace(shga, scale_on="features", logit_scale=0.5)
    with pytest.raises(ValueError, match="scale_on=logits"):
        layouts.config_to_reference(scaled, "main")


def test_configs_both_ways():
    config = layouts.config_from_reference(MAIN)
    assert config == TransformerVQConfig(
        vocab_size=259, d_model=8, n_layer=3, head_type="shga", n_head=2, d_k=4, d_v=6, n_code=5,
        block_len=4, mem_len=6, cache=True, grad_through_cache=False, pe_abs=True,
        tie_embeddings=True, tied_bias=True, out_norm=True, logit_scale=0.5, scale_on="logits",
        norm_affine=True, dropout_sin=0.2, dropout_res=0.5, dropout_layer=0.3,
    )  # fmt: skip
    again = layouts.config_from_reference(layouts.config_to_reference(config, "main"))
    assert again == config
    cfg = OPTIMIZED | {"attn_type": "full", "head_type": "mha", "reduction_type": "assoc_scan"}
    config = layouts.config_from_reference(cfg)
    assert (config.attention, config.reduction, config.mem_len) == ("dense", "associative", 4)
    assert (config.norm_affine, config.tied_bias, config.scale_on) == (False, False, "features")
    again = layouts.config_from_reference(layouts.config_to_reference(config, "optimized"))
    assert again == config
    assert layouts.config_from_reference(MAIN, mem_len=9).mem_len == 9
    with pytest.raises(ValueError, match="lacks d_k, mem_len"):
        layouts.config_from_reference(
            {n: v for n, v in MAIN.items() if n not in ("d_k", "mem_len")}
        )
    with pytest.raises(ValueError, match="attn_type='linear' is not one of vq"):
        layouts.config_from_reference(OPTIMIZED | {"attn_type": "linear"})
    with pytest.raises(ValueError, match="pe_abs='False'"):
        layouts.config_from_reference(MAIN | {"pe_abs": "False"})


BIG = MAIN | {"d_k": 128, "n_head": 1, "n_code": 512, "n_layer": 24, "block_len": 512}
ENWIK8 = {"d_model": 768, "d_v": 1536, "e_tie": 0, "e_preln": 0, "pe_abs": 0}
PG19 = {"d_model": 2048, "d_v": 4096, "e_tie": 1, "e_preln": 1, "pe_abs": 0, "n_vocab": 32000}
IMAGENET64 = {"d_model": 2048, "d_v": 4096, "e_tie": 1, "e_preln": 1, "pe_abs": 1}
BASE = OPTIMIZED | {"d_model": 768, "d_k": 128, "n_code": 512, "n_layer": 24, "e_preln": False}


@pytest.mark.parametrize(
    "cfg, count",
    [
        (BIG | ENWIK8, 187_679_750),
        (BIG | PG19, 1_314_659_584),
        (BIG | IMAGENET64, 1_249_622_276),
        (BASE | {"head_type": "shga", "attn_type": "vq"}, 187_605_763),
        (BASE | {"head_type": "shga", "attn_type": "full"}, 184_435_459),
        (BASE | {"head_type": "mqa", "attn_type": "vq"}, 178_967_299),
        (BASE | {"head_type": "mqa", "attn_type": "full"}, 177_382_147),
        (BASE | {"head_type": "mha", "attn_type": "vq"}, 193_970_947),
        (BASE | {"head_type": "mha", "attn_type": "full"}, 184_460_035),
    ],
)
def test_published_sizes(cfg, count):
    layout = "optimized" if "head_type" in cfg else "main"
    variables = abstract_variables(layouts.config_from_reference(cfg))
    assert layouts.parameter_count(variables, layout) == count


def test_golden_parameter_files_load(golden_dir):
    safetensors = pytest.importorskip("safetensors.numpy")
    folder = golden_dir / "transformer_vq"
    if not (folder / "manifest.json").exists():
        folder = golden_dir
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    named = cases.items() if isinstance(cases, dict) else [(c["name"], c) for c in cases]
    seen = 0
    for name, case in named:
        if not name.startswith(("model_", "opt_model_", "attn_", "opt_attn_", "trainstep_")):
            continue
        flat = safetensors.load_file(folder / case["params_file"])
        config = layouts.config_from_reference(case["config"])
        if "attn_" in name:
            optimized = name.startswith("opt_")
            load = layouts.sublayer_from_optimized if optimized else layouts.sublayer_from_main
            x = jnp.zeros((1, 4, config.d_model))
            init = lambda x, c=config: make_mixer(c).init({"params": jax.random.key(0)}, x)
            wanted = {"stats": {}} | jax.eval_shape(init, x)
        else:
            load = FROM[layouts.detect_layout(flat)]
            wanted = abstract_variables(config)
        assert shapes_of(load(flat)) == shapes_of(wanted), name
        seen += 1
    assert seen >= 10
