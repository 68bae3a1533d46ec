"""Families dih_block, dih, dihpp, dit_baseline (blocks and class-conditional nets)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lintime.model.convert.dih import (
    block_from_reference,
    dih_config_from_fields,
    dih_config_from_reference,
    dih_constants,
    dih_from_reference,
    dih_to_reference,
)
from lintime.model.nets.dih import DiH, DiHConfig
from lintime.model.nets.dih_block import DiHBlock
from lintime.model.processes import noise_levels
from lintime.model.processes.noise_levels import NoiseLevels, shift_of_side

from ..compare import Report
from ..manifest import Case
from ..quick import quick_jit

MIDDLE = {
    "mid_mixer_in": "mixer_in", "mid_mixer_out": "mixed", "mid_after_mixer": "after_mixer",
    "mid_ffw_in": "mlp_in",
}  # fmt: skip


def config_of(case: Case) -> DiHConfig:
    """The config of a case, which must be what the arrays tell."""
    own = {"noising", "input_size"}
    fields = {k: v for k, v in case.config.items() if k not in own}
    positions = "shifted" if case.entry.get("source") == "homm_up" else "harmonic"
    told = {} if "n_registers" in fields else {"positions": positions}
    config = dih_config_from_fields(fields, **told)
    arrays = dih_config_from_reference(
        case.params, degree=config.degree, n_head=config.n_head, input_size=config.input_size,
        positions=positions,
    )  # fmt: skip
    if arrays != config:
        raise ValueError(f"the arrays tell {arrays}, the config says {config}")
    return config


def net_and_params(case: Case) -> tuple[DiH, dict, dict]:
    """The net of a case, its parameters and its constants."""
    return (DiH(config_of(case)), *variables_of(case, config_of(case)))


def variables_of(case: Case, config) -> tuple[dict, dict]:
    """Parameters and constants of a case."""
    params = dih_from_reference(case.params, config)
    return jax.tree.map(jnp.asarray, (params, dih_constants(case.params)))


def loader(config) -> Callable[[Mapping], dict]:
    """The conversion of arrays in place of parameters: `freqs` is none."""
    return lambda flat: dih_from_reference({n: a for n, a in flat.items() if n != "freqs"}, config)


def last(x) -> np.ndarray:
    """Images or videos with channels last."""
    return np.moveaxis(np.asarray(x), 1, -1)


def second(x) -> np.ndarray:
    """Images or videos with channels second."""
    return np.moveaxis(np.asarray(x), -1, 1)


def block(report: Report) -> None:
    """A block by itself: what it makes on the way, and all gradients."""
    case, c = report.case, report.case.config
    config = DiHConfig(
        d_model=c["dim"], degree=c["order"], expand=c["order_expand"], mlp_ratio=c["ffw_expand"]
    )
    net = DiHBlock(config, jnp.float32)
    load = lambda flat: block_from_reference(flat, config)
    params = jax.tree.map(jnp.asarray, load(case.params))
    cotangent = report.input("ct_y")

    def objective(params, x, c):
        c = c[:, 0] if c.shape[1] == 1 else c
        (y, _), seen = net.apply({"params": params}, x, None, c, mutable=["intermediates"])
        return jnp.sum(y * cotangent), (y, seen["intermediates"])

    run = quick_jit(jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True))
    (_, (y, seen)), (gradient, *inputs) = run(params, report.input("in_x"), report.input("in_c"))
    report.check("out_y", y)
    for name, ours in MIDDLE.items():
        report.check(name, seen[ours][0])
    for name, got in zip(("grad_in_x", "grad_in_c"), inputs):
        report.check(name, got)
    report.check_params("gp.", gradient, load)


def image(report: Report) -> None:
    """Output, both losses, gradients of the first, and what comes on the way."""
    case = report.case
    net, params, constants = net_and_params(case)
    labels = report.input("in_y").astype(np.int32)
    predict = lambda params, x, t: net.apply(
        {"params": params, "constants": constants}, x, t, labels, mutable=["intermediates"]
    )
    rescaled = net.config.positions == "shifted"  # where levels depend on the image's side
    shift = shift_of_side(report.input("in_x0").shape[-1]) if rescaled else 1.0
    seen = check_losses(
        report, params, predict, net.config.timesteps, case.config["noising"], shift
    )
    report.check_params("gp.", seen.pop("gradient"), loader(net.config))
    names = {"mid_time_feat": seen["t_embedder"]["features"], "mid_time_emb": seen["time"]}
    names |= {"mid_patch": seen["patches"]}
    for name, found in names.items():
        report.check(name, found[0])
    report.check("mid_pos", seen["positions"][0][None])
    if "mid_cond_pos" in report:
        table = params["condition_positions"][net.config.registers :]
        report.check("mid_cond_pos", seen.get("resized", (table,))[-1][None])
    check_round_trip(report, params, net.config)


def check_losses(
    report: Report, params, predict, timesteps: int, noising: str, shift: float = 1.0
) -> dict:
    """Output and losses; returns what came on the way, and the gradient of the first loss.

    Both losses are of the given noisy input, which one of the processes makes.
    """
    x, noise, t = last(report.input("in_x0")), last(report.input("in_eps")), report.input("in_t")
    x_t = last(report.input("in_xt"))
    velocity = NoiseLevels(timesteps=timesteps, shift=shift)
    eps = NoiseLevels(timesteps=timesteps, predict="eps")
    named = {"fm": velocity, "eps": eps}
    report.check("in_xt", second(noise_levels.add_noise(named[noising], x, t, noise)))
    error = lambda out, process: jnp.mean(jnp.square(out - noise_levels.target(process, x, noise)))

    def objective(params):
        (out, _), seen = predict(params, x_t, t)
        return error(out, velocity), (out, seen["intermediates"])

    run = quick_jit(jax.value_and_grad(objective, has_aux=True))
    (loss, (out, seen)), gradient = run(params)
    report.check("out_y", second(out))
    report.check("out_loss_fm", loss)
    report.check("out_loss_eps", error(out, eps))
    denoise = lambda x_t, t: predict(params, x_t, t)[0][0]
    whole = lambda: noise_levels.training_loss(named[noising], denoise, x, t, noise)[0].mean()
    report.check(f"out_loss_{noising}", quick_jit(whole)(), how="from data")
    return dict(seen) | {"gradient": gradient}


def check_round_trip(report: Report, params, config) -> None:
    """The published layout comes back."""
    back = dih_to_reference(jax.tree.map(np.asarray, params), config)
    for name, array in report.case.params.items():
        if name not in back or not np.allclose(back[name], array, rtol=1e-5, atol=1e-7):
            report.fail(name, "does not come back from a round trip")
