"""Measure cases: interleaved times, peak memory, launches and energy, with lower bounds.

A `Case` is one piece of work on fixed inputs for several `Provider`s. `measure(case, context)` yields a `Row` for each.
Times are percentiles over rounds. In each round every provider runs once in the same process, so that changing clocks
and other load affect all of them alike. A quantity that cannot be measured stays None.

Each provider is first timed alone: a less accurate time, kept in case a later provider crashes the process. Energy,
the figures of `triton.testing.do_bench` and launches are measured after all times of a part (`measure_rest`), because a
profiler stays attached to the process.
"""

from __future__ import annotations

import functools
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.cases import CAPTURED, Case, Context, Provider, Row
from benchmarks.observe import do_bench, joules, launches, peak_bytes
from fastnce.common.timing import capture, floor_ms, percentiles, synchronize, time_interleaved

L2_MULTIPLE = 2
"""Inputs rotate through this multiple of the size of the L2 cache."""

LEAST_LEFT = 3.0
"""Remaining seconds of a part below which no further measurement starts."""

ALONE_SECONDS, ALONE_SECONDS_QUICK = 0.2, 0.02
SLOW = 1.0
"""Seconds; a longer call is not repeated when timed alone."""

OVER = "not run: time is over"
ALONE = "alone, not interleaved"


class DeviceLost(RuntimeError):
    """The device no longer responds, so this process cannot measure anything further."""


@dataclass
class _Ready:
    """A provider after its first calls."""

    row: Row
    case: Case
    provider: Provider
    call: Callable[[], Any]
    """The function to time."""
    calls: int
    """Number of the provider's calls in it."""
    single: Callable[[], Any]
    """One call of the provider."""
    note: str
    """The part of the note that does not depend on its times."""

    def take(self, times: Sequence[float], limits: dict[str, float]) -> None:
        """Fill in the row from the rounds' milliseconds."""
        row = self.row
        row.p20_ms, row.p50_ms, row.p80_ms = (t / self.calls for t in percentiles(times))
        row.rounds, row.note = len(times), self.note
        row.add_note(self.provider.check())
        if self.case.steps:
            row.add_note(f"{self.case.steps:,} steps: {self.case.steps * row.p50_ms / 6e4:.1f} minutes")
        _derive(row, self.case, self.provider, limits)


def measure(case: Case, context: Context) -> Iterator[Row]:
    """Yield a row for each provider. If a provider raises, its row has the error, and the others are measured.

    `context.journal` receives the name of each provider before it runs. If it hangs or crashes the process or the
    device, the supervisor starts another process that skips it. `measure_rest` adds energy and launches.
    """
    device, limits = context.device, context.limits
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
    found: dict[str, _Ready] = {}
    for (key, row), provider in zip(rows.items(), case.providers, strict=True):
        if key in context.refused:
            row.note = f"did not run: {context.refused[key]}"
        elif context.left() < LEAST_LEFT:
            row.note = OVER
        else:
            context.journal({"begin": key, "row": asdict(row), "seconds": context.may_take()})
            ready = _prepared(row, case, provider, inputs, context)
            context.journal({"end": key, "row": asdict(row)})
            if ready is not None:
                found[key] = ready
    if found:
        recorded = [key for key, ready in found.items() if ready.provider.recorded]
        patience = min(context.patience, 10.0 + 4.0 * context.seconds) if device.type != "cpu" else context.left()
        context.journal({"timing": recorded or list(found), "seconds": patience})
        # no round starts after this time: on a slow machine three rounds may take minutes
        until = None if context.until is None else context.until - LEAST_LEFT
        calls = {key: ready.call for key, ready in found.items()}
        least = {"least_ms": _least_ms(device), "min_rounds": 2 if context.quick else 3}
        times = time_interleaved(calls, device, context.seconds, **least, until=until)
        context.journal({"timed": list(found)})
        for key, ready in found.items():
            if times[key]:  # otherwise the row keeps the time measured alone
                ready.take(times[key], limits)
        context.timed += found.values()
    yield from rows.values()


def measure_rest(context: Context) -> Iterator[Row]:
    """Yield the rows of `measure` again: with energy, with Triton's figures, with launches, if the time permits."""
    timed, context.timed[:] = list(context.timed), []
    for ready in timed:
        if ready.provider.energy and not context.quick and context.left() > 2 * LEAST_LEFT:
            energy = _try(ready.row, joules, ready.call, context.device)
            if energy is not None:
                ready.row.joules = energy / ready.calls
                _derive(ready.row, ready.case, ready.provider, context.limits)
                yield ready.row
    for ready in timed:
        row = ready.row
        if ready.case.do_bench and row.p50_ms < SLOW * 1e3 and context.left() > 2 * LEAST_LEFT:
            found = _try(row, do_bench, ready.single, context.device, ready.provider.mode)
            if found is not None:
                row.do_bench_ms, row.do_bench_p20_ms, row.do_bench_p80_ms = found
                yield row
    for ready in timed:
        if context.left() > LEAST_LEFT:
            ready.row.launches = _try(ready.row, launches, ready.single, context.device, ready.provider.mode)
            _derive(ready.row, ready.case, ready.provider, context.limits)
            yield ready.row


def _input_sets(case: Case, device: torch.device) -> list[tuple]:
    """Return enough sets to exceed the L2 cache on a CUDA device, or one set elsewhere."""
    inputs = [case.make_inputs()]
    if device.type == "cuda":
        one = max(1, sum(t.numel() * t.element_size() for t in _tensors(inputs[0])))
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        inputs += [case.make_inputs() for _ in range(min(128, L2_MULTIPLE * l2 // one))]
    return inputs


def _prepared(row: Row, case: Case, provider: Provider, inputs: list[tuple], context: Context) -> _Ready | None:
    """Make the provider's first calls, and fill in its memory and its time alone; None if it raises."""
    ready = None
    try:
        ready = _first_calls(row, case, provider, inputs, context)
    except Exception as error:  # such as out of memory, not supported, does not compile
        row.note = f"did not run: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        print(row.key(), file=sys.stderr)
        traceback.print_exc()
    if ready is None:  # outside the handler, so that the tensors of the traceback are released
        _free(context.device)
    return ready


def _first_calls(row: Row, case: Case, provider: Provider, inputs: list[tuple], context: Context) -> _Ready:
    device, seconds = context.device, ALONE_SECONDS_QUICK if context.quick else ALONE_SECONDS
    call, calls = _prepare(provider, inputs)
    single = functools.partial(provider.call, *inputs[0])
    synchronize(device)  # attribute a device fault to this provider
    took = [0.0]

    def once() -> None:
        began = time.perf_counter()
        single()
        synchronize(device)
        took[0] = time.perf_counter() - began

    if CAPTURED not in provider.mode:  # a captured graph allocated its memory before
        row.peak_bytes = _try(row, peak_bytes, once, device)
    ready = _Ready(row, case, provider, call, calls, single, row.note)
    if took[0] > SLOW:
        times = [took[0] * 1e3 * calls]
    else:
        times = time_interleaved({"": call}, device, seconds, min_rounds=1, least_ms=_least_ms(device))[""]
    ready.take(times, context.limits)
    row.add_note(ALONE)
    return ready


def _least_ms(device: torch.device) -> float:
    """Return the least duration of a round: on a GPU long enough that launches run ahead, as in training."""
    return 20.0 if device.type == "cuda" else 1.0


def _free(device: torch.device) -> None:
    """Release the memory of earlier providers.

    Raises:
        DeviceLost: after a fault on a CUDA device, as every further call in the process fails.
    """
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(str(error).splitlines()[0]) from error


def _derive(row: Row, case: Case, provider: Provider, limits: dict[str, float]) -> None:
    """Compute rates and floors from the median."""
    assert row.p50_ms is not None
    row.flop, row.bytes = case.flop, provider.bytes or case.bytes
    row.steps_per_s = 1e3 / row.p50_ms
    row.images_per_s = None if row.images is None else row.images * row.steps_per_s
    row.floor_ms = floor_ms(row.flop, row.bytes, row.dtype, limits)
    row.floor_fraction = row.floor_ms / row.p50_ms if row.floor_ms else None
    if row.flop and (rate := limits.get(f"matmul_{row.dtype}_flop_per_s")):
        row.ceiling_fraction = row.flop / row.p50_ms * 1e3 / rate
    one = limits.get("launch_graph_s" if provider.recorded else "launch_eager_s")
    if row.launches and one:
        row.launch_floor_ms = row.launches * one * 1e3
    if row.joules is not None and row.images:
        row.joules_per_1000_images = row.joules / row.images * 1e3


def _try(row: Row, measurement: Callable[..., Any], *arguments: Any) -> Any:
    """Return an additional measurement; if it fails, return None and note the error."""
    try:
        return measurement(*arguments)
    except Exception as error:
        row.add_note(f"no {getattr(measurement, '__name__', 'measurement')}: {type(error).__name__}")
        return None


def _prepare(provider: Provider, inputs: list[tuple]) -> tuple[Callable[[], Any], int]:
    """Return the function to time, and the number of the provider's calls in it."""
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
