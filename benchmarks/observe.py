"""What a call costs besides time: peak memory, launches, energy."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.nvml import board
from fastnce.timing import synchronize


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Highest allocation during a call, above what was allocated before it."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    # The profiler reports every allocation of a tensor's memory on the CPU; scratch memory of a library is not seen.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
        gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    now = highest = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        now += change
        highest = max(highest, now)
    return highest if changes else None


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], Any], device: torch.device, mode: str) -> int | None:
    """Kernels, copies and fills on the device (CUDA), or operators dispatched, views among them (CPU)."""
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            synchronize(device)
        # none at all: this machine does not let its kernels be watched
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()) or None
    if device.type != "cpu" or mode == "compile":  # compiled code does not come by the dispatcher
        return None
    with _Counter() as counter:
        call()
    return counter.count


def joules(call: Callable[[], Any], device: torch.device, seconds: float = 2.0) -> float | None:
    """Energy a call, from the board's counter over at least `seconds`; None where there is none."""
    counter = board(device)
    if counter is None:
        return None
    synchronize(device)
    count, began, before = 0, time.perf_counter(), counter.joules()
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            call()
        synchronize(device)
        count += 10
    return (counter.joules() - before) / count
