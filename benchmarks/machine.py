"""What the machine is, and the most that it was measured to do: a large copy and a large matrix product.

Recorded beside every result; the floors in the tables come from these ceilings.
"""

from __future__ import annotations

import functools
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

from .measure import nvml_uuid, time_interleaved

ROOT = Path(__file__).resolve().parents[1]


def facts(device: torch.device) -> dict[str, Any]:
    """Names, versions, clocks, commit and time."""
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
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {
            "device": gpu.name,
            "memory_bytes": gpu.total_memory,
            "cuda": torch.version.cuda or "",
            "rocm": torch.version.hip or "",
            **_nvml(device),
        }
    return found


def _nvml(device: torch.device) -> dict[str, Any]:
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(nvml_uuid(device))
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "sm_clock_max_mhz": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_limit_w": pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3,
        }
    except Exception:  # not an NVIDIA board, or nvidia-ml-py is not installed
        return {}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _commit() -> str:
    """The commit that was measured, with a plus when files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if commit and git("status", "--porcelain") else "")
    except (OSError, subprocess.TimeoutExpired):
        return ""


def ceilings(device: torch.device, quick: bool) -> dict[str, float]:
    """Bytes a second of a large copy (read and written), FLOP a second of square products of random matrices."""
    cpu = device.type == "cpu"
    numbers = (1 << 24 if quick else 1 << 26) if cpu else (1 << 24 if quick else 1 << 30)
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {"copy": functools.partial(target.copy_, source)}
    size = (512 if quick else 1024) if cpu else (2048 if quick else 8192)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        calls[str(dtype).removeprefix("torch.")] = functools.partial(torch.matmul, a, b)
    # the best time: a ceiling is what the machine can do, not what it did on average
    times = time_interleaved(calls, device, seconds=1.0 if quick else 4.0)
    best = {name: min(t) / 1e3 for name, t in times.items()}
    found = {"copy_bytes_per_s": 2 * 4 * numbers / best.pop("copy")}
    return (
        found
        | {f"matmul_{name}_flop_per_s": 2 * size**3 / seconds for name, seconds in best.items()}
        | {"matmul_size": size}
    )


def describe(device: torch.device, quick: bool) -> dict[str, Any]:
    """`facts` and `ceilings`."""
    began = time.perf_counter()
    found = facts(device)
    found["ceilings"] = ceilings(device, quick)
    found["measured_in_s"] = round(time.perf_counter() - began, 1)
    return found
