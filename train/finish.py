"""What a person sees when training ends, and the evaluation of a saved run."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax

from .config_files import read_config, validate
from .data import gzip_bits_per_byte, open_data, raw_validation_bytes
from .errors import UserError
from .evaluate import make_evaluator
from .loop import Result
from .mesh import check_batch, make_mesh
from .override import apply_overrides
from .schema import Run
from .state import TrainState
from .tasks import make_task


def finish(run: Run, result: Result, command: str) -> None:
    """Print the result beside gzip's, a sample, where the plot is, and what to do next.

    Args:
        run: the config. result: what `train` returned.
        command: the command line that continues this run, for the user to copy.
    """
    if jax.process_index():
        return
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
    longer = _with(command, f"steps={2 * run.steps}")
    mine = _with(_without_run(command), "data.path=my.txt") + " --run runs/mine"
    print(
        "\nnext:\n"
        f"  train longer     {longer}\n"
        f"  sample           lintime sample --run {run_dir} --prompt 'Once upon a time'\n"
        f"  evaluate         lintime eval --run {run_dir} --split test\n"
        f"  your own text    {mine}\n"
        f"  resume           {command}   (after an interruption: the same command)"
    )


def _with(command: str, override: str) -> str:
    """`command` with one more override, replacing an earlier value of the same field."""
    field = override.split("=")[0] + "="
    words = [w for w in command.split() if not w.startswith(field)]
    at = words.index("--run") if "--run" in words else len(words)
    return " ".join([*words[:at], override, *words[at:]])


def _without_run(command: str) -> str:
    return command.split(" --run ")[0]


def evaluate_run(run_dir: str, overrides: list[str], split: str, step: int | None) -> dict:
    """`lintime eval`: metrics of a saved run on a split, printed and appended to its metrics.jsonl.

    Args:
        overrides: e.g. other data (data.path=...) or eval.batches=0 for the whole split.
        step: checkpoint; None = the newest.
    """
    from .load import load

    path = Path(run_dir)
    run = apply_overrides(read_config(path / "config.json"), overrides)
    validate(run)
    loaded = load(path, step=step)
    data = open_data(
        run.data, split=split, seed=0, batch_size=run.batch_size, cache=path / "cache"
    )
    if data.num_batches is None:
        raise UserError(f"the {split} split is endless; evaluate validation or test")
    if data.vocab.size != run.net.vocab_size:
        raise UserError(
            f"this data's vocabulary has {data.vocab.size} ids, the run's net {run.net.vocab_size}"
        )
    mesh = make_mesh(run.mesh)
    check_batch(run, mesh)
    evaluate = make_evaluator(make_task(run), data, mesh, run.batch_size, run.eval.batches)
    state = TrainState(None, loaded.params, {}, {}, loaded.stats, {})
    result = evaluate(state)
    width = min(shutil.get_terminal_size().columns, 100)
    print(f"{path} on {split} of {run.data.path}"[:width])
    for name, value in result.items():
        print(f"  {name:16} {value:.6g}")
    if run.data.vocab == "bytes":
        raw = raw_validation_bytes(data, run.eval.batches or None)
        print(f"  {'gzip -9':16} {gzip_bits_per_byte(raw):.6g} bits per byte on the same bytes")
    return result
