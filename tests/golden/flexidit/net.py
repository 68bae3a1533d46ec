"""Families shared, shared_init and lora: the net in every mode, with gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lintime.model.convert.dit import dit_config_from_fields, dit_from_reference
from lintime.model.convert.flexidit import flexidit_from_reference, flexidit_to_reference
from lintime.model.nets.dit import DiT
from lintime.model.nets.flexidit import FlexiDiTConfig, flexify, mode_config, mode_params

from ..compare import Report
from ..dit.net import nchw, nhwc
from ..quick import quick_jit


def config_of(case: dict[str, Any]) -> FlexiDiTConfig:
    """The net of a case's config.

    Raises:
        AssertionError: p0 is not the patch of the base.
    """
    base = dit_config_from_fields(case["model"])
    p0 = case.get("p0", base.patch_size)
    assert p0 == base.patch_size, f"p0={p0}, the base has patch {base.patch_size}"
    if case["variant"] == "lora":
        sizes = tuple(sorted({p0, *case["modes"]}))
        more = {"rank": case["rank"], "alpha": case["alpha"], "targets": tuple(case["targets"])}
    else:
        sizes, more = tuple(case["patch_sizes"]), {"underlying": case.get("p_star", 0)}
    return FlexiDiTConfig(
        base=base, patch_sizes=sizes, variant=case["variant"], resize=case["resize"], **more
    )


def shared_init(report: Report) -> None:
    """The pre-trained DiT, what it becomes, and every mode of that."""
    config = config_of(report.case.config)
    dit = dit_from_reference(report.case.params, config.base)
    params = flexify(config, dit, jax.random.key(0))
    written = flexidit_to_reference(params, config)
    report.check("flex_embed_weight", written["x_embedder.flex.weight"])
    report.check("flex_deembed_weight", written["final_layer.flex.weight"])
    report.check("flex_deembed_bias", written["final_layer.flex.bias"])
    if "out_base_dit" in report:
        x, t, y = (report.input(name) for name in ("x", "t", "y"))
        for how, net, own in (
            ("plain", DiT(config.base), dit),
            ("mode p0", *_mode(config, params, config.powerful)),
        ):
            out, _ = quick_jit(net.apply)({"params": own}, nhwc(x), t, y)
            report.check("out_base_dit", nchw(out), how=how)
    _modes(report, config, params)


def shared(report: Report) -> None:
    """Every mode of given shared weights; they can be written as they were read."""
    config = config_of(report.case.config)
    if report.case.config.get("at_initialisation"):
        return shared_init(report)
    params = flexidit_from_reference(report.case.params, config)
    _written_again(report, config, params)
    _modes(report, config, params)


def lora(report: Report) -> None:
    """Every mode of given adapters, the base's bit for bit, and what a mode starts from."""
    config = config_of(report.case.config)
    params = flexidit_from_reference(report.case.params, config)
    _written_again(report, config, params)
    _modes(report, config, params)

    fresh = flexify(config, params["base"], jax.random.key(0))
    written = flexidit_to_reference(fresh, config)
    for name, rest in list(report.matching("init.")):
        report.check(name, written[rest])
    x, t, y = (report.input(name) for name in ("x", "t", "y"))
    outputs = [
        quick_jit(net.apply)({"params": own}, nhwc(x), t, y)[0]
        for net, own in (
            (DiT(config.base), params["base"]), _mode(config, params, config.powerful)
        )
    ]  # fmt: skip
    if not np.array_equal(*outputs):
        report.fail(f"p{config.powerful}_out", "the mode of the base is not the base bit for bit")


def _mode(config, params, patch: int):
    return DiT(mode_config(config, patch)), mode_params(config, params, patch)


def _written_again(report: Report, config, params) -> None:
    """What is read and written again is the file."""
    back = flexidit_to_reference(params, config)
    for name in sorted(report.case.params.keys() ^ back.keys()):
        report.fail(name, "not in both the file and what would be written")
    for name in report.case.params.keys() & back.keys():
        if name != "pos_embed" and not np.array_equal(back[name], report.case.params[name]):
            report.fail(name, "differs when written again")


def _modes(report: Report, config: FlexiDiTConfig, params) -> None:
    """Outputs, effective weights, token streams and gradients of the modes of a case."""
    params = jax.tree.map(jnp.asarray, params)
    x, t, y = nhwc(report.input("x")), report.input("t"), report.input("y")
    learned = lambda flat: {n: a for n, a in flat.items() if n != "pos_embed"}
    load = lambda flat: flexidit_from_reference(learned(flat), config)
    for patch in config.patch_sizes:
        name = f"p{patch}_"
        if f"{name}out" not in report:
            continue
        net = DiT(mode_config(config, patch))
        cotangent = nhwc(report.input(f"{name}cotangent", np.zeros((len(x), 1, 1, 1))))

        def objective(params, net=net, patch=patch, cotangent=cotangent):
            own = mode_params(config, params, patch)
            (out, _), seen = net.apply({"params": own}, x, t, y, mutable=["intermediates"])
            return jnp.sum(out * cotangent), (out, own, seen["intermediates"])

        (_, (out, own, seen)), grads = quick_jit(jax.value_and_grad(objective, has_aux=True))(
            params
        )
        report.check(f"{name}out", nchw(out))
        _weights(report, name, config, patch, own)
        shift = params.get("patch_size_embed", {}).get(f"p{patch}", 0.0)
        report.check(f"{name}tokens_in", seen["patches"][0] - shift)
        for i in range(config.base.n_layer):
            report.check(f"{name}block{i}_out", seen["blocks"]["out"][0][i])
        if f"{name}cotangent" in report:
            report.check_params(f"{name}grad.", grads, load)


def _weights(report: Report, name: str, config, patch: int, own) -> None:
    """The effective (de-)embedding of a mode, in the reference's layout."""
    c = dataclasses.replace(config.base, patch_size=patch)
    kernel = own["x_embedder"]["kernel"].reshape(patch, patch, c.in_channels, c.d_model)
    report.check(f"{name}W_embed", kernel.transpose(3, 2, 0, 1))
    report.check(f"{name}W_deembed", own["final"]["kernel"].T)
    report.check(f"{name}b_deembed", own["final"]["bias"])
