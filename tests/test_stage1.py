"""What trains a tokenizer: discriminator, LPIPS, the losses, and all of them in one."""

import contextlib
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lintime.kernels_pallas.compat import set_mesh
from lintime.model.convert import lpips as lpips_layout
from lintime.model.convert.vq_tokenizer import (
    discriminator_from_reference,
    discriminator_to_reference,
)
from lintime.model.nets import lpips as lpips_net
from lintime.model.nets.lpips import LPIPS, lpips_head
from lintime.model.nets.patchgan import BatchNorm, PatchGAN
from lintime.model.nets.vq_tokenizer import VQTokenizer, VQTokenizerConfig
from lintime.model.processes import adversarial
from lintime.model.processes.adversarial import AdversarialReconstruction, stage1_loss
from lintime.train.mesh import make_mesh
from lintime.train.schema import Mesh
from tests.conversion import random_arrays
from tests.tiny import assert_close, assert_same, quick


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---------------------------------------------------------------- discriminator

GAN = PatchGAN(features=4, layers=2)


@pytest.fixture(scope="module")
def gan():
    """Variables of `GAN`, their running statistics moved away from 0 and 1."""
    variables = jax.jit(GAN.init)(jax.random.key(0), jnp.zeros((1, 12, 12, 3)))
    return jax.tree.map(lambda a: np.asarray(a + 0.1 * np.abs(draw(*a.shape))), variables)


def judge(variables, images):
    logits, new = GAN.apply(variables, images, mutable=["batch_stats"])
    return logits, new["batch_stats"]


def plain_gan(variables, images, running):
    """`GAN` in NumPy (convolutions apart), with the statistics of the batch or running ones."""
    params, x, means = variables["params"], images, {}
    for i in range(4):
        layer = params[f"conv_{i}"]
        stride = 2 if i < 2 else 1
        x = lax.conv_general_dilated(
            x, layer["kernel"], (stride, stride), ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        x = np.asarray(x) + layer.get("bias", 0)
        if f"norm_{i}" in params:
            norm, stats = params[f"norm_{i}"], variables["batch_stats"][f"norm_{i}"]
            rows = x.reshape(-1, x.shape[-1])
            mean, var = (stats["mean"], stats["var"]) if running else (rows.mean(0), rows.var(0))
            means[f"norm_{i}"] = {
                "mean": 0.9 * stats["mean"] + 0.1 * rows.mean(0),
                "var": 0.9 * stats["var"] + 0.1 * rows.var(0, ddof=1),
            }
            x = (x - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
        if i < 3:
            x = np.where(x > 0, x, 0.2 * x)
    return x, means


def test_the_discriminator_and_its_statistics(gan):
    images = draw(3, 12, 16, 3)
    logits, stats = jax.jit(judge)(gan, images)
    want, moved = plain_gan(gan, images, running=False)
    assert logits.shape == (3, 1, 2, 1) and logits.dtype == jnp.float32
    assert_close(logits, want)
    assert_close(stats, moved)
    assert_close(jax.jit(GAN.apply)(gan, images), plain_gan(gan, images, running=True)[0])
    half = jax.jit(GAN.clone(dtype=jnp.bfloat16).apply)(gan, images)
    assert half.dtype == jnp.float32
    assert_close(half, plain_gan(gan, images, running=True)[0], rtol=0.05, atol=0.05)


def test_the_released_discriminator():
    net = PatchGAN()
    variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 24, 24, 3)))
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(variables["params"])) == 2_765_633
    shapes = {n: a.shape for n, a in jax.eval_shape(discriminator_to_reference, variables).items()}
    want = {"main.0.weight": (64, 3, 4, 4), "main.0.bias": (64,), "main.11.bias": (1,)}
    convolutions = {2: (128, 64), 5: (256, 128), 8: (512, 256), 11: (1, 512)}
    want |= {f"main.{i}.weight": (*s, 4, 4) for i, s in convolutions.items()}
    for i, width in ((3, 128), (6, 256), (9, 512)):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            want[f"main.{i}.{leaf}"] = (width,)
    assert shapes == want


def test_layouts_of_the_discriminator(gan):
    flat = discriminator_to_reference(gan)
    counters = {"main.3.num_batches_tracked": np.int64(7)}
    assert_same(discriminator_from_reference(flat | counters), gan)
    inside = {f"discriminator/{n}": a for n, a in flat.items()} | {"model/x": np.zeros(1)}
    assert_same(discriminator_from_reference(inside), gan)
    with pytest.raises(ValueError, match="missing main.6.bias"):
        discriminator_from_reference({n: a for n, a in flat.items() if n != "main.6.bias"})
    with pytest.raises(ValueError, match="12x11 pixels are too small.*2 layers.*needs 12"):
        jax.eval_shape(GAN.apply, gan, jnp.zeros((1, 12, 11, 3)))
    with pytest.raises(ValueError, match="0 layers; it needs at least 1"):
        jax.eval_shape(PatchGAN(layers=0).apply, gan, jnp.zeros((1, 12, 12, 3)))


def test_batch_norm_of_a_sharded_batch_is_global():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    x = draw(8, 2, 2, 3) + np.arange(8, dtype=np.float32)[:, None, None, None]
    variables = BatchNorm().init(jax.random.key(0), x)
    run = jax.jit(lambda x: BatchNorm().apply(variables, x, mutable=["batch_stats"]))
    want = run(x)
    mesh = make_mesh(Mesh(data=8))
    with set_mesh(mesh):
        got = run(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    assert_close(got, want)


# ---------------------------------------------------------------- LPIPS


@pytest.fixture(scope="module")
def vgg():
    """Random weights under the published names, of a size that keeps features in range."""
    arrays = random_arrays(lpips_layout.lpips_shapes())
    fan_in = lambda a: max(1, a[0].size) if a.ndim == 4 and a.shape[0] > 1 else 25
    return {n: np.abs(a) if "lin" in n else a / fan_in(a) ** 0.5 for n, a in arrays.items()}


def test_lpips_has_the_published_sizes(vgg):
    assert sum(a.size for n, a in vgg.items() if n.startswith("features")) == 14_714_688
    convolutions = {int(n.split(".")[1]) for n in vgg if n.startswith("features")}
    assert convolutions == {0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28}
    image = jnp.zeros((1, 16, 16, 3))
    wanted = jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"]
    params = lpips_layout.lpips_from_reference(vgg)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda a: a.shape, wanted)
    assert_same(lpips_layout.lpips_to_reference(params), vgg)


def test_lpips_against_its_definition(vgg):
    a, b = draw(2, 16, 16, 3), draw(2, 16, 16, 3, seed=1)

    def features(x):
        shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
        x = ((x - shift) / scale).astype(np.float32).transpose(0, 3, 1, 2)
        out = []
        for index in range(30):  # torchvision's numbers: 13 convolutions, ReLUs, 4 poolings
            if index in (4, 9, 16, 23):
                rows, columns = x.shape[2] // 2, x.shape[3] // 2
                x = x.reshape(*x.shape[:2], rows, 2, columns, 2).max((3, 5))
            elif f"features.{index}.weight" in vgg:
                x = lax.conv(x, vgg[f"features.{index}.weight"], (1, 1), "SAME")
                x = np.asarray(x) + vgg[f"features.{index}.bias"][:, None, None]
            else:
                x = np.maximum(x, 0)
            if index in (3, 8, 15, 22, 29):
                out.append(x / (np.sqrt((x**2).sum(1, keepdims=True)) + 1e-10))
        return out

    want = 0
    for k, (x, y) in enumerate(zip(features(a), features(b))):
        w = vgg[f"lin{k}.model.1.weight"][0]
        want = want + (((x - y) ** 2) * w).sum(1).mean((1, 2))
    params = lpips_layout.lpips_from_reference(vgg)
    distance = jax.jit(LPIPS().apply)
    got = distance({"params": params}, a, b)
    assert got.shape == (2,) and got.min() > 0.01
    assert_close(got, want, rtol=1e-3)
    assert_close(distance({"params": params}, a, a), np.zeros(2))
    with pytest.raises(ValueError, match="at least 16 pixels"):
        distance({"params": params}, a[:, :8], b[:, :8])


def test_lpips_gradient_is_finite_where_no_channel_is_active():
    dead = [jnp.zeros((1, 2, 2, 3))]
    other = [jnp.ones((1, 2, 2, 3))]
    value, gradient = jax.value_and_grad(lambda x: lpips_head(x, other, [jnp.ones(3)])[0])(dead)
    assert value == pytest.approx(1.0)
    assert np.isfinite(gradient[0]).all()


def test_lpips_weights_come_in_several_files(vgg):
    params = lpips_layout.lpips_from_reference(vgg)
    whole = {}  # the names of a whole LPIPS module
    for name, array in vgg.items():
        name = re.sub(r"features\.(\d+)", lambda m: f"net.slice{1 + int(m[1]) // 7}.{m[1]}", name)
        whole[f"perceptual_loss.{name}"] = array
    whole["perceptual_loss.scaling_layer.scale"] = np.array([0.458, 0.448, 0.450])[None, :, None]
    linear = {n: a for n, a in vgg.items() if n.startswith("lin")}
    listed = {n.replace("lin", "lins.", 1): a for n, a in linear.items()}
    rest = {n: a for n, a in vgg.items() if n not in linear}
    classifier = {"classifier.0.weight": np.zeros((2, 2))}
    for flat in (whole, rest | classifier | listed):
        assert_same(lpips_layout.lpips_from_reference(flat), params)
    with pytest.raises(ValueError, match="no linear weights of LPIPS.*vgg.pth"):
        lpips_layout.lpips_from_reference(rest)
    with pytest.raises(ValueError, match="no VGG16.*torchvision"):
        lpips_layout.lpips_from_reference(linear)
    with pytest.raises(ValueError, match="missing features.28.bias"):
        lpips_layout.lpips_from_reference({n: a for n, a in vgg.items() if n[-7:] != "28.bias"})
    with pytest.raises(ValueError, match="scaling_layer.shift is"):
        lpips_layout.lpips_from_reference(vgg | {"scaling_layer.shift": np.zeros((1, 3, 1, 1))})


# ---------------------------------------------------------------- single losses


def test_codebook_losses_and_their_gradients():
    z, z_q = draw(2, 3, 2, 4), draw(2, 3, 2, 4, seed=1)
    error = np.mean((z_q - z) ** 2)
    assert_close(adversarial.codebook_losses(z, z_q), (error, error))
    slope = 2 * (z_q - z) / z.size
    zero = np.zeros_like(z)
    for number, want in ((0, (zero, slope)), (1, (-slope, zero))):
        value = lambda z, z_q, number=number: adversarial.codebook_losses(z, z_q)[number]
        assert_close(jax.grad(value, argnums=(0, 1))(z, z_q), want, atol=1e-7)


@pytest.mark.parametrize("max_distances", [1, 2 * 2 * 7, 10**6])
def test_entropy_loss(max_distances):
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    z, codebook = 0.1 * unit(draw(2, 3, 1, 4)), 0.1 * unit(draw(7, 4, seed=1))

    def plain(z, codebook):
        z = z.reshape(-1, 4)
        distance = jnp.sum((z[:, None] - codebook) ** 2, axis=-1)
        p = jax.nn.softmax(-distance / 0.01)
        each = -jnp.sum(p * jax.nn.log_softmax(-distance / 0.01 + 1e-5), axis=1)
        mean = jnp.mean(p, axis=0)
        return jnp.mean(each) + jnp.sum(mean * jnp.log(mean + 1e-5))

    pieces = lambda z, c: adversarial.entropy_loss(z, c, max_distances=max_distances)
    both = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(z, codebook)
    (got, gradients), (want, wanted) = both(pieces), both(plain)
    assert -1.9 < got < -0.1
    assert_close(got, want)
    assert_close(gradients, wanted, rtol=1e-3, atol=1e-3)
    direction = draw(2, 3, 1, 4, seed=2)
    ends = [pieces(z + step * direction, codebook) for step in (1e-3, -1e-3)]
    assert_close((ends[0] - ends[1]) / 2e-3, np.sum(gradients[0] * direction), rtol=2e-2)


def test_adversarial_losses():
    real, fake = draw(3, 2), draw(3, 2, seed=1)
    bce = lambda logit, target: (
        -np.mean(
            target * np.log(1 / (1 + np.exp(-logit)))
            + (1 - target) * np.log(1 / (1 + np.exp(logit)))
        )
    )
    a = adversarial
    assert_close(a.GENERATOR_LOSSES["hinge"](fake), -fake.mean())
    assert_close(a.GENERATOR_LOSSES["non_saturating"](fake), bce(fake, 1.0))
    hinge = (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean()) / 2
    assert_close(a.DISCRIMINATOR_LOSSES["hinge"](real, fake), hinge)
    assert_close(a.DISCRIMINATOR_LOSSES["vanilla"](real, fake), (bce(real, 1) + bce(fake, 0)) / 2)
    assert_close(a.RECONSTRUCTION_LOSSES["l1"](real, fake), np.abs(real - fake).mean())
    assert_close(a.RECONSTRUCTION_LOSSES["l2"](real, fake), np.square(real - fake).mean())


def test_adaptive_weight():
    g = jnp.asarray([[3.0, 4.0]])
    assert_close(adversarial.adaptive_weight(g, 2 * g), 5 / (10 + 1e-4))
    assert_close(adversarial.adaptive_weight(g, 0 * g), 1e4)
    assert not np.any(jax.grad(lambda g: adversarial.adaptive_weight(g, 1 + g))(g))


def test_usage_of_the_codebook():
    window, usage = adversarial.codebook_usage(jnp.zeros(6, jnp.int32), jnp.asarray([[3, 5]]), 10)
    np.testing.assert_array_equal(window, [0, 0, 0, 0, 3, 5])
    assert usage == pytest.approx(0.3)
    window, usage = adversarial.codebook_usage(window, jnp.arange(7) + 1, 10)
    np.testing.assert_array_equal(window, [2, 3, 4, 5, 6, 7])
    assert usage == pytest.approx(0.6)
    counts = adversarial.code_counts(jnp.asarray([[1, 3], [3, 3]]), 5)
    np.testing.assert_array_equal(counts, [0, 1, 0, 3, 0])


# ---------------------------------------------------------------- all of them

TOKENIZER = VQTokenizer(
    VQTokenizerConfig(
        ch=32, ch_mult=(1, 1), num_res_blocks=0, z_channels=8, codebook_size=10, codebook_dim=4
    )
)
FULL = AdversarialReconstruction(
    disc_start=3, adaptive_weight=True, entropy_weight=0.1, reconstruction_loss="l1",
    perceptual_weight=0.7, gen_loss="non_saturating", disc_loss="vanilla", codebook_weight=1.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return np.tanh(draw(2, 16, 16, 3, seed=3))


@pytest.fixture(scope="module")
def params(gan):
    tokenizer = jax.jit(TOKENIZER.init)(jax.random.key(1), jnp.zeros((1, 16, 16, 3)))
    return {"tokenizer": tokenizer["params"], "discriminator": gan["params"]}


@contextlib.contextmanager
def small_lpips():
    """LPIPS of two stages with one convolution each: it compiles quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lpips_net, "STAGES", ((1, 8), (1, 16)))
        patch.setattr(lpips_net, "CHANNELS", (8, 16))
        yield


@pytest.fixture(scope="module")
def stats(gan, images):
    with small_lpips():
        lpips = jax.jit(LPIPS().init)(jax.random.key(2), images, images)["params"]
    return {"discriminator": gan["batch_stats"], "lpips": lpips}


def plain_losses(params, stats, images):
    """Loss of the tokenizer and loss of the discriminator with `FULL`, each on its own."""
    a, weight = adversarial, FULL.disc_weight

    def generator(tokenizer):
        out = TOKENIZER.apply({"params": tokenizer}, images)
        distance = LPIPS().apply({"params": stats["lpips"]}, out.recon, images)
        like = jnp.mean(jnp.abs(out.recon - images)) + 0.7 * jnp.mean(distance)
        variables = {"params": params["discriminator"], "batch_stats": stats["discriminator"]}
        gen = jnp.mean(jax.nn.softplus(-judge(variables, out.recon)[0]))
        return like, gen, out

    def generator_loss(tokenizer, factor):
        like, gen, out = generator(tokenizer)
        vq, commit = a.codebook_losses(out.z, out.z_q)
        entropy = a.entropy_loss(out.z, out.codebook)
        return like + factor * weight * gen + 1.1 * vq + 0.25 * commit + 0.1 * entropy

    kernel = lambda tokenizer: tokenizer["decoder"]["conv_out"]["kernel"]
    norm = lambda i: jnp.linalg.norm(
        kernel(jax.grad(lambda t: generator(t)[i])(params["tokenizer"])).reshape(-1)
    )
    factor = norm(0) / (norm(1) + 1e-4)

    def discriminator_loss(discriminator):
        recon = TOKENIZER.apply({"params": params["tokenizer"]}, images).recon
        now = {"params": discriminator, "batch_stats": stats["discriminator"]}
        _, now["batch_stats"] = judge(now, recon)
        real, now["batch_stats"] = judge(now, images)
        fake, after = judge(now, recon)
        both = jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))
        return weight * 0.5 * both, after

    one = jax.value_and_grad(generator_loss)(params["tokenizer"], factor)
    two = jax.value_and_grad(discriminator_loss, has_aux=True)(params["discriminator"])
    return one, two, factor


def joint(config, net, params, stats, images, step):
    def loss(params):
        total, batch_stats, metrics = stage1_loss(
            config, TOKENIZER, net, params, stats, images, step
        )
        return total, (batch_stats, metrics)

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.fixture(scope="module")
def joint_full(params, stats, images):
    """The whole loss as one program, for any step."""
    run = jax.jit(joint, static_argnums=(0, 1))
    with small_lpips():
        return {step: run(FULL, GAN, params, stats, images, jnp.int32(step)) for step in (2, 3)}


def test_one_backward_pass_holds_both_gradients(params, stats, images, joint_full):
    (total, (batch_stats, metrics)), grads = joint_full[3]
    with small_lpips():
        one, two, factor = jax.jit(plain_losses)(params, stats, images)
    assert_close(total, one[0] + two[0][0])
    assert_close(metrics["generator_loss"], one[0])
    assert_close(metrics["discriminator_loss"], two[0][0])
    assert_close(metrics["adaptive_weight"], factor, rtol=1e-3)
    assert_close(batch_stats, two[0][1])
    for name, want in (("tokenizer", one[1]), ("discriminator", two[1])):
        scale = max(np.abs(a).max() for a in jax.tree.leaves(want))
        assert scale > 1e-4
        assert_close(grads[name], want, rtol=1e-3, atol=1e-4 * scale)


def test_before_its_start_the_discriminator_only_watches(params, stats, images, joint_full):
    (total, (batch_stats, metrics)), grads = joint_full[2]
    (_, (same, started)), _ = joint_full[3]
    assert metrics["disc_weight"] == 0 and started["disc_weight"] == FULL.disc_weight
    assert not any(np.any(a) for a in jax.tree.leaves(grads["discriminator"]))
    assert_close(batch_stats, same)  # the running statistics move all the same
    assert_close(total, metrics["generator_loss"])
    extra = started["adaptive_weight"] * FULL.disc_weight * started["gen"]
    assert_close(started["generator_loss"] - total, extra, rtol=1e-3)

    want = {
        "rec", "perceptual", "vq", "commit", "entropy", "gen", "disc", "adaptive_weight",
        "disc_weight", "logits_real", "logits_fake", "generator_loss", "discriminator_loss",
        "code_counts",
    }  # fmt: skip
    assert metrics.keys() == want
    assert metrics["code_counts"].sum() == 2 * 8 * 8


def test_losses_without_weight_are_not_computed(params, images):
    config = AdversarialReconstruction(disc_weight=0.0, perceptual_weight=0.0)
    alone = {"tokenizer": params["tokenizer"]}
    run = jax.jit(joint, static_argnums=(0, 1))
    (total, (batch_stats, metrics)), grads = run(config, None, alone, {}, images, jnp.int32(0))
    assert batch_stats == {}
    assert metrics.keys() == {"rec", "vq", "commit", "generator_loss", "code_counts"}
    recon = jax.jit(TOKENIZER.apply)({"params": params["tokenizer"]}, images).recon
    assert_close(metrics["rec"], np.mean(np.square(recon - images)))
    assert_close(metrics["commit"], metrics["vq"])
    assert_close(total, metrics["rec"] + 1.25 * metrics["vq"])
    assert jax.tree.structure(grads) == jax.tree.structure(alone)


def test_what_is_missing_is_said(params, images):
    plain = AdversarialReconstruction(perceptual_weight=0.0, disc_weight=0.0)
    for changes, match in (
        ({"perceptual_weight": 1.0}, "perceptual_weight=1.0 needs.*lpips=FILE"),
        ({"disc_weight": 0.5}, "there is no discriminator"),
        ({"reconstruction_loss": "l3"}, "reconstruction_loss='l3'; choose l2 or l1"),
        ({"gen_loss": "wgan"}, "gen_loss='wgan'; choose hinge or non_saturating"),
        ({"disc_loss": "wgan"}, "disc_loss='wgan'; choose hinge or vanilla"),
    ):
        config = dataclasses.replace(plain, **changes)
        with pytest.raises(ValueError, match=match):
            stage1_loss(config, TOKENIZER, None, params, {}, images, 0)
