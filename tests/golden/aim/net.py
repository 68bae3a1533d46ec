"""Family aim: the second stage, teacher-forced with gradients, and greedy guided generation."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lintime.model.convert.aim import HEAD, config_from_reference, from_reference
from lintime.model.nets.aim import AiM, AiMConfig
from lintime.model.sampling.classes import make_class_sampler, row_keys

from ..compare import Report
from ..quick import quick_jit

# Word for a position convention in the arrays' names -> position_offset.
POSITIONS = {"reference": 1, "training": 0}
# Intermediates of the whole net: the reference's name -> that under which the net sows it.
WHOLE = {"embed": "embedded", "norm_f_out": "normed", "final_layer_out": "final"}
BLOCK = {"mixer_in": "mixer_in", "out": "out"}


def aim(report: Report) -> None:
    """Intermediates, logits, loss and gradients by parameter; then tokens by class."""
    case = report.case
    config = config_from_reference(case.config)
    load = lambda flat: from_reference(flat, config)["params"]
    params = jax.tree.map(jnp.asarray, load(case.params))
    net = AiM(config)
    codes, labels = report.input("codes"), report.input("labels")

    def objective(params):
        (logits, _), collected = net.apply(
            {"params": params}, codes, labels, mutable=["intermediates"]
        )
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], axis=-1)
        return -jnp.mean(picked), (logits, collected["intermediates"])

    run = quick_jit(jax.value_and_grad(objective, has_aux=True))
    (loss, (logits, seen)), gradient = run(params)
    report.check("logits", logits)
    report.check("loss", loss)
    check_intermediates(report, config, seen)

    head = [n for n in case.params if n.endswith(HEAD)]
    if config.tie_embeddings:  # one matrix here: both copies' gradient is the total one
        for name in head:
            report.check(f"grad.param.{name}", gradient["embedding"])
            del case.params[name]
    report.check_params("grad.param.", gradient, lambda flat: from_reference(flat)["params"])
    check_generation(report, config, {"params": params}, cfg_scale(report))


def check_intermediates(report: Report, config: AiMConfig, seen: Mapping[str, Any]) -> None:
    """The arrays mid.*; blocks are numbered."""
    for theirs, ours in WHOLE.items():
        report.check(f"mid.{theirs}", seen[ours][0])
    if "shared_vectors" in seen:
        report.check("mid.adaln_group_out", jnp.moveaxis(seen["shared_vectors"][0], 0, 1))
    layers = dict(seen["layers"])
    # The reference's residual is that after its last addition, before the block's last branch.
    residual = "residual2" if config.d_intermediate else "residual"
    for i in range(config.n_layer):
        for theirs, ours in (BLOCK | {"residual": residual}).items():
            report.check(f"mid.block{i}.{theirs}", layers[ours][0][i])


def check_generation(
    report: Report, config: AiMConfig, variables: Mapping[str, Any], guidance: float | None
) -> dict[str, np.ndarray]:
    """Greedy tokens and guided logits, for the position conventions that the case has.

    Returns:
        The tokens by convention.
    """
    drawn: dict[str, np.ndarray] = {}
    found: dict[str, list] = {}
    for name in report.case.arrays:
        match = re.fullmatch(r"(gen[._])(ids|logits)_(\w+)_positions", name)
        if match and match[3] in POSITIONS:
            found.setdefault(match[3], []).append((name, match[2]))
    for convention, arrays in found.items():
        net = AiM(dataclasses.replace(config, position_offset=POSITIONS[convention]))
        sampler = make_class_sampler(net, return_logits=True)
        labels = report.input("gen_labels")
        keys = row_keys(jax.random.key(0), len(labels))
        strength = 1.0 if guidance is None else guidance
        ids, logits = sampler(variables, keys, labels, guidance=strength, temperature=0.0)
        got = {"ids": np.asarray(ids), "logits": logits}
        drawn[convention] = got["ids"]
        for name, kind in arrays:
            report.check(name, got[kind], how=f"guidance {strength:g}")
    return drawn


def cfg_scale(report: Report) -> float | None:
    """The guidance strength of a case, wherever it is said."""
    return report.case.config.get("cfg_scale", report.case.entry.get("cfg_scale"))
