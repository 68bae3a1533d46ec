"""`lintime bench ssm`: checked before timed, one row per op and implementation."""

import json

import jax
import pytest

from lintime.train.bench import ssm as bench_ssm
from lintime.train.bench.ssm import Case, cases, floor_bytes
from lintime.train.cli import main


def test_table_json_and_picture(tmp_path, capsys):
    words = ["bench", "ssm", "--ops", "linear_scan", "causal_conv1d", "--steps", "1"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "ssm.json").read_text())
    assert report["command"] == "lintime bench ssm --ops linear_scan causal_conv1d --steps 1"
    assert [p["op"] for p in report["points"]] == ["linear_scan", "causal_conv1d"]
    for point in report["points"]:
        assert point["status"] == "ok" and point["forward"] > 0 < point["forward+backward"]
        assert max(point["error"].values()) < 1e-4
    text = (tmp_path / "ssm.md").read_text()
    assert text.strip() in capsys.readouterr().out and "linear_scan B2 L64 D32" in text
    assert (tmp_path / "ssm.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("op", bench_ssm.OPS)
def test_every_op_agrees_with_its_definition(op):
    case = next(case for case in cases([op], False, "float32"))
    error = bench_ssm.check(case.at_length(9), "xla")
    assert max(error.values()) < 1e-5


def test_a_wrong_implementation_is_not_timed(tmp_path, monkeypatch, capsys):
    make = bench_ssm.make_op

    def wrong(case, implementation):
        op = make(case, implementation)
        return op if implementation == "reference" else lambda inputs: 1.01 * op(inputs)

    monkeypatch.setattr(bench_ssm, "make_op", wrong)
    words = ["bench", "ssm", "--ops", "linear_scan", "--steps", "1", "--out", str(tmp_path)]
    assert main(words) == 2
    assert "linear_scan xla: the result differs" in capsys.readouterr().err
    point = json.loads((tmp_path / "ssm.json").read_text())["points"][0]
    assert point["status"] == "wrong" and "forward" not in point


@pytest.mark.parametrize(
    "words, message",
    [
        ("ssm --ops sort", "--ops sort: choose from"),
        ("ssm --lengths 64", "--lengths does not apply to bench ssm"),
        ("--ops ssd", "--ops does not apply to bench training"),
        ("ssm --ops ssd --variants pallas_xpu", "does not exist"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(words, message, capsys):
    assert main(["bench", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_floors_are_those_of_the_specification():
    """Bytes of the state-space roofline tables: 213 MB for one SSD forward pass, say."""
    forward, both = floor_bytes(Case("ssd", "B64 L256 H48 P64 N128", "bfloat16"))
    assert abs(forward / 1e6 - 213) < 5 and abs((both - forward) / 1e6 - 325) < 20
    forward, both = floor_bytes(Case("selective_scan", "B64 L256 D3072 N16", "bfloat16"))
    assert abs(forward / 1e6 - 404) < 5
    forward, _ = floor_bytes(Case("linear_scan", "B8 L4096 D2048", "float32"))
    assert forward == 3 * 4 * 8 * 4096 * 2048


def test_inputs_fit_the_named_shape():
    inputs = jax.eval_shape(
        lambda: bench_ssm.make_inputs(Case("ssd", "B1 L65536 H64 P64 N128", "bfloat16"))
    )
    assert inputs["x"].shape == (1, 65536, 64, 64) and inputs["B"].shape == (1, 65536, 1, 128)
