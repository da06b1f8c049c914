"""Inject faults into a process at a chosen file operation. Use only in forks: hooks stay until the process ends.

Python calls an audit hook before it opens, renames, removes or creates a file; the hook then raises, kills or signals.
`os.fsync` and `os.write` are wrapped. Two limits also affect libraries that write without Python: the size of files
(`limit_files`), up to which a write is done in part, and the size of the disk (`on_a_small_disk`).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from .common import Child

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NAMED = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")
PLACES = {"os.rename": (2, 3), "os.remove": (1,), "os.mkdir": (2,), "os.rmdir": (1,), "os.chmod": (2,)}
"""Positions of the folder descriptors in the arguments of an event; names are relative to these folders."""


@dataclass(frozen=True)
class Event:
    """A file operation.

    Args:
        name: of the audit event.
        paths: absolute; empty for writes to a descriptor.
        part: performs a part of a write.
    """

    name: str
    paths: tuple[str, ...]
    part: Callable[[], object]


Action = Callable[[Event], None]


class Events:
    """Count the file operations in some folders, and act at a chosen count.

    Args:
        folders: operations elsewhere do not count.
        reads: whether opening files for reading counts.
    """

    def __init__(self, *folders: Path, reads: bool = False):
        self._folders = tuple(os.path.realpath(folder) for folder in folders)
        self._reads = reads
        self._shared = mmap.mmap(-1, 8)  # shared memory, which the parent reads after the child's end
        self._number, self._again, self._acting = 0, False, False
        self._action: Action | None = None

    @property
    def count(self) -> int:
        return int.from_bytes(self._shared[:8], "little")

    def watch(self, number: int = 0, action: Action | None = None, again: bool = False) -> Callable[[], None]:
        """Return a `prepare` of a child that counts and acts at event `number` (from 1), and with `again` after it."""

        def prepare() -> None:
            self._number, self._action, self._again = number, action, again
            sys.addaudithook(self._audit)
            self._wrap("fsync", lambda descriptor: None)
            self._wrap("write", lambda descriptor, data: write(descriptor, memoryview(data)[: len(data) // 2]))

        write = os.write
        return prepare

    def _wrap(self, name: str, part: Callable[..., object]) -> None:
        function = getattr(os, name)

        def wrapped(descriptor: int, *arguments):
            where = [_path_of(descriptor)]
            self._happens(Event(f"os.{name}", (), lambda: part(descriptor, *arguments)), where)
            return function(descriptor, *arguments)

        setattr(os, name, wrapped)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "open":
            if self._reads or (isinstance(arguments[2], int) and arguments[2] & WRITES):
                path = _absolute(arguments[0])
                self._happens(Event(event, (path,), lambda: None), [path])
        elif event in NAMED:
            folders = [arguments[place] for place in PLACES.get(event, ())]
            names = [name for name in arguments[:2] if isinstance(name, str | bytes | os.PathLike)]
            paths = [_absolute(n, folders[i] if i < len(folders) else -1) for i, n in enumerate(names)]
            self._happens(Event(event, tuple(paths), lambda: None), paths)

    def _happens(self, event: Event, paths: list[str]) -> None:
        if self._acting or not any(path.startswith(self._folders) for path in paths):
            return
        count = self.count + 1
        self._shared[:8] = count.to_bytes(8, "little")
        if self._action is not None and (count == self._number or (self._again and count > self._number)):
            self._acting = True  # operations of the action are not counted
            try:
                self._action(event)
            finally:
                self._acting = False


def _path_of(descriptor: object) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def _absolute(name: object, folder: object = -1) -> str:
    if not isinstance(name, str | bytes | os.PathLike):
        return ""
    text = os.fsdecode(name)
    if isinstance(folder, int) and folder >= 0 and not os.path.isabs(text):
        text = os.path.join(_path_of(folder), text)
    path = os.path.abspath(text)
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def kill(event: Event) -> None:
    """An action: write a part, then kill the process."""
    event.part()
    os.kill(os.getpid(), signal.SIGKILL)


def sending(number: int) -> Action:
    """Return an action that sends a signal to this process."""
    return lambda event: os.kill(os.getpid(), number)


def failing(number: int) -> Action:
    """Return an action that raises the system error `number` with its file names. Removing files does not fail."""

    def fail(event: Event) -> None:
        if event.name in ("os.remove", "os.rmdir", "os.truncate"):
            return
        first, second = (*event.paths, None, None)[:2]
        raise OSError(number, os.strerror(number), first, None, second)

    return fail


def limit_files(size: int, deadly: bool = False) -> None:
    """Limit the size of files: a write beyond `size` bytes is done in part, then fails.

    Args:
        deadly: the write kills the process instead.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def log_uniform(rng: Random, low: int, high: int) -> int:
    """Return a number from low to high, with a uniform logarithm."""
    return round(low * (high / low) ** rng.random())


def fill(folder: Path, leave: int) -> None:
    """Fill the disk of a folder with the file `filler`, except for about `leave` bytes."""
    state = os.statvfs(folder)
    with (folder / "filler").open("wb") as file:
        file.write(bytes(max(0, state.f_bavail * state.f_bsize - leave)))


def on_a_small_disk(folder: Path, size: int, work: Callable[[], tuple[str, list[str]]]) -> tuple[str, list[str]] | str:
    """Call `work` in a process for which `folder` is a disk of `size` bytes, which disappears with the process.

    Returns:
        the result of `work`, or a text with the reason if the system does not allow it.
    """

    def live() -> int:
        problem = _mount(folder, size)
        print(json.dumps(problem or work()), flush=True)
        return 0

    ended = Child(work=live).end(600.0)
    try:
        found = json.loads(ended.out.splitlines()[-1])
    except (ValueError, IndexError):
        raise RuntimeError(f"the process with a small disk failed: {ended.code} {ended.err}") from None
    return found if isinstance(found, str) else (found[0], found[1])


def _mount(folder: Path, size: int) -> str:
    """Mount a small disk for this process; return the reason if this fails, else an empty text."""
    space, user, private, recursive = 0x00020000, 0x10000000, 1 << 18, 16384
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "unshare"):
        return "this system has no mount namespaces"
    owner, group = os.getuid(), os.getgid()
    if library.unshare(space):
        if library.unshare(space | user):
            return f"no mount namespace for a process: {os.strerror(ctypes.get_errno())}"
        try:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {owner} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        except OSError as error:
            return f"no mount namespace for a process: {error.strerror}"
    library.mount(b"none", b"/", None, private | recursive, None)
    if library.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()):
        return f"no small disk can be mounted: {os.strerror(ctypes.get_errno())}"
    return ""
