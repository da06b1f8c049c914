"""The parameters that each phase of a step trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from ..methods.base import Method, Phase
from .optim import ParameterGroup
from .options import OptimOptions


class TrainedParameters(NamedTuple):
    """The parameters that a phase trains, all others, and whether it trains a generator.

    `objective` names the phase's loss among the losses to log, if the learning rate follows it; else it is empty.
    """

    own: list[nn.Parameter]
    others: list[nn.Parameter]
    generators: bool
    objective: str = ""


def make_groups(method: Method, options: OptimOptions) -> dict[str, ParameterGroup]:
    """The parameter groups of a method, each with the optimiser of the options."""
    betas = (options.beta1, options.beta2)
    return {
        name: ParameterGroup(
            group.modules,
            options.lr if group.lr is None else group.lr,
            group.betas or betas,
            options.weight_decay,
            options.optimizer == "adamw",
        )
        for name, group in method.groups().items()
    }


def count_parameters(method: Method) -> int:
    """Count the parameters of a method's networks and groups. Those of networks that it leaves out are not counted."""
    modules = [*method.networks().values(), *(module for g in method.groups().values() for module in g.modules)]
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def trained_by(
    phases: Sequence[Phase], groups: Mapping[str, ParameterGroup], generators: Sequence[nn.Module], *, follow: bool
) -> dict[tuple[str, ...], TrainedParameters]:
    """What each phase trains, by the names of its groups.

    Args:
        follow: the learning rate follows the losses of the phases that train a generator.

    Raises:
        ValueError: it does, and there is no such phase.
    """
    found = {}
    made_by = {id(p) for network in generators for p in network.parameters()}
    for phase in phases:
        own = [p for name in phase.groups for p in groups[name].parameters]
        others = [p for name, group in groups.items() if name not in phase.groups for p in group.parameters]
        trains = any(id(p) in made_by for p in own)
        objective = f"the loss of {'+'.join(phase.groups)}" if follow and trains else ""
        found[phase.groups] = TrainedParameters(own, others, trains, objective)
    if follow and not any(trained.objective for trained in found.values()):
        raise ValueError("optim.schedule=plateau follows the generators' loss, and no loss here trains a generator")
    return found
