"""What images are to show: classes, or texts as features, row by row."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from ..schema import DiffusionSample, ImageSample
from ..tasks.diffusion import Sizes


@dataclasses.dataclass(frozen=True)
class Wanted:
    """n images to draw.

    Attributes:
        classes: [n] int32 class ids.
        prompts: n texts; None: the net is told classes alone.
        take: of rows [R], what a sampler takes as labels: [R] ids, or arrays by name. What is
            large is made or read only there.
    """

    classes: np.ndarray
    prompts: Sequence[str] | None
    take: Callable[[np.ndarray], Any]

    def __len__(self) -> int:
        return len(self.classes)

    def word(self, i: int) -> str:
        """What image i shows, as a part of a file name."""
        return f"class{self.classes[i]}" if self.prompts is None else slug(self.prompts[i])


def wanted_texts(
    config: Sizes,
    count: int,
    *,
    prompts: Sequence[str] | None,
    features: Callable[[np.ndarray], tuple[Any, Any]],
    classes: Sequence[int] = (),
) -> Wanted:
    """Images of texts, for a net that reads them.

    Args:
        config: of the net. count: n.
        prompts: n texts; None where only their features are known.
        features: rows [R] to context [R, S, D] and context_mask [R, S] (or None: all tokens).
        classes: n ids for nets that have classes too; () for the others, and where there is one.

    Raises:
        UserError: another number of classes than of texts, or one out of range.
    """
    if config.num_classes == 1 and not len(classes):
        classes = [0] * count
    if len(classes) != (count if config.num_classes else 0):
        raise UserError(
            f"{len(classes)} classes for {count} texts: this net has {config.num_classes} classes "
            + (
                "besides its texts; give one for each (sample.classes)"
                if config.num_classes
                else "; leave them out"
            )
        )
    ids = wanted_classes(classes, config.num_classes).classes
    ids = ids if len(ids) else np.zeros(count, np.int32)

    def take(rows: np.ndarray) -> dict[str, Any]:
        context, mask = features(rows)
        told = {"labels": ids[rows], "context": context}
        return told if mask is None else told | {"context_mask": mask}

    shown = [f"text {i}" for i in range(count)] if prompts is None else prompts
    return Wanted(ids, shown, take)


def slug(text: str, length: int = 24) -> str:
    """Letters and digits of a text, for the name of a file."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")[:length].strip("-") or "empty"


def wanted_classes(classes: Sequence[int], num_classes: int) -> Wanted:
    """One image for each class id.

    Raises:
        UserError: one out of range.
    """
    wrong = [c for c in classes if not 0 <= c < num_classes]
    if wrong:
        raise UserError(
            f"class {wrong[0]} is out of range; this model has classes 0..{num_classes - 1}"
        )
    ids = np.asarray(classes, np.int32)
    return Wanted(ids, None, lambda rows: ids[rows])


def classes_of(sample: ImageSample | DiffusionSample, num_classes: int) -> list[int]:
    """The class of each image to draw: `sample.classes` (or all) in turn."""
    classes = sample.classes or tuple(range(num_classes))
    return [classes[i % len(classes)] for i in range(sample.count or len(classes))]
