"""Checkpoints that are whole or absent: written aside, flushed to the disk, verified when read.

    checkpoints/step-00001000/{generator.safetensors, training.safetensors, state.json}
    checkpoints/latest                names the newest whole one
    checkpoints/best                  names the one that did best on held-out pairs, where a run has them

`generator.safetensors` is what translation needs; `training.safetensors` is everything that the next step depends on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..writing import write_whole

Log = Callable[[str], None]
Found = TypeVar("Found")


class NotSaved(OSError):
    """A checkpoint could not be written; the older ones are untouched."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: `RUN/checkpoints`, made if need be.
        keep: how many to keep; at least two, so that one is whole whatever happens to the newest.
        log: receives one sentence about anything unusual.
    """

    def __init__(self, folder: Path, keep: int = 2, log: Log = print):
        self.folder = folder
        self.keep = max(2, keep)
        self.log = log
        self._unnamed: dict[str, Path] = {}
        """What `latest` and `best` should name and do not yet."""

    def steps(self) -> list[Path]:
        """Folders of finished checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir() and (path / "state.json").exists())

    def save(
        self,
        step: int,
        generator: dict[str, Tensor],
        training: dict[str, Tensor],
        state: dict[str, Any],
        *,
        best: bool = False,
    ) -> Path:
        """Write one checkpoint.

        With `best` it is also named so, and stays until another one is.

        Raises:
            NotSaved: the disk does not take it; with the path, what the system says, and the bytes needed. Nothing of
                it is left.
        """
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".partial-{step:08d}-{os.getpid()}"
        tensors = {"generator.safetensors": generator, "training.safetensors": training}
        needed = sum(t.numel() * t.element_size() for part in tensors.values() for t in part.values())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            (partial / "state.json").touch()
            mode = (partial / "state.json").stat().st_mode & 0o777  # as the umask has it
            digests = {}
            for name, part in tensors.items():
                save_file({key: t.detach().cpu().contiguous() for key, t in part.items()}, partial / name)
                (partial / name).chmod(mode)  # the library lets nobody else read what it writes
                digests[name] = _flush_and_digest(partial / name)
            text = json.dumps({"step": step, "sha256": digests, **state}, indent=1)
            (partial / "state.json").write_text(text, encoding="utf-8")
            _flush_and_digest(partial / "state.json")
            if final.exists():  # left by an earlier run of the same step
                shutil.rmtree(final)
            partial.rename(final)
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
                reason = f"no room for a checkpoint of {needed:,} bytes"
            else:
                reason = f"a checkpoint of {needed:,} bytes cannot be written: {getattr(error, 'strerror', 0) or error}"
            code = getattr(error, "errno", None) or errno.EIO
            raise NotSaved(code, f"{final}: {reason}; the older ones are untouched") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._unnamed |= {"latest": final, **({"best": final} if best else {})}
        self._point()
        kept = self._unnamed.get("best") or self._named("best")
        for old in self.steps()[: -self.keep]:
            if old != kept:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def _point(self) -> None:
        """Name what is to be named; what the disk does not take now is tried again after the next checkpoint."""
        for name, path in list(self._unnamed.items()):
            try:
                write_whole(self.folder / name, path.name.encode())
                del self._unnamed[name]
            except OSError as error:
                self.log(f"{self.folder / name}: {error.strerror or error}; {path.name} is saved all the same")

    def _named(self, name: str) -> Path | None:
        """The folder that a pointer names, or None where there is no such pointer or checkpoint."""
        try:
            path = follow(self.folder / name)
        except (OSError, ValueError):
            return None
        return path if (path / "state.json").exists() else None

    def best(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint that `best` names and its state, or None where there is none that is whole."""
        path = self._named("best")
        if path is None:
            return None
        try:
            return path, read_state(path)
        except (OSError, ValueError) as error:
            self.log(f"{path}: damaged ({error}), so there is no best checkpoint any more")
            return None

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any], Path] | None:
        """The newest whole checkpoint as (training tensors, state, folder), or None where there is none.

        A damaged one is passed over with a sentence; when all are damaged, a ValueError says so.
        """

        def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
            state = read_state(path)
            return load_file(path / "training.safetensors"), state, path

        return self._newest(read)

    def state(self) -> tuple[dict[str, Any], Path] | None:
        """As `load`, without the tensors."""
        return self._newest(lambda path: (read_state(path), path))

    def _newest(self, read: Callable[[Path], Found]) -> Found | None:
        found = self.steps()
        for path in reversed(found):
            try:
                return read(path)
            except (OSError, ValueError, SafetensorError) as error:
                self.log(f"{path}: damaged ({error}), trying the one before")
        if found:
            raise ValueError(f"{self.folder}: every checkpoint is damaged; move the folder away to start anew")
        return None


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint, after comparing its files with the digests in it; ValueError when they differ."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict) or not {"step", "sha256"} <= state.keys():
        raise ValueError("state.json is not what was written")
    for name, digest in state["sha256"].items():
        if _digest(path / name) != digest:
            raise ValueError(f"{name} is not what was written")
    return state


def load_generators(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The generators' state dicts, by name ("G"; "G_A", "G_B"), of a checkpoint folder."""
    state = read_state(folder)
    names: dict[str, dict[str, Tensor]] = {name: {} for name in state["generators"]}
    for key, tensor in load_file(folder / "generator.safetensors").items():
        name, parameter = key.split("/", 1)
        names[name][parameter] = tensor
    return names


def follow(path: Path) -> Path:
    """The checkpoint that a pointer, such as RUN/checkpoints/best, names; any other path as it is.

    Raises:
        ValueError: the pointer names no checkpoint.
    """
    if path.name not in ("latest", "best") or not path.is_file():
        return path
    target = path.parent / path.read_text(encoding="utf-8").strip()
    if not (target / "state.json").exists():
        raise ValueError(f"{path} names {target.name}, which is not there any more")
    return target


def newest(run: Path) -> Path:
    """The folder of the newest checkpoint of a run; ValueError where there is none."""
    checkpoints = Checkpoints(run / "checkpoints").steps()
    if not checkpoints:
        raise ValueError(f"{run}: no checkpoint here (looked for checkpoints/step-*)")
    return checkpoints[-1]


def open_checkpoint(source: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and `state.json` of a checkpoint; of a run the newest, of RUN/checkpoints/best what it names.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    source = follow(source)
    folder = source if (source / "state.json").exists() else newest(source)
    try:
        return folder, read_state(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: a damaged checkpoint ({error})") from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_and_digest(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _digest(path)
