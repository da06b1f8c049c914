"""One process at a time in a folder: a lock that ends with its process, however that ends, and says whose it is."""

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
from typing import Any

from .writing import is_dead, named, owner, partial_name

NAME = ".fastnce-lock"
MISSING = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""What disks without locks of this kind say."""
UNSIGNED_SECONDS = 10
"""So long a lock file without content may be one that is being written."""


class InUse(ValueError):
    """Another process holds the lock; the message says which, and what can be done."""


@dataclass
class _Held:
    """What holds a lock: a descriptor, and the file to remove at the end."""

    number: int
    file: Path

    def release(self) -> None:
        """Does nothing the second time."""
        if self.number < 0:
            return
        with suppress(OSError):  # while it is still held: whoever has opened it sees that it is gone, and tries anew
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

    The system's own lock (`flock`) is used. It ends with its process, also after kill -9, and holds between machines
    where the shared disk passes it on, as NFS does. Where a disk has no such locks, a file is the lock: one whose
    process has ended on this machine is taken over, one of another machine has to be removed by hand.

    Args:
        folder: made if need be, and removed at the end if it is still empty then.
        what: this process does, as others will read it, such as "fastnce train".
        remedy: what else the user may do; the end of the sentence.
        name: of the file that is locked.
        wait: given, nothing is refused; it is told once who is waited for.

    Raises:
        InUse: another process holds it.
        OSError: the folder cannot be written.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    told = False
    held: _Held | None = None

    def leave() -> None:
        if held is not None:
            held.release()
        for place in made:
            with suppress(OSError):  # not empty
                place.rmdir()

    try:  # from here on, as a signal may come at any moment
        while (held := _take(path, what)) is None:
            sentence = f"{folder} is in use by {_holder(path)}"
            if wait is None:
                raise InUse(f"{sentence}: wait until it ends, stop it, or {remedy}")
            if not told:
                wait(f"{sentence}; waiting until it ends")
                told = True
            time.sleep(0.2)
        yield
    finally:
        try:
            leave()
        except BaseException:  # a signal, whose handler raises once
            leave()
            raise


def _take(path: Path, what: str) -> _Held | None:
    """The lock, or None where another process has it."""
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
    """This system or disk has no locks of this kind."""


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
    """Whether the locked file still has this name: its last holder may have removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:
        return False


def _take_file(file: Path, what: str) -> _Held | None:
    """As `_take`, where the file is the lock: who makes it has it."""
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
        if _read(stale) != found:  # another process was quicker, and this is its lock
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
    with suppress(OSError):  # a full disk: the lock holds without its signature
        os.ftruncate(held.number, 0)
        os.write(held.number, json.dumps(facts).encode())
    return held


def _read(file: Path) -> dict[str, Any]:
    """What the holder wrote; empty where that cannot be read."""
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
