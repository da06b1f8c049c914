"""Read what the code of a class uses, before any of it is run.

A trial makes an instance of a user's class and calls it. That is harmless if the code can only compute: it uses
PyTorch, NumPy, and functions of the user that only compute, too. Code that reads or writes files, trains, talks to
other processes or changes global settings is not tried. Only names are read here, in the bytecode; nothing is executed.
"""

from __future__ import annotations

import abc
import builtins
import contextlib
import copy
import dis
import functools
import importlib.metadata
import site
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .unchanged import MISSING, Reads, attributes, check_comparable, content_of

ROOMS = {"torch", "numpy", "math", "packaging", "typing", "functools", "collections", "copy", "operator", "einops"}
"""Libraries that the code may use, by the first part of their modules' names."""

BUILTINS = frozenset(
    """
    abs all any bool complex dict divmod enumerate filter float frozenset getattr hasattr int isinstance issubclass iter
    len list map max min next object pow print property range repr reversed round set setattr slice sorted staticmethod
    classmethod str sum super tuple type zip NotImplemented
    """.split()  # noqa: SIM905
)

DENIED = frozenset(
    """
    save load savez savez_compressed savetxt loadtxt genfromtxt fromfile tofile memmap dump open write mkdir hub
    backward step zero_grad optim register_hook DataLoader distributed all_gather all_reduce barrier init_process_group
    multiprocessing share_memory_ system popen fork sleep compile jit onnx load_library cpp_extension
    backends manual_seed manual_seed_all seed set_rng_state set_state set_default_dtype set_default_device
    set_default_tensor_type set_num_threads use_deterministic_algorithms set_float32_matmul_precision set_printoptions
    seterr set_detect_anomaly set_device current_device FloatTensor LongTensor BoolTensor ByteTensor
    """.split()  # noqa: SIM905
)
"""Attributes that the code must not use: files, training, processes, random states, global settings, fixed devices."""

COMPUTED = ("getattr", "hasattr", "__getattribute__", "__dict__")
"""With these, code may read attributes whose names are not in it."""

GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME")
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR", "LOAD_SUPER_ATTR", "IMPORT_FROM")
CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(...))


@functools.cache
def _library_folders() -> tuple[str, ...]:
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {*site.getsitepackages(), site.getusersitepackages()}
    for name in ("torch", "numpy", "packaging", "einops"):  # may be installed elsewhere, and found by PYTHONPATH
        with contextlib.suppress(importlib.metadata.PackageNotFoundError, OSError):
            found = importlib.metadata.distribution(name)
            folder = Path(str(found.locate_file("")))
            beside = Path.cwd().is_relative_to(folder.resolve())  # the user's own code lies in the same folder
            paths.add(str(found.locate_file(name) if beside else folder))
    paths |= {*torch.__path__, *np.__path__}
    return tuple(f"{Path(path).resolve()}/" for path in paths if path)


@functools.cache
def _lies_in_a_library(file: str) -> bool:
    return str(Path(file).resolve()).startswith(_library_folders())


def of_a_library(module_name: str | None) -> bool:
    """Whether a module belongs to Python or to an installed package, not to the user's own code."""
    module = sys.modules.get(module_name or "")
    if module_name in ("__main__", None) or module is None:
        return False
    file = getattr(module, "__file__", None)
    if file is None:
        return getattr(module, "__path__", None) is None and module_name in sys.builtin_module_names
    return _lies_in_a_library(file)


def own_bases(cls: type) -> Iterator[type]:
    """Yield the class and its bases, without those of PyTorch, Python and other libraries."""
    return (base for base in cls.__mro__ if not of_a_library(base.__module__) and base.__module__ != "builtins")


def functions_of(cls: type) -> Iterator[types.FunctionType]:
    """Yield the Python functions that a class and its own bases define."""
    for base in own_bases(cls):
        for value in vars(base).values():
            if isinstance(inner := _inner(value), types.FunctionType):
                yield inner


def attributes_of(code: types.CodeType) -> Iterator[str]:
    """Yield the names of the attributes that a code uses, with those of the functions inside it."""
    for kind, name in _names(code):
        if kind == "attribute":
            yield name


def check(cls: type) -> Reads:
    """Raise ValueError with a reason if the code of a class may do more than compute; return what it reads.

    Raises:
        NameError: the code uses a name that its module has not defined yet.
    """
    reading = _Reading(cls)
    reading.read()
    return reading.reads()


def _inner(value: Any) -> Any:
    """Return the function in a method, a property or a decorated function."""
    while True:
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, types.FunctionType) and hasattr(value, "__wrapped__"):
            value = value.__wrapped__
        else:
            return value


def _layers(value: Any) -> list[types.FunctionType]:
    """Return the user's functions in a method, a property or a decorated function: decorators, then the function."""
    found: list[types.FunctionType] = []
    while True:
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif not isinstance(value, types.FunctionType):
            return found
        else:
            where = value.__globals__.get("__name__") or ""
            if not (of_a_library(where) or where.startswith("fastnce.")):  # a forward that is replaced already
                found.append(value)
            if not hasattr(value, "__wrapped__"):
                return found
            value = value.__wrapped__


def _names(code: types.CodeType) -> Iterator[tuple[str, str]]:
    """Yield (kind, name) for what a code uses: "global", "attribute", "import", "writes", "catches" or "text"."""
    before = ""
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if (before, instruction.opname) == ("PUSH_EXC_INFO", "POP_TOP"):
            yield "catches", "everything"  # a bare except: the trial could not be ended
        before = instruction.opname
        if instruction.opname in GLOBALS:
            yield "global", name
        elif instruction.opname in ATTRIBUTES:
            yield "attribute", name
        elif instruction.opname == "IMPORT_NAME":
            yield "import", name
        elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            yield "writes", name
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield "text", constant  # getattr(self, "name") may reach a method


class _Reading:
    """Follows the names in a class's code to everything that it may call."""

    def __init__(self, cls: type):
        self._attributes: set[str] = {"__init__", "forward"}
        self._seen: set[int] = set()
        self._functions: list[types.FunctionType] = []
        self._holders: list[type | types.ModuleType | types.FunctionType] = []
        self._inside = Reads()
        """Cells, functions, mutable values and modules."""
        self._globals: dict[tuple[int, str], tuple[Mapping[str, Any], str, Any]] = {}
        self._class(cls)

    def read(self) -> None:
        while True:
            while self._functions:
                self._function(self._functions.pop())
            for holder in list(self._holders):
                for name, value in list(vars(holder).items()):
                    special = isinstance(holder, type) and callable(_inner(value)) and name.startswith("__")
                    if (special or name in self._attributes) and name not in ("__class__", "__module__"):
                        self._value(f"{holder.__name__}.{name}", value)
            if not self._functions:
                return

    def reads(self) -> Reads:
        """Return what the code reads, without `forward` and `__init__`, which a replacement changes."""
        names = self._attributes - {"forward", "__init__"}
        held = [
            (vars(holder), name, vars(holder).get(name, MISSING))
            for holder in self._holders
            for name in names
            if not isinstance(holder, types.ModuleType) or name in vars(holder)
        ]
        return replace(self._inside, places=[*self._globals.values(), *held], names=names)

    def _function(self, function: types.FunctionType) -> None:
        where = function.__globals__
        self._holders.append(function)  # of its own attributes
        self._inside.functions.append((function, content_of(function)))
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            if name != "__class__":
                self._inside.cells.append((cell, cell.cell_contents))
                self._value(name, cell.cell_contents)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if isinstance(value, list | dict):  # the usual gpu_ids=[]
                check_comparable("a default value", value)
                self._inside.mutable.append((value, copy.deepcopy(value)))
            else:
                self._value("a default value", value)
        if function.__kwdefaults__:
            self._inside.mutable.append((function.__kwdefaults__, dict(function.__kwdefaults__)))
        for kind, name in _names(function.__code__):
            self._inside.any_name |= name in COMPUTED
            if kind == "global":
                self._globals[id(where), name] = (where, name, where.get(name, MISSING))
                if name in where:
                    self._value(name, where[name])
                elif not hasattr(builtins, name):
                    raise NameError(f"name {name!r} is not defined")
                elif name not in BUILTINS and not _is_error(getattr(builtins, name)):
                    raise ValueError(f"its code uses {name}")
            elif kind == "attribute" and name in DENIED:
                raise ValueError(f"its code uses .{name}")
            elif kind == "import" and name.partition(".")[0] not in ROOMS:
                raise ValueError(f"its code imports {name}")
            elif kind == "writes":
                raise ValueError(f"its code changes the global {name}")
            elif kind == "catches":
                raise ValueError("its code has an except without a class")
            if kind in ("attribute", "text"):
                self._attributes.add(name)

    def _value(self, name: str, value: Any) -> None:
        """Check a value that the code can reach by a name, and follow it."""
        layers = [] if isinstance(value, CONSTANTS) else _layers(value)
        value = value if isinstance(value, CONSTANTS) else _inner(value)
        new = [layer for layer in layers if id(layer) not in self._seen]
        self._seen.update(map(id, new))
        self._functions += new
        if id(value) in self._seen or isinstance(value, CONSTANTS):
            return
        self._seen.add(id(value))
        if isinstance(value, tuple | frozenset):
            for part in value:
                self._value(name, part)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._value(name, part)
            self._inside.mutable.append((value.keywords, dict(value.keywords)))
        elif isinstance(value, types.ModuleType):
            if not of_a_library(value.__name__):
                self._holders.append(value)
            elif value.__name__.partition(".")[0] not in ROOMS:
                raise ValueError(f"its code uses the module {value.__name__}")
            elif DENIED & set(value.__name__.split(".")):
                raise ValueError(f"its code uses {value.__name__}")
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, nn.Module):
            self._library(name, type(value))
            kept = attributes(value, with_mode=True)
            check_comparable(name, kept)
            self._inside.modules.append((value, copy.deepcopy(kept)))
        elif callable(value):
            self._library(name, value)
        else:
            raise ValueError(f"its code uses {name}, a {type(value).__name__} that may change")

    def _class(self, cls: type) -> None:
        if type(cls) not in (type, abc.ABCMeta):
            raise ValueError(f"{cls.__name__} is made by {type(cls).__name__}, not by Python's type")
        if not any(True for _ in own_bases(cls)):
            if cls.__module__ != "builtins":
                self._library(cls.__name__, cls)
            elif cls.__name__ not in BUILTINS and not _is_error(cls):
                raise ValueError(f"its code uses {cls.__name__}")
            return
        for base in cls.__mro__:
            if base in own_bases(cls):
                self._holders.append(base)
            elif base is not object and base is not nn.Module and base is not abc.ABC:
                self._value(base.__name__, base)

    def _library(self, name: str, value: Callable[..., Any]) -> None:
        """Check a function, class or object of a library."""
        owner = _owner(value)
        own_name = getattr(value, "__name__", name)
        parts = {*owner.split("."), own_name}
        if owner == "builtins":
            if own_name not in BUILTINS:
                raise ValueError(f"its code uses {name}")
        elif owner.partition(".")[0].lstrip("_") not in ROOMS or not of_a_library(owner) or parts & DENIED:
            raise ValueError(f"its code uses {name} of {owner}")


def _owner(value: Any) -> str:
    """Return the name of the module that a function or an object comes from."""
    if module := getattr(value, "__module__", None):
        return module
    holder = getattr(value, "__self__", None)  # torch.bmm and numpy.random.permutation have no module of their own
    if isinstance(holder, types.ModuleType):
        return holder.__name__
    return (holder if isinstance(holder, type) else type(value if holder is None else holder)).__module__


def _is_error(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)
