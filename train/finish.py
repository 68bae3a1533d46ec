"""What a person sees when training ends; evaluating and sampling a saved run."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ..model.nets.vq_tokenizer import VQTokenizerConfig
from ..model.partition import parameter_shardings
from .config_files import read_config
from .data.open import open_split
from .errors import UserError
from .evaluate import make_evaluator
from .launch import program
from .loaded.flexible import shown_budget
from .loop import Result
from .mesh import check_batch, make_mesh
from .override import apply_overrides, diff
from .prepare.encoding import FOLDERS, encoded_dir
from .schema import (
    CodeData,
    Data,
    DiffusionSample,
    FlexibleSample,
    ImageData,
    LatentData,
    Run,
    Sample,
    VideoData,
)
from .stages import resolve, stages_of
from .state import TrainState
from .tasks.table import make_task
from .validate import validate

# Groups of fields that each command reads; a run's other settings are those it was trained with.
EVAL_FIELDS = ("data", "eval", "mesh", "precision", "batch_size", "sample")
SAMPLE_FIELDS = (
    "sample", "precision", "data.vocab", "data.tokenizer", "data.autoencoder", "data.text",
    "data.text_encoder",
)  # fmt: skip
_ENCODING = ("data.images.", "data.views", "data.resizes")  # read when images are encoded


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
        where = f" of {result.where}" if result.where else f" of {run.steps}"
        print(f"\nstopped at step {result.step}{where}; to continue, run the same command:")
        print(f"  {command}")
        return
    from .loaded.load import load

    print(f"\nvalidation after {result.step} updates:")
    figures = dict(result.metrics)
    gzip = figures.pop("gzip_bits_per_byte", None)
    if gzip is not None:
        print(f"  this model  {figures['bits_per_byte']:.3f} bits per byte")
        print(f"  gzip -9     {gzip:.3f} bits per byte on the same bytes")
    else:
        print("  " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))

    text = isinstance(run.sample, Sample)
    blind = not getattr(run.data, "tokenizer", True) or not getattr(run.data, "autoencoder", True)
    if text:
        print(f"\nsample, prompt {run.sample.prompt!r}:\n" + "-" * 72)
        draw(load(run_dir), run.sample, run.seed)
        print("-" * 72)
    elif blind:
        maker = "tokenizer" if isinstance(run.data, CodeData) else "autoencoder"
        print(f"\nno sample: data.{maker} names nothing that makes pixels")
    else:
        print("\nsample:")
        loaded = load(run_dir)
        draw(loaded, run.sample, run.seed)
        if run.distill.teacher:
            from .samples.distilled import sample_distilled

            sample_distilled(loaded, run.sample, seed=run.seed)
    print(f"loss curve  {run_dir}/plots/loss.png\nmetrics     {run_dir}/metrics.jsonl")
    here, lintime = shlex.quote(str(run_dir)), " ".join(program())
    lines = [f"  train longer     {shlex.join(_with(words, f'steps={2 * run.steps}'))}"]
    if text:
        mine = [*_with(_without_run(words), "data.path=my.txt"), "--run", "runs/mine"]
        lines += [
            f"  sample           {lintime} sample --run {here} --prompt 'Once upon a time'",
            f"  evaluate         {lintime} eval --run {here} --split test",
            f"  your own text    {shlex.join(mine)}",
        ]
    else:
        made_here = isinstance(run.data, CodeData | LatentData) and not run.data.path
        mine, videos = _without_run(words), isinstance(run.data, VideoData)
        texts = bool(getattr(run.data, "text", ""))
        for field in _image_paths(run, "data.images.path" if made_here else "data.path"):
            kind = "FOLDER_OF_CLASS_FOLDERS" if made_here else "FOLDER"
            kind = "FILE.npz" if videos else kind
            mine = _with(mine, f"{field}={kind}")
        if texts:
            mine = _with(mine, "data.text=FEATURES_OF_THEIR_CAPTIONS")
        mine += ["--run", "runs/mine"]
        again = "" if isinstance(run.net, VQTokenizerConfig) else " --seed 1"
        with_tokenizer = f" data.{maker}=DIR_OR_FILE" if blind else ""
        lines += [
            f"  sample           {lintime} sample --run {here}{again}{with_tokenizer}",
            *([f"  of a text        {lintime} sample --run {here} --text 'A PROMPT'"] * texts),
            *_budget_line(run, f"{lintime} sample --run {here}"),
            f"  evaluate         {lintime} eval --run {here}",
            f"  your own {'videos' if videos else 'images'}  {shlex.join(mine)}",
        ]
    lines.append(f"  resume           {command}   (after an interruption: the same command)")
    print("\nnext:\n" + "\n".join(lines))


def _image_paths(run: Run, field: str) -> list[str]:
    """Fields that name images: the run's own, and those of stages that name the same."""
    own = getattr(run.data, "images", run.data).path
    stages = [n for n in stages_of(run) if _names(run.stages[n], own)]
    return [field, *(f"stages.{n}.data.path" for n in stages)]


def _names(stage: Run, images: str) -> bool:
    return isinstance(stage.data, ImageData) and stage.data.path == images != ""


def _budget_line(run: Run, command: str) -> list[str]:
    """How to draw with less compute, where the net can."""
    if not isinstance(run.sample, FlexibleSample) or len(run.sample.budgets) > 1:
        return []
    budget = shown_budget(run.net)
    return [f"  budgets          {command} --budget 1,{budget:g}"] if budget else []


def draw(loaded, sample, seed: int) -> list:
    """Draw from a loaded run as its kind asks for: text, images, or reconstructions."""
    if isinstance(sample, Sample):
        from .samples.command import sample_text

        return sample_text(loaded, sample, seed=seed)
    if isinstance(sample, FlexibleSample) and len(sample.budgets) > 1:
        from .samples.budgets import sample_budgets

        return sample_budgets(loaded, sample, seed=seed)
    from .encoders.tokenizer import LoadedTokenizer
    from .samples.images import sample_classes, sample_reconstructions

    kind = sample_reconstructions if isinstance(loaded, LoadedTokenizer) else sample_classes
    return kind(loaded, sample, seed=seed)


def _with(words: Sequence[str], override: str) -> list[str]:
    """A command with one more override, replacing earlier values of the same field."""
    field = override.partition("=")[0] + "="
    words = [w for w in words if not w.startswith(field)]
    at = words.index("--run") if "--run" in words else len(words)
    return [*words[:at], override, *words[at:]]


def _without_run(words: Sequence[str]) -> list[str]:
    words = list(words)
    return words[: words.index("--run")] if "--run" in words else words


def evaluate_run(
    run_dir: str, overrides: Sequence[str], split: str, step: int | None, clip: str | None = None
) -> dict:
    """`lintime eval`: metrics of a saved run on a split, printed and returned.

    Args:
        overrides: e.g. other data (data.path=...) or eval.batches=0 for the whole split.
        step: checkpoint; None = the newest.
        clip: short for eval.clip.
    """
    path = Path(run_dir)
    overrides = [*overrides, *([] if clip is None else [f"eval.clip={clip}"])]
    run = _changed(path, overrides, "eval", EVAL_FIELDS)
    for field in ("inception", "reference", "clip"):
        file = getattr(run.eval, field)
        there = Path(file).expanduser().exists() if field == "clip" else Path(file).is_file()
        if file and not there:  # said before the validation, which may take long
            raise UserError(f"eval.{field}={file} is not there; check the path")
    loaded = _load(path, run, step)
    encoded = encoded_dir(run, path)
    if encoded and not run.data.path and not encoded.exists() and run.eval.samples:
        print(f"{path}: no loss, for there are no {FOLDERS[type(run.data)]} (data.path=DIR)")
        result = {}
    else:
        result = _losses(run, loaded, split, path, encoded)
    from .evaluate.runs import image_figures

    figures = image_figures(loaded, run, split)
    notes, protocol = figures.pop("notes", []), figures.pop("protocol", "")
    for name, value in figures.items():
        print(f"  {name:16} {value:.6g}")
    for line in filter(None, (str(protocol), *notes)):
        print(f"  {line}")
    return result | figures


def _losses(run: Run, loaded, split: str, path: Path, encoded: Path | None) -> dict[str, float]:
    """What validation during training computes, on a split, printed and returned."""
    data = open_split(run, split, path, encoded)
    task = make_task(run)
    task.check_data(data)
    if encoded:
        maker = data.info.MAKER
        theirs = getattr(data.info, maker)
        if loaded.data_fingerprint.get(maker, theirs) != theirs:
            raise UserError(
                f"{encoded} holds {data.info.KIND} of another {maker} than {path} was trained on; "
                "make them with that one"
            )
    mesh = make_mesh(run.mesh)
    check_batch(run, mesh)
    evaluate = make_evaluator(task, data, mesh, run.batch_size, run.eval.batches)
    params = jax.device_put(loaded.params, parameter_shardings(loaded.params, mesh))
    stats = jax.device_put(loaded.stats, NamedSharding(mesh, PartitionSpec()))
    state = TrainState(None, params, {}, {}, stats, {})
    result = evaluate(state)
    if isinstance(run.net, VQTokenizerConfig):
        del result["psnr"]  # that of 8-bit images follows
    width = min(shutil.get_terminal_size().columns, 100)
    print(f"{path} on {split} of {encoded or run.data.path}"[:width])
    for name, value in result.items():
        print(f"  {name:16} {value:.6g}")
    for value in task.yardstick(data, run.eval.batches).values():
        print(f"  {'gzip -9':16} {value:.6g} bits per byte on the same bytes")
    return result


def sample_run(
    run_dir: str,
    overrides: list[str],
    seed: int | None,
    step: int | None,
    budget: str | None = None,
    text: Sequence[str] = (),
) -> list:
    """`lintime sample`: text continued on standard output, or images written to samples/.

    Args:
        overrides: fields of `sample`, where the vocabulary or tokenizer has moved, or of which
            images to show reconstructions.
        seed: of the draws; None is 0.
        step: checkpoint; None = the newest.
        budget: short for sample.budgets.
        text: prompts, as sample.text, but with commas; one image each unless `overrides` say how
            many.
    """
    if budget is not None:
        if not isinstance(read_config(Path(run_dir) / "config.json").sample, FlexibleSample):
            raise UserError(
                f"--budget {budget}: {run_dir} has no choice of compute, only nets of several "
                "patch sizes have; `lintime flexify` makes one out of a DiT"
            )
        overrides = [*overrides, f"sample.budgets={budget}"]
    if text and not any(word.startswith("sample.count=") for word in overrides):
        overrides = [*overrides, "sample.count=0"]
    run = _changed(Path(run_dir), overrides, "sample", SAMPLE_FIELDS, text)
    if seed is not None and isinstance(run.net, VQTokenizerConfig):
        raise UserError(
            f"--seed {seed} would be ignored: a tokenizer shows reconstructions of data, it draws "
            "nothing; leave it out"
        )
    return draw(_load(run_dir, run, step), run.sample, seed or 0)


def _changed(
    run_dir: Path, overrides: list[str], command: str, allowed: tuple[str, ...],
    text: Sequence[str] = (),
) -> Run:  # fmt: skip
    """The saved config with overrides and prompts; a field the command would ignore is refused."""
    saved = read_config(run_dir / "config.json")
    if command == "sample" and isinstance(saved.net, VQTokenizerConfig):
        allowed = (*allowed, "data")
    run = apply_overrides(saved, overrides)
    if text:
        if not isinstance(run.sample, DiffusionSample):
            raise UserError(f"--text: {run_dir} does not draw by text; leave it out")
        run = dataclasses.replace(run, sample=dataclasses.replace(run.sample, text=tuple(text)))
    for path, _, _ in diff(saved, run):
        if type(saved.data) in FOLDERS and path.startswith(_ENCODING):
            kind = FOLDERS[type(saved.data)]
            raise UserError(
                f"{path} says how {kind} are made, {command} makes none; make some with "
                f"`lintime prepare {kind}` and name them with data.path"
            )
        if not any(path == a or path.startswith(f"{a}.") for a in allowed):
            raise UserError(
                f"{path} is part of the trained run; {command} takes {', '.join(allowed)}"
            )
    validate(run)
    return run


def _load(run_dir: str | Path, run: Run, step: int | None):
    """The weights, with what `run` names besides checked against what it was trained with."""
    from .loaded.load import load

    options = dict(step=step, precision=run.precision)
    if isinstance(run.data, Data):
        loaded = load(run_dir, vocab=run.data.vocab, **options)
        _ = loaded.vocab  # raises UserError if it is another one
        return loaded
    if isinstance(run.data, CodeData):
        return load(run_dir, tokenizer=resolve(run.data.tokenizer, run_dir), **options)
    if isinstance(run.data, LatentData):
        options["autoencoder"] = run.data.autoencoder
    loaded = load(run_dir, **options)
    if isinstance(run.net, VQTokenizerConfig):
        loaded.config = run  # the images may be others
    elif getattr(run.data, "text", ""):  # captions and their encoder may be elsewhere now
        loaded.config = dataclasses.replace(loaded.config, data=run.data)
    return loaded
