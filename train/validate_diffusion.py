"""Checking the values of diffusion runs before anything is built; see `validate`."""

from __future__ import annotations

from ..model.layers.patches import patch_name
from ..model.nets import dit
from ..model.nets.dih import DiHConfig, check_dih
from ..model.nets.dit import DiTConfig
from ..model.nets.flexidit import FlexiDiTConfig, check_config
from ..model.nets.jit import JiTConfig, check_jit
from ..model.nets.text_video_dih import TextVideoDiHConfig
from ..model.processes.flexible import time_spans
from ..model.processes.gaussian import GaussianDiffusion
from ..model.processes.noise_levels import NoiseLevels
from ..model.sampling.diffusion import Segment
from .errors import UserError, check_divides
from .loaded.diffusion import make_sampler, solver_options
from .loaded.flexible import flexible_segments
from .schema import FlexibleSample, ImageData, LevelSample, Run, VideoData
from .tasks.diffusion import Sizes, make_net


def check_diffusion(run: Run) -> None:
    """Whether the parts of a run of a net of images or videos fit each other.

    Raises:
        UserError: the first fault, and what to set instead.
    """
    flexible = isinstance(run.net, FlexiDiTConfig)
    net, at = (run.net.base, "net.base") if flexible else (run.net, "net")
    check_divides(f"{at}.input_size", net.input_size, f"{at}.patch_size", net.patch_size)
    if net.frames:
        check_divides(f"{at}.frames", net.frames, f"{at}.patch_frames", net.patch_frames)
    if net.d_intermediate < 1:
        raise UserError(
            f"{at}.mlp_ratio={net.mlp_ratio:g} leaves the MLP no channel of {at}.d_model="
            f"{net.d_model}; set a larger one"
        )
    _check_guidance(run, net, at)
    try:
        CHECKS[type(net)](run, net, at)
        if flexible:
            check_config(run.net)
            _check_weak(run)
            _check_objectives(run)
            _check_trained_times(run)
        _check_null_class(run, net, at)
        make_sampler(make_net(net), process=run.process, **solver_options(run.sample))
    except ValueError as error:
        raise UserError(str(error)) from error
    if isinstance(run.process, GaussianDiffusion):
        if net.learn_sigma != run.process.learns_variance:
            raise UserError(
                f"process.variance={run.process.variance} and {at}.learn_sigma={net.learn_sigma} "
                f"do not go together; set {at}.learn_sigma={str(not net.learn_sigma).lower()}"
            )
    _check_frames(run, net, at)
    _check_context(run, net, at)
    if isinstance(run.data, ImageData) and (run.data.size, 3) != (net.input_size, net.in_channels):
        raise UserError(
            f"images have data.size={run.data.size} pixels and 3 channels, the net takes "
            f"{net.input_size} and {net.in_channels}; set {at}.input_size={run.data.size} "
            f"{at}.in_channels=3"
        )


def _check_dit(run: Run, net: DiTConfig, at: str) -> None:
    """Raises ValueError or UserError for sizes of a DiT that cannot be."""
    if not net.frames and (net.patch_frames != 1 or net.base_patch_frames):
        raise UserError(
            f"{at}.patch_frames={net.patch_frames} {at}.base_patch_frames={net.base_patch_frames} "
            f"would be ignored: the net takes images; set {at}.frames, or leave them out"
        )
    check_divides(f"{at}.d_model", net.d_model, f"{at}.n_head", net.n_head)
    _check_width(net, at, 4, "rows and columns")
    dit.check_context(net)
    dit.make_mixer(net, parent=None)


def _check_dih(run: Run, net: DiHConfig, at: str) -> None:
    """Raises ValueError or UserError for sizes of a DiH that cannot be."""
    check_dih(net)
    if net.mixer == "attention":
        check_divides(f"{at}.d_model", net.d_model, f"{at}.n_head", net.n_head)
    _check_width(net, at, 4, "rows and columns")
    _check_levels(run, net, at)
    if run.sample.stream or run.sample.frames:
        raise UserError("sample.stream and sample.frames are of videos; leave them out")


def _check_jit(run: Run, net: JiTConfig, at: str) -> None:
    """Raises ValueError or UserError for sizes of a JiT that cannot be."""
    _check_width(net, at, 4, "rows and columns")
    check_jit(net)


def _check_video_dih(run: Run, net: TextVideoDiHConfig, at: str) -> None:
    """Raises ValueError or UserError for sizes of a TextVideoDiH that cannot be."""
    _check_width(net, at, 8, "frames, rows and columns")
    _check_levels(run, net, at)
    if not net.num_classes:
        raise UserError(
            f"{at}.num_classes=0: the net reads the features of texts, but videos come with "
            f"classes alone; set {at}.num_classes"
        )
    if not net.context_dim:
        raise UserError(
            f"{at}.context_dim=0, but a class is a token of that many features; set "
            f"{at}.context_dim=64 or more"
        )
    if run.sample.stream and not net.block_causal:
        raise UserError(
            "sample.stream=true draws frame by frame, but frames of this net see later ones; set "
            f"{at}.block_causal=true and train again, or leave it out"
        )
    if run.sample.frames:
        if not run.sample.stream:
            raise UserError(
                f"sample.frames={run.sample.frames} is of a stream; set sample.stream=true"
            )
        if rest := run.sample.frames % net.patch_frames:
            more = run.sample.frames - rest + net.patch_frames
            raise UserError(
                f"sample.frames={run.sample.frames} is not divisible by {at}.patch_frames="
                f"{net.patch_frames}; set sample.frames={more}"
            )


def _check_width(net: Sizes, at: str, parts: int, what: str) -> None:
    if net.d_model % parts:
        raise UserError(
            f"{at}.d_model={net.d_model} is not divisible by {parts} (sines and cosines of {what})"
            f"; set {at}.d_model={parts * max(1, round(net.d_model / parts))}"
        )


def _check_levels(run: Run, net: Sizes, at: str) -> None:
    """Whether net, process and samples agree about times and levels."""
    if isinstance(run.process, NoiseLevels) and run.process.timesteps != net.timesteps:
        raise UserError(
            f"process.timesteps={run.process.timesteps} and {at}.timesteps={net.timesteps} are the "
            f"same thing; set {at}.timesteps={run.process.timesteps}"
        )
    if not isinstance(run.sample, LevelSample):
        return
    if run.sample.eta:
        raise UserError(f"sample.eta={run.sample.eta} would be ignored; leave it out")
    if not run.sample.clip and run.sample.clip_to != LevelSample.clip_to:
        raise UserError(
            f"sample.clip_to={run.sample.clip_to} would be ignored; set sample.clip=true as well"
        )


# What is particular to a net: (run, config, its place) -> None
CHECKS = {
    DiTConfig: _check_dit,
    DiHConfig: _check_dih,
    JiTConfig: _check_jit,
    TextVideoDiHConfig: _check_video_dih,
}


def _check_weak(run: Run) -> None:
    weak, sizes = run.sample.weak, run.net.patch_sizes
    if weak and weak not in sizes:
        named = ", ".join(patch_name(size) for size in sizes)
        raise UserError(f"sample.weak={patch_name(weak)} is none of net.patch_sizes={named}")


def _check_objectives(run: Run) -> None:
    """Raises ValueError or UserError for settings of `process` that cannot be."""
    time_spans(run.process, run.net.others)
    rows = run.batch_size // run.optim.accumulate
    if run.process.match and rows < 2:
        raise UserError(
            f"process.match={run.process.match} compares rows of a micro-batch, which has {rows}; "
            f"set batch_size={2 * run.optim.accumulate} or more, or less of optim.accumulate"
        )


def _check_trained_times(run: Run) -> None:
    """Refuses budgets at which a weak mode acts, by a step or more, where it is not trained."""
    sample, spans = run.sample, time_spans(run.process, run.net.others)
    for budget in sample.budgets:
        done = 0
        for part in flexible_segments(run.net, sample, budget):
            first, last = (1 - k / sample.steps for k in (done, done + part.steps - 1))
            done += part.steps
            for mode in {part.mode, part.guide_mode} & spans.keys():
                low, high = spans[mode]
                if max(low - last, first - high) > 1 / sample.steps:
                    raise UserError(
                        f"sample.budgets={budget:g} uses patch size {patch_name(mode)} from "
                        f"{first:.2g} to {last:.2g} of the noise, but it trains on {low:g} to "
                        f"{high:g} (process.train_t_range); change one of them"
                    )


def _check_context(run: Run, net: Sizes, at: str) -> None:
    """Whether net, data and samples agree about texts."""
    reads, held = net.context != "none", getattr(run.data, "text", "")
    if reads and not held:
        what = "data=VideoData(...) have none" if net.frames else "data.text names none"
        raise UserError(
            f"{at}.context={net.context}: the net reads the features of texts, {what}; make some "
            "with `lintime prepare text` and set data.text=DIR, or leave the context out"
        )
    if not reads and held:
        raise UserError(
            f"data.text={held} would be ignored: the net reads no text; set {at}.context=cross, "
            f"{at}.context_dim and {at}.context_length, or leave it out"
        )
    for name, value in (
        ("sample.text", run.sample.text), ("eval.clip", run.eval.clip),
        ("data.text_encoder", getattr(run.data, "text_encoder", "")),
    ):  # fmt: skip
        if value and not reads:
            value = ",".join(value) if isinstance(value, tuple) else value
            raise UserError(f"{name}={value} is about texts, this net reads none; leave it out")
    classes = run.sample.classes
    if reads and classes and not net.num_classes:
        raise UserError(
            f"sample.classes={','.join(map(str, classes))} would be ignored: the net has no "
            "classes, only texts; leave it out"
        )
    if run.eval.clip and not run.eval.samples:
        raise UserError(
            f"eval.clip={run.eval.clip} scores images that are drawn; set eval.samples=N"
        )


def _check_frames(run: Run, net: Sizes, at: str) -> None:
    """Whether net, data and samples agree about videos."""
    data, videos = run.data, isinstance(run.data, VideoData)
    if videos and net.shape != (data.frames, data.size, data.size, 3):
        width = getattr(net, "input_width", 0)
        raise UserError(
            f"videos have data.frames={data.frames} frames of data.size={data.size} pixels and 3 "
            f"channels, the net takes {net.frames or 'no'} frames, {net.input_size}"
            f"{f' x {width}' if width else ''} and {net.in_channels}; set "
            f"{at}.frames={data.frames} {at}.input_size={data.size} {at}.in_channels=3"
            f"{f' {at}.input_width=0' if width else ''}"
        )
    if net.frames and not videos:
        raise UserError(
            f"{at}.frames={net.frames}: the net takes videos, data={type(data).__name__}(...) are "
            f"none; set {at}.frames=0, or give data=VideoData(...)"
        )
    for name, value in (("sample.npz", run.sample.npz), ("eval.samples", run.eval.samples)):
        if videos and value:
            raise UserError(f"{name}={value} is about images, this run draws videos; leave it out")


def _check_guidance(run: Run, net: Sizes, at: str) -> None:
    sample = run.sample
    if len(sample.guidance_interval) != 2:
        raise UserError(
            f"sample.guidance_interval={sample.guidance_interval}: give (low, high), such as 0,1"
        )
    if sample.guidance_channels > net.in_channels:
        raise UserError(
            f"sample.guidance_channels={sample.guidance_channels}, but images have "
            f"{net.in_channels} channels; 0 guides all"
        )
    if not isinstance(sample, FlexibleSample):
        return
    if not sample.budgets:
        raise UserError("sample.budgets is empty; give a share of the full compute, such as 1")
    for name in ("files", "npz"):
        if len(sample.budgets) > 1 and getattr(sample, name):
            raise UserError(
                f"sample.{name}=true would be ignored: several budgets are drawn as one picture; "
                "give one of sample.budgets"
            )
    if len(sample.budgets) > 1 and run.eval.samples:
        raise UserError(
            f"eval.samples={run.eval.samples} images are drawn at one budget, sample.budgets has "
            f"{len(sample.budgets)}; set sample.budgets={sample.budgets[-1]:g} or another"
        )


def _check_null_class(run: Run, net: Sizes, at: str) -> None:
    """Whether guidance by predictions without a class can be had.

    Raises:
        UserError: it cannot. ValueError: a budget that cannot be met.
    """
    sample, parts = run.sample, [Segment(steps=run.sample.steps)]
    if isinstance(sample, FlexibleSample):
        parts = [p for b in sample.budgets for p in flexible_segments(run.net, sample, b)]
    scales = [sample.guidance if p.scale is None else p.scale for p in parts if p.guide == "null"]
    if not net.class_dropout and any(scale != 1.0 for scale in scales):
        raise UserError(
            f"sample.guidance={sample.guidance:g} needs a net that has learned to draw without a "
            f"class, this one has {at}.class_dropout=0; leave guidance out, or train with "
            f"{at}.class_dropout=0.1"
        )
