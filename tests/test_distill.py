"""Attention of a trained DiT replaced by other mixers, which learn from it."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import lintime
from lintime.model.nets.dit import DiT, DiTConfig
from lintime.model.nets.replace_mixer import (
    check_replacement,
    errors,
    is_mixer,
    replace_mixers,
    trace,
)
from lintime.train import finish, loop
from lintime.train.checkpoint import restore_inference, save_inference
from lintime.train.cli import main
from lintime.train.config_files import read_config, save_config
from lintime.train.convert.distill import distill_run
from lintime.train.errors import UserError
from lintime.train.mesh import make_mesh, state_shardings
from lintime.train.metrics import forward_flops
from lintime.train.override import apply_overrides
from lintime.train.samples import distilled
from lintime.train.schema import Distill, Mesh, Optim
from lintime.train.step import init_state
from lintime.train.tasks.table import make_task
from lintime.train.validate import validate
from tests.tiny import assert_same, quick, read_lines, saved_state, values
from tests.tiny_diffusion import dit_run, flexible_run, stopped_after
from tests.tiny_dit import make_config, random_params
from tests.tiny_images import write_images

ONE = {"devices": jax.devices()[:1]}
POM = {"mixer": "pom", "degree": 3, "rope": "none"}


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "noise.npz")


@pytest.fixture(scope="module")
def dit(images, tmp_path_factory):
    """Run and folder of the teacher, whose weights and so whose blocks are far from zero."""
    run, folder = dit_run(images, flow=True), tmp_path_factory.mktemp("dit") / "run"
    save_teacher(run, folder)
    return run, folder


def save_teacher(run, folder, seed=0):
    draw = np.random.default_rng(seed)
    params = jax.eval_shape(make_task(run).init, jax.random.key(0))["params"]
    params = jax.tree.map(lambda a: np.float32(0.25 * draw.normal(size=a.shape)), params)
    save_inference(folder, {"params": params}, run.steps)
    save_config(run, folder / "config.json")


def layers_of(run, teacher, **net):
    """The run that trains the mixers of `run`'s net layer by layer."""
    return dataclasses.replace(
        run, net=dataclasses.replace(run.net, **POM | net), init_from=str(teacher), steps=12,
        distill=Distill(teacher=str(teacher), layers=True),
        optim=Optim(learning_rate=1e-2, warmup=1, schedule="constant"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(dit, tmp_path_factory):
    """Three stages in one folder: the teacher, layer by layer, end to end."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(dit[1], folder / "stages/0")
    layers = layers_of(dit[0], "stage:../0")
    run = dataclasses.replace(
        layers, stages=(dit[0], layers), init_from="stage:1",
        distill=Distill(teacher="stage:0", denoise_weight=0.5), steps=10,
        optim=Optim(learning_rate=1e-3, warmup=1, schedule="constant"),
    )  # fmt: skip
    validate(run)
    loop.train(run, folder, **ONE)
    return run, folder


def located(run, folder):
    """As the loop has it."""
    teacher = {"stage:0": folder / "stages/0", "stage:../0": folder.parent / "0"}
    distill = dataclasses.replace(run.distill, teacher=str(teacher[run.distill.teacher]))
    return dataclasses.replace(run, distill=distill)


def averaged(run, folder):
    """The weights that a run of a DiT starts others with."""
    abstract = jax.eval_shape(DiffusionOf(run).init, jax.random.key(0))
    return restore_inference(folder, abstract)["params"]


def DiffusionOf(run):
    return make_task(dataclasses.replace(run, distill=Distill()))


# ---------------------------------------------------------------- nets


@pytest.fixture(scope="module")
def nets(dit):
    """(net, params, inputs) of the teacher."""
    config, draw = dit[0].net, np.random.default_rng(0)
    x, t = draw.normal(size=(2, *config.shape)).astype(np.float32), np.float32([0.2, 0.7])
    labels = np.array([1, 2], np.int32)
    return DiT(config), averaged(*dit), (x, t, labels)


@pytest.mark.parametrize("options", [{}, {"remat": "full"}, {"unroll": True}])
def test_each_block_on_its_own_input_is_the_net(nets, options):
    net, params, (x, t, labels) = nets
    net = DiT(net.config, **options)
    made = trace(net, params, x, t, labels=labels)
    np.testing.assert_array_equal(made.out, net.apply({"params": params}, x, t, labels)[0])
    np.testing.assert_array_equal(made.inputs[1:], made.outputs[:-1])
    alone = lambda inputs: net.apply({"params": params}, inputs, t, labels, method=DiT.each_block)
    np.testing.assert_allclose(alone(made.inputs), made.outputs, atol=1e-6)
    # a block sees its own input only
    changed = alone(made.inputs.at[0].add(1.0))
    assert not np.allclose(changed[0], made.outputs[0], atol=1e-3)
    np.testing.assert_allclose(changed[1], made.outputs[1], atol=1e-6)


@pytest.mark.parametrize("kind", ["cross", "video"])
def test_each_block_of_nets_of_texts_and_videos(kind):
    extra = {
        "cross": {"context": "cross", "context_dim": 6, "context_length": 3},
        "video": {"frames": 2, "mixing": "factorised", "mixer": "pom"},
    }[kind]
    net, draw = DiT(make_config(**extra)), np.random.default_rng(0)
    x = draw.normal(size=(2, *net.config.shape)).astype(np.float32)
    t, told = np.float32([0.2, 0.7]), {"labels": np.array([1, 2]), "drop": np.array([True, False])}
    if kind == "cross":
        told["context"] = draw.normal(size=(2, 3, 6)).astype(np.float32)
        told["context_mask"] = np.array([[True, True, False], [True] * 3])
    params = random_params(net.config)
    made = trace(net, params, x, t, **told)
    alone = net.apply({"params": params}, made.inputs, t, **told, method=DiT.each_block)
    np.testing.assert_allclose(alone, made.outputs, atol=1e-5)


def test_errors_are_means_by_row():
    a, b = np.zeros((3, 2, 4, 5), np.float32), np.ones((3, 2, 4, 5), np.float32)
    b[:, 1] = -3
    mse, mae = errors(jnp.asarray(a), jnp.asarray(b), stacked=True)
    np.testing.assert_allclose(mse, [1, 9])
    np.testing.assert_allclose(mae, [1, 3])
    mse, mae = errors(jnp.asarray(a[0]), jnp.asarray(b[0]))
    np.testing.assert_allclose((mse, mae), [[1, 9], [1, 3]])


def test_what_is_kept_and_what_is_new(nets):
    net, params, (x, t, labels) = nets
    new = dataclasses.replace(net.config, **POM)
    fresh = DiT(new).init(jax.random.key(0), x, t, labels)["params"]
    student = replace_mixers(params, fresh, net.config, new)
    assert jax.tree.structure(student) == jax.tree.structure(fresh)
    which = is_mixer(student, new)
    assert all(jax.tree.leaves(which["blocks"]["mixer"]))
    assert sum(jax.tree.leaves(which)) == len(jax.tree.leaves(student["blocks"]["mixer"]))
    assert student["blocks"]["mixer"] is fresh["blocks"]["mixer"]
    assert student["blocks"]["mlp"] is params["blocks"]["mlp"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"d_model": 32}, "d_model=32 of the student is 16 in the teacher"),
        ({"class_dropout": 0.0}, "set class_dropout=0.1"),
    ],
)
def test_nets_that_differ_in_more(changes, message):
    teacher = DiTConfig(d_model=16)
    check_replacement(teacher, dataclasses.replace(teacher, **POM, n_head=4))
    with pytest.raises(ValueError, match=message):
        check_replacement(teacher, dataclasses.replace(teacher, **POM | changes))


def test_contexts():
    cross = DiTConfig(context="cross", context_dim=4, context_length=3)
    check_replacement(cross, dataclasses.replace(cross, mixer="pom"))
    with pytest.raises(ValueError, match="set n_head=16"):  # the context is attended to by them
        check_replacement(cross, dataclasses.replace(cross, mixer="pom", n_head=4))
    joint = dataclasses.replace(cross, context="joint")
    with pytest.raises(ValueError, match="only context=none or cross"):
        check_replacement(joint, joint)


# ---------------------------------------------------------------- runs


def test_layer_by_layer_trains_the_mixers_only(whole, dit):
    run, folder = whole[0].stages[1], whole[1] / "stages/1"
    task = make_task(located(run, folder))
    state, teacher = saved_state(task.run, folder), averaged(*dit)
    assert state.stats == {}
    trained = is_mixer(state.params, run.net)
    kept = {k: v for k, v in state.params["blocks"].items() if k != "mixer"}
    assert_same(kept, {k: v for k, v in teacher["blocks"].items() if k != "attn"})
    rest = lambda tree: {k: v for k, v in tree.items() if k != "blocks"}
    assert_same(rest(state.params), rest(teacher))
    fresh = jax.jit(DiffusionOf(run).init)(jax.random.key(run.seed))["params"]
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), state.params, fresh)
    assert not any(jax.tree.leaves(same["blocks"]["mixer"]))
    # moments of mixers only: two for each, and some counters
    moments = [a for a in jax.tree.leaves(state.opt) if a.ndim]
    assert len(moments) == 2 * sum(jax.tree.leaves(trained))
    loss = values(read_lines(folder), "loss")
    assert loss[-1] < 0.8 * loss[0]
    lines = read_lines(folder)
    assert lines[0]["loss"] == pytest.approx(
        lines[0]["block_mse"] + lines[0]["block_mae"], rel=1e-5
    )


def test_end_to_end_trains_all(whole, dit):
    run, folder = whole
    before = averaged(run.stages[1], folder / "stages/1")
    after = saved_state(located(run, folder), folder).params
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), before, after)
    moved = [not s for s in jax.tree.leaves(same)]
    assert np.mean(moved) > 0.9
    lines = read_lines(folder)
    block = [line["block_mse"] + line["block_mae"] for line in lines[:-1]]
    assert block[-1] < 0.95 * block[0]
    parts = {"block_mse", "block_mae", "output_mse", "output_mae", "denoise", "teacher_loss"}
    assert parts <= lines[0].keys()
    shares = [lines[0][n] for n in ("block_mse", "block_mae", "output_mse", "output_mae")]
    assert lines[0]["loss"] == pytest.approx(sum(shares) + 0.5 * lines[0]["denoise"], rel=1e-5)


def test_validation_has_the_losses_of_both(whole, dit):
    run, folder = whole
    last = read_lines(folder)[-1]
    assert {"val_loss", "val_teacher_loss", "val_distill", "val_block_mse"} <= last.keys()
    teacher = finish.evaluate_run(str(dit[1]), [], "validation", None)
    assert last["val_teacher_loss"] == pytest.approx(teacher["loss"], rel=1e-5)


def test_the_teacher_stays_and_is_nowhere_in_the_checkpoint(whole, dit):
    run, folder = whole
    task = make_task(located(run, folder))
    fixed = task.fixed_stats()["teacher"]
    assert_same(fixed, jax.tree.map(np.asarray, averaged(*dit)))
    newest = folder / f"checkpoints/{run.steps}"
    assert not (newest / "stats").exists()
    meta = json.loads((newest / "meta/metadata").read_text())
    assert list(meta["fixed"]) == ["teacher"]


def test_a_teacher_at_home(whole, dit, monkeypatch):
    """A path with ~ is one path to whoever checks and to whoever reads the weights."""
    run, folder = whole
    monkeypatch.setenv("HOME", str(Path(dit[1]).parent))
    distill = dataclasses.replace(run.distill, teacher=f"~/{Path(dit[1]).name}")
    fixed = make_task(dataclasses.replace(run, distill=distill)).fixed_stats()["teacher"]
    assert_same(fixed, jax.tree.map(np.asarray, averaged(*dit)))


def test_the_student_is_a_dit_without_its_teacher(whole, tmp_path, capsys):
    run, folder = whole
    copy = tmp_path / "alone"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("stages"))
    loaded = lintime.load(copy)
    assert loaded.generate([1, 2]).shape == (2, 8, 8, 3)
    assert "mixer" in loaded.params["blocks"]
    again = finish.evaluate_run(str(copy), [], "validation", None)
    assert again == pytest.approx({"loss": read_lines(folder)[-1]["val_loss"]}, rel=1e-5)


@pytest.mark.parametrize("layers", [True, False])
def test_a_stopped_run_continues_bit_for_bit(layers, whole, tmp_path, monkeypatch):
    run, folder = whole
    copy = tmp_path / "run"
    shutil.copytree(folder / "stages", copy / "stages")
    if layers:
        shutil.rmtree(copy / "stages/1")
        run, copy, folder = run.stages[1], copy / "stages/1", folder / "stages/1"
    with stopped_after(5, monkeypatch):
        result = loop.train(run, copy, **ONE)
    assert (result.stopped, result.step) == ("SIGTERM", 5)
    loop.train(run, copy, **ONE)
    same = [saved_state(located(run, place), place) for place in (copy, folder)]
    assert_same(*same)
    assert read_lines(copy) == read_lines(folder)


def test_a_mesh_computes_the_same_and_cuts_the_teacher(whole, dit, tmp_path):
    run, mesh = layers_of(dit[0], dit[1]), Mesh(data=1, fsdp=2, tensor=2)
    run = dataclasses.replace(run, mesh=mesh, steps=2)
    loop.train(run, tmp_path / "run", devices=jax.devices()[:4])
    alone, cut = read_lines(whole[1] / "stages/1"), read_lines(tmp_path / "run")
    for name in ("loss", "teacher_loss"):
        np.testing.assert_allclose(values(cut, name), values(alone, name)[:2], rtol=1e-4)
    task = make_task(run)
    abstract = jax.eval_shape(lambda key: init_state(task, run, key), jax.random.key(0))
    layout = state_shardings(abstract, make_mesh(mesh, jax.devices()[:4]), task.sharded)
    kernel = layout.stats["teacher"]["blocks"]["attn"]["qkv"]["kernel"]
    assert kernel.spec == layout.params["blocks"]["mixer"]["qc_proj"]["kernel"].spec
    assert "tensor" in kernel.spec


def test_the_teacher_counts_as_one_pass(dit):
    task = make_task(
        dataclasses.replace(layers_of(dit[0], dit[1]), distill=Distill(teacher=str(dit[1])))
    )
    teacher = make_task(dit[0])
    assert task.frozen_flops() == pytest.approx(forward_flops(teacher, dit[0]), rel=1e-3)
    assert teacher.frozen_flops() == 0


def test_another_teacher_is_refused(whole, tmp_path):
    run, folder = whole
    copy = shutil.copytree(folder, tmp_path / "run")
    other = dataclasses.replace(run.stages[0], seed=1)
    shutil.rmtree(copy / "stages/0")
    save_teacher(other, copy / "stages/0", seed=1)
    longer = dataclasses.replace(run, stages=(other, run.stages[1]), steps=11)
    path = copy / "config.json"
    saved = json.loads(path.read_text())
    saved["stages"][0]["seed"] = 1
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="the teacher weights are not those that this run"):
        loop.train(longer, copy, **ONE)


def test_teacher_and_student_side_by_side(whole, capsys):
    run, folder = whole
    loaded = lintime.load(folder)
    path = distilled.sample_distilled(loaded, run.sample, seed=3)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said[:4]] == [
        "teacher (attention)", "pom in its place", "layer by layer, 12 updates",
        "end to end, 10 updates",
    ]  # fmt: skip
    losses = [float(line.rpartition(" ")[2]) for line in said[:4]]
    last = read_lines(folder)[-1]
    assert losses[0] == pytest.approx(last["val_teacher_loss"], rel=1e-3)
    assert losses[3] == pytest.approx(last["val_loss"], rel=1e-3)
    layers = read_lines(folder / "stages/1")[-1]
    assert losses[2] == pytest.approx(layers["val_loss"], rel=1e-3)
    with Image.open(path) as picture:
        assert picture.width > 2 * picture.height
    before = distilled.sample_distilled(loaded, run.sample, seed=3, out=io.StringIO())
    assert before == path  # the same command writes the same file


# ---------------------------------------------------------------- the command


def test_the_command_trains_both_stages(dit, tmp_path, capsys, monkeypatch):
    out, drawn = tmp_path / "out", []
    monkeypatch.setattr(finish, "draw", lambda *_: None)
    monkeypatch.setattr(distilled, "sample_distilled", lambda loaded, *_, **__: drawn.append(1))
    words = ["distill", str(dit[1]), "--out", str(out), "--layer-steps", "2", "--steps", "2"]
    words += ["net.degree=3", "optim.clip=0.5", "stages.0.optim.learning_rate=1e-3"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "teacher_loss" in said and f"distill {dit[1]} --mixer pom" in said
    run = read_config(out / "config.json")
    assert (run.net.mixer, run.net.degree, run.net.n_head) == ("pom", 3, 2)
    assert run.process == dit[0].process and run.data == dit[0].data
    assert run.distill == Distill(teacher=str(dit[1])) and run.init_from == "stage:0"
    stage = run.stages[0]
    assert stage.distill.layers and stage.init_from == str(dit[1]) and stage.net == run.net
    assert (stage.optim.clip, stage.optim.learning_rate) == (0.5, 1e-3)
    assert (out / "stages/0/metrics.jsonl").is_file()
    assert drawn == [1]
    again = distill_run(dit[1], layer_steps=2, steps=2, overrides=words[8:])
    assert again == run  # the same command goes on


@pytest.mark.parametrize("mixer", ["pom", "mamba2", "mamba1"])
@pytest.mark.parametrize("flow", [True, False])
def test_other_mixers_and_diffusion_take_the_same_way(flow, mixer, dit, images, tmp_path):
    teacher = dit[1] if flow else other((dit_run(images), None), tmp_path / "gaussian")
    run = distill_run(teacher, mixer=mixer, layer_steps=0, overrides=["precision.remat=full"])
    assert run.stages == () and run.init_from == str(teacher)
    task = make_task(run)
    batch = task.abstract_batch() | {"step": jax.ShapeDtypeStruct((), "int32")}
    weights = jax.eval_shape(task.init, jax.random.key(0))
    loss = lambda p, s, batch: task.loss(p, s, {}, batch, jax.random.key(0))[0]
    assert jax.eval_shape(loss, weights["params"], weights["stats"], batch).shape == ()


def other(dit, folder, *overrides):
    """Run directory of a DiT like the teacher, but for its config."""
    run = apply_overrides(dit[0], overrides)
    (folder / "checkpoints").mkdir(parents=True)
    save_config(run, folder / "config.json")
    return folder


@pytest.mark.parametrize(
    "words, message",
    [
        (["TMP/none"], "none is no run directory; name a trained DiT, or make a run of published"),
        (["DIT", "net.d_model=32"], "d_model=32 of the student is 16 in the teacher"),
        (["DIT", "process.path=gvp"], "was trained with process.path=linear"),
        (["DIT", "distill.layers=true", "distill.output_weight=2"], "would be ignored with"),
        (["DIT", "--layer-steps", "0", "stages.0.steps=1"], "no stage with --layer-steps 0"),
        (["DIT", "distill.block_weight=0", "distill.output_weight=0"], "nothing is learned"),
        (["DIT", "distill.denoise_weight=-1"], "distill.denoise_weight=-1.0 is out of range"),
        (["FLEXI"], "is a FlexiDiTConfig; only a DiT can be given another mixer"),
        (["POM", "net.degree=2"], "has these mixers already"),
    ],
)
def test_errors_of_the_command(words, message, dit, images, tmp_path, capsys):
    if "FLEXI" in words:
        (tmp_path / "FLEXI/checkpoints").mkdir(parents=True)
        save_config(flexible_run(images, flow=True), tmp_path / "FLEXI/config.json")
    if "POM" in words:
        other(dit, tmp_path / "POM", "net.mixer=pom")
    places = {"TMP/none": tmp_path / "none", "DIT": dit[1]}
    places |= {name: tmp_path / name for name in ("FLEXI", "POM")}
    words = [str(places.get(word, word)) for word in words]
    assert main(["distill", *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("distill.teacher=",), "distill.layers=True would be ignored: distill.teacher names none"),
        (("init_from=",), "set init_from to the teacher's run"),
        (("distill.teacher=nowhere",), "distill.teacher=nowhere is no run directory"),
        (("distill.teacher=stage:../2",), "is no run directory"),
    ],
)
def test_errors_of_a_run(overrides, message, dit, tmp_path):
    run = apply_overrides(layers_of(dit[0], dit[1]), overrides)
    with pytest.raises(UserError, match=message):
        validate(run)
        loop.train(run, tmp_path / "run", **ONE)


def test_errors_of_stages(dit, tmp_path):
    layers = layers_of(dit[0], "stage:../1")
    run = dataclasses.replace(
        layers, stages=(dit[0], layers), init_from="stage:1", distill=Distill(teacher="stage:0")
    )
    with pytest.raises(UserError, match=r"stages.1.init_from=stage:../1 is not before stage 1"):
        loop.train(run, tmp_path / "run", **ONE)
    wide = dataclasses.replace(dit[0], net=dataclasses.replace(dit[0].net, d_model=32))
    run = dataclasses.replace(run, stages=(wide, layers_of(dit[0], "stage:../0")))
    with pytest.raises(UserError, match=r"distill.teacher=stage:0: d_model=16 of the student"):
        loop.train(run, tmp_path / "run", **ONE)
    assert not (tmp_path / "run").exists()
