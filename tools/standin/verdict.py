"""Judge a case by its log: is the step captured and replayed, and does nothing of it happen elsewhere?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.standin.log import RECORD, REPLAY, WARM, Event, Section
from tools.standin.names import table

BESIDE_THE_GRAPH = {
    "torch elementwise_kernel direct_copy_kernel_cuda float": 2,  # the images of a domain, into the graph's buffer
    "copy device to device": 2,  # the same, where the memory formats are equal
    "torch vectorized_elementwise_kernel FillFunctor long": 2,  # PyTorch: seed and offset of the random numbers
}
"""What a step launches beside its graph by design, each at most so often: before a replay, or before a capture."""

SEED = "torch vectorized_elementwise_kernel FillFunctor long"
"""Launched twice in the step that captures: before the capture and before the replay that follows it."""

BEFORE_A_CAPTURE = frozenset({"cudaDeviceSynchronize", "cudaEventSynchronize", "cudaFree"})
"""How `torch.cuda.graph` waits by design, before a capture: for the device, and for the memory in caches that it
frees. This happens once per graph, not in every step."""


@dataclass
class Verdict:
    """The result of a case. `launches` is its launch table: all captures of the case together."""

    problems: list[str] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)
    captures: int = 0
    graph_launches: int = 0
    replays: int = 0
    syncs: int = 0


@dataclass(frozen=True)
class _Recorded:
    """The events of a step that captures: before, in and after its capture."""

    before: list[Event]
    inside: list[Event]
    after: list[Event]


MOST_LINES = 8
"""The number of kernels that one problem names at most."""


def judge(sections: Sequence[Section], result: dict[str, Any]) -> Verdict:
    """Judge the log of a case; `result` is what `step.py` wrote."""
    verdict = Verdict()
    _outcome(verdict, sections, result)
    if verdict.problems and not result["captured"]:
        return verdict  # every step ran launch by launch, so each of them would be a problem of its own
    for section in sections:
        if section.phase == WARM and section.number > 0:  # the first compiles, loads and allocates
            _no_waiting(verdict, section.name, section.events)
        elif section.phase == RECORD:
            _record(verdict, section)
        elif section.phase == REPLAY:
            _replay(verdict, section)
    if verdict.captures != result["kinds"]:
        verdict.problems.append(f"{verdict.captures} captures for {result['kinds']} kinds of steps")
    return verdict


def _outcome(verdict: Verdict, sections: Sequence[Section], result: dict[str, Any]) -> None:
    if result["obstacle"]:
        verdict.problems.append(result["obstacle"])
    verdict.problems += [f"a warning: {text}" for text in result["warnings"]]
    for section in sections:
        for event in section.find("error"):
            verdict.problems.append(f"{section.name}: {event.name} failed: {' '.join(event.more)}")


def _record(verdict: Verdict, section: Section) -> None:
    parts = _split(section)
    if parts is None:
        verdict.problems.append(f"{section.name}: not exactly one capture")
        return
    verdict.captures += 1
    launches = [event for event in parts.inside if event.event == "launch"]
    captured = [event for event in launches if event.where == "captured"]
    verdict.launches += table(captured)
    verdict.graph_launches += len(captured)
    for name, number in table(event for event in launches if event.where != "captured").items():
        verdict.problems.append(f"{section.name}: {number} x {name} outside of the capture that is going on")
    _no_waiting(verdict, f"{section.name}, in the capture", parts.inside)
    allowed = [event for event in parts.before if event.event != "sync" or event.name not in BEFORE_A_CAPTURE]
    _no_waiting(verdict, f"{section.name}, around the capture", [*allowed, *parts.after])
    beside = {name: number * (2 if name == SEED else 1) for name, number in BESIDE_THE_GRAPH.items()}
    _only(verdict, section.name, [*parts.before, *parts.after], beside)
    _one_graph(verdict, section.name, parts.after, len(captured))


def _replay(verdict: Verdict, section: Section) -> None:
    verdict.replays += 1
    _no_waiting(verdict, section.name, section.events)
    _only(verdict, section.name, section.events, BESIDE_THE_GRAPH)
    _one_graph(verdict, section.name, section.events, None)
    for event in section.find("alloc"):
        verdict.problems.append(f"{section.name}: {event.name} of {event.more[0]} bytes")


def _split(section: Section) -> _Recorded | None:
    """Divide a step at its capture; None if there is not exactly one that begins and ends."""
    marks = [(i, event.name) for i, event in enumerate(section.events) if event.event == "capture"]
    if [name for _, name in marks] != ["begin", "end"]:
        return None
    (begin, _), (end, _) = marks
    return _Recorded(section.events[:begin], section.events[begin + 1 : end], section.events[end + 1 :])


def _no_waiting(verdict: Verdict, where: str, events: Sequence[Event]) -> None:
    waits = Counter(event.name for event in events if event.event == "sync")
    verdict.syncs += sum(waits.values())
    verdict.problems += [f"{where}: {number} x {name}" for name, number in waits.items()]


def _only(verdict: Verdict, where: str, events: Sequence[Event], allowed: dict[str, int]) -> None:
    found = table(event for event in events if event.event == "launch")
    beside = [f"{number} x {name}" for name, number in found.items() if number > allowed.get(name, 0)]
    verdict.problems += [f"{where}: {text} beside the graph" for text in beside[:MOST_LINES]]
    if len(beside) > MOST_LINES:
        verdict.problems.append(f"{where}: {len(beside) - MOST_LINES} more kernels beside the graph")


def _one_graph(verdict: Verdict, where: str, events: Sequence[Event], launches: int | None) -> None:
    """Check that the step replays one graph, of this many launches if given, and of at least one."""
    graphs = [int(event.more[0]) for event in events if event.event == "graph"]
    if len(graphs) != 1 or graphs[0] == 0 or (launches is not None and graphs[0] != launches):
        expected = "at least 1" if launches is None else launches
        verdict.problems.append(f"{where}: graphs of {graphs} launches replayed, not one of {expected}")
