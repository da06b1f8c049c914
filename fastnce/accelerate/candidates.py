"""Which classes of a module may be a published loss or sampler, by their signatures and the options that they read."""

from __future__ import annotations

import inspect
import re
import types
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

import fastnce

from . import harmless
from .sampler import CALL, CONSTRUCTOR
from .trial import OPTIONS

TEMPERATURE = "nce_T"
_NCE = re.compile(r"(?<![a-z])nce(?![a-z])|NCE|Nce(?![a-z])")
"""NCE as a word of a name, as in PatchNCELoss and patch_nce_loss; not in `once`."""
_PRODUCTS = {"matmul", "bmm", "mm", "einsum", "cross_entropy", "logsumexp"}
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Candidate:
    """A class or function that may compute what this library computes.

    Args:
        value: the class, or the function.
        kind: what it may be; "" if it is only mentioned.
        why_not: why it is not tried; "" if it is.
    """

    value: type[nn.Module] | types.FunctionType
    kind: Literal["loss", "sampler", ""]
    why_not: str = ""


def candidates(module: types.ModuleType) -> list[Candidate]:
    """Return the candidates among a module's names, each once, also those that the module imports."""
    found: dict[int, Candidate] = {}
    library = harmless.of_a_library(module.__name__)
    for value in list(vars(module).values()):
        if id(value) in found:
            continue
        try:
            candidate = _candidate(value, module, library)
        except Exception:  # a metaclass, descriptor or signature may raise anything: then it is no published class
            continue
        if candidate is not None:
            found[id(value)] = candidate
    return list(found.values())


def _candidate(value: Any, module: types.ModuleType, library: bool) -> Candidate | None:
    """Look at a value by its type alone: `isinstance` would ask a proxy, which may then load what it stands for."""
    if issubclass(type(value), type) and issubclass(value, nn.Module):
        return _class(value) if not library or _published_name(value.__name__) else None
    if type(value) is types.FunctionType and value.__module__ == module.__name__ and not library:
        return _function(value)
    return None


def _published_name(name: str) -> bool:
    return name.startswith("PatchNCELoss") or name == "PatchSampleF"


def _class(cls: type[nn.Module]) -> Candidate | None:
    if issubclass(cls, (fastnce.PatchNCELoss, fastnce.PatchSampleF)) or cls.__module__.startswith("fastnce."):
        return None
    if harmless.of_a_library(cls.__module__) and not _published_name(cls.__name__):
        return None
    forward, constructor = cls.forward, cls.__init__
    if not isinstance(forward, types.FunctionType) or not isinstance(constructor, types.FunctionType):
        known = _published_name(cls.__name__)
        return Candidate(cls, "", "its forward or its constructor is not a Python function") if known else None
    if _takes(forward, 3) and set(CALL) <= set(inspect.signature(forward).parameters):
        if _takes_names(constructor, CONSTRUCTOR):
            return Candidate(cls, "sampler")
        return Candidate(cls, "", f"its constructor does not take {', '.join(CONSTRUCTOR)}")
    if cls.__name__ == "PatchSampleF":
        return Candidate(cls, "", "its forward does not take (feats, num_patches, patch_ids)")
    pairs, reads = _takes(forward, 2), reads_the_temperature(cls)
    values = [name for name in list(inspect.signature(constructor).parameters)[1:] if name in OPTIONS]
    if pairs and reads and not values and _takes(constructor, 1):
        return Candidate(cls, "loss")
    if not _NCE.search(cls.__name__):
        return None
    if not pairs:
        return Candidate(cls, "", "its forward does not take (feat_q, feat_k)")
    if values or not _takes(constructor, 1):
        return Candidate(cls, "", "its constructor does not take (opt)")
    return Candidate(cls, "", f"it does not read opt.{TEMPERATURE}")


def _function(function: types.FunctionType) -> Candidate | None:
    if not _NCE.search(function.__name__) or not _takes(function, 2, bound=False):
        return None
    if not _PRODUCTS & {*harmless.attributes_of(function.__code__)}:
        return None
    return Candidate(function, "", "a function: its arguments have no agreed meaning, so it is not tried")


def reads_the_temperature(cls: type) -> bool:
    """Whether the code of a class reads the published option of the temperature."""
    return any(TEMPERATURE in harmless.attributes_of(f.__code__) for f in harmless.functions_of(cls))


def _takes(function: types.FunctionType, count: int, bound: bool = True) -> bool:
    """Whether a function can be called with `count` positional arguments, beside `self` if it is a method."""
    parameters = list(inspect.signature(function).parameters.values())[bound:]
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    needed = [p for p in parameters if p.default is p.empty and p.kind in (*_POSITIONAL, p.KEYWORD_ONLY)]
    return len(positional) >= count and all(p in positional[:count] for p in needed)


def _takes_names(function: types.FunctionType, names: tuple[str, ...]) -> bool:
    """Whether a method can be called with these keywords alone."""
    parameters = dict(list(inspect.signature(function).parameters.items())[1:])
    rest = [p for name, p in parameters.items() if name not in names]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return set(names) <= set(parameters) and all(p.default is not p.empty or p.kind in variable for p in rest)
