"""Builds that were made before: `aot` compiles again only what has changed since.

The key of a build stands for what it is made of, as in Triton's own cache: the kernel's source and the functions that
it calls, its arguments, constants and options, the architecture, and the files of Triton and of the assembler. Unlike
Triton's, it does not depend on the lines above a kernel, nor on where Triton is installed.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton.compiler
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler import make_backend
from triton.runtime.cache import triton_key
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs: registers of a thread, bytes, and how many instructions use the matrix unit."""

    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix_instructions: int


@dataclass(frozen=True)
class Known:
    """Stands for a compiled kernel. Without a usage it is neither on record nor compiled."""

    hash: str
    usage: Usage | None


def compiler_key() -> str:
    """Return what stands for the installed Triton in a record."""
    return hashlib.sha256(triton_key().encode()).hexdigest()[:16]


def compilers(path: Path) -> set[str]:
    """Return the `compiler_key` of each Triton whose builds are on record."""
    with open(path, newline="") as file:
        return {row.get("compiler", "") for row in csv.DictReader(file)}


def read(path: Path) -> dict[str, Usage]:
    """Return the usage of each recorded build by its key; ValueError for another file."""
    numbers = ("registers", "spill_bytes", "shared_bytes", "matrix_instructions")
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        return {row["key"]: Usage(row["kernel"], *(int(row[name]) for name in numbers)) for row in rows}
    except (OSError, KeyError, TypeError, ValueError) as error:  # a cut line has None, a picture no text
        raise ValueError(f"{path} is no table that --out has written: {error!r}") from error


def prepare_kernels() -> None:
    """Forget what was compiled, and make keys of this project's kernels independent of where these stand in files."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastnce.kernels"):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    kernel.starting_line_number, kernel.hash = 0, None
                    kernel.device_caches.clear()


def _key(src, backend, options) -> str:
    """Libraries count by their content; Triton's own key for AMD has their paths."""
    named = dict(sorted(vars(options).items()))
    libraries = [(name, _content(path)) for name, path in named.pop("extern_libs", None) or ()]
    parts = (
        triton_key(),
        src.hash(),
        backend.hash(),
        named,
        libraries,
        sorted(get_cache_invalidating_env_vars().items()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.cache
def _content(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class Lookup:
    """Within, Triton returns a `Known` for what is on record, instead of compiling it.

    Args:
        known: usages by key, from `read`.
        again: compile one recorded build of so many all the same. 0 compiles none.

    Attributes:
        compiles: whether to compile what is not on record.
        left_out: keys of builds that are neither on record nor compiled.
    """

    def __init__(self, known: Mapping[str, Usage] | None = None, again: int = 0):
        self.known = known or {}
        self.again = again
        self.compiles = True
        self.left_out: set[str] = set()
        self._compile = triton.compiler.compile

    def __enter__(self) -> Lookup:
        triton.compiler.compile = self._look_up  # each kernel takes it from there for each new device
        return self

    def __exit__(self, *_error) -> None:
        triton.compiler.compile = self._compile

    def _look_up(self, src, target=None, options=None, **rest):
        backend = make_backend(target)
        settings = backend.parse_options(dict(options or {}, **src.parse_options()))
        key = _key(src, backend, settings)
        if key in self.known and not (self.again and int(key, 16) % self.again == 0):
            return Known(key, self.known[key])
        if key not in self.known and not self.compiles:
            self.left_out.add(key)
            return Known(key, None)
        compiled = self._compile(src, target=target, options=options, **rest)
        compiled.hash = key
        return compiled
