"""What a loss or sampler depends on beside its arguments, and whether it is still what the trial has seen.

A script may change more than options between two steps: an attribute of the instance (`criterion.scale = 0.5`), an
attribute of the class, or a name of the module that the code reads. Such a call runs the class's own forward.
"""

from __future__ import annotations

import copy
import operator
import types
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .trial import Options

MISSING = object()
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_KINDS = ("_modules", "_buffers", "_parameters")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EXACT = (type(None), bool, int, float, complex, str, bytes, torch.dtype, type(...))
_LISTS = (list, tuple, dict, set, frozenset, range)
_DEVICES = ("cpu", "cuda", "xpu", "mps")


@dataclass
class Reads:
    """What code reads.

    Args:
        places: (namespace of a module or class, name, value or MISSING).
        cells: variables of enclosing functions, with their values.
        functions: the functions themselves, with their code and default values.
        mutable: lists and dicts, with copies of them.
        modules: modules of PyTorch that are not parts of the instance, with what `attributes` returns of them.
        names: every attribute that the code may use.
        any_name: whether it may also use others, whose names it computes.
    """

    places: list[tuple[Mapping[str, Any], str, Any]] = field(default_factory=list)
    cells: list[tuple[types.CellType, Any]] = field(default_factory=list)
    functions: list[tuple[types.FunctionType, tuple[Any, ...]]] = field(default_factory=list)
    mutable: list[tuple[Any, Any]] = field(default_factory=list)
    modules: list[tuple[nn.Module, dict[str, Any]]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    any_name: bool = False

    def still(self) -> bool:
        """Whether all of these have the same values."""
        return all(where.get(name, MISSING) is value for where, name, value in self.places) and self.inside_still()

    def inside_still(self) -> bool:
        """Whether what has no namespace has the same values."""
        return (
            all(cell.cell_contents is value for cell, value in self.cells)
            and all(all(map(operator.is_, content_of(each), content)) for each, content in self.functions)
            and all(_same(value, kept) for value, kept in self.mutable)
            and all(_same(attributes(module, with_mode=True), kept) for module, kept in self.modules)
        )

    def found(self) -> _Found:
        """Return the values that are there, for a quick comparison. A new name changes the size of its namespace."""
        there = [place for place in self.places if place[2] is not MISSING]
        spaces = {id(where): where for where, _, value in self.places if value is MISSING}
        return _Found(there, [(where, len(where)) for where in spaces.values()])


@dataclass
class _Found:
    """Values in namespaces, the sizes of namespaces, and mutable values with their copies."""

    places: list[tuple[Mapping[str, Any], str, Any]]
    sizes: list[tuple[Mapping[str, Any], int]]
    mutable: list[tuple[Any, Any]] = field(default_factory=list)

    def still(self) -> bool:
        """Whether nothing has been changed since. Where this is False, a full comparison decides."""
        for where, name, value in self.places:
            if where.get(name, MISSING) is not value:
                return False
        for where, size in self.sizes:
            if len(where) != size:
                return False
        return all(_same(value, kept) for value, kept in self.mutable)


class Unchanged:
    """Compares instances of a class with those of its trial.

    Args:
        reads: of the class's code.
        made: instances of the trial, with different options.
        chosen: names of attributes that the constructor is given.
        own: how the names of parts begin that hold an instance's weights. They are not compared.

    Raises:
        ValueError: an instance keeps tensors or other objects, whose later values cannot be known.
    """

    def __init__(self, reads: Reads, made: Sequence[nn.Module], chosen: Sequence[str] = (), own: str | None = None):
        self.reads = reads
        self._own = own
        self._seen: weakref.WeakKeyDictionary[nn.Module, _Found] = weakref.WeakKeyDictionary()
        """What each instance had when it was last compared in full."""
        found = [self._attributes(one) for one in made]
        for one in found:
            for name, value in one.items():
                check_comparable(name.removeprefix("."), value)
        first = found[0]
        names = first.keys() - {f".{name}" for name in chosen}
        same = [name for name in names if all(_same(one.get(name, MISSING), first[name]) for one in found)]
        self._constant = {name: first[name] for name in same}
        self._other = frozenset({name for one in found for name in one}.difference(same))

    def chosen(self, instance: nn.Module) -> dict[str, Any]:
        """Return the attributes that follow from the options of a new instance, for `holds`."""
        return {name: value for name, value in self._attributes(instance).items() if name in self._other}

    def holds(self, instance: nn.Module, chosen: Mapping[str, Any] | None = None) -> bool:
        """Whether an instance still computes what the trial has seen.

        Args:
            chosen: what `chosen` returned when the instance was made; None if its forward reads the options instead.
        """
        seen = self._seen.get(instance)
        if seen is not None and seen.still() and self.reads.inside_still():
            return True
        if not (self.reads.still() and self._same_instance(instance, chosen)):
            self._seen.pop(instance, None)
            return False
        seen = self.reads.found()
        for part in instance.modules():
            own = vars(part)
            held = {name: value for name, value in own.items() if name not in _OF_EVERY_MODULE}
            for space in (held, own["_modules"]):
                where = own if space is held else space
                seen.places += [(where, name, value) for name, value in space.items()]
            seen.sizes += [(space, len(space)) for space in (own, *(own[kind] for kind in _KINDS))]
            seen.sizes += [(own[hooks], len(own[hooks])) for hooks in HOOKS if part is not instance]
            lists = [value for value in held.values() if _is_mutable(value)]
            try:
                seen.mutable += [(value, copy.deepcopy(value)) for value in lists]
            except Exception:  # what a list holds may refuse it: then a change could not be seen
                return False
        self._seen[instance] = seen
        return True

    def _same_instance(self, instance: nn.Module, chosen: Mapping[str, Any] | None) -> bool:
        now = self._attributes(instance)
        for name, value in self._constant.items():
            if not _same(now.get(name, MISSING), value):
                return False
        if chosen is not None and any(not _same(now.get(name, MISSING), value) for name, value in chosen.items()):
            return False
        if len(now) == len(self._constant) + len(self._other):
            return True
        known, plain = self._constant.keys() | self._other, vars(instance)
        new = [name.removeprefix(".") for name in now if name not in known]
        if new and self.reads.any_name:
            return False
        # New parts, and what is new in a part, always count: the code may go through all parts.
        return not any(name in self.reads.names or name not in plain for name in new)

    def _attributes(self, module: nn.Module) -> dict[str, Any]:
        return attributes(module, own=self._own)


def attributes(module: nn.Module, prefix: str = "", own: str | None = None, with_mode: bool = False) -> dict[str, Any]:
    """Return the attributes of a module and of its parts by their full names.

    Buffers and parameters are among them, and whether a part has hooks. A method of the module itself is a function.

    Args:
        own: leave out the parts whose names begin so.
        with_mode: add whether it is in training mode.
    """
    content = vars(module)
    found = {f"{prefix}.{name}": value for name, value in content.items() if name not in _OF_EVERY_MODULE}
    for name, value in found.items():
        if isinstance(value, types.MethodType) and value.__self__ is module:
            found[name] = value.__func__
    if with_mode:
        found[f"{prefix}.training"] = content["training"]
    if prefix or with_mode:  # the hooks of an instance itself run around any forward
        found[f"{prefix}.hooks"] = sum(len(content[hooks]) for hooks in HOOKS)
    for kind in _KINDS[1:]:
        found.update((f"{prefix}.{name}", value) for name, value in content[kind].items())
    for name, part in content["_modules"].items():
        if own and name.startswith(own):
            continue
        found[f"{prefix}.{name}"] = type(part)
        if part is not None:
            found.update(attributes(part, f"{prefix}.{name}", own, with_mode))
    return found


def content_of(function: types.FunctionType) -> tuple[Any, ...]:
    """Return what a script may exchange in a function."""
    return function.__code__, function.__defaults__, function.__kwdefaults__


def check_comparable(name: str, value: Any) -> None:
    """Raise ValueError if `_same` could not see a change of a value."""
    if isinstance(value, Tensor):
        raise ValueError(f"it keeps the tensor {name}, which may change")
    if isinstance(value, _LISTS):
        for part in (*value, *(value.values() if isinstance(value, dict) else ())):
            check_comparable(name, part)
    elif not (isinstance(value, (*_EXACT, torch.device, Options)) or _is_fixed(value)):
        raise ValueError(f"it keeps {name}, a {type(value).__name__} that may change")


def _is_fixed(value: Any) -> bool:
    """Whether a type or function always does the same, as far as other comparisons do not see it."""
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None
    return isinstance(value, type | types.BuiltinFunctionType | np.ufunc)


def _is_mutable(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_is_mutable, value))
    return isinstance(value, list | dict | set)


def _same(now: Any, then: Any) -> bool:
    """Whether two attributes have the same effect. Devices may differ: a trial is on the CPU."""
    if now is then:
        return True
    if type(now) is not type(then):
        return isinstance(then, Options) or (_is_device(now) and _is_device(then))
    if isinstance(now, _EXACT):
        return now == then or (_is_device(now) and _is_device(then))
    if isinstance(now, list | tuple):
        return len(now) == len(then) and all(map(_same, now, then))
    if isinstance(now, dict):
        return now.keys() == then.keys() and all(_same(now[key], then[key]) for key in now)
    if isinstance(now, set | frozenset | range):
        return now == then
    return isinstance(then, Options)


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] in _DEVICES)
