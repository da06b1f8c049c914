"""A lock that lets one process at a time use a folder. It names its holder and ends with the holder's process."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .writing import is_dead, named, owner, partial_name

NAME = ".fastnce-lock"
MISSING = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""Error numbers of file systems without `flock`."""
UNSIGNED_SECONDS = 10
"""The content of a lock file younger than this may not be written yet."""


class InUse(ValueError):
    """Another process holds the lock. The message names the process and the remedies."""


@dataclass
class _Held:
    """A lock that this process holds: an open file descriptor, and the file to remove at the end."""

    number: int
    file: Path

    def release(self) -> None:
        """Remove the file and close the descriptor. A second call does nothing."""
        if self.number < 0:
            return
        # Remove the file before the lock is released: a waiting process then sees that it is gone and opens a new one.
        with suppress(OSError):
            if _is_named(self.number, self.file):
                self.file.unlink()
        number, self.number = self.number, -1
        os.close(number)


@contextmanager
def hold(
    folder: Path,
    what: str,
    remedy: str = "take another folder",
    *,
    name: str = NAME,
    wait: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Hold a folder's lock.

    The lock is the operating system's (`flock`). It ends with its process, also after kill -9. It works between
    machines if the shared disk passes it on, as NFS does. On a disk without `flock`, the existence of a file is the
    lock. If the process of such a file has ended on this machine, the lock is taken over. A file of another machine
    must be removed by hand.

    Args:
        folder: created if it does not exist; removed at the end if it was created here and is empty.
        what: what this process does, as shown to other processes, such as "fastnce train".
        remedy: the last alternative that the error message offers.
        name: of the locked file.
        wait: if given, wait for the lock instead of raising. It is called once, with a sentence that names the holder.

    Raises:
        InUse: another process holds the lock.
        OSError: the folder cannot be written.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    reported = False
    held: _Held | None = None

    def leave() -> None:
        if held is not None:
            held.release()
        else:
            _clear(path)
        for place in made:
            with suppress(OSError):  # not empty
                place.rmdir()

    try:  # a signal may arrive at any moment from here on
        while (held := _take(path, what)) is None:
            sentence = f"{folder} is in use by {_holder(path)}"
            if wait is None:
                raise InUse(f"{sentence}: wait until it ends, stop it, or {remedy}")
            if not reported:
                wait(f"{sentence}; waiting until it ends")
                reported = True
            time.sleep(0.2)
        yield
    finally:
        try:
            leave()
        except BaseException:  # a signal: its handler raises only once, so the second call completes
            leave()
            raise


def _clear(path: Path) -> None:
    """Remove a lock file that a signal has left between its creation and its lock: it is empty, and nobody locks it."""
    with suppress(OSError, _NoLocks):
        number = os.open(path, os.O_RDWR)
        try:
            if os.fstat(number).st_size == 0 and _lock(number) and _is_named(number, path):
                path.unlink()
        finally:
            os.close(number)


def share(file: IO[bytes]) -> None:
    """Mark an open file as used, until its descriptor and all duplicates of it are closed. See `is_shared`.

    Nothing happens where the system or the disk has no `flock`.
    """
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def is_shared(path: Path) -> bool:
    """Whether a process has marked this file with `share`; False if the system cannot tell.

    Raises:
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        try:
            return not _lock(file.fileno())
        except (_NoLocks, OSError):
            return False


def _take(path: Path, what: str) -> _Held | None:
    """Take the lock; None if another process has it."""
    try:
        while True:
            number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            free = there = False
            try:
                free = _lock(number)
                there = free and _is_named(number, path)
                if there:
                    return _signed(_Held(number, path), what)
            except BaseException:
                if there:
                    _Held(number, path).release()
                else:
                    os.close(number)
                raise
            os.close(number)
            if not free:
                return None
    except _NoLocks:
        with suppress(OSError):
            path.unlink()
        return _take_file(_owner_file(path), what)
    except OSError as error:
        raise named(error, path) from None


class _NoLocks(Exception):
    """This system or disk does not support `flock`."""


def _lock(number: int) -> bool:
    try:
        import fcntl
    except ImportError:
        raise _NoLocks from None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in MISSING:
            raise _NoLocks from None
        raise
    return True


def _is_named(number: int, path: Path) -> bool:
    """Whether the locked file still has this name. Its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:
        return False


def _take_file(file: Path, what: str) -> _Held | None:
    """Take the lock as `_take` does, without `flock`: the process that creates the file has the lock."""
    try:
        return _signed(_Held(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), file), what)
    except FileExistsError:
        found = _read(file)
    if found and not is_dead(str(found.get("machine")), int(found["pid"]), str(found.get("born"))):
        return None
    stale = file.with_name(partial_name())
    try:
        if not found and time.time() - file.stat().st_mtime < UNSIGNED_SECONDS:
            return None
        file.rename(stale)
        if _read(stale) != found:  # another process was faster, and this is its lock
            os.replace(stale, file)
            return None
        stale.unlink()
    except FileNotFoundError:
        pass
    return _take_file(file, what)


def _owner_file(path: Path) -> Path:
    return path.with_name(f"{path.name}-owner")


def _signed(held: _Held, what: str) -> _Held:
    machine, pid, born = owner()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    facts = {"what": what, "pid": pid, "host": socket.gethostname(), "since": since, "machine": machine, "born": born}
    with suppress(OSError):  # a full disk: the lock works without its content
        os.ftruncate(held.number, 0)
        os.write(held.number, json.dumps(facts).encode())
    return held


def _read(file: Path) -> dict[str, Any]:
    """Read the holder's facts; an empty dict if they cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8", errors="replace")[:10_000])
        return found if isinstance(found, dict) and type(found.get("pid")) is int else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _holder(path: Path) -> str:
    for file in (path, _owner_file(path)):
        if found := _read(file):
            who = f"process {found['pid']} on {found.get('host')}, since {found.get('since')}"
            end = f", or is no longer there: then remove {file}" if file != path else ""
            return f"{found.get('what')} ({who}{end})"
    return f"another process (its lock is {path})"


def in_use(folder: Path, *, name: str = NAME) -> dict[str, Any] | None:
    """The facts of the process that holds a folder's lock: `pid`, `host`, `since`; None if no living process does.

    A process on another machine counts as living. Nothing is locked, so this disturbs nobody.
    """
    path = folder / name
    for file in (path, _owner_file(path)):
        found = _read(file)
        if found and not is_dead(str(found.get("machine")), int(found["pid"]), str(found.get("born"))):
            return found
    return None
