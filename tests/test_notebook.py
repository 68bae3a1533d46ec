"""The notebooks run from top to bottom, and are kept without outputs."""

import ast
import os
import pathlib
import re

import pytest

from tests.tiny import xla_flags

nbformat = pytest.importorskip("nbformat", reason="needs the notebook extra")
nbclient = pytest.importorskip("nbclient", reason="needs the notebook extra")

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def test_there_are_notebooks():
    assert [p.name for p in NOTEBOOKS] == [
        "aim.ipynb", "flexidit.ipynb", "pom.ipynb", "transformer_vq.ipynb",
    ]  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_stripped(path):
    for cell in code_cells(read(path)):
        assert not cell.outputs and cell.execution_count is None, "clear the outputs first"


def test_from_load_to_sample_takes_under_ten_lines():
    cells = [c.source for c in code_cells(read(FOLDER / "transformer_vq.ipynb"))]
    loads = next(i for i, source in enumerate(cells) if "lintime.load(" in source)
    assert ".generate(" in cells[loads]
    for source in cells[loads : loads + 2]:  # the short way, and the jitted sampler
        assert len(ast.parse(source).body) < 10 and len(source.splitlines()) < 12


def execute(name, tmp_path, smaller):
    """Run a notebook on a run of its own making: outputs of its cells, and what they printed.

    `smaller` overrides are added to those that the notebook itself trains with.
    """
    notebook = read(FOLDER / f"{name}.ipynb")
    first = code_cells(notebook)[0]
    changed = re.sub(r'(?m)^( +small = ".*)"$', rf'\1 {smaller}"', first.source)
    assert changed != first.source
    first.source = changed
    env = os.environ.copy()
    env.update(
        LINTIME_RUN=str(tmp_path / "run"),
        MPLBACKEND="module://matplotlib_inline.backend_inline",
        XLA_FLAGS=xla_flags(1),
    )
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=env)
    outputs = [out for cell in code_cells(notebook) for out in cell.outputs]
    return outputs, "".join(out.get("text", "") for out in outputs)


@pytest.mark.notebook
@pytest.mark.slow
def test_transformer_vq(tmp_path):
    """Where there is no run, the notebook trains a small one; everything else then works on it."""
    outputs, printed = execute(
        "transformer_vq", tmp_path, "steps=12 net.d_model=32 net.n_layer=2 eval.batches=1"
    )
    assert (tmp_path / "run" / "config.json").exists()
    sizes = {line.split(": ")[1] for line in printed.splitlines() if "kB of state" in line}
    assert len(sizes) == 1  # for 39 and for 1117 tokens of context
    assert "perplexity" in printed and "'import " in printed
    assert "WARNING" not in printed
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 2


@pytest.mark.notebook
@pytest.mark.slow
def test_aim(tmp_path):
    """Trains tokenizer and net on digits, then draws, guides, reconstructs."""
    outputs, printed = execute(
        "aim", tmp_path, "stages.0.steps=40 steps=100 batch_size=16 sample.count=10"
    )
    assert (tmp_path / "run" / "stages" / "0" / "config.json").exists()
    assert printed.count("codes (10, 16)") == 3 and "nats per token" in printed
    assert float(printed.split(" nats per token")[0].split()[-1]) < 3.5  # untrained: ln 128 = 4.85
    assert "WARNING" not in printed
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 6


@pytest.mark.notebook
@pytest.mark.slow
def test_flexidit(tmp_path):
    """Trains a DiT on digits, teaches it larger patches, draws at three budgets."""
    smaller = "steps=30 batch_size=16 net.d_model=32 net.n_layer=2 optim.warmup=5 ema.decay=0.8"
    outputs, printed = execute("flexidit", tmp_path, smaller)
    assert (tmp_path / "run" / "flexidit" / "config.json").exists()
    within = re.findall(r"(shared|lora): mode 2 is within (\S+) of the DiT", printed)
    assert [name for name, _ in within] == ["shared", "lora"]
    assert float(within[0][1]) < 1e-4 and float(within[1][1]) == 0
    gaps = [float(g) for g in re.findall(r"mean squared gap (\S+)", printed)]
    assert gaps[1] < gaps[0]
    costs = [float(f) for f in re.findall(r"([\d.]+) GFLOPs an image, [\d.]+ s", printed)]
    assert [round(c / costs[0], 1) for c in costs] == [1.0, 0.6, 0.4]
    assert len(re.findall(r"(?m)^weak_(?:un)?cond .* GFLOPs an image$", printed)) == 2
    assert "the DiT is as it was: True" in printed
    assert "WARNING" not in printed
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 6


@pytest.mark.notebook
@pytest.mark.slow
def test_pom(tmp_path):
    """Trains the two nets on digits, and states that equal forms of the layer are equal."""
    smaller = "steps=10 batch_size=16 net.d_model=32 net.n_layer=2 optim.warmup=5 eval.batches=1"
    outputs, printed = execute("pom", tmp_path, smaller)
    assert all((tmp_path / "run" / name / "config.json").exists() for name in ("pom", "attention"))
    apart = [float(a) for a in re.findall(r"within (\S+)", printed)]
    assert len(apart) == 9 and max(apart) < 1e-4
    flops = dict(re.findall(r"(every gate|rank H|layer): (\S+) MFLOPs", printed))
    assert flops["rank H"] == flops["layer"] and float(flops["layer"]) < float(flops["every gate"])
    assert "the state counts 64 tokens" in printed
    sizes = re.findall(r"(\S+) kB of state, keys and values would take (\d+) kB", printed)
    assert sizes[0][0] == sizes[1][0] and round(int(sizes[1][1]) / int(sizes[0][1])) == 8
    costs = {
        name: (float(a), float(b)) for name, a, b in re.findall(r"(\w+): (\d+) to (\d+) G", printed)
    }
    assert costs["pom"][1] / costs["pom"][0] < 65 < costs["attention"][1] / costs["attention"][0]
    assert "WARNING" not in printed
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 2
