"""Atomic writing of files, removal of what killed processes left behind, errors that name the file."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import socket
import unicodedata
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

PARTIAL = re.compile(r"\.fastnce-(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<born>[0-9a-f]{8})-[0-9a-f]{8}(?:\.\w+)?")
"""Temporary names of unfinished files and folders: the writing process, and a random part."""


def named(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """Return the error with a file name that the user knows.

    The error of a full disk names no file, and that of a rename names the temporary file.
    """
    if error.filename is not None and error.filename2 is None and not Path(error.filename).name.startswith("."):
        return error
    return OSError(error.errno, error.strerror or str(error), os.fspath(path))


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, then flush it to the disk and rename it to `path`. Remove it after an error.

    The temporary name keeps the suffix. It is short, because `path` may have the longest name that the disk allows.

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
    """Write a temporary file, then rename it to `path`. A pipe or a device is written to directly.

    Raises:
        OSError: with `path` as its file name; no temporary file is left behind.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        try:
            path.write_bytes(data)
        except OSError as error:
            raise named(error, path) from None
        return
    with atomic_file(Path(os.path.realpath(path))) as partial:  # write to the target of a link, and keep the link
        partial.write_bytes(data)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk. Not every disk can flush folders."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def move_together(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Move all these names from `source` into `folder`. After an error or a signal, move them back."""
    names = list(names)
    try:
        for name in names:
            os.replace(source / name, folder / name)
    except BaseException:
        for name in names:
            if not os.path.lexists(source / name):
                with suppress(OSError):  # a disk that fails for good: raise the first error
                    os.replace(folder / name, source / name)
        raise


def check_free(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError if `folder` already holds one of these names, even as a broken link."""
    for name in names:
        if os.path.lexists(folder / name):
            raise ValueError(f"{folder / name} exists already: take another folder for --out")


FILES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".npy", ".gif", ".avif", ".heic"),
    *(".pth", ".pt", ".ckpt", ".safetensors", ".onnx", ".bin", ".zip"),
)
"""Suffixes of pictures and weights. A new folder of such a name would be a mistake."""


def check_folder(out: Path, holds: str) -> None:
    """Raise ValueError if `out` is a file, a link to nothing, or does not exist and is named like a file.

    Args:
        holds: what it will hold.
    """
    if out.is_symlink() and not out.exists():
        raise ValueError(f"{out} is a link to {os.readlink(out)}, which does not exist: make that folder first")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file is in the way, a folder is needed")
    if not out.exists() and out.suffix.lower() in FILES:
        raise ValueError(f"{out} is the name of a file, and a folder is needed: it will hold {holds}")


def check_not_replaced(targets: Iterable[Path], sources: Iterable[Path]) -> None:
    """Raise ValueError if writing a target would replace a source or another target. Links are followed."""
    originals = {os.path.realpath(source) for source in sources}
    written: dict[str, Path] = {}
    for target in targets:
        real = os.path.realpath(target)
        if real in originals:
            raise ValueError(f"{target} is read by this command and would be replaced: write to another place")
        if real in written:
            raise ValueError(f"{written[real]} and {target} are the same file (one is a link): write to another place")
        written[real] = target


def distinct_names(files: Iterable[Path], root: Path | Mapping[Path, Path], suffix: str) -> dict[Path, Path]:
    """Give each file a name with `suffix`, relative to `root` or its own root, so that no two are equal on any disk.

    If a.jpg has become a.png, then a.bmp becomes a.bmp.png. Names that differ only in case or in the encoding of
    accents count as equal, as some disks treat them.
    """
    names: dict[Path, Path] = {}
    taken: set[str] = set()
    for file in files:
        name = file.relative_to(root if isinstance(root, Path) else root[file]).with_suffix(suffix)
        count = 1
        while (key := unicodedata.normalize("NFC", name.as_posix()).lower()) in taken:
            name = name.with_name(f"{file.name}{'' if count == 1 else f'-{count}'}{suffix}")
            count += 1
        taken.add(key)
        names[file] = name
    return names


# ---- unfinished files and their owners ----


def partial_name(suffix: str = "") -> str:
    """Return a new hidden name that identifies this process."""
    machine, pid, born = owner()
    return f".fastnce-{machine}-{pid}-{born}-{uuid.uuid4().hex[:8]}{suffix}"


def owner() -> tuple[str, int, str]:
    """Identify this process: machine, process number and start time (process numbers are reused)."""
    pid = os.getpid()
    return _machine(pid), pid, _born(pid)


def is_dead(machine: str, pid: int, born: str) -> bool | None:
    """Whether a process has ended; None if that is unknown because it runs on another machine."""
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
    """Remove the unfinished files and folders of dead processes; return the removed paths.

    Args:
        held: this process holds the folder's lock, so unfinished files of other machines are removed too.
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
    """Identify the machine or container that numbers the processes. `pid` is the cache key, as a fork may change it."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return _short(f"{socket.gethostname()} {space}")


def _born(pid: int) -> str:
    """Digest of a process's start time and the system's boot; zeros if the system does not report them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        # The second field is the program's name in parentheses and may hold any character.
        ticks = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "0" * 8
    return _short(f"{boot} {ticks}")
