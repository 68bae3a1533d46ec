"""The task of a run: one explicit table from the kind of net to what trains it."""

from __future__ import annotations

from ...model.nets.aim import AiMConfig
from ...model.nets.dih import DiHConfig
from ...model.nets.dit import DiTConfig
from ...model.nets.flexidit import FlexiDiTConfig
from ...model.nets.jit import JiTConfig
from ...model.nets.mamba_lm import MambaConfig
from ...model.nets.text_video_dih import TextVideoDiHConfig
from ...model.nets.transformer_vq import TransformerVQConfig
from ...model.nets.vq_tokenizer import VQTokenizerConfig
from ..schema import Run
from .base import Task
from .codes import ClassCodesTask
from .diffusion import DiffusionTask
from .distill import DistillTask
from .flexible import FlexibleTask
from .text import LanguageModelTask
from .tokenizer import TokenizerTask

TASKS: dict[type, type[Task]] = {
    TransformerVQConfig: LanguageModelTask,
    MambaConfig: LanguageModelTask,
    AiMConfig: ClassCodesTask,
    DiTConfig: DiffusionTask,
    FlexiDiTConfig: FlexibleTask,
    DiHConfig: DiffusionTask,
    JiTConfig: DiffusionTask,
    TextVideoDiHConfig: DiffusionTask,
    VQTokenizerConfig: TokenizerTask,
}


def make_task(run: Run) -> Task:
    """The task of a run, by the type of its net, and whether it has a teacher."""
    if run.distill.teacher:
        return DistillTask(run)
    return TASKS[type(run.net)](run)
