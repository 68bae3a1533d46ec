"""AiM's published layouts: the same numbers as the published model, there and back, one message
for what is wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.convert import aim as layout_of
from lintime.model.nets.aim import AiM, AiMConfig
from tests.conversion import shapes_of
from tests.test_mamba_layout import mamba1, mamba2, rms, silu
from tests.tiny_aim import compiled, make_config

# ---------------------------------------------------------------- published names and shapes

HUB = {
    "d_intermediate": 0, "vocab_size": 16384, "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [],
    "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
    "pad_vocab_size_multiple": 8, "tie_embeddings": True, "num_classes": 1000, "num_tokens": 256,
    "adaln_group": False, "num_groups": 1, "token_drop": 0.0, "mixer_drop": 0.0, "mlp_drop": 0.0,
}  # fmt: skip
RELEASED = {
    "aim-base": {"d_model": 768, "n_layer": 24},
    "aim-large": {"d_model": 1024, "n_layer": 48, "adaln_group": True, "num_groups": 4},
    "aim-xlarge": {"d_model": 1536, "n_layer": 48, "adaln_group": True, "num_groups": 4},
}
SMALL = HUB | {"d_model": 16, "n_layer": 3, "vocab_size": 21, "num_classes": 4, "num_tokens": 6}
SECOND = {"layer": "Mamba2", "d_state": 4, "headdim": 8, "ngroups": 2}
GROUP = SMALL | {"adaln_group": True, "num_groups": 2, "ssm_cfg": SECOND}
CASES = {
    "adaln": SMALL | {"ssm_cfg": SECOND},
    "group": GROUP,
    "single": GROUP | {"num_groups": 1},
    "mamba1": GROUP | {"ssm_cfg": {"d_state": 4}},
    "mlp": GROUP | {"d_intermediate": 100, "num_groups": 4},
}


def published_shapes(c) -> dict[str, tuple[int, ...]]:
    """Names and shapes of stage 2, without prefix, the tied matrix once."""
    d, ssm = c["d_model"], c["ssm_cfg"]
    inner, rows = 2 * d, 6 if c["d_intermediate"] else 3
    if ssm.get("layer", "Mamba1") == "Mamba2":
        heads = inner // ssm.get("headdim", 64)
        wide = inner + 2 * ssm.get("ngroups", 1) * ssm.get("d_state", 128)
        mixer = {
            "in_proj.weight": (inner + wide + heads, d), "conv1d.weight": (wide, 1, 4),
            "conv1d.bias": (wide,), "dt_bias": (heads,), "A_log": (heads,), "D": (heads,),
            "norm.weight": (inner,), "out_proj.weight": (d, inner),
        }  # fmt: skip
    else:
        rank, n = -(-d // 16), ssm["d_state"]
        mixer = {
            "in_proj.weight": (2 * inner, d), "conv1d.weight": (inner, 1, 4),
            "conv1d.bias": (inner,), "x_proj.weight": (rank + 2 * n, inner),
            "dt_proj.weight": (inner, rank), "dt_proj.bias": (inner,), "A_log": (inner, n),
            "D": (inner,), "out_proj.weight": (d, inner),
        }  # fmt: skip
    layer = {"norm.weight": (d,)} | {f"mixer.{n}": s for n, s in mixer.items()}
    if c["d_intermediate"]:
        hidden = -(-c["d_intermediate"] // 128) * 128
        layer |= {"norm2.weight": (d,), "mlp.fc1.weight": (2 * hidden, d)}
        layer["mlp.fc2.weight"] = (d, hidden)
    if c["adaln_group"]:
        layer["scale_shift_table"] = (1, rows, d)
    else:
        layer |= {
            "adaLN_modulation.1.weight": (rows * d, d),
            "adaLN_modulation.1.bias": (rows * d,),
        }
    shapes = {f"backbone.layers.{i}.{n}": s for i in range(c["n_layer"]) for n, s in layer.items()}
    shapes |= {
        "backbone.embeddings.word_embeddings.weight": (c["vocab_size"], d),
        "backbone.embeddings.position_embeddings.weight": (c["num_tokens"] + 1, d),
        "backbone.cls_embed.embedding_table.weight": (c["num_classes"] + 1, d),
        "backbone.final_layer.norm_final.weight": (d,),
        "backbone.final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "backbone.final_layer.adaLN_modulation.1.bias": (2 * d,),
        "backbone.norm_f.weight": (d,),
    }
    if c["adaln_group"]:
        wide = c["num_groups"] * rows * d
        shapes |= {
            "backbone.adaln_group.1.weight": (wide, d),
            "backbone.adaln_group.1.bias": (wide,),
        }
    return shapes


def small(c, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    draw = lambda n, s: rng.standard_normal(s) / np.sqrt(s[-1] if n.endswith("weight") else 4)
    return {n: np.float32(draw(n, s)) for n, s in sorted(published_shapes(c).items())}


TIED = layout_of.HEAD


def with_head(flat):
    return flat | {TIED: flat[layout_of.EMBEDDING].copy()}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_fit(name):
    reference = HUB | RELEASED[name]
    shapes, config = published_shapes(reference), layout_of.config_from_reference(reference)
    assert config.position_offset == 1 and config.groups == (0 if name == "aim-base" else 4)
    abstract = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    hub = {f"mamba.{n}": a for n, a in abstract.items()}
    ours = jax.eval_shape(lambda flat: layout_of.from_reference(flat, config), hub)
    codes, labels = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1,), jnp.int32)
    wanted = jax.eval_shape(AiM(config).init, {"params": jax.random.key(0)}, codes, labels)
    assert shapes_of(ours["params"]) == shapes_of(wanted["params"])
    back = jax.eval_shape(lambda v: layout_of.to_reference(v, config), ours)
    assert {n: a.shape for n, a in back.items()} == shapes | {TIED: (16384, config.d_model)}
    assert layout_of.config_to_reference(config) == reference
    zero = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}  # takes no memory
    inferred = layout_of.infer_config(zero, ngroups=1)
    assert inferred == {n: getattr(config, n) for n in inferred} | {"d_state": 128}
    assert {"num_tokens", "num_classes", "conditioning", "n_layer"} < inferred.keys()


# ---------------------------------------------------------------- the same numbers


def logits_of(flat, c, codes, label):
    """The published model in float64: one row of codes of one class."""
    flat = {name: a.astype(np.float64) for name, a in flat.items()}
    at = lambda name: flat[f"backbone.{name}"]
    mix = mamba2 if c["ssm_cfg"].get("layer") == "Mamba2" else mamba1
    rows = 6 if c["d_intermediate"] else 3
    condition = at("cls_embed.embedding_table.weight")[label]
    head = lambda name: at(f"{name}.weight") @ silu(condition) + at(f"{name}.bias")
    places = at("embeddings.position_embeddings.weight")[: len(codes) - 1]
    tokens = at("embeddings.word_embeddings.weight")[codes[:-1]] + places
    h, r = np.concatenate([condition[None], tokens]), 0.0
    for i in range(c["n_layer"]):
        prefix = f"backbone.layers.{i}."
        p = {n[len(prefix) :]: a for n, a in flat.items() if n.startswith(prefix)}
        mixer = {n[len("mixer.") :]: a for n, a in p.items() if n.startswith("mixer.")}
        if c["adaln_group"]:
            v = head("adaln_group.1").reshape(-1, rows, c["d_model"])
            v = v[i % c["num_groups"]] + p["scale_shift_table"][0]
        else:
            v = head(f"layers.{i}.adaLN_modulation.1").reshape(rows, -1)
        v = v.reshape(3, -1, c["d_model"])  # shift, scale, gate of every branch
        r = h + r
        h = v[2, 0] * mix(mixer, rms(r, p["norm.weight"]) * (1 + v[1, 0]) + v[0, 0], c["ssm_cfg"])
        if rows == 6:
            r = h + r
            x = rms(r, p["norm2.weight"]) * (1 + v[1, 1]) + v[0, 1]
            y, gate = np.split(x @ p["mlp.fc1.weight"].T, 2, axis=1)
            h = v[2, 1] * ((y * silu(gate)) @ p["mlp.fc2.weight"].T)
    f = rms(h + r, at("norm_f.weight"))
    shift, scale = np.split(head("final_layer.adaLN_modulation.1"), 2)
    f = rms(f, at("final_layer.norm_final.weight")) * (1 + scale) + shift
    return f @ at("embeddings.word_embeddings.weight").T


@pytest.mark.parametrize("kind", CASES)
def test_the_same_logits_and_the_same_file(kind):
    reference = CASES[kind]
    flat, config = small(reference), layout_of.config_from_reference(reference)
    assert layout_of.config_to_reference(config) == reference
    variables = layout_of.from_reference(flat, config)
    codes = np.random.default_rng(0).integers(0, 21, (2, 6))
    labels = np.array([2, 4])
    got = compiled(AiM(config))(variables, codes, labels)
    for row in range(2):
        want = logits_of(flat, reference, codes[row], labels[row])
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    back = layout_of.to_reference(variables, config)
    assert back.keys() == flat.keys() | {TIED}
    for name, array in with_head(flat).items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    inferred = layout_of.infer_config(flat, ngroups=config.ngroups)
    inferred |= {n: 100 for n in inferred if n == "d_intermediate" and inferred[n] == 128}
    assert inferred == {n: getattr(config, n) for n in inferred} | (
        {"dt_rank": 1} if kind == "mamba1" else {}
    )


def test_prefixes_and_the_tied_matrix():
    flat = small(GROUP)
    config = layout_of.config_from_reference(GROUP)
    want = layout_of.from_reference(flat, config)
    tokenizer = {"quantize.embedding.weight": np.ones((21, 8), np.float32)}
    hub = layout_of.join_hub(with_head(flat), tokenizer)
    assert hub.keys() == {f"mamba.{n}" for n in flat} | {"vqvae.quantize.embedding.weight"}
    stage2, other = layout_of.split_hub(hub)
    assert stage2.keys() == flat.keys() and other.keys() == tokenizer.keys()
    assert layout_of.split_hub(flat)[1] == {}
    twice = {f"mamba.{n}": a for n, a in with_head(flat).items()}
    for given in (with_head(flat), hub, twice):
        for c in (config, None):
            got = layout_of.from_reference(given, c)
            jax.tree.map(np.testing.assert_array_equal, got, want)
    # Another head is another parameter, and must be announced.
    head = with_head(flat) | {TIED: flat[layout_of.EMBEDDING] * 2}
    with pytest.raises(ValueError, match="tie_embeddings is true, but lm_head.weight is not"):
        layout_of.from_reference(head, config)
    untied = dataclasses.replace(config, tie_embeddings=False)
    params = layout_of.from_reference(head, untied)["params"]
    np.testing.assert_array_equal(params["lm_head"], head[TIED])
    assert layout_of.join_hub(head, {}, tied=False).keys() == {f"mamba.{n}" for n in head}
    with pytest.raises(ValueError, match="tie_embeddings is false, but there is no lm_head"):
        layout_of.from_reference(flat, untied)


# ---------------------------------------------------------------- what is wrong


def test_wrong_arrays_give_one_message():
    flat, config = small(GROUP), layout_of.config_from_reference(GROUP)
    without = lambda *ends: {n: a for n, a in flat.items() if not n.endswith(ends)}
    layer = "backbone.layers.1."
    cases = {
        "no backbone.embeddings.word_embeddings.weight: this is not the AiM layout": {"x": flat},
        "missing backbone.norm_f.weight": without("norm_f.weight"),
        "missing backbone.adaln_group.1.bias": without("adaln_group.1.bias"),
        "missing layers/modulation/table": without("scale_shift_table"),
        "layer 1 and layer 0 differ in mixer/D": without("1.mixer.D"),
        "layers are not numbered .* found: 0, 2": without(
            *(n for n in flat if n.startswith(layer))
        ),
        "unknown parameters: backbone.more": flat | {"backbone.more": np.zeros(2)},
        "layer 1: unknown parameters more": flat | {f"{layer}more": np.zeros(2)},
        r"scale_shift_table has shape \(3, 16\), expected \(1, rows, d\)": flat
        | {f"{layer}scale_shift_table": np.zeros((3, 16), np.float32)},
        "backbone.adaln_group.1.bias, .* is neither under mamba. nor under vqvae.": flat
        | {"vqvae.x": np.zeros(2)},
        r"position_embedding has shape \(9, 16\), expected \(7, 16\)": flat
        | {"backbone.embeddings.position_embeddings.weight": np.zeros((9, 16), np.float32)},
    }
    for words, given in cases.items():
        with pytest.raises(ValueError, match=words) as caught:
            layout_of.from_reference(given, config)
        assert "\n" not in str(caught.value)
    for field, change in (
        (r"embedding has shape \(21, 16\), expected \(22, 16\)", {"vocab_size": 22}),
        (r"class_embedding has shape \(5, 16\), expected \(7, 16\)", {"num_classes": 6}),
        (r"has shape \(3, .*expected \(4, ", {"n_layer": 4}),
        (r"group_modulation/bias has shape \(96,\), expected \(144,\)", {"num_groups": 3}),
        ("missing layers/modulation/head", {"conditioning": "adaln"}),
        ("missing .*mlp/fc1", {"d_intermediate": 100}),
    ):
        with pytest.raises(ValueError, match=field):
            layout_of.from_reference(flat, dataclasses.replace(config, **change))


def test_config_json():
    read = layout_of.config_from_reference
    assert read(SMALL, position_offset=0).position_offset == 0
    sizes = {n: SMALL[n] for n in layout_of.SIZES}
    usual = read(sizes)  # the published code's defaults
    assert (usual.mixer, usual.conditioning, usual.tie_embeddings) == ("mamba2", "adaln", True)
    assert read(SMALL | {"ssm_cfg": {}}).mixer == "mamba1"
    assert read(SMALL | {"token_drop": 0.25}).token_drop == 0.25
    cases = {
        "config.json lacks num_tokens": {n: v for n, v in SMALL.items() if n != "num_tokens"},
        "hidden_size, z is not known": SMALL | {"z": 1, "hidden_size": 2},
        "d_model='16', expected a whole number >= 1": SMALL | {"d_model": "16"},
        "n_layer=0, expected": SMALL | {"n_layer": 0},
        "num_groups=True": SMALL | {"num_groups": True},
        "attention layers": SMALL | {"attn_layer_idx": [1]},
        "LayerNorm": SMALL | {"rms_norm": False},
        "token_drop=2, expected a number in": SMALL | {"token_drop": 2},
        "tie_embeddings='yes', expected true or false": SMALL | {"tie_embeddings": "yes"},
        "ssm_cfg=3, expected an object": SMALL | {"ssm_cfg": 3},
        "layer='Mamba3'": SMALL | {"ssm_cfg": {"layer": "Mamba3"}},
    }
    for words, given in cases.items():
        with pytest.raises(ValueError, match=words) as caught:
            read(given)
        assert "\n" not in str(caught.value)


def test_what_the_layout_cannot_say_is_refused():
    with pytest.raises(ValueError, match="net.norm_epsilon=0.01, but the AiM layout knows 1e-05"):
        layout_of.config_to_reference(make_config(norm_epsilon=0.01))
    with pytest.raises(ValueError, match="net.mixer=attention, but the AiM layout knows Mamba"):
        layout_of.config_to_reference(make_config(mixer="attention"))
    with pytest.raises(ValueError, match="net.mixer=attention"):
        layout_of.to_reference({"params": {}}, AiMConfig(mixer="attention"))
