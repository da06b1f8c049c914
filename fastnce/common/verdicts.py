"""Remember which kernels were checked on which device, in one small file in the user's cache folder.

The file maps a place (device, driver, versions, digest of the kernels' source) to verdicts: the name of a checked form
of a kernel, and "" if it was right or what was wrong. Another driver or version is another place, where everything is
checked anew. A file that is missing, damaged or not writable is no error: each process then checks for itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from .writing import write_whole

FORMAT = 1
MOST_PLACES = 16
"""The places that the file keeps; the oldest are dropped."""
LARGEST_FILE = 1 << 20
"""A larger file is not ours and is not read."""


def path() -> Path | None:
    """Return where the verdicts are kept; None if the user has no home folder."""
    with suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastnce" / "kernels.json"
    return None


def read(place: str) -> dict[str, str]:
    """Return the verdicts of a place; empty if there are none or the file cannot be read."""
    found = _read_all().get(place)
    if not isinstance(found, dict):
        return {}
    return {name: reason for name, reason in found.items() if isinstance(reason, str)}


def remember(place: str, name: str, reason: str) -> None:
    """Add a verdict to the file, or replace it. If the file cannot be written, nothing happens."""
    where = path()
    if where is None or (where.exists() and not where.is_file()):
        return
    places = _read_all()
    verdicts = read(place) | {name: reason}
    places.pop(place, None)
    places[place] = verdicts  # the newest place is the last
    kept = dict(list(places.items())[-MOST_PLACES:])
    with suppress(OSError, ValueError):
        where.parent.mkdir(parents=True, exist_ok=True)
        write_whole(where, json.dumps({"format": FORMAT, "places": kept}, indent=1).encode())


def _read_all() -> dict[str, Any]:
    where = path()
    try:
        if where is None or not where.is_file() or where.stat().st_size > LARGEST_FILE:
            return {}
        content = json.loads(where.read_bytes())
    except (OSError, ValueError, RecursionError):  # unreadable, or not JSON
        return {}
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("places"), dict):
        return {}
    return content["places"]


def place_of(device: torch.device) -> str:
    """Name everything that a verdict depends on: device, driver, versions, and the kernels' source."""
    name, driver = device_and_driver(device.type, device.index)
    versions = f"torch {torch.__version__}, triton {_triton_version()}, fastnce {__version__}"
    return f"{name}, driver {driver}, {versions}, source {source_digest()}"


@functools.cache
def device_and_driver(kind: str, index: int | None) -> tuple[str, str]:
    """Return the name of a device and the version of its driver, or "unknown"."""
    name, driver = platform.machine() or kind, "unknown"
    with suppress(Exception):  # a description of the device must never end the work on it
        if kind == "cuda":
            name = torch.cuda.get_device_name(index)
            driver = _cuda_driver() or driver
        elif kind == "xpu":
            properties = torch.xpu.get_device_properties(index)
            name, driver = properties.name, str(properties.driver_version)
    return name, driver


def _cuda_driver() -> str:
    """Return the version of the driver of NVIDIA's or AMD's devices without starting a process; "" if unknown."""
    nvidia, amd = Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")
    with suppress(OSError):
        if torch.version.hip is not None:
            return f"amdgpu {amd.read_text().strip()}, ROCm {torch.version.hip}"
        found = re.search(r"Module\b.*?\s(\d+\.\d[\d.]*)\s", nvidia.read_text(errors="replace"))
        if found:
            return found[1]
    version = getattr(torch._C, "_cuda_getDriverVersion", None)  # private: the highest CUDA version of the driver
    return f"for CUDA {version() // 1000}.{version() % 1000 // 10}" if version is not None else ""


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


@functools.cache
def source_digest() -> str:
    """Digest of the kernels and of the code that launches them, so that edited kernels are checked anew."""
    package = Path(__file__).resolve().parents[1]
    kernels = package / "kernels"
    folders = [kernels if kernels.is_dir() else package.parent / "kernels", package / "nce" / "impl"]
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    digest = hashlib.sha256()
    for file in [*files, package / "networks" / "fused.py"]:
        with suppress(OSError):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
