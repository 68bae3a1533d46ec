"""Running the cases of a manifest and printing one line for each."""

from __future__ import annotations

import dataclasses
import importlib
import time
import traceback
from collections.abc import Callable, Mapping

import jax

from lintime.kernels_pallas.compat import enable_x64

from .compare import Check, Report
from .manifest import Case, Manifest, ManifestError

# Module with FAMILIES = {family: adapter(report)} of each system.
SYSTEMS = {
    "transformer_vq": "tests.golden.transformer_vq",
    "ssm": "tests.golden.ssm",
    "aim": "tests.golden.aim",
    "flexidit": "tests.golden.flexidit",
    "dit": "tests.golden.dit",
    "pom": "tests.golden.pom",
}

Adapter = Callable[[Report], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a case.

    Attributes:
        name: of the case.
        checks: all comparisons.
        problems: why the case fails besides comparisons out of tolerance.
        notes: remarks.
        seconds: wall time.
    """

    name: str
    checks: tuple[Check, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.failed]

    @property
    def passed(self) -> bool:
        return not self.problems and not self.failures and bool(self.checks)

    @property
    def line(self) -> str:
        """One line: name, worst error, pass or fail, seconds, remarks."""
        words = f"{'pass' if self.passed else 'FAIL'}  {self.name:<26} "
        if self.checks:
            worst = max(self.checks, key=lambda check: (check.failed, check.ratio))
            detail = f" {worst.detail}" if worst.detail else ""
            words += f"worst {worst.ratio:8.2g} of tolerance at {worst.name}{detail}"
        else:
            words += "nothing was compared"
        words += f"; {len(self.checks)} checks, {self.seconds:.1f} s"
        others = self.failures[1:]
        if others:
            names = [check.name for check in self.failures]
            more = f", and {len(names) - 8} more" if len(names) > 8 else ""
            words += f"; {len(names)} fail: {', '.join(names[:8])}{more}"
        return "; ".join([words, *self.problems, *self.notes])


def load_families(manifest: Manifest) -> Mapping[str, Adapter]:
    """The adapters of the manifest's system.

    Raises:
        ManifestError: no adapter exists for the system.
    """
    if manifest.system not in SYSTEMS:
        raise ManifestError(
            f"no adapter for the system {manifest.content['system']!r} yet; "
            f"there is one for: {', '.join(SYSTEMS)}"
        )
    return importlib.import_module(SYSTEMS[manifest.system]).FAMILIES


def family_of(name: str, families: Mapping[str, Adapter]) -> str | None:
    """The longest family that `name` begins with, as whole words; None if there is none."""
    fitting = [f for f in families if name == f or name.startswith(f"{f}_")]
    return max(fitting, key=len, default=None)


def run_case(manifest: Manifest, name: str, *, debug: bool = False) -> Outcome:
    """Runs one case: in float64 if its tolerance asks for it, else in float32.

    A float64 case whose manifest notes a tolerance for float32 runs in float32 as well.
    """
    start = time.perf_counter()
    checks: list[Check] = []
    problems: list[str] = []
    notes: list[str] = []
    families = load_families(manifest)
    family = family_of(name, families)
    try:
        if family is None:
            raise ManifestError(
                f"unknown family; {manifest.system} has: {', '.join(sorted(families))}"
            )
        case = manifest.load(name)
        for label, variant in _variants(case):
            report = Report(variant)
            with enable_x64(variant.needs_float64), jax.default_matmul_precision("highest"):
                families[family](report)
            checks += [dataclasses.replace(c, name=f"{label}{c.name}") for c in report.checks]
            notes += [n for n in report.notes if n not in notes]
            if report.unknown:
                names = ", ".join(report.unknown[:8])
                unknown = f"{len(report.unknown)} unknown arrays: {names}"
                problems += [unknown] if unknown not in problems else []
    except ManifestError as error:
        problems.append(str(error))
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = " ".join(str(error).split())
        problems.append(f"{type(error).__name__}: {text[:300]}")
    seconds = time.perf_counter() - start
    return Outcome(name, tuple(checks), tuple(problems), tuple(notes), seconds)


def _variants(case: Case) -> list[tuple[str, Case]]:
    variants = [("", case)]
    loose = case.tolerance.for_float32()
    if case.needs_float64 and loose:
        variants.append(("float32 ", case.in_float32(loose)))
    return variants
