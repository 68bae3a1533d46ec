"""Finding config files and saving a run's config as JSON."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import sys
import traceback
import types
import typing
from pathlib import Path
from typing import Any

from .. import __version__
from .errors import UserError
from .files import write_atomic
from .override import diff, field_types, matches, nearest, type_name
from .schema import DATA, NETS, PROCESSES, SAMPLES, Run

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# Fields that may change when a run is continued; every other change needs a new run.
CHANGEABLE = ("steps", "mesh", "log", "eval", "checkpoint", "sample")
CHANGEABLE += ("data.workers", "data.cache", "data.images.workers")  # batches do not depend on them

FIRST_KINDS = {"data": "text", "sample": "text"}  # before there were others
_UNIONS = (typing.Union, types.UnionType)
KINDS = {"net": NETS, "process": PROCESSES, "data": DATA, "sample": SAMPLES}


# ---------------------------------------------------------------- config files


def list_configs() -> list[tuple[str, str]]:
    """The configs that come with lintime: (name, first line of the docstring), sorted by name."""
    found = []
    for path in sorted(CONFIGS.rglob("*.py")):
        if not path.name.startswith("_"):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            name = path.relative_to(CONFIGS).with_suffix("").as_posix()
            found.append((name, text.partition("\n")[0]))
    return found


def load_config(name_or_path: str) -> tuple[Run, str]:
    """Loads a config by its name under configs/ (`transformer_vq/quickstart`) or a user's .py file.

    Returns:
        The `Run` and its name (a user's file is named by its stem).

    Raises:
        UserError: no such config or file, an error inside the file (with file and line), or no
            `config = Run(...)` in it.
    """
    path = Path(name_or_path)
    if path.suffix == ".py":
        if not path.is_file():
            raise UserError(f"config file {name_or_path} does not exist; check the path")
        if not path.resolve().is_relative_to(CONFIGS):
            return _config_of(_execute(path), name_or_path), path.stem
        name_or_path = path.resolve().relative_to(CONFIGS).with_suffix("").as_posix()
    names = [name for name, _ in list_configs()]
    if name_or_path not in names:
        hint = nearest(name_or_path, names, "/")
        raise UserError(
            f"unknown config {name_or_path!r}{hint or ';'} `lintime train --list` shows all "
            "configs; a config file of your own ends in .py"
        )
    module = importlib.import_module(f"..configs.{name_or_path.replace('/', '.')}", __package__)
    return _config_of(module, name_or_path), name_or_path


def _execute(path: Path) -> Any:
    """Runs a user's config file as a module, from its source (no bytecode cache to go stale)."""
    name = f"lintime_config_{path.stem}"
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    sys.modules[name] = module  # dataclasses defined in the file look their module up
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except SyntaxError as error:
        message = f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
        raise UserError(message) from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        message = " ".join(str(error).split())
        raise UserError(f"{where}: {type(error).__name__}: {message}") from error
    return module


def _config_of(module: Any, path: str) -> Run:
    config = getattr(module, "config", None)
    if not isinstance(config, Run):
        got = f"; its `config` is a {type(config).__name__}" if config is not None else ""
        raise UserError(f"{path} must define `config = Run(...)` (lintime.train.schema.Run){got}")
    return config


# ---------------------------------------------------------------- saved configs


def to_json(run: Run) -> dict:
    """The run as a JSON object: tuples as lists, `kind` naming the class of net and process."""
    return {"lintime_version": __version__, **_to_json(run)}


def from_json(data: dict) -> Run:
    """Inverse of `to_json`: `from_json(to_json(run)) == run`, also after a trip through a file.

    Raises:
        UserError: a field or kind that this version lacks, one without a default that the file
            lacks, or a value of another type, by name.
    """
    if not isinstance(data, dict):
        raise UserError(f"saved config: expected an object, got {type(data).__name__}")
    data = dict(data)
    version = data.pop("lintime_version", "another version")
    try:
        return _from_json(data, Run, "")
    except UserError as error:
        raise UserError(
            f"saved config: {error} (written by lintime {version}, this is {__version__})"
        ) from None


def save_config(run: Run, path: str | os.PathLike) -> None:
    """Writes `to_json(run)` to `path`, atomically."""
    write_atomic(path, json.dumps(to_json(run), indent=2, allow_nan=False) + "\n")


def read_config(path: str | os.PathLike) -> Run:
    """Reads a config written by `save_config`.

    Raises:
        UserError: the file is missing or damaged, or was written by a version with other fields.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name the directory of a run with --run") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it or pass --fresh") from error
    return from_json(data)


def check_continuation(saved: Run, requested: Run) -> None:
    """Checks that `requested` may continue the run that `saved` started.

    Only `steps`, `mesh`, `log`, `eval`, `checkpoint` and `sample` may differ. With
    `optim.decay_steps=0` the schedule ends at `steps`, so changing `steps` bends the schedule from
    here on; that is accepted.

    Raises:
        UserError: names every other field that differs, with both values.
    """
    changed = [
        f"{path} ({old!r} -> {new!r})"
        for path, old, new in diff(saved, requested)
        if not _may_change(re.sub(r"^(stages\.\d+\.)*", "", path))
    ]
    if changed:
        raise UserError(
            f"this run was started with other settings: {', '.join(changed)}; keep the saved "
            "values to continue it, or pass --fresh to start a new run"
        )


def _may_change(path: str) -> bool:
    return path in CHANGEABLE or path.partition(".")[0] in CHANGEABLE


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_json(v) for v in value]
    if not dataclasses.is_dataclass(value):
        return value
    result = {name: _to_json(getattr(value, name)) for name in field_types(type(value))}
    for field, kinds in KINDS.items():
        if isinstance(value, Run):
            part = getattr(value, field)
            kind = next((k for k, cls in kinds.items() if cls is type(part)), None)
            if kind is None:
                raise unknown_kind(field, type(part).__name__, kinds)
            result[field] = {"kind": kind, **result[field]}
    return result


def _from_json(data: Any, annotation: Any, path: str) -> Any:
    if typing.get_origin(annotation) in _UNIONS and isinstance(data, list):
        options = [a for a in typing.get_args(annotation) if typing.get_origin(a) is tuple]
        annotation = options[0] if options else annotation
    if typing.get_origin(annotation) is tuple and isinstance(data, list):
        args = typing.get_args(annotation)
        each = [args[0]] * len(data) if args[-1] is Ellipsis else args
        value = tuple(_from_json(d, a, f"{path}[{i}]") for i, (d, a) in enumerate(zip(data, each)))
        data = value if len(data) == len(each) else tuple(data)
    if not dataclasses.is_dataclass(annotation):
        if not matches(data, annotation):
            raise UserError(f"{path}: expected {type_name(annotation)}, got {data!r}")
        return data
    if not isinstance(data, dict):
        raise UserError(f"{path or 'config'}: expected an object, got {data!r}")
    prefix, types = f"{path}." if path else "", field_types(annotation)
    for name in data:
        if name not in types:
            raise UserError(f"unknown field {prefix + name!r}{nearest(name, list(types))}")
    fields, defaults = {}, {f.name: f.default for f in dataclasses.fields(annotation)}
    for name, field_type in types.items():
        if name not in data:
            if defaults[name] is dataclasses.MISSING:
                raise UserError(f"field {prefix + name!r} is missing")
            continue  # written before there was such a field: its default changes nothing
        part = data[name]
        if annotation is Run and name in KINDS:
            part = dict(part) if isinstance(part, dict) else {}
            kind = part.pop("kind", FIRST_KINDS.get(name))
            if kind not in KINDS[name]:
                raise unknown_kind(prefix + name, kind, KINDS[name])
            field_type = KINDS[name][kind]
        fields[name] = _from_json(part, field_type, prefix + name)
    return annotation(**fields)


def unknown_kind(path: str, kind: Any, kinds: dict) -> UserError:
    """The error for a part of a run that is none of the known kinds."""
    known = ", ".join(sorted(kinds))
    return UserError(f"{path}: unknown kind {kind!r}; known kinds: {known}")
