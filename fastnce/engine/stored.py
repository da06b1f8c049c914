"""Reading one checkpoint, whatever lies there: see `checkpoint` for what it should be."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from . import state as states

POINTERS = ("latest", "good", "best")


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's folder is named after; None for other names."""
    match = re.fullmatch(r"step-(\d{1,18})", path.name)
    return int(match[1]) if match else None


def read_state(path: Path, files: tuple[str, ...] = states.FILES) -> dict[str, Any]:
    """`state.json` of a checkpoint, checked, after comparing files with the digests in it.

    Raises:
        ValueError, OSError: something is not what was written, or cannot be read; the message names the file in `path`.
    """
    state = states.read(path / "state.json", step_of(path))
    for name in files:
        if digest_of(path / name) != state["sha256"][name]:
            raise ValueError(f"{name} is not what was written")
    return state


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, whose sizes are checked before any memory is taken.

    Raises:
        ValueError: no such file of tensors; the message has the file's name without its folder.
    """
    try:
        return load_file(file)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the library's own, and KeyError for kinds of numbers that PyTorch does not have
        raise ValueError(f"{file.name} is no file of tensors: {error}") from None


def load_generators(folder: Path, state: dict[str, Any] | None = None) -> dict[str, dict[str, Tensor]]:
    """The generators' state dicts, by name ("G"; "G_A", "G_B"), of a checkpoint folder.

    Args:
        state: of `read_state`, where that was called.

    Raises:
        ValueError, OSError: as `read_state`, or tensors of something that is no generator.
    """
    if state is None:
        state = read_state(folder, ("generator.safetensors",))
    names: dict[str, dict[str, Tensor]] = {name: {} for name in state["generators"]}
    for key, tensor in read_tensors(folder / "generator.safetensors").items():
        name, _, parameter = key.partition("/")
        if name not in names or not parameter:
            raise ValueError(f"generator.safetensors holds {key!r}, which belongs to none of {', '.join(names)}")
        names[name][parameter] = tensor
    return names


def follow(path: Path) -> Path:
    """The checkpoint that a pointer, such as RUN/checkpoints/best, names; any other path as it is.

    Raises:
        ValueError: the pointer names no checkpoint.
    """
    if path.name not in POINTERS or not path.is_file():
        return path
    try:
        name = path.read_bytes()[:100].decode("ascii").strip()
    except UnicodeDecodeError:
        name = ""
    target = path.parent / name
    if step_of(target) is None or target.name != name:
        raise ValueError(f"{path} should hold the name of a checkpoint beside it, such as step-00001000")
    if not (target / "state.json").exists():
        raise ValueError(f"{path} names {name}, which is not there any more: name another checkpoint of {path.parent}")
    return target


def reason_of(error: Exception) -> str:
    """What is wrong with a checkpoint, in the words of its error."""
    if isinstance(error, OSError):
        where = f"{Path(os.fsdecode(error.filename)).name}: " if error.filename is not None else ""
        return f"{where}{error.strerror or error}"
    return str(error)


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
