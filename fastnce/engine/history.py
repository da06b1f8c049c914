"""`history.jsonl`: what happened to a run, one JSON object per event.

    {"time": "2026-11-27T18:00:00+00:00", "event": "start", "step": 0, "total": 1000, "command": [...],
     "device": "cuda:0", "ranks": 1, "machine": {...}, "versions": {...}}
    {"time": ..., "event": "from", "step": 0, "source": "latest_net_G.pth", "lines": [...]}
    {"time": ..., "event": "change", "step": 500, "changes": ["optim.lr: 0.0002, now 0.0001"]}
    {"time": ..., "event": "warning", "step": 600, "text": ...}
    {"time": ..., "event": "end", "step": 1000, "state": "finished" | "stopped" | "failed", "reason": ""}

A run that was killed has no "end" after its last "start".
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

NAME = "history.jsonl"


def event(name: str, step: int, **values: Any) -> str:
    """Format an event as one line, with the time."""
    return json.dumps({"time": now(), "event": name, "step": step, **values}, ensure_ascii=False, default=str)


def now() -> str:
    """The time in ISO 8601, in the local time zone, to the second."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first. Lines that are not complete are left out."""
    return read_lines(folder / NAME)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; other lines are left out. Empty if there is no such file."""
    found: list[dict[str, Any]] = []
    if file.exists() and not file.is_file():  # a device may be endless
        return found
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.split("\n"):  # a text may hold other ends of lines
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
