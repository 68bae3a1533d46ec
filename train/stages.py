"""Pipelines: a run may have stages, runs of their own that come first and that it builds on.

Stage n lives in RUN/stages/n and is resumable by itself. A field that takes a run directory takes
"stage:n" as well.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from .checkpoint import FOLDER, Checkpoints
from .config_files import check_continuation, read_config
from .errors import UserError
from .schema import CodeData, ImageData, Run

_STAGE = re.compile(r"stage:(\d+)")
CODES = "codes"  # folder of a run for the codes that it made itself


def stage_dir(run_dir: str | Path, number: int) -> Path:
    """Where stage `number` of a run lives."""
    return Path(run_dir) / "stages" / str(number)


def resolve(path: str, run_dir: str | Path) -> str:
    """A path as a config has it: "stage:n" is that stage's run directory, all else stays."""
    found = _STAGE.fullmatch(path)
    return str(stage_dir(run_dir, int(found[1]))) if found else path


def stages_of(run: Run) -> list[Run]:
    """The stages, with what a stage takes from its run filled in: images without a path of their
    own are those of the run."""
    own = run.data.images if isinstance(run.data, CodeData) else run.data
    filled = []
    for stage in run.stages:
        if isinstance(stage.data, ImageData) and not stage.data.path and isinstance(own, ImageData):
            stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, path=own.path))
        filled.append(stage)
    return filled


def check_stages(run: Run) -> None:
    """Raises UserError for a "stage:n" that the run does not have."""
    fields = {"init_from": run.init_from}
    if isinstance(run.data, CodeData):
        fields["data.tokenizer"] = run.data.tokenizer
    for field, value in fields.items():
        found = _STAGE.fullmatch(value)
        if found and int(found[1]) >= len(run.stages):
            raise UserError(
                f"{field}={value}: this run has {len(run.stages)} stages; name a run directory"
            )


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


def codes_dir(run: Run, run_dir: str | Path) -> Path:
    """The folder of codes that a run on `CodeData` reads."""
    return Path(run.data.path).expanduser() if run.data.path else Path(run_dir) / CODES
