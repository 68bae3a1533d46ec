"""Training of diffusion and flow-matching models: DiT (arXiv 2212.09748) and its relatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from ..model.nets.dit import DiT
from ..model.processes import flow, gaussian
from ..model.processes.flow import FlowMatching
from ..model.processes.gaussian import GaussianDiffusion
from .errors import UserError
from .task import Task

PROCESSES = {GaussianDiffusion: gaussian, FlowMatching: flow}


class DiffusionTask(Task):
    """The loss of `run.process` at random times, over images or latents.

    Class dropout acts in training only. Validation visits, for image i of a batch of B, the times
    (i + u) / B of the process with a fixed u and fixed noise, so that its loss has little noise of
    its own and is the same at every validation but for the weights.
    """

    metric = "loss"

    @property
    def net(self) -> DiT:
        precision = self.run.precision
        return DiT(self.run.net, self.dtype, precision.remat, precision.unroll)

    def abstract_batch(self):
        rows, net = self.run.batch_size, self.run.net
        shape = (rows, net.input_size, net.input_size, net.in_channels)
        return {
            "images": jax.ShapeDtypeStruct(shape, "float32"),
            "labels": jax.ShapeDtypeStruct((rows,), "int32"),
            "valid": jax.ShapeDtypeStruct((rows,), "bool"),
        }

    def init(self, key):
        net = self.run.net
        x = jnp.zeros((1, net.input_size, net.input_size, net.in_channels))
        variables = self.net.init({"params": key}, x, jnp.zeros((1,)), jnp.zeros((1,), jnp.int32))
        return {"params": variables["params"], "stats": {}}

    def loss(self, params, stats, carry, batch, key):
        key = jax.random.fold_in(key, batch["step"])
        keys = dict(zip(("times", "noise", "dropout"), jax.random.split(key, 3)))
        x = batch["images"]
        t = self._process.draw_times(self.run.process, keys["times"], x.shape[0])
        noise = jax.random.normal(keys["noise"], x.shape)
        rngs = {"dropout": keys["dropout"]}
        losses, parts = self._losses(params, batch, t, noise, rngs)
        total, weight = jnp.sum(losses), jnp.float32(x.shape[0])
        sums = {name: jnp.sum(value) for name, value in parts.items()} | {"rows": weight}
        return total, weight, {}, carry, {"sum": sums, "mean": {}}

    def report(self, sums):
        rows = jnp.maximum(sums["rows"], 1.0)
        return {name: value / rows for name, value in sums.items() if name not in ("rows", "loss")}

    def evaluate(self, params, stats, batch):
        x, valid = batch["images"], batch["valid"].astype(jnp.float32)
        key = jax.random.fold_in(jax.random.key(0), batch["step"])
        times, noise = jax.random.split(key)
        t = self._process.spread_times(self.run.process, times, x.shape[0])
        losses, parts = self._losses(params, batch, t, jax.random.normal(noise, x.shape), {})
        parts = parts | {"loss": losses, "rows": jnp.ones_like(losses)}
        return {name: jnp.sum(value * valid) for name, value in parts.items()}

    def validation(self, sums):
        return {"loss": sums["loss"] / jnp.maximum(sums["rows"], 1.0), **self.report(sums)}

    @property
    def _process(self):
        return PROCESSES[type(self.run.process)]

    def _losses(self, params, batch, t: Array, noise: Array, rngs):
        def denoise(x_t, time):
            return self.net.apply({"params": params}, x_t, time, batch["labels"], rngs=rngs)[0]

        return self._process.training_loss(self.run.process, denoise, batch["images"], t, noise)

    def check_data(self, data):
        net = self.run.net
        if data.num_classes > net.num_classes:
            raise UserError(
                f"net.num_classes={net.num_classes}, but the data have {data.num_classes} classes; "
                f"set net.num_classes={data.num_classes}"
            )
