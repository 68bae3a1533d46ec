"""Families tables, respacing, loss, bpd, sample and sit: the processes and their samplers."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np

from lintime.model.convert.dit import dit_from_reference
from lintime.model.processes import flow, gaussian
from lintime.model.processes.flow import FlowMatching
from lintime.model.processes.gaussian import GaussianDiffusion
from lintime.model.sampling.diffusion import Segment, make_trajectory

from ..compare import Report
from ..manifest import Case, load_manifest
from ..quick import quick_jit
from .net import nchw, net_and_params, nhwc

# Diffusion forms by their names.
FORMS = {
    "constant": "constant", "SBDM": "sbdm", "sigma": "sigma", "linear": "linear",
    "decreasing": "decreasing", "inccreasing-decreasing": "increasing_decreasing",
}  # fmt: skip
SCORE_RTOL = 1e-3  # the manifest's: errors of score-type losses grow at small sigma


def process_of(options: dict) -> GaussianDiffusion:
    """The process of the reference's arguments.

    Raises:
        ValueError: an argument without a counterpart.
    """
    known = {
        "diffusion_steps", "noise_schedule", "use_kl", "sigma_small", "predict_xstart",
        "learn_sigma", "rescale_learned_sigmas",
    }  # fmt: skip
    if set(options) - known:
        raise ValueError(f"unknown arguments {sorted(set(options) - known)}")
    fixed = "fixed_small" if options.get("sigma_small") else "fixed_large"
    learned = options.get("learn_sigma", True)
    loss = "rescaled_mse" if learned and options.get("rescale_learned_sigmas") else "mse"
    return GaussianDiffusion(
        timesteps=options.get("diffusion_steps", 1000),
        schedule=options.get("noise_schedule", "linear"),
        predict="x_start" if options.get("predict_xstart") else "eps",
        variance="learned_range" if learned else fixed,
        loss="rescaled_kl" if options.get("use_kl") else loss,
    )


def model_of(case: Case):
    """The net and parameters of a case: its own, or those of the case that it names."""
    other = case.config.get("model_params_from")
    return net_and_params(load_manifest(case.folder).load(other) if other else case)


def tables(report: Report) -> None:
    """Float64 tables of schedules, all steps or respaced."""
    for i, spec in enumerate(report.case.config["specs"]):
        options = {k: v for k, v in spec.items() if k != "respacing"}
        found = gaussian.gaussian_tables(process_of(options), spec["respacing"])
        for name, value in found._asdict().items():
            report.check(f"s{i}_{name}", value)


def respacing(report: Report) -> None:
    """Kept timesteps."""
    for i, (timesteps, text) in enumerate(report.case.config["specs"]):
        report.check(f"set{i}", np.array(gaussian.respaced_timesteps(timesteps, text)))


def loss(report: Report) -> None:
    """Noised images, distributions, loss terms by row, and gradients of their mean."""
    config = report.case.config
    process = process_of(config.get("diffusion", {}))
    kept = tuple(config["timestep_map"])
    table = gaussian.gaussian_tables(process, kept)
    net, params = model_of(report.case)
    x, noise = nhwc(report.input("x_start")), nhwc(report.input("noise"))
    t, labels = report.input("t").astype(np.int32), report.input("y")

    def objective(params):
        denoise = lambda x_t, times: net.apply({"params": params}, x_t, times, labels)[0]
        rows, parts = gaussian.training_loss(process, denoise, x, t, noise, respacing=kept)
        x_t = gaussian.q_sample(table, x, t, noise)
        times = jnp.asarray(table.timestep_map)[t]
        found = gaussian.predictions(process, table, denoise(x_t, times), x_t, t)
        return jnp.mean(rows), (rows, parts, x_t, found, gaussian.posterior(table, x, x_t, t))

    run = quick_jit(jax.value_and_grad(objective, has_aux=True))
    (_, (rows, parts, x_t, found, post)), gradient = run(params)
    report.check("x_t", nchw(x_t))
    report.check("terms_loss", rows)
    for name, value in parts.items():
        report.check(f"terms_{name}", value)
    report.check("pmv_mean", nchw(found.mean))
    report.check("pmv_log_variance", nchw(found.log_variance))
    # A clean image is known as well as the noise it is computed from, which counts for more at
    # high noise (157 times at t = 999): both sides in units of the noise.
    if "pmv_pred_xstart" in report:
        unit = np.maximum(table.sqrt_recipm1_alphas_cumprod, 1.0)[t].reshape(-1, 1, 1, 1)
        expected = report.input("pmv_pred_xstart") / unit
        report.check("pmv_pred_xstart", nchw(found.x_start) / unit, expected, how="as noise")
    report.check("qpost_mean", nchw(post[0]))
    report.check("qpost_log_variance_clipped", nchw(post[1]))
    other = config.get("model_params_from")
    if other:
        report.case.params = load_manifest(report.case.folder).load(other).params
    load = lambda flat: dit_from_reference(
        {n: a for n, a in flat.items() if n != "pos_embed"}, net.config
    )
    report.check_params("grad.", gradient, load)


def bpd(report: Report) -> None:
    """The variational bound, term by term."""
    config = report.case.config
    net, params = model_of(report.case)
    x, labels = nhwc(report.input("x_start")), report.input("y")
    recorded = jnp.asarray(np.moveaxis(report.input("noise"), 2, -1))
    denoise = lambda x_t, t: net.apply({"params": params}, x_t, t, labels)[0]
    run = lambda x: gaussian.bits_per_dim(
        process_of(config.get("diffusion", {})), denoise, x, lambda k: recorded[k],
        respacing=config["respacing"], clip=config["clip_denoised"],
    )  # fmt: skip
    found = quick_jit(run)(x)
    names = {"total_bpd": "total", "prior_bpd": "prior", "xstart_mse": "x_start_mse"}
    for name in report.case.arrays:
        ours = names.get(name, name)
        if ours in found:
            report.check(name, found[ours])


def denoiser(net, params):
    """What the samplers call."""
    return lambda variables, x, t, labels, mode: net.apply({"params": params}, x, t, labels)[0]


def sample(report: Report) -> None:
    """States and predicted clean images of every iteration, with the recorded noise."""
    case, config = report.case, report.case.config
    net, params = model_of(case)
    process = process_of(config.get("diffusion", {}))
    start, noise = report.input("z"), np.moveaxis(report.input("step_noise"), 2, -1)
    labels, scale = report.input("y"), config.get("cfg_scale")
    rows = len(start) if scale is None else len(start) // 2
    table = gaussian.gaussian_tables(process, config["respacing"])
    report.check("timestep_map", table.timestep_map)
    report.check("betas", table.betas)
    trajectory = make_trajectory(
        denoiser(net, params), process, method=config["method"],
        segments=(Segment(steps=table.steps),), respacing=config["respacing"],
        eta=config.get("eta", 0.0), clip=config["clip_denoised"],
        guidance_channels=3, null_label=net.config.num_classes,
    )  # fmt: skip
    recorded = jnp.asarray(noise[:, :rows])
    run = quick_jit(
        lambda z, y: trajectory(
            None, z, lambda k: recorded[k], y, guidance=scale, record=True
        )
    )  # fmt: skip
    _, seen = run(nhwc(start[:rows]), labels[:rows])
    # The reference's second half never influences the first and is thrown away in the end.
    for name, ours in {"x": "x", "pred_xstart": "x_start"}.items():
        check_steps(report, name, seen[ours], rows)


def check_steps(report: Report, name: str, found, rows: int) -> None:
    """Compares the first rows at every step by itself: tolerances are relative to a step."""
    for k, expected in enumerate(report.case.arrays.get(name, ())):
        report.check(name, nchw(found[k]), expected[:rows], how=f"step {k}")


def sit(report: Report) -> None:
    """The net on unscaled times; paths, conversions and losses; guided Euler steps."""
    net, params = model_of(report.case)
    x, noise = nhwc(report.input("x1")), nhwc(report.input("x0"))
    t, labels = report.input("t"), report.input("y")
    half = lambda x, t: net.apply({"params": params}, x, t, labels)[0][..., : x.shape[-1]]
    report.check("model_out", nchw(quick_jit(half)(x, t)))
    denoise = lambda x, t: net.apply({"params": params}, x, t, labels)[0]
    loose = report.case.tolerance.loosened(SCORE_RTOL)
    for name in list(report.case.arrays):
        match = re.fullmatch(r"loss_(\w+?)_(velocity|noise|score)_(\w+)", name)
        if match:
            process = FlowMatching(
                path=match[1].lower(), predict=match[2], weighting=match[3].lower()
            )
            run = lambda x, t, noise, process=process: flow.training_loss(
                process, denoise, x, t, noise
            )[0]
            tolerance = loose if match[2] == "score" else None
            report.check(name, quick_jit(run)(x, t, noise), tolerance=tolerance)
    for path in ("Linear", "GVP", "VP"):
        check_path(report, path, x, t, noise)
    if "ode_x" in report:
        check_ode(report, denoiser(net, params), net.config.num_classes)


def check_path(report: Report, path: str, x, t, noise) -> None:
    """Coefficients and conversions of a path."""
    process = FlowMatching(path=path.lower())
    x_t, u = flow.interpolate(process, x, t, noise)
    c = flow.path_coefficients(process.path, jnp.asarray(t))
    report.check(f"{path}_xt", nchw(x_t))
    report.check(f"{path}_ut", nchw(u))
    report.check(f"{path}_coef", np.stack([c.alpha, c.d_alpha, c.sigma, c.d_sigma]))
    score = flow.score_from_velocity(process, u, x_t, t)
    report.check(f"{path}_score_from_velocity", nchw(score))
    report.check(f"{path}_noise_from_velocity", nchw(flow.noise_from_velocity(process, u, x_t, t)))
    mean, d = flow.score_drift(process, x_t, t)
    report.check(f"{path}_drift_mean", nchw(mean))
    report.check(f"{path}_drift_var", d)
    for theirs, ours in FORMS.items():
        report.check(f"{path}_diff_{theirs}", flow.diffusion(process, ours, jnp.asarray(t)))


def check_ode(report: Report, denoise, null_label: int) -> None:
    """Explicit Euler steps on an even grid, guidance 2.5 as the manifest's text says."""
    start, expected = report.input("ode_z"), report.case.arrays["ode_x"]
    labels = report.input("ode_y")[: len(start)]
    meaning = report.case.entry["arrays"]["ode_x"].get("meaning", "")
    said = re.search(r"cfg_scale (\d+(?:\.\d+)?)", meaning)
    scale = float(report.case.config.get("cfg_scale", said[1] if said else 2.5))
    trajectory = make_trajectory(
        denoise, FlowMatching(), method="euler",
        segments=(Segment(steps=len(expected), scale=scale),), null_label=null_label,
        guidance_channels=3,
    )  # fmt: skip
    run = quick_jit(lambda z: trajectory(None, z, lambda k: None, labels, record=True)[1]["x"])
    check_steps(report, "ode_x", run(nhwc(start)), len(start))
