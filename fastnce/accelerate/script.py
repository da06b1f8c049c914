"""Run a script or a module as Python does, and inspect the classes that it imports and defines.

Each module that the script imports is inspected right after it has been executed, before anything imports from it. A
class named `PatchNCELoss...` or `PatchSampleF` is first run on small random data. It is replaced only if its values and
gradients equal those of the replacement. A class with other mathematics, as in a fork, is kept. Both outcomes are
printed on stderr. Checkpoints have the same keys with and without the replacement.

Classes of these names that the script itself defines, outside of functions, are inspected right after their definition.
If a class uses a function that is defined farther down, it is inspected again after each statement until then.

Processes that the script starts with `spawn` are not inspected. Data loaders do not need it, but training that is
started by `torch.multiprocessing.spawn` runs the published classes.
"""

from __future__ import annotations

import ast
import builtins
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .replace import candidates, is_candidate, replace

USAGE = "usage: python -m fastnce.accelerate SCRIPT|-m MODULE [arguments of the script]"
INSPECT = "__fastnce_inspect__"
"""Name in the script's namespace. A call of it follows each definition of a class that may be replaced."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what `argv` names first, a script or `-m` and a module; return 2 if there is none, else 0.

    The script may end the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    as_module = arguments[:1] == ["-m"]
    if len(arguments) <= as_module:
        print(f"no {'module' if as_module else 'script'} was given; {USAGE}", file=sys.stderr)
        return 2
    name = arguments[as_module]
    if not as_module and not Path(name).is_file():
        print(f"there is no script {name!r} in {Path.cwd()}; {USAGE}", file=sys.stderr)
        return 2

    inspection = _Inspection()
    hook = _Hook(inspection.look)
    sys.meta_path.insert(0, hook)
    ended = ""
    try:
        if as_module:
            spec = _find(name)
            if spec is None:
                print(f"there is no module {name!r} that can be run; {USAGE}", file=sys.stderr)
                return 2
            _run_module(spec, arguments[1:], inspection)
        else:
            _run_script(Path(name), arguments, inspection)
    except SystemExit as end:
        ended = f"exit code {end.code if isinstance(end.code, int) else int(end.code is not None)}"
        raise
    except BaseException as error:
        ended = type(error).__name__
        raise
    finally:
        sys.meta_path.remove(hook)
        inspection.close(ended)
    return 0


class _Inspection:
    """Replaces the classes of each module that it looks at, and prints one line per class."""

    def __init__(self) -> None:
        self.begun = False
        """Whether there is a script. Without one, nothing is said at the end."""
        self._settled: set[type] = set()
        self._unready: dict[type, str] = {}
        self._main: types.ModuleType | None = None

    def look(self, module: types.ModuleType) -> None:
        """Inspect a module that has been executed."""
        for published in candidates(module):
            if published in self._settled:
                continue
            outcome = replace(published)
            if outcome.unready and module is self._main:
                self._unready[published] = outcome.what
                continue
            self._unready.pop(published, None)
            self._settled.add(published)
            _report(outcome.what)

    def watch(self, main_module: types.ModuleType) -> None:
        """Inspect the script's own classes as it defines them."""
        self._main = main_module
        main_module.__dict__[INSPECT] = lambda: self.look(main_module)

    def close(self, ended: str) -> None:
        """Say what could not be replaced. `ended` says how the script ended, if it did not reach its last line."""
        for sentence in self._unready.values():
            _report(sentence)
        if not self.begun or self._settled or self._unready:
            return
        if ended:
            _report(f"nothing was replaced before the script ended with {ended}")
        else:
            _report(
                "nothing was replaced: the script has no class PatchNCELoss or PatchSampleF of CUT's or DCLGAN's, and "
                "imports none"
            )


class _Hook:
    """Meta path finder that finds modules as usual and calls `executed` with each module after its execution."""

    def __init__(self, executed: Callable[[types.ModuleType], None]):
        self.executed = executed

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                break
        else:
            return None
        loader = spec.loader
        if isinstance(loader, (importlib.machinery.SourceFileLoader, importlib.machinery.SourcelessFileLoader)):
            execute = loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                self.executed(module)

            # Patch the instance, which serves only this module: the loader's type and other methods stay unchanged.
            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _find(name: str) -> importlib.machinery.ModuleSpec | None:
    """Find a module, or the `__main__` of a package; None if there is none with code.

    Parent packages are imported. Their errors are raised.
    """
    if not name or name.startswith(".") or name == "__main__":
        return None
    try:
        if parent := name.rpartition(".")[0]:
            importlib.import_module(parent)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name = f"{name}.__main__"
            spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):  # a package imports what is not there
            raise
        return None
    return spec if spec is not None and hasattr(spec.loader, "get_code") else None


def _run_module(spec: importlib.machinery.ModuleSpec, arguments: list[str], inspection: _Inspection) -> None:
    """Run a module as `python -m MODULE arguments` does. The path stays: Python has put the folder into it."""
    loader: Any = spec.loader
    sys.argv = [spec.origin or arguments[0], *arguments[1:]]
    inspection.begun = True
    source = loader.get_source(spec.name) if hasattr(loader, "get_source") else None
    code = loader.get_code(spec.name) if source is None else _compiled(source, spec.origin or spec.name)
    facts = {"__spec__": spec, "__package__": spec.parent, "__file__": spec.origin, "__cached__": spec.cached}
    _execute(code, {**facts, "__loader__": loader}, inspection)


def _run_script(script: Path, arguments: list[str], inspection: _Inspection) -> None:
    """Run a script as `python SCRIPT arguments` does: set argv, path and a new `__main__`."""
    path = str(script.absolute())
    sys.argv = arguments
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    inspection.begun = True
    code = _compiled(script.read_bytes(), path)
    _execute(code, {"__file__": path, "__cached__": None, "__loader__": loader}, inspection)


def _execute(code: types.CodeType, facts: dict[str, Any], inspection: _Inspection) -> None:
    main_module = types.ModuleType("__main__")
    main_module.__dict__.update(facts, __builtins__=builtins)
    sys.modules["__main__"] = main_module
    inspection.watch(main_module)
    exec(code, main_module.__dict__)


def _compiled(source: str | bytes, path: str) -> types.CodeType:
    """Compile a script. If it defines a class that may be replaced, calls of the inspection are put between."""
    tree = ast.parse(source, path)
    if not _with_calls(tree.body, after_all=True):
        return compile(source, path, "exec", dont_inherit=True)
    return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


def _with_calls(statements: list[ast.stmt], after_all: bool = False) -> bool:
    """Put a call of the inspection after each class that may be replaced, also inside of if, try, with and loops.

    Args:
        statements: changed in place.
        after_all: call it after every statement that follows the first such class, too.

    Returns:
        whether there is such a class.
    """
    found, changed = False, []
    for statement in statements:
        here = isinstance(statement, ast.ClassDef) and is_candidate(statement.name)
        if not isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            parts = [statement, *getattr(statement, "handlers", []), *getattr(statement, "cases", [])]
            blocks = [getattr(part, name, []) for part in parts for name in ("body", "orelse", "finalbody")]
            here = sum(_with_calls(block) for block in blocks) > 0  # `any` would leave blocks unchanged
        found |= here
        changed.append(statement)
        if here or (found and after_all):
            changed.append(ast.copy_location(ast.Expr(ast.Call(ast.Name(INSPECT, ast.Load()), [], [])), statement))
    statements[:] = changed
    return found


def _report(sentence: str) -> None:
    print(f"fastnce: {sentence}", file=sys.stderr, flush=True)
