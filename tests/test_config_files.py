"""Config files, saved configs, and checks of their values."""

import dataclasses
import json
import os

import pytest

from lintime.model.nets.transformer_vq import TransformerVQConfig
from lintime.train import config_files, validate as validation
from lintime.train.config_files import (
    check_continuation,
    from_json,
    list_configs,
    load_config,
    read_config,
    save_config,
    to_json,
)
from lintime.train.errors import UserError
from lintime.train.override import apply_overrides, leaves
from lintime.train.schema import Run
from lintime.train.validate import validate

pytestmark = pytest.mark.host

RUN = Run(net=TransformerVQConfig())
GOOD = '''
"""My own experiment."""
from lintime.model.nets.transformer_vq import TransformerVQConfig
from lintime.train.schema import Run

config = Run(net=TransformerVQConfig(d_model=64), steps=7)
'''


def fails(function, *args):
    """The message of the UserError that `function(*args)` must raise: one line."""
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path, text):
    path.write_text(text)
    return str(path)


# ---------------------------------------------------------------- files


def test_every_shipped_config_loads_and_is_valid():
    for name, summary in list_configs():
        run, loaded_name = load_config(name)
        assert loaded_name == name and summary
        validate(run)
        assert from_json(to_json(run)) == run
        by_path, path_name = load_config(str(config_files.CONFIGS / f"{name}.py"))
        assert (by_path, path_name) == (run, name)


def test_names_come_from_the_configs_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(config_files, "CONFIGS", tmp_path)
    (tmp_path / "vq").mkdir()
    (tmp_path / "vq" / "__init__.py").write_text('"""Not a config."""')
    (tmp_path / "vq" / "quickstart.py").write_text(GOOD)
    (tmp_path / "vq" / "enwik8.py").write_text('"""Table 3.\n\nMore."""\n')
    assert list_configs() == [("vq/enwik8", "Table 3."), ("vq/quickstart", "My own experiment.")]
    assert "unknown config 'quickstart'; did you mean vq/quickstart?" in fails(
        load_config, "quickstart"
    )
    assert "did you mean vq/enwik8?" in fails(load_config, "vq/enwik9")
    assert "lintime train --list" in fails(load_config, "zzzz")
    fails(load_config, "../train/cli")


def test_a_users_file_is_loaded_afresh(tmp_path):
    path = write(tmp_path / "mine.py", GOOD)
    run, name = load_config(path)
    assert (run.steps, run.net.d_model, name) == (7, 64, "mine")
    write(tmp_path / "mine.py", GOOD.replace("steps=7", "steps=8"))  # same size, same second
    assert load_config(path)[0].steps == 8
    assert os.listdir(tmp_path) == ["mine.py"]


def test_a_users_file_may_define_dataclasses(tmp_path):
    text = GOOD + "\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\n"
    assert load_config(write(tmp_path / "mine.py", "from __future__ import annotations" + text))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a = 1\nconfig = (", "mine.py, line 2: SyntaxError"),
        ("a = 1\n\n1 / 0\n", "mine.py, line 3: ZeroDivisionError: division by zero"),
        ("def f():\n    raise KeyError('x')\nf()\n", "mine.py, line 2: KeyError"),
        ("import nonexistent_module\n", "mine.py, line 1: ModuleNotFoundError"),
        (GOOD + "Run(net=None, stepz=3)\n", "line 7: TypeError"),
        ("raise SystemExit(3)\n", "mine.py, line 1: SystemExit"),
        ("a = 1\n", "must define `config = Run(...)`"),
        ("config = {}\n", "its `config` is a dict"),
    ],
)
def test_a_faulty_file_is_reported_with_file_and_line(tmp_path, text, message):
    assert message in fails(load_config, write(tmp_path / "mine.py", text))


def test_a_missing_file():
    assert "does not exist" in fails(load_config, "nowhere/mine.py")


# ---------------------------------------------------------------- saved configs


def test_saved_configs_round_trip(tmp_path):
    stage = apply_overrides(RUN, ["net.head_type=mha", "optim.eps=1e-9", "sample.prompt=é\n"])
    run = dataclasses.replace(RUN, stages=(stage, RUN), seed=5)
    save_config(run, tmp_path / "run" / "config.json")
    assert read_config(tmp_path / "run" / "config.json") == run
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["net"]["kind"] == "transformer_vq" and saved["steps"] == run.steps
    assert os.listdir(tmp_path / "run") == ["config.json"]


def changed(*path, value=None, delete=False):
    data = to_json(RUN)
    *parents, last = path
    part = data
    for parent in parents:
        part = part[parent]
    if delete:
        del part[last]
    else:
        part[last] = value
    return data


@pytest.mark.parametrize(
    "data, message",
    [
        (changed("optim", "momentum", value=1), "unknown field 'optim.momentum'"),
        (changed("net", "d_modl", value=1), "did you mean d_model?"),
        (changed("net", delete=True), "field 'net' is missing"),
        (changed("net", "kind", value="rnn"), "net: unknown kind 'rnn'; known kinds: aim, dih"),
        (changed("net", value=3), "net: unknown kind None"),
        (changed("optim", value=3), "optim: expected an object, got 3"),
        (changed("steps", value="many"), "steps: expected int, got 'many'"),
        (changed("net", "cache", value=1), "net.cache: expected bool, got 1"),
        ([], "expected an object"),
    ],
)
def test_saved_configs_of_other_versions_are_refused_by_field(data, message):
    error = fails(from_json, data)
    assert message in error
    if isinstance(data, dict):
        assert "written by lintime" in error


def test_damaged_or_missing_saved_configs(tmp_path):
    assert "does not exist" in fails(read_config, tmp_path / "config.json")
    assert "is damaged" in fails(read_config, write(tmp_path / "config.json", '{"steps": 1'))


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    save_config(RUN, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = fails(save_config, dataclasses.replace(RUN, seed=9), path)
    assert "no space left on device while writing" in message and str(path) in message
    assert read_config(path) == RUN and os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("override", ["steps=3", "mesh.fsdp=2", "log.every=1", "eval.batches=1",
                                      "checkpoint.keep=9", "sample.prompt=x"])  # fmt: skip
def test_a_run_may_be_continued_with(override):
    check_continuation(RUN, apply_overrides(RUN, [override]))
    stages = [
        dataclasses.replace(RUN, stages=(r,)) for r in (RUN, apply_overrides(RUN, [override]))
    ]
    check_continuation(*stages)


def test_other_changes_are_refused_by_name():
    other = apply_overrides(RUN, ["optim.learning_rate=1e-3", "net.d_k=64", "steps=5", "seed=1"])
    message = fails(check_continuation, RUN, other)
    for part in ("optim.learning_rate (0.0004 -> 0.001)", "net.d_k (128 -> 64)", "seed", "--fresh"):
        assert part in message
    assert "steps" not in message
    staged = [dataclasses.replace(RUN, stages=(r,)) for r in (RUN, other)]
    assert "stages.0.seed (0 -> 1)" in fails(check_continuation, *staged)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("steps=0", "steps=0 is out of range; it must be >= 1"),
        ("seed=-1", "seed=-1"),
        ("ema.decay=1", "ema.decay=1.0 is out of range; it must be in [0, 1)"),
        ("net.block_len=0", "net.block_len=0"),
        ("net.mem_len=-1", "net.mem_len=-1"),
        ("sample.top_p=0", "it must be in (0, 1]"),
        ("mesh.fsdp=0", "mesh.fsdp=0 is out of range; it must be >= 1, or -1"),
        ("mesh.fsdp=-1", "mesh.data and mesh.fsdp are -1"),
        ("optim.schedule=cosin", "of cosine, linear, sqrt, constant; did you mean cosine?"),
        ("precision.compute=float16", "did you mean bfloat16?"),
        ("net.head_type=mqaa", "did you mean mqa?"),
        ("data.update_len=300", "data.sequence_len=1024 is not divisible by data.update_len=300; "
         "set data.update_len=256"),
        ("batch_size=6 optim.accumulate=4", "set optim.accumulate=3"),
        ("net.head_type=mqa net.d_k=100", "net.d_model=768 is not divisible by net.d_k=100; "
         "set net.d_k=96"),
        ("net.n_head=5", "2 * net.d_model=1536 is not divisible by net.n_head=5"),
        ("net.d_model=63", "must be even"),
        ("net.vocab_size=256", "set net.vocab_size=259"),
        ("eval.samples=8", "eval.samples=8: only models of images by class draw some to judge"),
        ("eval.inception=x.pth", "eval.inception=x.pth judges images, this is a model of text"),
        ("eval.reference=x.npz", "eval.reference=x.npz judges images"),
    ],
)  # fmt: skip
def test_faulty_values_are_refused_with_the_fix(overrides, message):
    assert message in fails(validate, apply_overrides(RUN, overrides.split()))


def test_values_of_a_wrong_type_in_a_config_file_are_refused():
    assert "steps: expected int, got 1000.0" in fails(validate, dataclasses.replace(RUN, steps=1e3))
    net = dataclasses.replace(RUN.net, pe_lam=float("inf"))
    assert "net.pe_lam" in fails(validate, dataclasses.replace(RUN, net=net))
    assert "net: unknown kind 'NoneType'" in fails(validate, Run(net=None))


def test_good_values_and_stages():
    validate(RUN)
    validate(apply_overrides(RUN, ["data.update_len=256", "net.head_type=mha", "mesh.data=2"]))
    bad_stage = dataclasses.replace(RUN, stages=(dataclasses.replace(RUN, steps=0),))
    assert "steps=0" in fails(validate, bad_stage)


def test_every_checked_field_exists():
    runs = [load_config(name)[0] for name, _ in list_configs()]
    fields = {path for run in runs for path, _, _ in leaves(run)}
    checked = set(validation._CHOICES)
    checked |= {p for _, _, paths in validation._RANGES for p in paths.split()}
    assert checked <= fields
