"""Command-line overrides `a.b=value`, parsed against the annotations of the config dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from .errors import UserError
from .schema import Run

_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_INT = re.compile(r"[+-]?\d+(_\d+)*")
_PATCH = re.compile(r"\d+(x\d+)+")  # a tuple within a tuple: 1x2x2,2x4x4
_EXPONENT_INT = re.compile(r"[+-]?\d+(\.\d+)?[eE]\+?\d{1,2}")


def apply_overrides(run: Run, overrides: Sequence[str]) -> Run:
    """Returns `run` with every `path=value` of `overrides` applied, in order.

    Values are parsed by the field's annotation: int (`1000`, `10_000`, `1e4`), float, bool
    (true/false, yes/no, 1/0), str (taken as it is), tuples (`1,2,3`; within another one `1x2x3`),
    optional values (`none`). A stage is named by its number (`stages.0.steps=100`).

    Raises:
        UserError: a missing "=", an unknown field, a whole group of fields, or a value of another
            type; one line each.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        path = path.strip()
        if not equals:
            raise UserError(f"override {override!r} has no '='; write it as FIELD=VALUE")
        run = _replace(run, path.split("."), text, run, path)
    return run


def list_fields(run: Run) -> list[tuple[str, str, Any]]:
    """Every field that can be overridden, as (path, type name, value), in the order declared."""
    return [
        (path, type_name(annotation), value)
        for path, annotation, value in leaves(run)
        if not any(map(dataclasses.is_dataclass, typing.get_args(annotation)))
    ]


def diff(a: Run, b: Run) -> list[tuple[str, Any, Any]]:
    """Fields in which two runs differ, as (path, value in `a`, value in `b`).

    Where a part is of another kind altogether (`net`), the part is listed once with the names of
    its two classes; stages are compared one by one (`stages.0.steps`) if their number is the same.
    """
    return list(_diff(a, b, ""))


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (path, annotation, value) of every field that is not itself a dataclass."""
    for name, annotation in field_types(type(config)).items():
        value = getattr(config, name)
        if _is_group(value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, annotation, value


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Field names of a dataclass with their resolved annotations."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def type_name(annotation: Any) -> str:
    """`int`, `tuple[int, ...]`, `int | None`: an annotation as a reader would write it."""
    if annotation is Any:
        return "any"
    if annotation is type(None):
        return "None"
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(type_name(a) for a in typing.get_args(annotation))
    plain = isinstance(annotation, type) and not typing.get_args(annotation)
    return annotation.__name__ if plain else str(annotation).replace("typing.", "")


def matches(value: Any, annotation: Any) -> bool:
    """Whether `value` is exactly of the annotated type (an int counts as a float, a bool does not).

    Floats must be finite.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(matches(v, args[0]) for v in value)
        return len(value) == len(args) and all(map(matches, value, args))
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value)
    if annotation in (int, bool, str):
        return type(value) is annotation
    return isinstance(value, annotation)


def nearest(name: str, names: Sequence[str], separator: str = ".") -> str:
    """`; did you mean X?` for the `names` most like `name`, or "" where none is.

    Names that share the last part come first, then the closest by spelling.
    """
    last = {n: n.rpartition(separator)[2] for n in names}
    leaf = name.rpartition(separator)[2]
    found = [n for n in names if last[n] == leaf]
    if not found:
        found = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
        ratio = {n: difflib.SequenceMatcher(None, n, name).ratio() for n in found}
        found = [n for n in found if ratio[n] > ratio[found[0]] - 0.1]
    if not found:
        close = difflib.get_close_matches(leaf, last.values(), n=1, cutoff=0.6)
        found = [n for n in names if last[n] in close]
    if not found:
        return ""
    *others, final = found[:3]
    return f"; did you mean {', '.join(others)}{' or ' if others else ''}{final}?"


def _replace(config: Any, parts: list[str], text: str, run: Run, path: str) -> Any:
    name, rest = parts[0], parts[1:]
    if isinstance(config, tuple):  # stages.0.steps=100
        if not name.isdigit() or int(name) >= len(config) or not rest:
            raise UserError(f"{path}: there are {len(config)} stages; write stages.0.FIELD=VALUE")
        at = int(name)
        return (*config[:at], _replace(config[at], rest, text, run, path), *config[at + 1 :])
    annotations = field_types(type(config)) if _is_group(config) else {}
    if name not in annotations:
        hint = nearest(path, [p for p, _, _ in leaves(run)])
        raise UserError(f"unknown field {path!r}{hint or '; see the fields with --help-fields'}")
    value = getattr(config, name)
    if rest:
        return dataclasses.replace(config, **{name: _replace(value, rest, text, run, path)})
    if _is_group(value):
        example = next(leaves(value, f"{path}."), (f"{path}.FIELD", None, None))[0]
        raise UserError(
            f"{path} is a group of fields and cannot be replaced as a whole; set its fields one by "
            f"one ({example}=...) or start from another config (lintime train --list)"
        )
    value = _parse(text, annotations[name], path)
    try:
        return dataclasses.replace(config, **{name: value})
    except ValueError as error:  # of a class that checks itself
        raise UserError(f"{path}={text}: {error}") from error


def _parse(text: str, annotation: Any, path: str) -> Any:
    try:
        return _parse_as(text, annotation)
    except _Unparsable as error:
        raise UserError(f"{path}: {error}") from None
    except ValueError:
        expected = "bool (true or false)" if annotation is bool else type_name(annotation)
        raise UserError(f"{path}: expected {expected}, got {text!r}") from None


class _Unparsable(ValueError):
    """The annotation, not the text, is beyond a command line."""


def _parse_as(text: str, annotation: Any) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is str:
        return text
    word = text.strip()
    if annotation is bool:
        if word.lower() not in _BOOLS:
            raise ValueError
        return _BOOLS[word.lower()]
    if annotation is int:
        if _INT.fullmatch(word):
            return int(word)
        if _EXPONENT_INT.fullmatch(word) and float(word).is_integer():
            return int(float(word))
        raise ValueError
    if annotation is float:
        number = float(word)
        if not math.isfinite(number):
            raise ValueError
        return number
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and word.lower() in ("none", "null"):
            return None
        for option in args:
            if option is not type(None):
                try:
                    return _parse_as(text, option)
                except ValueError:
                    continue
        raise ValueError
    if origin is typing.Literal:
        for option in args:
            if str(option) == word:
                return option
        raise ValueError
    if origin is tuple and not any(dataclasses.is_dataclass(a) for a in args):
        if word[:1] + word[-1:] in ("()", "[]"):
            word = word[1:-1]
        separator = "x" if Ellipsis not in args and _PATCH.fullmatch(word) else ","
        items = [item for item in word.rstrip(", ").split(separator) if word.strip(", ")]
        if len(args) == 2 and args[1] is Ellipsis:
            args = (args[0],) * len(items)
        if len(items) != len(args):
            raise ValueError
        return tuple(map(_parse_as, items, args))
    raise _Unparsable(
        f"a {type_name(annotation)} cannot be given on the command line; "
        "write it in a config file of your own"
    )


def _is_group(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _diff(a: Any, b: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if _is_group(a) and type(a) is type(b):
        for name in field_types(type(a)):
            yield from _diff(getattr(a, name), getattr(b, name), f"{path}.{name}" if path else name)
    elif _is_group(a) or _is_group(b):
        yield path, type(a).__name__, type(b).__name__
    elif isinstance(a, tuple) and isinstance(b, tuple) and any(map(_is_group, a + b)):
        if len(a) != len(b):
            yield path, f"{len(a)} parts", f"{len(b)} parts"
        else:
            for i, (x, y) in enumerate(zip(a, b)):
                yield from _diff(x, y, f"{path}.{i}")
    elif a != b:
        yield path, a, b
