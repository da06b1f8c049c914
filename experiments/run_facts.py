"""The facts of a run: what it was trained with, on which machine, how far and how fast; also as a Markdown table."""

from __future__ import annotations

import os
import re
import shlex
import statistics
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastnce.api import Run
from fastnce.common.writing import write_whole
from fastnce.data.target import SINGLE
from fastnce.export.source import without_folders
from fastnce.translate.translator import Translator
from fastnce.watch.reading import read_facts

GRID = 16
"""The most pictures of grid.jpg."""
OWN = ("dir", "cache_dir", "track_dir")
"""Keys of a configuration that tell of the machine and not of the training."""


def facts_of(run: Run, config: dict[str, Any], model: Translator) -> dict[str, Any]:
    """Collect the facts of a run from its history, its metrics and its configuration. Paths lose their folders.

    "images" counts the images of each domain that the run has seen; of single pictures, their crops.
    "images_per_second" is the median of the lines of the metrics. "hours" is the time that all images take at that
    speed, so that pauses do not count; "cpu_hours" is this times the number of threads, and None on another device.
    """
    found, metrics = read_facts(run.folder), run.metrics
    start = found.start
    speeds = [line["images_per_second"] for line in metrics if "images_per_second" in line]
    speed = statistics.median(speeds) if speeds else None
    images = run.steps * config.get("data", {}).get("batch", 1) * start.get("ranks", 1)
    threads = re.search(r"(\d+) threads", start.get("machine", {}).get("CPU", ""))
    hours = images / speed / 3600 if speed else None
    on_cpu = start.get("device") == "cpu" and threads is not None and hours is not None
    return {
        "method": found.method,
        "state": found.state,
        "steps": run.steps,
        "steps_planned": found.total,
        "images": images,
        "images_are_crops": config.get("data", {}).get("preprocess") == SINGLE,
        "images_per_second": _rounded(speed),
        "hours": _rounded(hours),
        "cpu_hours": _rounded(hours * int(threads[1])) if on_cpu and hours and threads else None,
        "parameters": start.get("parameters"),
        "parameters_of_the_generator": sum(p.numel() for p in model.generator.parameters()),
        "seed": config.get("run", {}).get("seed"),
        "averaged_weights": config.get("optim", {}).get("ema", 0) > 0,
        "command": command_of(start.get("command", [])),
        "options": {
            f"{key.section}.{key.name}".lstrip("."): without_folders(key.value)
            for key in found.config
            if key.changed and key.name not in OWN
        },
        "device": start.get("device"),
        "machine": start.get("machine", {}),
        "versions": start.get("versions", {}),
        "warnings": [re.sub(r"(/[^\s/:,]+)+/", "", warning.get("text", "")) for warning in found.warnings],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def command_of(words: list[str]) -> str:
    """Return a command that can be repeated elsewhere: the program as `fastnce`, and paths without their folders."""
    if not words:
        return ""
    program = "fastnce" if Path(words[0]).name in ("__main__.py", "fastnce") else Path(words[0]).name
    parts = []
    for word in words[1:]:
        key, equals, value = word.rpartition("=")
        parts.append(f"{key}{equals}{without_folders(value)}")
    return shlex.join([program, *parts])


def table_of(facts: dict[str, Any]) -> str:
    """Write the main facts as a Markdown table of two columns, and the command as a block of code."""

    def number(name: str) -> str:
        return "unknown" if facts[name] is None else f"{facts[name]:,}"

    planned = facts["steps_planned"]
    of_planned = f" of {planned:,} planned" if planned and planned > facts["steps"] else ""
    unit = "crops" if facts["images_are_crops"] else "images"
    weights = "averaged weights" if facts["averaged_weights"] else "the weights of the last step"
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    rows = {
        "steps": f"{facts['steps']:,}{of_planned}; {facts['images']:,} {unit} of each domain",
        "speed": f"{number('images_per_second')} {unit}/s (median)",
        "cost": f"{number('hours')} hours, {number('cpu_hours')} CPU hours",
        "parameters": f"{number('parameters')}, of them {number('parameters_of_the_generator')} of the generator",
        "shown": weights,
        "seed": str(facts["seed"]),
        "machine": ", ".join(facts["machine"].values()),
        "versions": versions,
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())]
    return "\n".join([*lines, "", "```bash", wrapped(facts["command"]), "```"])


def wrapped(command: str, width: int = 110) -> str:
    """Break a command between two words where a line would be longer than `width`."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(command)):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n    ".join(lines)


def marks_of(out: Path) -> tuple[str, str]:
    """The lines around the section of a run in a page."""
    return f"<!-- shown: {out.name} -->\n", "<!-- shown: end -->"


def check_page(page: Path, out: Path) -> None:
    """Raise ValueError if `write_section` cannot write to a page."""
    if page.is_dir() or not page.parent.is_dir():
        raise ValueError(f"{page} should be a Markdown page in a folder that exists")
    begin, end = marks_of(out)
    _, found, rest = (page.read_text(encoding="utf-8") if page.exists() else "").partition(begin)
    if found and end not in rest:
        raise ValueError(f"{page} has {begin.strip()}, and no {end} after it")
    if found and "<!-- shown: " in rest.partition(end)[0]:
        raise ValueError(f"{page} has no {end} between {begin.strip()} and the next run")


def write_section(page: Path, out: Path, title: str, facts: dict[str, Any]) -> None:
    """Show a run in a Markdown page, between the lines `<!-- shown: NAME -->` and `<!-- shown: end -->`.

    NAME is that of the folder `out`. If the page has these lines, what is between them is replaced. Otherwise a section
    with this title is added at its end. Text around the lines stays.

    Raises:
        ValueError: see `check_page`.
    """
    check_page(page, out)
    begin, end = marks_of(out)
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if begin not in text:
        text = f"{text.rstrip()}\n\n## {title}\n\n{begin}{end}\n".lstrip()
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    folder = Path(os.path.relpath(out, page.parent)).as_posix()
    write_whole(page, f"{before}{begin}{section_of(facts, folder)}\n{end}{after}".encode())


def section_of(facts: dict[str, Any], folder: str) -> str:
    """Write the pictures, the facts, the command and the files of a run as Markdown.

    Args:
        folder: of the files, as the page links to it.
    """
    pictures, folder = facts["pictures"], quote(folder)
    if facts["images_are_crops"]:
        over_time = "The whole picture over the steps, and the target:"
        newest = f"Input, output after step {facts['steps']:,}, and target:"
    else:
        count = min(GRID, pictures["inputs"])
        over_time = "The first test pictures, in sorted order, over the steps:"
        newest = f"The first {count} test pictures, in sorted order, unpicked, after step {facts['steps']:,}:"
    shown = f"![Pictures over the steps]({folder}/strip.jpg)", f"![Inputs and outputs]({folder}/grid.jpg)"
    losses = f"![The curves of the losses]({folder}/losses.svg)"
    names = ("metrics.csv", "checkpoints.csv", "facts.json")
    files = ", ".join(f"[{name}]({folder}/{name})" for name in names)
    parts = [over_time, shown[0], newest, shown[1], table_of(facts), losses, f"All numbers: {files}."]
    return "\n\n".join(parts)
