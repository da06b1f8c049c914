"""How anything is measured here: interleaved times, peak memory, launches, energy, beside the least that it can cost.

A `Case` is one piece of work on fixed inputs, done by several `Provider`s; `measure(case, context)` gives a `Row` each.
Times are percentiles over rounds in which every provider runs once, in one process, so that a drift of clocks or a
neighbour on the machine meets all of them. What cannot be measured stays empty; a figure is never made up.
"""

from __future__ import annotations

import functools
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.count import Counts
from benchmarks.observe import joules, launches, peak_bytes
from benchmarks.published import Checkout
from fastnce.timing import capture, floor_ms, percentiles, time_interleaved

L2_MULTIPLE = 2
"""Inputs rotate through this many times the size of the L2 cache."""

LEAST_LEFT = 3.0
"""Seconds that must be left of a part's time for anything further to begin."""

OVER = "not run: time is over"
CAPTURED = "captured"
"""In the mode of a provider that replays a graph of its own."""


@dataclass
class Provider:
    """One way of doing the work of a case.

    Args:
        name: who does it.
        call: takes the tensors of one input set and does the whole work, gradients included.
        mode: "eager", "compile", "graph" (recorded in a CUDA graph here; the call must not touch the host) or with
            "captured" in it (the call replays a graph of its own).
        note: what a reader of the figure has to know.
        dtype: in which its products are computed, for the ceiling, where that is not the case's.
        bytes: the least that it moves, where that is not the case's.
    """

    name: str
    call: Callable[..., Any]
    mode: str = "eager"
    note: str = ""
    dtype: str | None = None
    bytes: float | None = None


@dataclass
class Case:
    """The same work for every provider.

    Args:
        benchmark: "patchnce", "chain", "infonce", ...
        size: what is varied, e.g. {"images": 1, "patches": 256, "dim": 256, "dtype": "float32"}.
        make_inputs: draws one set of inputs.
        flop, bytes: the least that the work costs, for the floor; None where not worked out.
        energy: also measure joules, for at least two seconds a provider.
        steps: of a whole run, to project its time from one.
    """

    benchmark: str
    size: dict[str, Any]
    make_inputs: Callable[[], tuple]
    providers: list[Provider]
    flop: float | None = None
    bytes: float | None = None
    energy: bool = False
    steps: int | None = None


@dataclass
class Row:
    """One line of the results. Times in ms a call; empty fields were not measured.

    floor_ms is the longer of `flop` at the measured rate of the row's precision and `bytes` at the measured bandwidth;
    launch_floor_ms the launches at the measured cost of one; ceiling_fraction the rate of `flop` over that ceiling.
    """

    benchmark: str
    provider: str
    mode: str
    images: int | None = None
    side: int | None = None
    patches: int | None = None
    dim: int | None = None
    layers: int | None = None
    dtype: str = ""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    images_per_s: float | None = None
    steps_per_s: float | None = None
    flop: float | None = None
    bytes: float | None = None
    ceiling_fraction: float | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    joules: float | None = None
    joules_per_1000_images: float | None = None
    floor_ms: float | None = None
    floor_fraction: float | None = None
    launch_floor_ms: float | None = None
    note: str = ""

    def key(self) -> str:
        """What tells one case and provider from all others of a part."""
        size = " x ".join(
            str(n) for n in (self.images, self.side, self.patches, self.dim, self.layers) if n is not None
        )
        return f"{self.benchmark} ({size}) by {self.provider}, {self.mode}"


@dataclass
class Context:
    """What a part is given: where it runs, how much of it, beside what, until when.

    Args:
        until: `time.monotonic()` at which the part is stopped from outside.
        journal: told what begins and ends, so that whoever watches knows which provider took the process down.
        refused: by `Row.key`, why a provider is not to be run again: it hung or took the process down before.
        done: keys of rows that an earlier process of the part has measured.
        patience: seconds that one provider's first calls may take, at most half of what is left.
        side: of the pictures of steps, where the usual one is not wanted.
        counts: what steps cost, as far as it was worked out already.
    """

    device: torch.device
    quick: bool = False
    published: list[Checkout] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    until: float | None = None
    journal: Callable[[dict[str, Any]], None] = lambda _: None
    refused: dict[str, str] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    patience: float = 120.0
    side: int | None = None
    counts: Counts = field(default_factory=Counts)

    def left(self) -> float:
        """Seconds."""
        return float("inf") if self.until is None else self.until - time.monotonic()

    @property
    def seconds(self) -> float:
        """Time that the interleaved rounds of one case may take."""
        return 0.2 if self.quick else max(0.3, min(5.0, self.left() / 8))

    @property
    def limits(self) -> dict[str, float]:
        """The ceilings of this machine."""
        return self.machine.get("ceilings", {})

    def free_bytes(self) -> int:
        """Memory that a provider may take: half of what is free now; on a CPU 2 GiB, more would take minutes a call."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0] // 2
        return 2 << 30


class DeviceLost(RuntimeError):
    """The device answers nothing any more: this process can measure nothing further."""


def measure(case: Case, context: Context) -> Iterator[Row]:
    """A row for each provider; one that raises gets a row that says so, and loses nobody else's figures.

    A provider that hangs, or takes the process or its device down, was named to `context.journal` before: whoever
    watches starts another process, in which it is refused.
    """
    device = context.device
    rows = {}
    for provider in case.providers:
        row = Row(case.benchmark, provider.name, provider.mode, **case.size, note=provider.note)
        row.dtype = provider.dtype or row.dtype
        rows[row.key()] = row
    if all(key in context.done for key in rows):
        return
    inputs: list[tuple] = []
    if context.left() > LEAST_LEFT:
        _free(device)
        inputs = _input_sets(case, device)
    calls, per_call = {}, {}
    for (key, row), provider in zip(rows.items(), case.providers, strict=True):
        if key in context.refused:
            row.note = f"did not run: {context.refused[key]}"
        elif context.left() < LEAST_LEFT:
            row.note = OVER
        else:
            context.journal({"begin": key, "row": asdict(row), "seconds": min(context.patience, context.left() / 2)})
            ready = _prepared(row, provider, inputs, device)
            context.journal({"end": key, "row": asdict(row)})
            if ready is not None:
                calls[key], per_call[key] = ready
    # the last moment at which a further round may begin; on a slow machine three rounds may last minutes
    until = None if context.until is None else context.until - LEAST_LEFT
    times = time_interleaved(calls, device, context.seconds, until=until) if calls else {}
    for (key, row), provider in zip(rows.items(), case.providers, strict=True):
        if times.get(key):
            row.p20_ms, row.p50_ms, row.p80_ms = (t / per_call[key] for t in percentiles(times[key]))
            row.rounds = len(times[key])
            if case.energy and not context.quick and context.left() > 2 * LEAST_LEFT:
                energy = joules(calls[key], device)
                row.joules = None if energy is None else energy / per_call[key]
            _derive(row, case, provider, context.limits)
        elif key in calls:
            row.note = OVER
        yield row


def _input_sets(case: Case, device: torch.device) -> list[tuple]:
    """As many sets as the L2 cache does not hold, on a CUDA device; one elsewhere."""
    inputs = [case.make_inputs()]
    if device.type == "cuda":
        one = max(1, sum(t.numel() * t.element_size() for t in _tensors(inputs[0])))
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        inputs += [case.make_inputs() for _ in range(min(128, L2_MULTIPLE * l2 // one))]
    return inputs


def _prepared(
    row: Row, provider: Provider, inputs: list[tuple], device: torch.device
) -> tuple[Callable[[], Any], int] | None:
    """What to time and how many calls it holds, after its first calls; memory and launches go into the row."""
    ready = None
    try:
        ready = _prepare(provider, inputs)
    except Exception as error:  # out of memory, not supported here, does not compile: said, and the rest goes on
        row.note = f"did not run: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        print(row.key(), file=sys.stderr)
        traceback.print_exc()
    if ready is None:  # here, where the error and what it held are gone
        _free(device)
        return None
    single = functools.partial(provider.call, *inputs[0])
    if CAPTURED not in provider.mode:  # whose memory was taken when it was recorded, and stays
        row.peak_bytes = _try(row, peak_bytes, single, device)
    row.launches = _try(row, launches, single, device, provider.mode)
    return ready


def _free(device: torch.device) -> None:
    """Give back what earlier providers held.

    Raises:
        DeviceLost: after a fault on a CUDA device every further call in the process fails.
    """
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(str(error).splitlines()[0]) from error


def _recorded(mode: str) -> bool:
    return mode == "graph" or CAPTURED in mode


def _derive(row: Row, case: Case, provider: Provider, limits: dict[str, float]) -> None:
    """Rates and floors from the median."""
    assert row.p50_ms is not None
    row.flop, row.bytes = case.flop, provider.bytes or case.bytes
    row.steps_per_s = 1e3 / row.p50_ms
    row.images_per_s = None if row.images is None else row.images * row.steps_per_s
    row.floor_ms = floor_ms(row.flop, row.bytes, row.dtype, limits)
    row.floor_fraction = row.floor_ms / row.p50_ms if row.floor_ms else None
    if row.flop and (rate := limits.get(f"matmul_{row.dtype}_flop_per_s")):
        row.ceiling_fraction = row.flop / row.p50_ms * 1e3 / rate
    one = limits.get("launch_graph_s" if _recorded(row.mode) else "launch_eager_s")
    if row.launches and one:
        row.launch_floor_ms = row.launches * one * 1e3
    if row.joules is not None and row.images:
        row.joules_per_1000_images = row.joules / row.images * 1e3
    if case.steps:
        projected = f"{case.steps:,} steps: {case.steps * row.p50_ms / 6e4:.1f} minutes"
        row.note = f"{row.note}; {projected}".removeprefix("; ")


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
