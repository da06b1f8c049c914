"""Times, and what the machine can do at most: for `fastnce bench` and for the benchmarks of the repository."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th."""
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
    """Milliseconds a call, one figure a round; short calls are repeated within a round until it lasts `least_ms`.

    `seconds` is shared equally; the order turns round every time, so that nobody always comes after the same one.
    After `until` (of `time.monotonic()`) nothing further begins; a call may then have fewer than `min_rounds`, or none.
    CUDA events on a CUDA device, so that waiting for launches counts as it does in training; `perf_counter` elsewhere.
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
        if repeats[name] == 1:  # nothing to repeat: it was a round, and a slow call is not made for nothing
            times[name].append(first)
    share = seconds * 1e3 / max(1, len(calls))

    def unfinished(name: str) -> bool:
        # a slow one gives up after its share of the time, so that it does not take the others'
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
    """A CUDA graph that does the work once for each input set, one after another."""
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
    """The most that the machine was seen to do, the best of several tries.

    Returns:
        copy_bytes_per_s: bytes read and written a second by a large copy; matmul_*_flop_per_s: of square products of
        random matrices in float32, tf32 (CUDA) and bfloat16; launch_eager_s and launch_graph_s (CUDA): seconds a
        one-element operator takes when it is launched alone, and as a node of a graph.
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
    """The least time that the ceilings allow: arithmetic at the rate of `dtype` products, or traffic in bytes."""
    rate, bandwidth = limits.get(f"matmul_{dtype}_flop_per_s"), limits.get("copy_bytes_per_s")
    times = []
    if flop and rate:
        times.append(flop / rate)
    if traffic and bandwidth:
        times.append(traffic / bandwidth)
    return max(times) * 1e3 if times else None


def default_device(name: str | None = None) -> torch.device:
    """The device of this name; without one the accelerator, or the CPU."""
    if name is not None:
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU" if device.type == "cpu" else device.type
