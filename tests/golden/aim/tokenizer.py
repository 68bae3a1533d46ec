"""Family vq: the tokenizer, its training losses and gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lintime.model.convert.vq_tokenizer import config_from_shapes, tokenizer_from_reference
from lintime.model.nets.vq_tokenizer import VQTokenizer, VQTokenizerConfig
from lintime.model.processes.adversarial import (
    USAGE_WINDOW,
    codebook_losses,
    codebook_usage,
    entropy_loss,
)

from ..compare import Report
from ..quick import quick_jit

nhwc = lambda x: jnp.moveaxis(jnp.asarray(x), 1, -1)
nchw = lambda x: jnp.moveaxis(x, -1, 1)

# The reference's names of sizes -> ours.
FIELDS = {
    "ch": "ch", "ch_mult": "ch_mult", "num_res_blocks": "num_res_blocks",
    "z_channels": "z_channels", "n_embed": "codebook_size", "embed_dim": "codebook_dim",
    "l2_norm": "l2_norm", "in_channels": "in_channels", "out_channels": "out_channels",
}  # fmt: skip


def tokenizer_of(config, params) -> tuple[VQTokenizer, dict]:
    """The tokenizer of a case's config, which the shapes of its arrays must give as well."""
    fields = {
        FIELDS[n]: tuple(v) if isinstance(v, list) else v for n, v in config.items() if n in FIELDS
    }
    inferred = config_from_shapes(params)
    wanted = VQTokenizerConfig(**fields)
    if dataclasses.replace(wanted, l2_norm=inferred.l2_norm) != inferred:  # shapes cannot tell it
        raise AssertionError(f"shapes give {inferred}, the case says {wanted}")
    return VQTokenizer(wanted), tokenizer_from_reference(params)


def vq(report: Report) -> None:
    """Encode, quantise, decode; losses with their gradients; usage of the codebook."""
    config, case = report.case.config, report.case
    net, params = tokenizer_of(config, case.params)
    images = nhwc(report.input("images"))
    seen = lambda module, _: module.name in ("encoder", "quant_conv")
    ratio, beta = config.get("entropy_loss_ratio", 0.0), config.get("beta", 0.25)

    def loss(params, images):
        out, kept = net.apply({"params": params}, images, capture_intermediates=seen)
        vq_loss, commit = codebook_losses(out.z, out.z_q)
        parts = {"vq_loss": vq_loss, "commit_loss": beta * commit}
        parts["entropy_loss"] = ratio * entropy_loss(out.z, out.codebook) if ratio else 0.0
        target = jax.lax.stop_gradient(images)  # in `grad.images` it is a constant
        total = jnp.mean(jnp.square(out.recon - target)) + sum(parts.values())
        return total, (out, parts, kept["intermediates"])

    run = quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (total, (out, parts, kept)), (grads, grad_images) = run(params, images)
    ids = lambda codes: np.asarray(codes).reshape(len(codes), -1)
    report.check("encoder_out", nchw(kept["encoder"]["__call__"][0]))
    report.check("pre_quant", nchw(kept["quant_conv"]["__call__"][0]))
    report.check("quant", nchw(out.z_q))
    report.check("indices", ids(out.codes))
    encode = quick_jit(lambda x: net.apply({"params": params}, x, method="encode"))
    report.check("indices", ids(encode(images)), how="encode")
    report.check("recon", nchw(out.recon))
    height, width = out.codes.shape[1:]
    chosen = jnp.asarray(report.input("decode_indices", ids(out.codes)))
    decode = quick_jit(lambda ids: net.apply({"params": params}, ids, method="decode"))
    report.check("decode_code", nchw(decode(chosen.reshape(-1, height, width))))

    report.check("train.recon", nchw(out.recon))
    for name, value in parts.items():
        report.check(f"train.{name}", value)
    report.check("train.loss", total)
    window = case.params.get("quantize.codebook_used", np.zeros(USAGE_WINDOW))
    window = jnp.asarray(window, jnp.int32)
    _, usage = codebook_usage(window, out.codes, net.config.codebook_size)
    report.check("train.codebook_usage", usage)
    report.check("grad.images", nchw(grad_images))
    report.check_params("grad.param.", grads, tokenizer_from_reference)
