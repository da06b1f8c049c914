"""Files that appear whole or not at all, what killed processes leave of them, and errors that name the file."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import socket
import unicodedata
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

PARTIAL = re.compile(r"\.fastnce-(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<born>[0-9a-f]{8})-[0-9a-f]{8}(?:\.\w+)?")
"""Names of what is not finished yet: whose it is, and something random."""


def named(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """The same error with a name that the user knows: a full disk's has none, a rename's has the temporary one."""
    if error.filename is not None and error.filename2 is None and not Path(error.filename).name.startswith("."):
        return error
    return OSError(error.errno, error.strerror or str(error), os.fspath(path))


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Where to write a file; at the end it is flushed to the disk and renamed to `path`, after an error removed.

    The name is short, because `path` may have the longest name that the disk allows. It keeps the suffix.

    Raises:
        OSError: with `path` as its file name.
    """
    partial = path.with_name(partial_name(path.suffix.lower()))
    try:
        yield partial
        flush_to_disk(partial)
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


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlive a power cut; not every disk can do so for folders."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def show_together(aside: Path, folder: Path, names: Iterable[str]) -> None:
    """Move what is complete from `aside` into `folder`: all of it, or nothing where an error or a signal comes."""
    names = list(names)
    try:
        for name in names:
            os.replace(aside / name, folder / name)
    except BaseException:
        for name in names:
            if not os.path.lexists(aside / name):
                with suppress(OSError):  # a disk that fails for good: the first error is the one to tell
                    os.replace(folder / name, aside / name)
        raise


def check_free(folder: Path, names: Iterable[str]) -> None:
    """ValueError where `folder` holds one of these names already, be it a link to nothing."""
    for name in names:
        if os.path.lexists(folder / name):
            raise ValueError(f"{folder / name} is there already: take another folder for --out")


def check_not_replaced(targets: Iterable[Path], sources: Iterable[Path]) -> None:
    """ValueError where writing a target would replace a source or another target, links followed."""
    originals = {os.path.realpath(source) for source in sources}
    written: dict[str, Path] = {}
    for target in targets:
        real = os.path.realpath(target)
        if real in originals:
            raise ValueError(f"{target} is read by this command and would be replaced: write to another place")
        if real in written:
            raise ValueError(f"{written[real]} and {target} are the same file (one is a link): write to another place")
        written[real] = target


def distinct_names(files: Iterable[Path], root: Path, suffix: str) -> dict[Path, Path]:
    """A name with `suffix` for each file, relative like the file to `root`: no two are the same on any kind of disk.

    Where a.jpg has taken a.png, the picture a.bmp becomes a.bmp.png. Some disks tell neither case nor the encoding of
    accents apart.
    """
    names: dict[Path, Path] = {}
    taken: set[str] = set()
    for file in files:
        name = file.relative_to(root).with_suffix(suffix)
        count = 1
        while (key := unicodedata.normalize("NFC", name.as_posix()).lower()) in taken:
            name = name.with_name(f"{file.name}{'' if count == 1 else f'-{count}'}{suffix}")
            count += 1
        taken.add(key)
        names[file] = name
    return names


# ---- what is not finished, and whose it is ----


def partial_name(suffix: str = "") -> str:
    """A hidden name that no other call gives; it tells which process writes there."""
    machine, pid, born = owner()
    return f".fastnce-{machine}-{pid}-{born}-{uuid.uuid4().hex[:8]}{suffix}"


def owner() -> tuple[str, int, str]:
    """This process: its machine, its number there, and when it was born, as numbers are given out again."""
    pid = os.getpid()
    return _machine(pid), pid, _born(pid)


def is_dead(machine: str, pid: int, born: str) -> bool | None:
    """Whether a process has ended; None where that cannot be known, because it runs on another machine."""
    if machine != _machine(os.getpid()) or os.name != "posix":
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's
        pass
    return _born(pid) != born


def sweep(folder: Path, *, held: bool = False) -> list[Path]:
    """Remove what dead processes left unfinished in a folder; returns what was removed.

    Args:
        held: this process holds the folder's lock, so what comes from other machines is nobody's either.
    """
    removed = []
    with suppress(OSError):
        for entry in sorted(folder.iterdir()):
            match = PARTIAL.fullmatch(entry.name)
            if match is None:
                continue
            dead = is_dead(match["machine"], int(match["pid"]), match["born"])
            if dead or (dead is None and held):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    with suppress(OSError):
                        entry.unlink()
                removed.append(entry)
    return removed


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


@functools.lru_cache(maxsize=2)
def _machine(pid: int) -> str:
    """The machine, or the container, whose numbers of processes these are; `pid` because a fork may change it."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return _short(f"{socket.gethostname()} {space}")


def _born(pid: int) -> str:
    """When a process was started, and in which session of the system; of zeros where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        # the second field is the program's name in parentheses, and may hold any character
        ticks = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "0" * 8
    return _short(f"{boot} {ticks}")
