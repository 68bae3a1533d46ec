"""DiT's published layout: the same numbers as the published model, there and back, one message for
what is wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.convert import dit as layout_of
from lintime.model.convert.names import flatten
from lintime.model.nets.dit import DiT, DiTConfig
from lintime.model.processes.flow import FlowMatching
from lintime.model.processes.gaussian import GaussianDiffusion
from lintime.train.arrays import read_arrays, read_hyperparameters
from lintime.train.convert import dit as convert_dit
from lintime.train.convert.command import convert as convert_file, export
from lintime.train.errors import UserError
from lintime.train.schema import DiffusionSample, ImageData, Run
from tests.conversion import assert_same, restored, shapes_of
from tests.tiny_dit import abstract_params, compiled, make_config, some_inputs

CONFIG = DiTConfig(
    input_size=8, patch_size=4, in_channels=3, d_model=16, n_layer=3, n_head=4, mlp_ratio=2.0,
    num_classes=5,
)  # fmt: skip


def published_shapes(c: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file."""
    d, p, hidden = c.d_model, c.patch_size, int(c.mlp_ratio * c.d_model)
    shapes = {
        "pos_embed": (1, (c.input_size // p) ** 2, d),
        "x_embedder.proj.weight": (d, c.in_channels, p, p),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.2.weight": (d, d),
        "y_embedder.embedding_table.weight": (c.num_classes + 1, d),
        "final_layer.linear.weight": (p * p * c.out_channels, d),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
    }
    for i in range(c.n_layer):
        shapes |= {
            f"blocks.{i}.attn.qkv.weight": (3 * d, d), f"blocks.{i}.attn.proj.weight": (d, d),
            f"blocks.{i}.mlp.fc1.weight": (hidden, d), f"blocks.{i}.mlp.fc2.weight": (d, hidden),
            f"blocks.{i}.adaLN_modulation.1.weight": (6 * d, d),
        }  # fmt: skip
    biased = [n for n in shapes if n.endswith("weight") and "table" not in n]
    return shapes | {n.removesuffix("weight") + "bias": shapes[n][:1] for n in biased}


def table(d, g):
    """The published position table, token by token."""
    w = 10000.0 ** (-np.arange(d // 4) / (d // 4))
    rows = [
        np.concatenate([f(at * w) for at in (c, r) for f in (np.sin, np.cos)])
        for r in range(g)
        for c in range(g)
    ]
    return np.float32(rows)[None]


def arrays(c: DiTConfig = CONFIG, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    draw = lambda n, s: np.float32(rng.standard_normal(s) / np.sqrt(s[-1] if len(s) > 1 else 4))
    drawn = {n: draw(n, s) for n, s in sorted(published_shapes(c).items())}
    return drawn | {"pos_embed": table(c.d_model, c.input_size // c.patch_size)}


def published_model(a, c: DiTConfig, x, t, y):
    """The published net from its description, in float64: images [N, C, I, I]."""
    a = {n: np.float64(v) for n, v in a.items()}
    linear = lambda name, h: h @ a[f"{name}.weight"].T + a[f"{name}.bias"]
    silu = lambda h: h / (1 + np.exp(-h))
    gelu = lambda h: 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    norm = lambda h: (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    n, p, g, heads = len(x), c.patch_size, c.input_size // c.patch_size, c.n_head
    h = np.zeros((n, g * g, c.d_model))
    for i in range(g):
        for j in range(g):  # a convolution of kernel and stride p
            patch = np.float64(x)[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p]
            h[:, i * g + j] = np.einsum("ncij,dcij->nd", patch, a["x_embedder.proj.weight"])
    h = h + a["x_embedder.proj.bias"] + a["pos_embed"]
    f = np.exp(-np.log(10000) * np.arange(128) / 128)
    angles = np.float64(t)[:, None] * f
    time = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    time = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", time)))
    condition = silu(time + a["y_embedder.embedding_table.weight"][y])
    for i in range(c.n_layer):
        vectors = linear(f"blocks.{i}.adaLN_modulation.1", condition)
        v = [part[:, None] for part in np.split(vectors, 6, axis=1)]
        qkv = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + v[1]) + v[0])
        q, k, value = qkv.reshape(n, g * g, 3, heads, -1).transpose(2, 0, 3, 1, 4)
        scores = np.exp(q @ np.swapaxes(k, 2, 3) / np.sqrt(q.shape[-1]))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ value
        mixed = mixed.transpose(0, 2, 1, 3).reshape(h.shape)
        h = h + v[2] * linear(f"blocks.{i}.attn.proj", mixed)
        hidden = gelu(linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + v[4]) + v[3]))
        h = h + v[5] * linear(f"blocks.{i}.mlp.fc2", hidden)
    vectors = linear("final_layer.adaLN_modulation.1", condition)
    shift, scale = np.split(vectors[:, None], 2, axis=2)
    o = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    o = o.reshape(n, g, g, p, p, c.out_channels)
    return np.einsum("nhwijc->nchiwj", o).reshape(n, c.out_channels, g * p, g * p)


def test_the_same_numbers_as_the_published_model():
    flat = arrays()
    params = layout_of.dit_from_reference(flat, CONFIG)
    x, t, labels = some_inputs(CONFIG)
    got = compiled(DiT(CONFIG))(params, x, t, labels)
    want = published_model(flat, CONFIG, np.moveaxis(np.asarray(x), -1, 1), t, labels)
    np.testing.assert_allclose(np.moveaxis(np.asarray(got), -1, 1), want, rtol=2e-4, atol=2e-4)


def test_there_and_back():
    flat = arrays()
    params = layout_of.dit_from_reference(flat, CONFIG)
    assert shapes_of(params) == shapes_of(abstract_params(CONFIG))
    assert_same(layout_of.dit_to_reference(params, CONFIG), flat)
    del flat["pos_embed"]  # a constant
    assert_same(flatten(layout_of.dit_from_reference(flat, CONFIG)), flatten(params))


@pytest.mark.parametrize("name", ["DiT-S/8", "DiT-B/4", "DiT-L/4", "DiT-XL/2", "SiT-XL/2"])
def test_released_models_fit(name):
    config = layout_of.dit_config_from_fields({"model": name, "image_size": 512})
    assert config.input_size == 64 and config.d_model // config.n_head in (64, 72)
    abstract = {
        n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in published_shapes(config).items()
    }
    assert layout_of.dit_config_from_reference(abstract) == config
    ours = jax.eval_shape(lambda flat: layout_of.dit_from_reference(flat, config), abstract)
    assert shapes_of(ours) == shapes_of(abstract_params(config))
    back = jax.eval_shape(lambda p: layout_of.dit_to_reference(p, config), ours)
    assert {n: a.shape for n, a in back.items()} == published_shapes(config)


def test_fields():
    assert layout_of.dit_config_from_fields({}) == DiTConfig()  # DiT-XL/2, 256 x 256
    assert layout_of.dit_config_from_fields(layout_of.dit_fields(CONFIG)) == CONFIG
    for fields, words in (
        ({"model": "DiT-H/2"}, "model='DiT-H/2', expected a name like DiT-XL/2"),
        ({"width": 3}, "width is not known; known: input_size"),
        ({"depth": "28"}, "depth='28', expected a value of type int"),
        ({"depth": True}, "depth=True, expected a value of type int"),
        ({"learn_sigma": 1}, "learn_sigma=1, expected a value of type bool"),
    ):
        with pytest.raises(ValueError, match=words):
            layout_of.dit_config_from_fields(fields)


# ---------------------------------------------------------------- what is wrong

BLOCK = "blocks.1.attn.qkv.weight"


def shifted(flat):
    return flat | {"pos_embed": flat["pos_embed"] + np.float32(2e-5)}


@pytest.mark.parametrize(
    "change, words",
    [
        (shifted, "pos_embed differs from the computed table by 2e-05, more than 1e-05"),
        (lambda f: f | {"pos_embed": table(16, 4)}, "of another resolution; set net.input_size=16"),
        (lambda f: f | {"extra": f["pos_embed"]}, "unknown extra"),
        (lambda f: {n: a for n, a in f.items() if n != BLOCK}, f"missing {BLOCK}"),
        (lambda f: f | {BLOCK: f[BLOCK][:, :-1]}, r"blocks.\*.attn.qkv.weight: .* differ"),
        (lambda f: f | {BLOCK: f[BLOCK][0]}, r"qkv.weight has shape \(16,\), expected \(out, in\)"),
        (
            lambda f: f | {"t_embedder.mlp.0.weight": f["t_embedder.mlp.0.weight"][:, :-1]},
            r"t_embedder/fc1/kernel has shape \(255, 16\), expected \(256, 16\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        layout_of.dit_from_reference(change(arrays()), CONFIG)


def test_almost_equal_positions_are_taken():
    flat = arrays()
    flat["pos_embed"] = flat["pos_embed"] + np.float32(5e-6)
    layout_of.dit_from_reference(flat, CONFIG)


@pytest.mark.parametrize(
    "change, options, words",
    [
        (lambda f: {}, {}, "no x_embedder.proj.weight: this is not the DiT layout"),
        (lambda f: f, {}, "do not tell net.n_head, nor is d_model=16 published"),
        (
            lambda f: {n: a for n, a in f.items() if not n.startswith("blocks.1.")},
            {"n_head": 4}, r"blocks \[0, 2\] are not numbered from 0 without gaps",
        ),
        (
            lambda f: {n: a for n, a in f.items() if n != "pos_embed"},
            {"n_head": 4}, "the file does not tell net.input_size; give it",
        ),
        (
            lambda f: f | {"pos_embed": np.zeros((1, 6, 16), np.float32)},
            {"n_head": 4}, "pos_embed has 6 tokens, which is no square",
        ),
        (
            lambda f: f | {"final_layer.linear.weight": np.zeros((7, 16), np.float32)},
            {"n_head": 4}, r"the last layer has 7 rows; patches of 4 need \[48, 96\]",
        ),
    ],
)  # fmt: skip
def test_what_the_arrays_do_not_tell(change, options, words):
    with pytest.raises(ValueError, match=words):
        layout_of.dit_config_from_reference(change(arrays()), **options)


def test_what_the_arrays_tell():
    tell = layout_of.dit_config_from_reference
    assert tell(arrays(), n_head=4) == CONFIG
    without = {n: a for n, a in arrays().items() if n != "pos_embed"}
    assert tell(without, n_head=4, input_size=8) == CONFIG
    other = tell(arrays(), n_head=2, class_dropout=0.0)  # no row for a null class
    assert (other.num_classes, other.class_dropout, other.n_head) == (6, 0.0, 2)
    odd = dataclasses.replace(CONFIG, d_model=44, mlp_ratio=1.12)  # 49.28 hidden units
    told = tell(arrays(odd), n_head=4)
    assert told.d_intermediate == odd.d_intermediate == 49 > int(49 / 44 * 44)
    small = dataclasses.replace(CONFIG, learn_sigma=False)
    assert not tell(arrays(small), n_head=4).learn_sigma


def test_the_layout_knows_attention_only():
    config = make_config(mixer="mamba2")
    for act in (
        lambda: layout_of.dit_to_reference({}, config),
        lambda: layout_of.dit_from_reference({}, config),
        lambda: layout_of.dit_fields(config),
    ):
        with pytest.raises(ValueError, match="net.mixer=mamba2, but the DiT layout knows"):
            act()


# ---------------------------------------------------------------- files


def convert(flat, *overrides, layout=None, config=None, reference=None):
    return convert_dit.to_run(
        flat, layout=layout, config=config, reference=reference, overrides=overrides, source="f"
    )


def test_a_run_of_dit_or_sit():
    flat = arrays()
    assert convert_dit.recognises(flat) and not convert_dit.recognises({"x": 0})
    run, variables = convert(flat, "net.n_head=4", "sample.guidance=1.5")
    assert run.net == CONFIG and run.process == GaussianDiffusion()
    assert run.sample.guidance == 1.5 and run.sample.guidance_channels == 3
    params = layout_of.dit_from_reference(flat, CONFIG)
    assert_same(flatten(variables["params"]), flatten(params))
    sit, _ = convert(flat, layout="sit", reference=layout_of.dit_fields(CONFIG))
    assert sit.process == FlowMatching() and sit.net == CONFIG and sit.sample.method == "sde"
    flat["pos_embed"] = table(16, 4)
    with pytest.raises(UserError, match="input_size=16 in a net of 8: net.base_size=16 inter"):
        convert(flat, config=Run(net=CONFIG))
    assert convert(flat, "net.n_head=4")[0].net.input_size == 16
    with pytest.raises(UserError, match="f: the shapes do not tell net.n_head"):
        convert(flat)
    # what a layout does not hold
    pixels = dataclasses.replace(run, data=ImageData(size=8))
    cosine = dataclasses.replace(run.process, schedule="squaredcos_cap_v2")
    for other in (sit, pixels, dataclasses.replace(run, process=cosine)):
        assert convert_dit.says_all(run) and not convert_dit.says_all(other)
    plain = dataclasses.replace(CONFIG, learn_sigma=False)
    run, _ = convert(arrays(plain), "net.n_head=4")
    assert run.process.variance == "fixed_large"


def test_released_files_and_checkpoints_of_the_training_script(tmp_path):
    """A bare state dict; a trainer's {model, ema, opt, args}, of which the average is taken."""
    torch = pytest.importorskip("torch")
    import argparse

    from safetensors.numpy import save_file

    ema, model = arrays(), arrays(seed=1)
    tensors = lambda flat: {n: torch.from_numpy(a.copy()) for n, a in flat.items()}
    args = argparse.Namespace(model="DiT-XL/2", image_size=256)
    opt = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}
    whole = {"model": tensors(model), "ema": tensors(ema), "opt": opt, "args": args}
    torch.save(whole, tmp_path / "0400000.pt")
    torch.save(tensors(ema), tmp_path / "bare.pt")
    torch.save({"model": tensors(ema), "ema": {}}, tmp_path / "no_average.pt")
    save_file(ema, tmp_path / "model.safetensors")
    for name in ("0400000.pt", "bare.pt", "no_average.pt", "model.safetensors"):
        assert_same(read_arrays(tmp_path / name), ema)


def test_a_file_becomes_a_run_and_a_file_again(tmp_path):
    from safetensors.numpy import load_file, save_file

    flat = arrays()
    save_file(flat, tmp_path / "model.safetensors")
    run = Run(
        net=CONFIG, process=GaussianDiffusion(), data=ImageData(size=8), sample=DiffusionSample()
    )
    convert_file(tmp_path / "model.safetensors", tmp_path / "run", config=run)
    _, variables = restored(tmp_path / "run")
    params = layout_of.dit_from_reference(flat, CONFIG)
    assert_same(flatten(variables["params"]), flatten(params))
    with pytest.raises(UserError, match="was trained for layout dit, not sit"):
        export(tmp_path / "run", tmp_path / "x", file_format="safetensors", layout="sit")
    layout, weights, fields = export(tmp_path / "run", tmp_path / "x", file_format="safetensors")
    assert layout == "dit" and fields.name == "config.json"
    assert_same(load_file(weights), flat)
    # Its config.json is read back, and tells what the arrays do not.
    fields = read_hyperparameters(fields)[1]
    again, variables = convert(read_arrays(tmp_path / "x"), reference=fields)
    assert again.net == CONFIG
    assert_same(flatten(variables["params"]), flatten(params))
