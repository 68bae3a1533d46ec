"""PoM's image and video nets: sizes, start, published layout, shapes, meshes, the video's time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lintime.model.convert.dih import (
    bare_names,
    dih_config_from_fields,
    dih_config_from_reference,
    dih_from_reference,
    dih_to_reference,
    text_video_config_from_fields,
)
from lintime.model.layers.unit_positions import unit_positions
from lintime.model.nets.dih import DiH, DiHConfig, resize_table
from lintime.model.nets.text_video_dih import TextVideoDiH, TextVideoDiHConfig
from lintime.model.partition import parameter_shardings, path_string
from lintime.train.mesh import ROWS, make_mesh
from lintime.train.schema import Mesh
from tests.golden.quick import quick_jit
from tests.tiny import quick

SIZES = dict(
    input_size=8, in_channels=3, d_model=16, n_layer=2, n_head=2, num_classes=5, patch_size=2
)
VIDEO = dict(
    input_size=4, input_width=6, frames=6, in_channels=3, d_model=16, n_layer=2, context_dim=5,
    block_causal=True,
)  # fmt: skip
KINDS = {
    "dih": {},
    "dih++": {"positions": "learned", "registers": 3, "clamp": 255.0, "resize_by_count": True},
    "dit": {"mixer": "attention"},
}
close = dict(rtol=2e-4, atol=2e-5)


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


def abstract(config):
    """Shapes of the parameters."""
    x, one = jnp.zeros((1, *config.shape)), jnp.zeros((1,), jnp.int32)
    if isinstance(config, TextVideoDiHConfig):
        net, told = TextVideoDiH(config), {"context": jnp.zeros((1, 2, config.context_dim))}
    else:
        net, told = DiH(config), {}
    return jax.eval_shape(lambda: net.init(jax.random.key(0), x, one, one, **told))["params"]


@functools.cache
def random_params(config):
    """Numbers for all parameters; nothing is zero."""
    rng = np.random.default_rng(0)

    def fill(path, a):
        scale = np.sqrt(a.shape[-2]) if path[-1].key == "kernel" else 4
        return jnp.float32(rng.standard_normal(a.shape) / scale)

    return jax.tree_util.tree_map_with_path(fill, abstract(config))


def inputs(config, rows=2, size=None):
    rng = np.random.default_rng(1)
    shape = size or config.shape
    x = jnp.float32(rng.standard_normal((rows, *shape)))
    t, labels = rng.integers(0, 1000, rows), rng.integers(0, 6, rows)
    return x, jnp.asarray(t), jnp.asarray(labels)


def apply(net, params, *args, **told):
    return quick_jit(lambda p, *a: net.apply({"params": p}, *a, **told)[0])(params, *args)


def count(config) -> float:
    return sum(a.size for a in jax.tree.leaves(abstract(config)))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("DiH-S/4", 44.47), ("DiH-XL/2", 832.6), ("DiH++-XL/2", 833.2), ("DiT-XL/2", 683.8)],
)
def test_published_sizes(name, millions):
    assert count(dih_config_from_fields({"model": name})) == pytest.approx(millions * 1e6, rel=6e-4)


@pytest.mark.parametrize(("name", "millions"), [("S/2", 74.7), ("B/4", 298.0), ("XL/2", 1050.6)])
def test_published_sizes_of_videos(name, millions):
    config = text_video_config_from_fields({"model": name, "vid_size": "16x32"})
    assert config.tokens == 10 * 8 * 16 * 4 / config.patch_size**2
    assert count(config) == pytest.approx(millions * 1e6, rel=6e-4)


@pytest.mark.parametrize("kind", ["dih", "dit"])
def test_blocks_start_as_the_identity(kind):
    config = DiHConfig(**SIZES | KINDS[kind])
    net, args = DiH(config), inputs(config)
    variables = quick_jit(net.init)(jax.random.key(0), *args)
    (out, aux), seen = net.apply(variables, *args, mutable=["intermediates"])
    np.testing.assert_array_equal(out, np.zeros(args[0].shape))
    assert aux == {}
    blocks = seen["intermediates"]["blocks"]["out"][0]
    np.testing.assert_array_equal(blocks[0], blocks[1])


@pytest.mark.parametrize("kind", KINDS)
def test_published_names_go_both_ways(kind):
    config = DiHConfig(**SIZES | KINDS[kind] | {"n_head": 2, "timesteps": 250})
    params = jax.tree.map(np.asarray, random_params(config))
    flat = dih_to_reference(params, config)
    told = dih_config_from_reference(flat, degree=2, n_head=2, input_size=8)
    assert dataclasses.replace(told, n_head=2) == config
    wrapped = {f"ema.ema_model._orig_mod.{n}": a for n, a in flat.items()}
    wrapped |= {f"model._orig_mod.{n}": 0 * a for n, a in flat.items()}
    wrapped |= {"ema.step": np.zeros(1), "vae.x": np.zeros(1)}
    back = dih_from_reference(bare_names(wrapped), config)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert bare_names(wrapped, "model").keys() == flat.keys() == bare_names(flat).keys()
    if kind == "dih":  # as the package of 2025 has it
        flat = {n.replace("ho_proj", "po_proj"): a for n, a in flat.items()}
        jax.tree.map(np.testing.assert_array_equal, dih_from_reference(flat, config), params)
    with pytest.raises(ValueError, match="net.timesteps=1000"):
        dih_from_reference(flat, dataclasses.replace(config, timesteps=1000))
    with pytest.raises(ValueError, match="missing out_proj.bias"):
        dih_from_reference({n: a for n, a in flat.items() if n != "out_proj.bias"}, config)


def test_published_names_of_videos():
    config = TextVideoDiHConfig(**VIDEO)
    params = jax.tree.map(np.asarray, random_params(config))
    back = dih_from_reference(dih_to_reference(params, config), config)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_remat_and_unrolling_change_nothing():
    config = DiHConfig(**SIZES | KINDS["dih++"])
    params, args = random_params(config), inputs(config)

    def gradient(**options):
        net = DiH(config, **options)
        loss = lambda p: jnp.sum(jnp.sin(net.apply({"params": p}, *args)[0]))
        return quick_jit(jax.grad(loss))(params)

    want = gradient()
    for options in ({"remat": "full"}, {"unroll": True}):
        got = gradient(**options)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), got, want)


def test_labels_are_dropped():
    config = DiHConfig(**SIZES)
    params, (x, t, _) = random_params(config), inputs(config)
    null = apply(DiH(config), params, x, t, jnp.array([5, 5]))
    told = apply(DiH(config), params, x, t, jnp.array([1, 2]), drop=jnp.array([True, False]))
    np.testing.assert_allclose(told[0], null[0], **close)
    assert np.abs(told[1] - null[1]).max() > 1e-3
    sure = DiH(dataclasses.replace(config, class_dropout=1.0))
    drawn = apply(sure, params, x, t, jnp.array([1, 2]), rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(drawn, null, **close)


def test_other_shapes_get_positions_over_the_same_range():
    config = DiHConfig(**SIZES | {"positions": "shifted"})
    params = random_params(config)
    wide = inputs(config, size=(4, 12, 3))
    assert apply(DiH(config), params, *wide).shape == (2, 4, 12, 3)
    table = unit_positions(16, (2, 6)).reshape(2, 6, 16)
    np.testing.assert_allclose(table[:, -1], unit_positions(16, (2, 3)).reshape(2, 3, 16)[:, -1])
    learned = DiHConfig(**SIZES | KINDS["dih++"])  # (2, 8) tokens are as many as (4, 4)
    params, args = random_params(learned), inputs(learned, size=(4, 16, 3))
    published = apply(DiH(learned), params, *args)
    own = apply(DiH(dataclasses.replace(learned, resize_by_count=False)), params, *args)
    assert np.abs(published - own).max() > 1e-3
    flat = np.full((16, 3), 2.0)
    np.testing.assert_allclose(resize_table(flat, (4, 4), (3, 7)), np.full((21, 3), 2.0), rtol=1e-6)


def test_the_clamp_bounds_the_residual_stream():
    config = DiHConfig(**SIZES | {"clamp": 0.5})
    _, seen = DiH(config).apply(
        {"params": random_params(config)}, *inputs(config), mutable=["intermediates"]
    )
    assert np.abs(seen["intermediates"]["blocks"]["out"][0]).max() == 0.5


def test_fields_that_do_not_fit_are_refused():
    run = lambda **fields: abstract(DiHConfig(**SIZES | fields))
    with pytest.raises(ValueError, match="registers need positions=learned"):
        run(registers=2)
    with pytest.raises(ValueError, match="mixer='s4'"):
        run(mixer="s4")
    with pytest.raises(ValueError, match="positions='sin'"):
        run(positions="sin")
    with pytest.raises(ValueError, match="has 3 channels"):
        config = DiHConfig(**SIZES)
        DiH(config).apply({"params": random_params(config)}, *inputs(config, size=(8, 8, 4)))
    with pytest.raises(ValueError, match="DiHpp"):
        dih_config_from_fields({"model": "DiHpp-XL/2"})


# ---------------------------------------------------------------- videos


def test_frames_see_the_past_and_texts_what_they_are():
    config = TextVideoDiHConfig(**VIDEO)
    net, params = TextVideoDiH(config), random_params(config)
    x, t, _ = inputs(config)
    context = jnp.float32(np.random.default_rng(2).standard_normal((2, 4, 5)))
    mask = jnp.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    run = lambda x, context, mask, drop=None: apply(
        net, params, x, t, drop=drop, context=context, context_mask=mask
    )
    y = run(x, context, mask)
    later = run(x.at[:, 2:].add(1.0), context, mask)
    np.testing.assert_array_equal(later[:, :2], y[:, :2])
    assert np.abs(later[:, 2:] - y[:, 2:]).max() > 1e-3
    hidden = run(x, jnp.where(mask[..., None] == 0, jnp.nan, context), mask[:, None])
    np.testing.assert_array_equal(hidden, y)
    dropped = run(x, context, mask, jnp.array([True, False]))
    np.testing.assert_array_equal(dropped, run(x, context, mask.at[0].set(0)))
    assert np.abs(dropped[0] - y[0]).max() > 1e-4
    np.testing.assert_array_equal(dropped[1], y[1])
    with pytest.raises(ValueError, match="context_dim=5"):
        run(x, context[..., :3], mask)
    free = TextVideoDiH(dataclasses.replace(config, block_causal=False))
    with pytest.raises(ValueError, match="frames see those that come later"):
        free.apply({"params": params}, x[:, :2], t, 0, None, context=context, method="extend")


# ---------------------------------------------------------------- meshes


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_a_mesh_computes_the_same():
    config = DiHConfig(**SIZES | {"d_model": 64})
    params, args = random_params(config), inputs(config, rows=8)
    net = DiH(config)

    def run(params, *args):
        loss = lambda p: jnp.sum(jnp.sin(net.apply({"params": p}, *args)[0]))
        return jax.value_and_grad(loss)(params)

    want = quick_jit(run)(params, *args)
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    places = parameter_shardings(params, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(places)
    cut = {path_string(path): tuple(s.spec) for path, s in leaves}
    assert cut["blocks/hom/ho_proj/kernel"][-1] == "tensor"
    assert cut["blocks/hom/ag_proj/kernel"][-2] == "tensor"
    with jax.set_mesh(mesh):
        rows = tuple(jax.device_put(a, NamedSharding(mesh, ROWS)) for a in args)
        got = quick_jit(lambda *a: run(*a))(jax.device_put(params, places), *rows)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * np.abs(b).max()),
        jax.device_get(got), jax.device_get(want),
    )  # fmt: skip
