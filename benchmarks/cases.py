"""The data model of the benchmarks: `Case` (the work), `Provider` (who does it), `Row` (a result), `Context`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.published import Checkout
from benchmarks.step_costs import Counts

CAPTURED = "captured"
"""Part of the mode of a provider that replays its own CUDA graph."""


@dataclass
class Provider:
    """One implementation of the work of a case.

    Args:
        name: of the implementation.
        call: takes the tensors of one input set and does the whole work, gradients included.
        mode: "eager", "compile", "graph" (`measure` captures the call in a CUDA graph; it must not synchronise with
            the host) or a text that contains "captured" (the call replays its own graph).
        note: what a reader needs to know to interpret the result.
        dtype: of its matrix products, which selects the ceiling; default that of the case.
        bytes: the least traffic; default that of the case.
        energy: also measure joules, for at least two seconds, after all times of the part.
        check: called after the timing; returns a further note, for example that another mode ran.
    """

    name: str
    call: Callable[..., Any]
    mode: str = "eager"
    note: str = ""
    dtype: str | None = None
    bytes: float | None = None
    energy: bool = False
    check: Callable[[], str] = lambda: ""

    @property
    def recorded(self) -> bool:
        """Whether the provider replays a CUDA graph."""
        return self.mode == "graph" or CAPTURED in self.mode


@dataclass
class Case:
    """One piece of work, the same for every provider.

    Args:
        benchmark: "patchnce", "chain", "infonce", ...
        size: the varied sizes, e.g. {"images": 1, "patches": 256, "dim": 256, "dtype": "float32"}.
        make_inputs: draws one set of inputs.
        flop, bytes: the least cost of the work, for the floor; None if unknown.
        steps: of a whole training, to project its time.
        do_bench: measure each provider with `triton.testing.do_bench` as well, after all times of the part.
    """

    benchmark: str
    size: dict[str, Any]
    make_inputs: Callable[[], tuple]
    providers: list[Provider]
    flop: float | None = None
    bytes: float | None = None
    steps: int | None = None
    do_bench: bool = False


@dataclass
class Row:
    """One line of the results. Times are in ms per call; None means not measured.

    floor_ms is the larger of `flop` at the measured rate of the row's precision and `bytes` at the measured bandwidth.
    launch_floor_ms is the number of launches times the measured cost of one. ceiling_fraction is the rate of `flop`
    divided by the measured rate of the row's precision. do_bench_ms is the median of `triton.testing.do_bench`.
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
    do_bench_ms: float | None = None
    do_bench_p20_ms: float | None = None
    do_bench_p80_ms: float | None = None
    note: str = ""

    def key(self) -> str:
        """Return a text that identifies the case and provider within a part."""
        size = " x ".join(
            str(n) for n in (self.images, self.side, self.patches, self.dim, self.layers) if n is not None
        )
        return f"{self.benchmark} ({size}) by {self.provider}, {self.mode}"

    def add_note(self, text: str) -> None:
        self.note = "; ".join(filter(None, (self.note, text)))


@dataclass
class Context:
    """The settings of a part: device, sizes, published checkouts, time limit.

    Args:
        device: to measure.
        quick: tiny sizes, to test that everything runs.
        published: checkouts of published repositories.
        machine: the result of `benchmarks.machine.describe`.
        until: `time.monotonic()` at which the supervising process stops the part.
        journal: receives each begin and end, so that the supervisor knows which provider crashed the process.
        refused: by `Row.key`, the reason why a provider must not run again: it hung or crashed the process.
        done: keys of rows that an earlier process of the part has measured.
        patience: seconds allowed for the first calls of one provider.
        share: the largest fraction of the part's remaining time for these first calls.
        compiling: seconds always allowed for these first calls, because kernels may have to be compiled.
        cases: the number of cases that share the part's time.
        side: of the images of steps; None for the default.
        counts: the counted costs of steps.
        timed: what `measure` leaves for `measure_rest`.
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
    share: float = 0.5
    compiling: float = 30.0
    cases: int = 8
    side: int | None = None
    counts: Counts = field(default_factory=Counts)
    timed: list[Any] = field(default_factory=list)

    @property
    def large(self) -> bool:
        """Whether this is the full run, on an accelerator."""
        return self.device.type != "cpu" and not self.quick

    def left(self) -> float:
        """Return the remaining seconds of the part."""
        return float("inf") if self.until is None else self.until - time.monotonic()

    def may_take(self) -> float:
        """Return the seconds after which a provider's first calls count as hung."""
        return min(self.patience, max(self.left() * self.share, self.compiling))

    @property
    def seconds(self) -> float:
        """Seconds for the interleaved rounds of one case."""
        return 0.05 if self.quick else max(0.3, min(5.0, self.left() / self.cases))

    @property
    def limits(self) -> dict[str, float]:
        """The measured ceilings of this machine."""
        return self.machine.get("ceilings", {})

    def free_bytes(self) -> int:
        """Return the memory for one provider: half of the free memory; on a CPU 2 GiB, as more takes minutes."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0] // 2
        return 2 << 30
