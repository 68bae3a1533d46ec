"""JiT by the command line's functions: trained, drawn from, converted in and out."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import lintime
from lintime.model.convert import jit as layout_of
from lintime.model.convert.names import flatten
from lintime.model.nets.jit import JiTConfig, jit_process
from lintime.model.processes.gaussian import GaussianDiffusion
from lintime.train import loop
from lintime.train.arrays import read_arrays
from lintime.train.config_files import load_config
from lintime.train.convert import jit as convert_jit
from lintime.train.convert.command import convert, export
from lintime.train.errors import UserError
from lintime.train.override import apply_overrides
from lintime.train.schema import DiffusionSample, Run
from lintime.train.tasks.table import make_task
from lintime.train.validate import validate
from tests.conversion import assert_same
from tests.tiny import quick, read_lines, refused, values
from tests.tiny_diffusion import DRAWN, KEPT, image_data
from tests.tiny_images import CLASSES, COMMON, SIZE, write_images

ONE = {"devices": jax.devices()[:1]}
NET = JiTConfig(
    input_size=SIZE, patch_size=4, bottleneck=6, d_model=16, n_layer=2, n_head=4, mlp_ratio=3.0,
    num_classes=CLASSES, context_tokens=2, context_start=1,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


def jit_run(images, *overrides: str) -> Run:
    sample = DiffusionSample(method="heun", guided_times=(0.1, 1.0), guidance=2.0, **DRAWN)
    run = Run(
        net=NET, process=jit_process(SIZE), data=image_data(images), sample=sample, steps=4,
        **COMMON | KEPT,
    )  # fmt: skip
    return apply_overrides(run, overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("jit")
    run = jit_run(write_images(folder / "noise.npz"), "steps=24", "eval.every=4", "ema.decay=0")
    validate(run)
    assert loop.train(run, folder / "run", **ONE).stopped is None
    return run, folder / "run"


# ---------------------------------------------------------------- training and sampling


def test_a_run_learns_and_draws(trained):
    run, folder = trained
    losses = values(read_lines(folder), "val_loss")
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
    loaded = lintime.load(folder)
    assert type(loaded.net.config) is JiTConfig
    draw = lambda **changes: loaded.generate([0, 3], seed=1, **changes)
    images = draw()
    assert images.shape == (2, SIZE, SIZE, 3) and images.dtype == np.uint8
    # When guidance acts is read: nowhere is without, everywhere is neither of both.
    np.testing.assert_array_equal(draw(guided_times=(0.98, 0.99)), draw(guidance=1.0))
    assert (draw(guided_times=(), guidance=9.0) != draw(guidance=9.0)).any()


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["net.patch_size=3"], "patch_size=3 does not divide|not divisible by net.patch_size=3"),
        (["net.d_model=18"], "net.d_model=18 is not divisible by 4"),
        (["net.n_head=2"], "divisible by 4"),
        (["net.context_start=2"], "set context_tokens=0"),
        (["net.bottleneck=0"], "net.bottleneck=0 is out of range"),
        (["data.size=16"], "set net.input_size=16"),
        (["sample.guided_times=0.5"], "it is \\(low, high\\)"),
        (["sample.guidance_interval=0,0.5"], "give one of them"),
        (["net.class_dropout=0"], "sample.guidance=2 needs a net"),
        (["sample.method=ddpm"], "ddpm"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, words, tmp_path):
    refused(words, lambda: validate(jit_run(tmp_path, *overrides)))


def test_other_processes_are_refused(tmp_path):
    run = dataclasses.replace(jit_run(tmp_path), process=GaussianDiffusion())
    refused("needs process=FlowMatching", validate, run)


def test_recipes_are_the_published_ones():
    for side in (256, 512):
        run, _ = load_config(f"jit/imagenet{side}")
        assert (run.net.tokens, run.net.patch_size) == (256, side // 16)
        assert run.process == jit_process(side) and run.data.size == side
        assert run.batch_size * run.steps // 1_281_167 == 599  # rounded down from 600 epochs


# ---------------------------------------------------------------- published checkpoints


def random_arrays(seed=0):
    shapes = make_task(jit_run("x")).abstract()["params"]
    rng = np.random.default_rng(seed)
    draw = lambda a: rng.standard_normal(a.shape).astype(np.float32)
    params = jax.tree.map(draw, shapes)
    return params, layout_of.jit_to_reference(params, NET)


def is_parameter(name):
    return not name.endswith(("_cos", "_sin"))


def test_a_training_checkpoint_becomes_a_run(tmp_path):
    """state_dict under a prefix, averages as lists by the order of the parameters, of which the
    first is taken; what belongs to the optimiser is left out."""
    torch = pytest.importorskip("torch")
    tensor = lambda a: torch.from_numpy(np.array(a))
    (_, flat), (params, first), (_, second) = map(random_arrays, range(3))
    constants = {n: a for n, a in flat.items() if not is_parameter(n) or n == "pos_embed"}
    list_of = lambda arrays: [tensor(a) for n, a in (arrays | constants).items() if is_parameter(n)]
    state = {f"denoiser.net.{n}": tensor(a) for n, a in flat.items()}
    rest = {
        "epoch": 3, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "callbacks": {"x": [1, 2]},
    }  # fmt: skip
    averages = {"ema_params2": list_of(second), "ema_params1": list_of(first)}
    torch.save({"state_dict": state, **rest, **averages}, tmp_path / "last.ckpt")
    torch.save({"state_dict": state, **rest}, tmp_path / "plain.ckpt")
    inside = {f"denoiser.{name}": arrays for name, arrays in averages.items()}
    torch.save({"state_dict": state | inside}, tmp_path / "inside.ckpt")
    for name, want in (("last", params), ("inside", params), ("plain", random_arrays()[0])):
        out = convert(tmp_path / f"{name}.ckpt", tmp_path / name, overrides=["net.context_start=1"])
        loaded = lintime.load(out)
        assert_same(flatten(jax.device_get(loaded.params)), flatten(want))
        assert loaded.config.net == NET and loaded.config.process == jit_process(SIZE)
        assert loaded.config.sample.guided_times == (0.1, 1.0)
    assert loaded.generate([1], steps=2).shape == (1, SIZE, SIZE, 3)


def test_a_run_becomes_a_file_and_a_run_again(trained, tmp_path):
    run, folder = trained
    layout, weights, said = export(folder, tmp_path / "out", file_format="safetensors")
    assert layout == "jit"
    back = lintime.load(convert(tmp_path / "out", tmp_path / "back"))
    assert back.config == run
    own = lintime.load(folder)
    assert_same(flatten(jax.device_get(back.params)), flatten(jax.device_get(own.params)))
    bare = read_arrays(weights)
    assert convert_jit.recognises(bare) and convert_jit.first_average(bare) == []
    # Without the config beside it, shapes tell all but where the context enters.
    run, _ = convert_jit.to_run(
        bare, layout=None, config=None, reference=None, source="f",
        overrides=["net.context_start=1", "net.class_dropout=0.2", "sample.steps=9"],
    )  # fmt: skip
    assert run.net == dataclasses.replace(NET, class_dropout=0.2) and run.sample.steps == 9


def test_what_a_checkpoint_does_not_tell():
    _, flat = random_arrays()
    to_run = lambda flat, **given: convert_jit.to_run(
        flat,
        **{"layout": None, "config": None, "reference": None, "overrides": [], "source": "f"}
        | given,
    )
    refused("do not tell net.context_start", to_run, flat)
    refused("no published hyperparameters", to_run, flat, reference={"dim": 16})
    refused("the config is of another net", to_run, flat, config=load_config("dit/quickstart")[0])
    config = jit_run("x")
    short = flat | {"ema_params1/0": np.zeros((1, 4, 16), np.float32)}
    refused("the average has 1 arrays", to_run, short, config=config)
    with pytest.raises(UserError, match="resolution"):
        to_run(flat, config=apply_overrides(config, ["net.input_size=16", "data.size=16"]))
