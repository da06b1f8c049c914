"""Checkpoints that are complete or absent: written aside, flushed to the disk, verified when read.

    checkpoints/step-00001000/{generator.safetensors, training.safetensors, state.json}
    checkpoints/latest                names the newest complete one
    checkpoints/good                  names the newest one that is known to be good
    checkpoints/best                  names the best one on held-out pairs, if the run has any
    checkpoints/epoch-20              names that at the end of epoch 20, if the run keeps it for good

Translation needs `generator.safetensors`; `training.safetensors` is everything that the next step depends on.

A step can ruin the weights and leave them finite, so that all later steps are bad. A checkpoint is therefore known to
be good only if its tensors are finite, the step before it was good, and a later step was good. The newest good one is
never deleted.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor

from ..common.writing import flush_to_disk, partial_name, sweep, write_whole
from . import state_file
from .stored import (
    POINTERS,
    all_finite,
    check_numbers,
    digest_of,
    follow,
    kept_epoch,
    read_state,
    read_tensors,
    reason_of,
    step_of,
)

Log = Callable[[str], None]
Found = TypeVar("Found")


class NotSaved(OSError):
    """A checkpoint could not be written; older ones are untouched. `strerror` is the sentence for the user."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: `RUN/checkpoints`, created if needed.
        keep: how many to keep; at least two, so that one is left if the newest is damaged.
        log: receives a sentence about anything unusual.
    """

    def __init__(self, folder: Path, keep: int = 2, log: Log = print):
        self.folder = folder
        self.keep = max(2, keep)
        self.log = log
        self._unproven: list[Path] = []
        """Checkpoints with finite tensors that are not yet known to be good."""
        self._damaged: set[Path] = set()
        """Reported to the user, and not counted among those to keep."""
        self._unnamed: dict[str, Path] = {}
        """Pointers that still have to be written, with their checkpoints."""

    def steps(self) -> list[Path]:
        """Folders of finished checkpoints, oldest first."""
        found = [path for path in self.folder.glob("step-*") if step_of(path) is not None]
        return sorted((path for path in found if (path / "state.json").exists()), key=lambda path: step_of(path) or 0)

    def clean(self) -> None:
        """Remove what killed processes left. The caller holds the run's lock."""
        sweep(self.folder, held=True)
        for path in self.folder.glob("*step-*") if self.folder.is_dir() else ():
            if not path.is_dir() or path.is_symlink() or (path / "state.json").exists():
                continue
            if {entry.name for entry in path.iterdir()} <= set(state_file.FILES):  # partly deleted
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(".partial-*"):  # the name in earlier versions
            shutil.rmtree(path, ignore_errors=True)

    def save(
        self,
        step: int,
        generator: dict[str, Tensor],
        training: dict[str, Tensor],
        state: dict[str, Any],
        *,
        best: bool = False,
        epoch: int = 0,
    ) -> Path:
        """Write one checkpoint.

        Args:
            step: steps done.
            generator, training: the tensors of the two files. `training["bad_steps"]`, if present, is the number of
                consecutive bad steps up to now.
            state: added to state.json.
            best: let the pointer `best` name it.
            epoch: the number of the epoch that it ends, if it is to be kept for good; else 0.

        Raises:
            NotSaved: an error of the disk; the message has the path, the system's reason and the bytes needed.
        """
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / partial_name()
        tensors = {
            name: _unshared({key: t.detach().cpu().contiguous() for key, t in part.items()})
            for name, part in zip(state_file.FILES, (generator, training), strict=True)
        }
        bad = int(training["bad_steps"]) if "bad_steps" in training else 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            digests = {}
            for name, part in tensors.items():
                (partial / name).touch()
                mode = (partial / name).stat().st_mode & 0o777  # follows the umask
                save_file(part, partial / name)
                (partial / name).chmod(mode)  # the library denies others to read
                flush_to_disk(partial / name)
                digests[name] = digest_of(partial / name)
            finite, rest_finite = map(all_finite, tensors.values())
            sound = bad == 0 and finite and rest_finite
            text = state_file.sealed({"step": step, "sha256": digests, "finite": finite, "sound": sound, **state})
            (partial / "state.json").write_text(text, encoding="utf-8")
            flush_to_disk(partial / "state.json")
            flush_to_disk(partial)
            self._remove(final)  # of an earlier run
            partial.rename(final)
            flush_to_disk(self.folder)
        except Exception as error:
            system = _of_the_system(error)
            if system is None:
                raise
            needed = sum(t.numel() * t.element_size() for part in tensors.values() for t in part.values())
            raise NotSaved(
                system.errno,
                f"{final}: no checkpoint of {needed:,} bytes ({system.strerror}); the older ones are untouched",
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._unnamed["latest"] = final
        if best:
            self._unnamed["best"] = final
        if epoch:
            self._unnamed[f"epoch-{epoch}"] = final
        if good := self.good(step, bad):
            self._unnamed["good"] = good
        self._point()
        if sound:
            self._unproven.append(final)
        names = {*POINTERS, *self._unnamed, *(path.name for path in self.folder.glob("epoch-*") if kept_epoch(path))}
        kept = {self._named(name) for name in names} | {self._pointed(name) for name in names}
        self._damaged.discard(final)
        for old in [path for path in self.steps() if path not in self._damaged][: -self.keep]:
            if old not in kept:
                with suppress(OSError):  # the new checkpoint is complete all the same
                    self._remove(old)
        return final

    def good(self, step: int, bad: int) -> Path | None:
        """The newest checkpoint that is known to be good, after `step` and `bad` consecutive bad steps up to it."""
        proven = [path for path in self._unproven if (step_of(path) or 0) < step - bad]
        if not proven:
            return self._named("good")
        self._unproven = [path for path in self._unproven if path not in proven]
        return proven[-1]

    def keep_for_good(self, path: Path, epoch: int) -> None:
        """Keep a checkpoint at the end of an epoch, whose process may have ended before it could write the pointer."""
        self._unnamed[f"epoch-{epoch}"] = path
        self._point()

    def _remove(self, path: Path) -> None:
        """Rename, then delete: a partly deleted folder must not look like a checkpoint."""
        if not os.path.lexists(path):
            return
        away = path.with_name(partial_name())
        path.rename(away)
        shutil.rmtree(away, ignore_errors=True)
        with suppress(OSError):
            away.unlink()  # if it is a file

    def _point(self) -> None:
        """Write the pending pointers. If the disk refuses one, the next checkpoint tries again."""
        for name, path in list(self._unnamed.items()):
            try:
                write_whole(self.folder / name, path.name.encode())
                del self._unnamed[name]
            except OSError as error:
                self.log(f"{self.folder / name}: {error.strerror or error}; {path.name} is saved all the same")

    def _named(self, name: str) -> Path | None:
        """The folder that a pointer names; None if there is no such pointer or checkpoint."""
        path = self._unnamed.get(name) or self._pointed(name)
        return path if path is not None and (path / "state.json").exists() else None

    def _pointed(self, name: str) -> Path | None:
        """As `_named`, as written on the disk, which may be older."""
        try:
            path = follow(self.folder / name)
        except (OSError, ValueError):
            return None
        return path if (path / "state.json").exists() else None

    def best(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint that `best` names, and its state; None if there is none or it is damaged."""
        path = self._named("best")
        if path is None:
            return None
        try:
            return path, read_state(path)
        except (OSError, ValueError) as error:
            self.log(f"{path} is damaged ({reason_of(error)}), so there is no best checkpoint any more")
            return None

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any], Path] | None:
        """The newest complete checkpoint as (training tensors, state, folder); None if there is none.

        Damaged ones are skipped and logged; if all are damaged, a ValueError says so.
        """

        def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
            state = read_state(path)
            tensors = read_tensors(path / "training.safetensors")
            check_numbers(state, tensors)
            return tensors, state, path

        found = self.newest(read)
        if found is not None and found[1].get("sound"):
            self._unproven = [found[2]]
        return found

    def state(self) -> tuple[dict[str, Any], Path] | None:
        """As `load`, without the tensors."""
        return self.newest(lambda path: (read_state(path), path))

    def newest(self, read: Callable[[Path], Found]) -> Found | None:
        """What `read` returns for the newest checkpoint for which it does not fail; the others are logged.

        Raises:
            ValueError: `read` fails for every checkpoint.
        """
        failed: dict[Path, str] = {}
        while left := [path for path in self.steps() if path not in failed]:
            path = left[-1]
            try:
                found = read(path)
            except (OSError, ValueError) as error:
                failed[path] = reason_of(error)
                continue
            for other, reason in failed.items():
                if other.exists():  # a running training may have removed it
                    self._damaged.add(other)
                    remedy = "remove it to be rid of this message"
                    self.log(f"{other} is damaged ({reason}): {path.name} is taken; {remedy}")
            return found
        if failed:
            path, reason = next(iter(failed.items()))
            raise ValueError(
                f"{self.folder}: every checkpoint is damaged (the newest, {path.name}: {reason}); move the folder away "
                f"to start anew"
            )
        return None


def open_checkpoint(source: Path, files: tuple[str, ...] = state_file.FILES) -> tuple[Path, dict[str, Any]]:
    """The folder and the state of a checkpoint that holds a configuration.

    Args:
        source: a checkpoint's folder, or RUN/checkpoints/best, or a run. Of a run, the newest checkpoint that is
            complete and finite is taken; a warning names those that are skipped.
        files: the files whose digests are verified.

    Raises:
        ValueError: there is none, or the named one is damaged.
    """

    def read(folder: Path) -> tuple[Path, dict[str, Any]]:
        state = read_state(folder, files)
        if "config" not in state:
            raise ValueError("state.json should hold config, a table of the method and its sections")
        return folder, state

    def read_finite(folder: Path) -> tuple[Path, dict[str, Any]]:
        found = read(folder)
        if found[1].get("finite") is False:
            raise ValueError("its generators hold numbers that are not finite")
        return found

    source = follow(source)
    if (source / "state.json").exists() or step_of(source) is not None:
        try:
            return read(source)
        except (OSError, ValueError) as error:
            raise ValueError(f"{source} is damaged ({reason_of(error)}): name another checkpoint, or the run") from None
    store = Checkpoints(source / "checkpoints", log=lambda sentence: warnings.warn(sentence, stacklevel=4))
    found = store.newest(read_finite)
    if found is None:
        raise ValueError(
            f"{source}: no checkpoint here (looked for checkpoints/step-*; a published one has latest_net_G.pth; "
            f"an exported one has config.json)"
        )
    return found


def _of_the_system(error: Exception) -> OSError | None:
    """The system's error, also if the tensor library has put it into a text; None for other errors."""
    if isinstance(error, OSError):
        return error if error.errno is not None else None
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with a copy of each that shares memory with an earlier one: the file format has no views."""
    seen: set[int] = set()
    apart = {}
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if place in seen and tensor.numel() else tensor
        seen.add(place)
    return apart
