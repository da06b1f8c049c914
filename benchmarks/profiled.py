"""Profile one replay of a captured step: the count, time and share of each kernel.

python -m benchmarks.profiled FILE.csv              # CUT with 1 and 8 images, FastCUT; needs a GPU

One line per kernel, the longest first: at most 60 per step, and one for the others. The file is rewritten after each
step. "busy" is the time of all kernels divided by the time from the first start to the last end.
"""

from __future__ import annotations

import csv
import gc
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.step import build, pictures, warm
from fastnce.methods import Batch, Draws

STEPS = (("cut", 1), ("cut", 8), ("fastcut", 1))
MOST = 60
REST = "all others"


class Launch(NamedTuple):
    """One kernel, copy or fill on the device; times in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Line:
    """All launches of one kernel in one replay; `microseconds` is their sum, `share` the fraction of all kernels."""

    step: str
    images: int
    kernel: str
    count: int
    microseconds: float
    share: float
    busy: float


def lines_of(step: str, images: int, launches: Iterable[Launch], most: int = MOST) -> list[Line]:
    """Return one line per kernel, the longest first, with all after the first `most` combined."""
    launches = list(launches)
    if not launches:
        return []
    whole = sum(end - start for _, start, end in launches)
    # above 1 if streams overlap
    busy = whole / max(1e-9, max(launch.end for launch in launches) - min(launch.start for launch in launches))
    found: dict[str, list[float]] = {}
    for name, start, end in launches:
        found.setdefault(name, []).append(end - start)
    ordered = sorted(found.items(), key=lambda item: -sum(item[1]))
    shown, others = ordered[:most], [time for _, times in ordered[most:] for time in times]
    return [
        Line(step, images, name, len(times), sum(times), sum(times) / whole, busy)
        for name, times in [*shown, *([(REST, others)] if others else [])]
    ]


def launches_of(profile: Any) -> list[Launch]:
    """Return the launches on the device, without user annotations."""
    on_device = torch.autograd.DeviceType.CUDA
    return [
        Launch(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == on_device and not getattr(event, "is_user_annotation", False)
    ]


def replayed(name: str, images: int, device: torch.device, network: dict[str, Any], side: int) -> list[Launch]:
    """Return the launches of one replay of our step in bfloat16."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities):  # loads the profiler's library before the capture
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    step = build(name, network, device, "bf16", {"graph": True}, {})
    batch = Batch(*pictures(images, side, device))
    warm(step, batch)
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        step.run(batch, Draws())
        torch.cuda.synchronize(device)
    launches = launches_of(profile)
    step.close()
    return launches


def write(file: Path, lines: Sequence[Line]) -> None:
    part = file.with_suffix(".part")
    with part.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([f.name for f in fields(Line)])
        for line in lines:
            writer.writerow([round(value, 4) if isinstance(value, float) else value for value in astuple(line)])
    part.replace(file)


def read(file: Path) -> list[Line]:
    """Return the lines of a file from `write`; empty if the file does not exist."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [
            Line(
                row["step"],
                int(row["images"]),
                row["kernel"],
                int(row["count"]),
                *(float(row[name]) for name in ("microseconds", "share", "busy")),
            )
            for row in csv.DictReader(lines)
        ]


def main(arguments: Sequence[str], network: dict[str, Any] | None = None, side: int = 256) -> int:
    """Profile all steps; return 1 if a step fails or the profiler sees no kernel, else 0."""
    # otherwise the second use of the profiler in a process may miss graphs
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    found: list[Line] = []
    missing = 0
    for name, images in STEPS:
        try:
            lines = lines_of(name, images, replayed(name, images, torch.device("cuda"), network or {}, side))
        except Exception:  # such as out of memory: profile the other steps
            traceback.print_exc()
            lines = []
        gc.collect()
        torch.cuda.empty_cache()
        found += lines
        write(Path(arguments[0]), found)
        missing += not lines
        launches = sum(line.count for line in lines)
        print(f"{name} {images}: " + (f"{launches} launches" if lines else "the profiler saw no kernel"), flush=True)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
