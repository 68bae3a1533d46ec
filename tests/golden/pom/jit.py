"""Families jit_block, jit_model and smp_jit: the pixel-space net, its loss and its samplers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lintime.model.convert.jit import (
    block_from_reference,
    block_to_reference,
    jit_config_from_reference,
    jit_from_reference,
    jit_to_reference,
)
from lintime.model.convert.pom import TABLES
from lintime.model.nets.jit import Block, JiT, JiTConfig, jit_process, token_positions
from lintime.model.processes import flow
from lintime.model.processes.flow import FlowMatching
from lintime.model.sampling.diffusion import Segment, make_trajectory
from lintime.model.sampling.solvers import flow_solver

from ..compare import Report
from ..manifest import Case, load_manifest
from ..quick import quick_jit

# Our field -> the name in a case's config.
FIELDS = {
    "input_size": "input_size", "patch_size": "patch_size", "in_channels": "in_channels",
    "bottleneck": "bottleneck_dim", "d_model": "hidden_size", "n_layer": "depth",
    "n_head": "num_heads", "degree": "pom_degree", "expand": "pom_expand",
    "groups": "pom_n_groups", "mlp_ratio": "mlp_ratio", "num_classes": "num_classes",
    "context_tokens": "in_context_len", "context_start": "in_context_start",
}  # fmt: skip
CONSTANTS = {"pos_embed", *TABLES}


def config_of(case: Case) -> JiTConfig:
    """The config of a case.

    Raises:
        ValueError: another mixer.
    """
    if case.config.get("mixer", "pom") != "pom":
        raise ValueError(f"mixer {case.config['mixer']!r} is not known")
    given = {ours: case.config[n] for ours, n in FIELDS.items() if n in case.config}
    return JiTConfig(**given)


def process_of(case: Case) -> FlowMatching:
    """The process of a case, of noise of the usual size unless it says otherwise."""
    return FlowMatching(
        predict="data", floor=case.config.get("t_eps", jit_process().floor),
        noise_scale=case.config.get("noise_scale", 1.0),
    )  # fmt: skip


def nhwc(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), 1, -1)


def nchw(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def check_back(report: Report, back) -> None:
    """All parameters must go back as they came, constants nearly."""
    for name, array in report.case.params.items():
        error = np.abs(back[name] - array).max()
        if error > (1e-5 if name.rpartition(".")[2] in CONSTANTS else 0):
            report.fail(name, f"comes back with an error of {error:.2g}")


def without_tables(flat) -> dict:
    return {n: a for n, a in flat.items() if n.rpartition(".")[2] not in CONSTANTS}


def block(report: Report) -> None:
    """One block, with positions as given."""
    config, case = config_of(report.case), report.case
    given = block_from_reference(case.params, config)
    check_back(report, block_to_reference(given, config))
    params, ct = jax.tree.map(jnp.asarray, given), report.input("ct_y")
    positions = report.input("in_positions_hw")
    with_context = len(positions) > config.tokens
    if (positions != token_positions(config, with_context)).any():
        report.note("positions are not those of the net")
    module = Block(config, jnp.float32)

    def objective(params, x, c):
        _, vectors = module.apply({"params": params}, c, method="conditioning")
        (y, _), seen = module.apply(
            {"params": params}, x, vectors, jnp.asarray(positions), mutable=["intermediates"]
        )
        return jnp.sum(y * ct), (y, seen["intermediates"])

    run = quick_jit(jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True))
    (_, (y, seen)), (grads, grad_x, grad_c) = run(
        params, report.input("in_x"), report.input("in_c")
    )
    report.check("out_y", y)
    for name in ("mixer_in", "mixer_out", "after_mixer"):
        report.check(f"mid_{name}", seen[name.replace("mixer_out", "mixed")][0])
    report.check("grad_in_x", grad_x)
    report.check("grad_in_c", grad_c)
    report.check_params("gp.", grads, lambda a: block_from_reference(without_tables(a), config))


def net_and_params(case: Case) -> tuple[JiT, dict]:
    """The net of a case and its parameters.

    Raises:
        ValueError: the arrays tell another config.
    """
    config = config_of(case)
    told = jit_config_from_reference(case.params, context_start=config.context_start)
    if told.d_intermediate == config.d_intermediate and told.mlp_ratio != config.mlp_ratio:
        told = JiTConfig(**(vars(told) | {"mlp_ratio": config.mlp_ratio}))
    if told != config:
        raise ValueError(f"the arrays tell {told}, the config says {config}")
    return JiT(config), jax.tree.map(jnp.asarray, jit_from_reference(case.params, config))


def model(report: Report) -> None:
    """The net, and the loss with its gradients."""
    case = report.case
    net, params = net_and_params(case)
    back = jit_to_reference(jax.device_get(params), net.config)
    check_back(report, back)
    if list(back) != list(case.entry["params"]):
        report.fail("params", "are listed in another order")
    z, x, noise = (nhwc(report.input(n)) for n in ("in_z", "in_x0", "in_e"))
    t, labels = report.input("in_t"), report.input("in_y").astype(np.int32)
    process = process_of(case)

    def objective(params):
        denoise = lambda x_t, t: net.apply({"params": params}, x_t, t, labels)[0]
        losses, _ = flow.training_loss(process, denoise, x, t, noise)
        return jnp.mean(losses)

    def forward(params):
        (y, _), seen = net.apply({"params": params}, z, t, labels, mutable=["intermediates"])
        return y, seen["intermediates"]

    report.check("in_z", nchw(flow.interpolate(process, x, jnp.asarray(t), noise)[0]))
    y, seen = quick_jit(forward)(params)
    report.check("out_y", nchw(y))
    for name, ours in {"t_emb": "time", "y_emb": "label", "patch": "patches"}.items():
        report.check(f"mid_{name}", seen[ours][0])
    loss, grads = quick_jit(jax.value_and_grad(objective))(params)
    report.check("out_loss", loss)
    report.check_params(
        "gp.", grads, lambda flat: jit_from_reference(without_tables(flat), net.config)
    )


def sampler(report: Report) -> None:
    """States after every step of both methods, with guidance between two times."""
    case, config = report.case, report.case.config
    named = load_manifest(case.folder).load(config["model_case"])
    net, params = net_and_params(named)
    # The recorded start is the state itself, whatever the size of the noise.
    process = FlowMatching(predict="data", floor=process_of(named).floor)
    denoise = lambda _, x, t, labels, mode: net.apply({"params": params}, x, t, labels)[0]
    start, labels = nhwc(report.input("in_noise")), report.input("in_labels").astype(np.int32)
    low, high = config.get("interval", (0.0, 1.0))
    for _, method in report.matching("out_traj_"):
        trajectory = make_trajectory(
            denoise, process, method=method, segments=(Segment(steps=config["steps"]),),
            guided_times=(low, high), null_label=net.config.num_classes,
        )  # fmt: skip
        go = lambda start, f=trajectory: f(
            None, start, jnp.zeros_like, labels, guidance=config["cfg_scale"], record=True
        )
        found = quick_jit(go)(start)[1]["x"]
        expected = case.arrays[f"out_traj_{method}"]
        if len(found) != len(expected):
            report.fail(f"out_traj_{method}", f"{len(found)} steps, expected {len(expected)}")
        for k, one in enumerate(expected):
            report.check(f"out_traj_{method}", nchw(found[k]), one, how=f"step {k}")
        numbers = flow_solver(process, method, config["steps"]).inputs
        report.check("mid_timesteps", np.append(numbers["t"], numbers["next"][-1]))
