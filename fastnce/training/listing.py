"""The runs below a folder: method, step, best value and state of each, read without opening any tensors."""

from __future__ import annotations

import json
import os
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..common.locking import in_use
from ..engine import state_file
from ..engine.history import NAME, read_history
from ..engine.stored import follow, kept_epochs, reason_of, step_of

OWN = ("checkpoints", "samples", "tensorboard")
"""Folders of a run that hold no other run."""
TAIL = 65_536
"""Bytes of metrics.jsonl that are read from its end."""


@dataclass
class Listed:
    """What is known of a run.

    name: its path below the folder that was searched.
    folder: its path.
    method: empty if it is unknown.
    step: of the newest whole checkpoint; of the newest line of metrics.jsonl while the run is trained.
    total: the step after which it ends; None if it is unknown.
    measure, best, best_step: of the checkpoint that checkpoints/best names; empty and None without one.
    kept: the epochs whose checkpoints are kept for good (`run.keep_epochs`).
    state: "running", "finished", "stopped", "failed", "killed", "damaged", or "empty" without a checkpoint.
    reason: why it stopped, failed or is damaged, or which process trains it.
    changes: what the last `--change` changed, such as "optim.lr: 0.0002, now 0.0001".
    changed_at: the step of that change; None without one.
    used: when its files were last written, in ISO 8601; empty if it is unknown.
    """

    name: str
    folder: str
    method: str = ""
    step: int = 0
    total: int | None = None
    measure: str = ""
    best: float | None = None
    best_step: int | None = None
    kept: list[int] = field(default_factory=list)
    state: str = "empty"
    reason: str = ""
    changes: list[str] = field(default_factory=list)
    changed_at: int | None = None
    used: str = ""


def find_runs(root: Path) -> list[Path]:
    """Return the folders of runs in `root` and below it, by name. Links are followed last; no folder is visited twice.

    A run has a config.toml beside a folder checkpoints or a log.txt, or a folder checkpoints with step-*.
    """
    seen: set[tuple[int, int]] = set()
    waiting, links, found = [root], list[Path](), list[Path]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        try:
            status = folder.stat()
            entries = list(os.scandir(folder))
        except OSError:  # it may not be read, or is gone
            continue
        place = (status.st_dev, status.st_ino)
        if place in seen:
            continue
        seen.add(place)
        run = _is_run(folder, {entry.name for entry in entries})
        if run:
            found.append(folder)
        for entry in entries:
            with suppress(OSError):
                if entry.is_dir() and not entry.name.startswith(".") and not (run and entry.name in OWN):
                    (links if entry.is_symlink() else waiting).append(Path(entry.path))
        links.sort()
    return sorted(found)


def _is_run(folder: Path, names: set[str]) -> bool:
    if "config.toml" in names and names & {"checkpoints", "log.txt"}:
        return True
    try:
        return "checkpoints" in names and any(step_of(path) is not None for path in (folder / "checkpoints").iterdir())
    except OSError:
        return False


def describe(folder: Path, name: str = "") -> Listed:
    """Read what is known of a run. Damage is described and never raises."""
    found = Listed(name or folder.name, str(folder), used=_last_written(folder))
    try:
        state, damage = _newest(folder / "checkpoints")
        config = state.get("config", {}) if state else _written(folder)
        found.method = str(config.get("method", ""))
        found.step = state["step"] if state else 0
        history = _events(folder)
        if not _take_history(found, history) and state:
            _take_progress(found, config, state)
        if holder := in_use(folder):
            found.state, found.reason = "running", f"process {holder['pid']} on {holder.get('host')}"
            found.step = max(found.step, _last_step(folder))
        elif damage:
            found.state, found.reason = "damaged", damage
        _take_best(found, folder / "checkpoints" / "best")
        found.kept = kept_epochs(folder)
    except (OSError, ValueError) as error:
        found.state, found.reason = "damaged", reason_of(error)
    except (TypeError, KeyError, AttributeError):  # another kind of value than was ever written
        found.state, found.reason = "damaged", "its files are not what was written"
    return found


def _newest(checkpoints: Path) -> tuple[dict[str, Any], str]:
    """The content of the newest state.json that can be read, and what is wrong with newer ones."""
    try:
        steps = sorted((p for p in checkpoints.iterdir() if step_of(p) is not None), key=lambda p: step_of(p) or 0)
    except OSError:
        return {}, ""
    damage = ""
    for path in reversed(steps):
        try:
            for file in state_file.FILES:
                (path / file).stat()
            return state_file.read(path / "state.json", step_of(path)), damage
        except (OSError, ValueError) as error:
            damage = damage or f"{path.name}: {reason_of(error)}"
    return {}, damage


def _written(folder: Path) -> dict[str, Any]:
    """The configuration in config.toml; empty if it cannot be read."""
    try:
        return tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}


def _events(folder: Path) -> list[dict[str, Any]]:
    try:
        return read_history(folder)
    except OSError:
        return []


def _take_history(found: Listed, history: list[dict[str, Any]]) -> bool:
    """Take the state, the end and the last change from the events of a run; returns whether there is a start."""
    ended: dict[str, Any] | None = None
    begun = False
    for event in history:
        if event.get("event") == "start":
            begun, ended, found.total = True, None, _count(event.get("total"))
        elif event.get("event") == "end":
            ended = event
        elif event.get("event") == "change":
            changes = event.get("changes")
            found.changes = [str(change) for change in changes] if isinstance(changes, list) else []
            found.changed_at = _count(event.get("step"))
    if ended is not None:
        found.state, found.reason = str(ended.get("state", "stopped")), str(ended.get("reason", ""))
    elif begun:
        found.state = "killed"
    return begun


def _count(value: Any) -> int | None:
    return value if type(value) is int else None


def _take_progress(found: Listed, config: dict[str, Any], state: dict[str, Any]) -> None:
    """Tell from a checkpoint alone, as of versions without a history, whether the run is finished."""
    optim, run, progress = config.get("optim", {}), config.get("run", {}), state.get("progress", {})
    epochs = optim.get("n_epochs", 0) + optim.get("n_epochs_decay", 0)
    all_epochs = bool(epochs) and progress.get("epoch", -1) >= epochs
    steps = run.get("steps", 0)
    found.total = steps or (found.step if all_epochs else None)
    found.state = "finished" if all_epochs or 0 < steps <= found.step else "stopped"


def _take_best(found: Listed, pointer: Path) -> None:
    if not pointer.is_file():
        return
    folder = follow(pointer)
    state = state_file.read(folder / "state.json", step_of(folder))
    values = {key: value for key, value in state.get("validation", {}).items() if not isinstance(value, str)}
    run = state.get("config", {}).get("run", {})
    named = [run.get("best", run.get("metric", "")), "psnr_y", *str(run.get("metrics", "")).split(","), *values]
    names = [str(name).rpartition(":")[2].strip() for name in named]  # "auto" is psnr_y, or the first of run.metrics
    if values:
        found.measure = next(name for name in names if name in values)
        found.best, found.best_step = float(values[found.measure]), state["step"]


def _last_step(folder: Path) -> int:
    """The step of the last complete line of metrics.jsonl; 0 without one."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return 0


def _last_written(folder: Path) -> str:
    times = []
    for name in (NAME, "log.txt", "metrics.jsonl", "config.toml", "checkpoints"):
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return datetime.fromtimestamp(max(times)).astimezone().isoformat(timespec="seconds") if times else ""
