"""Pipelines: a run may have stages, runs of their own that come first and that it builds on.

Stage n lives in RUN/stages/n and is resumable by itself. A field that takes a run directory takes
"stage:n" as well, and in a stage "stage:../n", which is an earlier stage of the same run.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from ..model.nets.vq_tokenizer import VQTokenizerConfig
from .checkpoint import FOLDER, Checkpoints
from .config_files import check_continuation, read_config
from .errors import UserError
from .schema import CodeData, ImageData, Run
from .tasks.codes import check_codes
from .tasks.distill import check_teacher

_STAGE = re.compile(r"stage:(\.\./)?(\d+)")


def stage_dir(run_dir: str | Path, number: int) -> Path:
    """Where stage `number` of a run lives."""
    return Path(run_dir) / "stages" / str(number)


def resolve(path: str, run_dir: str | Path) -> str:
    """A path as a config has it: "stage:n" is that stage's run directory, "stage:../n" that of the
    stage beside this one, all else stays.
    """
    found = _STAGE.fullmatch(path)
    if not found:
        return path
    beside = Path(run_dir).parent / found[2]
    return str(beside if found[1] else stage_dir(run_dir, int(found[2])))


def located(run: Run, run_dir: str | Path) -> Run:
    """The run with its teacher as a path."""
    teacher = resolve(run.distill.teacher, run_dir)
    return dataclasses.replace(run, distill=dataclasses.replace(run.distill, teacher=teacher))


def stages_of(run: Run) -> dict[int, Run]:
    """The stages that the run refers to, by number (others would be trained for nothing), with what
    a stage takes from its run filled in: images without a path of their own are those of the run.
    """
    own = getattr(run.data, "images", run.data)
    filled = {}
    for number in _needed(run):
        stage = run.stages[number]
        if isinstance(stage.data, ImageData) and not stage.data.path and isinstance(own, ImageData):
            stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, path=own.path))
        filled[number] = stage
    return filled


def _needed(run: Run) -> list[int]:
    """Numbers of the stages that the run refers to, also by way of other stages."""
    needed, todo = set(), list(_references(run).values())
    while todo:
        number = todo.pop()
        if number not in needed:
            needed.add(number)
            todo += _references(run.stages[number], beside=True).values()
    return sorted(needed)


def _references(run: Run, beside: bool = False) -> dict[str, int]:
    """Field -> number of the stage that it names: one of its own, or of those beside it."""
    fields = {"init_from": run.init_from, "distill.teacher": run.distill.teacher}
    if isinstance(run.data, CodeData):
        fields["data.tokenizer"] = run.data.tokenizer
    found = {field: _STAGE.fullmatch(value) for field, value in fields.items()}
    return {f: int(match[2]) for f, match in found.items() if match and bool(match[1]) == beside}


def check_stages(run: Run) -> None:
    """Whether stages exist where the run names them, and make codes that it can take.

    What is wrong there would else be found only after they were trained.

    Raises:
        UserError: the first fault.
    """
    for field, number in _references(run).items():
        if number >= len(run.stages):
            raise UserError(
                f"{field}=stage:{number}: this run has {len(run.stages)} stages; name a run "
                "directory"
            )
        if field == "data.tokenizer":
            _check_tokenizer(run, run.stages[number].net, f"{field}=stage:{number}")
        if field == "distill.teacher":
            check_teacher(run.stages[number], run, f"stage:{number}")
    for place, stage in enumerate(run.stages):
        for field, number in _references(stage, beside=True).items():
            if number >= place:
                raise UserError(
                    f"stages.{place}.{field}=stage:../{number} is not before stage {place}; name "
                    "an earlier stage or a run directory"
                )
            if field == "distill.teacher":
                check_teacher(run.stages[number], stage, f"stage:../{number}")


def _check_tokenizer(run: Run, tokenizer, what: str) -> None:
    if not isinstance(tokenizer, VQTokenizerConfig):
        raise UserError(f"{what} is a {type(tokenizer).__name__}, not an image tokenizer")
    size, pixels = run.data.images.size, tokenizer.downsample
    if run.data.path:
        return  # these codes tell their sizes themselves
    if size % pixels:
        raise UserError(
            f"data.images.size={size} is not a multiple of {pixels}, the pixels of a token; "
            f"set data.images.size={max(1, round(size / pixels)) * pixels}"
        )
    check_codes(run.net, vocab_size=tokenizer.codebook_size, num_tokens=(size // pixels) ** 2)


def is_finished(stage: Run, folder: Path) -> bool:
    """Whether a stage has been trained to its end, with these settings.

    Raises:
        UserError: it was started with other settings.
    """
    if not (folder / "config.json").exists() or not (folder / FOLDER).is_dir():
        return False
    check_continuation(read_config(folder / "config.json"), stage)
    checkpoints = Checkpoints(folder)
    step = checkpoints.latest_step()
    checkpoints.close()
    return step is not None and step >= stage.steps
