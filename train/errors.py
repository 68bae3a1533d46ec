"""Errors that are the user's to mend."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator


class UserError(ValueError):
    """Something the user can fix; the message is one line that says what is wrong and what to do.

    The command line prints the message and exits with status 2 (`--debug` shows the traceback).
    """


@contextlib.contextmanager
def told_as(*replacements: tuple[str, str]) -> Iterator[None]:
    """Words of a UserError as the run's user knows them, (pattern, replacement) by `re.sub`.

    For a part that is used by several commands and names the fields or options of one of them.
    """
    try:
        yield
    except UserError as error:
        text = str(error)
        for pattern, replacement in replacements:
            text = re.sub(pattern, replacement, text)
        raise UserError(text) from error


def check_divides(whole_name: str, whole: int, part_name: str, part: int) -> None:
    """Raises a UserError that names the nearest divisor unless `part` divides `whole`."""
    if whole % part:
        divisors = [d for d in range(1, whole + 1) if whole % d == 0]
        best = min(divisors, key=lambda d: (abs(math.log(d / part)), d))
        raise UserError(
            f"{whole_name}={whole} is not divisible by {part_name}={part}; set {part_name}={best}"
        )
