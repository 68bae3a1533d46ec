"""Writing files that are never half there, and errors that say so when the disk is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .errors import UserError


def write_error(error: OSError, path: str | os.PathLike) -> UserError:
    """The one-line error for a failed write of `path`."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return UserError(
            f"no space left on device while writing {path}; nothing already saved was lost; "
            "free space and run the same command again"
        )
    reason = error.strerror or error
    return UserError(f"cannot write {path}: {reason}; check the path and its permissions")


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes `content` to a temporary file beside `path` and renames it: all of it or nothing.

    Raises:
        UserError: the disk is full or the path cannot be written; the old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(error, path) from error
