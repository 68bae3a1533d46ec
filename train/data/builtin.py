"""`builtin:python-docs`: English and code that every Python installation carries.

The documents are the language reference shown by `help()` (`pydoc_data.topics`) and the sources of
the standard library's pure Python modules, about 8 MB. Their exact content depends on the Python
version; the data fingerprint holds a content hash, so a run is not silently continued on another
version's texts.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
from pathlib import Path

from ..errors import UserError
from .documents import Segment, reason

# Packages read besides the top-level modules; one that a Python version lacks is left out.
PACKAGES = (
    "asyncio", "collections", "concurrent", "dbm", "email", "html", "http", "importlib", "json",
    "logging", "multiprocessing", "pathlib", "re", "sqlite3", "tomllib", "unittest", "urllib",
    "wsgiref", "xml", "xmlrpc", "zipfile", "zoneinfo",
)  # fmt: skip
_TESTS = {"test", "tests"}


@functools.lru_cache(maxsize=1)
def python_docs() -> tuple[Segment, ...]:
    """All documents in a fixed order (help topics, then files, both by name), each one in memory.

    Duplicates are dropped, so that no text is in both the training and the validation split.

    Raises:
        UserError: this Python installation carries neither.
    """
    texts = _topics() | _sources()
    documents, seen = [], set()
    for name, data in texts.items():
        if data and data not in seen:
            seen.add(data)
            documents.append(Segment(name, data, 0, len(data)))
    if not documents:
        raise UserError(
            "this Python installation carries no library sources or help topics; "
            "set data.path to a text file"
        )
    return tuple(documents)


def _topics() -> dict[str, bytes]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    # Many topics are sections of larger ones ("while" of "compound"): keep what is mostly new.
    kept, seen = {}, set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [p for p in topics[name].split("\n\n") if len(p) >= 60]
        repeated = sum(len(p) for p in paragraphs if p in seen)
        if repeated <= 0.2 * len(topics[name]):
            seen.update(paragraphs)
            kept[f"topics/{name}"] = topics[name].encode("utf-8", "replace")
    return dict(sorted(kept.items()))


def _sources() -> dict[str, bytes]:
    library = Path(sysconfig.get_paths()["stdlib"])
    # Its own modules only: distributions and build systems put other files beside them.
    files = [path for path in library.glob("*.py") if path.stem in sys.stdlib_module_names]
    for package in PACKAGES:
        files += [
            path
            for path in library.joinpath(package).rglob("*.py")
            if _TESTS.isdisjoint(path.relative_to(library).parts[:-1])
        ]
    names = {path.relative_to(library).as_posix(): path for path in files}
    try:
        return {f"lib/{name}": names[name].read_bytes() for name in sorted(names)}
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {reason(error)}; set data.path to a text file"
        ) from error
