"""Measure what a call costs besides time: peak memory, launches, energy; and its time by Triton's own functions."""

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
from fastnce.common.timing import synchronize


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return the peak of allocated bytes during a call, above the bytes allocated before it."""
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
    # On the CPU the profiler reports every tensor allocation, but no scratch memory of libraries.
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


def do_bench(call: Callable[[], Any], device: torch.device, mode: str) -> tuple[float, float, float] | None:
    """Return the median and the 20th and 80th percentile of `triton.testing.do_bench`, in ms; None without a GPU.

    It times each call alone and overwrites the L2 cache before it, so a call starts with cold inputs and an idle
    device. A call to be captured (mode "graph") is timed with `do_bench_cudagraph`, in a graph of many calls.
    """
    if device.type != "cuda":
        return None
    from triton import testing

    function = testing.do_bench_cudagraph if mode == "graph" else testing.do_bench
    with torch.cuda.device(device):
        median, p20, p80 = function(call, quantiles=[0.5, 0.2, 0.8])
    return median, p20, p80


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], Any], device: torch.device, mode: str) -> int | None:
    """Count kernels, copies and fills on the device (CUDA), or dispatched operators including views (CPU)."""
    if mode == "compile":  # profiling may recompile it; on a CPU compiled code bypasses the dispatcher
        return None
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            synchronize(device)
        return device_events(profile) or None  # no events: this machine does not permit profiling
    if device.type != "cpu":
        return None
    with _Counter() as counter:
        call()
    return counter.count


def device_events(profile: Any) -> int:
    """Count the events on the device, except user annotations, which the profiler lists there too."""
    on_device = torch.autograd.DeviceType.CUDA
    try:  # raw events: building Python objects for all of them takes seconds
        events = profile.profiler.kineto_results.events()
        return sum(e.device_type() == on_device and not e.is_user_annotation() for e in events)
    except AttributeError:  # a private interface, which another PyTorch version may lack
        events = profile.events()
        return sum(e.device_type == on_device and not getattr(e, "is_user_annotation", False) for e in events)


def joules(call: Callable[[], Any], device: torch.device, seconds: float = 2.0) -> float | None:
    """Return the energy per call, from the board's counter over at least `seconds`; None without a counter."""
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
