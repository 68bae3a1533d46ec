"""Family tables: what is computed of numbers alone."""

from __future__ import annotations

import re

import jax.numpy as jnp

from lintime.kernels_pallas.poly_mix import rope_frequencies, rope_rotation
from lintime.model.layers.unit_positions import unit_positions
from lintime.model.processes import noise_levels
from lintime.train.optimizers import average_decay, make_schedule
from lintime.train.schema import Optim

from ..compare import Report


def tables(report: Report) -> None:
    """Tables of positions, noise schedules, rescaled time, learning rates, averages, RoPE."""
    grid = lambda name: report.case.arrays[name].shape
    for name, waves in {"master": "harmonic", "upscale": "shifted"}.items():
        if f"out_sincos2d_{name}" in report:
            *sides, d = grid(f"out_sincos2d_{name}")
            table = unit_positions(d, sides, waves).reshape(*sides, d)
            report.check(f"out_sincos2d_{name}", table)
    if "out_sincos3d" in report:
        *sides, d = grid("out_sincos3d")
        report.check("out_sincos3d", unit_positions(d, sides).reshape(*sides, d))
    u = report.input("in_t")
    for name in report.case.arrays:
        if name.startswith("out_sched_"):
            schedule = name.removeprefix("out_sched_").replace("SigmoidScheduler", "late_sigmoid")
            report.check(name, noise_levels.noise_variance(schedule, u))
        if name.startswith("out_rescale_t_"):
            side = int(name.removeprefix("out_rescale_t_"))
            shift = noise_levels.shift_of_side(side)
            report.check(name, noise_levels.shifted(u, shift))
    count = report.input("in_steps")
    recipes = {
        "warmup_cosine": ("cosine", 10000), "warmup": ("constant", 10000), "linear": ("linear", 0),
        "sqrt": ("sqrt", 0),
    }  # fmt: skip
    for name, (kind, warmup) in recipes.items():
        optim = Optim(learning_rate=1e-3, schedule=kind, warmup=warmup, final=0.0)
        rate = optim.learning_rate * make_schedule(optim, 300000)(count)
        report.check(f"out_lr_{name}", rate)
    calls = report.input("in_ema_step_counter") - 1  # the counter has counted this one
    report.check("out_ema_decay", average_decay(calls))
    check_rope(report)


def check_rope(report: Report) -> None:
    """Cosines and sines of positions 0, 1, .. along one axis, and along rows and columns."""
    for name in report.case.arrays:
        match = re.fullmatch(r"out_rope(\d)d_(?:\w+_)?(cos|sin)", name)
        if match:
            length, pairs = report.case.arrays[name].shape
            axes = int(match[1])
            frequencies = rope_frequencies(2 * axes * pairs, axes)
            angles = rope_rotation(jnp.arange(length), frequencies)
            report.check(name, getattr(angles, match[2])[..., 0, :].reshape(length, pairs))
