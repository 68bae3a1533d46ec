"""Weights of a DiT at another resolution: positions are stretched or continued, never silently."""

import dataclasses

import numpy as np
import pytest

from lintime.model.convert import dit as layout_of
from lintime.model.layers.positions import sincos_positions
from lintime.model.nets.dit import position_table
from lintime.model.nets.flexidit import FlexiDiTConfig, mode_config
from lintime.train.checkpoint import save_inference
from lintime.train.config_files import save_config
from lintime.train.convert import dit as convert_dit
from lintime.train.errors import UserError
from lintime.train.resolution import check_resolution
from lintime.train.tasks.table import make_task
from lintime.train.validate import validate
from tests.tiny import assert_same
from tests.tiny_diffusion import dit_run
from tests.tiny_dit import make_config, random_params

BASE = make_config()  # 8x8 pixels, patches of 2
BOTH = "net.base_size=8 interpolates them .*, net.base_size=16 extrapolates them"


def columns(table, side, d=16):
    """sin of the lowest-numbered frequency, of the tokens in the first row."""
    return table.reshape(-1, side, side, d)[0, 0, :, 0]


def test_positions_of_a_larger_grid_lie_within_those_of_the_base():
    # eight tokens where there were four: centres of halves of the base's patches
    at = np.array([-0.25, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25])
    large = dataclasses.replace(BASE, input_size=16, base_size=8)
    np.testing.assert_allclose(columns(position_table(large), 8), np.sin(at), rtol=1e-12)
    whole = position_table(dataclasses.replace(large, base_size=0))
    np.testing.assert_array_equal(columns(whole, 8), np.sin(np.arange(8)))
    # patches of four, in units of the base's: as many as there were, where they were
    weak = mode_config(FlexiDiTConfig(base=large), 4)
    np.testing.assert_allclose(position_table(weak), position_table(BASE), atol=1e-12)
    small = dataclasses.replace(BASE, input_size=4, base_size=8)
    np.testing.assert_allclose(columns(position_table(small), 2), np.sin([0.5, 2.5]), rtol=1e-12)


def test_time_is_not_stretched():
    video = make_config(input_size=16, base_size=8, frames=4, patch_frames=2)
    wanted = sincos_positions(16, (2, 8, 8), scale=(1, 0.5, 0.5))
    np.testing.assert_array_equal(position_table(video), wanted)


@pytest.fixture(scope="module")
def flat():
    params = random_params(BASE)
    return {n: np.asarray(a) for n, a in layout_of.dit_to_reference(params, BASE).items()}


def convert(flat, *overrides, **options):
    options = {"layout": None, "config": None, "reference": None} | options
    overrides = ("net.n_head=2", *overrides)
    return convert_dit.to_run(flat, overrides=overrides, source="f", **options)


def test_a_published_file(flat, capsys):
    with pytest.raises(UserError, match=f"input_size=8 in a net of 16: {BOTH}; set one of these"):
        convert(flat, "net.input_size=16")
    for base in (8, 16):
        run, variables = convert(flat, "net.input_size=16", f"net.base_size={base}")
        assert (run.net.input_size, run.net.base_size) == (16, base)
        said = capsys.readouterr().out
        assert f"in a net of 16: net.base_size={base}, where net.base_size=8 inter" in said
        assert variables["params"]["x_embedder"]["kernel"].shape == (12, 16)
    convert(flat)
    assert capsys.readouterr().out == ""
    # What is written has the stretched table, and says so.
    run, variables = convert(flat, "net.input_size=16", "net.base_size=8")
    written = layout_of.dit_to_reference(variables["params"], run.net)
    np.testing.assert_array_equal(written["pos_embed"][0], np.float32(position_table(run.net)))
    again, same = convert(written, reference=layout_of.dit_fields(run.net))
    assert again.net == run.net
    assert_same(same["params"], variables["params"])
    with pytest.raises(UserError, match="other positions .net.base_size now 0"):
        convert(written)


def test_a_run(tmp_path, capsys):
    """init_from in one step, which says what it does."""
    small = dit_run("x")
    params = random_params(small.net)
    save_inference(tmp_path, {"params": params})
    save_config(small, tmp_path / "config.json")

    def start(*overrides):
        run = dit_run("x", *overrides)
        task = make_task(run)
        return task.start_from(str(tmp_path), task.abstract())["params"]

    assert_same(start(), params)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=BOTH):
        start("net.input_size=16")
    assert_same(start("net.input_size=16", "net.base_size=8"), params)
    said = capsys.readouterr().out
    assert said.startswith(f"init_from={tmp_path}: positions of a checkpoint of input_size=8")
    assert "net.base_size=8, where" in said
    with pytest.raises(UserError, match="net.base_size=-1"):
        validate(dit_run("x", "net.base_size=-1"))


def test_which_setting_does_what():
    net = lambda **sizes: dataclasses.replace(BASE, **sizes)
    assert check_resolution(net(), 8) == ""
    with pytest.raises(UserError, match="net.base_size=8 inter.*, net.base_size=4 crops them"):
        check_resolution(net(input_size=4), 8)
    assert check_resolution(net(input_size=16, base_size=8), 16, 8) == ""
    with pytest.raises(UserError, match="net.base_size=8 inter.*; set one"):
        check_resolution(net(input_size=16), 16, 8)
    with pytest.raises(UserError, match="net.base.base_size=8 interpolates"):
        check_resolution(FlexiDiTConfig(base=net(input_size=16)), 8)
