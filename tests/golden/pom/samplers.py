"""Families smp and smp_video: published samplers, iteration by iteration."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from lintime.model.processes.noise_levels import NoiseLevels, shift_of_side
from lintime.model.sampling.diffusion import Segment, make_trajectory
from lintime.model.sampling.level_solvers import Upscale, iterations, level_solver
from lintime.model.sampling.video_stream import make_video_stream

from ..compare import Report
from ..manifest import Case, load_manifest
from ..quick import quick_jit
from . import dih, video

# What a case's text begins with, behind "sampler trajectory: " -> method.
METHODS = {
    "FlowMatching": "euler", "Heun": "heun", "UpscaleHeun": "heun", "DDIM": "ddim", "DDPM": "ddpm",
    "DPM": "dpm",
}  # fmt: skip


def image_sampler(report: Report) -> None:
    """States and predicted clean images of a class-conditional net."""
    case, config = report.case, report.case.config
    model = load_manifest(case.folder).load(config["model_case"])
    net, params, constants = dih.net_and_params(model)
    variables = {"params": params, "constants": constants}
    noise = dih.last(report.input("in_noise"))
    solver = solver_of(case, net.config.timesteps, noise.shape[-2])
    steps = report.input("in_step_noise", np.zeros(0))
    recorded = jnp.asarray(np.moveaxis(steps, 2, -1)) if steps.size else None
    denoise = lambda _, x, t, labels, mode: net.apply(variables, x, t, labels)[0]
    labels = report.input("in_labels").astype(np.int32)
    seen = run(solver, denoise, noise, labels, config["cfg"], net.config.num_classes, recorded)
    check_steps(report, "out_traj", seen["x"])
    if "out_x0_pred" in report:
        check_steps(report, "out_x0_pred", seen["x_start"])
    check_times(report, case, solver)


def solver_of(case: Case, timesteps: int, side: int):
    """The published solver that a case's text names."""
    config, text = case.config, case.entry["what"].removeprefix("sampler trajectory: ")
    method = METHODS[max((n for n in METHODS if text.startswith(n)), key=len)]
    published = case.entry["source"]
    if method in ("euler", "heun"):
        shift = shift_of_side(side) if published == "homm_up" else 1.0
        process = NoiseLevels(timesteps=timesteps, shift=shift)
        upscale = None
        if text.startswith("Upscale"):
            upscale = Upscale(
                weight=config["w_u"], factor=config.get("m", 2), cutoff=config["cutoff"]
            )
        return level_solver(process, method, config["steps"], published=published, upscale=upscale)
    process = NoiseLevels(timesteps=timesteps, predict="eps")
    clip = config.get("clip_value", 1.5) if config.get("clip") else 0.0
    return level_solver(
        process, method, config["steps"], published=published, clip=clip,
        schedule=config.get("schedule", "linear"),
    )  # fmt: skip


def run(solver, denoise, start, labels, weight: float, null_label: int, recorded=None) -> dict:
    """All states; `weight` of guidance is that of cond + w (cond - uncond)."""
    trajectory = make_trajectory(
        denoise, solver, segments=(Segment(steps=iterations(solver)),), null_label=null_label
    )
    noise = lambda k: jnp.zeros(start.shape) if recorded is None else recorded[k]
    scale = 1 + weight if weight > 0 else None
    go = lambda start: trajectory(None, start, noise, labels, guidance=scale, record=True)
    return quick_jit(go)(start)[1]


def check_steps(report: Report, name: str, found) -> None:
    """Every step by itself: tolerances are relative to a step."""
    expected = report.case.arrays[name]
    if len(found) != len(expected):
        report.fail(name, f"{len(found)} steps, expected {len(expected)}")
        return
    for k, one in enumerate(expected):
        report.check(name, dih.second(found[k]), one, how=f"step {k}")


def check_times(report: Report, case: Case, solver) -> None:
    """The published grid of times, where the solver tells them to the net as they are."""
    given = report.input("mid_timesteps")
    if case.entry["source"] != "homm_up":
        told = solver.inputs["t"]
        report.check("mid_timesteps", told, given[: len(told)])


def video_sampler(report: Report) -> None:
    """States of a text-to-video net, by Euler's and Heun's method."""
    case, config = report.case, report.case.config
    model = load_manifest(case.folder).load(config["model_case"])
    net, variables = video.net_and_variables(model)
    video.check_temporal_mask(report, net)
    start = dih.last(report.input("in_noise"))
    told = {
        "labels": jnp.zeros(len(start), jnp.int32), "context": report.input("in_txt"),
        "context_mask": report.input("in_txt_mask"),
    }  # fmt: skip
    denoise = lambda _, x, t, told, mode: net.apply(variables, x, t, **told)[0]
    process = NoiseLevels(timesteps=net.config.timesteps)
    for name, method in {"fm": "euler", "heun": "heun"}.items():
        solver = level_solver(process, method, config["steps"], published=case.entry["source"])
        seen = run(solver, denoise, start, told, config["cfg"], 0)
        check_steps(report, f"out_traj_{name}", seen["x"])
        check_times(report, case, solver)
        if net.config.block_causal:
            check_stream(report, net, variables, solver, start, told, f"out_traj_{name}")


def check_stream(report: Report, net, variables, solver, start, told, name: str) -> None:
    """The last state of a trajectory, frame by frame."""
    size, weight = net.config.patch_frames, report.case.config["cfg"]
    extend = lambda _, x, t, told, frame, state: net.apply(
        variables, x, t, frame, state, method="extend",
        **{n: a for n, a in told.items() if n != "labels"},
    )  # fmt: skip
    stream = make_video_stream(
        extend, net.init_state, solver, frame_shape=(size, *start.shape[2:]), guided=weight > 0,
        null_label=0,
    )  # fmt: skip
    guidance = 1 + weight if weight > 0 else None
    step = quick_jit(
        lambda x, frame, states: stream.frame(None, x, frame, states, told, guidance=guidance)
    )
    states, found = stream.init(len(start)), []
    for frame in range(net.config.grid[0]):
        x, states = step(start[:, frame * size : (frame + 1) * size], frame, states)
        found.append(x)
    last = report.case.arrays[name][-1]
    report.check(name, dih.second(np.concatenate(found, axis=1)), last, how="frame by frame")
