"""The table of results in the documentation: one row a campaign, replaced when it has run again."""

from __future__ import annotations

from dataclasses import dataclass, field

BEGIN, END = "<!-- soak: begin -->", "<!-- soak: end -->"
HEAD = ["| campaign | what holds in every try | tried | survived | lost | seed, date |", "|---|---|---|---|---|---|"]


@dataclass
class Row:
    """The figures of one campaign."""

    name: str
    promise: str
    tried: int
    lost: int
    seed: int
    notes: list[str] = field(default_factory=list)
    date: str = ""
    versions: str = ""

    def line(self) -> str:
        kept = self.tried - self.lost
        where = f"{self.seed}, {self.date}"
        return f"| {self.name} | {self.promise} | {self.tried:,} | {kept:,} | {self.lost:,} | {where} |"

    def note(self) -> list[str]:
        return [f"- {self.name}: {'; '.join(self.notes)}."] if self.notes else []


def written(text: str, row: Row) -> str:
    """The document with this row in its table, in the order of the names."""
    before, _, rest = text.partition(BEGIN)
    inside, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the document has no {BEGIN} and {END}")
    lines = inside.splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ") and line not in HEAD}
    notes = {line[2:].partition(":")[0]: line for line in lines if line.startswith("- ")}
    rows[row.name] = row.line()
    notes.pop(row.name, None)
    for note in row.note():
        notes[row.name] = note
    parts = [BEGIN, *HEAD, *(rows[name] for name in sorted(rows)), "", *(notes[name] for name in sorted(notes))]
    return before + "\n".join([*parts, "", f"Measured with {row.versions}.", END]) + after
