"""What the commands say and do with runs of images, beside the story of `test_aim_runs`."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lintime
from lintime.train import loop
from lintime.train.cli import main
from lintime.train.convert.command import convert, export
from lintime.train.errors import UserError
from lintime.train.finish import evaluate_run, finish, sample_run
from lintime.train.override import apply_overrides
from lintime.train.samples.pictures import to_uint8
from lintime.train.validate import validate
from tests.tiny import quick
from tests.tiny_images import SIZE, aim_run, tokenizer_run, write_images

pytestmark = pytest.mark.host

ONE = {"devices": jax.devices()[:1]}


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "noise.npz")


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    run, folder = aim_run(images), tmp_path_factory.mktemp("whole") / "run"
    loop.train(run, folder, **ONE)
    return run, folder


@pytest.mark.parametrize(
    "override, words",
    [
        ("stages.0.net.ch=48", r"^stages.0: net: ch=48 .* multiples of 32"),
        ("stages.0.net.ch_mult=", r"^stages.0: net: ch_mult=\(\)"),
        ("stages.0.batch_size=0", r"^stages.0: batch_size=0 is out of range"),
    ],
)
def test_faults_of_a_stage_say_in_which(override, words, images):
    with pytest.raises(UserError, match=words):
        validate(apply_overrides(aim_run(images), [override]))


def test_a_run_without_a_tokenizer_ends_well(whole, tmp_path, capsys):
    run, folder = whole
    alone = apply_overrides(run, [f"data.path={folder / 'codes'}", "data.tokenizer="])
    words = ["lintime", "train", "x.py", f"data.path={folder / 'codes'}"]
    finish(alone, loop.train(alone, tmp_path / "alone", **ONE), words)
    said = capsys.readouterr().out
    assert "no sample: data.tokenizer" in said and "resume" in said
    assert "data.path=FOLDER --run runs/mine" in said and "data.images.path" not in said
    assert not (tmp_path / "alone/samples").exists()


def test_settings_of_encoding_are_refused_where_nothing_is_encoded(whole):
    with pytest.raises(UserError, match="data.images.path says how codes are made"):
        evaluate_run(str(whole[1]), ["data.images.path=elsewhere"], "validation", None)


def test_psnr_is_said_once(whole, capsys):
    figures = evaluate_run(str(whole[1] / "stages/0"), [], "validation", None)
    assert capsys.readouterr().out.count("psnr") == 1 and figures["psnr"] > 0


def test_no_classes_and_no_tokenizer_are_one_line(whole, tmp_path, capsys):
    with pytest.raises(UserError, match="0 classes"):
        lintime.load(whole[1]).generate([])
    assert main(["sample", "--run", str(whole[1]), "data.tokenizer=nowhere"]) == 2
    assert "the tokenizer nowhere does not exist; name a run" in capsys.readouterr().err


def test_converted_weights_have_no_images_of_their_own(whole, images, tmp_path, capsys):
    export(whole[1], tmp_path / "hub", file_format="npz")
    tiny = convert(tmp_path / "hub", tmp_path / "aim")
    figures = evaluate_run(str(tiny), ["eval.samples=2"], "validation", None)
    assert figures == {"num_images": 0} and "no loss" in capsys.readouterr().out
    with pytest.raises(UserError, match="is not a folder of codes"):
        evaluate_run(str(tiny), [], "validation", None)

    where = [f"data.path={images}", f"data.size={SIZE}"]
    (path,) = sample_run(str(tiny / "stages/0"), where, None, None)
    assert path.is_file()
    with pytest.raises(UserError, match="--seed 0 would be ignored"):
        sample_run(str(tiny / "stages/0"), where, 0, None)
    with pytest.raises(UserError, match="data.path is part of the trained run"):
        sample_run(str(whole[1]), where[:1], 0, None)


def test_bytes_are_the_same_from_every_kind_of_array():
    x = np.linspace(-1.2, 1.2, 1001, dtype=np.float32)
    np.testing.assert_array_equal(to_uint8(jnp.asarray(x)), to_uint8(x))
    with pytest.raises(ValueError, match="int32"):
        to_uint8(jnp.arange(3))


def test_a_model_is_not_exported_with_another_tokenizer(whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole[1], folder)
    other = tokenizer_run(whole[0].data.images.path, "seed=5")
    shutil.rmtree(folder / "stages/0")
    loop.train(other, folder / "stages/0", **ONE)
    with pytest.raises(UserError, match="is not the tokenizer whose codes"):
        export(folder, tmp_path / "hub", file_format="npz")
