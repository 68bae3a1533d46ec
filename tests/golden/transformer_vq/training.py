"""Families optimizer, schedules and trainstep: updates of parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lintime.model.convert.transformer_vq import from_reference_main
from lintime.model.layers.codebook import update_codebook
from lintime.train.optimizers import make_optimizer, make_schedule
from lintime.train.schema import Optim
from lintime.train.state import TrainState
from lintime.train.step import make_train_step

from ..compare import Report
from ..quick import quick_jit
from .common import check_metrics, is_codebook
from .net import cut_batch, language_task, read_batch

DEFECT = "inv_sqrt: reference defect, not reproduced"


def optim_of(recipe: Mapping[str, Any], constants: Mapping[str, Any]) -> Optim:
    """The optimiser of a recipe; `constants` may hold {b1, b2, eps} under "adam" and "lion"."""
    name = recipe["optimizer"]
    fields = {"lion": {"b1": 0.95, "b2": 0.98}}.get(name, {"b1": 0.9, "b2": 0.98, "eps": 1e-9})
    given = constants.get(name.removesuffix("w"), {})
    given = {k: given[k] for k in ("b1", "b2", "eps") if isinstance(given, dict) and k in given}
    return Optim(
        name=name,
        learning_rate=recipe["lr_max"],
        schedule=recipe["lr_schedule"],
        warmup=recipe["n_warmup_step"],
        decay_steps=recipe["n_max_step"],
        weight_decay=recipe["wd_lam"],
        clip=recipe["grad_clip"] or 0.0,
        **{**fields, **given},
    )


def schedules(report: Report) -> None:
    """Multipliers of the learning rate at counts 0, 1, ..."""
    config = report.case.config
    for name, expected in report.case.arrays.items():
        if name == "inv_sqrt":
            report.informational(name)
            report.note(DEFECT)
            continue
        optim = Optim(
            schedule=name, warmup=config["n_warmup_step"], decay_steps=config["n_max_step"]
        )
        schedule = make_schedule(optim, config["n_max_step"])
        report.check(name, quick_jit(jax.vmap(schedule))(jnp.arange(len(expected))))


def optimizer(report: Report) -> None:
    """Chains of optimisers on given gradients; codebook leaves by gradient descent at rate 1."""
    case = report.case
    start = {name: jnp.asarray(a) for name, a in case.params.items()}
    found = (re.match(r"grad(\d+)/", name) for name in case.arrays)
    steps = 1 + max(int(match[1]) for match in found if match)
    for recipe, fields in case.config["recipes"].items():
        if fields["lr_schedule"] == "inv_sqrt":
            report.informational(f"{recipe}/*")
            report.note(DEFECT)
            continue
        transformation = make_optimizer(optim_of(fields, case.config), fields["n_max_step"])

        # Within one jit XLA may keep Lion's bfloat16 momentum in float32 between operations.
        lion = fields["optimizer"] == "lion"
        update = transformation.update if lion else quick_jit(transformation.update)
        params = {n: a for n, a in start.items() if not is_codebook(n)}
        codebooks = {n: a for n, a in start.items() if is_codebook(n)}
        state = transformation.init(params)
        for t in range(steps):
            gradients = {name: jnp.asarray(report.input(f"grad{t}/{name}")) for name in start}
            # The gradient is "codebook minus updated codebook": here the update itself is given.
            updated = {name: a - gradients[name] for name, a in codebooks.items()}
            codebooks = update_codebook(codebooks, updated, decay=0.0)
            ordinary = {name: gradients[name] for name in params}
            updates, state = update(ordinary, state, params)
            params = optax.apply_updates(params, updates)
            after = {**params, **codebooks}
            _check_after(report, f"{recipe}/params_after{t + 1}", after, _sign_flip(fields))


def _sign_flip(recipe: Mapping[str, Any]) -> float:
    """How far off a parameter is when rounding of Lion's momentum flips its update's sign."""
    return 2 * recipe["lr_max"] if recipe["optimizer"] == "lion" else 0.0


def _check_after(report: Report, prefix: str, params: Mapping[str, Any], jump: float) -> None:
    """Arrays `prefix`/<parameter> and `prefix`_rows<a>to<b>/<parameter>."""
    for name, rest in report.matching(prefix):
        match = re.fullmatch(r"(?:_rows(\d+)to(\d+))?/(.+)", rest)
        if not match or match[3] not in params:
            continue
        value = params[match[3]]
        if match[1]:
            value = value[int(match[1]) : int(match[2]) + 1]
        report.check(name, value, jump=jump)


def trainstep(report: Report) -> None:
    """Training over batches of sequences, each cut into updates; then one evaluation pass."""
    case, config = report.case, report.case.config
    found = (re.fullmatch(r"seq(\d+)_inputs", name) for name in case.arrays)
    numbers = sorted(int(match[1]) for match in found if match)
    batches = {s: read_batch(report, f"seq{s}_") for s in numbers}
    rows, length = batches[numbers[0]]["inputs"].shape
    recipe, update_len = config["recipe"], config["update_len"]
    if recipe["lr_schedule"] == "inv_sqrt":
        report.informational("seq*", "eval_*")
        report.note(DEFECT)
        return
    task = language_task(
        report, length, update_len, optim=optim_of(recipe, config), steps=recipe["n_max_step"],
        batch_size=rows,
    )  # fmt: skip
    variables = jax.tree.map(jnp.asarray, from_reference_main(case.params))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        opt=make_optimizer(task.run.optim, task.run.steps).init(variables["params"]),
        ema={},
        stats=variables["stats"],
        carry=task.init_carry(rows),
    )
    step = quick_jit(make_train_step(task, task.run))
    for s in numbers:
        reports = []
        for n in range(length // update_len):
            state, metrics = step(state, cut_batch(batches[s], n, update_len, step=state.step))
            reports.append(_under_reference_names(metrics, task))
            if not metrics["ok"]:
                report.fail(f"seq{s}_inputs", f"update {n} was refused")
        metrics = jax.tree.map(lambda *xs: np.mean(xs), *reports)
        check_metrics(report, f"seq{s}_metric_", metrics)
        after = {"params": state.params, "stats": state.stats}
        report.check_params(
            f"seq{s}_params_after/", after, from_reference_main, absent=case.params,
            tolerance=lambda name: _codebook_tolerance(report) if is_codebook(name) else None,
            jump=_sign_flip(recipe),
        )  # fmt: skip
    last = batches[numbers[-1]]
    sums = quick_jit(task.evaluate)(state.params, state.stats, last)
    report.check("eval_last_loss_lm_per_token_unscaled", sums["nll"] / last["mask"].size)
    report.check("eval_last_loss_mask_per_token", sums["tokens"] / last["mask"].size)


def _under_reference_names(metrics: Mapping[str, Any], task) -> dict[str, Any]:
    """Metrics of an update, and the mean losses over all positions worked out of them."""
    lm = metrics["loss"] - task.config.commit_weight * metrics["commit"]
    per_token = metrics[task.metric] * np.log(2.0)
    return {
        **metrics,
        "loss_lm_per_token_unscaled": lm,
        "loss_commit_per_token": metrics["commit"],
        "loss_mask_per_token": lm / per_token,
    }


def _codebook_tolerance(report: Report):
    """The tolerance the note gives for codebook leaves, or the case's."""
    tolerance = report.case.tolerance
    found = re.search(r"codebook leaves .*?(\d[\d.]*(?:e[+-]?\d+)?)", tolerance.note)
    if not found:
        return tolerance
    return type(tolerance)(*[float(found[1])] * 4)
