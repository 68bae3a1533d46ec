"""FLOPs in the published unit, and which mode acts at which step of a sampler."""

import dataclasses
import json

import jax
import pytest

from lintime.model.nets.dit import DiT, DiTConfig
from lintime.model.nets.flexidit import FlexiDiTConfig, flops, mode_flops
from lintime.model.nets.jit import JiT, JiTConfig, jit_config
from lintime.model.sampling.budget import (
    by_budget,
    by_levels,
    by_list,
    by_time,
    by_weak_steps,
    dit_flops,
    jit_flops,
    plan,
    relative_flops,
    segment_flops,
    trajectory_flops,
    with_guidance,
)
from lintime.model.sampling.diffusion import Segment
from lintime.train.flops import count_flops
from lintime.train.loaded.flexible import shown_budget

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
ENDS = {"weak": 4, "powerful": 2}
COSTS = {2: 4.0, 4: 1.0}  # the weak mode costs a quarter


def dit(size="XL", latent=32, patch=2):
    layers, width, heads = SIZES[size]
    return DiTConfig(
        input_size=latent, patch_size=patch, d_model=width, n_layer=layers, n_head=heads
    )


# ---------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(
    "size, latent, patch, gmacs",
    [
        ("XL", 32, 2, 118.62), ("XL", 32, 4, 29.04), ("XL", 32, 8, 7.39), ("XL", 64, 2, 524.54),
        ("XL", 64, 4, 118.66), ("B", 32, 2, 23.005), ("S", 32, 8, 0.358), ("L", 32, 4, 19.696),
    ],
)  # fmt: skip
def test_flops_are_those_of_the_published_table(size, latent, patch, gmacs):
    assert dit_flops(dit(size, latent, patch)) / 1e9 == pytest.approx(gmacs, rel=1e-3)


def test_flops_of_the_golden_table(golden_dir):
    table = json.loads((golden_dir / "flexidit" / "manifest.json").read_text())["flops_table"]
    assert table["rows"]
    for row in table["rows"]:
        config = dit(row["model"].partition("-")[2], row["latent"], row["patch"])
        assert dit_flops(config) / 1e9 == pytest.approx(row["gmacs_total"], rel=1e-9)


def test_flops_of_modes():
    config = FlexiDiTConfig(base=dit(), patch_sizes=(2, 4))
    costs = mode_flops(config)
    assert costs == {2: dit_flops(dit()), 4: dit_flops(dit(patch=4))}
    assert costs[4] / costs[2] == pytest.approx(0.2448, abs=1e-4)
    assert flops(config) == costs[2] and flops(config, 4) == flops(dit(), 4) == costs[4]


@pytest.mark.parametrize("kind", ["none", "cross", "joint"])
def test_flops_are_those_of_the_traced_net(kind):
    text = {} if kind == "none" else {"context_dim": 6, "context_length": 5}
    config = DiTConfig(
        input_size=8, d_model=24, n_layer=3, n_head=2, mlp_ratio=3.0, context=kind, **text
    )
    shape = jax.ShapeDtypeStruct
    one, x = shape((1,), "int32"), shape((1, *config.shape), "float32")
    told = {"context": shape((1, 5, 6), "float32")} if text else {}
    variables = jax.eval_shape(DiT(config).init, jax.random.key(0), x, one, one)
    run = lambda v, x, one, told: DiT(config).apply(v, x, one, one, **told)[0]
    assert 2 * dit_flops(config) == count_flops(run, variables, x, one, told)


POM = {
    "input_size": 8, "d_model": 24, "n_layer": 1, "n_head": 2, "mlp_ratio": 3.0, "mixer": "pom",
    "expand": 3, "num_classes": 4,
}  # fmt: skip


def traced(config) -> float:
    net, shape = (JiT if isinstance(config, JiTConfig) else DiT)(config), jax.ShapeDtypeStruct
    one, x = shape((1,), "int32"), shape((1, *config.shape), "float32")
    variables = jax.eval_shape(net.init, jax.random.key(0), x, one, one)
    run = lambda v, x, one: net.apply(v, x, one, one)[0]
    return count_flops(run, variables, x, one) / 2


@pytest.mark.parametrize(
    "change",
    [
        {}, {"n_layer": 3, "degree": 4}, {"n_head": 1}, {"ngroups": 3}, {"patch_size": 8},
        {"n_head": 12, "rope": "2d"},
        {"context": "cross", "context_dim": 6, "context_length": 5},
    ],
)  # fmt: skip
def test_flops_of_pom_are_those_of_the_traced_net(change):
    """Output of rank n_head; of every channel with n_head=1, and of one token, where it is less."""
    config = DiTConfig(**(POM | change))
    assert dit_flops(config) == traced(config)


@pytest.mark.parametrize(
    "change",
    [{}, {"context_tokens": 0}, {"context_start": 0}, {"n_head": 1}, {"groups": 2, "expand": 2}],
)
def test_flops_of_jit_are_those_of_the_traced_net(change):
    fields = {"input_size": 8, "patch_size": 2, "bottleneck": 6, "d_model": 16, "n_layer": 3}
    fields |= {"n_head": 4, "num_classes": 4, "context_tokens": 3, "context_start": 1}
    config = JiTConfig(**(fields | change))
    assert jit_flops(config) == traced(config)


def test_flops_of_jit_are_few_more_at_512_pixels():
    """As many tokens, of more pixels."""
    costs = [jit_flops(jit_config("B", input_size=n, patch_size=n // 16)) for n in (256, 512)]
    assert costs[0] / 1e9 == pytest.approx(17.98, abs=0.01) and costs[1] < 1.03 * costs[0]


def test_flops_of_factorised_pom():
    """A traced branch counts as the dearer one: within 8 frames of 4 patches; along 2 x 16."""
    config = DiTConfig(**POM, frames=8, mixing="factorised")
    first = dataclasses.replace(config, patch_size=4)
    assert dit_flops(first) == traced(first)
    one = dataclasses.replace(config, frames=2)
    two = dataclasses.replace(one, n_layer=2)
    assert dit_flops(two) - dit_flops(one) == traced(two) - traced(one)


def test_pom_costs_less_than_attention_and_grows_with_the_tokens():
    costs = [
        [dit_flops(dataclasses.replace(dit(latent=n), mixer=mixer)) / 1e9 for n in (32, 64, 128)]
        for mixer in ("attention", "pom")
    ]
    assert all(b < a for a, b in zip(*costs))
    assert costs[1][2] / costs[1][0] == pytest.approx(16, rel=0.02)  # 16 times the tokens
    assert costs[0][2] / costs[0][0] > 24


def test_flops_of_another_mixer_are_refused():
    with pytest.raises(ValueError, match="mixer=mamba2"):
        dit_flops(DiTConfig(mixer="mamba2"))


# ---------------------------------------------------------------- schedules


def test_weak_steps_come_first():
    assert by_weak_steps(10, 4, **ENDS) == ((4, 4), (2, 6))
    assert by_weak_steps(10, 0, **ENDS) == ((2, 10),)
    assert by_weak_steps(10, 10, **ENDS) == ((4, 10),)
    with pytest.raises(ValueError, match="11 weak steps of 10; there can be 0 to 10"):
        by_weak_steps(10, 11, **ENDS)


@pytest.mark.parametrize("share, relative", [(0.25, 0.811), (0.5, 0.622), (0.8, 0.396)])
def test_a_budget_finds_the_published_shares(share, relative):
    costs = mode_flops(FlexiDiTConfig(base=dit()))
    levels = by_budget(1000, relative, costs, **ENDS)
    assert levels[0][1] == pytest.approx(1000 * share, abs=2)
    for guidance in ("cfg", "none"):
        segments = with_guidance(levels, guidance, **ENDS)
        assert relative_flops(segments, costs, 2) == pytest.approx(relative, abs=1e-3)


def test_the_number_of_weak_steps_is_rounded():
    assert by_budget(250, 0.6, mode_flops(FlexiDiTConfig(base=dit())), **ENDS)[0] == (4, 132)
    assert by_budget(20, 0.6, mode_flops(FlexiDiTConfig(base=dit())), **ENDS)[0] == (4, 11)


def test_a_budget_counts_a_weak_guide():
    for guidance in ("weak_uncond", "weak_cond"):
        levels = by_budget(1000, 0.5, COSTS, guidance=guidance, **ENDS)
        segments = with_guidance(levels, guidance, **ENDS)
        assert relative_flops(segments, COSTS, 2) == pytest.approx(0.5, abs=1e-3)
        # It saves (1 + r) / 2 without a weak step: more than that is not spent.
        assert by_budget(10, 0.9, COSTS, guidance=guidance, **ENDS) == ((2, 10),)


def test_the_ends_of_a_budget():
    assert by_budget(10, 1.0, COSTS, **ENDS) == ((2, 10),)
    assert by_budget(10, 0.25, COSTS, **ENDS) == ((4, 10),)


@pytest.mark.parametrize("budget", [0.24, 1.01, -1.0, float("nan")])
def test_a_budget_that_cannot_be_met_says_what_can(budget):
    with pytest.raises(ValueError, match=r"patch size 4 .* costs 0.250 .* choose 0.25 to 1"):
        by_budget(10, budget, COSTS, **ENDS)


def test_modes_that_are_not_there():
    with pytest.raises(ValueError, match="no mode of patch size 8; there are 2, 4"):
        by_budget(10, 0.5, COSTS, weak=8, powerful=2)
    with pytest.raises(ValueError, match="patch size 2 is not cheaper than 4"):
        by_budget(10, 0.5, COSTS, weak=2, powerful=4)
    with pytest.raises(ValueError, match="no mode of patch size 3; there are 2, 4"):
        plan(2, COSTS, modes=[3, 2], **ENDS)


def test_several_levels():
    assert by_levels(10, [(8, 3), (4, 2)], powerful=2) == ((8, 3), (4, 2), (2, 5))
    with pytest.raises(ValueError, match="11 steps of 10"):
        by_levels(10, [(8, 6), (4, 5)], powerful=2)
    with pytest.raises(ValueError, match="largest first"):
        by_levels(10, [(4, 3), (8, 2)], powerful=2)


def test_any_list_of_modes():
    assert by_list([4, 4, 2, 4, 2, 2]) == ((4, 2), (2, 1), (4, 1), (2, 2))
    with pytest.raises(ValueError, match="empty"):
        by_list([])


def test_a_threshold_in_time():
    assert by_time([999, 500, 499, 0], 500, **ENDS) == ((4, 2), (2, 2))
    assert by_time([999, 500], 1000, **ENDS) == ((2, 2),)


# ---------------------------------------------------------------- guidance


@pytest.mark.parametrize(
    "guidance, weak, powerful",
    [
        ("cfg", ("null", 4), ("null", 2)),
        ("weak_uncond", ("null", 4), ("null", 4)),
        ("weak_cond", ("null", 4), ("same", 4)),
        ("none", ("none", None), ("none", None)),
    ],
)
def test_guides(guidance, weak, powerful):
    scales = (None, None) if guidance == "none" else (1.0, 3.0)
    segments = with_guidance(((4, 3), (2, 5)), guidance, scales=scales, **ENDS)
    assert segments == (
        Segment(steps=3, mode=4, guide=weak[0], guide_mode=weak[1], scale=scales[0]),
        Segment(steps=5, mode=2, guide=powerful[0], guide_mode=powerful[1], scale=scales[1]),
    )


def test_guidance_errors():
    with pytest.raises(ValueError, match="choose one of cfg"):
        with_guidance(((2, 1),), "strong", **ENDS)
    with pytest.raises(ValueError, match="2 guidance scales for 1 levels"):
        with_guidance(((2, 1),), scales=(1.0, 2.0), **ENDS)
    with pytest.raises(ValueError, match="'none' has no scales"):
        with_guidance(((2, 1),), "none", scales=(1.0,), **ENDS)


def test_cost_of_a_trajectory():
    segments = with_guidance(((4, 3), (2, 5)), "weak_uncond", **ENDS)
    assert [segment_flops(s, COSTS, 2) for s in segments] == [3 * 2, 5 * 5]
    assert trajectory_flops(segments, COSTS, 2) == 31
    assert trajectory_flops([Segment(steps=2)], COSTS, 2) == 16  # the net's own mode


# ---------------------------------------------------------------- one call for all


def test_plan_takes_any_one_way():
    modes = lambda **how: [s.mode for s in plan(4, COSTS, **how, **ENDS) for _ in range(s.steps)]
    assert modes() == [2, 2, 2, 2]
    assert modes(budget=0.625) == [4, 4, 2, 2] == modes(weak_steps=2)
    assert modes(levels=[(4, 1)]) == [4, 2, 2, 2]
    assert modes(modes=[4, 2, 4, 2]) == [4, 2, 4, 2]
    assert modes(switch=5, times=[9, 7, 5, 3]) == [4, 4, 4, 2]
    with pytest.raises(ValueError, match="budget and weak_steps"):
        modes(budget=0.5, weak_steps=1)
    with pytest.raises(ValueError, match="3 modes for 4 steps"):
        modes(modes=[4, 2, 2])


def test_budget_to_propose():
    """One that can be met, whatever the patch sizes cost."""
    net = lambda sizes: FlexiDiTConfig(base=dit("S"), patch_sizes=sizes)
    assert shown_budget(net((2, 4))) == 0.6 and shown_budget(net((2,))) is None
    close = FlexiDiTConfig(base=dit("S", latent=20, patch=4), patch_sizes=(4, 5))
    least = relative_flops(plan(4, mode_flops(close), powerful=4, weak=5, weak_steps=4),
                           mode_flops(close), 4)  # fmt: skip
    assert 0.6 < least <= shown_budget(close) < least + 0.01
