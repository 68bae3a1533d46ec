"""The golden runner: the shared vectors and the project's own pass, and wrong vectors fail."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from tests.golden.__main__ import main
from tests.golden.compare import Report, error_ratio
from tests.golden.manifest import Case, ManifestError, Tolerance, load_manifest
from tests.golden.runner import SYSTEMS, run_case

OWN = pathlib.Path(__file__).parent / "golden" / "own"
SHARED = pathlib.Path(os.environ.get("LINTIME_GOLDEN") or "/nonexistent")
# The longer cases of which the same family has another: the second jax is tried with that one.
ONE_JAX_IS_ENOUGH = {
    "aim": {"aim_single", "aim_group", "aim_mlp_optional"},
    "dit": {"forward_p4", "loss_kl", "loss_respaced_rescaled"},
    "flexidit": {"shared_init_2_4"},
    "transformer_vq": {
        *("model_shga_tied", "model_shga_untied_M8", "dense_equiv_agg_nograd"),
        *("dense_equiv_noagg", "opt_attn_vq_mqa", "opt_attn_vq_shga", "opt_model_vq_mqa"),
        *("opt_model_vq_shga", "trainstep_adamw"),
    },
}


def shared_cases():
    """(system, case) of the shared vectors; one stand-in, which skips, where there are none."""
    folders = [SHARED / system for system in SYSTEMS if (SHARED / system).is_dir()]
    cases = [(f.name, name) for f in folders for name in load_manifest(f).cases]
    once = {(system, name) for system, names in ONE_JAX_IS_ENOUGH.items() for name in names}
    mark = lambda case: pytest.param(*case, marks=pytest.mark.slow) if case in once else case
    return [mark(case) for case in cases] or [("none", "")]


@pytest.mark.parametrize("system, name", shared_cases())
def test_shared_vectors(golden_dir, system, name):
    outcome = run_case(load_manifest(golden_dir / system), name)
    assert outcome.passed, outcome.line


@pytest.mark.parametrize("name", load_manifest(OWN).cases)
def test_own_vectors(name):
    outcome = run_case(load_manifest(OWN), name)
    assert outcome.passed, outcome.line


def test_own_vectors_are_small():
    assert sum(path.stat().st_size for path in OWN.iterdir() if path.is_file()) < 120_000


# ---------------------------------------------------------------- wrong vectors

DATA_PIPELINE = {
    "config": {"sequence_len": 4, "batch_size": 2, "pad_id": 0, "eos_id": 1},
    "tolerance": {"note": "exact"},
    "data_file": "data.npz",
}


@pytest.fixture
def folder(tmp_path):
    """A folder with one cheap case that passes."""
    write(tmp_path, {"data_pipeline": DATA_PIPELINE})
    return tmp_path


def write(path, cases, system="Transformer-VQ", **arrays):
    content = {"system": system, "cases": cases}
    (path / "manifest.json").write_text(json.dumps(content))
    text = np.frombuffer(b"lin", np.uint8)
    np.savez(path / "data.npz", text_utf8=text, text_tokens=text.astype(np.int32) + 3, **arrays)


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out, error = capsys.readouterr()
    return code, out, error


def test_right_vectors_pass(folder, capsys):
    code, out, _ = run(capsys, folder)
    assert code == 0
    assert out.startswith("pass  data_pipeline")


def test_wrong_values_fail(folder, capsys):
    arrays = {"image": np.zeros((2, 2, 3), np.uint8), "image_tokens": np.full(12, 4, np.int32)}
    write(folder, {"data_pipeline": DATA_PIPELINE}, **arrays)
    code, out, _ = run(capsys, folder)
    assert code == 1
    assert "FAIL  data_pipeline" in out
    assert "image_tokens 12 of 12 differ" in out


@pytest.mark.parametrize(
    "array", ["attn_out", "grad_k", "shortcodes", "final_state/aggcache/lower"]
)
def test_a_corrupted_vector_fails(tmp_path, array):
    case = "dense_equiv_own_window"
    shutil.copytree(OWN, tmp_path, dirs_exist_ok=True)
    arrays = dict(np.load(tmp_path / f"{case}.npz"))
    arrays[array] = arrays[array].copy()
    arrays[array].flat[-1] += 1e-6 if arrays[array].dtype == np.float64 else 1
    np.savez(tmp_path / f"{case}.npz", **arrays)
    outcome = run_case(load_manifest(tmp_path), case)
    assert not outcome.passed
    assert {check.name.split()[0] for check in outcome.failures} >= {array}, outcome.line


def test_a_corrupted_gradient_of_a_fused_matrix_fails_under_its_own_name(tmp_path):
    case, array = "attn_own_nograd", "gradparam/kvg_proj/kernel"
    shutil.copytree(OWN, tmp_path, dirs_exist_ok=True)
    arrays = dict(np.load(tmp_path / f"{case}.npz"))
    arrays[array][0, -1] += 0.1
    np.savez(tmp_path / f"{case}.npz", **arrays)
    outcome = run_case(load_manifest(tmp_path), case)
    assert [check.name for check in outcome.failures] == [array]


def test_an_unknown_array_fails_unless_declared_informational(folder, capsys):
    write(folder, {"data_pipeline": DATA_PIPELINE}, surprise=np.zeros(3))
    code, out, _ = run(capsys, folder)
    assert code == 1
    assert "1 unknown arrays: surprise" in out
    declared = DATA_PIPELINE | {"informational": ["surprise"]}
    write(folder, {"data_pipeline": declared}, surprise=np.zeros(3))
    assert run(capsys, folder)[0] == 0


def test_a_listed_array_that_is_absent_fails(folder, capsys):
    write(folder, {"data_pipeline": DATA_PIPELINE | {"arrays": {"text_tokens": {}, "gone": {}}}})
    code, out, _ = run(capsys, folder)
    assert code == 1
    assert "gone" in out


def test_a_case_that_compares_nothing_fails(folder, capsys):
    np.savez(folder / "data.npz", doc0=np.zeros(3, np.int32))
    code, out, _ = run(capsys, folder)
    assert code == 1
    assert "nothing was compared" in out


def test_an_unknown_family_fails_and_the_others_still_run(folder, capsys):
    write(folder, {"surprise_a": DATA_PIPELINE, "data_pipeline": DATA_PIPELINE})
    code, out, _ = run(capsys, folder)
    assert code == 1
    assert "FAIL  surprise_a" in out and "unknown family" in out
    assert "pass  data_pipeline" in out


def test_a_missing_data_file_fails(folder, capsys):
    (folder / "data.npz").unlink()
    code, out, _ = run(capsys, folder)
    assert code == 1
    assert "data.npz is missing" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no manifest.json"),
        ("{", "is not JSON"),
        ("[]", "names no system"),
        ('{"system": "Transformer-VQ", "cases": 3}', "neither a dict nor a list"),
        ('{"system": "Transformer-VQ", "cases": []}', "has no cases"),
        ('{"system": "other", "cases": {"a": {}}}', "no adapter for the system 'other' yet"),
    ],
)
def test_an_unusable_folder_is_one_line(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    code, out, error = run(capsys, tmp_path)
    assert code == 2
    assert message in error and error.count("\n") == 1
    assert not out


def test_a_missing_folder_is_one_line(tmp_path, capsys):
    code, _, error = run(capsys, tmp_path / "none")
    assert code == 2
    assert "is not a folder" in error and error.count("\n") == 1


def test_list_and_case(folder, capsys):
    write(folder, {"data_pipeline": DATA_PIPELINE, "surprise": DATA_PIPELINE})
    assert run(capsys, folder, "--list")[:2] == (0, "data_pipeline\nsurprise\n")
    assert run(capsys, folder, "--case", "data_pipeline")[0] == 0
    assert run(capsys, folder, "--case", "gone")[0] == 2


# ---------------------------------------------------------------- manifests


@pytest.mark.parametrize(
    ("entry", "manifest", "expected"),
    [
        ({"tolerance": {"atol": 1.0, "rtol": 2.0}}, {}, (1.0, 2.0, 1.0, 2.0, False)),
        (
            {"tolerance": {"atol": 1.0, "rtol": 2.0, "grad_atol": 3.0, "grad_rtol": 4.0}},
            {},
            (1.0, 2.0, 3.0, 4.0, False),
        ),
        (
            {"tolerance": {"metric": "max|got-expected| / max|expected|", "float32_cpu": 1.0}},
            {},
            (0.0, 1.0, 0.0, 1.0, True),
        ),
        (
            {
                "tolerance": {
                    "metric": "absolute",
                    "float32_cpu": 1.0,
                    "float32_cpu_gradients": 2.0,
                }
            },
            {},
            (1.0, 0.0, 2.0, 0.0, False),
        ),
        (
            {"atol": 1.0, "rtol": 2.0},
            {"format": {"tolerance": "|a-b| <= atol + rtol*max|b|"}},
            (1.0, 2.0, 1.0, 2.0, True),
        ),
        ({"tolerance": {"note": "exact"}}, {}, (0.0, 0.0, 0.0, 0.0, False)),
        ({}, {"tolerance": {"atol": 1.0}}, (1.0, 0.0, 1.0, 0.0, False)),
    ],
)
def test_tolerances_in_all_variants(entry, manifest, expected):
    t = Tolerance.read(entry, manifest)
    assert (t.atol, t.rtol, t.grad_atol, t.grad_rtol, t.per_array) == expected


def test_a_tolerance_that_is_not_understood_is_an_error():
    for entry in ({}, {"tolerance": {"within": 1.0}}, {"tolerance": {"metric": "max"}}):
        with pytest.raises(ManifestError):
            Tolerance.read(entry, {})


def test_float32_tolerance_of_a_note():
    t = Tolerance.read({"tolerance": {"atol": 1e-9, "rtol": 1e-9, "note": "2e-5 in float32"}}, {})
    assert t.float64_level
    assert t.for_float32().rtol == 2e-5
    t = Tolerance.read({"tolerance": {"rtol": 1e-9, "note": "use rtol 1e-5 for float32 code"}}, {})
    assert t.for_float32().rtol == 1e-5
    assert Tolerance.read({"tolerance": {"rtol": 1e-9}}, {}).for_float32() is None


def test_a_jump_is_allowed_for_few_entries_only():
    tolerance = Tolerance(1e-6, 0.0, 1e-6, 0.0)
    expected = np.zeros(1000)
    case = Case("optimizer", {}, {"a": expected}, {}, tolerance, {})
    for wrong, size, passes in ((2, 0.1, True), (3, 0.1, False), (1, 0.2, False)):
        got = expected.copy()
        got[:wrong] = size
        report = Report(case)
        report.check("a", got, jump=0.1)
        assert (not report.checks[0].failed) is passes
        assert bool(report.notes) is passes


def test_error_ratio():
    t = Tolerance(atol=0.0, rtol=0.1, grad_atol=0.0, grad_rtol=0.2)
    ratio = lambda got, expected, t=t, **options: error_ratio(
        np.array(got), np.array(expected), t, **options
    )[0]
    assert ratio([1.05, 10.0], [1.0, 10.0]) == pytest.approx(0.5)
    assert ratio([1.05, 10.0], [1.0, 10.0], gradient=True) == pytest.approx(0.25)
    per_array = Tolerance(0.0, 0.1, 0.0, 0.1, per_array=True)
    assert ratio([1.05, 10.0], [1.0, 10.0], per_array) == pytest.approx(0.05)
    assert ratio([1], [2]) == np.inf
    assert ratio([1.0], [np.nan]) == np.inf
    assert ratio([np.nan], [1.0]) == np.inf
    assert ratio([np.inf], [1.0]) == np.inf
    assert ratio([1.0], [np.inf]) == np.inf
    assert ratio([np.inf], [np.inf]) == 0
    assert ratio([[1.0]], [1.0]) == np.inf


def test_cases_as_a_list_and_files_under_other_names(folder, capsys):
    entry = {k: v for k, v in DATA_PIPELINE.items() if k != "data_file"}
    write(folder, [entry | {"name": "data_pipeline", "files": ["data.npz"]}])
    assert run(capsys, folder)[0] == 0
    write(folder, [entry | {"name": "data_pipeline_b", "arrays_file": "data.npz"}])
    assert run(capsys, folder)[0] == 0
    (folder / "data.npz").rename(folder / "data_pipeline.npz")
    content = {"system": "transformer-vq", "cases": [entry | {"name": "data_pipeline"}]}
    (folder / "manifest.json").write_text(json.dumps(content))
    assert run(capsys, folder)[0] == 0
