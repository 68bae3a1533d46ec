"""FlexiDiT: modes of one tree, what they keep of the DiT, adapters, layout, objectives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.model.convert.flexidit import flexidit_from_reference, flexidit_to_reference
from lintime.model.layers.flexible import (
    embedding_projection,
    lift_deembedding,
    lift_embedding,
    resize_1d,
    resize_deembedding,
    resize_embedding,
    resize_matrix,
)
from lintime.model.layers.patches import patchify, unpatchify
from lintime.model.nets.dit import DiT, DiTConfig
from lintime.model.nets.flexidit import (
    POM_TARGETS,
    FlexiDiTConfig,
    check_config,
    flexible_denoiser,
    flexify,
    init_params,
    materialise,
    merge_lora,
    mode_config,
    mode_flops,
    mode_params,
    unmerge_lora,
)
from lintime.model.processes.flexible import distillation_loss, draw_mode, mmd, mode_mixture
from lintime.model.processes.gaussian import GaussianDiffusion
from lintime.model.sampling.budget import plan
from lintime.model.sampling.classes import row_keys
from lintime.model.sampling.diffusion import Segment, make_diffusion_sampler
from tests.golden.quick import quick_jit
from tests.tiny_dit import random_params

BASE = DiTConfig(
    input_size=8, patch_size=2, in_channels=2, d_model=16, n_layer=2, n_head=2, num_classes=3
)
SHARED = FlexiDiTConfig(base=BASE, patch_sizes=(1, 2, 4))
LORA = FlexiDiTConfig(base=BASE, patch_sizes=(2, 4), variant="lora", rank=3, alpha=6.0)


def noisy(tree, seed):
    """Every parameter moved, so that nothing stays at zero."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + np.float32(0.1 * draw.normal(size=a.shape)), tree)


@pytest.fixture(scope="module")
def dit():
    x, t, y = inputs()
    shapes = jax.eval_shape(DiT(BASE).init, jax.random.key(0), x, t, y)["params"]
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), shapes)
    return jax.tree.map(jnp.asarray, noisy(zeros, 1))


def inputs():
    x = jax.random.normal(jax.random.key(2), (2, 8, 8, 2))
    return x, jnp.asarray([3, 700]), jnp.asarray([0, 3])


def run(config, params, patch):
    net = DiT(mode_config(config, patch))
    whole = lambda params: net.apply({"params": mode_params(config, params, patch)}, *inputs())[0]
    return quick_jit(whole)(params)


def plain(params):
    return quick_jit(lambda params: DiT(BASE).apply({"params": params}, *inputs())[0])(params)


# ---------------------------------------------------------------- matrices


def test_area_is_the_mean_of_what_a_pixel_covers():
    np.testing.assert_allclose(resize_1d(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(resize_1d(3, 2), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]])
    np.testing.assert_allclose(resize_1d(1, 3), np.ones((3, 1)))


@pytest.mark.parametrize("method", ["area", "bilinear"])
@pytest.mark.parametrize("old, new", [(4, 2), (8, 3), (2, 4), (3, 3), (8, 1)])
def test_resizing_keeps_constants(old, new, method):
    np.testing.assert_allclose(resize_1d(old, new, method).sum(axis=1), 1, atol=1e-14)


def test_area_and_bilinear_agree_at_a_factor_of_two_only():
    np.testing.assert_allclose(resize_1d(8, 4), resize_1d(8, 4, "bilinear"), atol=1e-15)
    assert np.abs(resize_1d(4, 1) - resize_1d(4, 1, "bilinear")).max() > 0.2


def test_embeddings_sum_where_pixels_average():
    np.testing.assert_allclose(
        embedding_projection((4, 4), (2, 2)), 4 * resize_matrix((4, 4), (2, 2)), atol=1e-12
    )


@pytest.mark.parametrize(
    "star, patch", [((4, 4), (2, 2)), ((8, 8), (4, 2)), ((2, 4, 4), (1, 2, 2))]
)
@pytest.mark.parametrize("method", ["area", "bilinear"])
def test_lifting_and_resizing_is_the_identity(star, patch, method):
    kernel = np.random.default_rng(0).normal(size=(np.prod(patch) * 3, 5))
    there = lift_embedding(kernel, star, patch, method)
    np.testing.assert_allclose(resize_embedding(there, star, patch, method), kernel, atol=1e-12)
    there = lift_deembedding(kernel.T, star, patch, method)
    np.testing.assert_allclose(resize_deembedding(there, star, patch, method), kernel.T, atol=1e-12)


def test_matrix_errors():
    with pytest.raises(ValueError, match="choose one of area, bilinear"):
        resize_1d(4, 2, "cubic")
    with pytest.raises(ValueError, match="different numbers of axes"):
        resize_matrix((2, 2), (2, 2, 2))
    with pytest.raises(ValueError, match="no 9 pixels along axis 0"):
        resize_embedding(np.zeros((16, 5)), (3, 3), (2, 2))


def test_patches_of_videos():
    x = jnp.arange(2 * 4 * 4 * 6 * 3.0).reshape(2, 4, 4, 6, 3)
    tokens = patchify(x, (2, 2, 3))
    assert tokens.shape == (2, 8, 36)
    np.testing.assert_array_equal(tokens[1, 5].reshape(2, 2, 3, 3), x[1, 2:4, 0:2, 3:6])
    np.testing.assert_array_equal(unpatchify(tokens, (2, 2, 3), (2, 2, 2)), x)
    with pytest.raises(ValueError, match="patches of 3x2x3 do not divide a video of 4 x 4 x 6"):
        patchify(x, (3, 2, 3))


# ---------------------------------------------------------------- modes


def test_shared_mode_of_the_base_is_the_base_when_made(dit):
    params = flexify(SHARED, dit, jax.random.key(0))
    np.testing.assert_allclose(run(SHARED, params, 2), plain(dit), atol=1e-5)


@pytest.mark.parametrize("resize", ["area", "bilinear"])
def test_underlying_patches_beyond_the_largest(dit, resize):
    config = dataclasses.replace(SHARED, patch_sizes=(2, 4), underlying=8, resize=resize)
    params = flexify(config, dit, jax.random.key(0))
    assert params["x_embedder"]["kernel"].shape == (8 * 8 * 2, 16)
    np.testing.assert_allclose(run(config, params, 2), plain(dit), atol=1e-5)


def test_lora_mode_of_the_base_is_the_base_bit_for_bit(dit):
    params = flexify(LORA, dit, jax.random.key(0))
    params = {**params, "modes": noisy(params["modes"], 3)}
    np.testing.assert_array_equal(run(LORA, params, 2), plain(dit))


def test_a_weak_token_starts_as_that_of_the_image_shrunk(dit):
    for config in (SHARED, LORA):
        own = mode_params(config, flexify(config, dit, jax.random.key(0)), 4)
        x = inputs()[0]
        coarse = patchify(x, 4) @ own["x_embedder"]["kernel"]
        shrunk = x.reshape(2, 4, 2, 4, 2, 2).mean(axis=(2, 4))
        fine = patchify(shrunk, 2) @ dit["x_embedder"]["kernel"]
        np.testing.assert_allclose(coarse, fine, atol=1e-5)
        # and each value that the base predicts is repeated over a block of pixels
        out = own["final"]["kernel"].reshape(16, 4, 4, 4)
        base = dit["final"]["kernel"].reshape(16, 2, 2, 4)
        np.testing.assert_allclose(out, base.repeat(2, axis=1).repeat(2, axis=2), atol=1e-6)


@pytest.mark.parametrize("config", [SHARED, LORA], ids=["shared", "lora"])
def test_every_mode_runs_and_depends_on_its_own_embedding(dit, config):
    params = noisy(flexify(config, dit, jax.random.key(0)), 4)
    for p in config.patch_sizes:
        assert run(config, params, p).shape == (2, 8, 8, 4)
    tree = params["patch_size_embed"] if config is SHARED else params["modes"]
    assert sorted(tree) == [f"p{p}" for p in config.others]  # none for the base
    shift = tree["p4"] if config is SHARED else tree["p4"]["patch_size_embed"]
    own = mode_params(config, params, 4)
    embed = params["x_embedder"] if config is SHARED else params["modes"]["p4"]["x_embedder"]
    np.testing.assert_allclose(own["x_embedder"]["bias"], embed["bias"] + shift)


def test_positions_count_in_patches_of_the_base():
    config = mode_config(SHARED, 4)
    assert (config.patch_size, config.base_patch) == (4, 2)
    assert mode_config(SHARED, 2).base_patch == 2


def test_smaller_patches_than_the_base_with_adapters(dit):
    config = dataclasses.replace(LORA, patch_sizes=(1, 2))
    params = flexify(config, dit, jax.random.key(0))
    assert params["modes"]["p1"]["x_embedder"]["kernel"].shape == (2, 16)
    assert jnp.isfinite(run(config, params, 1)).all()


# ---------------------------------------------------------------- adapters


def test_merged_blocks_compute_the_unmerged_sum(dit):
    params = noisy(flexify(LORA, dit, jax.random.key(0)), 5)
    merged = merge_lora(LORA, params["base"]["blocks"], params["modes"]["p4"]["lora"])
    x = jax.random.normal(jax.random.key(6), (7, 16))
    for layer in range(2):
        pair = params["modes"]["p4"]["lora"]["attn"]["qkv"]
        kernel = params["base"]["blocks"]["attn"]["qkv"]["kernel"][layer]
        apart = x @ kernel + 6.0 / 3 * ((x @ pair["A"][layer]) @ pair["B"][layer])
        np.testing.assert_allclose(x @ merged["attn"]["qkv"]["kernel"][layer], apart, atol=1e-5)
    back = unmerge_lora(LORA, merged, params["modes"]["p4"]["lora"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, params["base"]["blocks"]
    )


def test_merging_once_is_merging_in_every_call(dit):
    params = noisy(flexify(LORA, dit, jax.random.key(0)), 5)
    denoise = flexible_denoiser(LORA)
    once = quick_jit(lambda modes: denoise(modes, *inputs(), 4))(materialise(LORA, params))
    np.testing.assert_allclose(once, run(LORA, params, 4), atol=1e-5)


def test_modes_share_what_is_not_theirs(dit):
    modes = materialise(SHARED, flexify(SHARED, dit, jax.random.key(0)))
    assert modes[4]["blocks"]["mlp"]["fc1"]["kernel"] is dit["blocks"]["mlp"]["fc1"]["kernel"]


def test_adapters_start_without_effect_but_can_learn(dit):
    lora = flexify(LORA, dit, jax.random.key(0))["modes"]["p4"]["lora"]
    assert not lora["mlp"]["fc1"]["B"].any() and lora["mlp"]["fc1"]["B"].shape == (2, 3, 64)
    a = lora["mlp"]["fc2"]["A"]
    assert a.shape == (2, 64, 3) and 0.1 < jnp.abs(a).max() <= 1 / 8
    assert not jnp.array_equal(lora["attn"]["qkv"]["A"], lora["attn"]["proj"]["A"])


def test_gradients_reach_adapters_only(dit):
    params = noisy(flexify(LORA, dit, jax.random.key(0)), 7)
    net = DiT(mode_config(LORA, 4))
    out = lambda params: net.apply({"params": mode_params(LORA, params, 4)}, *inputs())[0]
    grads = quick_jit(jax.grad(lambda params: jnp.sum(out(params) ** 2)))(params)
    grads = jax.device_get(grads)
    assert not any(np.any(a != 0) for a in jax.tree.leaves(grads["base"]))
    assert all(np.any(a != 0) for a in jax.tree.leaves(grads["modes"]))


# ---------------------------------------------------------------- samplers


def sample(denoise, variables, segments, method="ddim", guidance=2.0):
    sampler = make_diffusion_sampler(
        denoise, GaussianDiffusion(), method=method, segments=segments, shape=(8, 8, 2),
        guidance_channels=0, null_label=3,
    )  # fmt: skip
    keys = row_keys(jax.random.key(0), 2)
    return quick_jit(lambda v: sampler(v, keys, jnp.asarray([0, 1]), guidance=guidance))(variables)


def test_no_weak_steps_is_the_plain_sampler_bit_for_bit(dit):
    params = flexify(LORA, dit, jax.random.key(0))
    segments = plan(3, mode_flops(LORA), weak_steps=0, weak=4, powerful=2)
    got = sample(flexible_denoiser(LORA), materialise(LORA, params), segments)
    alone = lambda params, x, t, labels, mode: DiT(BASE).apply({"params": params}, x, t, labels)[0]
    np.testing.assert_array_equal(got, sample(alone, dit, (Segment(steps=3),)))


@pytest.mark.parametrize("guidance", ["cfg", "weak_uncond", "weak_cond", "none"])
def test_every_step_calls_the_modes_of_its_segment(guidance):
    """Denoisers that answer with their mode and label: what is mixed shows in the image."""
    calls = []

    def denoise(variables, x, t, labels, mode):
        calls.append((mode, len(labels)))
        return jnp.zeros((*x.shape[:-1], 2 * x.shape[-1])) + 0.1 * variables[mode]

    segments = plan(4, {2: 4.0, 4: 1.0}, levels=[(4, 1)], weak=4, powerful=2, guidance=guidance)
    out = sample(denoise, {2: jnp.ones(()), 4: -jnp.ones(())}, segments)
    assert jnp.isfinite(out).all()
    weak = [(4, 2)] if guidance == "none" else [(4, 4)]
    powerful = {"cfg": [(2, 4)], "none": [(2, 2)]}.get(guidance, [(2, 2), (4, 2)])
    assert list(dict.fromkeys(calls)) == list(dict.fromkeys(weak + powerful))


@pytest.mark.parametrize("method", ["ddpm", "dpm++2m", "heun"])
def test_solvers_take_any_list_of_modes(dit, method):
    params = noisy(flexify(LORA, dit, jax.random.key(0)), 9)
    modes = materialise(LORA, params)
    both = plan(3, mode_flops(LORA), modes=[4, 2, 4], weak=4, powerful=2, guidance="none")
    out = sample(flexible_denoiser(LORA), modes, both, method, None)
    weak = plan(3, mode_flops(LORA), weak_steps=3, weak=4, powerful=2, guidance="none")
    other = sample(flexible_denoiser(LORA), modes, weak, method, None)
    assert jnp.isfinite(out).all() and jnp.abs(out - other).max() > 1e-3


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize("config", [SHARED, LORA], ids=["shared", "lora"])
def test_layout_there_and_back(dit, config):
    params = jax.tree.map(np.asarray, noisy(flexify(config, dit, jax.random.key(0)), 8))
    flat = flexidit_to_reference(params, config)
    assert "patch_size_embed.4" in flat or "modes.4.lora.blocks.1.attn.qkv.A" in flat
    jax.tree.map(np.testing.assert_array_equal, flexidit_from_reference(flat, config), params)


def test_layout_errors(dit):
    shared = flexidit_to_reference(flexify(SHARED, dit, jax.random.key(0)), SHARED)
    lora = flexidit_to_reference(flexify(LORA, dit, jax.random.key(0)), LORA)
    with pytest.raises(ValueError, match="missing patch_size_embed.1"):
        flexidit_from_reference({n: a for n, a in shared.items() if n[-2:] != ".1"}, SHARED)
    with pytest.raises(ValueError, match="missing x_embedder.flex.weight"):
        flexidit_from_reference({"patch_size_embed.1": 0, "patch_size_embed.4": 0}, SHARED)
    with pytest.raises(ValueError, match=r"modes.4.\*: missing lora.blocks.0.attn.qkv.A"):
        cut = {n: a for n, a in lora.items() if not n.endswith("0.attn.qkv.A")}
        flexidit_from_reference(cut, LORA)
    with pytest.raises(ValueError, match="but the file has modes.4"):
        flexidit_from_reference(lora, dataclasses.replace(LORA, patch_sizes=(2,)))
    with pytest.raises(ValueError, match="lora/attn/proj/A has shape"):
        flexidit_from_reference(lora, dataclasses.replace(LORA, rank=4))


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    "change, message",
    [
        ({"patch_sizes": (4, 8)}, "lack 2, the patch size of the base"),
        ({"patch_sizes": (2, 3)}, "patch size 3 does not divide input_size=8; 1, 2, 4, 8 do"),
        ({"patch_sizes": (2, 2)}, "named once"),
        ({"variant": "both"}, "choose one of shared, lora"),
        ({"resize": "cubic"}, "choose one of area, bilinear"),
        ({"underlying": 2}, "underlying=2: it is at least the largest patch size 4"),
        ({"variant": "lora", "rank": 0}, "rank=0"),
    ],
)
def test_configs_that_cannot_be(change, message):
    config = dataclasses.replace(SHARED, **change)
    with pytest.raises(ValueError, match=message):
        mode_config(config, 2)


def test_other_errors(dit):
    with pytest.raises(ValueError, match="no mode of patch size 8; there are 1, 2, 4"):
        mode_config(SHARED, 8)
    with pytest.raises(ValueError, match="no kernel attn.key in a block; there are attn.proj"):
        flexify(dataclasses.replace(LORA, targets=("attn.key",)), dit, jax.random.key(0))
    wrong = dataclasses.replace(BASE, patch_size=4)
    with pytest.raises(
        ValueError, match=r"has shape \(8, 16\), base.patch_size=4 needs \(32, 16\)"
    ):
        flexify(dataclasses.replace(SHARED, base=wrong), dit, jax.random.key(0))
    with pytest.raises(ValueError, match="no mode of patch size 3"):
        flexible_denoiser(SHARED)({}, *inputs(), 3)


def test_adapters_on_other_mixers():
    base = dataclasses.replace(
        BASE, mixer="mamba1", d_state=4, d_model=16, mlp_ratio=2.0, n_layer=1
    )
    config = dataclasses.replace(LORA, base=base, targets=("mlp.fc1", "mlp.fc2"))
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert params["modes"]["p4"]["lora"]["mlp"]["fc1"]["A"].shape == (1, 16, 3)


def test_adapters_on_pom():
    """Both projections have adapters; the base's own mode is the base, the other learns them."""
    base = dataclasses.replace(BASE, mixer="pom", rope="2d", n_head=4, d_model=16, n_layer=1)
    config = dataclasses.replace(LORA, base=base, targets=POM_TARGETS)
    with pytest.raises(ValueError, match="mixer=pom has no attention; set targets=mixer.qc_proj,"):
        check_config(dataclasses.replace(config, targets=LORA.targets))
    own = random_params(base)
    params = quick_jit(lambda own: flexify(config, own, jax.random.key(0)))(own)
    lora = params["modes"]["p4"]["lora"]["mixer"]
    assert lora["qc_proj"]["B"].shape == (1, 3, 32 + 4) and lora["ag_proj"]["A"].shape == (1, 32, 3)
    want = quick_jit(lambda own: DiT(base).apply({"params": own}, *inputs())[0])(own)
    np.testing.assert_array_equal(run(config, params, 2), want)
    weak = lambda params: DiT(mode_config(config, 4)).apply(
        {"params": mode_params(config, params, 4)}, *inputs()
    )[0]
    gradient = quick_jit(jax.grad(lambda params: jnp.sum(jnp.sin(weak(params)))))(params)
    found = gradient["modes"]["p4"]["lora"]["mixer"]
    assert all(np.abs(found[name]["B"]).max() > 0 for name in ("qc_proj", "ag_proj"))
    assert not any(np.any(a) for a in jax.tree.leaves(gradient["base"]))


# ---------------------------------------------------------------- objectives


def test_modes_are_drawn_by_step_alone():
    mixture = mode_mixture((2, 4, 8), 2, "shared")
    assert mixture == {2: 0.5, 4: 0.25, 8: 0.25}
    assert mode_mixture((2, 4, 8), 2, "lora") == {4: 0.5, 8: 0.5}
    drawn = [draw_mode(mixture, 0, step) for step in range(400)]
    assert drawn == [draw_mode(mixture, 0, step) for step in range(400)]
    assert drawn != [draw_mode(mixture, 1, step) for step in range(400)]
    shares = [drawn.count(p) / 400 for p in (2, 4, 8)]
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.25], atol=0.07)
    with pytest.raises(ValueError, match="no mode besides the base"):
        mode_mixture((2,), 2, "lora")


def test_distillation_without_variances_and_with():
    weak, powerful = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 6))
    loss, parts = distillation_loss(weak, powerful, 6)
    assert set(parts) == {"distill_eps"} and loss.shape == (3,)
    loss, parts = distillation_loss(weak, powerful, 3, variance_weight=2.0)
    np.testing.assert_allclose(loss, parts["distill_eps"] + 2 * parts["distill_var"])
    with pytest.raises(ValueError, match="cannot be compared"):
        distillation_loss(weak, powerful[:1], 3)


@pytest.mark.parametrize("kernel, median", [("poly3", False), ("rbf", False), ("rbf", True)])
def test_mmd_tells_distributions_apart(kernel, median):
    x, y = jax.random.normal(jax.random.key(0), (2, 64, 4))
    same, other = mmd(x, y, kernel, median=median), mmd(x, y + 1, kernel, median=median)
    assert abs(same) < 0.2 * other
    if median:  # of distances: no unit matters
        np.testing.assert_allclose(mmd(9 * x, 9 * y + 9, kernel, median=True), other, rtol=1e-3)
    grad = jax.grad(lambda x: mmd(x, y + 1, kernel, median=median))(x)
    assert jnp.isfinite(grad).all() and (grad.sum(0) < 0).all()  # x moves towards y


def test_mmd_errors():
    with pytest.raises(ValueError, match="choose one of poly3, rbf"):
        mmd(jnp.ones((2, 3)), jnp.ones((2, 3)), "linear")
    with pytest.raises(ValueError, match="two rows of each"):
        mmd(jnp.ones((1, 3)), jnp.ones((2, 3)))
