"""What the report shows of a run beside its curves: state, events, checkpoints, configuration and machine."""

from __future__ import annotations

import tomllib
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..common.imports import is_import_path
from ..common.locking import in_use
from ..common.options import describe
from ..config.config import Config, from_preset
from ..config.options import DataOptions
from ..engine import state_file
from ..engine.history import read_history
from ..engine.options import OptimOptions, RunOptions
from ..engine.stored import follow, step_of
from ..methods import NetworkOptions
from ..methods.presets import find_preset

MARKS = ("metrics.jsonl", "history.jsonl", "config.toml", "checkpoints")
"""A run's folder has at least one of these."""
LOG_END = 256 * 2**10
"""Bytes at the end of log.txt in which the warnings of older runs are looked for."""
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Key:
    """One key of a configuration.

    section, name: such as "optim" and "lr"; the method has no section.
    value: as stored.
    default: of the preset; None if it is not known.
    help: what the key does.
    """

    section: str
    name: str
    value: Any
    default: Any = None
    help: str = ""

    @property
    def changed(self) -> bool:
        return self.default is not None and self.value != self.default


@dataclass(frozen=True)
class Saved:
    """A checkpoint: its name, its step, and its measures of held-out pairs, if any."""

    name: str
    step: int
    measures: dict[str, float]


@dataclass
class Facts:
    """What is known of a run from its folder.

    state: "running", "finished", "stopped", "failed", "killed", or "unknown" for a run without history.
    reason: why it is in this state, as one sentence; may be empty.
    seconds: trained, over all starts; None if that is not known.
    total: the step after which it ends; None if that is not known.
    start: its last event "start"; empty without history.
    """

    folder: Path
    method: str = ""
    state: str = UNKNOWN
    reason: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    start: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    total: int | None = None
    config: list[Key] = field(default_factory=list)
    best: Saved | None = None
    latest: Saved | None = None


def check_is_run(folder: Path) -> None:
    """ValueError if `folder` is not the folder of a run."""
    if folder.is_dir() and any((folder / name).exists() for name in MARKS):
        return
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}: name the folder of a run, which `fastnce train` wrote with --out")
    raise ValueError(f"{folder} is no run: it has none of {', '.join(MARKS)}")


def read_facts(folder: Path) -> Facts:
    """Read a run's folder. What is missing or damaged is left out.

    Raises:
        OSError: its history cannot be read.
    """
    facts = Facts(folder)
    facts.latest, facts.best = (read_saved(folder / "checkpoints" / name) for name in ("latest", "best"))
    stored = stored_config(folder)
    facts.method = str(stored.get("method", ""))
    facts.config = keys_of(stored)
    events = read_history(folder)
    facts.warnings = [event for event in events if event.get("event") == "warning"] or logged_warnings(folder)
    facts.events = [event for event in events if event.get("event") != "warning"]
    facts.start = next((event for event in reversed(events) if event.get("event") == "start"), {})
    total = facts.start.get("total")
    facts.total = total if type(total) is int and total > 0 else None
    facts.state, facts.reason = state_of(folder, facts.events)
    facts.seconds = seconds_of(events, folder / "metrics.jsonl")
    return facts


def state_of(folder: Path, events: list[dict[str, Any]]) -> tuple[str, str]:
    """The state of a run, and the reason."""
    if held := in_use(folder):
        return "running", f"process {held['pid']} on {held.get('host')}, since {held.get('since')}"
    last = next((event for event in reversed(events) if event.get("event") in ("start", "end")), None)
    if last is None:
        return UNKNOWN, "the run has no history.jsonl"
    if last["event"] == "end":
        return str(last.get("state", UNKNOWN)), str(last.get("reason", ""))
    return "killed", "its process ended without a word; the same command continues it from its last checkpoint"


def seconds_of(events: list[dict[str, Any]], metrics: Path) -> float | None:
    """The time from each start to its end; a start without an end lasted until the last line of the metrics."""
    total, began, known = 0.0, None, False
    for event in events:
        at = time_of(event)
        if at is None:
            continue
        if event.get("event") == "start":
            began, last = at, at
            known = True
        elif began is not None:
            last = at
        if event.get("event") == "end" and began is not None:
            total += (at - began).total_seconds()
            began = None
    if began is not None:
        with suppress(OSError, OverflowError, ValueError):
            last = max(last, datetime.fromtimestamp(metrics.stat().st_mtime).astimezone())
        total += (last - began).total_seconds()
    return max(total, 0.0) if known else None


def time_of(event: dict[str, Any]) -> datetime | None:
    """The time of an event; None if it has none that can be read."""
    try:
        return datetime.fromisoformat(event["time"]).astimezone()
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return None


def logged_warnings(folder: Path) -> list[dict[str, Any]]:
    """The warnings of log.txt, for runs of versions without history; they have no time and no step."""
    try:
        with (folder / "log.txt").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - LOG_END))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [{"event": "warning", "text": line} for line in text.splitlines() if line.startswith("warning: ")]


def read_saved(pointer: Path) -> Saved | None:
    """The checkpoint that a pointer such as RUN/checkpoints/best names; None if there is none that can be read."""
    try:
        path = follow(pointer)
        if path == pointer:
            return None
        state = state_file.read(path / "state.json", step_of(path))
    except (OSError, ValueError):
        return None
    measures = {k: float(v) for k, v in state.get("validation", {}).items() if isinstance(v, int | float)}
    return Saved(path.name, state["step"], measures)


def stored_config(folder: Path) -> dict[str, Any]:
    """The configuration of config.toml, or else of the newest checkpoint; empty if neither can be read."""
    try:
        found = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8-sig"))
        if found:
            return found
    except (OSError, ValueError, RecursionError):
        pass
    try:
        path = follow(folder / "checkpoints" / "latest")
        return dict(state_file.read(path / "state.json", step_of(path)).get("config", {}))
    except (OSError, ValueError):
        return {}


def keys_of(stored: dict[str, Any]) -> list[Key]:
    """The keys of a stored configuration with the defaults of its preset.

    A user's own method is not imported, so the defaults of its losses are not known.
    """
    known: dict[str, dict[str, Any]] = {}
    helps: dict[tuple[str, str], str] = {}
    sections: dict[str, Any] = {"data": DataOptions(), "network": NetworkOptions()}
    sections |= {"optim": OptimOptions(), "run": RunOptions()}
    with suppress(ValueError):
        method = stored.get("method")
        if isinstance(method, str) and not is_import_path(method):
            preset = from_preset(method, find_preset(method))
            sections = {name: getattr(preset, name) for name in Config.SECTIONS}
    for name, options in sections.items():
        known[name] = asdict(options)
        helps |= {(name, key): text for key, (_, text) in describe(options).items()}
    found = []
    for section in [name for name in Config.SECTIONS if name in stored] + sorted(set(stored) - set(Config.SECTIONS)):
        values = stored[section]
        if not isinstance(values, dict):
            found.append(Key("", str(section), values))
            continue
        for key, value in values.items():
            default = known.get(section, {}).get(key)
            found.append(Key(str(section), str(key), value, default, helps.get((section, key), "")))
    return found
