"""Describe the machine and measure its ceilings: a large copy, matrix products, launches.

Every result records them. The floors in the tables follow from these ceilings.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fastnce
from benchmarks import nvml
from fastnce.common.timing import ceilings

ROOT = Path(__file__).resolve().parents[1]


def facts(device: torch.device) -> dict[str, Any]:
    """Return names, versions, clocks, commit and time."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    found: dict[str, Any] = {
        "device": "CPU" if device.type == "cpu" else device.type,
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "fastnce": fastnce.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {
            "device": gpu.name,
            "memory_bytes": gpu.total_memory,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "cuda": torch.version.cuda or "",
            "rocm": torch.version.hip or "",
            "cudnn": torch.backends.cudnn.version(),
        }
        found |= nvml.facts(device)
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _commit() -> str:
    """Return the measured commit: FASTNCE_COMMIT, or git's HEAD, with a plus sign if files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10).stdout.strip()

    if named := os.environ.get("FASTNCE_COMMIT"):
        return named
    try:
        if Path(git("rev-parse", "--show-toplevel") or "/") != ROOT:
            return ""  # an unpacked copy inside another repository
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if commit and git("status", "--porcelain") else "")
    except (OSError, subprocess.TimeoutExpired):
        return ""


def describe(
    device: torch.device, quick: bool, save: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Return `facts` and `ceilings`. Clocks are read again after some seconds of work, with the suffix "_warm".

    save: called with the facts before the ceilings are measured, because that measurement may fail.
    """
    began = time.perf_counter()
    found = facts(device)
    save(found)
    found["ceilings"] = ceilings(device, quick)
    found |= {f"{key}_warm": value for key, value in nvml.facts(device).items() if "clock_mhz" in key}
    found["measured_in_s"] = round(time.perf_counter() - began, 1)
    return found
