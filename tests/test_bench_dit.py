"""`lintime bench dit`: checked before timed, operations by count, and what fails is a row."""

import json

import jax
import numpy as np
import pytest

from lintime.model.nets.dit import DiTConfig
from lintime.train.bench import dit as bench_dit, jobs as jobs_of_bench
from lintime.train.bench.dit import SIZES, flexible_config, make_run, schedules, step_by_step
from lintime.train.cli import main

pytestmark = pytest.mark.host

H200 = {"platform": "gpu", "kind": "NVIDIA H200", "count": 1, "memory": 150e9, "jax": "0.0.0"}
PEAK = {"peak_bytes": 2**35, "peak_flops": 989e12}


@pytest.fixture
def device(monkeypatch):
    """Instead of measuring: an H200 whose answers are `answer(job)`; collects the jobs."""
    jobs = []

    def install(answer=lambda job: {}):
        timed = lambda *seconds: {"seconds": list(seconds), "compile_s": 1.0}
        usual = {
            "device": H200,
            "check": {
                "status": "ok", "errors": {"sampling": 1e-6, "flexible": 1e-6, "powerful": 0.0},
            },
            "training": {
                "status": "ok", "seconds": [0.4], "model_flops": 1.8e14, "mfu": 0.455,
                "peak_bytes": 2**36,
            },
            "sampling": {"status": "ok"} | timed(1.0, 2.0, 4.0) | PEAK,
            "flexible": {
                "status": "ok",
                "schedules": {"full": timed(2.0), "60%": timed(1.3), "40%": timed(0.9)},
            } | PEAK,
        }  # fmt: skip

        def work(suite, job, isolate):
            jobs.append(job | {"isolate": isolate})
            return usual[job["kind"]] | answer(job)

        monkeypatch.setattr(jobs_of_bench, "work", work)
        monkeypatch.setattr(jobs_of_bench, "only_cpu", lambda: False)
        return jobs

    return install


def test_really_measured(tmp_path, capsys):
    words = ["bench", "dit", "--only", "training,flexible", "--repeats", "1", "--steps", "2"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "dit.json").read_text())
    assert report["command"] == "lintime bench dit --steps 2 --only training,flexible --repeats 1"
    assert report["checks"]["sampling float32"]["error"] < 1e-5
    assert report["checks"]["flexible float32"]["error"] < 1e-5
    assert report["checks"]["powerful float32"]["error"] < 1e-6
    training, *flexible = report["points"]
    assert len(training["seconds"]) == 2 and training["model_flops"] > 0
    assert [p["schedule"] for p in flexible] == ["full", "60%", "40%"]
    assert all(p["seconds"][0] > 0 for p in flexible)
    assert 1 == flexible[0]["flops_ratio"] > flexible[1]["flops_ratio"] > flexible[2]["flops_ratio"]
    text = (tmp_path / "dit.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert (tmp_path / "dit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_sampler():
    result = bench_dit.sample(make_run(SIZES["tiny"], 4, "float32", "none"), 3, 2, 2)
    assert len(result["seconds"]) == 2 and result["peak_flops"] is None


def test_all_parts_one_of_them_out_of_memory(device, tmp_path):
    """In processes of their own; ratios and floors by count."""
    failing = lambda job: job["kind"] == "training" and job["run"]["net"]["n_layer"] == 24
    jobs = device(lambda job: {"status": "oom", "message": "no room"} if failing(job) else {})
    assert main(["bench", "dit", "--sizes", "l", "xl", "--out", str(tmp_path)]) == 0
    assert all(job["isolate"] for job in jobs)
    assert [job["dtype"] for job in jobs if job["kind"] == "check"] == ["float32", "bfloat16"]
    assert {job["run"]["batch_size"] for job in jobs if "run" in job} == {256}
    report = json.loads((tmp_path / "dit.json").read_text())
    parts = ["training", "sampling", "flexible", "flexible", "flexible"]
    assert [p["part"] for p in report["points"]] == parts * 2
    text = (tmp_path / "dit.md").read_text()
    assert "oom no room" in text and "640.0 |   400.0 |     450 | 45.5%" in text
    # Published: 118.6 Gflops a prediction; two predictions, 50 steps; 32 images in 2 s.
    full = next(p for p in report["points"] if p["size"] == "xl" and p["part"] == "sampling")
    assert full["macs"] == pytest.approx(100 * 118.6e9, rel=1e-3)
    assert full["peak_s"] == pytest.approx(2 * 32 * 100 * 118.6e9 / 989e12, rel=1e-3)
    assert "16.00 | 2.000 | 11,862 |     380 |     0.768 |   2.61" in text
    weak = [p for p in report["points"] if p["size"] == "xl" and p.get("schedule") == "40%"]
    assert weak[0]["time_ratio"] == 0.45 and weak[0]["flops_ratio"] == pytest.approx(0.4, abs=0.01)


def test_a_sampler_that_differs_is_not_timed(device, tmp_path, capsys):
    def answer(job):
        if job["kind"] != "check" or job["dtype"] != "bfloat16":
            return {}
        return {"errors": {"sampling": 1e-3, "flexible": float("nan"), "powerful": 1e-3}}

    jobs = device(answer)
    words = ["bench", "dit", "--batch", "128", "--out", str(tmp_path)]
    assert main([*words, "--set", "net.n_layer=3", "precision.unroll=true"]) == 2
    timed = [job for job in jobs if "run" in job]
    assert [job["kind"] for job in timed] == ["training"]
    run = timed[0]["run"]
    assert run["net"]["n_layer"] == 3 and run["precision"]["unroll"] and run["batch_size"] == 128
    error = capsys.readouterr().err
    assert "flexible bfloat16, powerful bfloat16: the sampler differs" in error
    assert "unchecked" in (tmp_path / "dit.md").read_text()


def test_what_fails_is_told():
    run = bench_dit.to_json(make_run(SIZES["tiny"], 2, "float32", "none"))
    job = {"kind": "sampling", "run": run, "steps": 2000, "images": 2, "repeats": 1}
    result = bench_dit.work(job)
    assert result["status"] == "error" and "2000" in result["message"]


def test_schedules_meet_their_budgets():
    for size in ("b", "l", "xl"):
        config = flexible_config(SIZES[size])
        found = schedules(config, 50)
        assert [sum(s.steps for s in segments) for segments in found.values()] == [50] * 3
        assert {s.mode for s in found["full"]} == {2}
        assert [s.mode for s in found["40%"]] == [4, 2]  # weak steps first
        assert all(s.guide == "null" for segments in found.values() for s in segments)


def test_the_reference_denoises():
    """A net that knows the noise of one image: the loop goes to that image."""
    image = np.random.default_rng(0).standard_normal((2, 2, 2, 4))
    alpha = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))

    def denoise(variables, x, t, labels, mode):
        at = alpha[t][:, None, None, None]
        return (x - np.sqrt(at) * image) / np.sqrt(1 - at)

    start = np.random.default_rng(1).standard_normal(image.shape)
    found = step_by_step(denoise, None, start, np.asarray([0, 1]), 8, [2] * 4)
    np.testing.assert_allclose(found, image, atol=1e-5)


def test_random_latents_are_as_the_net_wants_them(monkeypatch):
    seen = {}
    monkeypatch.setattr(bench_dit, "time_updates", lambda run, draw, *_: seen.update(draw=draw))
    bench_dit.train(make_run(DiTConfig(), 3, "bfloat16", "none"), 1)
    batch = seen["draw"](np.random.default_rng(0))
    assert jax.tree.map(np.shape, batch) == {"images": (3, 32, 32, 4), "labels": (3,)}


@pytest.mark.parametrize(
    "words, message",
    [
        ("dit --only triple", "--only triple: choose from training, sampling, flexible"),
        ("dit --sizes xxl", "--sizes xxl: choose from b, l, xl"),
        ("dit --ops ssd", "--ops does not apply to bench dit"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(words, message, capsys):
    assert main(["bench", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
