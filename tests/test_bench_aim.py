"""`lintime bench aim`: checked before timed, floors by count, and what fails is a row."""

import dataclasses
import json

import pytest

from lintime.train.bench import aim as bench_aim, jobs as jobs_of_bench
from lintime.train.bench.aim import FORMS, SIZES, cache_bytes, floors, make_run, peak_bandwidth
from lintime.train.cli import main

pytestmark = pytest.mark.host

H200 = {"platform": "gpu", "kind": "NVIDIA H200", "count": 1, "memory": 150e9, "jax": "0.0.0"}


@pytest.fixture
def device(monkeypatch):
    """Instead of measuring: an H200 whose answers are `answer(job)`; collects the jobs."""
    jobs = []

    def install(answer=lambda job: {}):
        usual = {
            "device": H200,
            "copy": {"status": "ok", "copy": 4e12},
            "check": {"status": "ok", "error": 1e-6},
            "generate": {"status": "ok", "seconds": [1.0, 2.0, 3.0], "peak_bytes": 2**34},
            "train": {
                "status": "ok", "seconds": [0.2], "model_flops": 4e13, "mfu": 0.25,
                "peak_bytes": 2**34,
            },
        }  # fmt: skip

        def work(suite, job, isolate):
            jobs.append(job | {"isolate": isolate})
            return usual[job["kind"]] | answer(job)

        monkeypatch.setattr(jobs_of_bench, "work", work)
        monkeypatch.setattr(jobs_of_bench, "only_cpu", lambda: False)
        return jobs

    return install


def test_really_measured(tmp_path, capsys):
    words = ["bench", "aim", "--only", "dual", "--repeats", "1", "--out", str(tmp_path)]
    assert main(words) == 0
    report = json.loads((tmp_path / "aim.json").read_text())
    assert report["command"] == "lintime bench aim --only dual --repeats 1"
    assert report["checks"]["dual float32"]["error"] < 1e-5
    (point,) = report["points"]
    assert point["status"] == "ok" and point["seconds"][0] > 0 and point["floor"] > 0
    text = (tmp_path / "aim.md").read_text()
    assert text.strip() in capsys.readouterr().out and "| tiny | dual |" in text
    assert (tmp_path / "aim.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_agrees_with_teacher_forcing(form):
    result = bench_aim.check(FORMS[form], "float32", accelerator=False)
    assert result["error"] < 1e-5


@pytest.mark.slow
def test_training_steps():
    result = bench_aim.train(make_run(SIZES["tiny"], 4, "float32", "none"), 2, 1)
    assert len(result["seconds"]) == 2 and result["model_flops"] > 0 and result["loss"] > 0


def test_all_parts_one_of_them_out_of_memory(device, tmp_path):
    """In processes of their own; the other rows are there, and every size has its own."""
    form = lambda job: job.get("form", {}).get("mixer")
    failing = lambda job: job["kind"] == "generate" and form(job) == "attention"
    jobs = device(lambda job: {"status": "oom", "message": "no room"} if failing(job) else {})
    assert main(["bench", "aim", "--sizes", "b", "xl", "--out", str(tmp_path)]) == 0
    assert all(job["isolate"] for job in jobs)
    checked = [job for job in jobs if job["kind"] == "check"]
    assert [job["dtype"] for job in checked] == ["float32", "bfloat16"] * len(FORMS)
    report = json.loads((tmp_path / "aim.json").read_text())
    assert [p["part"] for p in report["points"]] == [*FORMS, "training"] * 2
    text = (tmp_path / "aim.md").read_text()
    assert text.count("oom no room") == 2 and "25.0%" in text and "200 | 25.0%" in text
    xl = next(p for p in report["points"] if p["size"] == "xl")
    row = next(line for line in text.splitlines() if "| xl   |         recurrent |" in line)
    assert "32.0 | 2.000 |    7.81 |" in row  # 64 images in the median of 1, 2 and 3 s
    assert f"{2 / xl['recurrent_floor']:.2f}" in row


def test_a_form_that_differs_is_not_timed(device, tmp_path, capsys):
    wrong = lambda job: job["kind"] == "check" and job["form"]["cache"] == "dual"
    jobs = device(lambda job: {"error": float("nan")} if wrong(job) else {})
    words = ["bench", "aim", "--only", "dual,recurrent", "--batch", "8", "--out", str(tmp_path)]
    assert main([*words, "--set", "net.n_layer=3", "precision.unroll=true"]) == 2
    timed = [job for job in jobs if job["kind"] == "generate"]
    assert [job["form"]["cache"] for job in timed] == ["recurrent"] and timed[0]["batch"] == 8
    assert timed[0]["run"]["net"]["n_layer"] == 3 and timed[0]["run"]["precision"]["unroll"]
    assert "dual float32, dual bfloat16: the sampler's logits differ" in capsys.readouterr().err
    assert "unchecked" in (tmp_path / "aim.md").read_text()


def test_what_fails_is_told():
    form = dataclasses.asdict(dataclasses.replace(FORMS["dual"], cache="triple"))
    job = {"kind": "check", "form": form, "dtype": "float32", "accelerator": False}
    result = bench_aim.work(job)
    assert result["status"] == "error" and "no cache 'triple'" in result["message"]


def test_floors_are_those_of_the_specification():
    """Seconds at batch 64 with guidance: weights in bfloat16 once a token, states read and
    written, or all past tokens read.
    """
    want = {"b": (0.20, 0.117), "l": (0.54, 0.316), "xl": (0.85, 0.50)}
    for size, seconds in want.items():
        for form, expected in zip(("recurrent", "dual"), seconds):
            found = floors(SIZES[size], FORMS[form], 128, "bfloat16", 3.35e12)["floor"]
            assert found == pytest.approx(expected, rel=0.06)
    weights = bench_aim.weight_bytes(SIZES["xl"], 2)
    assert weights == pytest.approx(1.46e9, rel=0.01)
    double = FORMS["recurrent-float32"]
    assert cache_bytes(SIZES["xl"], double, 1, 2) == 2 * 4 * 48 * 48 * 64 * 128
    assert floors(SIZES["tiny"], double, 4, "float32", None).keys() == {"bytes"}


def test_bandwidth_of_known_devices():
    kinds = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "TPU v5 lite", "cpu")
    assert [peak_bandwidth(kind) for kind in kinds] == [4.8e12, 3.35e12, 4e12, 0.819e12, None]


@pytest.mark.parametrize(
    "words, message",
    [
        ("aim --only triple", "--only triple: choose from generation, training, recurrent"),
        ("aim --sizes xxl", "--sizes xxl: choose from b, l, xl"),
        ("aim --batch 0", "--batch 0: expected a whole number above 0"),
        ("aim --ops ssd", "--ops does not apply to bench aim"),
        ("ssm --batch 2", "--batch does not apply to bench ssm"),
        ("--only dual", "--only does not apply to bench training"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(words, message, capsys):
    assert main(["bench", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
