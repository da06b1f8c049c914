"""Give the published loss and sampler classes of a module this library's forward, where they compute the same.

The class itself stays, and only its `forward` changes. So the replacement holds for every name of the class and for the
instances made before, and checkpoints stay as they are.
"""

from __future__ import annotations

import sys
import types
import weakref
from dataclasses import dataclass, field

from torch import nn

from . import harmless, losses, sampler
from .candidates import Candidate, candidates
from .trial import Lacking, isolated
from .unchanged import Reads


def patch(module: types.ModuleType) -> list[str]:
    """Replace the forward of the published loss and sampler classes of a module, by whatever name it knows them.

    Args:
        module: usually `models.patchnce` or `models.networks` of a checkout.

    Returns:
        the names of the replaced classes in all modules, such as `["models.patchnce.PatchNCELoss",
        "models.cut_model.PatchNCELoss"]`. The list is empty if there is nothing to replace; a second call does nothing.
    """
    return [name for candidate in candidates(module) for name in replace(candidate).names]


@dataclass(frozen=True)
class Outcome:
    """What became of a class or function.

    Args:
        name, module: its own, qualified name, and that of its module.
        what: the replacement, or why it is kept.
        replaced: whether it is replaced.
        tried: whether its code has been run.
        names: the names that refer to it, if it is replaced.
        unready: its trial used a name that its module has not defined yet. A later trial may succeed.
    """

    name: str
    module: str
    what: str
    replaced: bool = False
    tried: bool = True
    names: list[str] = field(default_factory=list)
    unready: bool = False

    @property
    def sentence(self) -> str:
        """One line for the user."""
        where = f"{self.module}.{self.name}"
        return f"replaced {where}: {self.what}" if self.replaced else f"{where} is left as it is: {self.what}"


_REPLACED: weakref.WeakKeyDictionary[type, Outcome] = weakref.WeakKeyDictionary()


def replace(candidate: Candidate) -> Outcome:
    """Run a class on small random data. If it computes what this library computes, replace its forward."""
    value = candidate.value
    name, module = value.__qualname__, value.__module__
    if candidate.why_not or not isinstance(value, type):
        return Outcome(name, module, candidate.why_not, tried=False)
    if value in _REPLACED:
        return Outcome(name, module, _REPLACED[value].what, replaced=True)
    tried = False
    try:
        reads = harmless.check(value)
        tried = True
        what = _tried_and_replaced(value, candidate.kind, reads)
    except Exception as error:  # a user's class may raise anything: then it is not the published one
        return Outcome(name, module, _sentence(error), tried=tried, unready=isinstance(error, NameError))
    outcome = Outcome(name, module, what, replaced=True, names=_names_of(value))
    _REPLACED[value] = outcome
    return outcome


def _tried_and_replaced(cls: type[nn.Module], kind: str, reads: Reads) -> str:
    if kind == "sampler":
        with isolated():
            unchanged = sampler.try_sampler(cls, reads)
        sampler.install(cls, unchanged)
        return sampler.WHAT + sampler.own_calls(cls)
    with isolated():
        agreed = losses.try_loss(cls, reads)
    losses.install(cls, agreed)
    return agreed.formula.what + losses.own_calls(cls, agreed)


def _sentence(error: Exception) -> str:
    first, *_ = str(error).strip().splitlines() or [""]
    if not isinstance(error, ValueError | NameError | Lacking):
        first = f"its trial ended with {type(error).__name__}{first and ': '}{first}"
    return first if len(first) <= 300 else f"{first[:300]} ..."


def _names_of(cls: type) -> list[str]:
    """Return the names for a class in all modules."""
    return [
        f"{module_name}.{name}"
        for module_name, module in list(sys.modules.items())
        for name, value in list(getattr(module, "__dict__", {}).items())
        if value is cls
    ]
