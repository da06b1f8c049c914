"""Run a script or a module as Python does, and inspect the classes that it imports and defines.

Each module that the script imports, at any time, is inspected right after it has been executed, also when it is loaded
again. A class that may be a published loss or sampler is run on small random data. Its forward is replaced only if
values and gradients are equal. The names of the class and of its module do not matter. Each class that was run has a
line on stderr, and a table at the end lists them all. Checkpoints have the same keys with and without the replacement.

Classes that the script itself defines, outside of functions, are inspected right after their definition. If a class
uses a function that is defined farther down, it is inspected again after each statement until then. Classes that a
function defines are not found.

Processes that the script starts with `spawn` are not inspected. Data loaders do not need it, but training that is
started by `torch.multiprocessing.spawn` runs the published classes.
"""

from __future__ import annotations

import builtins
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .hook import Hook, compiled
from .inspection import Inspection

USAGE = "usage: python -m fastnce.accelerate SCRIPT|-m MODULE [arguments of the script] (- reads the script from stdin)"


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
    if not as_module and name != "-" and (not Path(name).exists() or Path(name).is_dir()):
        print(f"there is no script {name!r} in {Path.cwd()}; {USAGE}", file=sys.stderr)
        return 2

    inspection = Inspection()
    hook = Hook(inspection.look)
    sys.meta_path.insert(0, hook)
    ended = ""
    try:
        if as_module:
            spec = _find(name)
            if spec is None:
                print(f"there is no module {name!r} that can be run; {USAGE}", file=sys.stderr)
                return 2
            _run_module(spec, arguments[1:], inspection)
        elif name == "-":
            _run_input(arguments, inspection)
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


def _run_module(spec: importlib.machinery.ModuleSpec, arguments: list[str], inspection: Inspection) -> None:
    """Run a module as `python -m MODULE arguments` does. The path stays: Python has put the folder into it."""
    loader: Any = spec.loader
    sys.argv = [spec.origin or arguments[0], *arguments[1:]]
    inspection.begun = True
    source = loader.get_source(spec.name) if hasattr(loader, "get_source") else None
    code = loader.get_code(spec.name) if source is None else compiled(source, spec.origin or spec.name)
    facts = {"__spec__": spec, "__package__": spec.parent, "__file__": spec.origin, "__cached__": spec.cached}
    _execute(code, {**facts, "__loader__": loader}, inspection)


def _run_script(script: Path, arguments: list[str], inspection: Inspection) -> None:
    """Run a script as `python SCRIPT arguments` does: set argv, path and a new `__main__`."""
    path = str(script.absolute())
    sys.argv = arguments
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    inspection.begun = True
    code = compiled(script.read_bytes(), path)
    _execute(code, {"__file__": path, "__cached__": None, "__loader__": loader}, inspection)


def _run_input(arguments: list[str], inspection: Inspection) -> None:
    """Run the standard input as `python - arguments` does."""
    sys.argv = arguments
    if not sys.flags.safe_path:
        sys.path[0] = ""
    inspection.begun = True
    code = compiled(sys.stdin.buffer.read(), "<stdin>")
    _execute(code, {"__loader__": importlib.machinery.BuiltinImporter}, inspection)


def _execute(code: types.CodeType, facts: dict[str, Any], inspection: Inspection) -> None:
    main_module = types.ModuleType("__main__")
    main_module.__dict__.update(facts, __builtins__=builtins)
    sys.modules["__main__"] = main_module
    inspection.watch(main_module)
    exec(code, main_module.__dict__)
