"""One training step: generate, then each phase's loss, gradients and update, in the paper's order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Batch, Draws, Method, Outputs, Phase
from ..networks import channels_last
from .compiled import Compiled
from .distributed import Ranks
from .optim import LossScale, OptimOptions, ParameterGroup, WeightAverage

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(name: str, device: torch.device) -> str:
    """ "auto" is bf16 on an accelerator that computes in it, else fp32."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16"


def pick_compile(name: str, device: torch.device) -> bool:
    """ "auto" compiles on accelerators: on a CPU it takes minutes and gains little."""
    if name not in ("auto", "true", "false"):
        raise ValueError(f"run.compile must be auto, true or false, not {name!r}")
    return name == "true" or (name == "auto" and device.type != "cpu")


class Step:
    """The step of a method, with everything that it changes: networks, optimisers, averaged weights.

    Args:
        method: the paper, already on its device.
        options: learning rate and so on.
        precision: "fp32"; or "bf16", "fp16": forward passes in 16 bits under autocast, weights, losses and updates in
            float32, with a loss scale for "fp16".
        compile: compile `generate` and each phase's loss (see `Compiled`); a string names the backend.
        ranks: the processes that share the batch.
    """

    def __init__(
        self,
        method: Method,
        options: OptimOptions,
        precision: str = "fp32",
        compile: bool | str = False,
        ranks: Ranks | None = None,
    ):
        device = next(method.parameters()).device
        # A CPU's convolutions take either layout at the same speed, and everything between them is faster in the plain
        # one; GPUs want channels-last.
        self.layout = torch.contiguous_format if device.type == "cpu" else torch.channels_last
        if self.layout is torch.channels_last:
            channels_last(method)
        self.method = method
        self.ranks = ranks or Ranks()
        self.options = options
        betas = (options.beta1, options.beta2)
        self.groups = {
            name: ParameterGroup(group.modules, group.lr or options.lr, group.betas or betas)
            for name, group in method.groups().items()
        }
        self.phases = method.phases()
        self.generate: Callable[[Batch, Draws], Outputs] = method.generate
        if compile:
            backend = compile if isinstance(compile, str) else "inductor"
            self.generate = Compiled(method.generate, backend)
            self.phases = tuple(Phase(Compiled(phase.loss, backend), phase.groups) for phase in self.phases)
        if precision not in PRECISIONS:
            raise ValueError(f"run.precision must be auto, {', '.join(PRECISIONS)}, not {precision!r}")
        self.device_type, self.dtype = device.type, PRECISIONS[precision]
        self.loss_scale = LossScale(device) if precision == "fp16" else None
        self.bad_steps = torch.zeros((), device=device)
        """Steps that were not finite, in a row up to now."""
        generators = {name: net for name, net in method.networks().items() if name.startswith("G")}
        self.averages = (
            {name: WeightAverage(net, options.ema) for name, net in generators.items()} if options.ema else {}
        )

    @property
    def compile_seconds(self) -> float:
        """What the first calls of compiled parts took; 0 where nothing is compiled."""
        parts: list[Any] = [self.generate, *(phase.loss for phase in self.phases)]
        return sum(part.seconds for part in parts if isinstance(part, Compiled))

    def set_learning_rate(self, factor: float) -> None:
        for group in self.groups.values():
            group.set_factor(factor)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32)

    def run(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Update every network once; returns the losses, on the device, without waiting for them."""
        losses: dict[str, Tensor] = {}
        batch = Batch(*(pictures.contiguous(memory_format=self.layout) for pictures in batch))
        scale = None if self.loss_scale is None else self.loss_scale.scale
        with self._autocast():
            outputs = self.generate(batch, draws)
        bad = torch.zeros_like(self.bad_steps)
        for phase in self.phases:
            # a compiled loss would compute gradients of the networks that it merely passes through
            resting = [p for name, g in self.groups.items() if name not in phase.groups for p in g.parameters]
            for parameter in resting:
                parameter.requires_grad_(False)
            with self._autocast():
                loss, logged = phase.loss(batch, outputs, draws)
            for parameter in resting:
                parameter.requires_grad_(True)
            if scale is not None:
                loss = loss * scale
            groups = [self.groups[name] for name in phase.groups]
            parameters = [p for group in groups for p in group.parameters]
            own = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradients = self.ranks.average(own, parameters)
            for group in groups:
                bad = torch.maximum(bad, group.update(gradients[: len(group.parameters)], scale))
                gradients = gradients[len(group.parameters) :]
            losses |= {name: value.detach() for name, value in logged.items()}
        self.bad_steps.add_(1).mul_(bad)
        if self.loss_scale is not None:
            self.loss_scale.update(bad)
        for average in self.averages.values():
            average.update()
        return losses

    def generators(self) -> dict[str, Tensor]:
        """The generators' weights as "G/model.1.weight", averaged ones where an average is kept."""
        return {
            f"{name}/{key}": tensor
            for name, network in self.method.networks().items()
            if name.startswith("G")
            for key, tensor in (self.averages[name].average if name in self.averages else network.state_dict()).items()
        }

    @contextmanager
    def averaged(self):
        """Within: the generators compute with their averaged weights, where an average is kept."""
        networks = self.method.networks()
        own = {name: {k: t.clone() for k, t in networks[name].state_dict().items()} for name in self.averages}
        try:
            for name, average in self.averages.items():
                networks[name].load_state_dict(average.average)
            yield
        finally:
            for name, state in own.items():
                networks[name].load_state_dict(state)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, by a flat name."""
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
        tensors["bad_steps"] = self.bad_steps
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """What `state` returned; ValueError names what does not fit."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

        for name, network in self.method.networks().items():
            try:
                network.load_state_dict(under(f"network/{name}/"))
            except RuntimeError as error:
                raise ValueError(f"the checkpoint's network {name} is not this one: {error}") from None
        for name, group in self.groups.items():
            group.load_state(under(f"adam/{name}/"))
        for name, average in self.averages.items():
            stored = under(f"average/{name}/")
            for key, tensor in average.average.items():
                tensor.copy_(stored[key])
        for name, module in self.method.extra_state_modules().items():
            module.load_state_dict(under(f"extra/{name}/"))
        if self.loss_scale is not None and "loss_scale/scale" in tensors:
            self.loss_scale.scale.copy_(tensors["loss_scale/scale"])
            self.loss_scale.good.copy_(tensors["loss_scale/good"])
        self.bad_steps.copy_(tensors["bad_steps"])
