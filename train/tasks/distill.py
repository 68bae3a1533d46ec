"""Training of a DiT with other mixers to do what a trained DiT does (`Run.distill`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ...model.nets.dit import DiT, DiTConfig
from ...model.nets.replace_mixer import (
    MIXER_FIELDS,
    check_replacement,
    errors,
    is_mixer,
    mixer_name,
    replace_mixers,
    trace,
)
from ...model.partition import parameter_shardings
from ..checkpoint import FOLDER, restore_inference
from ..config_files import read_config
from ..errors import UserError
from ..flops import count_flops
from ..schema import Distill, Run
from .diffusion import DiffusionTask

# Fields of a process that change neither what a net is asked nor the time it is told.
_FREE = ("loss", "weighting", "times", "time_mean", "time_std", "floor")


class DistillTask(DiffusionTask):
    """Mean squared plus mean absolute error between student and teacher at the noisy images, times
    and conditions of the run's own process and data (arXiv 2604.06129, SD3).

    Layer by layer, block i of the student gets what goes into block i of the teacher, and the error
    is of what comes out; nothing but mixers has a gradient or an optimiser state. End to end the
    student runs on its own, and the error is of the outputs of all blocks and of the net.

    The teacher is in `stats`: no gradient, no optimiser, no average. It is read anew whenever a run
    starts and is no part of its checkpoints, which remember its hash.

    Validation has as `loss` that of the process, which any run of these data can be compared with,
    as `teacher_loss` the teacher's, and as `distill` what is trained on.
    """

    sharded = ("teacher",)

    @property
    def teacher(self) -> Run:
        """The run that trained the teacher.

        Raises:
            UserError: there is none, or one of another model or process.
        """
        return read_teacher(self.run)

    def init(self, key):
        """As any DiT; the teacher is zeros until `fixed_stats` takes their place."""
        teacher = jax.eval_shape(_plain(self.teacher).init, key)["params"]
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), teacher)
        return super().init(key) | {"stats": {"teacher": zeros}}

    def abstract(self):
        """Inference needs the student only; the teacher need not be there."""
        params = jax.eval_shape(super().init, jax.random.key(0))["params"]
        return {"params": params, "stats": {}}

    def fixed_stats(self):
        abstract = jax.eval_shape(_plain(self.teacher).init, jax.random.key(0))
        loaded = restore_inference(self.run.distill.teacher, abstract)
        return {"teacher": jax.tree.map(np.asarray, loaded["params"])}

    def optimizer(self):
        train = super().optimizer()
        if not self.run.distill.layers:
            return train
        names = {True: "mixers", False: "rest"}
        label = lambda params: jax.tree.map(names.__getitem__, is_mixer(params, self.sizes))
        return optax.partition({"mixers": train, "rest": optax.set_to_zero()}, label)

    def frozen_flops(self):
        """The teacher's; layer by layer the blocks' frozen parts count as if they were trained."""
        shape, rows = self.sizes.shape, self.run.batch_size
        x = jax.ShapeDtypeStruct((rows, *shape), "float32")
        labels = jax.ShapeDtypeStruct((rows,), "int32")
        net = DiT(self.teacher.net)
        params = jax.eval_shape(_plain(self.teacher).init, jax.random.key(0))
        call = lambda params, x, labels: net.apply(params, x, labels, labels)[0]
        return count_flops(call, {"params": params["params"]}, x, labels)

    def _restored(self, path, wanted):
        """Weights of this net, or those of a DiT with other mixers, beside new mixers."""
        saved = Path(path).expanduser() / "config.json"
        old = read_config(saved).net if saved.is_file() else None
        if not isinstance(old, DiTConfig) or same_mixers(old, self.sizes):
            return super()._restored(path, wanted)
        try:
            check_replacement(old, self.sizes)
        except ValueError as error:
            raise UserError(f"net: {error}") from error
        mesh = jax.tree.leaves(wanted)[0].sharding.mesh
        abstract = jax.eval_shape(
            _plain(dataclasses.replace(self.run, net=old)).init, jax.random.key(0)
        )["params"]
        abstract = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            abstract, parameter_shardings(abstract, mesh),
        )  # fmt: skip
        kept = restore_inference(path, {"params": abstract, "stats": {}})["params"]
        name = mixer_name(self.sizes)
        fresh = jax.jit(
            lambda key: new_mixers(self.run, key),
            out_shardings=jax.tree.map(lambda a: a.sharding, wanted["params"]["blocks"][name]),
        )(jax.random.key(self.run.seed))
        params = replace_mixers(kept, {"blocks": {name: fresh}}, old, self.sizes)
        return {"params": params, "stats": {}}

    def _losses(self, params, stats, x, told, t, noise, rngs):
        distill, process = self.run.distill, self.run.process
        # One draw for both nets: what is dropped is decided here, not in them.
        if rngs and self.sizes.class_dropout:
            drop = jax.random.bernoulli(rngs["dropout"], self.sizes.class_dropout, t.shape)
            told = {**told, "drop": drop}
        teacher = DiT(self.teacher.net, self.dtype, unroll=self.run.precision.unroll)
        made = {}

        def teach(x_t, time):
            made["x"], made["time"] = x_t, time
            made["teacher"] = jax.lax.stop_gradient(
                trace(teacher, stats["teacher"], x_t, time, **told)
            )
            return made["teacher"].out

        def follow(x_t, time):
            made["student"] = trace(self.net, params, x_t, time, **told)
            return made["student"].out

        taught, _ = self._process.training_loss(process, teach, x, t, noise)
        target = made["teacher"]
        if distill.layers:
            frozen = lambda a, train: a if train else jax.lax.stop_gradient(a)
            params = jax.tree.map(frozen, params, is_mixer(params, self.sizes))
            outputs = self.net.apply(
                {"params": params}, target.inputs, made["time"], **told, method=DiT.each_block
            )
            mse, mae = errors(outputs, target.outputs, stacked=True)
            return mse + mae, {"block_mse": mse, "block_mae": mae, "teacher_loss": taught}
        losses, _ = self._process.training_loss(process, follow, x, t, noise)
        block = errors(made["student"].outputs, target.outputs, stacked=True)
        output = errors(made["student"].out, target.out)
        total = distill.block_weight * sum(block) + distill.output_weight * sum(output)
        names = ("block_mse", "block_mae", "output_mse", "output_mae")
        parts = dict(zip(names, (*block, *output)))
        parts |= {"denoise": losses, "teacher_loss": taught}
        return total + distill.denoise_weight * losses, parts

    def _validation_parts(self, params, stats, x, told, t, noise) -> dict[str, Array]:
        losses, _ = super()._losses(params, stats, x, told, t, noise, {})
        if "teacher" not in stats:  # `lintime eval` asks what the student does, not how alike
            return {"loss": losses}
        distilled, parts = self._losses(params, stats, x, told, t, noise, {})
        parts.pop("denoise", None)
        return parts | {"loss": losses, "distill": distilled}


def same_mixers(a: DiTConfig, b: DiTConfig) -> bool:
    """Whether mixers of both have the same parameters with the same meaning."""
    return all(getattr(a, name) == getattr(b, name) for name in MIXER_FIELDS)


def new_mixers(run: Run, key: Array) -> dict[str, Any]:
    """The mixers of a new net of the run, before it learns."""
    return _plain(run).init(key)["params"]["blocks"][mixer_name(run.net)]


def _plain(run: Run) -> DiffusionTask:
    """What trains the net of a run without a teacher."""
    return DiffusionTask(dataclasses.replace(run, distill=Distill()))


def read_teacher(run: Run) -> Run:
    """The run of `run.distill.teacher`, a path.

    Raises:
        UserError: it is not there, not finished, or does not fit `run`.
    """
    path = Path(run.distill.teacher).expanduser()
    if not (path / "config.json").is_file() or not (path / FOLDER).is_dir():
        raise UserError(
            f"distill.teacher={path} is no run directory (config.json and {FOLDER}/); name the "
            "trained DiT, or make a run of a published one with `lintime convert`"
        )
    teacher = read_config(path / "config.json")
    check_teacher(teacher, run, str(path))
    return teacher


def check_teacher(teacher: Run, run: Run, place: str) -> None:
    """Whether the net of `teacher` can teach that of `run`.

    Raises:
        UserError: it is no DiT, differs in more than its mixers, or is asked for something else.
    """
    what = f"distill.teacher={place}"
    if not isinstance(teacher.net, DiTConfig):
        raise UserError(f"{what} is a {type(teacher.net).__name__}, not a DiT; name a run of one")
    try:
        check_replacement(teacher.net, run.net)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error
    theirs, own = teacher.process, run.process
    if type(theirs) is not type(own):
        raise UserError(
            f"{what} was trained with process={type(theirs).__name__}, the run has "
            f"{type(own).__name__}; take the teacher's"
        )
    for name, value in vars(theirs).items():
        if name not in _FREE and getattr(own, name) != value:
            raise UserError(
                f"{what} was trained with process.{name}={value}, the run has "
                f"{getattr(own, name)}; set process.{name}={value}"
            )


def check_distill(run: Run) -> None:
    """Whether the fields of `distill` fit the run and each other.

    Raises:
        UserError: the first fault, and what to set instead.
    """
    distill, usual = run.distill, Distill()
    if not distill.teacher:
        for name, value in vars(usual).items():
            if getattr(distill, name) != value:
                raise UserError(
                    f"distill.{name}={getattr(distill, name)} would be ignored: distill.teacher "
                    "names none; set it, or leave this out"
                )
        return
    if not isinstance(run.net, DiTConfig):
        raise UserError(
            f"distill.teacher={distill.teacher}: only a DiT can be distilled, the net is a "
            f"{type(run.net).__name__}; leave it out"
        )
    if not distill.layers:
        if not (distill.block_weight or distill.output_weight or distill.denoise_weight):
            raise UserError(
                "distill.block_weight, output_weight and denoise_weight are all 0: nothing is "
                "learned; set one of them"
            )
        return
    if not run.init_from:
        raise UserError(
            "distill.layers=true trains the mixers only; set init_from to the teacher's run, whose "
            "other weights it takes"
        )
    for name in ("block_weight", "output_weight", "denoise_weight"):
        if getattr(distill, name) != getattr(usual, name):
            raise UserError(
                f"distill.{name}={getattr(distill, name)} would be ignored with "
                "distill.layers=true; leave it out"
            )
