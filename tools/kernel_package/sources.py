"""The files of the kernel package: its own from `source/`, and of fastnce and kernels/ what those import."""

from __future__ import annotations

import ast
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).resolve().parent / "source"
NAME = "patchnce"
OWN = SOURCE / "torch-ext" / NAME
BUILT = {"_ops.py": "written by the build"}
"""Modules that exist in a built package only."""
KERNELS = '"""The Triton kernels."""\n'
"""`kernels/__init__.py`: the folder of the repository has none."""


def package_files() -> dict[str, bytes]:
    """Return the package's files by their path in it: the files of `source/`, and all that they import.

    A file that `source/` and fastnce both have is taken from `source/`. All others are copies. They import each other
    relatively, so nothing in them is rewritten.

    Raises:
        ValueError: a relative import of something that is not there, or an import of fastnce by its name.
    """
    waiting = [path.relative_to(OWN).as_posix() for path in sorted(OWN.rglob("*.py"))]
    found: dict[str, bytes] = {}
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        content = _read(path)
        assert content is not None, path
        found[path] = content
        waiting += imported(path, content)
    return dict(sorted(found.items()))


def imported(path: str, content: bytes) -> set[str]:
    """Return the files of the package that a file imports, with the `__init__.py` of their folders.

    Raises:
        ValueError: as `package_files`.
    """
    files: set[str] = set()
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if any(name.split(".")[0] == "fastnce" for name in names):
                raise ValueError(f"{path}:{node.lineno} imports fastnce by its name: import it relatively")
        elif isinstance(node, ast.ImportFrom):
            folder = PurePosixPath(path).parents[node.level - 1]
            module = folder.joinpath(*(node.module or "").split("."))
            parts = [_file(module / alias.name) for alias in node.names]
            target = _file(module)
            if target is None and None in parts:
                raise ValueError(f"{path}:{node.lineno} imports {module}, which is not in fastnce")
            files |= {file for file in (target, *parts) if file is not None}
    for file in list(files):
        files |= {f"{folder}/__init__.py" for folder in PurePosixPath(file).parents if folder.name}
    return {file for file in files if file not in BUILT}


def _file(module: PurePosixPath) -> str | None:
    """Return the file of a module or package; None if there is none."""
    for path in (f"{module}.py", f"{module}/__init__.py"):
        path = path.removeprefix("./")
        if path in BUILT or _read(path) is not None:
            return path
    return None


def _read(path: str) -> bytes | None:
    own = OWN / path
    if own.is_file():
        return own.read_bytes()
    if path == "kernels/__init__.py":
        return KERNELS.encode()
    beside = ROOT / path if path.startswith("kernels/") else ROOT / "fastnce" / path
    return beside.read_bytes() if beside.is_file() else None
