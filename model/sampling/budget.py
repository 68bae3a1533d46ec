"""Compute budgets of a sampler whose patch size changes from step to step (arXiv 2502.20126).

    costs = mode_flops(config)               # {2: 118.6e9, 4: 29.0e9} multiply-adds
    levels = by_budget(250, 0.6, costs, weak=4, powerful=2)
    segments = with_guidance(levels, "cfg", powerful=2, weak=4)
    trajectory_flops(segments, costs, powerful=2)

`plan` does both for whichever way a schedule is given. Costs are multiply-adds counted once, the
unit of the "Gflops" of DiT's and FlexiDiT's tables and half of what is called FLOPs elsewhere here
(a multiply-add is two operations); ratios and budgets are the same in both.

Patch sizes are p for images, (frames, p, p) for videos. A level is (patch size, steps); levels are
in the order of the steps, the noisiest first, where the predictions of weak (large patch, cheap)
and powerful modes differ least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..layers.conditioning import TIME_FEATURES
from ..layers.patches import Patch, patch_name, patch_pixels
from ..mixers.pom import by_rank
from .diffusion import Segment

Levels = tuple[tuple[Patch, int], ...]
GUIDANCE = ("cfg", "weak_uncond", "weak_cond", "none")
COUNTED = ("attention", "pom")  # mixers that `dit_flops` knows


def dit_flops(config, patch: Patch | None = None) -> float:
    """Multiply-adds (half the FLOPs) of one image's forward pass, the unit of DiT's "Gflops".

    N = (I/p)^2 tokens; L ((4 + 2 m) N D^2 + 2 N^2 D + 6 D^2) in blocks (projections and MLP of
    ratio m, scores and values, modulation), N p^2 C D and N p^2 C_out D + 2 D^2 at the ends,
    256 D + D^2 for the timestep. DiT-XL/2 at 256^2: 118.62e9. For videos N counts tokens of all
    times and p^2 the pixels of a patch; with factorised mixing a token meets N / f others in half
    of the blocks and f in the others.

    With mixer="pom" of width E = expand D, S gates (n_head, or E for n_head=1) and G groups a block
    has N D (E / G + S) + E D + N S D in place of 4 N D^2 + 2 N^2 D (with factorised mixing E D for
    every frame, or place); or, where that is less or n_head=1, N E D in place of the last two.
    Polynomials are elementwise and not counted: about 2 degree N E operations.

    A context of S tokens of d features adds S (d D + D^2) for its embedder, and in a block: "cross"
    (2 N + 2 S) D^2 + 2 N S D; "joint" S (4 + 2 m) D^2 + 6 D^2 and 2 ((N + S)^2 - N^2) D, all of the
    last block's too.

    Args:
        config: `DiTConfig` with attention or PoM.
        patch: that of an image or video, if not the config's.

    Raises:
        ValueError: another mixer, whose operations this formula does not count.
    """
    if config.mixer not in COUNTED:
        raise ValueError(
            f"mixer={config.mixer}: the formula counts {' and '.join(COUNTED)}; count the traced "
            "network instead"
        )
    config = config.with_patch(patch) if patch else config
    n, d, layers = config.tokens, config.d_model, config.n_layer
    mixers = [(layers, 1)]  # (how many, rows into which each cuts the tokens)
    if config.mixing == "factorised":
        along = layers // 2
        mixers = [(layers - along, config.grid[0]), (along, n // config.grid[0])]
    blocks = layers * (2 * config.mlp_ratio * n * d * d + 6 * d * d + _context_flops(config))
    blocks += sum(count * _mixer_flops(config, rows) for count, rows in mixers)
    pixels = n * patch_pixels(config.patch)
    ends = pixels * (config.in_channels + config.out_channels) * d + 2 * d * d
    embedder = config.context_length * d * (config.context_dim + d)  # 0 without a context
    return blocks + ends + embedder + TIME_FEATURES * d + d * d


def _mixer_flops(config, rows: int) -> float:
    """Of one mixer that takes an image's tokens in so many rows; see `dit_flops`."""
    n, d = config.tokens, config.d_model
    if config.mixer == "attention":
        return 4 * n * d * d + 2 * n * (n // rows) * d
    return _pom_flops(config, n, rows, config.ngroups)


def _pom_flops(config, n: int, rows: int, groups: int) -> float:
    """Of a polynomial mixer that takes n tokens in so many rows; see `dit_flops`."""
    d, width = config.d_model, config.expand * config.d_model
    gates = config.n_head if config.n_head > 1 else width
    out = n * width * d
    if by_rank(n // rows, 1, width, gates):
        out = (rows * width + n * gates) * d
    return n * d * (width / groups + gates) + out


def jit_flops(config) -> float:
    """Multiply-adds (half the FLOPs) of one image's forward pass of a JiT.

    With N = (I/p)^2 tokens, N + S of them from block `context_start` on, a block of n tokens has
    3 n D F + 6 D^2 (gated MLP of hidden width F, modulation) and the mixer's of `dit_flops`. The
    ends have N (p^2 C b + b D) with a bottleneck of width b, N p^2 C D + 2 D^2, and 256 D + D^2 for
    the time.  JiT-B/16 at 256 pixels: 17.98e9.

    Args:
        config: `JiTConfig`.
    """
    n, d, early = config.tokens, config.d_model, config.plain_blocks
    pixels = config.patch_size**2 * config.in_channels
    total = n * config.bottleneck * (pixels + d) + n * pixels * d + 2 * d * d
    counts = ((early, n), (config.n_layer - early, n + config.context_tokens))
    for blocks, tokens in counts:
        mixer = _pom_flops(config, tokens, 1, config.groups)
        total += blocks * (3 * tokens * d * config.d_intermediate + 6 * d * d + mixer)
    return total + TIME_FEATURES * d + d * d


def _context_flops(config) -> float:
    """What a context adds to a block; see `dit_flops`."""
    n, s, d = config.tokens, config.context_length, config.d_model
    if config.context == "cross":
        return 2 * (n + s) * d * d + 2 * n * s * d
    if config.context == "joint":
        linear = s * (4 + 2 * config.mlp_ratio) * d * d + 6 * d * d
        return linear + 2 * ((n + s) ** 2 - n * n) * d
    return 0.0


# ---------------------------------------------------------------- which mode at which step


def by_weak_steps(steps: int, weak_steps: int, *, weak: Patch, powerful: Patch) -> Levels:
    """The first `weak_steps` of `steps` in the weak mode, the rest in the powerful one.

    Raises:
        ValueError: `weak_steps` is not in 0..steps.
    """
    if steps < 1 or not 0 <= weak_steps <= steps:
        raise ValueError(
            f"{weak_steps} weak steps of {steps}; there can be 0 to {max(steps, 0)} of them"
        )
    return _levels([(weak, weak_steps), (powerful, steps - weak_steps)])


def by_budget(
    steps: int,
    budget: float,
    costs: Mapping[Patch, float],
    *,
    weak: Patch,
    powerful: Patch,
    guidance: str = "cfg",
) -> Levels:
    """As many weak steps as bring a trajectory to `budget` of what it costs without them.

    The cost without them is that of powerful predictions throughout, guiding ones included. With
    the weak mode's share r of the powerful mode's cost and guidance "cfg" or "none", the number is
    round(K (1 - b) / (1 - r)); a guide of the weak mode makes powerful steps cheaper, (1 + r) / 2.

    Args:
        steps: K. budget: b, in r..1. costs: of a prediction by patch size.
        weak, powerful: patch sizes. guidance: one of `GUIDANCE`.

    Raises:
        ValueError: the budget cannot be met, or is more than 1; says what is possible.
    """
    _check_guidance(guidance)
    least = relative_cost(costs, weak, powerful)
    if not least <= budget <= 1:
        raise ValueError(
            f"a budget of {budget:g} is not possible: patch size {patch_name(weak)} throughout "
            f"costs {least:.3f} of patch size {patch_name(powerful)}; choose "
            f"{math.ceil(least * 1000) / 1000:g} to 1"
        )
    most = (1 + least) / 2 if guidance in ("weak_uncond", "weak_cond") else 1.0
    share = (most - budget) / (most - least) if most > least else 0.0
    return by_weak_steps(steps, round(steps * max(share, 0.0)), weak=weak, powerful=powerful)


def relative_cost(costs: Mapping[Patch, float], weak: Patch, powerful: Patch) -> float:
    """What a prediction of the weak mode costs, the powerful mode's being 1.

    Raises:
        ValueError: a patch size without a cost, or a weak mode that is not the cheaper one.
    """
    for patch in (weak, powerful):
        if patch not in costs:
            raise ValueError(
                f"no mode of patch size {patch_name(patch)}; there are {_listed(costs)}"
            )
    if weak != powerful and costs[weak] >= costs[powerful]:
        raise ValueError(
            f"patch size {patch_name(weak)} is not cheaper than {patch_name(powerful)}; the weak "
            "mode has larger patches"
        )
    return costs[weak] / costs[powerful]


def by_levels(steps: int, levels: Sequence[tuple[Patch, int]], *, powerful: Patch) -> Levels:
    """Several weak modes: (patch size, steps) from the first step on, the rest powerful.

    Raises:
        ValueError: more steps than there are, or patch sizes that grow.
    """
    rest = steps - sum(count for _, count in levels)
    patches = [patch for patch, _ in levels]
    if rest < 0 or any(count < 0 for _, count in levels):
        raise ValueError(f"the levels {list(levels)} have {steps - rest} steps of {steps}")
    if patches != sorted(patches, key=patch_pixels, reverse=True):
        raise ValueError(f"patch sizes {patches} grow; name the largest first")
    return _levels([*levels, (powerful, rest)])


def by_list(modes: Sequence[Patch]) -> Levels:
    """Any patch size at any step: one entry per step, the noisiest first.

    Raises:
        ValueError: the list is empty.
    """
    if not len(modes):
        raise ValueError("an empty list of modes; one patch size per step is needed")
    return _levels([(mode if isinstance(mode, tuple) else int(mode), 1) for mode in modes])


def by_time(times: Sequence[float], switch: float, *, weak: Patch, powerful: Patch) -> Levels:
    """The weak mode at times of at least `switch`: the same part of the process for any number of
    steps.

    Args:
        times: of the steps in their order, growing with the noise: original timesteps of a
            diffusion, 1 - t of a flow from noise to data.
    """
    return by_list([weak if t >= switch else powerful for t in times])


def _levels(pairs: Sequence[tuple[Patch, int]]) -> Levels:
    """Neighbours of one mode joined, empty levels left out."""
    found: list[tuple[Patch, int]] = []
    for patch, count in pairs:
        if count and found and found[-1][0] == patch:
            found[-1] = (patch, found[-1][1] + count)
        elif count:
            found.append((patch, count))
    return tuple(found)


def check_modes(levels: Sequence[tuple[Patch, int]], patch_sizes: Sequence[Patch]) -> None:
    """Raises ValueError naming the first mode of `levels` that is none of `patch_sizes`."""
    for patch, _ in levels:
        if patch not in patch_sizes:
            raise ValueError(
                f"no mode of patch size {patch_name(patch)}; there are {_listed(patch_sizes)}"
            )


# ---------------------------------------------------------------- which guide, and what it costs


def with_guidance(
    levels: Sequence[tuple[Patch, int]],
    guidance: str = "cfg",
    *,
    powerful: Patch,
    weak: Patch,
    scales: Sequence[float | None] = (),
) -> tuple[Segment, ...]:
    """Segments of a sampler: main and guiding prediction of every level.

    | guidance | steps of the powerful mode | steps of other modes |
    |---|---|---|
    | cfg | same mode, null class | same mode, null class |
    | weak_uncond | weak mode, null class | same mode, null class |
    | weak_cond | weak mode, same class (auto-guidance, arXiv 2406.02507) | same mode, null class |
    | none | no guide | no guide |

    Args:
        levels: (patch size, steps). powerful, weak: patch sizes.
        scales: guidance of each level, None for the call's; () for the call's everywhere.

    Raises:
        ValueError: an unknown guidance, another number of scales than of levels, or scales of none.
    """
    _check_guidance(guidance)
    if guidance == "none" and any(scale is not None for scale in scales):
        raise ValueError("guidance 'none' has no scales; leave them out")
    scales = tuple(scales) or (None,) * len(levels)
    if len(scales) != len(levels):
        raise ValueError(f"{len(scales)} guidance scales for {len(levels)} levels {list(levels)}")
    segments = []
    for (patch, steps), scale in zip(levels, scales):
        guide, guide_mode = ("none", None) if guidance == "none" else ("null", patch)
        if patch == powerful and guidance in ("weak_uncond", "weak_cond"):
            guide, guide_mode = ("same" if guidance == "weak_cond" else "null"), weak
        segments.append(
            Segment(steps=steps, mode=patch, guide=guide, guide_mode=guide_mode, scale=scale)
        )
    return tuple(segments)


def plan(
    steps: int,
    costs: Mapping[Patch, float],
    *,
    powerful: Patch,
    weak: Patch,
    budget: float | None = None,
    weak_steps: int | None = None,
    levels: Sequence[tuple[Patch, int]] = (),
    modes: Sequence[Patch] = (),
    switch: float | None = None,
    times: Sequence[float] = (),
    guidance: str = "cfg",
    scales: Sequence[float | None] = (),
) -> tuple[Segment, ...]:
    """Segments of a sampler from whichever one of the ways to say them is given; with none, all
    steps are powerful.

    Args:
        steps: of the sampler. costs: of a prediction by patch size; its keys are all modes.
        powerful, weak: patch sizes of both ends.
        budget: see `by_budget`. weak_steps: see `by_weak_steps`. levels: see `by_levels`.
        modes: see `by_list`, one per step. switch: see `by_time`, with the `times` of all steps.
        guidance, scales: see `with_guidance`.

    Raises:
        ValueError: two ways at once, a mode that is none of the net's, or as those functions.
    """
    given = {
        "budget": budget is not None, "weak_steps": weak_steps is not None,
        "levels": bool(levels), "modes": bool(modes), "switch": switch is not None,
    }  # fmt: skip
    named = [name for name, there in given.items() if there]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} both say which mode acts when; give one of them")
    way = named[0] if named else ""
    ends = {"weak": weak, "powerful": powerful}
    if way == "budget":
        chosen = by_budget(steps, budget, costs, guidance=guidance, **ends)
    elif way == "levels":
        chosen = by_levels(steps, levels, powerful=powerful)
    elif way in ("modes", "switch"):
        chosen = by_list(modes) if way == "modes" else by_time(times, switch, **ends)
        if sum(count for _, count in chosen) != steps:
            raise ValueError(f"{sum(count for _, count in chosen)} modes for {steps} steps")
    else:
        chosen = by_weak_steps(steps, weak_steps or 0, **ends)
    check_modes(chosen, tuple(costs))
    return with_guidance(chosen, guidance, powerful=powerful, weak=weak, scales=scales)


def segment_flops(segment: Segment, costs: Mapping[Patch, float], powerful: Patch) -> float:
    """What all steps of a segment cost for one image, in the unit of `costs`: multiply-adds.

    Args:
        costs: of a prediction by patch size. powerful: the mode of a segment that names none.
    """
    mode = segment.mode or powerful
    guiding = 0.0 if segment.guide == "none" else costs[segment.guide_mode or mode]
    return segment.steps * (costs[mode] + guiding)


def trajectory_flops(
    segments: Sequence[Segment], costs: Mapping[Patch, float], powerful: Patch
) -> float:
    """What a whole trajectory of one image costs, in the unit of `costs` (multiply-adds): both
    predictions of a guided step. Solvers that predict twice per step cost twice as much."""
    return math.fsum(segment_flops(segment, costs, powerful) for segment in segments)


def relative_flops(
    segments: Sequence[Segment], costs: Mapping[Patch, float], powerful: Patch
) -> float:
    """Cost of a trajectory, that of the powerful mode in all its predictions being 1."""
    predictions = sum(s.steps * (1 if s.guide == "none" else 2) for s in segments)
    return trajectory_flops(segments, costs, powerful) / (predictions * costs[powerful])


def _check_guidance(guidance: str) -> None:
    if guidance not in GUIDANCE:
        raise ValueError(f"guidance {guidance!r}; choose one of {', '.join(GUIDANCE)}")


def _listed(patches) -> str:
    return ", ".join(map(patch_name, sorted(patches)))
