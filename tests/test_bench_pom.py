"""`lintime bench pom`: checked before timed; op and layer by length, models by pixels."""

import json

import pytest

from lintime.train.bench import pom as bench_pom
from lintime.train.bench.pom import Case, floor_bytes, floor_flops
from lintime.train.cli import main

SIZES = dict(batch=4, length=8192, width=1024, heads=16, dtype="bfloat16")


def test_tables_json_and_picture(tmp_path, capsys):
    words = "bench pom --only op layer model --steps 1 --sizes 64 --tokens 16".split()
    assert main([*words, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "pom.json").read_text())
    assert [p["name"] for p in report["points"]] == ["xla k2", "xla k2"] + 2 * [
        "xla k2", "attention",
    ]  # fmt: skip
    assert [m["mixer"] for m in report["models"]] == ["attention", "pom"]
    for point in report["points"]:
        assert point["status"] == "ok" and point["forward"] > 0 < point["forward+backward"]
        assert max(point["error"].values()) < 1e-4
    assert all(m["status"] == "ok" and m["tokens"] == 16 for m in report["models"])
    text = (tmp_path / "pom.md").read_text()
    assert text.strip() in capsys.readouterr().out and "layer, causal, B2 d32" in text
    assert (tmp_path / "pom.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_implementation_is_not_timed(tmp_path, monkeypatch, capsys):
    make = bench_pom.make_function

    def wrong(case):
        function = make(case)
        return function if case.by == "reference" else lambda inputs: 1.01 * function(inputs)

    monkeypatch.setattr(bench_pom, "make_function", wrong)
    bench_pom._checked.cache_clear()
    words = "bench pom --only op --masks none --steps 1".split()
    assert main([*words, "--out", str(tmp_path)]) == 2
    bench_pom._checked.cache_clear()
    assert "op none xla k2: the result differs" in capsys.readouterr().err
    point = json.loads((tmp_path / "pom.json").read_text())["points"][0]
    assert point["status"] == "wrong" and "forward" not in point


@pytest.mark.parametrize(
    "words, message",
    [
        ("pom --only ops", "--only ops: choose from op, layer, model"),
        ("pom --masks both", "--masks both: choose from none, causal"),
        ("pom --batch 3", "--batch does not apply to bench pom"),
        ("ssm --degrees 3", "--degrees does not apply to bench ssm"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(words, message, capsys):
    assert main(["bench", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_floors_are_those_of_the_specification():
    """Bytes an element of h, and FLOPs a token: 4.26 M with the rank-H output, 8.42 M without."""
    op = Case(part="op", mask="none", by="xla", degree=2, **SIZES)
    elements = 4 * 8192 * 2048
    assert floor_bytes(op) == (2 * elements, 6 * elements)
    causal = Case(part="op", mask="causal", by="xla", degree=2, **SIZES)
    assert floor_bytes(causal) == (4 * elements, 10 * elements)
    flops = lambda mask, by: floor_flops(
        Case(part="layer", mask=mask, by=by, degree=2, **SIZES)
    ) / (4 * 8192)  # fmt: skip
    assert abs(flops("none", "xla") - 4.26e6) < 1e4
    assert abs(flops("causal", "xla") - 8.42e6) < 1e4
    assert abs(flops("none", "attention") - 8.39e6 - 4096 * 8192) < 1e4
