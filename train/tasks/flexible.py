"""Training of a FlexiDiT: one net, several patch sizes (arXiv 2502.20126)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ...model.layers.patches import patch_name, patch_sides
from ...model.nets.dit import DiT, DiTConfig
from ...model.nets.flexidit import (
    FlexiDiTConfig,
    features,
    flexify,
    init_params,
    mode_config,
    mode_params,
)
from ...model.partition import parameter_shardings
from ...model.processes.flexible import (
    FlexibleDiffusion,
    FlexibleFlow,
    clean_and_noise,
    distillation_loss,
    draw_mode,
    mmd,
    mode_mixture,
    noised,
    predict_clean,
    time_spans,
    times_at,
)
from ...model.processes.flow import FlowMatching
from ..checkpoint import restore_inference
from ..config_files import read_config
from ..schema import Distill, FlexibleSample, Run
from .diffusion import DiffusionTask


class FlexibleTask(DiffusionTask):
    """The objectives of `run.process` in one patch size per update, which the step number decides.

    With adapters ("lora") the base is in `stats`, where nothing learns: no gradient, no optimiser
    state, no moving average. Validation has the ordinary loss of every patch size, `loss_p2`,
    `loss_p4` and so on, each at the times it trains on, and as `loss` their mean over what is
    trained.
    """

    @property
    def sizes(self):
        return self.run.net.base

    @property
    def modes(self):
        net, process = self.run.net, self.run.process
        return mode_mixture(
            net.patch_sizes, net.powerful, net.variant, powerful_share=process.powerful_share
        )

    def mode_at(self, step):
        return draw_mode(self.modes, self.run.seed, step)

    def init(self, key):
        return split_base(init_params(self.run.net, key))

    def loss(self, params, stats, carry, batch, key):
        *out, metrics = super().loss(params, stats, carry, batch, key)
        *frames, _, side = patch_sides(self.mode or self.run.net.powerful)
        mode = {"patch_size": jnp.float32(side)}
        if frames:
            mode["patch_frames"] = jnp.float32(frames[0])
        return *out, metrics | {"mean": metrics["mean"] | mode}

    def _restored(self, path, wanted):
        """A FlexiDiT's weights, or those of the DiT that is to become flexible."""
        saved = Path(path).expanduser() / "config.json"
        if not saved.is_file() or not isinstance(read_config(saved).net, DiTConfig):
            return super()._restored(path, wanted)
        mesh = jax.tree.leaves(wanted)[0].sharding.mesh
        plain = DiffusionTask(dataclasses.replace(self.run, net=self.sizes))
        base = jax.eval_shape(plain.init, jax.random.key(0))["params"]
        base = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            base, parameter_shardings(base, mesh),
        )  # fmt: skip
        base = restore_inference(path, {"params": base, "stats": {}})["params"]
        made = jax.jit(
            lambda params, key: split_base(flexify(self.run.net, params, key)),
            out_shardings=jax.tree.map(lambda a: a.sharding, wanted),
        )
        return made(base, jax.random.key(self.run.seed))

    def _losses(self, params, stats, x, told, t, noise, rngs):
        net, process = self.run.net, self.run.process
        tree = {**params, **stats}
        mode = self.mode or net.powerful
        # One draw for both modes: what is dropped is decided here, not in the net.
        if rngs and self.sizes.class_dropout:
            drop = jax.random.bernoulli(rngs["dropout"], self.sizes.class_dropout, t.shape)
            told = {**told, "drop": drop}
        outputs = {}

        def denoise(x_t, time, patch=mode):
            precision = self.run.precision
            dit = DiT(mode_config(net, patch), self.dtype, precision.remat, precision.unroll)
            own = mode_params(net, tree, patch)
            outputs["weak"] = dit.apply({"params": own}, x_t, time, **told)[0]
            outputs["seen"], outputs["time"] = x_t, time
            return outputs["weak"]

        losses, parts = self._process.training_loss(process, denoise, x, t, noise)
        losses = process.denoise * losses
        if process.distill and mode != net.powerful:
            weak = outputs["weak"]
            powerful = denoise(outputs["seen"], outputs["time"], net.powerful)
            extra, more = distillation_loss(
                weak, powerful, x.shape[-1], variance_weight=process.distill_variance
            )
            losses, parts = losses + process.distill * extra, parts | more
        if process.match and mode != net.powerful:
            key = jax.random.fold_in(rngs["dropout"], 1)
            match = self._match(denoise, tree, x, told, noise, key)
            losses = losses + process.match * match
            parts = parts | {"match": jnp.full(losses.shape, match)}
        return losses, parts

    def _match(self, denoise, tree, x, told, noise, key) -> Array:
        """[]: discrepancy of what the weak and the powerful mode predict from far away."""
        net, process = self.run.net, self.run.process
        ends = self._span(self.mode), process.match_t_range
        low, high = max(a for a, _ in ends), min(b for _, b in ends)
        t = times_at(process, jax.random.uniform(key, (len(x),), minval=low, maxval=high))
        x_t = noised(process, x, t, noise)
        weak, _ = clean_and_noise(process, denoise(x_t, t), x_t, t)
        teach = lambda x_t, time: denoise(x_t, time, net.powerful)
        powerful = predict_clean(process, teach, x_t, t, process.match_steps)

        def seen(images):
            if process.match_features == "pixels":
                return images.reshape(len(images), -1)
            clean = times_at(process, jnp.zeros((len(images),)))
            return features(net, tree, images, clean, told, dtype=self.dtype)

        powerful = seen(jax.lax.stop_gradient(powerful))
        return mmd(seen(weak), powerful, process.match_kernel, median=True)

    def _span(self, patch) -> tuple[float, float]:
        """Shares of the noise on which a mode trains."""
        return time_spans(self.run.process, self.run.net.others).get(patch, (0.0, 1.0))

    def _draw_times(self, key, rows):
        low, high = self._span(self.mode)
        if (low, high) == (0.0, 1.0):
            return super()._draw_times(key, rows)
        share = jax.random.uniform(key, (rows,), minval=low, maxval=high)
        return times_at(self.run.process, share)

    def _spread_times(self, key, rows):
        """{patch: times [B]}, spread over those it trains on."""
        times, everywhere = {}, super()._spread_times(key, rows)
        for patch in self.run.net.patch_sizes:
            low, high = self._span(patch)
            place = (jnp.arange(rows) + jax.random.uniform(key, (rows,))) / rows
            within = times_at(self.run.process, low + (high - low) * place)
            times[patch] = everywhere if (low, high) == (0.0, 1.0) else within
        return times

    def _validation_parts(self, params, stats, x, told, t, noise) -> dict[str, Array]:
        plain = dataclasses.replace(self.run.process, denoise=1.0, distill=0.0, match=0.0)
        run = dataclasses.replace(self.run, process=plain)
        task = lambda patch: FlexibleTask(run, patch)
        losses = {
            patch: task(patch)._losses(params, stats, x, told, t[patch], noise, {})[0]
            for patch in sorted(self.run.net.patch_sizes)
        }
        out = {f"loss_p{patch_name(patch)}": value for patch, value in losses.items()}
        return out | {"loss": sum(share * losses[p] for p, share in self.modes.items())}


def flexible_run(run: Run, net: FlexiDiTConfig) -> Run:
    """The run of a DiT with another net, and process and samples as that takes them.

    Modes of the shared variant learn what the net was trained for; adapters ("lora") follow the
    powerful mode alone.
    """
    flow = isinstance(run.process, FlowMatching)
    terms = {"denoise": 0.0, "distill": 1.0} if net.variant == "lora" else {}
    process = (FlexibleFlow if flow else FlexibleDiffusion)(**vars(run.process), **terms)
    sample = FlexibleSample(**vars(run.sample))
    return dataclasses.replace(
        run, net=net, process=process, sample=sample, init_from="", distill=Distill(), stages=()
    )


def split_base(tree: dict[str, Any]) -> dict[str, Any]:
    """{"params", "stats"} of a FlexiDiT's whole tree: a frozen base is no parameter."""
    params = dict(tree)
    base = params.pop("base", None)
    return {"params": params, "stats": {} if base is None else {"base": base}}
