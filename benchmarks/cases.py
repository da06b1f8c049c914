"""What is measured: a piece of work, who does it, the line that comes of it, and what a part is given."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.count import Counts
from benchmarks.published import Checkout

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
        energy: also measure joules, for at least two seconds, when all times of the part are there.
        check: asked after the timing what else a reader has to know, such as that it ran in another mode.
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
        """Whether a graph is replayed."""
        return self.mode == "graph" or CAPTURED in self.mode


@dataclass
class Case:
    """The same work for every provider.

    Args:
        benchmark: "patchnce", "chain", "infonce", ...
        size: what is varied, e.g. {"images": 1, "patches": 256, "dim": 256, "dtype": "float32"}.
        make_inputs: draws one set of inputs.
        flop, bytes: the least that the work costs, for the floor; None where not worked out.
        steps: of a whole run, to project its time from one.
    """

    benchmark: str
    size: dict[str, Any]
    make_inputs: Callable[[], tuple]
    providers: list[Provider]
    flop: float | None = None
    bytes: float | None = None
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

    def add_note(self, words: str) -> None:
        self.note = "; ".join(filter(None, (self.note, words)))


@dataclass
class Context:
    """What a part is given: where it runs, how much of it, beside what, until when.

    Args:
        until: `time.monotonic()` at which the part is stopped from outside.
        journal: told what begins and ends, so that whoever watches knows which provider took the process down.
        refused: by `Row.key`, why a provider is not to be run again: it hung or took the process down before.
        done: keys of rows that an earlier process of the part has measured.
        patience: seconds that one provider's first calls may take.
        share: of what is left of the part's time, which they may take at most.
        compiling: seconds that they may take whatever is left: kernels may have to be compiled.
        cases: for how many cases the part's time is to last.
        side: of the pictures of steps, where the usual one is not wanted.
        counts: what steps cost, as far as it was worked out already.
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
        """Seconds."""
        return float("inf") if self.until is None else self.until - time.monotonic()

    def may_take(self) -> float:
        """Seconds after which a provider's first calls count as hung."""
        return min(self.patience, max(self.left() * self.share, self.compiling))

    @property
    def seconds(self) -> float:
        """Time that the interleaved rounds of one case may take."""
        return 0.2 if self.quick else max(0.3, min(5.0, self.left() / self.cases))

    @property
    def limits(self) -> dict[str, float]:
        """The ceilings of this machine."""
        return self.machine.get("ceilings", {})

    def free_bytes(self) -> int:
        """Memory that a provider may take: half of what is free now; on a CPU 2 GiB, more would take minutes a call."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0] // 2
        return 2 << 30
