"""What a person sees when training ends; evaluating and sampling a saved run."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ..model.partition import parameter_shardings
from .config_files import read_config
from .data import gzip_bits_per_byte, open_data, raw_validation_bytes
from .errors import UserError
from .evaluate import make_evaluator
from .launch import program
from .loop import Result
from .mesh import check_batch, make_mesh
from .override import apply_overrides, diff
from .schema import Run
from .state import TrainState
from .tasks import make_task
from .validate import validate

# Groups of fields that each command reads; a run's other settings are those it was trained with.
EVAL_FIELDS = ("data", "eval", "mesh", "precision", "batch_size")
SAMPLE_FIELDS = ("sample", "data.vocab")


def finish(run: Run, result: Result, words: Sequence[str]) -> None:
    """Print the result beside gzip's, a sample, where the plot is, and what to do next.

    Args:
        run: the config. result: what `train` returned.
        words: the command line that continues this run, as a list; printed quoted, to be copied.
    """
    if jax.process_index():
        return
    command = shlex.join(words)
    run_dir = result.run_dir
    if result.stopped:
        print(f"\nstopped at step {result.step} of {run.steps}; to continue, run the same command:")
        print(f"  {command}")
        return
    metrics = result.metrics
    print(f"\nvalidation after {result.step} updates:")
    if "bits_per_byte" in metrics:
        data = open_data(
            run.data, split="validation", seed=0, batch_size=run.batch_size, cache=run_dir / "cache"
        )
        gzip = gzip_bits_per_byte(raw_validation_bytes(data, run.eval.batches or None))
        print(f"  this model  {metrics['bits_per_byte']:.3f} bits per byte")
        print(f"  gzip -9     {gzip:.3f} bits per byte on the same bytes")
    else:
        print("  " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))

    from .load import load
    from .sample import sample_text

    print(f"\nsample, prompt {run.sample.prompt!r}:\n" + "-" * 72)
    sample_text(load(run_dir), run.sample, seed=run.seed)
    print("-" * 72)
    print(f"loss curve  {run_dir}/plots/loss.png\nmetrics     {run_dir}/metrics.jsonl")
    mine = [*_with(_without_run(words), "data.path=my.txt"), "--run", "runs/mine"]
    here, lintime = shlex.quote(str(run_dir)), " ".join(program())
    print(
        "\nnext:\n"
        f"  train longer     {shlex.join(_with(words, f'steps={2 * run.steps}'))}\n"
        f"  sample           {lintime} sample --run {here} --prompt 'Once upon a time'\n"
        f"  evaluate         {lintime} eval --run {here} --split test\n"
        f"  your own text    {shlex.join(mine)}\n"
        f"  resume           {command}   (after an interruption: the same command)"
    )


def _with(words: Sequence[str], override: str) -> list[str]:
    """A command with one more override, replacing earlier values of the same field."""
    field = override.partition("=")[0] + "="
    words = [w for w in words if not w.startswith(field)]
    at = words.index("--run") if "--run" in words else len(words)
    return [*words[:at], override, *words[at:]]


def _without_run(words: Sequence[str]) -> list[str]:
    words = list(words)
    return words[: words.index("--run")] if "--run" in words else words


def evaluate_run(run_dir: str, overrides: list[str], split: str, step: int | None) -> dict:
    """`lintime eval`: metrics of a saved run on a split, printed and returned.

    Args:
        overrides: e.g. other data (data.path=...) or eval.batches=0 for the whole split.
        step: checkpoint; None = the newest.
    """
    path = Path(run_dir)
    run = _changed(path, overrides, "eval", EVAL_FIELDS)
    loaded = _load(path, run, step)
    data = open_data(run.data, split=split, seed=0, batch_size=run.batch_size, cache=path / "cache")
    if data.vocab.size != run.net.vocab_size:
        raise UserError(
            f"this data's vocabulary has {data.vocab.size} ids, the net {run.net.vocab_size}; "
            "name the vocabulary it was trained with: data.vocab=FILE"
        )
    mesh = make_mesh(run.mesh)
    check_batch(run, mesh)
    evaluate = make_evaluator(make_task(run), data, mesh, run.batch_size, run.eval.batches)
    params = jax.device_put(loaded.params, parameter_shardings(loaded.params, mesh))
    stats = jax.device_put(loaded.stats, NamedSharding(mesh, PartitionSpec()))
    state = TrainState(None, params, {}, {}, stats, {})
    result = evaluate(state)
    width = min(shutil.get_terminal_size().columns, 100)
    print(f"{path} on {split} of {run.data.path}"[:width])
    for name, value in result.items():
        print(f"  {name:16} {value:.6g}")
    if run.data.vocab == "bytes":
        raw = raw_validation_bytes(data, run.eval.batches or None)
        print(f"  {'gzip -9':16} {gzip_bits_per_byte(raw):.6g} bits per byte on the same bytes")
    return result


def sample_run(run_dir: str, overrides: list[str], seed: int, step: int | None) -> list[str]:
    """`lintime sample`: continue a prompt with a saved run, streaming to standard output.

    Args:
        overrides: fields of `sample`, or data.vocab where that file has moved.
        step: checkpoint; None = the newest.
    """
    from .sample import sample_text

    run = _changed(Path(run_dir), overrides, "sample", SAMPLE_FIELDS)
    return sample_text(_load(run_dir, run, step), run.sample, seed=seed)


def _changed(run_dir: Path, overrides: list[str], command: str, allowed: tuple[str, ...]) -> Run:
    """The saved config with overrides; a field the command would ignore is refused."""
    saved = read_config(run_dir / "config.json")
    run = apply_overrides(saved, overrides)
    for path, _, _ in diff(saved, run):
        if not any(path == a or path.startswith(f"{a}.") for a in allowed):
            raise UserError(
                f"{path} is part of the trained run; {command} takes {', '.join(allowed)}"
            )
    validate(run)
    return run


def _load(run_dir: str | Path, run: Run, step: int | None):
    """The weights, with the vocabulary that `run` names checked against the one trained with."""
    from .load import load

    loaded = load(run_dir, step=step, vocab=run.data.vocab)
    _ = loaded.vocab  # raises UserError if it is another one
    return loaded
