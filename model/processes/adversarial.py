"""Training of a VQ tokenizer: reconstruction, perceptual, codebook and adversarial losses.

The recipe of LlamaGen (arXiv 2406.06525, section 2.2), which is VQGAN's (arXiv 2012.09841, section
3.1) with unit codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..nets.lpips import LPIPS
from ..nets.patchgan import PatchGAN
from ..nets.vq_tokenizer import MAX_DISTANCES, VQTokenizer, last_convolution, position_blocks

TEMPERATURE = 0.01  # of the soft assignments in the entropy loss
USAGE_WINDOW = 65536  # codes over which the reference counts those in use


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialReconstruction:
    """Losses of a tokenizer and their weights; a weight of 0 leaves the loss uncomputed.

        w_rec rec + w_perc lpips + a w_disc(step) gen + w_code vq + w_commit commit + w_ent entropy

    Attributes:
        reconstruction_loss: "l2" (mean square) or "l1".
        reconstruction_weight: see above.
        perceptual_weight: of LPIPS.
        lpips: file of the weights of VGG16 and LPIPS, supplied by the user.
        disc_weight: of the adversarial loss from update `disc_start` on, 0 before; also of the
            discriminator's own loss. 0 trains without a discriminator.
        disc_start: see above.
        disc_loss: of the discriminator, "hinge" or "vanilla" (cross-entropy).
        gen_loss: "hinge" or "non_saturating".
        adaptive_weight: a = |gradient of reconstruction and perceptual loss| / |that of gen| at the
            decoder's last kernel; False takes a = 1.
        codebook_weight: pulls codes to latents. commitment_weight: latents to codes.
        entropy_weight: of `entropy_loss`.
        disc_features, disc_layers: sizes of the discriminator, see `PatchGAN`.
    """

    reconstruction_loss: str = "l2"
    reconstruction_weight: float = 1.0
    perceptual_weight: float = 1.0
    lpips: str = ""
    disc_weight: float = 0.5
    disc_start: int = 20000
    disc_loss: str = "hinge"
    gen_loss: str = "hinge"
    adaptive_weight: bool = False
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    entropy_weight: float = 0.0
    disc_features: int = 64
    disc_layers: int = 3


# ---------------------------------------------------------------- codebook


def codebook_losses(z: Array, z_q: Array) -> tuple[Array, Array]:
    """(mean (z_q - stop(z))^2, mean (stop(z_q) - z)^2): codebook and commitment loss, without
    weights (arXiv 1711.00937, equation 3). z, z_q: [..., D] as of `TokenizerOutput`.
    """
    codebook = jnp.mean(jnp.square(z_q - lax.stop_gradient(z)))
    return codebook, jnp.mean(jnp.square(lax.stop_gradient(z_q) - z))


def entropy_loss(z: Array, codebook: Array, *, max_distances: int = MAX_DISTANCES) -> Array:
    """mean_i H(p_i) - H(mean_i p_i) with p_i = softmax_j(-|z_i - e_j|^2 / 0.01).

    Small where every latent is close to one code, and all codes are used. Held and differentiated
    in pieces of at most `max_distances` entries of p (see `position_blocks`), at the cost of a
    second pass over the distances.

    Args:
        z: [B, h, w, D]; codebook: [V, D], as of `TokenizerOutput`; both get gradients.

    Returns:
        A scalar, at least float32.
    """
    batch, height, width, _ = z.shape
    positions = height * width
    pieces = position_blocks(z.reshape(batch, positions, -1), len(codebook), max_distances)
    count = pieces.shape[0] * pieces.shape[2]
    real = (jnp.arange(count) < positions).reshape(pieces.shape[0], -1).astype(z.dtype)
    squares = jnp.sum(jnp.square(codebook), axis=-1)

    @jax.checkpoint
    def add(total, piece):
        z, real = piece
        products = jnp.einsum("bpd,vd->bpv", z, codebook, precision=lax.Precision.HIGHEST)
        distance = jnp.sum(jnp.square(z), axis=-1, keepdims=True) + squares - 2 * products
        log_p = jax.nn.log_softmax(-distance / TEMPERATURE)
        p = jnp.exp(log_p)
        entropy = -jnp.sum(p * log_p, axis=-1)
        added = jnp.sum(entropy * real), jnp.sum(p * real[:, None], axis=(0, 1))
        return jax.tree.map(jnp.add, total, added), None

    zero = (jnp.zeros((), z.dtype), jnp.zeros(len(codebook), z.dtype))
    (each, average), _ = lax.scan(add, zero, (pieces, real))
    average = average / (batch * positions)
    return each / (batch * positions) + jnp.sum(average * jnp.log(average + 1e-5))


def codebook_usage(window: Array, codes: Array, codebook_size: int) -> tuple[Array, Array]:
    """The newest codes appended to a rolling window, and the share of codes that occur in it.

    Args:
        window: [W] ids, the oldest first (zeros at first, so that code 0 counts as used then).
        codes: ids of any shape.

    Returns:
        The new window and a float32 scalar.
    """
    window = jnp.concatenate([window, codes.reshape(-1).astype(window.dtype)])[-len(window) :]
    used = jnp.zeros(codebook_size, jnp.float32).at[window].set(1.0)
    return window, jnp.mean(used)


def code_counts(codes: Array, codebook_size: int) -> Array:
    """How often each code occurs: [V] float32, which adds up over rows, batches and devices."""
    return jnp.zeros(codebook_size, jnp.float32).at[codes.reshape(-1)].add(1.0)


# ---------------------------------------------------------------- adversarial losses


def hinge_generator_loss(fake: Array) -> Array:
    """-mean(D(x_hat)), of logits of any shape."""
    return -jnp.mean(fake)


def non_saturating_generator_loss(fake: Array) -> Array:
    """mean softplus(-D(x_hat)): cross-entropy against "real" (arXiv 1406.2661, section 3)."""
    return jnp.mean(jax.nn.softplus(-fake))


def hinge_discriminator_loss(real: Array, fake: Array) -> Array:
    """(mean relu(1 - D(x)) + mean relu(1 + D(x_hat))) / 2."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def vanilla_discriminator_loss(real: Array, fake: Array) -> Array:
    """(mean softplus(-D(x)) + mean softplus(D(x_hat))) / 2: binary cross-entropy."""
    return 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)))


RECONSTRUCTION_LOSSES = {
    "l2": lambda x, y: jnp.mean(jnp.square(x - y)),
    "l1": lambda x, y: jnp.mean(jnp.abs(x - y)),
}
GENERATOR_LOSSES = {
    "hinge": hinge_generator_loss,
    "non_saturating": non_saturating_generator_loss,
}
DISCRIMINATOR_LOSSES = {
    "hinge": hinge_discriminator_loss,
    "vanilla": vanilla_discriminator_loss,
}


def adaptive_weight(reconstruction_gradient: Array, generator_gradient: Array) -> Array:
    """clip(|g_rec| / (|g_gen| + 1e-4), 0, 1e4) of gradients of one array (arXiv 2012.09841,
    equation 7); no gradient flows from it.
    """
    ratio = jnp.linalg.norm(reconstruction_gradient.reshape(-1)) / (
        jnp.linalg.norm(generator_gradient.reshape(-1)) + 1e-4
    )
    return lax.stop_gradient(jnp.clip(ratio, 0.0, 1e4))


def discriminator_weight(config: AdversarialReconstruction, step: Array) -> Array:
    """w_disc(step): 0 before `disc_start`. `step` counts updates of the tokenizer."""
    return jnp.where(step >= config.disc_start, config.disc_weight, 0.0).astype(jnp.float32)


def choose(table: Mapping[str, Any], name: str, field: str) -> Any:
    """The entry `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in table:
        raise ValueError(f"{field}={name!r}; choose {' or '.join(table)}")
    return table[name]


# ---------------------------------------------------------------- the whole loss


def stage1_loss(
    config: AdversarialReconstruction,
    tokenizer: VQTokenizer,
    discriminator: PatchGAN | None,
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    images: Array,
    step: Array,
    *,
    rngs: Mapping[str, Array] | None = None,
) -> tuple[Array, Any, dict[str, Array]]:
    """Losses of tokenizer and discriminator as one sum, for a single backward pass.

    Each is blind to the other's parameters (the tokenizer's loss stops gradients at the
    discriminator's parameters, the discriminator's at the reconstruction), so the gradient of the
    sum holds the gradients of both, each at the parameters before the update.

    Batch norm sees the reconstruction (tokenizer's side), the images, and the reconstruction again
    (discriminator's side), each with its own statistics, and the running ones move three times.

    Args:
        config: losses and weights.
        tokenizer, discriminator: the nets; no discriminator iff `config.disc_weight` is 0.
        params: {"tokenizer": ..} and {"discriminator": ..} where there is one.
        stats: {"discriminator": batch statistics} where there is one, and {"lpips": parameters of
            `LPIPS`} where `config.perceptual_weight` is not 0.
        images: [B, H, W, C] in [-1, 1].
        step: scalar, updates done before this one.
        rngs: {"dropout": key} for dropout in the tokenizer.

    Returns:
        The scalar loss (means over images and pixels); the new batch statistics ({} without a
        discriminator); and metrics: each loss without its weight ("rec", "perceptual", "vq",
        "commit", "entropy", "gen", "disc"), "adaptive_weight", "disc_weight", means of the
        "logits_real" and "logits_fake", "generator_loss" and "discriminator_loss" with weights,
        and "code_counts" [V]. What is not computed is left out.

    Raises:
        ValueError: an unknown name of a loss, no LPIPS parameters, or no discriminator.
    """
    reconstruction = choose(
        RECONSTRUCTION_LOSSES, config.reconstruction_loss, "reconstruction_loss"
    )
    generator = choose(GENERATOR_LOSSES, config.gen_loss, "gen_loss")
    judge = choose(DISCRIMINATOR_LOSSES, config.disc_loss, "disc_loss")
    if config.perceptual_weight and "lpips" not in stats:
        raise ValueError(
            f"perceptual_weight={config.perceptual_weight} needs the weights of VGG16 and LPIPS; "
            "name their file (lpips=FILE) or train without (perceptual_weight=0)"
        )
    if config.disc_weight and (discriminator is None or "discriminator" not in params):
        raise ValueError(f"disc_weight={config.disc_weight}, but there is no discriminator")

    out = tokenizer.apply({"params": params["tokenizer"]}, images, rngs=rngs)
    metrics: dict[str, Array] = {}
    vq, commit = codebook_losses(out.z, out.z_q)
    metrics |= {"vq": vq, "commit": commit}
    loss = config.codebook_weight * vq + config.commitment_weight * commit
    if config.entropy_weight:
        metrics["entropy"] = entropy_loss(out.z, out.codebook)
        loss += config.entropy_weight * metrics["entropy"]

    def likeness(recon: Array) -> tuple[Array, dict[str, Array]]:
        """Reconstruction and perceptual loss."""
        parts = {"rec": reconstruction(recon, images)}
        total = config.reconstruction_weight * parts["rec"]
        if config.perceptual_weight:
            distance = LPIPS().apply({"params": lax.stop_gradient(stats["lpips"])}, recon, images)
            parts["perceptual"] = jnp.mean(distance)
            total += config.perceptual_weight * parts["perceptual"]
        return total, parts

    like, parts = likeness(out.recon)
    metrics |= parts
    loss += like
    batch_stats: Any = {}
    if config.disc_weight:
        weight = discriminator_weight(config, step)

        def logits_of(disc_params, batch_stats, x):
            variables = {"params": disc_params, "batch_stats": batch_stats}
            logits, new = discriminator.apply(variables, x, mutable=["batch_stats"])
            return logits, new["batch_stats"]

        trained, frozen = params["discriminator"], lax.stop_gradient(params["discriminator"])
        before = lax.stop_gradient(stats["discriminator"])
        fake, batch_stats = logits_of(frozen, before, out.recon)
        gen = generator(fake)
        factor = jnp.ones((), jnp.float32)
        if config.adaptive_weight:
            last = lax.stop_gradient({"decoder": {"conv_out": _last(params["tokenizer"])}})
            features = lax.stop_gradient(out.features)
            adversarial = lambda recon: generator(logits_of(frozen, before, recon)[0])
            gradient = lambda f: jax.grad(lambda p: f(last_convolution(p, features)))(last)
            kernel = lambda f: _last(gradient(f))["kernel"]
            factor = adaptive_weight(kernel(lambda y: likeness(y)[0]), kernel(adversarial))
        loss += factor * weight * gen

        real, batch_stats = logits_of(trained, batch_stats, images)
        fake, batch_stats = logits_of(trained, batch_stats, lax.stop_gradient(out.recon))
        disc = judge(real, fake)
        metrics |= {
            "gen": gen, "disc": disc, "adaptive_weight": factor, "disc_weight": weight,
            "logits_real": jnp.mean(real), "logits_fake": jnp.mean(fake),
            "discriminator_loss": weight * disc,
        }  # fmt: skip
    metrics["generator_loss"] = loss
    loss = loss + metrics.get("discriminator_loss", 0.0)
    metrics["code_counts"] = code_counts(out.codes, tokenizer.config.codebook_size)
    return loss, batch_stats, lax.stop_gradient(metrics)


def _last(params: Mapping[str, Any]) -> Any:
    """Parameters of the decoder's last convolution."""
    return params["decoder"]["conv_out"]
