"""Files that appear whole or not at all, and errors that name the file."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def named(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """The same error with a name that the user knows: a full disk's has none, a rename's has the temporary one."""
    if error.filename is not None and error.filename2 is None and not Path(error.filename).name.startswith("."):
        return error
    return OSError(error.errno, error.strerror or str(error), os.fspath(path))


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Where to write a file; it is renamed to `path` at the end, and removed if there is an error.

    The name is short, because `path` may have the longest name that the disk allows. It keeps the suffix.

    Raises:
        OSError: with `path` as its file name.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}{path.suffix.lower()}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise named(error, path) from None
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write aside, then rename; what is no regular file (a pipe, a device) is written to as it is.

    Raises:
        OSError: with `path` as its file name; nothing is left behind.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        try:
            path.write_bytes(data)
        except OSError as error:
            raise named(error, path) from None
        return
    with aside(Path(os.path.realpath(path))) as partial:  # a link stays one
        partial.write_bytes(data)
