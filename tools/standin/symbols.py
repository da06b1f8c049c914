"""The functions that PyTorch's libraries want from others, and those that an object file defines, by `readelf`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Symbol:
    """A function or variable of a library. `version` is its version node; empty if it has none."""

    name: str
    version: str = ""


def parse(table: str) -> tuple[set[Symbol], set[Symbol]]:
    """Return the undefined and the defined global symbols of a table that `readelf -W` prints."""
    undefined: set[Symbol] = set()
    defined: set[Symbol] = set()
    for line in table.splitlines():
        columns = line.split()  # number, value, size, type, binding, visibility, section, name
        if len(columns) < 8 or not columns[0].endswith(":") or columns[4] not in ("GLOBAL", "WEAK"):
            continue
        name, _, version = columns[7].replace("@@", "@").partition("@")
        (undefined if columns[6] == "UND" else defined).add(Symbol(name, version))
    return undefined, defined


def _table(file: Path, which: str) -> tuple[set[Symbol], set[Symbol]]:
    run = subprocess.run(["readelf", which, "-W", str(file)], check=True, capture_output=True, text=True)
    return parse(run.stdout)


def wanted(libraries: Iterable[Path]) -> set[Symbol]:
    """Return the symbols that these shared libraries need and that none of them defines."""
    undefined: set[Symbol] = set()
    defined: set[str] = set()
    for library in libraries:
        missing, own = _table(library, "--dyn-syms")
        undefined |= missing
        defined |= {symbol.name for symbol in own}
    return {symbol for symbol in undefined if symbol.name not in defined}


def defined_names(objects: Iterable[Path]) -> set[str]:
    """Return the names of the symbols that these object files define."""
    return {symbol.name for file in objects for symbol in _table(file, "--syms")[1]}
