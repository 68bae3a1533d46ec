"""DiT: sizes, start, modulation, time and labels, mixers, and the same numbers however computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lintime.model.layers.conditioning import (
    modulate,
    modulated_layer_norm,
    timestep_features,
)
from lintime.model.layers.norms import layer_normalise
from lintime.model.layers.patches import patchify, unpatchify
from lintime.model.layers.positions import sincos_positions
from lintime.model.mixers.bidirectional import Bidirectional
from lintime.model.mixers.pom import PolynomialMixer
from lintime.model.nets.dit import DiT, DiTConfig, make_mixer, position_table
from lintime.model.partition import parameter_shardings, parameter_spec, path_string
from lintime.train.mesh import ROWS, make_mesh
from lintime.train.schema import Mesh
from tests.golden.quick import quick_jit
from tests.tiny import quick
from tests.tiny_dit import (
    MIXERS,
    abstract_params,
    compiled,
    gradients,
    make_config,
    random_params,
    some_inputs,
)

close = dict(rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


def count(tree) -> int:
    return sum(a.size for a in jax.tree.leaves(tree))


def same_tree(got, want, rtol=2e-4, atol=2e-5):
    """Equal up to a share of each array's largest entry."""

    def check(path, a, b):
        name, size = path_string(path), float(np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol + rtol * size, err_msg=name)

    jax.tree.map_with_path(check, jax.device_get(got), jax.device_get(want))


# ---------------------------------------------------------------- patches and positions


def test_patches_hold_row_column_channel():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    np.testing.assert_array_equal(tokens[1, 4], x[1, 2:4, 2:4].reshape(-1))  # row 1, column 1
    np.testing.assert_array_equal(unpatchify(tokens, 2, (2, 3)), x)
    with pytest.raises(ValueError, match="patches of 4 do not divide an image of 4 x 6"):
        patchify(x, 4)
    with pytest.raises(ValueError, match="6 tokens of width 12 are no grid of 3 x 3 patches of 2"):
        unpatchify(tokens, 2, (3, 3))


def test_positions_put_the_column_first():
    table = sincos_positions(8, (2, 3))
    row, column, w = 1, 2, np.array([1.0, 0.01])
    want = [np.sin(column * w), np.cos(column * w), np.sin(row * w), np.cos(row * w)]
    assert table.dtype == np.float64
    np.testing.assert_allclose(table[row * 3 + column], np.concatenate(want), rtol=1e-14)
    with pytest.raises(ValueError, match="d_model=10; the position table needs a multiple of 4"):
        sincos_positions(10, (2, 2))


def test_positions_of_large_patches_are_centres_of_small_ones():
    """A patch of two lies midway between those of one that it covers."""
    got = sincos_positions(8, (1, 2), scale=2.0)[:, :2]
    np.testing.assert_allclose(got, [np.sin([0.5, 0.005]), np.sin([2.5, 0.025])], rtol=1e-14)
    config = make_config(patch_size=4, base_patch=2)
    _, kept = compiled(DiT(config), collect=True)(random_params(config), *some_inputs(config))
    assert config.tokens == 4 and kept["tokens"][0].shape == (2, 4, 4 * 4 * 6)


def test_timestep_features_put_the_cosines_first():
    t = jnp.array([0, 7, 999])
    got = timestep_features(t)
    f = np.exp(-np.log(10000.0) * np.arange(128) / 128)
    angles = np.array([0.0, 7.0, 999.0])[:, None] * f
    want = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-4)
    half = timestep_features(jnp.array([0.5], jnp.float32))  # used as it is
    np.testing.assert_allclose(half[0, :2], np.cos(0.5 * f[:2]), atol=1e-6)


def test_modulated_layer_norm_and_its_gradients():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 8)).astype(np.float32) * 3 + 1
    shift, scale = (rng.standard_normal((2, 1, 8)).astype(np.float32) for _ in range(2))
    plain = lambda x, *v: modulate(layer_normalise(x), *v)
    got = modulated_layer_norm(x, shift, scale, 1e-6, jnp.float32)
    wide = np.float64(x)
    normed = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(got, normed * (1 + scale) + shift, **close)
    total = lambda f: jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2))
    ours = total(lambda *a: modulated_layer_norm(*a, 1e-6, jnp.float32))(x, shift, scale)
    same_tree(ours, total(plain)(x, shift, scale))
    assert modulated_layer_norm(x, shift, scale, 1e-6, jnp.bfloat16).dtype == jnp.bfloat16


# ---------------------------------------------------------------- sizes and starts

PUBLISHED = {
    "S": ({"d_model": 384, "n_layer": 12, "n_head": 6}, (32_865_056, 32_920_448, 33_142_016)),
    "B": ({"d_model": 768, "n_layer": 12, "n_head": 12}, (130_315_808, 130_426_496, 130_869_248)),
    "L": (
        {"d_model": 1024, "n_layer": 24, "n_head": 16}, (457_840_672, 457_988_224, 458_578_432)
    ),
    "XL": ({}, (674_834_720, 675_000_704, 675_664_640)),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_published_sizes(name):
    sizes, totals = PUBLISHED[name]
    for patch, total in zip((2, 4, 8), totals):
        config = DiTConfig(patch_size=patch, **sizes)
        assert count(abstract_params(config)) == total
        assert config.tokens == (32 // patch) ** 2


def test_initial_values():
    config = make_config(d_model=64, num_classes=60, n_layer=3)
    x, t, labels = some_inputs(config)
    net = DiT(config)
    p = quick_jit(net.init)({"params": jax.random.key(0)}, x, t, labels)["params"]
    std = lambda a: float(np.std(a))
    for normal in (p["t_embedder"]["fc1"]["kernel"], p["t_embedder"]["fc2"]["kernel"]):
        assert std(normal) == pytest.approx(0.02, rel=0.05)
    assert std(p["y_embedder"]["embedding"]) == pytest.approx(0.02, rel=0.05)
    blocks = p["blocks"]
    for kernel in (
        p["x_embedder"]["kernel"], blocks["attn"]["qkv"]["kernel"],
        blocks["attn"]["proj"]["kernel"], blocks["mlp"]["fc1"]["kernel"],
        blocks["mlp"]["fc2"]["kernel"],
    ):  # fmt: skip
        limit = np.sqrt(6 / sum(kernel.shape[-2:]))
        assert limit * 0.98 < np.abs(kernel).max() <= limit * 1.0001
        assert std(kernel) == pytest.approx(limit / 3**0.5, rel=0.05)
    assert not np.array_equal(*blocks["attn"]["qkv"]["kernel"][:2])
    for zero in (blocks["modulation"], p["final"]):
        assert all(not np.any(a) for a in jax.tree.leaves(zero))
    biases = [a for path, a in jax.tree_util.tree_leaves_with_path(p) if path[-1].key == "bias"]
    assert len(biases) == 10 and not any(np.any(b) for b in biases)
    out, kept = compiled(net, collect=True)(p, x, t, labels)
    np.testing.assert_array_equal(out, 0)
    outs = kept["blocks"]["out"][0]  # every block starts as the identity
    np.testing.assert_array_equal(outs[0], outs[-1])
    embedded = kept["patches"][0] + np.float32(sincos_positions(64, config.grid))
    np.testing.assert_allclose(outs[0], embedded, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- modulation, time and labels


def test_six_vectors_stand_in_the_published_order():
    """shift1, scale1, gate1, shift2, scale2, gate2: each acts where its name says."""
    config = make_config(n_layer=1)
    net, params, inputs = DiT(config), random_params(config), some_inputs(config)
    head = params["blocks"]["modulation"]

    def seen(row):
        """Branches and output with gates of 1, all else 0, and one row raised by 2."""
        vectors = jnp.repeat(jnp.array([0.0, 0, 1, 0, 0, 1]), 16)
        vectors = vectors.at[row * 16 : row * 16 + 16].add(2)
        quiet = {"kernel": 0 * head["kernel"], "bias": vectors[None]}
        changed = params | {"blocks": params["blocks"] | {"modulation": quiet}}
        kept = compiled(net, collect=True)(changed, *inputs)[1]
        return {name: values[0][0] for name, values in kept["blocks"].items()}

    base = seen(6)  # past the end: no row
    names = ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2")
    got = {name: seen(row) for row, name in enumerate(names)}
    same = {n: {k: np.allclose(g[k], base[k], atol=1e-5) for k in base} for n, g in got.items()}
    for name in ("shift1", "scale1"):
        assert not same[name]["mixed"]
    assert same["gate1"] == {"mixed": True, "mlp_out": False, "out": False}
    for name in ("shift2", "scale2"):
        assert same[name] == {"mixed": True, "mlp_out": False, "out": False}
    assert same["gate2"] == {"mixed": True, "mlp_out": True, "out": False}
    extra = got["gate2"]["out"] - base["out"]
    np.testing.assert_allclose(extra, 2 * base["mlp_out"], rtol=1e-4, atol=1e-4)
    # A scale acts on what is normed, a shift on all alike.
    r = compiled(net, collect=True)(params, *inputs)[1]["patches"][0]
    normed = layer_normalise(r + np.float32(sincos_positions(16, config.grid)))
    mixer = make_mixer(config)
    mix = lambda h: mixer.apply(
        {"params": jax.tree.map(lambda a: a[0], params["blocks"]["attn"])}, h
    )[0]
    np.testing.assert_allclose(got["scale1"]["mixed"], mix(3 * normed), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got["shift1"]["mixed"], mix(normed + 2), rtol=1e-4, atol=1e-4)


def test_labels_are_dropped_with_an_rng_or_by_hand():
    config = make_config(class_dropout=0.5)
    net, params = DiT(config), random_params(config)
    x, t, labels = some_inputs(config, rows=40)
    labels = jnp.zeros_like(labels)
    table = params["y_embedder"]["embedding"]
    label = lambda **kw: net.apply(
        {"params": params}, t, labels, method="condition", mutable=["intermediates"], **kw
    )[1]["intermediates"]["label"][0]
    null = lambda rows: np.all(rows == table[5], axis=1)
    assert not null(label()).any()
    drawn = null(label(rngs={"dropout": jax.random.key(0)}))
    assert 10 <= drawn.sum() <= 30
    other = null(label(rngs={"dropout": jax.random.key(1)}))
    assert (drawn != other).any()
    drop = np.arange(40) % 3 == 0
    by_hand = label(drop=jnp.asarray(drop), rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(null(by_hand), drop)
    # The net itself: dropping is the null label.
    run = compiled(net)
    got = net.apply({"params": params}, x, t, labels, drop=jnp.ones(40, bool))[0]
    want = run(params, x, t, jnp.full_like(labels, 5))
    np.testing.assert_allclose(got, want, **close)
    assert np.abs(want - run(params, x, t, labels)).max() > 1e-2
    noisy = compiled(net, random=True)(params, x, t, labels, jax.random.key(0))
    changed = np.abs(noisy - run(params, x, t, labels)).max(axis=(1, 2, 3)) > 1e-3
    assert 10 <= changed.sum() <= 30


def test_without_class_dropout_there_is_no_null_class():
    config = make_config(class_dropout=0.0, learn_sigma=False)
    params = random_params(config)
    assert params["y_embedder"]["embedding"].shape == (5, 16)
    x, t, labels = some_inputs(config)
    out = compiled(DiT(config), random=True)(params, x, t, labels, jax.random.key(0))
    assert out.shape == x.shape and config.out_channels == 3
    with pytest.raises(ValueError, match="class_dropout=0: the net has no null class"):
        DiT(config).apply({"params": params}, x, t, labels, drop=jnp.ones(2, bool))


def test_rows_are_independent_and_time_matters():
    config = make_config()
    net, params = DiT(config), random_params(config)
    x, t, labels = some_inputs(config, rows=4)
    run, whole = compiled(net), compiled(net)(params, x, t, labels)
    np.testing.assert_allclose(run(params, x[2:], t[2:], labels[2:]), whole[2:], **close)
    # Flow matching: times between 0 and 1, as they are.
    a, b = (run(params, x, jnp.full(4, s, jnp.float32), labels) for s in (0.25, 0.75))
    assert np.abs(a - b).max() > 1e-3 and whole.dtype == jnp.float32


def test_errors():
    config = make_config()
    params, (x, t, labels) = random_params(config), some_inputs(config)
    for bad in (x[:, :4], x[..., :2]):
        with pytest.raises(ValueError, match="the net has input_size=8 and in_channels=3"):
            DiT(config).apply({"params": params}, bad, t, labels)
    for changes, words in (
        ({"mixer": "mamba3"}, "mixer='mamba3'; choose attention, pom, mamba2 or mamba1"),
        ({"n_head": 3}, "num_heads=3 does not divide width=16"),
        ({"mixer": "pom", "n_head": 3}, "heads=3 does not divide expand \\* features = 32"),
        ({"mixer": "pom", "ngroups": 3}, "groups=3 does not divide features=16"),
        ({"mixer": "pom", "rope": "1d"}, "rope='1d'; choose none or, for images and mixer=pom, 2d"),
        ({"rope": "2d"}, "rope='2d'; choose none"),
        ({"mixer": "pom", "rope": "2d", "frames": 2}, "rope='2d'; choose none"),
        ({"mixer": "pom", "rope": "2d"}, "gates of 2 heads of 16 channels cannot be rotated"),
        ({"patch_size": 3}, "patch_size=3 does not divide input_size=8"),
    ):
        with pytest.raises(ValueError, match=words):
            abstract_params(make_config(**changes))


# ---------------------------------------------------------------- mixers


SOME = [pytest.param(m, marks=pytest.mark.slow) if m == "mamba1" else m for m in MIXERS]


@pytest.mark.parametrize("mixer", SOME)
def test_every_mixer_sees_both_sides_and_has_finite_gradients(mixer):
    config = make_config(mixer=mixer)
    net, params, (x, t, labels) = DiT(config), random_params(config), some_inputs(config)
    out, gradient = gradients(net)(params, x, t, labels)
    flat = jax.tree_util.tree_leaves_with_path(gradient)
    for path, g in flat:
        assert np.isfinite(g).all() and np.abs(g).max() > 0, path_string(path)
    assert count(gradient) == count(params)
    for changed, seen in (((0, 0), (-1, -1)), ((-1, -1), (0, 0))):  # first and last patch
        other = compiled(net)(params, x.at[0, *changed].add(1.0), t, labels)
        moved = np.abs(other - out)
        assert moved[0, seen[0], seen[1]].max() > 1e-5 and moved[1].max() < 1e-5


def test_mamba_reads_both_ways():
    config = make_config(mixer="mamba2")
    assert isinstance(make_mixer(config, parent=None), Bidirectional)
    mixer = random_params(config)["blocks"]["mixer"]
    assert mixer.keys() == {"forward", "backward"}
    assert mixer["forward"]["in_proj"]["kernel"].shape[0] == 2


def test_pom_is_the_layer_with_rope_at_the_place_of_a_token():
    """Of the position table's coordinates: a patch of two lies between those of one."""
    fields = {"mixer": "pom", "n_head": 4, "degree": 3, "rope": "2d", "base_patch": 1}
    config = make_config(n_layer=1, **fields)
    params, (x, t, labels) = random_params(config), some_inputs(config)
    net = compiled(DiT(config), collect=True)
    _, kept = net(params, x, t, labels)
    vectors = params["blocks"]["modulation"]
    quiet = {"kernel": 0 * vectors["kernel"], "bias": 0 * vectors["bias"]}
    _, plain_norm = net(params | {"blocks": params["blocks"] | {"modulation": quiet}}, x, t, labels)
    r = plain_norm["patches"][0] + np.float32(position_table(config))
    row, column = np.divmod(np.arange(16), 4)
    at = np.stack([row, column], axis=1) * 2 + 0.5
    mixer = PolynomialMixer(16, 3, 2, 4, rope="2d")
    own = jax.tree.map(lambda a: a[0], params["blocks"]["mixer"])
    want = mixer.apply({"params": own}, layer_normalise(r), positions=jnp.asarray(at))[0]
    np.testing.assert_allclose(plain_norm["blocks"]["mixed"][0][0], want, rtol=1e-4, atol=1e-4)
    assert np.abs(kept["blocks"]["mixed"][0][0] - want).max() > 1e-2  # it was modulated


# ---------------------------------------------------------------- however computed


@functools.cache
def plain(mixer="attention"):
    config = make_config(mixer=mixer)
    params, inputs = random_params(config), some_inputs(config)
    return config, params, inputs, gradients(DiT(config))(params, *inputs)


BOTH = ("attention", "pom", pytest.param("mamba2", marks=pytest.mark.slow))


@pytest.mark.parametrize("mixer", BOTH)
@pytest.mark.parametrize("options", [{"remat": "full"}, {"remat": "dots"}, {"unroll": True}])
def test_remat_and_unroll_change_nothing(options, mixer):
    config, params, inputs, want = plain(mixer)
    same_tree(gradients(DiT(config, **options))(params, *inputs), want)


@pytest.mark.parametrize("mixer", BOTH)
def test_bfloat16(mixer):
    config, params, inputs, (exact, want) = plain(mixer)
    out, gradient = gradients(DiT(config, jnp.bfloat16))(params, *inputs)
    assert out.dtype == jnp.float32
    error = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)
    assert 1e-4 < error(out, exact) < 0.03
    assert {g.dtype for g in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    join = lambda tree: np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])
    assert error(join(gradient), join(want)) < (0.05 if mixer == "attention" else 0.15)
    kept = compiled(DiT(config, jnp.bfloat16), collect=True)(params, *inputs)[1]
    assert kept["blocks"]["mixed"][0].dtype == kept["blocks"]["mlp_out"][0].dtype == jnp.bfloat16
    # The stream, what conditions it and the last layer are wide.
    wide = [kept["blocks"]["out"], kept["time"], kept["label"], kept["patches"], kept["tokens"]]
    assert {a[0].dtype for a in wide} == {jnp.dtype("float32")}
    narrow = dataclasses.replace(config, residual_in_fp32=False)
    kept = compiled(DiT(narrow, jnp.bfloat16), collect=True)(params, *inputs)[1]
    assert kept["blocks"]["out"][0].dtype == jnp.bfloat16 and kept["tokens"][0].dtype == jnp.float32


INNER = {
    "attention": "attn/qkv/kernel", "pom": "mixer/po_coeff",
    "mamba2": "mixer/backward/in_proj/kernel",
}  # fmt: skip
WIDE = {"d_model": 32, "n_head": 4, "mlp_ratio": 4.0}


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("mixer", BOTH)
@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 2, 4), (1, 8, 1)))]
)
def test_any_mesh_computes_the_same(sizes, mixer):
    config = make_config(mixer=mixer, rope="2d" if mixer == "pom" else "none", **WIDE)
    params, inputs = random_params(config), some_inputs(config, rows=8)
    want = gradients(DiT(config))(params, *inputs)
    data, fsdp, tensor = sizes
    mesh = make_mesh(Mesh(data=data, fsdp=fsdp, tensor=tensor))
    places = parameter_shardings(params, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(places)
    cut = {path_string(path) for path, s in leaves if "tensor" in s.spec}
    assert tensor == 1 or {f"blocks/{INNER[mixer]}", "blocks/mlp/fc1/kernel"} <= cut
    with jax.set_mesh(mesh):
        args = (jax.device_put(params, places),)
        args += tuple(jax.device_put(a, NamedSharding(mesh, ROWS)) for a in inputs)
        got = gradients.__wrapped__(DiT(config))(*args)  # compiled for this mesh
    same_tree(got, want)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_every_modulation_vector_follows_the_rows():
    """Wrong values without a constraint showed at some sizes only, so that they are counted."""
    config = make_config(**WIDE)
    net, params = DiT(config), abstract_params(config)
    with jax.set_mesh(make_mesh(Mesh(data=2, fsdp=2, tensor=2))):
        run = lambda params, *inputs: net.apply({"params": params}, *inputs)[0]
        jaxpr = jax.make_jaxpr(run)(params, *some_inputs(config, rows=8))
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "sharding_constraint":
                spec = equation.params["sharding"].spec
                found.append((equation.outvars[0].aval.shape, spec[0] if len(spec) else None))
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jaxpr.jaxpr)
    rows = ("data", "fsdp")
    assert found.count(((8, 1, 32), rows)) == 6 + 2  # of the block in the loop, of the last layer
    assert found.count(((8, 32), rows)) == 1  # the condition


def test_parameters_are_cut_by_heads_and_hidden_units():
    mesh = {"data": 1, "fsdp": 2, "tensor": 2}
    spec = lambda name, *shape: tuple(parameter_spec(f"blocks/{name}", shape, mesh))
    assert spec("attn/qkv/kernel", 2, 64, 192) == (None, "fsdp", "tensor")
    assert spec("attn/proj/kernel", 2, 64, 64) == (None, "tensor", "fsdp")
    assert spec("mlp/fc2/kernel", 2, 256, 64) == (None, "tensor", "fsdp")
    assert spec("mixer/qc_proj/kernel", 2, 64, 132) == (None, "fsdp", "tensor")
    assert spec("mixer/ag_proj/kernel", 2, 128, 64) == (None, "tensor", "fsdp")
    assert spec("mixer/po_proj/kernel", 2, 2, 32, 64) == (None, "tensor", None, "fsdp")
    assert spec("mixer/se_proj/kernel", 2, 64, 128) == (None, "fsdp", "tensor")
    assert spec("mixer/po_coeff", 2, 128, 3) == (None, "tensor", None)
    assert spec("mixer/se_bias", 2, 4) == (None, "tensor")
    assert spec("modulation/kernel", 2, 64, 384) == (None, None, "fsdp")
