"""The task of a run: one explicit table from the kind of net to what trains it."""

from __future__ import annotations

from ..model.nets.mamba_lm import MambaConfig
from ..model.nets.transformer_vq import TransformerVQConfig
from .schema import Run
from .task import Task
from .task_text import LanguageModelTask

TASKS: dict[type, type[Task]] = {
    TransformerVQConfig: LanguageModelTask,
    MambaConfig: LanguageModelTask,
}


def make_task(run: Run) -> Task:
    """The task of a run, by the type of its net."""
    return TASKS[type(run.net)](run)
