"""`lintime bench dit`: a diffusion transformer trained, sampled from, and sampled from by budget.

Weights are random. The jitted samplers of small nets are first checked: against steps written out
one by one in float32, and a FlexiDiT with all its steps in the base's mode against the plain DiT.
Then whole training steps are timed, and whole samplers, beside their operations.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from ...model.nets.dit import DiTConfig
from ...model.nets.flexidit import FlexiDiTConfig, mode_flops
from ...model.processes.gaussian import GaussianDiffusion
from ...model.sampling.budget import dit_flops, plan, trajectory_flops
from ...model.sampling.diffusion import Segment
from ..config_files import from_json, to_json
from ..errors import UserError
from ..override import apply_overrides
from ..schema import ImageData, Optim, Precision, Run
from . import jobs
from .dit_report import markdown, picture, rows
from .timing import attempt, peak_memory, relative_error, time_updates

SIZES = {
    "b": DiTConfig(d_model=768, n_layer=12, n_head=12),
    "l": DiTConfig(d_model=1024, n_layer=24),
    "xl": DiTConfig(),
    "tiny": DiTConfig(  # for a CPU, where the benchmark shows that it works and nothing else
        input_size=8, d_model=32, n_layer=2, n_head=2, num_classes=8
    ),
}
SMALL = DiTConfig(  # of checks on an accelerator: a head as wide as DiT-XL's
    input_size=16, d_model=144, n_layer=2, n_head=2, num_classes=8
)
PARTS = ("training", "sampling", "flexible")
BUDGETS = {"full": None, "60%": 0.6, "40%": 0.4}
METHOD, STEPS, CHECKED_STEPS, IMAGES, GUIDANCE = "ddim", 50, 6, 32, 1.5
# Errors of images drawn by small nets, relative L2, against float32 steps.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
SAME = 1e-5  # all steps powerful against the plain sampler: the same operations


def sampling_flops(macs: float, images: int) -> float:
    """FLOPs from multiply-adds of one image, the published unit."""
    return 2 * macs * images


def schedules(config: FlexiDiTConfig, steps: int) -> dict[str, tuple[Segment, ...]]:
    """Segments by name: all steps powerful, and as many weak ones first as a budget asks for."""
    costs = mode_flops(config)
    ends = {"powerful": config.powerful, "weak": config.weak}
    return {name: plan(steps, costs, budget=b, **ends) for name, b in BUDGETS.items()}


def flexible_config(config: DiTConfig) -> FlexiDiTConfig:
    """The FlexiDiT of a DiT: its patch and twice that, adapters merged."""
    patches = (config.patch_size, 2 * config.patch_size)
    return FlexiDiTConfig(base=config, patch_sizes=patches, variant="lora")


# ---------------------------------------------------------------- measuring, in a child process


def make_sampler(denoise, config: DiTConfig, segments: tuple[Segment, ...], steps: int):
    """The jitted sampler that is measured and checked."""
    import jax

    from ...model.sampling.diffusion import make_diffusion_sampler

    shape = (config.input_size, config.input_size, config.in_channels)
    return jax.jit(
        make_diffusion_sampler(
            denoise, GaussianDiffusion(), method=METHOD, segments=segments, shape=shape,
            respacing=str(steps), null_label=config.num_classes, guidance_channels=3,
        )
    )  # fmt: skip


def plain_denoiser(config: DiTConfig, dtype: str, unroll: bool):
    """denoise(params, x, t, labels, mode) of a DiT."""
    from ...model.nets.dit import DiT
    from ..tasks.base import DTYPES

    net = DiT(config, DTYPES[dtype], unroll=unroll)
    return lambda params, x, t, labels, mode=None: net.apply({"params": params}, x, t, labels)[0]


def stirred(params, seed: int):
    """Parameters with noise, so that nothing of them is zero."""
    import jax

    draw = np.random.default_rng(seed)
    noise = lambda a: draw.standard_normal(a.shape).astype(a.dtype) / np.sqrt(max(a.shape[-1], 9))
    return jax.tree.map(lambda a: a + 0.3 * noise(a), params)


def step_by_step(denoise, variables, start, labels, null: int, modes) -> np.ndarray:
    """DDIM (arXiv 2010.02502, equation 12, eta = 0) with guidance on three channels, a loop in
    numpy; one mode a step."""
    from ...model.processes.gaussian import respaced_timesteps

    alpha = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    times = respaced_timesteps(1000, str(len(modes)))[::-1]
    x, count = np.asarray(start, np.float64), start.shape[-1]
    for t, after, mode in zip(times, [*times[1:], None], modes, strict=True):
        led, free = (
            np.asarray(
                denoise(variables, x.astype(np.float32), np.full(len(x), t), y, mode), np.float64
            )[..., :count]
            for y in (labels, np.full_like(labels, null))
        )
        noise = led.copy()
        noise[..., :3] = free[..., :3] + GUIDANCE * (led - free)[..., :3]
        clean = (x - np.sqrt(1 - alpha[t]) * noise) / np.sqrt(alpha[t])
        kept = 1.0 if after is None else alpha[after]
        x = np.sqrt(kept) * clean + np.sqrt(1 - kept) * noise
    return x


def check(dtype: str, accelerator: bool) -> dict[str, float]:
    """Relative L2 errors of small nets' samples: {"sampling": plain DiT, "flexible": modes by
    budget, both against `step_by_step`; "powerful": a FlexiDiT's base mode against the DiT}."""
    import jax

    from ...model.nets.flexidit import flexible_denoiser, init_params, materialise
    from ...model.sampling.classes import row_keys
    from ..tasks.base import DTYPES

    config = SMALL if accelerator else SIZES["tiny"]
    flexible = flexible_config(config)
    params = stirred(jax.jit(lambda key: init_params(flexible, key))(jax.random.key(0)), 1)
    modes = jax.jit(lambda p: materialise(flexible, p))(params)
    keys, labels = row_keys(jax.random.key(1), 2), np.asarray([0, 5], np.int32)
    by_patch = flexible_denoiser(flexible, dtype=DTYPES[dtype])
    exact = jax.jit(flexible_denoiser(flexible), static_argnums=4)
    segments = schedules(flexible, CHECKED_STEPS)
    options = {"guidance": GUIDANCE}
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        all_powerful = make_sampler(by_patch, config, segments["full"], CHECKED_STEPS)
        mixed = make_sampler(by_patch, config, segments["60%"], CHECKED_STEPS)
        plain = plain_denoiser(config, dtype, False)
        plain = make_sampler(plain, config, (Segment(steps=CHECKED_STEPS),), CHECKED_STEPS)
        drawn = plain(params["base"], keys, labels, **options)
        same = all_powerful(modes, keys, labels, **options)
        budget = mixed(modes, keys, labels, **options)
    first = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), drawn.shape[1:]))
    listed = [s.mode for s in segments["60%"] for _ in range(s.steps)]
    with jax.default_matmul_precision("highest"):
        walk = lambda list_of_modes: step_by_step(
            exact, modes, first(keys), labels, config.num_classes, list_of_modes
        )
        want, want_budget = walk([config.patch_size] * CHECKED_STEPS), walk(listed)
    return {
        "sampling": relative_error(drawn, want), "flexible": relative_error(budget, want_budget),
        "powerful": relative_error(same, drawn),
    }  # fmt: skip


def train(run: Run, steps: int, warmup: int = 3) -> dict[str, Any]:
    """`timing.time_updates` of random latents."""
    net = run.net

    def draw(random):
        shape = run.batch_size, net.input_size, net.input_size, net.in_channels
        return {
            "images": random.standard_normal(shape, np.float32),
            "labels": random.integers(0, net.num_classes, shape[:1], np.int32),
        }

    return time_updates(run, draw, steps, warmup)


def time_samplers(samplers: dict, variables, classes: int, images: int, repeats: int) -> dict:
    """{name: {"seconds": [repeats], "compile_s"}} of jitted samplers with guidance."""
    import jax
    import jax.numpy as jnp

    from ...model.sampling.classes import row_keys

    labels, out = jnp.arange(images) % classes, {}
    for name, sampler in samplers.items():
        seconds = []
        for number in range(1 + repeats):
            keys = jax.block_until_ready(row_keys(jax.random.key(1), images, number * images))
            began = time.perf_counter()
            jax.block_until_ready(sampler(variables, keys, labels, guidance=GUIDANCE))
            seconds.append(time.perf_counter() - began)
        out[name] = {"seconds": seconds[1:], "compile_s": seconds[0] - min(seconds[1:])}
    return out


def sample(run: Run, steps: int, images: int, repeats: int) -> dict[str, Any]:
    """Seconds of the whole sampler of a DiT."""
    import jax
    import jax.numpy as jnp

    from ...model.nets.dit import DiT

    c, one = run.net, jnp.zeros((1,), jnp.int32)
    x = jnp.zeros((1, c.input_size, c.input_size, c.in_channels))
    params = jax.jit(lambda key: DiT(c).init(key, x, one, one)["params"])(jax.random.key(0))
    denoise = plain_denoiser(c, run.precision.compute, run.precision.unroll)
    sampler = {"": make_sampler(denoise, c, (Segment(steps=steps),), steps)}
    return time_samplers(sampler, params, c.num_classes, images, repeats)[""] | _device()


def sample_by_budget(run: Run, steps: int, images: int, repeats: int) -> dict[str, Any]:
    """{"schedules": {name: as of `sample`}} of a FlexiDiT's schedules, one after the other."""
    import jax

    from ...model.nets.flexidit import flexible_denoiser, init_params, materialise
    from ..tasks.base import DTYPES

    config = flexible_config(run.net)
    make = lambda key: materialise(config, init_params(config, key))
    modes = jax.jit(make)(jax.random.key(0))
    denoise = flexible_denoiser(
        config, dtype=DTYPES[run.precision.compute], unroll=run.precision.unroll
    )
    samplers = {
        name: make_sampler(denoise, run.net, segments, steps)
        for name, segments in schedules(config, steps).items()
    }
    timed = time_samplers(samplers, modes, run.net.num_classes, images, repeats)
    return {"schedules": timed} | _device()


def _device() -> dict[str, Any]:
    import jax

    from ..flops import peak_flops

    return peak_memory() | {"peak_flops": peak_flops(jax.devices()[0])}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement in this process; jobs and results are JSON objects. What fails says so."""
    kind = job["kind"]
    if kind == "check":
        return attempt(lambda: {"errors": check(job["dtype"], job["accelerator"])})
    run = from_json(job["run"])
    if kind == "training":
        return attempt(lambda: train(run, job["updates"]))
    measure = {"sampling": sample, "flexible": sample_by_budget}[kind]
    return attempt(lambda: measure(run, job["steps"], job["images"], job["repeats"]))


# ---------------------------------------------------------------- the benchmark


def bench(arguments: argparse.Namespace, command: str, steps: int) -> dict[str, Any]:
    """Run the benchmark; prints and writes dit.md, dit.json and dit.png, and returns the report.

    Args:
        arguments: sizes, batch, only, repeats, remat, overrides, isolate, out and json.
        command: for the report. steps: timed training steps.

    Raises:
        UserError: bad arguments; or a sampler differs from its reference (the others' figures are
            still shown).
    """
    parts = jobs.chosen(arguments.only, "--only", PARTS) or list(PARTS)
    device, isolate = jobs.start("dit", arguments)
    work = lambda job: jobs.work("dit", job, isolate)
    accelerator = device["platform"] != "cpu"
    sizes = jobs.chosen(arguments.sizes, "--sizes", tuple(SIZES))
    sizes = sizes or ["xl" if accelerator else "tiny"]
    batch = jobs.whole(arguments.batch or ("256" if accelerator else "4"), "--batch")
    repeats = jobs.whole(arguments.repeats or "3", "--repeats")
    dtype = "bfloat16" if accelerator else "float32"
    images, draws = (IMAGES, STEPS) if accelerator else (2, CHECKED_STEPS)
    report = jobs.new_report(device, command) | {
        "batch": batch, "images": images, "steps": draws, "method": METHOD, "guidance": GUIDANCE,
        "dtype": dtype,
    }  # fmt: skip
    for name in dict.fromkeys(("float32", dtype)) if set(parts) - {"training"} else ():
        jobs.say(f"{device['kind']}: checking samplers in {name} ...")
        job = {"kind": "check", "dtype": name, "accelerator": accelerator}
        result = work(job)
        for part, bound in (
            ("sampling", TOLERANCE[name]), ("flexible", TOLERANCE[name]), ("powerful", SAME)
        ):  # fmt: skip
            error = result["errors"][part] if result["status"] == "ok" else None
            own = {"error": error} if error is not None else result
            fine = error is not None and error <= bound
            report["checks"][f"{part} {name}"] = own | {"ok": bool(fine)}
    wrong = [name for name, result in report["checks"].items() if not result["ok"]]
    for size in sizes:
        run = make_run(SIZES[size], batch, dtype, arguments.remat or "none")
        run = apply_overrides(run, arguments.overrides)
        for part in dict.fromkeys(parts):
            jobs.say(f"{size} {part} ...")
            job = {"kind": part, "run": to_json(run), "updates": steps, "steps": draws,
                   "images": images, "repeats": repeats}  # fmt: skip
            if part == "training" or not wrong:
                result = work(job)
            else:
                result = {"status": "unchecked"}
            points = _points(run.net, part, result, draws, images)
            report["points"] += [{"size": size, "part": part} | point for point in points]
            text = markdown(report)
            for cells in rows(report, part)[-len(points) :]:
                jobs.say("    " + " ".join(cells))
            jobs.save(report, arguments.out, "dit", text)
    jobs.finish(report, arguments, "dit", text, picture)
    if wrong:
        raise UserError(f"{', '.join(wrong)}: the sampler differs from its reference")
    return report


def make_run(config: DiTConfig, batch: int, dtype: str, remat: str) -> Run:
    """The published training recipe (arXiv 2212.09748, section 4) with `batch` images a step, but
    without the average of the weights; `--set ema.decay=0.9999` adds it."""
    return Run(
        net=config,
        process=GaussianDiffusion(),
        data=ImageData(path="random"),
        optim=Optim(learning_rate=1e-4, schedule="constant", warmup=0, b2=0.999, eps=1e-8),
        precision=Precision(compute=dtype, remat=remat),
        batch_size=batch,
    )


def _points(net: DiTConfig, part: str, result: dict, steps: int, images: int) -> list[dict]:
    """The rows of a measurement: one per schedule of the flexible part."""
    if part == "training" or result["status"] != "ok":
        return [result]
    if part == "sampling":
        found, macs = {"": result}, {"": 2 * steps * dit_flops(net)}
    else:
        config = flexible_config(net)
        costs = mode_flops(config)
        found = result["schedules"]
        macs = {
            name: trajectory_flops(segments, costs, config.powerful)
            for name, segments in schedules(config, steps).items()
        }
    shared = {k: result[k] for k in ("status", "peak_bytes", "peak_flops")}
    out, full = [], next(iter(found))
    for name, timed in found.items():
        point = shared | timed | {"macs": macs[name]}
        point["flops"] = sampling_flops(macs[name], images)
        if point["peak_flops"]:
            point["peak_s"] = point["flops"] / point["peak_flops"]
        if part == "flexible":
            middle = lambda n: statistics.median(found[n]["seconds"])
            point |= {"schedule": name, "flops_ratio": macs[name] / macs[full]}
            point["time_ratio"] = middle(name) / middle(full)
        out.append(point)
    return out
