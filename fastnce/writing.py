"""Files that appear whole or not at all, and errors that name the file."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def named(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """The same error with a name that the user knows: a full disk's has none, a rename's has the temporary one."""
    if error.filename is not None and error.filename2 is None and not Path(error.filename).name.startswith("."):
        return error
    return OSError(error.errno, error.strerror or str(error), os.fspath(path))


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write aside, then rename; what is no regular file (a pipe, a device) is written to as it is.

    Raises:
        OSError: with `path` as its file name; nothing is left behind.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        path = Path(os.path.realpath(path))  # a link stays one
        partial = path.with_name(f".{uuid.uuid4().hex}.partial")  # short: the name itself may have the longest length
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise named(error, path) from None
