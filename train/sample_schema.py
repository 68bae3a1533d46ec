"""What a run's config says about drawing from it: one class for each kind of sample."""

from __future__ import annotations

import dataclasses

dataclass = dataclasses.dataclass(frozen=True, kw_only=True)


@dataclass
class Sample:
    """Text sampling. Temperature 0 is greedy; top_k 0 and top_p 1 switch the filters off.

    Attributes:
        prompt: text to continue; "" starts from an empty document.
        length: tokens to generate.
        rows: continuations per prompt.
        stop: stop text (checked on the decoded bytes); "" = EOS only.
    """

    prompt: str = ""
    length: int = 400
    rows: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: str = ""


@dataclass
class ImageSample:
    """Sampling of images by class. Temperature 0 is greedy; top_k 0 and top_p 1 are off.

    Attributes:
        classes: class ids, drawn in turn; () takes all classes in turn.
        count: images to draw; 0 draws one per class.
        guidance: classifier-free guidance strength s, mixed = uncond + s (cond - uncond); 1 is
            none.
        schedule: of s - 1 over the tokens: "constant", "linear" or "cosine" (from 0 up to s - 1).
        rows: images drawn at a time.
        columns: of the grid; 0 makes it about square.
        files: also write every image as a file of its own.
        npz: also write all as one .npz file, as the ADM evaluator reads it.
    """

    classes: tuple[int, ...] = ()
    count: int = 64
    guidance: float = 1.0
    schedule: str = "constant"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    rows: int = 64
    columns: int = 0
    files: bool = False
    npz: bool = False


@dataclass
class DiffusionSample:
    """Sampling of images or videos by class or text with a diffusion or flow-matching model.

    Attributes:
        text: prompts, drawn in turn, of a net that reads a text; () takes the captions of the first
            validation images.
        classes, count, rows, columns, files, npz: as for `ImageSample`.
        method: "ddpm", "ddim", "dpm++2m", "euler" or "heun" for diffusion; "euler", "heun" or
            "sde" for flow matching.
        steps: of the solver ("heun" calls the net twice a step).
        guidance: classifier-free guidance strength s, mixed = uncond + s (cond - uncond); 1 is
            none.
        guidance_channels: how many leading channels are guided; 0 = all. The published DiT and SiT
            figures guide 3 of 4.
        guidance_interval: where guidance acts, from low to high, on the way from the clean image
            at 0 to noise at 1, in shares of the steps (arXiv 2404.07724).
        guided_times: instead, of flow matching, by the time of each evaluation, 0 is noise and 1
            the clean image: (low, high); () is everywhere.
        eta: noise of "ddim" steps; 0 is deterministic.
        clip: keep predicted images in [-1, 1]: for pixels, not for latents.
    """

    text: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    count: int = 64
    method: str = "ddpm"
    steps: int = 250
    guidance: float = 1.0
    guidance_channels: int = 0
    guidance_interval: tuple[float, ...] = (0.0, 1.0)
    guided_times: tuple[float, ...] = ()
    eta: float = 0.0
    clip: bool = False
    rows: int = 64
    columns: int = 0
    files: bool = False
    npz: bool = False


@dataclass
class FlexibleSample(DiffusionSample):
    """Sampling with a net of several patch sizes: how much of the full compute to spend.

    Attributes:
        budgets: shares of the FLOPs of the base's patch size throughout; the first steps are weak,
            as many as that takes. Several draw the same images once for each, for comparison.
        weak: patch size of the weak steps, such as 4, or 2x4x4 for videos; 0 = the largest.
        guide: "cfg", "weak_uncond" or "weak_cond": which prediction guides steps of the base's
            patch size, see `lintime.model.sampling.budget.with_guidance`.
        weak_guidance: guidance strength of weak steps; 0 = `guidance`.
    """

    budgets: tuple[float, ...] = (1.0,)
    weak: int | tuple[int, int, int] = 0
    guide: str = "cfg"
    weak_guidance: float = 0.0


@dataclass
class LevelSample(DiffusionSample):
    """Sampling with a net whose process is `NoiseLevels`; see `level_solver`.

    Attributes:
        method: "euler" or "heun" of velocities; "ddim", "ddpm" or "dpm" of noise.
        published: "" for solvers that are right; "homm", "homm_up" or "homm_t2v" for the steps of
            the code that published these models, off by one here and there.
        noise_schedule: of noise: where steps are: "linear", "sine", "cosine", "sigmoid", "karras"
            or "late_sigmoid".
        clip_to: bound of predicted images where `clip` is set.
        stream: videos of a block-causal net frame by frame, at constant memory: the same videos.
        frames: of a stream, may be more than were trained on; 0 = as many.
    """

    method: str = "heun"
    published: str = ""
    noise_schedule: str = "linear"
    clip_to: float = 1.0
    stream: bool = False
    frames: int = 0
