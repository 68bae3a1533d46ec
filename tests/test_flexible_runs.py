"""Runs of FlexiDiT: several patch sizes in one net, from a DiT or alone, at several budgets."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import lintime
from lintime.model.nets.flexidit import mode_params
from lintime.train import loop
from lintime.train.convert.flexify import flexify_run
from lintime.train.errors import UserError
from lintime.train.finish import finish
from lintime.train.loaded.flexible import flexible_flops, flexible_segments
from lintime.train.override import apply_overrides
from lintime.train.schema import Mesh
from lintime.train.step import init_state, make_train_step
from lintime.train.tasks.table import make_task
from lintime.train.validate import validate
from tests.tiny import assert_same, quick, read_lines, saved_state
from tests.tiny_diffusion import dit_run, flexible_run, stopped_after
from tests.tiny_images import SIZE, write_images

ONE = {"devices": jax.devices()[:1]}
VARIANTS = ("shared", "lora")


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "noise.npz")


@pytest.fixture(scope="module")
def dit(images, tmp_path_factory):
    """Run and folder of a DiT."""
    run, folder = dit_run(images, flow=True), tmp_path_factory.mktemp("dit") / "run"
    loop.train(run, folder, **ONE)
    return run, folder


@pytest.fixture(scope="module")
def whole(images, dit, tmp_path_factory):
    """{variant: (run, folder)}: "shared" has the DiT as a stage, "lora" starts from its run."""
    made = {}
    for variant in VARIANTS:
        run = flexible_run(images, flow=True, variant=variant)
        folder = tmp_path_factory.mktemp(variant) / "run"
        if variant == "shared":
            stage = dataclasses.replace(dit[0], data=dataclasses.replace(dit[0].data, path=""))
            run = dataclasses.replace(run, stages=(stage,), init_from="stage:0")
            shutil.copytree(dit[1], folder / "stages/0")
        else:
            run = dataclasses.replace(run, init_from=str(dit[1]))
        validate(run)
        loop.train(run, folder, **ONE)
        made[variant] = run, folder
    return made


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole["shared"][1], tmp_path / "copy"))


def tree(state):
    return {**state.params, **state.stats}


def pngs(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "samples").glob("*.png")}


# ---------------------------------------------------------------- training


def test_modes_alternate_as_the_step_says(images):
    run = flexible_run(images, flow=True)
    task = make_task(run)
    assert task.modes == {2: 0.5, 4: 0.5}
    modes = [task.mode_at(step) for step in range(400)]
    assert modes == [make_task(run).mode_at(step) for step in range(400)]
    assert 160 < modes.count(4) < 240
    assert modes != [
        make_task(apply_overrides(run, ["seed=1"])).mode_at(step) for step in range(400)
    ]
    lora = make_task(flexible_run(images, flow=True, variant="lora"))
    assert {lora.mode_at(step) for step in range(50)} == {4}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_leaves_the_losses_of_all_modes(variant, whole):
    run, folder = whole[variant]
    lines, task = read_lines(folder), make_task(run)
    last = lines[-1]
    assert last["val_loss_p2"] != last["val_loss_p4"]
    trained = {
        "shared": (last["val_loss_p2"] + last["val_loss_p4"]) / 2,
        "lora": last["val_loss_p4"],
    }
    assert last["val_loss"] == pytest.approx(trained[variant], rel=1e-5)
    weak = [task.mode_at(line["step"] - 1) == 4 for line in lines[:-1]]
    assert ["distill_eps" in line for line in lines[:-1]] == weak and any(weak)
    if variant == "shared":
        assert not all(weak)
        line = lines[weak.index(True)]
        assert line["loss"] == pytest.approx(line["mse"] + 0.5 * line["distill_eps"], rel=1e-5)
    else:
        assert lines[0]["loss"] == pytest.approx(lines[0]["distill_eps"], rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_in_the_middle_continues_bit_for_bit(variant, whole, tmp_path, monkeypatch):
    run, folder = whole[variant]
    out = tmp_path / "run"
    if run.stages:
        shutil.copytree(folder / "stages", out / "stages")
    with stopped_after(3, monkeypatch):
        assert loop.train(run, out, **ONE).step == 3
    loop.train(run, out, **ONE)
    assert read_lines(out) == read_lines(folder)
    assert_same(saved_state(run, out), saved_state(run, folder))


def test_a_frozen_base_stays_what_it_was(whole, dit):
    run, folder = whole["lora"]
    base = saved_state(*dit).ema
    state = saved_state(run, folder)
    assert_same(state.stats["base"], base)
    assert state.params.keys() == state.ema.keys() == {"modes"}
    loaded = lintime.load(folder)
    assert_same(jax.tree.map(np.asarray, loaded.stats["base"]), base)
    assert_same(jax.tree.map(np.asarray, loaded.modes[2]), base)
    np.testing.assert_array_equal(
        loaded.generate([0, 3], seed=2, guidance=2.0),
        lintime.load(dit[1]).generate([0, 3], seed=2, guidance=2.0),
    )
    # no optimiser state, and adapters that have learned
    sizes = {a.shape for a in jax.tree.leaves(state.opt)}
    assert base["y_embedder"]["embedding"].shape not in sizes
    assert np.any(state.params["modes"]["p4"]["lora"]["mlp"]["fc1"]["B"])


def test_every_weight_of_the_shared_variant_learns(whole, dit):
    run, folder = whole["shared"]
    own = mode_params(run.net, saved_state(run, folder).params, 2)
    moved = jax.tree.map(lambda a, b: np.any(a != b), own, saved_state(*dit).ema)
    assert all(jax.tree.leaves(moved))
    assert np.any(saved_state(run, folder).params["patch_size_embed"]["p4"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_begins_as_the_dit_it_was_made_of(variant, images, dit, tmp_path):
    """From a run of a DiT, and from that run made flexible, the same weights."""
    run = flexible_run(images, flow=True, variant=variant)
    run = apply_overrides(run, ["optim.learning_rate=0", "steps=1", "ema.decay=0"])
    flexify_run(dit[1], tmp_path / "flexi", patch_sizes=(2, 4), variant=variant,
                overrides=["net.rank=2"])  # fmt: skip
    states = []
    for name, source in (("a", dit[1]), ("b", tmp_path / "flexi")):
        mine = dataclasses.replace(run, init_from=str(source))
        loop.train(mine, tmp_path / name, **ONE)
        states.append(tree(saved_state(mine, tmp_path / name)))
    assert_same(*states)
    own = mode_params(run.net, states[0], 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), own,
                 saved_state(*dit).ema)  # fmt: skip
    assert read_lines(tmp_path / "a")[-1]["val_loss_p2"] == pytest.approx(
        read_lines(dit[1])[-1]["val_loss"], rel=1e-5
    )


def test_init_from_another_dit_is_one_line(images, dit, tmp_path):
    run = dataclasses.replace(
        flexible_run(images, "net.base.d_model=32", flow=True), init_from=str(dit[1])
    )
    with pytest.raises(UserError, match="is from another model") as caught:
        loop.train(run, tmp_path / "run", **ONE)
    assert "\n" not in str(caught.value)


def test_distillation_brings_the_weak_mode_to_the_powerful_one(images, dit):
    run = flexible_run(images, flow=True, variant="lora")
    run = apply_overrides(
        run, ["optim.learning_rate=0.01", "optim.schedule=constant", "ema.decay=0"]
    )
    task = make_task(run).in_mode(4)
    mesh = loop.make_mesh(run.mesh, ONE["devices"])
    with jax.set_mesh(mesh):
        state = jax.jit(lambda k: init_state(task, run, k))(jax.random.key(0))
        base = jax.tree.map(jnp.asarray, saved_state(*dit).ema)
        # the output of a young DiT is nearly zero whatever its patches
        draw = np.random.default_rng(0)
        base = jax.tree.map(lambda a: a + 0.1 * draw.normal(size=a.shape).astype("f"), base)
        state = state.replace(stats={"base": base})
        step = jax.jit(make_train_step(task, run))
        data = loop.open_split(run, "train", ".", None)
        batch = {k: jnp.asarray(v) for k, v in data.batch(0, np.arange(8)).items()}
        far = []
        for number in range(60):
            state, metrics = step(state, batch | {"step": jnp.int32(number)})
            far.append(float(metrics["distill_eps"]))
    assert np.mean(far[-5:]) < 0.5 * np.mean(far[:5])
    assert_same(jax.tree.map(np.asarray, state.stats["base"]), jax.tree.map(np.asarray, base))


def one_step(run, mesh: Mesh, devices) -> dict[str, float]:
    """Metrics of an update in the weak mode, from random weights without zeros."""
    host = loop.open_split(run, "train", ".", None).batch(0, np.arange(8))
    mesh, task, draw = (
        loop.make_mesh(mesh, devices),
        make_task(run).in_mode(4),
        np.random.default_rng(0),
    )
    with jax.set_mesh(mesh):
        init = lambda k: init_state(task, run, k)
        abstract = jax.eval_shape(init, jax.random.key(0))
        shardings = loop.state_shardings(abstract, mesh)
        number = lambda a: np.asarray(0.1 * draw.normal(size=a.shape), a.dtype)
        params = jax.tree.map(number, abstract.params)
        zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract)
        state = jax.device_put(zeros.replace(params=params), shardings)
        step = loop.jit_step(make_train_step(task, run), shardings, False)
        metrics = step(state, loop.put_batch(host, 0, mesh, 8))[1]
        return {k: float(v) for k, v in metrics.items()}


def test_a_step_on_eight_devices_has_the_loss_of_one(images):
    run = flexible_run(images, "ema.decay=0", flow=True)
    one = one_step(run, Mesh(data=1), ONE["devices"])
    eight = one_step(run, Mesh(data=2, fsdp=2, tensor=2), None)
    assert one["grad_norm"] > 0 and one["distill_eps"] > 0
    assert eight == pytest.approx(one, rel=1e-4)


# ---------------------------------------------------------------- budgets


def test_what_is_printed_at_the_end(whole, copy, capsys):
    run, _ = whole["shared"]
    result = loop.Result(copy, 6, {"loss": 1.0, "mse": 1.0, "loss_p4": 2.0})
    finish(run, result, ["lintime", "train", "x.py", "--run", str(copy)])
    out = capsys.readouterr().out
    assert "loss 1, mse 1, loss_p4 2" in out and "samples/step00000006-seed0.png" in out
    assert f"sample --run {copy} --budget 1,0.6\n" in out
    assert "x.py data.path=FOLDER --run runs/mine" in out


def test_one_budget_is_a_grid_and_several_a_picture_with_a_table(cli, whole, copy):
    run, _ = whole["shared"]
    out = cli("sample", "--run", copy, "sample.steps=8", "sample.guidance=2", "--budget", "1,0.6")
    segments = flexible_segments(run.net, dataclasses.replace(run.sample, steps=8), 0.6)
    steps = "+".join(f"{s.steps}x p{s.mode}" for s in segments)
    lines = out.splitlines()
    assert lines[0].startswith("budget 1: 8x p2, ") and "(100%)" in lines[0]
    assert lines[1].startswith(f"budget 0.6: {steps}, ") and "GFLOPs an image" in lines[1]
    share = int(lines[1].partition("(")[2].partition("%")[0])
    assert 55 <= share <= 65 and len(segments) == 2 and segments[0].mode == 4
    assert " s for 4 images" in lines[1]
    (name,) = pngs(copy)
    assert (
        lines[2] == f"4 images at 2 budgets, a multiply-add is 2 FLOPs: {copy}/samples/{name}"
        and "budgets" in name
    )
    before = pngs(copy)
    assert np.asarray(Image.open(copy / "samples" / name)).ndim == 3
    # other settings, another picture; a single budget is an ordinary grid, by either spelling
    cli("sample", "--run", copy, "sample.steps=8", "--budget", "1,0.6")
    assert before.items() < pngs(copy).items() and len(pngs(copy)) == 2
    before = pngs(copy)
    words = ("sample", "--run", copy, "sample.steps=8", "sample.guidance=2")
    out = cli(*words, "sample.budgets=0.6")
    (grid,) = pngs(copy).keys() - before.keys()
    assert f"4 images: {copy}/samples/{grid}" in out and "budgets0.6" in grid
    before = pngs(copy)
    cli(*words, "--budget", "0.6")
    assert pngs(copy) == before
    loaded = lintime.load(copy)
    draw = lambda budget: loaded.generate([0, 1], steps=8, guidance=2.0, budgets=(budget,))
    assert np.any(draw(0.6) != draw(1.0))
    np.testing.assert_array_equal(
        loaded.generate([0, 1], steps=8, guidance=2.0), draw(loaded.config.sample.budgets[0])
    )
    with pytest.raises(UserError, match=r"budgets=1, 0.6: images are drawn at one .*=\(0.6,\)"):
        loaded.generate([0, 1], budgets=(1.0, 0.6))


def test_mistakes_of_budgets_are_one_line(cli, copy, dit):
    sample = lambda *words: cli.refused("sample", "--run", copy, *words)
    for words in (("--budget", "0.01"), ("sample.budgets=1,0.01",)):
        line = sample(*words)
        assert "a budget of 0.01 is not possible: patch size 4 throughout costs 0." in line
    assert "a budget of 1.5 is not possible" in sample("--budget", "1.5")
    assert "sample.budgets: expected" in sample("--budget", "much")
    assert "sample.budgets is empty" in sample("sample.budgets=")
    assert "sample.weak=8 is none of net.patch_sizes=2, 4" in sample("sample.weak=8")
    assert "choose one of cfg, weak_uncond, weak_cond" in sample("sample.guide=strong")
    assert "sample.npz=true would be ignored" in sample("--budget", "1,0.6", "sample.npz=true")
    line = cli.refused("eval", "--run", copy, "eval.samples=4", "sample.budgets=1,0.6")
    assert "eval.samples=4 images are drawn at one budget, sample.budgets has 2" in line
    assert "class 4 is out of range" in sample("sample.classes=4", "--budget", "1,0.6")
    line = cli.refused("sample", "--run", dit[1], "--budget", "0.6")
    assert "--budget 0.6: " in line and "lintime flexify" in line


@pytest.mark.parametrize("guide", ["weak_uncond", "weak_cond"])
def test_guides_of_the_weak_mode(guide, whole):
    loaded = lintime.load(whole["lora"][1])
    draw = lambda **s: loaded.generate([0, 1], seed=1, **{"guidance": 3.0} | s)
    own = draw(guide=guide)
    assert np.any(own != draw()) and np.any(own != draw(guidance=1.0))
    np.testing.assert_array_equal(draw(guide=guide, guidance=1.0), draw(guidance=1.0))
    sample = dataclasses.replace(loaded.config.sample, guide=guide, guidance=3.0, steps=100)
    net = loaded.config.net
    full = flexible_flops(net, dataclasses.replace(sample, guide="cfg"), 1.0)
    for guidance in (3.0, 1.0):
        mine = dataclasses.replace(sample, guidance=guidance)
        whole_cost = full if guidance != 1.0 else full / 2
        assert flexible_flops(net, mine, 0.5) / whole_cost == pytest.approx(0.5, abs=0.01)


def test_weak_steps_have_guidance_of_their_own(whole):
    loaded = lintime.load(whole["shared"][1])
    draw = lambda **s: loaded.generate([0, 1], seed=1, steps=6, budgets=(0.6,), **s)
    same = draw(guidance=2.0, weak_guidance=2.0)
    np.testing.assert_allclose(same.astype(int), draw(guidance=2.0).astype(int), atol=1)
    assert np.any(same != draw(guidance=2.0, weak_guidance=4.0))


def test_adapters_with_learned_variances(images, tmp_path):
    """Gaussian diffusion, bit-equal after an interruption."""
    run = flexible_run(images, "steps=2", variant="lora")
    validate(run)
    loop.train(run, tmp_path / "run", **ONE)
    lines = read_lines(tmp_path / "run")
    assert {"distill_eps", "distill_var", "vb"} <= lines[0].keys()
    assert {"val_loss_p2", "val_loss_p4"} <= lines[-1].keys()
    assert lintime.load(tmp_path / "run").generate([1], budgets=(0.5,)).shape == (1, SIZE, SIZE, 3)
