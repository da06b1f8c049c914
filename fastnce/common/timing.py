"""Timing of functions and peak rates of the machine, for `fastnce bench` and the repository's benchmarks."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def synchronize(device: torch.device) -> None:
    """Wait until the accelerator has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    values = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    p20, p50, p80 = values.tolist()
    return p20, p50, p80


def time_interleaved(
    calls: dict[str, Callable[[], Any]],
    device: torch.device,
    seconds: float,
    *,
    min_rounds: int = 3,
    max_rounds: int = 200,
    least_ms: float = 1.0,
    until: float | None = None,
) -> dict[str, list[float]]:
    """Measure milliseconds per call, one figure per round, the calls in turn.

    A short call is repeated within a round until the round lasts `least_ms`. All calls get an equal share of `seconds`.
    The order is reversed after each round, so that no call always follows the same other one. Nothing starts after
    `until` (a time of `time.monotonic()`); a call may then have fewer than `min_rounds` figures, or none. CUDA devices
    are timed with CUDA events, which count launch overhead as training does; other devices with `perf_counter`.
    """

    def once(call: Callable[[], Any], repeats: int) -> float:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / repeats
        synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        return (time.perf_counter() - began) * 1e3 / repeats

    def over() -> bool:
        return until is not None and time.monotonic() > until

    repeats: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        if over():
            return times
        first = once(call, 1)
        repeats[name] = min(1000, max(1, math.ceil(least_ms / max(first, 1e-4))))
        if repeats[name] == 1:  # a slow call: the first one already is a round
            times[name].append(first)
    share = seconds * 1e3 / max(1, len(calls))

    def unfinished(name: str) -> bool:
        # A slow call stops after its share of the time and leaves the other shares untouched.
        done = times[name]
        return len(done) < min_rounds or (len(done) < max_rounds and sum(done) * repeats[name] < share)

    order = list(calls)[::-1]
    while running := [name for name in order if unfinished(name)]:
        for name in running:
            if over():
                return times
            times[name].append(once(calls[name], repeats[name]))
        order.reverse()
    return times


def capture(call: Callable[..., Any], inputs: Sequence[tuple]) -> Callable[[], None]:
    """Record a CUDA graph that runs the call once per input set, in order; return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(*inputs[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for tensors in inputs:
            call(*tensors)
    return graph.replay


def ceilings(device: torch.device, quick: bool = False) -> dict[str, float]:
    """Measure the machine's peak rates, the best of several tries.

    Returns:
        copy_bytes_per_s: bytes read and written per second by a large copy; matmul_*_flop_per_s: rate of square
        products of random matrices in float32, tf32 (CUDA) and bfloat16; launch_eager_s and launch_graph_s (CUDA):
        seconds of a one-element operator, launched alone and as a node of a graph; matmul_size: side of the matrices.
    """
    cpu = device.type == "cpu"
    numbers = (1 << 22 if quick else 1 << 25) if cpu else (1 << 24 if quick else 1 << 29)
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {"copy": functools.partial(target.copy_, source)}
    size = (256 if quick else 1024) if cpu else (2048 if quick else 8192)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        calls[str(dtype).removeprefix("torch.")] = functools.partial(torch.matmul, a, b)
        if device.type == "cuda" and dtype == torch.float32:
            calls["tf32"] = functools.partial(_tf32_product, a, b)
    best = {name: min(t) / 1e3 for name, t in time_interleaved(calls, device, 0.3 if quick else 3.0).items()}
    found = {"copy_bytes_per_s": 2 * 4 * numbers / best.pop("copy")}
    found |= {f"matmul_{name}_flop_per_s": 2 * size**3 / seconds for name, seconds in best.items()}
    if device.type == "cuda":
        found |= _launch_seconds(device)
    return found | {"matmul_size": size}


def _tf32_product(a: Tensor, b: Tensor) -> Tensor:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return a @ b
    finally:
        torch.set_float32_matmul_precision(before)


def _launch_seconds(device: torch.device, count: int = 1000) -> dict[str, float]:
    x = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(count):
            x.add_(1.0)

    calls = {"launch_eager_s": many, "launch_graph_s": capture(many, [()])}
    return {name: min(t) / 1e3 / count for name, t in time_interleaved(calls, device, 0.5).items()}


def floor_ms(flop: float | None, traffic: float | None, dtype: str, limits: dict[str, float]) -> float | None:
    """Return the shortest possible time at the peak rates of `ceilings`, in milliseconds.

    It is the larger of the time of `flop` at the rate of `dtype` products and the time of `traffic` bytes; None if
    neither is known.
    """
    rate, bandwidth = limits.get(f"matmul_{dtype}_flop_per_s"), limits.get("copy_bytes_per_s")
    times = []
    if flop and rate:
        times.append(flop / rate)
    if traffic and bandwidth:
        times.append(traffic / bandwidth)
    return max(times) * 1e3 if times else None


def default_device(name: str | None = None) -> torch.device:
    """Return the device of this name; without a name, the accelerator if there is one, else the CPU."""
    if name is not None:
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU" if device.type == "cpu" else device.type
