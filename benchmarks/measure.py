"""How anything is measured here: interleaved times, peak memory, launches, energy, and what the machine can do at most.

A `Case` is one piece of work on fixed inputs, done by several `Provider`s; `measure(case, context)` gives a `Row` each.
Times are percentiles over rounds in which every provider runs once, in one process, so that a drift of clocks or a
neighbour on the machine meets all of them. What cannot be measured stays empty; a figure is never made up.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.published import Checkout

L2_MULTIPLE = 2
"""Inputs rotate through this many times the size of the L2 cache."""


@dataclass
class Provider:
    """One way of doing the work of a case.

    Args:
        name: who does it.
        call: takes the tensors of one input set and does the whole work, gradients included.
        mode: "eager", "compile" or "graph" (captured in a CUDA graph; the call must not touch the host).
        note: what a reader of the figure has to know.
    """

    name: str
    call: Callable[..., Any]
    mode: str = "eager"
    note: str = ""


@dataclass
class Case:
    """The same work for every provider.

    Args:
        benchmark: "patchnce", "chain", "infonce", ...
        size: what is varied, e.g. {"images": 1, "patches": 256, "dim": 256, "dtype": "float32"}.
        make_inputs: draws one set of inputs.
        flop, bytes: the least that the work costs, for the floor; None where not worked out.
    """

    benchmark: str
    size: dict[str, Any]
    make_inputs: Callable[[], tuple]
    providers: list[Provider]
    flop: float | None = None
    bytes: float | None = None
    energy: bool = False


@dataclass
class Row:
    """One line of the results. Times in ms a call; empty fields were not measured."""

    benchmark: str
    provider: str
    mode: str
    images: int | None = None
    patches: int | None = None
    dim: int | None = None
    layers: int | None = None
    dtype: str = ""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    joules: float | None = None
    floor_ms: float | None = None
    floor_fraction: float | None = None
    note: str = ""


@dataclass
class Context:
    """What a part is given: where it runs, how much of it, beside what."""

    device: torch.device
    quick: bool = False
    published: list[Checkout] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Time that the interleaved rounds of one case may take."""
        return 0.3 if self.quick else 5.0

    def free_bytes(self) -> int:
        """Memory that a provider may take: half of what is free now; on a CPU 2 GiB, more would take minutes a call."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0] // 2
        return 2 << 30


def synchronize(device: torch.device) -> None:
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
) -> dict[str, list[float]]:
    """Milliseconds a call, one figure a round; short calls are repeated within a round until it lasts `least_ms`.

    `seconds` is shared equally; the order turns round every time, so that nobody always comes after the same one.
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

    repeats = {n: min(1000, max(1, math.ceil(least_ms / max(once(call, 1), 1e-4)))) for n, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    share = seconds * 1e3 / max(1, len(calls))

    def unfinished(name: str) -> bool:
        # a slow one gives up after its share of the time, so that it does not take the others'
        done = times[name]
        return len(done) < min_rounds or (len(done) < max_rounds and sum(done) * repeats[name] < share)

    order = list(calls)
    while running := [name for name in order if unfinished(name)]:
        for name in running:
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
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    if device.type != "cpu" or mode == "compile":  # compiled code does not come by the dispatcher
        return None
    with _Counter() as counter:
        call()
    return counter.count


def nvml_uuid(device: torch.device) -> str:
    """NVML counts boards its own way; the identifier is the same for both."""
    return "GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")


def joules(call: Callable[[], Any], device: torch.device, seconds: float = 2.0) -> float | None:
    """Energy of a call, from the board's total-energy counter over at least two seconds. None without NVML."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(nvml_uuid(device))
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no NVML, or a board without the counter
        return None
    synchronize(device)
    count, began = 0, time.perf_counter()
    before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            call()
        synchronize(device)
        count += 10
    return (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3 / count


def floor_ms(case: Case, machine: dict[str, Any]) -> float | None:
    """The least time that the measured ceilings of this machine allow for the case."""
    ceilings = machine.get("ceilings", {})
    flops = ceilings.get(f"matmul_{case.size.get('dtype')}_flop_per_s")
    bandwidth = ceilings.get("copy_bytes_per_s")
    times = []
    if case.flop and flops:
        times.append(case.flop / flops)
    if case.bytes and bandwidth:
        times.append(case.bytes / bandwidth)
    return max(times) * 1e3 if times else None


def measure(case: Case, context: Context) -> Iterator[Row]:
    """A row for each provider; one that raises gets a row that says so, and loses nobody else's figures."""
    device = context.device
    inputs = [case.make_inputs()]
    if device.type == "cuda":
        one = max(1, sum(t.numel() * t.element_size() for t in _tensors(inputs[0])))
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        inputs += [case.make_inputs() for _ in range(min(128, L2_MULTIPLE * l2 // one))]
    floor = floor_ms(case, context.machine)
    rows, calls, per_call = {}, {}, {}
    for provider in case.providers:
        key = f"{provider.name}|{provider.mode}"
        row = rows[key] = Row(case.benchmark, provider.name, provider.mode, **case.size, note=provider.note)
        try:
            calls[key], per_call[key] = _prepare(provider, inputs)
        except Exception as error:  # out of memory, not supported here, does not compile: said, and the rest goes on
            row.note = f"did not run: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        single = functools.partial(provider.call, *inputs[0])
        row.peak_bytes = _try(row, peak_bytes, single, device)
        counted = _try(row, launches, calls[key] if provider.mode == "graph" else single, device, provider.mode)
        row.launches = None if counted is None else round(counted / per_call[key])
    times = time_interleaved(calls, device, context.seconds) if calls else {}
    for key, row in rows.items():
        if key in times:
            row.p20_ms, row.p50_ms, row.p80_ms = (t / per_call[key] for t in percentiles(times[key]))
            row.rounds = len(times[key])
            row.floor_ms = floor
            row.floor_fraction = floor / row.p50_ms if floor else None
            if case.energy and not context.quick:
                energy = joules(calls[key], device)
                row.joules = None if energy is None else energy / per_call[key]
        yield row


def _try(row: Row, measurement: Callable[..., int | None], *arguments: Any) -> int | None:
    """A measurement beside the time: when it fails, its field stays empty and the note says so."""
    try:
        return measurement(*arguments)
    except Exception as error:
        row.note = f"{row.note}; no {measurement.__name__}: {type(error).__name__}".removeprefix("; ")
        return None


def _prepare(provider: Provider, inputs: list[tuple]) -> tuple[Callable[[], Any], int]:
    """(what to time, how many calls of the provider it holds)."""
    if provider.mode == "graph":
        return capture(provider.call, inputs), len(inputs)
    state = [0]

    def call() -> Any:
        state[0] = (state[0] + 1) % len(inputs)
        return provider.call(*inputs[state[0]])

    call()
    return call, 1


def _tensors(nested: Any) -> Iterator[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        yield nested
    elif isinstance(nested, (list, tuple)):
        for item in nested:
            yield from _tensors(item)
