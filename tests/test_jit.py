"""JiT: sizes, start, context tokens, the same numbers however computed, the published layout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lintime.model.convert import jit as layout
from lintime.model.convert.names import flatten
from lintime.model.layers.patches import patchify, unpatchify
from lintime.model.layers.positions import sincos_positions
from lintime.model.nets.jit import (
    Block,
    JiT,
    JiTConfig,
    jit_config,
    jit_process,
    token_positions,
)
from lintime.model.partition import parameter_shardings
from lintime.train.mesh import ROWS, make_mesh
from lintime.train.schema import Mesh
from tests.golden.quick import quick_jit
from tests.tiny import quick

TINY = JiTConfig(
    input_size=8, patch_size=4, bottleneck=6, d_model=16, n_layer=3, n_head=4, mlp_ratio=3.0,
    num_classes=5, context_tokens=2, context_start=1,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


def abstract_params(config):
    x, one = jnp.zeros((1, *config.shape)), jnp.zeros((1,), jnp.int32)
    return jax.eval_shape(JiT(config).init, jax.random.key(0), x, one, one)["params"]


def random_params(config, seed=0):
    """Random numbers, of which none is zero."""
    rng = np.random.default_rng(seed)

    def fill(path, a):
        name = path[-1].key
        numbers = rng.standard_normal(a.shape) / np.sqrt(a.shape[-2] if name == "kernel" else 4)
        return np.asarray(numbers + (name == "g"), a.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract_params(config))


def some_inputs(config, rows=2, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, *config.shape)).astype(np.float32)
    labels = rng.integers(0, config.num_classes, rows)
    return jnp.asarray(x), jnp.asarray(rng.random(rows), jnp.float32), jnp.asarray(labels)


@functools.cache
def gradients(net):
    """Jitted (params, x, t, labels) -> output, and gradient of a weighted sum of it."""

    def objective(params, *inputs):
        out, _ = net.apply({"params": params}, *inputs)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    def run(*args):
        (_, out), gradient = jax.value_and_grad(objective, has_aux=True)(*args)
        return out, gradient

    return quick_jit(run)


def same(got, want, rtol=2e-4):
    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=2e-5 + rtol * float(np.abs(b).max()))

    jax.tree.map(check, jax.device_get(got), jax.device_get(want))


# ---------------------------------------------------------------- sizes and start


def test_published_sizes():
    hidden = {"B": 2048, "L": 2730, "H": 3413}
    for size, width in hidden.items():
        for pixels, patch in ((256, 16), (512, 32)):
            config = jit_config(size, input_size=pixels, patch_size=patch)
            assert (config.d_intermediate, config.tokens) == (width, 256)
    shapes = abstract_params(jit_config("H", num_classes=10))
    assert shapes["blocks"]["mixer"]["qc_proj"]["kernel"].shape == (10, 1280, 1280 + 16)
    assert shapes["context_blocks"]["mlp"]["fc1"]["kernel"].shape == (22, 1280, 2 * 3413)
    assert shapes["x_embedder"]["reduce"]["kernel"].shape == (16 * 16 * 3, 256)
    assert jit_config("L", n_layer=10).n_layer == 10
    with pytest.raises(ValueError, match="choose one of B, L, H"):
        jit_config("XL")
    assert [jit_process(n).noise_scale for n in (256, 512)] == [1.0, 2.0]


def test_defaults_are_base():
    assert jit_config("B") == JiTConfig()


def test_starts_at_zero():
    """Blocks add nothing and the output is 0; what is not zero is spread as it should be."""
    x, t, labels = some_inputs(TINY)
    params = quick_jit(JiT(TINY).init)(jax.random.key(0), x, t, labels)["params"]
    zero = {n for n, a in flatten(params).items() if not np.any(a)}
    stacks = ("blocks", "context_blocks")
    want = {"final/kernel", "final/bias", "x_embedder/expand/bias"}
    want |= {f"{m}/{p}" for m in ("final/modulation",) for p in ("kernel", "bias")}
    want |= {f"t_embedder/{m}/bias" for m in ("fc1", "fc2")}
    of_block = ("modulation/kernel", "modulation/bias", "mlp/fc1/bias", "mlp/fc2/bias")
    want |= {f"{s}/{n}" for s in stacks for n in (*of_block, "mixer/se_bias")}
    assert zero == want
    kernel = params["context_blocks"]["mixer"]["qc_proj"]["kernel"]
    bound = np.sqrt(6 / sum(kernel.shape[1:]))  # xavier
    assert 0.9 * bound < np.abs(kernel).max() <= bound


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch_size": 3}, "patch_size=3 does not divide input_size=8"),
        ({"context_start": 4}, "context_start=4 on, but the blocks are 0..2"),
        ({"context_start": 3}, "set context_tokens=0"),
        ({"n_head": 2}, "divisible by 4"),
        ({"num_classes": 0}, "needs classes"),
    ],
)
def test_sizes_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        abstract_params(dataclasses.replace(TINY, **changes))


# ---------------------------------------------------------------- the net


def by_hand(params, c, x, t, labels):
    """The net as a plain loop over blocks."""
    net = JiT(c)
    time, label = net.apply({"params": params}, t, labels, method="condition")
    r = patchify(x, c.patch_size) @ params["x_embedder"]["reduce"]["kernel"]
    expand = params["x_embedder"]["expand"]
    r = r @ expand["kernel"] + expand["bias"] + sincos_positions(c.d_model, c.grid)
    block = Block(c, jnp.float32)
    for i in range(c.n_layer):
        late = c.context_tokens and i >= c.context_start
        if c.context_tokens and i == c.context_start:
            r = jnp.concatenate([label[:, None] + params["context_positions"], r], axis=1)
        stack, at = ("context_blocks", i - c.context_start) if late else ("blocks", i)
        own = {"params": jax.tree.map(lambda a, at=at: a[at], params[stack])}
        _, vectors = block.apply(own, time + label, method="conditioning")
        r, _ = block.apply(own, r, vectors, token_positions(c, bool(late)))
    r = r[:, -c.tokens :]
    final, silu = params["final"], jax.nn.silu(time + label)
    shift, scale = jnp.split(
        silu @ final["modulation"]["kernel"] + final["modulation"]["bias"], 2, 1
    )
    h = r / jnp.sqrt(1e-6 + jnp.mean(r**2, -1, keepdims=True)) * final["norm"]["g"]
    h = h * (1 + scale[:, None]) + shift[:, None]
    return unpatchify(h @ final["kernel"] + final["bias"], c.patch_size, c.grid)


@pytest.mark.parametrize("changes", [{}, {"context_tokens": 0}, {"context_start": 0}])
def test_is_a_loop_over_blocks(changes):
    config = dataclasses.replace(TINY, **changes)
    params, inputs = random_params(config), some_inputs(config)
    want = quick_jit(lambda p, *a: by_hand(p, config, *a))(params, *inputs)
    same(quick_jit(lambda p, *a: JiT(config).apply({"params": p}, *a)[0])(params, *inputs), want)


def test_blocks_are_shift_scale_gate():
    """Vectors come in DiT's order, and the MLP is silu(first half) * second half."""
    params = random_params(TINY)
    own = jax.tree.map(lambda a: a[0], params["blocks"])
    rng = np.random.default_rng(2)
    r = rng.standard_normal((2, 4, 16)).astype(np.float32)
    vectors = rng.standard_normal((2, 96)).astype(np.float32)
    vectors[:, 32:48] = 0  # the first gate: no mixer
    got, _ = Block(TINY, jnp.float32).apply(
        {"params": own}, r, vectors, token_positions(TINY, False)
    )
    shift, scale, gate = (vectors[:, None, at : at + 16] for at in (48, 64, 80))
    h = r / np.sqrt(1e-6 + np.mean(r**2, -1, keepdims=True)) * own["norm2"]["g"]
    h = (h * (1 + scale) + shift) @ own["mlp"]["fc1"]["kernel"] + own["mlp"]["fc1"]["bias"]
    a, b = np.split(h, 2, axis=-1)
    h = a / (1 + np.exp(-a)) * b
    same(got, r + gate * (h @ own["mlp"]["fc2"]["kernel"] + own["mlp"]["fc2"]["bias"]))


def test_context_lies_at_the_origin():
    at = token_positions(TINY, True)
    assert at.tolist() == [[0, 0], [0, 0], [0, 0], [0, 1], [1, 0], [1, 1]]
    assert token_positions(TINY, False).tolist() == at[2:].tolist()


@pytest.mark.parametrize("options", [{"unroll": True}, {"remat": "full"}])
def test_same_numbers(options):
    params, inputs = random_params(TINY), some_inputs(TINY)
    want = gradients(JiT(TINY))(params, *inputs)
    same(gradients(JiT(TINY, **options))(params, *inputs), want)


def test_bfloat16():
    params, inputs = random_params(TINY), some_inputs(TINY)
    want, _ = gradients(JiT(TINY))(params, *inputs)
    got = quick_jit(lambda p, *a: JiT(TINY, jnp.bfloat16).apply({"params": p}, *a)[0])(
        params, *inputs
    )
    assert got.dtype == jnp.float32
    size = float(jnp.abs(want).max())
    assert 1e-6 * size < float(jnp.abs(got - want).max()) < 0.05 * size


def test_dropped_classes():
    params, (x, t, labels) = random_params(TINY), some_inputs(TINY)
    condition = lambda labels, config=TINY, **options: JiT(config).apply(
        {"params": params}, t, labels, method="condition", **options
    )[1]
    table = params["y_embedder"]["embedding"]
    got = condition(labels, drop=jnp.array([True, False]))
    np.testing.assert_array_equal(got, [table[5], table[labels[1]]])
    always = dataclasses.replace(TINY, class_dropout=1.0)
    drawn = condition(labels, always, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(drawn, [table[5]] * 2)
    never = JiT(dataclasses.replace(TINY, class_dropout=0.0))
    with pytest.raises(ValueError, match="no null class"):
        never.apply({"params": params}, t, labels, method="condition", drop=labels == 0)
    with pytest.raises(ValueError, match=r"images of shape \(4, 8, 3\)"):
        JiT(TINY).apply({"params": params}, x[:, :4], t, labels)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_sharded_equals_one_device():
    params, inputs = random_params(TINY), some_inputs(TINY, rows=8)
    want = gradients(JiT(TINY))(params, *inputs)
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        args = (jax.device_put(params, parameter_shardings(params, mesh)),)
        args += tuple(jax.device_put(a, NamedSharding(mesh, ROWS)) for a in inputs)
        got = gradients.__wrapped__(JiT(TINY))(*args)  # compiled for this mesh
    same(got, want)


# ---------------------------------------------------------------- the published layout

LAYOUTS = {
    "as published": {},
    "no context": {"context_tokens": 0, "context_start": 0},
    "context at once": {"context_start": 0},
    "groups": {"groups": 2, "n_head": 1, "expand": 2, "degree": 2, "mlp_ratio": 2.5},
}


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_there_and_back(changes):
    config = dataclasses.replace(TINY, **changes)
    params = random_params(config)
    flat = layout.jit_to_reference(params, config)
    assert layout.jit_config_from_reference(flat, context_start=config.context_start) == config
    named = {f"denoiser.net._orig_mod.{n}": a for n, a in flat.items()} | {"denoiser.step": 1}
    back = layout.jit_from_reference(layout.bare_names(named), config)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert layout.bare_names(flat) == flat


def test_layout_of_a_patch():
    """Weights are (out, channel, row, column); a context is (1, n, D)."""
    params = random_params(TINY)
    flat = layout.jit_to_reference(params, TINY)
    kernel = params["x_embedder"]["reduce"]["kernel"].reshape(4, 4, 3, 6)
    assert flat["x_embedder.proj1.weight"][5, 2, 1, 3] == kernel[1, 3, 2, 5]
    assert flat["in_context_posemb"].shape == (1, 2, 16)
    gains = params["context_blocks"]["norm1"]["g"]
    np.testing.assert_array_equal(flat["blocks.2.norm1.weight"], gains[1])


def test_averages_are_lists():
    flat = layout.jit_to_reference(random_params(TINY), TINY)
    tables = ("_cos", "_sin")
    averages = [a + 1 for n, a in flat.items() if not n.endswith(tables)]
    shuffled = dict(sorted(flat.items()))  # files may have another order
    named = layout.average_by_name(averages, shuffled, TINY)
    assert set(flat) - set(named) == {n for n in flat if n.endswith(tables)}
    for name, a in named.items():
        np.testing.assert_array_equal(a, flat[name] + 1)
    with pytest.raises(ValueError, match="has 50 arrays, the net 51 parameters"):
        layout.average_by_name(averages[1:], flat, TINY)
    with pytest.raises(ValueError, match="has shape"):
        layout.average_by_name(averages[::-1], flat, TINY)


def test_layout_refused():
    flat = layout.jit_to_reference(random_params(TINY), TINY)
    load = lambda config=TINY, **changes: layout.jit_from_reference(flat | changes, config)
    with pytest.raises(ValueError, match="differs from the computed table by"):
        load(pos_embed=flat["pos_embed"] + 0.1)
    with pytest.raises(ValueError, match="another resolution than net.input_size=16"):
        load(dataclasses.replace(TINY, input_size=16))
    with pytest.raises(ValueError, match="3 blocks, the config n_layer=4"):
        load(dataclasses.replace(TINY, n_layer=4))
    with pytest.raises(ValueError, match="unknown extra"):
        load(extra=np.zeros(1))
    with pytest.raises(ValueError, match="y_embedder/embedding has shape"):
        load(dataclasses.replace(TINY, num_classes=6))
    with pytest.raises(ValueError, match="not the table of rope_base"):
        load(dataclasses.replace(TINY, rope_base=100.0))
    with pytest.raises(ValueError, match="do not tell net.context_start"):
        layout.jit_config_from_reference(flat)
    with pytest.raises(ValueError, match="not the JiT layout"):
        layout.jit_config_from_reference({})
