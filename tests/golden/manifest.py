"""Folders of test vectors: manifest.json, .npz arrays and .safetensors parameters."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FLOAT64_LEVEL = 1e-7  # a tolerance below this asks for a float64 run


class ManifestError(Exception):
    """The folder or its manifest cannot be used; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Allowed error of an array: atol + rtol |expected|.

    Attributes:
        atol, rtol: of values.
        grad_atol, grad_rtol: of gradients.
        per_array: |expected| is the largest magnitude of the array, not that of the element.
        note: the manifest's remark.
    """

    atol: float
    rtol: float
    grad_atol: float
    grad_rtol: float
    per_array: bool = False
    note: str = ""

    @classmethod
    def read(cls, case: Mapping, manifest: Mapping) -> Tolerance:
        """The tolerance of a case, in any of the ways manifests state it.

        {atol, rtol, [grad_atol, grad_rtol], [note]}; {metric, float32_cpu, [float32_cpu_gradients]}
        with a metric "absolute" or relative to the largest element; atol and rtol of the case
        itself; {"note": "exact"}; or one of these for the whole manifest.
        """
        spec = case.get("tolerance", manifest.get("tolerance"))
        per_array = False
        if spec is None and ("atol" in case or "rtol" in case):
            spec = {k: case[k] for k in case if k in ("atol", "rtol", "grad_atol", "grad_rtol")}
            form = manifest.get("format", "")
            per_array = "max|b|" in (form.get("tolerance", "") if isinstance(form, dict) else form)
        if isinstance(spec, (int, float)):
            spec = {"atol": spec, "rtol": spec}
        if isinstance(spec, str):
            spec = {"note": spec}
        if spec is None:
            raise ManifestError("no tolerance is given")
        note = spec.get("note", "")
        if "metric" in spec:
            value = spec.get("float32_cpu", spec.get("float32"))
            if value is None:
                raise ManifestError(f"tolerance {dict(spec)} has a metric but no float32_cpu")
            gradient = spec.get("float32_cpu_gradients", value)
            if spec["metric"].startswith("absolute"):
                return cls(value, 0.0, gradient, 0.0, note=note)
            return cls(0.0, value, 0.0, gradient, per_array=True, note=note)
        if not {"atol", "rtol"} & set(spec) and "exact" not in note:
            raise ManifestError(f"tolerance {dict(spec)} is not understood")
        atol, rtol = spec.get("atol", 0.0), spec.get("rtol", 0.0)
        return cls(
            atol, rtol, spec.get("grad_atol", atol), spec.get("grad_rtol", rtol),
            per_array or "largest absolute value" in note, note,
        )  # fmt: skip

    @property
    def float64_level(self) -> bool:
        """Whether float32 arithmetic cannot meet this tolerance."""
        return 0 < max(self.atol, self.rtol) < FLOAT64_LEVEL

    def for_float32(self) -> Tolerance | None:
        """The tolerance the note gives for float32 code, if any."""
        number = r"(\d[\d.]*(?:e[+-]?\d+)?)"
        found = re.search(rf"{number} (?:in|for) float32", self.note)
        if not found:
            return None
        return dataclasses.replace(
            self, **dict.fromkeys(("atol", "rtol", "grad_atol", "grad_rtol"), float(found[1]))
        )

    def loosened(self, rtol: float) -> Tolerance:
        """The same with a relative part of at least `rtol`."""
        return dataclasses.replace(
            self, rtol=max(self.rtol, rtol), grad_rtol=max(self.grad_rtol, rtol)
        )


@dataclasses.dataclass
class Case:
    """One case.

    Attributes:
        name: begins with the family.
        config: sizes and flags.
        arrays: name -> array, inputs and expected values.
        params: name -> array in the reference's checkpoint layout, {} without a parameter file.
        tolerance: see `Tolerance`.
        meaning: name or pattern -> explanation, {} if there is none.
        informational: names the manifest declares as not to be checked.
        entry: what else the manifest says of the case.
        folder: where the case's files are.
    """

    name: str
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]
    params: dict[str, np.ndarray]
    tolerance: Tolerance
    meaning: dict[str, str]
    informational: tuple[str, ...] = ()
    entry: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path = Path()

    @property
    def needs_float64(self) -> bool:
        """Whether the case is to run with 64-bit types."""
        dtypes = {a.dtype for a in (*self.arrays.values(), *self.params.values())}
        return (
            self.tolerance.float64_level
            or np.dtype(np.float64) in dtypes
            or "float64" in (self.config.get("dtype"), self.config.get("param_dtype"))
        )

    def in_float32(self, tolerance: Tolerance) -> Case:
        """The case with float32 arrays and another tolerance."""
        cast = lambda tree: {
            k: a.astype(np.float32) if a.dtype == np.float64 else a for k, a in tree.items()
        }
        config = {k: "float32" if v == "float64" else v for k, v in self.config.items()}
        return dataclasses.replace(
            self, config=config, arrays=cast(self.arrays), params=cast(self.params),
            tolerance=tolerance,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A folder of vectors.

    Attributes:
        folder: where the files are.
        system: the system's name in lower case with underscores.
        content: the parsed manifest.json.
        cases: case name -> its entry.
    """

    folder: Path
    system: str
    content: dict[str, Any]
    cases: dict[str, dict[str, Any]]

    def load(self, name: str) -> Case:
        """Reads the arrays and parameters of a case.

        Raises:
            ManifestError: a file or a listed array is missing, or a file cannot be read.
        """
        entry = self.cases[name]
        data, params = self._files(name, entry)
        arrays = {k: v for file in data for k, v in _read_npz(file).items()}
        missing = sorted(set(entry.get("arrays") or ()) - set(arrays))
        if missing:
            raise ManifestError(f"{len(missing)} listed arrays are not in the file: {missing[:5]}")
        meaning = entry.get("meaning") or {}
        return Case(
            name=name,
            config=entry.get("config") or {},
            arrays=arrays,
            params={k: v for file in params for k, v in _read_safetensors(file).items()},
            tolerance=Tolerance.read(entry, self.content),
            meaning=meaning if isinstance(meaning, dict) else {"": str(meaning)},
            informational=tuple(entry.get("informational") or ()),
            entry=entry,
            folder=self.folder,
        )

    def _files(self, name: str, entry: Mapping) -> tuple[list[Path], list[Path]]:
        named = [entry.get(k) for k in ("data_file", "arrays_file", "params_file")]
        files = entry.get("files") or ()
        named += files.values() if isinstance(files, dict) else files
        named = [self.folder / file for file in named if file]
        if not named:  # <case>.npz and <case>.safetensors
            named = [self.folder / f"{name}{end}" for end in (".npz", ".safetensors")]
            named = [file for file in named if file.exists()]
        for file in named:
            if not file.is_file():
                raise ManifestError(f"{file.name} is missing")
        data = [file for file in named if file.suffix == ".npz"]
        if not data:
            raise ManifestError("no .npz file is named")
        return data, [file for file in named if file.suffix == ".safetensors"]


def load_manifest(folder: str | Path) -> Manifest:
    """Reads `folder`/manifest.json.

    Raises:
        ManifestError: there is no such folder or manifest, or it is not usable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ManifestError(f"{folder} is not a folder; give the folder of one system's vectors")
    path = folder / "manifest.json"
    if not path.is_file():
        inner = sorted(p.parent.name for p in folder.glob("*/manifest.json"))
        hint = f"; it has folders with one: {', '.join(inner)}" if inner else ""
        raise ManifestError(f"{folder} has no manifest.json{hint}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ManifestError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("system"), str):
        raise ManifestError(f"{path} names no system")
    cases = content.get("cases")
    try:
        if isinstance(cases, list):
            cases = {entry["name"]: entry for entry in cases}
        cases = {name: dict(entry) for name, entry in cases.items()}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ManifestError(f"{path}: cases is neither a dict nor a list of named ones") from error
    if not cases:
        raise ManifestError(f"{path} has no cases")
    system = re.sub(r"[^a-z0-9]+", "_", content["system"].lower()).strip("_")
    return Manifest(folder, system, content, cases)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile and zlib have errors of their own
        raise ManifestError(f"{path.name} cannot be read: {error}") from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise ManifestError(f"{path.name} cannot be read: {error}") from error
