"""Run cases, each in a process of its own with a time limit, and keep a journal so that a run can be continued."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.standin import install, launches, log
from tools.standin.cases import Case
from tools.standin.expected import is_recorded, settle
from tools.standin.verdict import Verdict, judge

PASSED, FAILED = "passed", "failed"
COMMAND = ("-m", "tools.standin.step")
RULES = ("-m", "tools.standin.rules")
TREE = (
    "fastnce/**/*.py",
    "kernels/*.py",
    "benchmarks/step.py",
    "tools/standin/src/*.[ch]",
    "tools/standin/constraints.txt",
    *(f"tools/standin/{name}.py" for name in ("build", "log", "names", "step", "symbols", "verdict")),
)
"""The files that decide the outcome of a case, together with its size and options."""
TRIES = 2
"""How often a case runs whose process crashes: a killed or aborted process says nothing about the step."""


@dataclass
class Outcome:
    """The result of a case.

    tree: identifies the sources, the size and the options with which it was computed.
    falls_back: why PyTorch cannot compile all of it; empty if it can.
    """

    case: str
    outcome: str
    seconds: float
    tree: str
    problems: list[str] = field(default_factory=list)
    falls_back: str = ""
    launches: dict[str, int] = field(default_factory=dict)
    captures: int = 0
    graph_launches: int = 0
    replays: int = 0
    syncs: int = 0
    step_seconds: list[float] = field(default_factory=list)
    torch: str = ""
    triton: str = ""


class Journal:
    """The outcomes of a folder, one JSON line each; the last one of a case counts."""

    def __init__(self, file: Path):
        self.file = file

    def read(self, trees: dict[str, str]) -> dict[str, Outcome]:
        """Return the outcomes by the name of the case; `trees` has the tree that each must be of."""
        found: dict[str, Outcome] = {}
        for line in self.file.read_text().splitlines() if self.file.exists() else []:
            with contextlib.suppress(json.JSONDecodeError, TypeError):  # an interrupted line, or an older format
                outcome = Outcome(**json.loads(line))
                if outcome.tree == trees.get(outcome.case):
                    found[outcome.case] = outcome
        return found

    def add(self, outcome: Outcome) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")


def digest_of_tree(root: Path = install.ROOT) -> str:
    """Return a hash of every file that can change an outcome; the journal's outcomes of other trees do not count."""
    digest = hashlib.sha256()
    for pattern in TREE:
        for file in sorted(root.glob(pattern)):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def run_case(case: Case, folder: Path, tree: str) -> Outcome:
    """Run a case, with its log and its output in a folder of its own; run it again if its process crashes."""
    began = time.monotonic()
    place = folder / "runs" / case.name.replace("/", "-")
    place.mkdir(parents=True, exist_ok=True)
    for attempt in range(TRIES):
        verdict, result, crash = _run_once(case, folder, place)
        if not crash:
            break
        verdict.problems.append(f"{crash}; try {attempt + 1} of {TRIES}")
    seconds = round(time.monotonic() - began, 1)
    outcome = FAILED if verdict.problems else PASSED
    known = {key: result[key] for key in ("step_seconds", "torch", "triton") if key in result}
    counted = vars(verdict) | {"launches": dict(verdict.launches)}
    return Outcome(case.name, outcome, seconds, tree, **counted, **known)


def check_rules(folder: Path) -> list[str]:
    """Return which of CUDA's rules the stand-ins do not enforce (`rules.py`), one sentence each."""
    place = folder / "runs" / "rules"
    place.mkdir(parents=True, exist_ok=True)
    file, output = place / "log.txt", place / "output.txt"
    file.unlink(missing_ok=True)
    environment = install.environment(folder) | {"STANDIN_LOG": str(file)}
    with output.open("w") as errors:
        command = [str(install.python(folder)), *RULES]
        run = subprocess.run(
            command, cwd=install.ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    broken = run.stdout.split("\n") if run.returncode == 1 and run.stdout.strip() else []
    if run.returncode and not broken:
        broken = [f"the check of the stand-ins failed: {last_line(output.read_text(errors='replace'))}"]
    return [line for line in broken if line]


def _run_once(case: Case, folder: Path, place: Path) -> tuple[Verdict, dict[str, Any], str]:
    """Return the verdict, the result that the process wrote, and how the process crashed; empty if it did not."""
    file, result_file, output = place / "log.txt", place / "result.json", place / "output.txt"
    for old in (file, result_file):
        old.unlink(missing_ok=True)
    environment = install.environment(folder) | {"STANDIN_LOG": str(file)}
    command = [str(install.python(folder)), *COMMAND, case.name, str(result_file)]
    with output.open("w") as out:
        code = _wait(command, environment, out, case.seconds)
    if code is None:
        return Verdict([f"the time limit of {case.seconds:g} s was reached"]), {}, ""
    if not result_file.exists():
        reason = last_line(output.read_text(errors="replace"))
        crash = f"the process was ended by signal {-code}" if code < 0 else ""
        return Verdict([] if crash else [f"exit code {code}: {reason}"]), {}, crash
    result = json.loads(result_file.read_text())
    with file.open() as lines:
        return judge(log.parse(lines), result), result, ""


def _wait(command: Sequence[str], environment: dict[str, str], out: Any, seconds: float) -> int | None:
    """Return the exit code; None after the time limit, or an exception, has ended the process and its children."""
    process = subprocess.Popen(
        command, cwd=install.ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_line(text: str) -> str:
    """Return the last line that is not blank, without folders: results are committed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no output"]
    return re.sub(r"(?<![\w.])/[\w./+-]*/", "", lines[-1])[:300]


def compare(outcome: Outcome, table: Counter[str] | None) -> None:
    """Settle an outcome: remove expected problems, and add the differences from the launch table."""
    outcome.problems, outcome.falls_back = settle(outcome.case, outcome.problems)
    if outcome.launches and table is not None and (table or is_recorded(outcome.case)):
        outcome.problems += launches.differences(table, Counter(outcome.launches))
    outcome.outcome = FAILED if outcome.problems else PASSED


def run(
    cases: Sequence[Case],
    folder: Path,
    tables: launches.Tables | None,
    fresh: bool,
    report: Callable[[Outcome, bool], None],
) -> list[Outcome]:
    """Run the cases that the journal does not have, or all of them, and return their outcomes.

    Args:
        tables: the launch table, compared with what was launched; None: not compared.
        fresh: run all of them.
        report: called with each outcome, and with whether the case ran just now.
    """
    tree, journal = digest_of_tree(), Journal(folder / "journal.jsonl")
    trees = {case.name: f"{tree} {case.variant}" for case in cases}
    known = {} if fresh else journal.read(trees)
    outcomes = []
    for case in cases:
        outcome = known.get(case.name)
        if outcome is None:
            outcome = run_case(case, folder, trees[case.name])
            journal.add(outcome)
        compare(outcome, None if tables is None else tables.get(case.name, Counter()))
        outcomes.append(outcome)
        report(outcome, case.name not in known)
    return outcomes
