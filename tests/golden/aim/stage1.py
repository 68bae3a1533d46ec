"""Families stage1_patchgan and stage1_lpips_head: what trains a tokenizer besides itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from lintime.model.convert.lpips import linear_weights
from lintime.model.convert.vq_tokenizer import (
    conv_kernel,
    discriminator_from_reference,
    discriminator_to_reference,
)
from lintime.model.nets.lpips import lpips_head as head, scale_pixels
from lintime.model.nets.patchgan import PatchGAN
from lintime.model.processes.adversarial import (
    RECONSTRUCTION_LOSSES,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    non_saturating_generator_loss,
    vanilla_discriminator_loss,
)

from ..compare import Report
from ..quick import quick_jit
from .tokenizer import nchw, nhwc


def swapped_cross_entropy(target: float, logits) -> jax.Array:
    """The reference's mistake: the target as logit, the logits as target."""
    return jnp.mean(jax.nn.softplus(target) - target * logits)


def patchgan(report: Report) -> None:
    """Logits, losses and gradients, adaptive weight, running statistics after three passes."""
    config = report.case.config
    net = PatchGAN(features=config["ndf"], layers=config["n_layers"])
    variables = discriminator_from_reference(report.case.params)
    real, features = nhwc(report.input("real")), nhwc(report.input("features"))
    last = conv_kernel(jnp.asarray(report.input("last_layer")))

    def image(kernel):
        return lax.conv_general_dilated(
            features, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def judged(params, stats, x):
        logits, new = net.apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        return logits, new["batch_stats"]

    def run(variables, last):
        params, stats = variables["params"], variables["batch_stats"]
        out = {"logits_real_eval": nchw(net.apply(variables, real))}
        fake, fake_gradient = image(last), {}
        logits, stats = judged(params, stats, fake)
        out["logits_fake_train"] = nchw(logits)
        out["gen.hinge"] = hinge_generator_loss(logits)
        out["gen.nonsaturating_correct"] = non_saturating_generator_loss(logits)
        out["gen.nonsaturating_as_written"] = swapped_cross_entropy(1.0, logits)
        for name, loss in RECONSTRUCTION_LOSSES.items():
            out[f"gen.rec_{name}"] = loss(fake, real)
        rec = lambda kernel: RECONSTRUCTION_LOSSES["l2"](image(kernel), real)
        gen = lambda kernel: hinge_generator_loss(
            judged(params, variables["batch_stats"], image(kernel))[0]
        )
        fake_gradient = {"rec": jax.grad(rec)(last), "hinge_gen": jax.grad(gen)(last)}
        out["gen.adaptive_weight"] = adaptive_weight(*fake_gradient.values())
        for name, gradient in fake_gradient.items():
            out[f"grad.last_layer_of_{name}"] = gradient.transpose(3, 2, 0, 1)

        def discriminator_loss(params):
            on_real, after = judged(params, stats, real)
            on_fake, after = judged(params, after, fake)
            return hinge_discriminator_loss(on_real, on_fake), (on_real, on_fake, after)

        (out["disc.hinge"], (on_real, on_fake, stats)), grads = jax.value_and_grad(
            discriminator_loss, has_aux=True
        )(params)
        out["disc.logits_real_train"], out["disc.logits_fake_train"] = nchw(on_real), nchw(on_fake)
        out["disc.vanilla"] = vanilla_discriminator_loss(on_real, on_fake)
        out["disc.nonsaturating_as_written"] = 0.5 * (
            swapped_cross_entropy(1.0, on_real) + swapped_cross_entropy(0.0, on_fake)
        )
        return out, grads, stats

    out, grads, stats = quick_jit(run)(variables, last)
    for name, value in out.items():
        report.check(name, value)
    report.check_params("grad.param.", {"params": grads}, discriminator_from_reference)
    after = discriminator_to_reference({"params": variables["params"], "batch_stats": stats})
    for name, value in after.items():
        report.check(f"buffers_after.{name}", value)
    # A counter of theirs that nothing reads while the momentum is fixed.
    report.informational("buffers_after.*.num_batches_tracked")


def lpips_head(report: Report) -> None:
    """The distance of given features, and the scaling of pixels."""
    levels = range(len(report.case.config["channels"]))
    features = lambda image: [nhwc(report.input(f"feat{image}_{k}")) for k in levels]
    weights = linear_weights(report.case.params)
    report.check("value", quick_jit(head)(features(0), features(1), weights))
    report.check("scaled_pixels", nchw(scale_pixels(nhwc(report.input("pixels")))))
