"""The state of a training step as tensors: names in a checkpoint, saving and loading."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..methods.base import Method
from .optim import LossScale, ParameterGroup, WeightAverage


class TrainingState:
    """Everything that a step depends on besides its batch, as tensors with flat names.

    Args:
        method: with its networks and other stateful modules.
        groups: the parameter groups, with Adam's moments and counts.
        averages: averaged weights by generator; empty if the run keeps no average.
        loss_scale: for float16; None without.
        bad_steps: (), the number of consecutive bad steps.
        schedule: what the learning rate depends on besides the epoch, by name; None for nothing.
    """

    def __init__(
        self,
        method: Method,
        groups: Mapping[str, ParameterGroup],
        averages: Mapping[str, WeightAverage],
        loss_scale: LossScale | None,
        bad_steps: Tensor,
        schedule: Mapping[str, Tensor] | None = None,
    ):
        self.method, self.groups, self.averages = method, groups, averages
        self.loss_scale, self.bad_steps, self.schedule = loss_scale, bad_steps, schedule or {}
        self._buffers = [module._buffers for module in method.modules() if module._buffers]

    def places(self) -> Hashable:
        """Return the addresses of all that a recorded step changes, but `bad_steps`. It costs about 0.1 us per tensor.

        Of Adam's state, only the first moment of each parameter is listed: the others are replaced together with it.
        """
        tensors = list(self.schedule.values())
        for group in self.groups.values():
            tensors += [group.lr, *group.parameters]
            tensors += [moments["exp_avg"] for moments in group.adam.state.values()]
        for buffers in self._buffers:  # pools and banks among them
            tensors += [buffer for buffer in buffers.values() if buffer is not None]
        for average in self.averages.values():
            tensors += average.average.values()
        if self.loss_scale is not None:
            tensors += [self.loss_scale.scale, self.loss_scale.good]
        return tuple(map(Tensor.data_ptr, tensors))

    def generator_weights(self) -> dict[str, Tensor]:
        """The generators' weights as "G/model.1.weight": the averaged ones if there are any."""
        return {
            f"{name}/{key}": tensor
            for name, network in self.method.generators().items()
            for key, tensor in (self.averages[name].average if name in self.averages else network.state_dict()).items()
        }

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within: the generators compute with their averaged weights if there are any."""
        networks = self.method.generators()
        own = {name: {k: t.clone() for k, t in networks[name].state_dict().items()} for name in self.averages}
        try:
            for name, average in self.averages.items():
                networks[name].load_state_dict(average.average)
            yield
        finally:
            for name, state in own.items():
                networks[name].load_state_dict(state)

    def state(self) -> dict[str, Tensor]:
        """The tensors themselves, not copies."""
        tensors = {
            f"network/{n}/{k}": t for n, net in self.method.networks().items() for k, t in net.state_dict().items()
        }
        for name, group in self.groups.items():
            tensors |= {f"adam/{name}/{key}": tensor for key, tensor in group.state().items()}
        for name, average in self.averages.items():
            tensors |= {f"average/{name}/{key}": tensor for key, tensor in average.average.items()}
        for name, module in self.method.extra_state_modules().items():
            tensors |= {f"extra/{name}/{key}": tensor for key, tensor in module.state_dict().items()}
        if self.loss_scale is not None:
            tensors |= {"loss_scale/scale": self.loss_scale.scale, "loss_scale/good": self.loss_scale.good}
        tensors |= {f"schedule/{key}": tensor for key, tensor in self.schedule.items()}
        tensors["bad_steps"] = self.bad_steps
        return tensors

    def check(self, tensors: dict[str, Tensor]) -> None:
        """ValueError unless these have the names, shapes and dtypes of the tensors of `state`."""
        for group in self.groups.values():
            group.prepare()
        check_state(self.state(), tensors)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors that `check` has accepted into place."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

        for name, network in self.method.networks().items():
            try:
                network.load_state_dict(under(f"network/{name}/"))
            except RuntimeError as error:
                raise ValueError(f"the checkpoint's {name} is not this one: {' '.join(str(error).split())}") from None
        for name, group in self.groups.items():
            group.load_state(under(f"adam/{name}/"))
        for name, average in self.averages.items():
            stored = under(f"average/{name}/")
            for key, tensor in average.average.items():
                tensor.copy_(stored[key])
        for name, module in self.method.extra_state_modules().items():
            try:
                module.load_state_dict(under(f"extra/{name}/"))
            except RuntimeError as error:
                raise ValueError(f"the checkpoint's {name} is not this one: {' '.join(str(error).split())}") from None
        if self.loss_scale is not None and "loss_scale/scale" in tensors:
            self.loss_scale.scale.copy_(tensors["loss_scale/scale"])
            self.loss_scale.good.copy_(tensors["loss_scale/good"])
        for key, tensor in under("schedule/").items():
            if key in self.schedule:
                self.schedule[key].copy_(tensor)
        self.bad_steps.copy_(tensors["bad_steps"])


def planned_state(method: Method, ema: float) -> dict[str, Tensor]:
    """Return the tensors that `TrainingState.state` has for a method that may be on the meta device.

    Args:
        method: as `fastnce.config.build.plan` returns.
        ema: `optim.ema`; above 0 there are averaged weights.
    """
    tensors = {f"network/{n}/{k}": t for n, net in method.networks().items() for k, t in net.state_dict().items()}
    for name, group in method.groups().items():
        for place, module in enumerate(group.modules):
            for key, parameter in module.named_parameters():
                if parameter.requires_grad:
                    moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter.detach())
                    tensors |= {f"adam/{name}/{place}.{key}/{moment}": t for moment, t in moments.items()}
                    tensors[f"adam/{name}/{place}.{key}/step"] = torch.zeros(())
    if ema:
        tensors |= {
            f"average/{n}/{k}": t for n, net in method.generators().items() for k, t in net.state_dict().items()
        }
    for name, module in method.extra_state_modules().items():
        tensors |= {f"extra/{name}/{key}": tensor for key, tensor in module.state_dict().items()}
    return {**tensors, "bad_steps": torch.zeros(())}


def check_state(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """ValueError unless the tensors of a checkpoint fit those of a run: none is missing, unknown, cast or broadcast."""
    if problems := misfits(wanted, found):
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"training.safetensors does not fit: {'; '.join(problems[:4])}{more}")


def misfits(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Return how the tensors of a checkpoint differ from those of a run in name, shape or dtype, one clause each.

    The loss scale and the state of a schedule are optional, because `run.precision` and `optim.schedule` may change.
    Pools of images may have another size. Earlier versions stored no moments of biases without a gradient, so all
    moments of a bias may be missing.
    """
    with_moments = {key.rpartition("/")[0] for key in found if key.startswith("adam/")}

    def free(key: str) -> bool:
        parameter = key.rpartition("/")[0]
        bias = key.startswith("adam/") and parameter.endswith(".bias") and parameter not in with_moments
        return key.startswith(("loss_scale/", "schedule/")) or bias

    def kind(key: str, tensor: Tensor) -> str:
        return f"{tensor.dtype}" if key.startswith("extra/") else f"{tensor.dtype} {tuple(tensor.shape)}"

    problems = [f"{key} is missing" for key in wanted if key not in found and not free(key)]
    problems += [f"{key} belongs to nothing here" for key in found if key not in wanted and not free(key)]
    problems += [
        f"{key} is {kind(key, found[key])}, this run has {kind(key, tensor)}"
        for key, tensor in wanted.items()
        if key in found and kind(key, found[key]) != kind(key, tensor)
    ]
    return problems
