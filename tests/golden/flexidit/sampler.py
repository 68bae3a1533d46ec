"""Family sampler: trajectories through two modes, with every kind of guidance."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lintime.model.convert.dit import dit_from_reference
from lintime.model.convert.flexidit import flexidit_from_reference
from lintime.model.nets.flexidit import flexible_denoiser, flexify, materialise, mode_flops
from lintime.model.processes.gaussian import GaussianDiffusion, gaussian_tables
from lintime.model.sampling.budget import plan
from lintime.model.sampling.diffusion import make_trajectory

from ..compare import Report
from ..dit.net import nchw, nhwc
from ..manifest import load_manifest
from ..quick import quick_jit
from .net import config_of


def sampler(report: Report) -> None:
    """State and predicted image after every iteration, from the recorded noise."""
    case = report.case.config
    source = load_manifest(report.case.folder).load(case["params_from"])
    config = config_of(source.config)
    if source.config.get("at_initialisation"):
        base = dit_from_reference(source.params, config.base)
        params = flexify(config, base, jax.random.key(0))
    else:
        params = flexidit_from_reference(source.params, config)
    process = GaussianDiffusion(
        variance="learned_range" if config.base.learn_sigma else "fixed_large"
    )
    guidance = case["guidance"]
    segments = plan(
        case["T"], mode_flops(config), weak_steps=case["T_weak"], guidance=guidance,
        weak=case["p_weak"], powerful=case["p0"],
    )  # fmt: skip
    modes = [
        (s.mode, -1 if s.guide == "none" else s.guide_mode)
        for s in segments
        for _ in range(s.steps)
    ]
    report.check("modes", jnp.asarray(modes))
    report.check("timestep_map", gaussian_tables(process, case["respacing"]).timestep_map)
    trajectory = make_trajectory(
        flexible_denoiser(config), process, method=case["method"], segments=segments,
        respacing=case["respacing"], eta=case["eta"], clip=case["clip_denoised"],
        guidance_channels=case["guide_channels"], null_label=config.base.num_classes,
    )  # fmt: skip
    noise = jnp.moveaxis(jnp.asarray(report.input("step_noise")), 2, -1)

    def run(params, z, y):
        return trajectory(
            materialise(config, params), z, lambda k: noise[k], y,
            guidance=None if guidance == "none" else case["scale"], record=True,
        )  # fmt: skip

    last, seen = quick_jit(run)(params, nhwc(report.input("z")), report.input("y"))
    theirs = lambda a: jnp.moveaxis(a, -1, 2)
    report.check("x", theirs(seen["x"]))
    report.check("x", nchw(last), expected=report.case.arrays["x"][-1], how="last")
    report.check("pred_xstart", theirs(seen["x_start"]))
