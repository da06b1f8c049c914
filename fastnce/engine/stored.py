"""Read one checkpoint, which may be damaged (see `checkpoint` for its layout)."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file
from torch import Tensor

from ..common.imports import CodeError
from . import state_file

POINTERS = ("latest", "good", "best")
"""Files that name a checkpoint beside them. So do epoch-20 and so on (`kept_epoch`)."""


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None for other names."""
    match = re.fullmatch(r"step-(\d{1,18})", path.name)
    return int(match[1]) if match else None


def kept_epoch(path: Path) -> int | None:
    """The epoch in the name of a pointer such as epoch-20, which `run.keep_epochs` writes; None for other names."""
    match = re.fullmatch(r"epoch-([1-9]\d{0,17})", path.name)
    return int(match[1]) if match else None


def kept_epochs(run: Path) -> list[int]:
    """The epochs whose checkpoints a run keeps for good and still has, in order."""
    pointers = [path for path in (run / "checkpoints").glob("epoch-*") if kept_epoch(path)]
    return sorted(kept_epoch(path) or 0 for path in pointers if _is_whole(path))


def _is_whole(pointer: Path) -> bool:
    try:
        return pointer.is_file() and (follow(pointer) / "state.json").exists()
    except (OSError, ValueError):
        return False


def read_state(path: Path, files: tuple[str, ...] = state_file.FILES) -> dict[str, Any]:
    """Read and check `state.json` of a checkpoint, and compare `files` with its digests.

    Raises:
        ValueError, OSError: a file is not as it was written, or cannot be read. The message names the file in `path`.
    """
    state = state_file.read(path / "state.json", step_of(path))
    for name in files:
        if digest_of(path / name) != state["sha256"][name]:
            raise ValueError(f"{name} is not what was written")
    return state


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a file; their sizes are checked before memory is allocated.

    Raises:
        ValueError: it is no file of tensors. The message has the file's name without its folder.
    """
    try:
        try:
            os.fspath(file).encode()
        except UnicodeEncodeError:  # the library cannot open such a name
            return load(file.read_bytes())
        return load_file(file)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the library's own, and KeyError for dtypes that PyTorch lacks
        raise ValueError(f"{file.name} is no file of tensors: {error}") from None


def all_finite(tensors: dict[str, Tensor]) -> bool:
    return all(not t.is_floating_point() or bool(torch.isfinite(t).all()) for t in tensors.values())


def check_numbers(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """ValueError if training.safetensors holds numbers that are not finite, and the state says that all are."""
    bad = tensors.get("bad_steps")
    if bad is not None and not (bad.numel() == 1 and float(bad) >= 0 and float(bad).is_integer()):
        raise ValueError("training.safetensors should hold bad_steps, a whole number of at least 0")
    if state.get("sound") and not all_finite(tensors):
        raise ValueError("training.safetensors holds numbers that are not finite, and state.json says otherwise")


def load_generators(folder: Path, state: dict[str, Any] | None = None) -> dict[str, dict[str, Tensor]]:
    """The state dicts of the generators of a checkpoint, by name ("G"; "G_A", "G_B").

    Args:
        state: as `read_state` returns; read here if None.

    Raises:
        ValueError, OSError: as `read_state`, or a tensor that belongs to no generator.
    """
    if state is None:
        state = read_state(folder, ("generator.safetensors",))
    names: dict[str, dict[str, Tensor]] = {name: {} for name in state["generators"]}
    for key, tensor in read_tensors(folder / "generator.safetensors").items():
        name, _, parameter = key.partition("/")
        if name not in names or not parameter:
            raise ValueError(f"generator.safetensors holds {key!r}, which belongs to none of {', '.join(names)}")
        names[name][parameter] = tensor
    if state.get("finite") and not all(map(all_finite, names.values())):
        raise ValueError("generator.safetensors holds numbers that are not finite, and state.json says otherwise")
    return names


def follow(path: Path) -> Path:
    """The checkpoint that a pointer such as RUN/checkpoints/best names; any other path is returned unchanged.

    Raises:
        ValueError: the pointer names no checkpoint.
    """
    if not (path.name in POINTERS or kept_epoch(path)) or not path.is_file():
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


def missing(path: Path) -> str:
    """Say why there is no such run or file; for RUN/checkpoints/best and epoch-20, what the run has instead."""
    if path.name == "best" and path.parent.name == "checkpoints" and path.parent.is_dir():
        return f"{path.parent.parent} has no best checkpoint, because nothing was validated"
    if path.name.startswith("epoch-") and path.parent.name == "checkpoints" and path.parent.is_dir():
        found = ", ".join(map(str, kept_epochs(path.parent.parent)))
        have = f"it has {found}" if found else "it keeps none (run.keep_epochs=20 keeps every 20th)"
        return f"{path.parent.parent} has no checkpoint of {path.name.replace('-', ' ', 1)}: {have}"
    return f"{path}: no such run or file"


@contextmanager
def using(folder: Path) -> Iterator[None]:
    """Within: an error about a checkpoint names its folder and a remedy."""
    try:
        yield
    except CodeError as error:  # the checkpoint itself is good
        raise CodeError(f"{folder}: {error}") from None
    except ValueError as error:
        reason = str(error).removeprefix(f"{folder}").lstrip(": ")
        raise ValueError(f"{folder}: {reason}; name another checkpoint, or remove this one") from None


def reason_of(error: Exception) -> str:
    """Why a checkpoint cannot be read, for messages."""
    if isinstance(error, OSError):
        where = f"{Path(os.fsdecode(error.filename)).name}: " if error.filename is not None else ""
        return f"{where}{error.strerror or error}"
    return str(error)


def digest_of(path: Path) -> str:
    """The SHA-256 of a regular file."""
    if path.exists() and not path.is_file():  # a device may be endless
        raise ValueError(f"{path.name} is no regular file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
