"""Stage 1 of AiM: training of a VQ image tokenizer against a discriminator."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ...model.nets.lpips import SMALLEST
from ...model.nets.patchgan import PatchGAN
from ...model.nets.vq_tokenizer import VQTokenizer
from ...model.processes.adversarial import code_counts, stage1_loss
from ..arrays import read_arrays
from ..errors import UserError
from ..optimizers import make_optimizer
from ..schema import Run
from .base import Task


class TokenizerTask(Task):
    """Reconstruction with the losses of `AdversarialReconstruction`.

    Parameters are {"tokenizer"} and, with disc_weight > 0, {"discriminator"}, each with an
    optimiser state and a gradient norm of its own. Both are updated from one backward pass: the
    reference, too, takes both gradients at the weights before the update. `stats` holds the
    discriminator's batch-norm statistics and the fixed weights of LPIPS, which are read from their
    file whenever a run starts and are no part of its checkpoints.

    With several micro-batches batch norm, the entropy loss and the adaptive weight see one
    micro-batch at a time.
    """

    metric = "psnr"
    optional = ("discriminator",)  # converted tokenizers have none

    @property
    def net(self) -> VQTokenizer:
        return VQTokenizer(self.run.net, self.dtype, self.run.precision.remat)

    @property
    def discriminator(self) -> PatchGAN | None:
        p = self.run.process
        if not p.disc_weight:
            return None
        return PatchGAN(p.disc_features, p.disc_layers, dtype=self.dtype)

    def abstract_batch(self):
        rows, size = self.run.batch_size, self.run.data.size
        return {
            "images": jax.ShapeDtypeStruct((rows, size, size, 3), "float32"),
            "labels": jax.ShapeDtypeStruct((rows,), "int32"),
            "valid": jax.ShapeDtypeStruct((rows,), "bool"),
        }

    def optimizer(self):
        one = lambda: make_optimizer(self.run.optim, self.run.steps)
        if not self.run.process.disc_weight:
            return one()
        group = lambda path, _: path[0].key
        groups = lambda params: jax.tree_util.tree_map_with_path(group, params)
        return optax.partition({"tokenizer": one(), "discriminator": one()}, groups)

    def init(self, key):
        out = self._weights(key)
        out["stats"] |= jax.tree.map(jnp.asarray, self.fixed_stats())
        return out

    def fixed_stats(self):
        """{"lpips": its weights} where there is a perceptual loss."""
        process = self.run.process
        return {"lpips": lpips_weights(process.lpips)} if process.perceptual_weight else {}

    def abstract(self):
        """Inference needs the tokenizer's parameters only; no file is read."""
        return {"params": jax.eval_shape(self._weights, jax.random.key(0))["params"], "stats": {}}

    def _weights(self, key: Array) -> dict[str, Any]:
        size = 4 * self.run.net.downsample
        images = jnp.zeros((1, size, size, 3))
        variables = self.net.init({"params": key}, images)
        out = {"params": {"tokenizer": variables["params"]}, "stats": {}}
        if self.discriminator is not None:
            size = self.discriminator.least_size
            images = jnp.zeros((1, size, size, 3))
            variables = self.discriminator.init({"params": jax.random.fold_in(key, 1)}, images)
            out["params"]["discriminator"] = variables["params"]
            out["stats"]["discriminator"] = variables["batch_stats"]
        return out

    def loss(self, params, stats, carry, batch, key):
        images = batch["images"]
        rngs = {"dropout": jax.random.fold_in(key, batch["step"])}
        loss, batch_stats, metrics = stage1_loss(
            self.run.process, self.net, self.discriminator, params, stats, images, batch["step"],
            rngs=rngs,
        )  # fmt: skip
        weight = jnp.float32(images.shape[0])
        delta = {}
        if batch_stats:
            delta["discriminator"] = jax.tree.map(jnp.subtract, batch_stats, stats["discriminator"])
        sums = {"code_counts": metrics.pop("code_counts")}
        return loss * weight, weight, delta, carry, {"sum": sums, "mean": metrics}

    def absorb(self, stats, delta):
        # Every micro-batch moves the statistics from where they were: their mean counts, since the
        # sum of many moves would go past the statistics of the batch, and further every time.
        move = lambda old, sum: old + sum / self.run.optim.accumulate
        return stats | {k: jax.tree.map(move, stats[k], d) for k, d in delta.items()}

    def report(self, sums):
        used = sums["code_counts"] > 0
        return {"codebook_usage": jnp.mean(used.astype(jnp.float32))}

    def evaluate(self, params, stats, batch):
        out = self.net.apply({"params": params["tokenizer"]}, batch["images"])
        valid = batch["valid"].astype(jnp.float32)
        # Pixels as they are seen, in [0, 1].
        seen = lambda x: jnp.clip(0.5 * x + 0.5, 0.0, 1.0)
        error = jnp.mean(jnp.square(out.recon - batch["images"]), axis=(1, 2, 3))
        visible = jnp.mean(jnp.square(seen(out.recon) - seen(batch["images"])), axis=(1, 2, 3))
        psnr = -10 * jnp.log10(jnp.maximum(visible, 1e-10))
        codes = jnp.where(batch["valid"][:, None, None], out.codes, self.run.net.codebook_size)
        return {
            "error": jnp.sum(error * valid), "psnr": jnp.sum(psnr * valid),
            "images": jnp.sum(valid),
            "code_counts": code_counts(codes, self.run.net.codebook_size),
        }  # fmt: skip

    def validation(self, sums):
        images = jnp.maximum(sums["images"], 1.0)
        share = sums["code_counts"] / jnp.maximum(jnp.sum(sums["code_counts"]), 1.0)
        entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(share), 0.0))
        return {
            "loss": sums["error"] / images, "psnr": sums["psnr"] / images, **self.report(sums),
            "codebook_perplexity": jnp.exp(entropy),
        }  # fmt: skip

    def check_data(self, data):
        size, least = self.run.data.size, self.run.net.downsample
        if size % least:
            raise UserError(
                f"data.size={size} is not a multiple of {least}, the pixels of a token; "
                f"set data.size={max(least, round(size / least) * least)}"
            )
        if self.run.process.perceptual_weight and size < SMALLEST:
            raise UserError(
                f"data.size={size} is too small for LPIPS, which needs {SMALLEST} pixels; set "
                "process.perceptual_weight=0 or a larger data.size"
            )
        if self.discriminator is not None and size < self.discriminator.least_size:
            raise UserError(
                f"data.size={size} is too small for a discriminator of process.disc_layers="
                f"{self.discriminator.layers}, which needs {self.discriminator.least_size} pixels; "
                "set fewer, or process.disc_weight=0"
            )


@functools.lru_cache(maxsize=2)
def lpips_weights(files: str):
    """Parameters of LPIPS from one file, or several with commas between.

    Raises:
        UserError: a file is missing, or holds something else.
    """
    from ...model.convert.lpips import lpips_from_reference

    flat: dict[str, Any] = {}
    for file in filter(None, (f.strip() for f in files.split(","))):
        flat |= read_arrays(file)
    try:
        return lpips_from_reference(flat)
    except ValueError as error:
        raise UserError(f"process.lpips={files}: {error}") from error


def check_perceptual(run: Run) -> None:
    """Raises UserError where a perceptual loss is asked for without its weights."""
    if run.process.perceptual_weight and not run.process.lpips:
        raise UserError(
            f"process.perceptual_weight={run.process.perceptual_weight} needs the weights of VGG16 "
            "and LPIPS, which are not part of lintime: process.lpips=FILE (torchvision's vgg16 and "
            "vgg.pth of the lpips package, VGG.pth,LPIPS.pth), or process.perceptual_weight=0"
        )
