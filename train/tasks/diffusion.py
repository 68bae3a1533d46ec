"""Training of diffusion and flow-matching models: DiT (arXiv 2212.09748) and its relatives.

A net takes part with an entry in `MODULES` and in the tables of train/tasks/table.py,
train/loaded/load.py, train/validate.py (`GOES_WITH`), train/validate_diffusion.py (`CHECKS`) and
train/schema.py (`NETS`); its config is `Sizes`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ...model.nets.autoencoder_kl import sample_posterior
from ...model.nets.dih import DiH, DiHConfig
from ...model.nets.dit import DiT, DiTConfig
from ...model.nets.jit import JiT, JiTConfig
from ...model.nets.text_video_dih import TextVideoDiH, TextVideoDiHConfig
from ...model.processes import flow, gaussian, noise_levels
from ...model.processes.flow import FlowMatching
from ...model.processes.gaussian import GaussianDiffusion
from ...model.processes.noise_levels import NoiseLevels
from ..errors import UserError
from ..resolution import check_resolution_of
from ..schema import LatentData, Run, VideoData
from .base import Task

# config: the net, made of (config, dtype, remat, unroll) and called as
# net(x, t, labels, *, drop=None, context=.., context_mask=..) -> (out, {}), see `DiT`
MODULES: dict[type, type[nn.Module]] = {
    DiTConfig: DiT,
    DiHConfig: DiH,
    JiTConfig: JiT,
    TextVideoDiHConfig: TextVideoDiH,
}
# kind of process (or what it derives from): draw_times, spread_times, training_loss
PROCESSES: dict[type, ModuleType] = {
    FlowMatching: flow,
    GaussianDiffusion: gaussian,
    NoiseLevels: noise_levels,
}


class Sizes(Protocol):
    """What of a net's config is read here, fields or not.

    Attributes:
        shape: (H, W, C) of an image, or (F, H, W, C) of a video. input_size: H. in_channels: C.
        frames: F; 0: images.
        num_classes, class_dropout: see `DiTConfig`.
        context: "none", or how the net reads a text, of context_length tokens of context_dim.
    """

    shape: tuple[int, ...]
    input_size: int
    in_channels: int
    frames: int
    num_classes: int
    class_dropout: float
    context: str


def make_net(config: Sizes, dtype=jnp.float32, remat: str = "none", unroll: bool = False):
    """The net of a config."""
    return MODULES[type(config)](config, dtype, remat, unroll)


def process_module(process: Any) -> ModuleType:
    """What computes a process."""
    return next(module for kind, module in PROCESSES.items() if isinstance(process, kind))


class DiffusionTask(Task):
    """The loss of `run.process` at random times, over images, videos or latents.

    Classes and texts are dropped in training only, both by one draw. Validation visits, for image i
    of a batch of B, the times (i + u) / B of the process with a fixed u and fixed noise, so that
    its loss has little noise of its own and is the same at every validation but for the weights.
    """

    metric = "loss"

    @property
    def unit(self) -> str:
        return pixels_of(self.run.data)

    @property
    def sizes(self) -> Sizes:
        """Sizes of images or videos, classes and texts."""
        return self.run.net

    @property
    def net(self) -> nn.Module:
        precision = self.run.precision
        return make_net(self.sizes, self.dtype, precision.remat, precision.unroll)

    def start_from(self, path, wanted):
        said = check_resolution_of(path, self.run.net)
        loaded = self._restored(path, wanted)
        if said and jax.process_index() == 0:
            print(f"init_from={path}: {said}", flush=True)
        return loaded

    def _restored(self, path, wanted):
        return super().start_from(path, wanted)

    def abstract_batch(self):
        rows, data = self.run.batch_size, self.run.data
        shape = (rows, *self.sizes.shape)
        names = ("mean", "logvar") if isinstance(data, LatentData) else (pixels_of(data),)
        text = {}
        if self.sizes.context != "none":
            context = (rows, self.sizes.context_length, self.sizes.context_dim)
            text["context"] = jax.ShapeDtypeStruct(context, "float16")
            text["context_mask"] = jax.ShapeDtypeStruct(context[:2], "bool")
        return {
            **{name: jax.ShapeDtypeStruct(shape, "float32") for name in names},
            **text,
            "labels": jax.ShapeDtypeStruct((rows,), "int32"),
            "valid": jax.ShapeDtypeStruct((rows,), "bool"),
        }

    def init(self, key):
        x = jnp.zeros((1, *self.sizes.shape))
        variables = self.net.init({"params": key}, x, jnp.zeros((1,)), jnp.zeros((1,), jnp.int32))
        return {"params": variables["params"], "stats": {}}

    def loss(self, params, stats, carry, batch, key):
        key = jax.random.fold_in(key, batch["step"])
        keys = dict(zip(("times", "noise", "dropout", "latents"), jax.random.split(key, 4)))
        x = self._clean(batch, keys["latents"])
        t = self._draw_times(keys["times"], x.shape[0])
        noise = jax.random.normal(keys["noise"], x.shape)
        rngs = {"dropout": keys["dropout"]}
        losses, parts = self._losses(params, stats, x, self._told(batch), t, noise, rngs)
        total, weight = jnp.sum(losses), jnp.float32(x.shape[0])
        sums = {name: jnp.sum(value) for name, value in parts.items()} | {"rows": weight}
        return total, weight, {}, carry, {"sum": sums, "mean": {}}

    def report(self, sums):
        rows = jnp.maximum(sums["rows"], 1.0)
        return {name: value / rows for name, value in sums.items() if name not in ("rows", "loss")}

    def evaluate(self, params, stats, batch):
        valid = batch["valid"].astype(jnp.float32)
        key = jax.random.fold_in(jax.random.key(0), batch["step"])
        times, noise, latents = jax.random.split(key, 3)
        x = self._clean(batch, latents)
        t = self._spread_times(times, x.shape[0])
        noise = jax.random.normal(noise, x.shape)
        parts = self._validation_parts(params, stats, x, self._told(batch), t, noise)
        parts = parts | {"rows": jnp.ones_like(valid)}
        return {name: jnp.sum(value * valid) for name, value in parts.items()}

    def validation(self, sums):
        return {"loss": sums["loss"] / jnp.maximum(sums["rows"], 1.0), **self.report(sums)}

    def _validation_parts(self, params, stats, x, told, t, noise) -> dict[str, Array]:
        """What is summed over rows, by row: the loss and its parts."""
        losses, parts = self._losses(params, stats, x, told, t, noise, {})
        return parts | {"loss": losses}

    def _draw_times(self, key: Array, rows: int) -> Array:
        return self._process.draw_times(self.run.process, key, rows)

    def _spread_times(self, key: Array, rows: int):
        """Times of validation, as `_validation_parts` takes them."""
        return self._process.spread_times(self.run.process, key, rows)

    @property
    def _process(self):
        return process_module(self.run.process)

    def _clean(self, batch, key: Array) -> Array:
        """Images, videos, or latents as the net sees them: scaled draws from their posterior."""
        if not isinstance(self.run.data, LatentData):
            return batch[pixels_of(self.run.data)]
        noise = jax.random.normal(key, batch["mean"].shape)
        drawn = sample_posterior(batch["mean"], batch["logvar"], noise)
        return self.run.data.scaling_factor * drawn

    def _told(self, batch) -> dict[str, Array]:
        """What of a batch the net is told, by the names of its arguments."""
        text = ("context", "context_mask") if self.sizes.context != "none" else ()
        return {name: batch[name] for name in ("labels", *text)}

    def _losses(self, params, stats, x: Array, told: dict, t: Array, noise: Array, rngs):
        def denoise(x_t, time):
            return self.net.apply({"params": params}, x_t, time, **told, rngs=rngs)[0]

        return self._process.training_loss(self.run.process, denoise, x, t, noise)

    def check_data(self, data):
        net, at = self.sizes, field_of_dit(self.run)
        if net.num_classes and data.num_classes > net.num_classes:
            raise UserError(
                f"{at}.num_classes={net.num_classes}, but the data have {data.num_classes} "
                f"classes; set {at}.num_classes={data.num_classes}"
            )
        if isinstance(self.run.data, LatentData):
            check_latents(self.run, net, data.shape, data.scaling_factor)
        if net.context != "none":
            text, held = data.text, self.run.data.text
            if (text.length, text.width) != (net.context_length, net.context_dim):
                raise UserError(
                    f"data.text={held} holds {text.length} tokens of {text.width} features, the "
                    f"net reads {net.context_length} of {net.context_dim}; set "
                    f"{at}.context_length={text.length} {at}.context_dim={text.width}"
                )


def pixels_of(data) -> str:
    """What pixels are of: the name of their array in a batch."""
    return "videos" if isinstance(data, VideoData) else "images"


def field_of_dit(run: Run) -> str:
    """Where the sizes of images and classes are in a config."""
    return "net.base" if hasattr(run.net, "base") else "net"


def check_latents(run: Run, net: Sizes, shape: tuple[int, int, int], scaling_factor: float) -> None:
    """Raises UserError unless latents of a shape (h, w, C) and the scaling factor of what made
    them are those that `net`, of the run, is to be trained on."""
    size, at = (net.input_size, net.input_size, net.in_channels), field_of_dit(run)
    if tuple(shape) != size:
        raise UserError(
            f"the net takes latents of shape {size}, these have {tuple(shape)}; set "
            f"{at}.input_size={shape[0]} {at}.in_channels={shape[2]}, or encode images of another "
            "size"
        )
    if abs(scaling_factor / run.data.scaling_factor - 1) > 1e-6:
        raise UserError(
            f"data.scaling_factor={run.data.scaling_factor}, but that of the autoencoder of these "
            f"latents is {scaling_factor}; set data.scaling_factor={scaling_factor}"
        )
