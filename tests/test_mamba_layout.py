"""Published Mamba checkpoints become run directories that compute the same, and come back."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lintime
from lintime.model.convert import mamba as layout_of
from lintime.model.convert.names import flatten
from lintime.model.nets.mamba_lm import MambaLM
from lintime.train import arrays
from lintime.train.config_files import read_config
from lintime.train.convert import command as command
from lintime.train.data import load_vocab
from lintime.train.errors import UserError
from tests.conversion import assert_same, cli, random_arrays, shapes_of

# ---------------------------------------------------------------- released models

# d_model, layers, d_inner, dt_rank, parameters
MAMBA1 = {
    "mamba-130m": (768, 24, 1536, 48, 129_135_360),
    "mamba-370m": (1024, 48, 2048, 64, 371_516_416),
    "mamba-790m": (1536, 48, 3072, 96, 793_204_224),
    "mamba-1.4b": (2048, 48, 4096, 128, 1_372_178_432),
    "mamba-2.8b": (2560, 64, 5120, 160, 2_768_345_600),
}
# d_model, layers, d_inner, heads, rows of in_proj, channels of conv1d
MAMBA2 = {
    "mamba2-130m": (768, 24, 1536, 24, 3352, 1792),
    "mamba2-370m": (1024, 48, 2048, 32, 4384, 2304),
    "mamba2-780m": (1536, 48, 3072, 48, 6448, 3328),
    "mamba2-1.3b": (2048, 48, 4096, 64, 8512, 4352),
    "mamba2-2.7b": (2560, 64, 5120, 80, 10576, 5376),
}
RELEASED = {
    "vocab_size": 50277, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
}  # fmt: skip


def released(name):
    """config.json, and shapes by name as in the released pytorch_model.bin."""
    if name in MAMBA1:
        d, layers, inner, rank, _ = MAMBA1[name]
        config = {"ssm_cfg": {}, "pad_vocab_size_multiple": 8}
        rows = 50280
        mixer = {
            "A_log": (inner, 16), "D": (inner,), "in_proj.weight": (2 * inner, d),
            "conv1d.weight": (inner, 1, 4), "conv1d.bias": (inner,),
            "x_proj.weight": (rank + 32, inner), "dt_proj.weight": (inner, rank),
            "dt_proj.bias": (inner,), "out_proj.weight": (d, inner),
        }  # fmt: skip
    else:
        d, layers, inner, heads, width, channels = MAMBA2[name]
        config = {
            "d_intermediate": 0, "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [],
            "attn_cfg": {}, "pad_vocab_size_multiple": 16, "tie_embeddings": True,
        }  # fmt: skip
        rows = 50288
        mixer = {
            "dt_bias": (heads,), "A_log": (heads,), "D": (heads,), "in_proj.weight": (width, d),
            "conv1d.weight": (channels, 1, 4), "conv1d.bias": (channels,),
            "norm.weight": (inner,), "out_proj.weight": (d, inner),
        }  # fmt: skip
    shapes = {f"backbone.layers.{i}.mixer.{n}": s for i in range(layers) for n, s in mixer.items()}
    shapes |= {f"backbone.layers.{i}.norm.weight": (d,) for i in range(layers)}
    shapes |= {"backbone.embedding.weight": (rows, d), "backbone.norm_f.weight": (d,)}
    return RELEASED | {"d_model": d, "n_layer": layers} | config, shapes


@pytest.mark.parametrize("name", [*MAMBA1, *MAMBA2])
def test_released_models_fit(name):
    reference, shapes = released(name)
    config = layout_of.config_from_reference(reference)
    abstract = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}

    def load(flat):  # the head is the embedding's own storage there
        return layout_of.from_reference(
            flat | {"lm_head.weight": flat["backbone.embedding.weight"]}
        )

    ours = jax.eval_shape(load, abstract)
    tokens = jnp.zeros((1, 4), jnp.int32)
    wanted = jax.eval_shape(MambaLM(config).init, {"params": jax.random.key(0)}, tokens)
    assert shapes_of(ours["params"]) == shapes_of(wanted["params"])
    back = jax.eval_shape(lambda v: layout_of.to_reference(v, config), ours)
    head = {"lm_head.weight": shapes["backbone.embedding.weight"]}
    assert {n: a.shape for n, a in back.items()} == shapes | head
    zero = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}  # takes no memory
    inferred = layout_of.infer_config(zero, ngroups=1)
    sizes = {"d_state": 16, "dt_rank": MAMBA1[name][3]} if name in MAMBA1 else {"d_state": 128}
    assert inferred == {n: getattr(config, n) for n in inferred} | sizes
    if name in MAMBA1:
        assert sum(a.size for a in jax.tree.leaves(ours)) == MAMBA1[name][4]


# ---------------------------------------------------------------- the same numbers

BASE = {
    "d_model": 16, "n_layer": 2, "vocab_size": 21, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}  # fmt: skip
FIRST = BASE | {"ssm_cfg": {"d_state": 4}}
SECOND = BASE | {"ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 8, "ngroups": 2}}
RICH = BASE | {
    "ssm_cfg": {
        "layer": "Mamba2", "d_state": 4, "headdim": 4, "ngroups": 2, "d_ssm": 24, "bias": True,
        "norm_before_gate": True, "D_has_hdim": True, "dt_limit": [0.8, float("inf")],
        "A_init_range": [1, 16],
    },
    "d_intermediate": 100, "tie_embeddings": False, "attn_layer_idx": [],
}  # fmt: skip
CONFIGS = {"mamba1": FIRST, "mamba2": SECOND, "rich": RICH}


def small(config):
    """Random arrays under the published names."""
    ssm, d = config["ssm_cfg"], config["d_model"]
    inner, n = 2 * d, ssm["d_state"]
    if ssm.get("layer") == "Mamba2":
        d_ssm = ssm.get("d_ssm", inner)
        heads, both = d_ssm // ssm["headdim"], 2 * ssm["ngroups"] * n
        mixer = {
            "in_proj.weight": (2 * inner + both + heads, d), "dt_bias": (heads,),
            "conv1d.weight": (d_ssm + both, 1, 4), "conv1d.bias": (d_ssm + both,),
            "A_log": (heads,), "D": (d_ssm if ssm.get("D_has_hdim") else heads,),
            "norm.weight": (d_ssm,),
        }  # fmt: skip
    else:
        mixer = {
            "in_proj.weight": (2 * inner, d), "conv1d.weight": (inner, 1, 4),
            "conv1d.bias": (inner,), "x_proj.weight": (1 + 2 * n, inner),
            "dt_proj.weight": (inner, 1), "dt_proj.bias": (inner,), "A_log": (inner, n),
            "D": (inner,),
        }  # fmt: skip
    mixer["out_proj.weight"] = (d, inner)
    if ssm.get("bias"):
        mixer |= {"in_proj.bias": mixer["in_proj.weight"][:1], "out_proj.bias": (d,)}
    layer = {"norm.weight": (d,)} | {f"mixer.{name}": s for name, s in mixer.items()}
    if config.get("d_intermediate"):
        layer |= {"norm2.weight": (d,), "mlp.fc1.weight": (256, d), "mlp.fc2.weight": (d, 128)}
    shapes = {f"backbone.layers.{i}.{name}": s for i in range(2) for name, s in layer.items()}
    shapes |= {"backbone.embedding.weight": (24, d), "backbone.norm_f.weight": (d,)}
    flat = random_arrays(shapes | {"lm_head.weight": (24, d)})
    flat = {name: 0.4 * a for name, a in flat.items()}
    if config.get("tie_embeddings", True):
        flat["lm_head.weight"] = flat["backbone.embedding.weight"].copy()
    return flat


def silu(x):
    return x / (1 + np.exp(-x))


def rms(x, weight, groups=1):
    parts = x.reshape(len(x), groups, -1)
    parts = parts / np.sqrt(np.mean(parts**2, -1, keepdims=True) + 1e-5)
    return parts.reshape(x.shape) * weight


def convolve(x, p):
    weight = p["conv1d.weight"][:, 0]
    x = np.concatenate([np.zeros((3, x.shape[1])), x])
    return silu(p["conv1d.bias"] + sum(weight[:, k] * x[k : len(x) - 3 + k] for k in range(4)))


def mamba1(p, u, ssm):
    x, z = np.split(u @ p["in_proj.weight"].T, 2, axis=1)
    x = convolve(x, p)
    n, h = ssm["d_state"], 0.0
    dt, b, c = np.split(x @ p["x_proj.weight"].T, [1, 1 + n], axis=1)
    dt = np.logaddexp(0, dt @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    y = np.empty_like(x)
    for t in range(len(x)):
        decay = np.exp(-dt[t, :, None] * np.exp(p["A_log"]))
        h = decay * h + (dt[t] * x[t])[:, None] * b[t]
        y[t] = h @ c[t] + p["D"] * x[t]
    return (y * silu(z)) @ p["out_proj.weight"].T


def mamba2(p, u, ssm):
    inner, n, head_dim, groups = 2 * u.shape[1], ssm["d_state"], ssm["headdim"], ssm["ngroups"]
    d_ssm = ssm.get("d_ssm", inner)
    heads, rest = d_ssm // head_dim, inner - d_ssm
    sizes = [rest, rest, d_ssm, d_ssm + 2 * groups * n, heads]
    projected = u @ p["in_proj.weight"].T + p.get("in_proj.bias", 0)
    assert projected.shape[1] == sum(sizes)
    z0, x0, z, xbc, dt = np.split(projected, np.cumsum(sizes)[:-1], axis=1)
    x, b, c = np.split(convolve(xbc, p), [d_ssm, d_ssm + groups * n], axis=1)
    low, high = ssm.get("dt_limit", (0, np.inf))
    dt = np.clip(np.logaddexp(0, dt + p["dt_bias"]), low, high)
    skip = np.broadcast_to(p["D"].reshape(heads, -1), (heads, head_dim))
    y = np.empty_like(x)
    for h in range(heads):
        g, own, state = h // (heads // groups), slice(h * head_dim, (h + 1) * head_dim), 0.0
        group = slice(g * n, (g + 1) * n)
        for t in range(len(x)):
            state = np.exp(-dt[t, h] * np.exp(p["A_log"][h])) * state
            state = state + dt[t, h] * np.outer(x[t, own], b[t, group])
            y[t, own] = state @ c[t, group] + skip[h] * x[t, own]
    if ssm.get("norm_before_gate"):
        y = rms(y, p["norm.weight"], groups) * silu(z)
    else:
        y = rms(y * silu(z), p["norm.weight"], groups)
    return np.concatenate([silu(z0) * x0, y], 1) @ p["out_proj.weight"].T + p.get(
        "out_proj.bias", 0
    )


def logits_of(flat, config, ids):
    """The published model in float64, one sequence."""
    flat = {name: a.astype(np.float64) for name, a in flat.items()}
    mix = mamba2 if config["ssm_cfg"].get("layer") == "Mamba2" else mamba1
    r = flat["backbone.embedding.weight"][ids]
    for i in range(config["n_layer"]):
        prefix = f"backbone.layers.{i}."
        p = {n[len(prefix) :]: a for n, a in flat.items() if n.startswith(prefix)}
        mixer = {n[len("mixer.") :]: a for n, a in p.items() if n.startswith("mixer.")}
        r = r + mix(mixer, rms(r, p["norm.weight"]), config["ssm_cfg"])
        if config.get("d_intermediate"):
            y, gate = np.split(rms(r, p["norm2.weight"]) @ p["mlp.fc1.weight"].T, 2, axis=1)
            r = r + (y * silu(gate)) @ p["mlp.fc2.weight"].T
    return rms(r, flat["backbone.norm_f.weight"]) @ flat["lm_head.weight"].T


def write(folder, flat, config=None, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    if name.endswith(".bin"):
        torch = pytest.importorskip("torch")
        torch.save({n: torch.from_numpy(a.copy()) for n, a in flat.items()}, folder / name)
    else:
        pytest.importorskip("safetensors.numpy").save_file(flat, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_checkpoint_becomes_a_run_with_the_same_logits_and_comes_back(tmp_path, kind, capsys):
    config = CONFIGS[kind]
    flat = small(config)
    cli("--from", write(tmp_path / "published", flat, config), "--out", tmp_path / "run")
    assert f'lintime.load("{tmp_path / "run"}")' in capsys.readouterr().out
    run = lintime.load(tmp_path / "run")
    assert (run.config.data.vocab, run.config.precision.compute) == ("", "float32")
    ids = np.random.default_rng(0).integers(0, 21, (2, 7))
    got, _ = jax.jit(run.net.apply)(run.variables, ids)
    for row in range(2):
        want = logits_of(flat, config, ids[row])
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())

    cli("--run", tmp_path / "run", "--to", "safetensors", "--out", tmp_path / "mamba-0.1b")
    assert sorted(p.name for p in (tmp_path / "mamba-0.1b").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert_same(arrays.read_arrays(tmp_path / "mamba-0.1b"), flat)
    written = json.loads((tmp_path / "mamba-0.1b/config.json").read_text())
    assert layout_of.config_from_reference(written) == run.config.net
    ssm = {n: v for n, v in config["ssm_cfg"].items() if n not in ("A_init_range", "dt_limit")}
    written["ssm_cfg"].pop("dt_limit", None)  # infinity is no JSON
    assert written["ssm_cfg"] == ssm
    again = command.convert(tmp_path / "mamba-0.1b", tmp_path / "again")
    assert read_config(again / "config.json").net == run.config.net


def test_pytorch_files(tmp_path):
    torch = pytest.importorskip("torch")
    flat = small(SECOND)
    source = write(tmp_path / "published", flat, SECOND, "pytorch_model.bin")
    out = command.convert(source, tmp_path / "run")
    cli("--run", out, "--to", "bin", "--out", tmp_path / "back")
    back = torch.load(tmp_path / "back/pytorch_model.bin", weights_only=True)
    assert_same({n: t.numpy() for n, t in back.items()}, flat)
    half = {"a": torch.ones(2, 3, dtype=torch.bfloat16) / 3, "b": torch.ones(2).half() / 3}
    torch.save(half, tmp_path / "half.pt")
    got = arrays.read_arrays(tmp_path / "half.pt")
    assert_same(got, {n: t.float().numpy() for n, t in half.items()})
    assert {a.dtype for a in got.values()} == {np.dtype(np.float32)}
    (tmp_path / "evil.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    torch.save({"x": print}, tmp_path / "code.bin")
    for name in ("evil.bin", "code.bin"):
        with pytest.raises(UserError, match="cannot read"):
            arrays.read_arrays(tmp_path / name)


def test_a_pytorch_file_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"torch is not installed; .*'lintime\[convert\]'"):
        arrays.read_arrays(tmp_path)


def test_half_precision_and_shards(tmp_path):
    flat = small(FIRST)
    names = sorted(flat)
    half = {
        n: a.astype(ml_dtypes.bfloat16 if "mixer" in n else np.float16) for n, a in flat.items()
    }
    files = {n: f"part-{i % 2}.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        write(tmp_path, {n: half[n] for n in names if files[n] == file}, FIRST, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for source in (tmp_path, index):
        got = arrays.read_arrays(source)
        assert_same(got, {n: a.astype(np.float32) for n, a in half.items()})
        assert {a.dtype for a in got.values()} == {np.dtype(np.float32)}
    out = command.convert(index, tmp_path / "run")
    assert read_config(out / "config.json").net == layout_of.config_from_reference(FIRST)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(UserError, match="names part-1.safetensors, which is not there"):
        arrays.read_arrays(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "../part-0.safetensors"}}))
    with pytest.raises(UserError, match="cannot read"):
        arrays.read_arrays(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "part-0.safetensors"}}))
    with pytest.raises(UserError, match="lack x"):
        arrays.read_arrays(tmp_path)


def test_without_config_json_shapes_tell(tmp_path):
    make = lambda flat, name, *overrides: (
        read_config(
            command.convert(
                write(tmp_path / name, flat), tmp_path / f"{name}-run", overrides=overrides
            )
            / "config.json"
        ).net
    )
    net = make(small(FIRST), "first")
    assert (net.mixer, net.d_state, net.dt_rank, net.n_layer) == ("mamba1", 4, 1, 2)
    with pytest.raises(UserError, match="do not tell net.ngroups .*FIELD=VALUE.*--config"):
        make(small(RICH), "none")
    net = make(small(RICH), "rich", "net.ngroups=2", "net.norm_before_gate=true")
    assert (net.d_state, net.headdim, net.d_ssm, net.D_has_hdim) == (4, 4, 24, True)
    assert (net.use_bias, net.d_intermediate, net.tie_embeddings) == (True, 128, False)
    with pytest.raises(UserError, match="ngroups=5 does not divide 8"):
        make(small(SECOND), "five", "net.ngroups=5")


def test_an_untied_head_may_equal_the_embedding(tmp_path):
    config = FIRST | {"tie_embeddings": False}
    out = command.convert(write(tmp_path / "p", small(FIRST), config), tmp_path / "run")
    params = lintime.load(out).params
    np.testing.assert_array_equal(params["lm_head"], params["embedding"])
    without = {n: a for n, a in small(FIRST).items() if n != "lm_head.weight"}
    command.convert(write(tmp_path / "tied", without, FIRST), tmp_path / "tied-run")


def test_a_lintime_config_and_a_vocabulary(tmp_path):
    source = write(tmp_path / "p", small(FIRST), {"d_model": 1})  # --config comes before it
    run = command.Run(net=layout_of.config_from_reference(FIRST), batch_size=3)
    with pytest.raises(UserError, match="net.vocab_size=24 is too small for data.vocab=bytes"):
        command.convert(source, tmp_path / "run", config=run)
    out = command.convert(source, tmp_path / "run", config=run, overrides=["data.vocab="])
    assert read_config(out / "config.json").batch_size == 3
    with pytest.raises(UserError, match="takes token ids only.*data.vocab=FILE") as caught:
        lintime.load(out).generate("x")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="takes token ids only"):
        load_vocab("")
    with pytest.raises(UserError, match="has no attention; --to vq takes"):
        cli("--run", out, "--to", "vq", "--out", tmp_path / "vq")
    with pytest.raises(UserError, match="does not fit transformer-vq-main; choose mamba-ssm"):
        command.export(out, tmp_path / "x", file_format="npz", layout="transformer-vq-main")
    layout, weights, hyperparameters = command.export(out, tmp_path / "x.npz", file_format="npz")
    assert (layout, weights.name, hyperparameters.name) == ("mamba-ssm", "x.npz", "x.json")


def without(flat, *ends):
    return {n: a for n, a in flat.items() if not n.endswith(ends)}


def test_bad_checkpoints_give_one_line(tmp_path):
    first, second = small(FIRST), small(SECOND)
    attention = without(first, "layers.1.mixer.A_log", "layers.1.mixer.D")
    attention["backbone.layers.1.mixer.Wqkv.weight"] = np.zeros((48, 16), np.float32)
    bias = {"backbone.layers.0.norm.bias": np.zeros(16, np.float32)}
    cases = {
        "attention layers": (first, FIRST | {"attn_layer_idx": [1]}),
        "LayerNorm": (first, FIRST | {"rms_norm": False}),
        "norm.bias .LayerNorm is not supported": (first | bias, FIRST),
        "layer 1 has attention; hybrids": (attention, FIRST),
        "ssm_cfg.d_head of Mamba1 is not": (first, FIRST | {"ssm_cfg": {"d_head": 4}}),
        "ssm_cfg.headdim of Mamba1 is not": (first, FIRST | {"ssm_cfg": {"headdim": 4}}),
        "layer='Mamba3'": (first, FIRST | {"ssm_cfg": {"layer": "Mamba3"}}),
        "ssm_cfg=3": (first, FIRST | {"ssm_cfg": 3}),
        "dt_limit=3": (second, SECOND | {"ssm_cfg": SECOND["ssm_cfg"] | {"dt_limit": 3}}),
        "d_model='16'": (first, FIRST | {"d_model": "16"}),
        "net.tie_embeddings: expected": (first, FIRST | {"tie_embeddings": "yes"}),
        "config.json lacks n_layer": (first, {n: v for n, v in FIRST.items() if n != "n_layer"}),
        "expected a JSON object": (first, [1]),
        "layer 1 and layer 0 differ in mixer/D": (without(first, "1.mixer.D"), FIRST),
        "missing params/layers/mixer/D": (without(first, "mixer.D"), FIRST),
        "missing params/layers/norm/g": (without(first, ".norm.weight"), FIRST),
        "missing backbone.layers.0.mixer.conv1d.weight": (without(first, "conv1d.weight"), None),
        "no backbone.norm_f.weight": (without(first, "norm_f.weight"), FIRST),
        "layers are not numbered .* found: 1": (
            {n: a for n, a in first.items() if ".0." not in n},
            FIRST,
        ),
        "unknown parameters: backbone.more": (first | {"backbone.more": np.zeros(2)}, FIRST),
        "unknown parameters of a Mamba mixer: E": (
            first | {"backbone.layers.0.mixer.E": np.zeros(2)},
            FIRST,
        ),
        r"conv1d.weight has shape \(4, 1\)": (
            first | {"backbone.layers.0.mixer.conv1d.weight": np.zeros((4, 1), np.float32)},
            FIRST,
        ),
        "net.n_layer is 2 in the checkpoint, 3 in the config": (first, FIRST | {"n_layer": 3}),
        "net.vocab_size is 24 .*, 32 in the": (first, FIRST | {"pad_vocab_size_multiple": 32}),
        "net.d_state is 4 .*, 16 in the config": (first, FIRST | {"ssm_cfg": {}}),
        "net.mixer is mamba2": (second, FIRST),
        "do not fit together": (second | {k: a[:-4] for k, a in second.items() if "in_proj" in k},
                                SECOND),
        "tie_embeddings is true, but lm_head": (
            first | {"lm_head.weight": 2 * first["lm_head.weight"]},
            FIRST,
        ),
        "tie_embeddings is false, but there is no": (
            without(first, "lm_head.weight"),
            FIRST | {"tie_embeddings": False},
        ),
    }  # fmt: skip
    for number, (pattern, (flat, config)) in enumerate(cases.items()):
        source = write(tmp_path / str(number), flat, config)
        with pytest.raises(UserError, match=pattern) as caught:
            command.convert(source, tmp_path / "run")
        assert "\n" not in str(caught.value), pattern
    whole = (tmp_path / "0/model.safetensors").read_bytes()
    (tmp_path / "0/model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot read .*it is damaged"):
        command.convert(tmp_path / "0", tmp_path / "run")
    (tmp_path / "1/config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the hyperparameters"):
        command.convert(tmp_path / "1", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_the_layout_cannot_say_is_refused():
    config = layout_of.config_from_reference(FIRST)
    with pytest.raises(ValueError, match="net.norm_epsilon=0.01"):
        layout_of.config_to_reference(dataclasses.replace(config, norm_epsilon=0.01))


def test_layers_are_stacked_in_order():
    flat = small(FIRST)
    params = flatten(layout_of.from_reference(flat)["params"])
    for i in range(2):
        theirs = flat[f"backbone.layers.{i}.mixer.in_proj.weight"]
        np.testing.assert_array_equal(params["layers/mixer/in_proj/kernel"][i], theirs.T)
