"""Families forward (the net with intermediates, gradients, guidance) and pos_embed."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from lintime.model.convert.dit import (
    dit_config_from_fields,
    dit_config_from_reference,
    dit_from_reference,
)
from lintime.model.layers.positions import sincos_positions
from lintime.model.nets.dit import DiT, DiTConfig

from ..compare import Report
from ..manifest import Case
from ..quick import quick_jit


def config_of(case: Case) -> DiTConfig:
    """The config of a case, which must be what the arrays tell."""
    config = dit_config_from_fields(case.config.get("model", case.config))
    told = dit_config_from_reference(
        case.params,
        n_head=config.n_head,
        class_dropout=config.class_dropout,
        input_size=0 if "pos_embed" in case.params else config.input_size,
    )
    if told.d_intermediate == config.d_intermediate:  # of which shapes tell the ratio nearly
        told = dataclasses.replace(told, mlp_ratio=config.mlp_ratio)
    if told != config:
        raise ValueError(f"the arrays tell {told}, the config says {config}")
    return config


def net_and_params(case: Case) -> tuple[DiT, dict]:
    """The net of a case and its parameters."""
    config = config_of(case)
    return DiT(config), jax.tree.map(jnp.asarray, dit_from_reference(case.params, config))


def nhwc(x) -> np.ndarray:
    """Images with channels last."""
    return np.moveaxis(np.asarray(x), 1, -1)


def nchw(x) -> np.ndarray:
    """Images with channels second."""
    return np.moveaxis(np.asarray(x), -1, 1)


def guided(net: DiT, params, x, t, labels, scale, channels: int = 3):
    """The reference's guidance batch: the first half of x serves both halves, the first `channels`
    of the output are guided and written to both.
    """
    half = x.shape[0] // 2
    out, _ = net.apply({"params": params}, jnp.concatenate([x[:half]] * 2), t, labels)
    with_class, without = out[:half, ..., :channels], out[half:, ..., :channels]
    mixed = without + scale * (with_class - without)
    return jnp.concatenate([jnp.concatenate([mixed] * 2), out[..., channels:]], axis=-1)


def forward(report: Report) -> None:
    """Output, intermediates, gradients of inputs and parameters, guidance, forced label dropout."""
    case = report.case
    net, params = net_and_params(case)
    x, t, labels = nhwc(report.input("x")), report.input("t"), report.input("y")
    cotangent = nhwc(report.input("cotangent"))

    def objective(params, x):
        (out, _), seen = net.apply({"params": params}, x, t, labels, mutable=["intermediates"])
        return jnp.sum(out * cotangent), (out, seen["intermediates"])

    run = quick_jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (_, (out, seen)), (gradient, grad_x) = run(params, x)
    report.check("out", nchw(out))
    report.check("grad_x", nchw(grad_x))
    spec = case.entry.get("tolerance", {})
    loose = dataclasses.replace(case.tolerance, atol=spec.get("t_freq_atol", case.tolerance.atol))
    report.check("t_freq", seen["t_embedder"]["features"][0], tolerance=loose)
    for name, ours in {"x_patch": "patches", "t_emb": "time", "y_emb": "label"}.items():
        report.check(name, seen[ours][0])
    report.check("final_tokens", seen["tokens"][0])
    for name in case.arrays:
        match = re.fullmatch(r"block(\d+)_(attn|mlp|out)", name)
        if match:
            ours = {"attn": "mixed", "mlp": "mlp_out", "out": "out"}[match[2]]
            report.check(name, seen["blocks"][ours][0][int(match[1])])
    load = lambda flat: dit_from_reference(
        {n: a for n, a in flat.items() if n != "pos_embed"}, net.config
    )
    report.check_params("grad.", gradient, load)
    if "out_cfg" in report:
        scale = report.input("cfg_scale")
        run = quick_jit(lambda p, x: guided(net, p, x, t, labels, scale))
        report.check("out_cfg", nchw(run(params, x)))
    if "force_drop_ids" in report:
        drop = report.input("force_drop_ids") == 1
        _, seen = net.apply(
            {"params": params}, t, labels, drop=drop, method="condition",
            mutable=["intermediates"],
        )  # fmt: skip
        report.check("y_emb_forced_drop", seen["intermediates"]["label"][0])


def pos_embed(report: Report) -> None:
    """Tables named D<width>_g<grid>, in float64."""
    for name in report.case.arrays:
        match = re.fullmatch(r"D(\d+)_g(\d+)", name)
        if match:
            side = int(match[2])
            report.check(name, sincos_positions(int(match[1]), (side, side)))
