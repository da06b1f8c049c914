"""Import a user's own class or function by its path: `file.py:Name` or `package.module:Name`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class CodeError(ValueError):
    """A user's own code cannot be imported, is not trusted, or does not meet the contract."""


def is_import_path(name: Any) -> bool:
    """Whether a name is an import path (rather than a name that this library defines)."""
    return isinstance(name, str) and ":" in name


def load_object(path: str, key: str) -> Any:
    """Import the object that a path names. This runs the code of its module.

    Args:
        path: `mynets.py:Net`, with a file relative to the working directory, or `mypackage.nets:Net`.
        key: the option that holds the path, for messages.

    Raises:
        CodeError: the file, module or name does not exist, or importing the module raises an error.
    """
    where, _, name = path.rpartition(":")
    if not where or not name.isidentifier():
        raise CodeError(f"{key}={path} must be an import path such as mycode.py:Name or mypackage.module:Name")
    module = _load_file(Path(where), path, key) if where.endswith(".py") else _load_module(where, path, key)
    if not hasattr(module, name):
        known = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        defines = f"it defines {', '.join(known)}" if known else "it defines no class or function"
        raise CodeError(f"{key}={path}: {where} has no {name}; {defines}")
    return getattr(module, name)


def _load_file(file: Path, path: str, key: str) -> ModuleType:
    if not file.is_file():
        raise CodeError(f"{key}={path}: there is no file {file} in {Path.cwd()}")
    file = file.resolve()
    name = f"_fastnce_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # the file may import files beside it, as a script does
    sys.modules[name] = module  # dataclasses look up their module there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _failed(error, path, key) from error
    return module


def _load_module(name: str, path: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise CodeError(
                f"{key}={path}: there is no module {name}: install it, add its folder to PYTHONPATH, or name its file, "
                f"such as {name.rpartition('.')[2]}.py:{path.rpartition(':')[2]}"
            ) from None
        raise _failed(error, path, key) from error
    except Exception as error:
        raise _failed(error, path, key) from error


def _failed(error: Exception, path: str, key: str) -> CodeError:
    where = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    line = where or (trace.tb_lineno if trace is not None else 0)
    reason = str(error).partition("\n")[0] or "no message"
    return CodeError(f"{key}={path} cannot be imported: {type(error).__name__} at line {line}: {reason}")
