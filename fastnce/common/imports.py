"""Import a user's own class or function by its path: `file.py:Name` or `package.module:Name`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_imported: set[str] = set()
"""Names of the modules that `load_object` imported."""


class CodeError(ValueError):
    """A user's own code cannot be imported, is not trusted, or does not meet the contract."""


def is_import_path(name: Any) -> bool:
    """Whether a name is an import path (rather than a name that this library defines)."""
    return isinstance(name, str) and ":" in name


def same_object(one: Any, other: Any) -> bool:
    """Whether two values are equal, or import paths of the same object of the same file (`may_be_same_path`)."""
    if one == other or not (is_import_path(one) and is_import_path(other)):
        return bool(one == other)
    (one, _, name), (other, _, name_there) = (value.rpartition(":") for value in (one, other))
    files = one.endswith(".py") and other.endswith(".py")
    return bool(files and name == name_there and may_be_same_path(one, other))


def may_be_same_path(one: str, other: str) -> bool:
    """Whether two paths name the same place, as far as can be known.

    A relative path is one in the working directory. It may also have been written in another one, so it equals every
    absolute path that ends with it.
    """
    if Path(one).resolve() == Path(other).resolve():
        return True
    relative, absolute = sorted((Path(one), Path(other)), key=Path.is_absolute)
    parts = relative.parts
    tail = absolute.parts[-len(parts) :]
    return absolute.is_absolute() and not relative.is_absolute() and ".." not in parts and parts == tail


def load_object(path: str, key: str) -> Any:
    """Import the object that a path names. This runs the code of its module.

    Args:
        path: `mynets.py:Net`, with a file relative to the working directory, or `mypackage.nets:Net`.
        key: the option that holds the path, for messages.

    Raises:
        CodeError: the file, module or name does not exist, or importing the module raises an error.
    """
    where, _, name = path.rpartition(":")
    relative = where.startswith(".") and not where.endswith(".py")  # a module has no place to start from
    if not where or relative or not name.isidentifier():
        raise CodeError(f"{key}={path} must be an import path such as mycode.py:Name or mypackage.module:Name")
    module = _load_file(Path(where), path, key) if where.endswith(".py") else _load_module(where, path, key)
    _imported.add(module.__name__)
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
        with torch.device("cpu"):  # also while shapes are traced on the meta device
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _failed(error, path, key) from error
    return module


def _load_module(name: str, path: str, key: str) -> ModuleType:
    try:
        with torch.device("cpu"):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise CodeError(
                f"{key}={path}: there is no module {name}: install it, add its folder to PYTHONPATH, or name its file, "
                f"such as {name.rpartition('.')[2]}.py:{path.rpartition(':')[2]}"
            ) from None
        raise _failed(error, path, key) from error
    except (Exception, SystemExit) as error:
        raise _failed(error, path, key) from error


def _failed(error: BaseException, path: str, key: str) -> CodeError:
    if isinstance(error, SyntaxError):
        file, line = error.filename, error.lineno
    else:
        file, line, trace = None, None, error.__traceback__
        while trace is not None:
            here = trace.tb_frame.f_code.co_filename
            # a library may have replaced sys.exit: the user's line is the one that called it
            if not (isinstance(error, SystemExit) and "site-packages" in here):
                file, line = here, trace.tb_lineno
            trace = trace.tb_next
    where = f" at {Path(file).name} line {line}" if file else ""
    reason = str(error).partition("\n")[0] or "no message"
    return CodeError(f"{key}={path} cannot be imported: {type(error).__name__}{where}: {reason}")


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0] or 'no message'}"


def place_in_own_code(error: BaseException) -> str:
    """Where an error passed through a user's own code, as an addition to its message; empty if it did not."""
    found, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") in _imported:
            found = f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return found
