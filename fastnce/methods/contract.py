"""The check of a user's own method against the contract of `Method`."""

from __future__ import annotations

import inspect
import math
import random
from typing import Any, NoReturn

from torch import Tensor, nn

from ..common.imports import CodeError
from ..common.messages import shown
from .base import Draws, Group, Losses, Method, Phase
from .translation import check_translation

ROLES = ("generators", "discriminators", "projectors", "networks", "extra_state_modules")
CALLS = {
    **dict.fromkeys((*ROLES, "groups", "phases", "discriminator_losses", "identity_losses"), ""),
    "draw": "rng",
    "prepare": "batch",
    "begin_epoch": "epoch, epochs",
    "finish": "bad",
    "generate": "batch, draws",
    "translate": "a",
    "pictures": "batch",
    "check": "batch_size, height, width",
    "check_options": "batch_size",
    "check_sizes": "batch_size, a, b, remedy",
    "sizes_of": "name, a, b",
    "whole_batch": "",
    "share_keys": "others",
}
"""The members of a method that are called, with their arguments."""
COLUMNS = (
    "step", "epoch", "pictures", "lr", "skipped_steps", "images_per_second", "data_share", "response", "identity_psnr",
    "warnings",
)  # fmt: skip
"""Names that metrics.jsonl has for other numbers than losses."""


def check_contract(method: Method, name: str) -> None:
    """Check what a user's method returns: its networks, groups, phases and names of losses.

    Args:
        name: its import path.

    Raises:
        CodeError: the first member that is wrong, and what it must return.
    """

    def refuse(what: str) -> NoReturn:
        raise CodeError(f"method={name}: {what}")

    for member, arguments in CALLS.items():
        _check_call(getattr(method, member), member, arguments, refuse)
    if not _is_number(method.gp):
        refuse(f"gp must be a number, not {shown(method.gp)}")
    for role in ROLES:
        found: Any = getattr(method, role)()
        if not isinstance(found, dict):
            refuse(f"{role}() must return a dict of networks by name, not {shown(found)}")
        for key, network in found.items():
            if not (isinstance(key, str) and key.isidentifier()):
                refuse(f"{role}() names a network {key!r}: a name must be a Python identifier, such as G_A")
            if not isinstance(network, nn.Module):
                refuse(f"{role}() returns {shown(network)} as {key}, not a torch.nn.Module")
    if not method.generators():
        refuse("generators() must name at least one network")
    roles = [*method.generators(), *method.discriminators(), *method.projectors()]
    if twice := [key for key in roles if roles.count(key) > 1]:
        refuse(f"{twice[0]} names two networks: each generator, discriminator and projector needs its own name")
    _check_groups(method, refuse)
    watched: Any = method.discriminator_losses()
    if not isinstance(watched, dict) or not all(_names(names) for names in watched.values()):
        refuse('discriminator_losses() must return a dict of tuples of names, such as {"D": ("D_real", "D_fake")}')
    if not _names(method.identity_losses()):
        refuse('identity_losses() must return a tuple of names, such as ("idt_B",)')
    phases: Any = method.phases()
    if not isinstance(phases, tuple | list) or not phases or not all(isinstance(p, Phase) for p in phases):
        refuse(f"phases() must return a tuple of fastnce.methods.Phase, at least one, not {shown(phases)}")
    for phase in phases:
        known = ", ".join(method.groups())
        if not callable(phase.loss):
            refuse(f"the loss of a phase must be a function, not {shown(phase.loss)}")
        _check_call(phase.loss, getattr(phase.loss, "__name__", "a loss"), "batch, outputs, draws", refuse)
        if isinstance(phase.groups, str) or not phase.groups or any(g not in method.groups() for g in phase.groups):
            refuse(f"a phase updates {phase.groups!r}; its groups must be a tuple of names out of {known}")


def _check_call(function: Any, name: str, arguments: str, refuse: Any) -> None:
    if not callable(function):
        refuse(f"{name} must be a method {name}({arguments}), not {shown(function)}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function in C may not tell
        return
    try:
        signature.bind(*(arguments.split(", ") if arguments else ()))
    except TypeError:
        refuse(f"{name} must be callable as {name}({arguments})")


def _check_groups(method: Method, refuse: Any) -> None:
    groups: Any = method.groups()
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, Group) for g in groups.values()):
        refuse(f"groups() must return a dict of fastnce.methods.Group by name, not {shown(groups)}")
    stored = [*method.networks().values(), *method.extra_state_modules().values()]
    kept = {id(p) for module in stored for p in module.parameters()}
    seen: dict[str, set[int]] = {}
    for key, group in groups.items():
        if not isinstance(group.modules, tuple | list) or not all(isinstance(m, nn.Module) for m in group.modules):
            refuse(f"group {key} must hold a tuple of modules, not {shown(group.modules)}")
        if group.lr is not None and not (_is_number(group.lr) and 0 <= group.lr < math.inf):
            refuse(f"group {key} has lr={group.lr!r}, which must be None or a number of at least 0")
        betas: Any = group.betas
        pair = isinstance(betas, tuple | list) and len(betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in betas)
        if betas is not None and not pair:
            refuse(f"group {key} has betas={betas!r}, which must be None or two numbers from 0 to below 1")
        parameters = [p for module in group.modules for p in module.parameters() if p.requires_grad]
        if not parameters:
            refuse(f"group {key} has no parameters to train")
        if shared := [other for other, ids in seen.items() if ids & {id(p) for p in parameters}]:
            refuse(f"groups {shared[0]} and {key} train the same parameters: each belongs to one group")
        seen[key] = {id(p) for p in parameters}
        if any(id(p) not in kept for p in parameters):
            refuse(
                f"group {key} trains parameters that no network holds, so checkpoints would lack them: return their "
                f"module from generators(), discriminators() or projectors()"
            )


def check_planned(method: Method, name: str) -> None:
    """Check what a user's `draw` and `translate` return, with a method that will not be trained: they may change it.

    Raises:
        CodeError: what is wrong.
    """
    if not isinstance(draws := method.draw(random.Random(0)), Draws):
        raise CodeError(f"method={name}: draw(rng) must return fastnce.methods.Draws, not {shown(draws)}")
    check_translation(method, name)


def check_loss(result: Any, phase: Phase) -> tuple[Tensor, Losses]:
    """Check what the loss of a user's phase returned.

    Raises:
        CodeError: it is not (scalar tensor, dict of scalar tensors by name).
    """
    name = getattr(phase.loss, "__qualname__", None) or getattr(phase.loss, "name", "a loss")
    wanted = f"{name} must return (loss, losses to log): a scalar tensor, and a dict of scalar tensors by name"
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise CodeError(f"{wanted}; it returned {shown(result)}")
    loss, logged = result
    if not _is_scalar(loss) or not loss.requires_grad:
        detached = " without a gradient" if isinstance(loss, Tensor) and not loss.requires_grad else ""
        raise CodeError(f"{wanted}; its loss is {shown(loss)}{detached}")
    if not isinstance(logged, dict) or not all(isinstance(key, str) and _is_scalar(x) for key, x in logged.items()):
        wrong = {key: shown(x) for key, x in logged.items() if not _is_scalar(x)} if isinstance(logged, dict) else ""
        raise CodeError(f"{wanted}; its losses to log are {wrong or shown(logged)}")
    if taken := [key for key in logged if key in COLUMNS]:
        raise CodeError(f"{name} logs {taken[0]!r}, a name that metrics.jsonl has for another number: rename it")
    return loss, logged


def _names(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(name, str) for name in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.dtype.is_floating_point
