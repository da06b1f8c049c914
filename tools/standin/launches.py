"""The launch table: how often each kernel is launched in the captured step of each case.

`launches.csv` has a row per kernel of a preset and form, and a column per precision. An empty field belongs to a case
that is not in the table. Kernels that Inductor wrote are counted by their sort, because their names vary.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from tools.standin.cases import CASES, PRECISIONS, Case

FILE = Path(__file__).resolve().parent / "launches.csv"
Tables = dict[str, Counter[str]]
"""The launches of each case, by the name of the case."""


def read(file: Path = FILE) -> Tables:
    """Return the tables of a file; none if it does not exist."""
    tables: Tables = {}
    if not file.exists():
        return tables
    with file.open(newline="") as text:
        for row in csv.DictReader(text):
            for precision in PRECISIONS:
                if row[precision]:
                    name = Case(row["preset"], precision, row["form"]).name
                    tables.setdefault(name, Counter())[row["kernel"]] = int(row[precision])
    return tables


def write(tables: Tables, file: Path = FILE) -> None:
    """Write the tables, in the order of the cases and by the kernel's name."""
    groups = dict.fromkeys((case.preset, case.form) for case in CASES)
    with file.open("w", newline="") as text:
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["preset", "form", "kernel", *PRECISIONS])
        for preset, form in groups:
            columns = [tables.get(Case(preset, precision, form).name) for precision in PRECISIONS]
            for kernel in sorted({kernel for column in columns if column for kernel in column}):
                counts = ["" if column is None else column.get(kernel, 0) for column in columns]
                rows.writerow([preset, form, kernel, *counts])


def differences(old: Counter[str], new: Counter[str]) -> list[str]:
    """Return a line per kernel that is launched more or less often than in the table, which may lack the case."""
    if not old:
        return ["the case is not in the launch table: --write adds it"]
    names = sorted(name for name in old.keys() | new.keys() if old[name] != new[name])
    return [f"{name}: {old[name]} launches in the table, {new[name]} now" for name in names]
