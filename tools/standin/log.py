"""Read the log of the stand-in libraries (`src/standin.h` describes its lines), divided into the steps of a case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

WARM, RECORD, REPLAY = "warm", "record", "replay"


def mark_of_step(number: int, warm_up: int, flip: bool) -> str:
    """Return the mark that precedes a step: its number from 0, what happens in it, and which kind of step it is."""
    phase = WARM if number < warm_up else RECORD if number == warm_up else REPLAY
    return f"step {number} {phase} {'flipped' if flip else 'plain'}"


@dataclass(frozen=True)
class Event:
    """One line of the log after a mark. `name` is what was launched or called; `more` are the columns after it."""

    event: str
    kind: str
    where: str
    name: str
    more: tuple[str, ...] = ()


@dataclass
class Section:
    """The events between two marks; the first section of a log, before any mark, has the name ""."""

    name: str
    events: list[Event] = field(default_factory=list)

    @property
    def phase(self) -> str:
        """What happens in the step; empty outside of the steps."""
        words = self.name.split()
        return words[2] if words[:1] == ["step"] else ""

    @property
    def number(self) -> int:
        """The number of the step; -1 outside of the steps."""
        words = self.name.split()
        return int(words[1]) if words[:1] == ["step"] else -1

    def find(self, event: str, *where: str) -> list[Event]:
        """Return the events of this kind, at these places; everywhere if none is given."""
        return [found for found in self.events if found.event == event and (not where or found.where in where)]


def parse(lines: Iterable[str]) -> list[Section]:
    """Return the sections of a log.

    Raises:
        ValueError: a line is not one of the stand-ins'; the message shows it.
    """
    sections = [Section("")]
    for line in lines:
        event, *columns = line.rstrip("\n").split("\t")
        if event == "mark" and len(columns) == 1:
            sections.append(Section(columns[0]))
        else:
            sections[-1].events.append(_event(event, columns, line))
    return sections


def _event(event: str, columns: list[str], line: str) -> Event:
    match event, columns:
        case "launch", [kind, where, name, sizes]:
            return Event(event, kind, where, name, (sizes,))
        case "sync", [where, name]:
            return Event(event, "", where, name)
        case "alloc", [where, name, size]:
            return Event(event, "", where, name, (size,))
        case "capture", ["begin" | "end" as what, *numbers]:
            return Event(event, "", "", what, tuple(numbers))
        case "graph", [where, number, launches]:
            return Event(event, "", where, number, (launches,))
        case "error", [function, *rest]:
            return Event(event, "", "", function, tuple(rest))
        case "stub", [function]:
            return Event(event, "", "", function)
    raise ValueError(f"not a line of the stand-ins' log: {line!r}")


def count(events: Iterable[Event]) -> Counter[tuple[str, str]]:
    """Return how often each (kind, name) was launched."""
    return Counter((event.kind, event.name) for event in events)
