"""Comparing results with expected arrays, and keeping account of which arrays were looked at."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from .manifest import Case, Tolerance

EXACT = Tolerance(0.0, 0.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: the array's name and its largest error as a multiple of the tolerance."""

    name: str
    ratio: float
    detail: str = ""

    @property
    def failed(self) -> bool:
        return not self.ratio <= 1.0


def error_ratio(
    got, expected, tolerance: Tolerance, *, gradient: bool = False
) -> tuple[float, str]:
    """Largest |got - expected| as a multiple of what is allowed, and a remark where it is none.

    Integers and booleans must be equal. A float tolerance is never under the rounding of the dtype
    in which the expected array is stored.
    """
    got, expected = np.asarray(got), np.asarray(expected)
    if got.shape != expected.shape:
        return np.inf, f"shape {got.shape}, expected {expected.shape}"
    if expected.size == 0:
        return 0.0, ""
    if expected.dtype.kind in "iub":
        wrong = int(np.sum(got != expected))
        return (np.inf, f"{wrong} of {expected.size} differ") if wrong else (0.0, "")
    if np.isnan(expected).any():
        return np.inf, "expected values hold NaN"
    rounding = np.finfo(expected.dtype).eps if tolerance.rtol > 0 else 0.0
    wide = np.promote_types(expected.dtype, np.float64)
    got, expected = got.astype(wide), expected.astype(wide)
    if np.isnan(got).any():
        return np.inf, "NaN"
    same = got == expected  # infinities
    if not np.isfinite(got[~same]).all() or not np.isfinite(expected[~same]).all():
        return np.inf, "not finite"
    finite = np.where(np.isfinite(expected), expected, 0)
    atol = tolerance.grad_atol if gradient else tolerance.atol
    rtol = tolerance.grad_rtol if gradient else tolerance.rtol
    size = np.max(np.abs(finite)) if tolerance.per_array else np.abs(finite)
    allowed = np.maximum(atol + rtol * size, rounding * np.abs(finite))
    error = np.where(same, 0, np.abs(np.where(same, 0, got) - np.where(same, 0, expected)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0, 0, error / allowed)
    return float(np.max(ratio)), ""


class Report:
    """What an adapter fills in for a case.

    An array of the case is known once it was read as an input, checked, or declared informational;
    `unknown` lists the others.
    """

    def __init__(self, case: Case):
        self.case = case
        self.checks: list[Check] = []
        self.notes: list[str] = []
        self._known: set[str] = set()
        self._informational = list(case.informational)

    def __contains__(self, name: str) -> bool:
        return name in self.case.arrays

    def input(self, name: str, default=None):
        """An array the case provides; `default` where it does not (KeyError without one)."""
        self._known.add(name)
        if default is not None and name not in self.case.arrays:
            return default
        return self.case.arrays[name]

    def matching(self, prefix: str) -> Iterator[tuple[str, str]]:
        """(name, rest of the name) of the arrays whose name begins with `prefix`, by name."""
        return ((n, n[len(prefix) :]) for n in sorted(self.case.arrays) if n.startswith(prefix))

    def expected(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose name begins with `prefix`, by the rest of their name."""
        return {rest: self.case.arrays[name] for name, rest in self.matching(prefix)}

    def informational(self, *patterns: str) -> None:
        """Declares arrays, by name pattern, as known and not to be checked."""
        self._informational += patterns

    def note(self, text: str) -> None:
        """A remark for the case's line."""
        if text not in self.notes:
            self.notes.append(text)

    def check(
        self,
        name: str,
        got,
        expected=None,
        *,
        tolerance: Tolerance | None = None,
        how: str = "",
        where=None,
        jump: float = 0.0,
    ) -> None:
        """Compares `got` with the array `name` of the case, if the case has it.

        Args:
            expected: compared instead of the whole array, e.g. a part of it.
            tolerance: instead of the case's.
            how: says which way the result was obtained, where there are several.
            where: boolean array of the entries that count.
            jump: error that 0.2% of the entries may have, with a note: how far a parameter moves
                when the sign of its update depends on a rounding.
        """
        if name not in self.case.arrays:
            return
        self._known.add(name)
        expected = self.case.arrays[name] if expected is None else np.asarray(expected)
        got = np.asarray(got)
        if where is not None and got.shape == expected.shape:
            where = np.broadcast_to(where, got.shape)
            got, expected = got[where], expected[where]
        if jump and got.shape == expected.shape:
            error = np.abs(got - expected)
            jumped = (error > 0.01 * jump) & (error <= 1.01 * jump)
            if 0 < jumped.sum() <= max(1, 0.002 * jumped.size):
                self.note(f"{name}: {jumped.sum()} signs decided by rounding")
                got, expected = got[~jumped], expected[~jumped]
        gradient = "grad" in name
        tolerance = tolerance or self.case.tolerance
        ratio, detail = error_ratio(got, expected, tolerance, gradient=gradient)
        self.checks.append(Check(f"{name} ({how})" if how else name, ratio, detail))

    def fail(self, name: str, detail: str) -> None:
        """Records a failure that is not a comparison."""
        self._known.add(name)
        self.checks.append(Check(name, np.inf, detail))

    def check_params(
        self,
        prefix: str,
        got,
        convert: Callable[[Mapping[str, np.ndarray]], object],
        *,
        absent: Mapping[str, np.ndarray] | None = None,
        where: Callable[[str], bool] = lambda name: True,
        tolerance: Callable[[str], Tolerance | None] = lambda name: None,
        how: str = "",
        jump: float = 0.0,
    ) -> None:
        """Compares a tree in the project's layout with arrays in the reference's layout.

        The arrays `prefix`<parameter> of the case go through the very conversion that loads
        checkpoints. Where each entry ends up is found by converting, in place of values, the number
        of the parameter.

        Args:
            got: tree like `convert(case.params)`.
            absent: expected value of parameters that the project does not have, instead of 0.
            where: which parameters to compare.
            tolerance: per parameter name, None for the case's.
            how, jump: as in `check`.
        """
        expected = {n: a for n, a in self.expected(prefix).items() if where(n)}
        unknown = sorted(set(expected) - set(self.case.params))
        for name in unknown:
            self.fail(prefix + name, "no such parameter")
        names = [n for n in expected if n not in unknown]
        shapes = {n: np.asarray(a).shape for n, a in self.case.params.items()}
        for name in names:
            if expected[name].shape != shapes[name]:
                self.fail(
                    prefix + name, f"shape {expected[name].shape}, {shapes[name]} in the file"
                )
                return
        number = {name: i for i, name in enumerate(names)}
        tags = convert({n: np.full(s, number.get(n, -1), np.float32) for n, s in shapes.items()})
        values = convert({n: np.float64(expected.get(n, np.zeros(s))) for n, s in shapes.items()})
        flat = lambda tree: jax.tree_util.tree_flatten_with_path(tree)[0]
        got = dict(flat(jax.device_get(got)))
        parts: dict[int, list] = {i: [] for i in range(len(names))}
        for (path, tag), (_, value) in zip(flat(tags), flat(values), strict=True):
            tag, value = np.asarray(tag), np.asarray(value)
            if path not in got:
                continue
            for i in np.unique(tag[tag >= 0]).astype(int):
                here = np.asarray(got[path])
                if here.shape != tag.shape:
                    self.fail(prefix + names[i], f"shape {here.shape}, expected {tag.shape}")
                    return
                parts[i].append((here[tag == i], value[tag == i]))
        for i, name in enumerate(names):
            size = sum(value.size for _, value in parts[i])
            if size == 0:
                result = np.zeros(shapes[name]) if absent is None else absent[name]
                label = "no such parameter here"
                self.check(prefix + name, result, tolerance=tolerance(name), how=label)
            elif size != expected[name].size:
                self.fail(prefix + name, f"only {size} of {expected[name].size} values are loaded")
            else:
                result, value = (np.concatenate(x) for x in zip(*parts[i]))
                value = value.astype(expected[name].dtype)
                options = dict(tolerance=tolerance(name), how=how, jump=jump)
                self.check(prefix + name, result, value, **options)

    @property
    def unknown(self) -> list[str]:
        """Arrays that were neither read nor checked nor declared informational."""
        return [
            name
            for name in sorted(set(self.case.arrays) - self._known)
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in self._informational)
        ]
