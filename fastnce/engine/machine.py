"""What a run was computed on: names and versions, without the host's name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from .. import __version__

PACKAGES = ("torch", "triton", "numpy", "pillow", "safetensors")


def versions() -> dict[str, str]:
    """The versions of fastnce, Python and the packages it computes with; packages that are absent are left out."""
    found = {"fastnce": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with its build, such as +cpu
    if torch.version.hip or torch.version.cuda:
        found["ROCm" if torch.version.hip else "CUDA"] = torch.version.hip or torch.version.cuda or ""
    return found


def machine(device: torch.device) -> dict[str, str]:
    """Names to show: the accelerator if there is one, the processor, its cores and the system."""
    found = {}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found["GPU"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    elif device.type != "cpu":
        found["accelerator"] = device.type
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found["CPU"] = f"{processor()}, {cores} cores, {torch.get_num_threads()} threads"
    found["system"] = f"{platform.system()} {platform.release()}"
    return found


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
