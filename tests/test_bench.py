"""The benchmark checks before it times, shows what happened, and survives what a device may do."""

import json
import subprocess
import sys

import numpy as np
import pytest

from lintime.kernels_pallas import vq_attention as vq
from lintime.train.bench import (
    attention as bench,
    attention_measure as bench_measure,
    jobs as jobs_of_bench,
    timing,
)
from lintime.train.cli import main
from lintime.train.errors import UserError

pytestmark = pytest.mark.host

H200 = {"platform": "gpu", "kind": "NVIDIA H200", "count": 1, "memory": 150e9, "jax": "0.0.0"}
POINT = {
    "status": "ok", "tokens": 65536, "seconds": [0.25], "median_ms": 250.0,
    "tokens_per_s": 262144.0, "model_flops": 1e12, "mfu": 0.25, "compile_s": 9.0,
    "peak_bytes": 3 * 2**30, "compiled_bytes": 2 * 2**30, "temp_bytes": 2**30, "loss": 5.0,
}  # fmt: skip
PASS = {"ok": True, "errors": {"op float32": [1e-7, 2e-7, "k"]}}
FAIL = {"ok": False, "errors": {"op float32": [1e-7, 0.3, "k"]}}


@pytest.fixture
def device(monkeypatch):
    """Instead of measuring: an H200 whose answers are `answer(job)`; collects the jobs."""
    jobs = []

    def install(answer=lambda job: {}):
        def work(suite, job, isolate):
            jobs.append(job | {"isolate": isolate})
            if job["kind"] == "device":
                return H200
            if job["kind"] == "check":
                return dict.fromkeys(job["runs"], PASS) | answer(job)
            return POINT | answer(job)

        monkeypatch.setattr(jobs_of_bench, "work", work)
        monkeypatch.setattr(jobs_of_bench, "only_cpu", lambda: False)
        return jobs

    return install


def read(out):
    return json.loads((out / "bench.json").read_text()), (out / "bench.md").read_text()


# ---------------------------------------------------------------- really measured, on this machine


@pytest.mark.slow
def test_whole_run_refuses_to_time_a_variant_that_is_wrong(tmp_path, monkeypatch, capsys):
    correct = vq.IMPLEMENTATIONS["xla"]

    def wrong(*args, **kwargs):
        out, state = correct(*args, **kwargs)
        return (out * 1.001 if kwargs["reduction"] == "matmul" else out), state

    monkeypatch.setitem(vq.IMPLEMENTATIONS, "xla", wrong)
    monkeypatch.setattr(bench_measure, "_op_value", bench_measure._op_value.__wrapped__)
    command = ["--variants", "flash", "vq-scan", "vq-matmul", "--lengths", "32", "--steps", "2"]
    assert main(["bench", *command, "--tokens", "64", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("lintime: vq-matmul: the result differs")
    assert "Traceback" not in printed.err

    report, text = read(tmp_path)
    assert text.strip() == printed.out.strip()
    points = {p["variant"]: p for p in report["points"]}
    assert points["vq-matmul"] == {
        "variant": "vq-matmul", "length": 32, "rows": 2, "status": "unchecked"
    }  # fmt: skip
    assert report["checks"]["vq-matmul"]["errors"]["op float32"][0] == pytest.approx(1e-3, rel=0.01)
    rows = [line for line in text.splitlines() if line.startswith("| vq-matmul")]
    (row,) = (line for line in rows if " 32 |" in line)
    assert "check failed" in row and set(row.split("check failed")[1]) <= set("|- ")
    for name in ("dense-flash", "vq-associative"):
        point = points[name]
        assert point["status"] == "ok" and len(point["seconds"]) == 2
        assert point["tokens_per_s"] == pytest.approx(64e3 / point["median_ms"])
        assert 4 < point["loss"] < 9 and point["compiled_bytes"] > point["temp_bytes"] > 0
        assert all(e[0] < 1e-4 and e[1] < 1e-3 for e in report["checks"][name]["errors"].values())
        assert f"{point['tokens_per_s']:,.0f}" in text
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_parts_of_the_op(tmp_path, capsys):
    command = "--op --variants vq-serial --lengths 40 --steps 1 --warmup 1".split()
    assert main(["bench", *command, "--out", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (point,) = report["points"]
    assert list(point["parts"]) == [
        "quantize", "codebook_statistics", "block_summaries", "cache_prefix", "attention",
        "sublayer",
    ]  # fmt: skip
    for name, times in point["parts"].items():
        assert set(times) == ({"forward"} if name == "codebook_statistics" else {"forward", "both"})
        assert all(ms > 0 for ms in times.values())
    assert "sublayer" in (tmp_path / "op.md").read_text()


def test_children_need_no_data_reader():
    code = (
        "import sys; sys.modules['grain'] = None; import lintime.train.bench.attention_measure\n"
        "from lintime.train.bench import jobs; print(jobs.work('aim', {'kind': 'device'}, True))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "'platform': 'cpu'" in child.stdout


def test_batches_are_fresh_and_random():
    run = bench.configure(bench.base_run(False, "shga"), "vq-serial", 64, 512)
    a, b = bench_measure.make_batch(run, 0), bench_measure.make_batch(run, 1)
    assert a["inputs"].shape == (8, 64) and not np.array_equal(a["inputs"], b["inputs"])
    np.testing.assert_array_equal(a["inputs"][:, 1:], a["targets"][:, :-1])
    assert a["inputs"].min() >= 3 and a["inputs"].max() < 259
    assert len(np.unique(a["inputs"])) > 100


def test_errors_are_relative_and_name_the_leaf():
    exact = {"a": np.full(4, 2.0), "b": {"c": np.zeros(3)}}
    wrong = {"a": np.full(4, 2.0), "b": {"c": np.full(3, 0.4)}}
    assert bench_measure._worst(exact, exact) == (0.0, "")
    error, where = bench_measure._worst(wrong, exact)
    assert where == "b/c" and error == pytest.approx(0.4 * 3**0.5 / 4)
    assert timing.relative_error(np.array([np.nan]), np.ones(1)) == float("inf")
    assert bench_measure._worst({"a": np.array([np.nan])}, {"a": np.ones(1)}) == (float("inf"), "a")


# ---------------------------------------------------------------- orchestration and report


def test_defaults_on_an_accelerator_are_the_throughput_configuration(device, tmp_path, capsys):
    jobs = device()
    assert main(["bench", "--out", str(tmp_path)]) == 0
    report, text = read(tmp_path)
    net, run = report["config"]["net"], report["config"]
    sizes = ("n_layer", "d_model", "d_k", "n_code", "block_len", "mem_len", "head_type")
    assert [net[k] for k in sizes] == [12, 768, 128, 512, 512, 512, "shga"]
    assert run["precision"] == {"compute": "bfloat16", "remat": "full", "unroll": False}
    steps = [j for j in jobs if j["kind"] == "steps"]
    assert all(j["isolate"] and j["alone"] for j in steps) and len(steps) == 12
    shapes = {(j["run"]["batch_size"], j["run"]["data"]["sequence_len"]) for j in steps}
    assert shapes == {(32, 2048), (8, 8192), (2, 32768)}
    kinds = [(j["run"]["net"]["attention"], j["run"]["net"]["reduction"]) for j in steps[::3]]
    assert kinds[0][0] == "flash"
    assert kinds[1:] == [("vq", "serial"), ("vq", "associative"), ("vq", "matmul")]
    head = text.splitlines()[0]
    assert head.startswith("NVIDIA H200, jax 0.0.0, Python 3.") and "`lintime bench`" in head
    assert "12 layers, d_model 768" in text and "65,536 tokens a step" in text
    assert "262,144 | 25.0% |     3.00 |         2.00" in text
    assert "original" not in text and "unfused" not in text


def test_a_long_sequence_is_one_row():
    run = bench.configure(bench.base_run(True, "mha"), "dense", 131072, 65536)
    assert (run.batch_size, run.data.sequence_len) == (1, 131072)


def test_out_of_memory_and_errors_cost_one_cell(device, tmp_path, capsys):
    def answer(job):
        long = job["kind"] == "steps" and job["run"]["data"]["sequence_len"] == 8192
        flash = long and job["run"]["net"]["attention"] == "flash"
        return ({"status": "oom" if flash else "error", "message": "why"}) if long else {}

    device(answer)
    command = ["--lengths", "2048,8192", "--variants", "dense-flash", "vq-matmul"]
    assert main(["bench", *command, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| dense-flash        | 262,144 |   OOM |" in text
    assert "| vq-matmul          | 262,144 | error |" in text


def test_a_failed_check_is_never_timed(device, tmp_path, capsys):
    jobs = device(lambda job: {"vq-serial": FAIL} if job["kind"] == "check" else {})
    assert main(["bench", "--lengths", "2048", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("lintime: vq-serial: the result differs")
    timed = [j["run"]["net"]["reduction"] for j in jobs if j["kind"] == "steps"]
    assert timed.count("serial") == 0 and len(timed) == 3
    assert "check failed" in printed.out and "FAIL |" in printed.out


def test_figures_of_the_original_only_where_they_are_comparable(device, tmp_path, capsys):
    device()
    assert main(["bench", "--original", "--head", "mha", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    row = (
        "| dense (original JAX code, one H200, measured before this project) | 223,000 |  73,000 |"
    )
    assert row in text
    smaller = ["--set", "net.n_layer=6"]
    assert main(["bench", "--original", *smaller, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "original JAX" not in printed.out and "left out" in printed.err


def test_the_command_shown_gives_the_same_arguments(device, tmp_path, capsys):
    device()
    words = (
        "--lengths 4096 --variants vq-scan --head mqa --remat dots --steps 3 --no-isolate".split()
    )
    words += ["--set", "optim.clip=1.0", "net.n_layer=2"]
    assert main(["bench", *words, "--out", str(tmp_path)]) == 0
    report, text = read(tmp_path)
    again = report["command"].split()[1:]
    assert main([*again, "--out", str(tmp_path / "again")]) == 0
    assert read(tmp_path / "again")[0]["config"] == report["config"]
    assert report["config"]["net"]["n_layer"] == 2 and "remat dots" in text


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lengths 12x", "--lengths 12x: expected a whole number"),
        ("--lengths 0", "--lengths 0: expected a whole number above 0"),
        ("--steps -1", "--steps -1: expected"),
        ("--tokens many", "--tokens many: expected"),
        ("--variants vq-parallel", "--variants vq-parallel: choose from dense-flash, vq-serial"),
        ("--head gqa", "--head gqa: choose shga, mqa or mha"),
        ("--remat some", "--remat some: choose none, full or dots"),
        ("--devices 9", "--devices 9: this machine has 1"),
        ("--set net.n_layr=2", "unknown field 'net.n_layr'; did you mean net.n_layer?"),
        ("--set net.n_layer=two", "net.n_layer: expected int, got 'two'"),
        ("--set net.attention=dense", "--set net.attention: use --variants instead"),
        ("--set net.n_code=0", "net.n_code=0 is out of range"),
    ],
)
def test_arguments_that_make_no_sense(device, words, message, capsys):
    device()
    assert main(["bench", *words.split()]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"lintime: {message}")


@pytest.mark.parametrize(
    "status, stderr, expected",
    [
        (-9, "", "oom"),
        (1, "... RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\n", "oom"),
        (-11, "segmentation fault\n", "error"),
        (0, "no answer", "error"),
    ],
)
def test_a_dead_child_is_one_cell(monkeypatch, status, stderr, expected):
    dead = subprocess.CompletedProcess([], status, "", stderr)
    monkeypatch.setattr(jobs_of_bench.subprocess, "run", lambda *a, **k: dead)
    assert jobs_of_bench.work("attention", {"kind": "steps"}, True)["status"] == expected
    with pytest.raises(UserError, match="the process of the device step failed"):
        jobs_of_bench.work("attention", {"kind": "device"}, True)


def test_errors_of_the_user_cross_the_process_border(monkeypatch):
    answer = subprocess.CompletedProcess([], 0, 'noise\n{"user_error": "change a size"}\n', "")
    monkeypatch.setattr(jobs_of_bench.subprocess, "run", lambda *a, **k: answer)
    with pytest.raises(UserError, match="change a size"):
        jobs_of_bench.work("attention", {"kind": "steps"}, True)
