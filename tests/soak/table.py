"""Update the table of results in the documentation: replace the rows of the finished campaigns, keep the others."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import torch

from fastnce import __version__
from fastnce.common.writing import write_whole

from .common import Campaign, Outcome

BEGIN, END = "<!-- soak: results -->", "<!-- soak: end -->"
HEAD = ["| campaign | what must hold | tried | survived | lost | date | versions |", "|---|---|---|---|---|---|---|"]


def write_results(file: Path, results: dict[str, tuple[Campaign, Outcome]], seed: int) -> None:
    """Write rows and notes between the two markers of a file.

    Raises:
        ValueError: the file has no such markers.
    """
    before, found, rest = file.read_text(encoding="utf-8").partition(f"{BEGIN}\n")
    old, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"{file} should hold the lines {BEGIN} and {END}")
    rows, notes = _read(old)
    versions = f"fastnce {__version__}, torch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}"
    for name, (campaign, outcome) in results.items():
        lost, held = len(outcome.lost), campaign.promise[:1].upper() + campaign.promise[1:].rstrip(".")
        date = time.strftime("%Y-%m-%d")
        figures = f"{outcome.tried:,} | {outcome.tried - lost:,} | {lost:,}"
        rows[name] = f"| {name} | {held} | {figures} | {date} | {versions} |"
        notes[name] = [f"- {name}, seed {seed}: {line}" for line in [*outcome.notes, *outcome.lost]]
    lines = [
        *HEAD,
        *(rows[name] for name in sorted(rows)),
        "",
        *(line for name in sorted(notes) for line in notes[name]),
    ]
    text = "\n".join(lines).strip()
    write_whole(file, f"{before}{BEGIN}\n{text}\n{END}{after}".encode())


def _read(text: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return rows and notes by name of the campaign."""
    rows: dict[str, str] = {}
    notes: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("| ") and line not in HEAD:
            rows[line.split("|")[1].strip()] = line
        elif line.startswith("- "):
            notes.setdefault(line[2:].partition(",")[0], []).append(line)
    return rows, notes
