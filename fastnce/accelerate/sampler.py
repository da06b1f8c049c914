"""Sampler classes: the trial of a class, and the forward that replaces its own."""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastnce

from .trial import state_of
from .unchanged import HOOKS, Reads, Unchanged

CONSTRUCTOR = ("use_mlp", "init_type", "init_gain", "nc", "gpu_ids")
CALL = ("num_patches", "patch_ids")
WHAT = "sampling on the device, only the sampled rows are read"
CHANNELS = (3, 4, 6, 6, 5, 8)
"""Of the maps of the trial. CUT has five; QS-Attn treats those after the third in another way."""


class _Fast(fastnce.PatchSampleF):
    """This library's sampler with the MLPs of an instance of the user's class, which has `chosen` attributes."""

    def __init__(self, owner: nn.Module, unchanged: Unchanged | None = None):
        super().__init__(use_mlp=False)
        self.chosen = unchanged.chosen(owner) if unchanged else {}
        self._modules = owner._modules
        self.use_mlp = self.mlp_init = "mlp_0" in owner._modules


_FAST: weakref.WeakKeyDictionary[nn.Module, _Fast] = weakref.WeakKeyDictionary()
"""Beside the instances, not in them: what is saved or copied of an instance stays as it was."""


def install(cls: type[nn.Module], unchanged: Unchanged) -> None:
    """Give a class the forward of this library. Calls that it does not cover run the class's own forward.

    The first call of an instance is its own: it draws the weights of its MLPs as published.
    """
    original, signature = cls.forward, inspect.signature(cls.forward)
    first = list(signature.parameters)[1]

    @functools.wraps(original)
    def forward(self, *arguments, **named):
        if type(self) is not cls:  # a subclass may change what the class's own forward calls
            return original(self, *arguments, **named)
        fast = _FAST.get(self)
        if fast is None or fast._modules is not self._modules:
            fast = _Fast(self, unchanged)
            if not fast.use_mlp:  # it may make its MLPs now
                result = original(self, *arguments, **named)
                _FAST[self] = _Fast(self, unchanged)
                return result
            _FAST[self] = fast
        given = _call(signature, first, self, arguments, named)
        if given is None or not (_usable(fast, given[0]) and unchanged.holds(self, fast.chosen)):
            return original(self, *arguments, **named)
        return fast(*given)

    cls.forward = forward


def _call(
    signature: inspect.Signature, first: str, sampler: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, int, Any] | None:
    """Return (feats, num_patches, patch_ids) of a call, or None if it is not covered."""
    if torch.compiler.is_compiling():
        return None
    if len(arguments) == 3 and not named and list(signature.parameters)[2:4] == list(CALL):
        feats, patches, ids = arguments
        return arguments if type(patches) is int and patches > 0 else None
    try:
        bound = signature.bind(sampler, *arguments, **named)
    except TypeError:
        return None  # the class's own forward raises it
    for name, value in list(bound.arguments.items())[1:]:
        if name not in (first, *CALL) and value is not signature.parameters[name].default:
            return None
    bound.apply_defaults()
    feats, patches, ids = (bound.arguments[name] for name in (first, *CALL))
    return (feats, patches, ids) if type(patches) is int and patches > 0 else None


def _usable(fast: _Fast, feats: Any) -> bool:
    """Whether maps and MLPs are those of the published sampler."""
    if not isinstance(feats, list | tuple) or not feats:
        return False
    if not all(isinstance(feat, Tensor) and feat.dim() == 4 for feat in feats):
        return False
    if "mlp_0" not in fast._modules:
        return not fast.use_mlp
    return fast.use_mlp and all(_plain(fast._modules.get(f"mlp_{layer}")) for layer in range(len(feats)))


def _plain(mlp: Any) -> bool:
    """Whether a module is Linear, ReLU, Linear, without hooks and without a forward of its own."""
    if type(mlp) is not nn.Sequential:
        return False
    layers = list(mlp._modules.values())
    if [type(layer) for layer in layers] != [nn.Linear, nn.ReLU, nn.Linear]:
        return False
    both = all(getattr(layer, "bias", None) is not None for layer in (layers[0], layers[2]))
    parts = [vars(m) for m in (mlp, *layers)]
    changed = any("forward" in own or any(own[hooks] for hooks in HOOKS) for own in parts)
    return both and not changed


def try_sampler(cls: type[nn.Module], reads: Reads) -> Unchanged:
    """Run a class on small random data and compare it with this library's sampler.

    Args:
        reads: what its code reads.

    Returns:
        what compares later instances with those of the trial.

    Raises:
        ValueError: it computes something else, or draws locations in another way.
    """
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, c, 4, 5, generator=generator, dtype=torch.float64) for c in CHANNELS]
    drawn = [np.arange(19, 3, -3), np.arange(7), np.arange(0, 20, 4), np.array([7, 3]), np.arange(20), np.array([19])]
    made = []
    for use_mlp in (False, True):
        sampler = cls(use_mlp=use_mlp, init_type="normal", init_gain=0.5, nc=16, gpu_ids=[])
        for number in range(3):
            torch.default_generator.manual_seed(number)  # of the CPU alone
            result = sampler([m.float() for m in maps], 6)
            if not isinstance(result, tuple | list) or len(result) != 2:
                count = len(result) if isinstance(result, tuple | list) else 1
                raise ValueError(f"it returns {count} values where two are expected: rows and ids")
        made.append(sampler.double())
        for parameter in sampler.parameters():
            if parameter.dim() == 1:  # biases, which are 0 at first
                nn.init.normal_(parameter, generator=generator)
        fast = _Fast(sampler)
        if fast.use_mlp != use_mlp or not _usable(fast, maps):
            raise ValueError("it has no MLPs mlp_0, mlp_1, ... of Linear, ReLU and Linear")
        before = state_of(sampler)
        for ids in (drawn, [torch.from_numpy(i) for i in drawn]):
            _compare(sampler, fast, maps, ids)
        _compare(sampler.eval(), fast, maps, drawn)
        if state_of(sampler) != before:
            raise ValueError("its forward changes its own state")
    _check_draws(cls(use_mlp=False, init_type="normal", init_gain=0.5, nc=8, gpu_ids=[]))
    return Unchanged(reads, made, CONSTRUCTOR, "mlp_")


def _compare(sampler: nn.Module, fast: _Fast, maps: list[Tensor], ids: list[Any]) -> None:
    results = []
    for net in (sampler, fast):
        feats = [m.clone().requires_grad_() for m in maps]
        sampler.zero_grad()
        rows, used = net(feats, 6, ids)
        if [list(map(int, i)) for i in used] != [i.tolist() for i in ids]:
            raise ValueError("it does not take the locations that it is given")
        sum((r * r.cos()).sum() for r in rows).backward()
        results.append([*rows, *(f.grad for f in feats), *(p.grad for p in sampler.parameters())])
    for theirs, ours in zip(*results, strict=True):
        if theirs is None or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            raise ValueError("its rows or gradients have another shape or dtype")
        difference = (theirs - ours).abs().max().item()
        if not difference <= 1e-8 * ours.abs().max().clamp(min=1e-3).item():
            raise ValueError(f"its rows or gradients differ by {difference:.1e} on random data")


def _check_draws(sampler: nn.Module) -> None:
    """Raise ValueError unless locations are drawn uniformly, for all images alike, whatever the maps hold."""
    low = torch.arange(12.0).reshape(1, 1, 3, 4)
    both = torch.cat([low, low + 100]), torch.cat([low.flip(3), low.flip(2) + 100])
    together = torch.zeros(12, 12)
    for number in range(150):
        seen = []
        for feat in both[: 2 if number < 10 else 1]:
            torch.default_generator.manual_seed(number)  # of the CPU alone
            np.random.seed(number)
            rows, (ids,) = sampler([feat], 4)
            ids = torch.as_tensor(ids)
            if ids.shape != (4,) or len(rows[0]) != 8:
                raise ValueError("it does not draw one set of locations for all images of a batch")
            seen.append(ids)
        if not all(torch.equal(ids, seen[0]) for ids in seen):
            raise ValueError("the locations that it draws depend on the maps")
        if len(set(seen[0].tolist())) != 4 or not all(0 <= i < 12 for i in seen[0].tolist()):
            raise ValueError("it does not draw distinct locations")
        together[seen[0][:, None], seen[0]] += 1
    # of 150 draws, 50 are expected to hold a location (deviation 6) and 14 to hold a pair (deviation 3.5)
    alone, pairs = together.diagonal(), together[~torch.eye(12, dtype=torch.bool)]
    if not (alone.min() > 20 and alone.max() < 80 and pairs.min() > 0 and pairs.max() < 40):
        raise ValueError("it does not draw locations uniformly")
    if sorted(torch.as_tensor(sampler([low], 64)[1][0]).tolist()) != list(range(12)):
        raise ValueError("it does not take every location where there are fewer than num_patches")


def own_calls(cls: type[nn.Module]) -> str:
    """Say which calls run the class's own forward."""
    names = list(inspect.signature(cls.forward).parameters)[1:]
    return _said([name for name in names[1:] if name not in CALL])


def _said(names: list[str]) -> str:
    return f"; calls with {' or '.join(names)} run as before" if names else ""
