"""Looks at the modules of a script, replaces what can be replaced, and tells the user in lines and in a table."""

from __future__ import annotations

import sys
import types

from .candidates import candidates
from .hook import INSPECT
from .replace import Outcome, replace

COLUMNS = ("class", "module", "what was done")
NOTHING = (
    "nothing was replaced: the script has no class that may be a loss or a patch sampler of CUT's or DCLGAN's, and "
    "imports none"
)


class Inspection:
    """Replaces the classes of each module that it looks at. Prints a line per class that it tries, and a table."""

    def __init__(self) -> None:
        self.begun = False
        """Whether there is a script. Without one, nothing is said at the end."""
        self._settled: set[object] = set()
        self._outcomes: dict[tuple[str, str], Outcome] = {}
        """The last one of each module and class: a module that is loaded again has one row."""
        self._main: types.ModuleType | None = None

    def look(self, module: types.ModuleType) -> None:
        """Inspect a module that has been executed."""
        for candidate in candidates(module):
            if candidate.value in self._settled:
                continue
            outcome = replace(candidate)
            self._outcomes[outcome.module, outcome.name] = outcome
            if outcome.unready and module is self._main:
                continue  # what it lacks may be defined farther down
            self._settled.add(candidate.value)
            if outcome.tried:
                _say(outcome.sentence)

    def watch(self, main_module: types.ModuleType) -> None:
        """Inspect the script's own classes as it defines them."""
        self._main = main_module
        main_module.__dict__[INSPECT] = lambda: self.look(main_module)

    def close(self, ended: str) -> None:
        """Print the table. `ended` says how the script ended, if it did not reach its last line."""
        if not self.begun:
            return
        if self._outcomes:
            print(table(list(self._outcomes.values())), file=sys.stderr, flush=True)
        elif ended:
            _say(f"nothing was replaced before the script ended with {ended}")
        else:
            _say(NOTHING)


def table(outcomes: list[Outcome]) -> str:
    """Return a table of what was replaced, then of what was kept and why."""
    rows = [COLUMNS]
    for outcome in sorted(outcomes, key=lambda outcome: not outcome.replaced):
        what = f"replaced: {outcome.what}" if outcome.replaced else f"kept: {outcome.what}"
        rows.append((outcome.name, outcome.module, what))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"  {name:{widths[0]}}  {module:{widths[1]}}  {what}" for name, module, what in rows]
    count = sum(outcome.replaced for outcome in outcomes)
    return "\n".join([f"fastnce: {count} replaced, {len(outcomes) - count} kept", *lines])


def _say(sentence: str) -> None:
    print(f"fastnce: {sentence}", file=sys.stderr, flush=True)
