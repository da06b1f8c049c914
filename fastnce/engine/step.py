"""One training step: generate, then each phase's loss, gradients and update, in the paper's order."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.base import Batch, Draws, Losses, Method, Outputs, Phase
from ..networks import channels_last
from . import accumulate
from .bad_steps import Updates, early_groups
from .choices import PRECISIONS, pick_layout
from .compiled import Compiled, CompiledWhole
from .cudagraph import CudaRecorder, Graphs, Recorder, library_settings
from .distributed import Ranks
from .kept import Kept
from .optim import LossScale, ParameterGroup, WeightAverage
from .options import OptimOptions
from .recompute import recompute_blocks
from .weights import converted_weights


class Step:
    """The step of a method, with everything that it changes: networks, optimisers, averaged weights.

    A step in which a gradient is not finite changes nothing but `bad_steps` and the loss scale (see `bad_steps`).

    Args:
        method: the paper, already on its device.
        options: learning rate and so on.
        precision: "fp32"; or "bf16", "fp16": forward passes in 16 bits under autocast, weights, losses and updates in
            float32, with a loss scale for "fp16".
        compile: compile `generate` and each phase's loss (see `Compiled`), or, for "whole", the step as one graph.
        ranks: the processes that share the batch.
        graph: record the step in CUDA graphs (see `cudagraph`); or a recorder of one's own.
        recompute: compute the generators' residual blocks again in the backward pass, to save memory.
        layout: of pictures, maps and the convolutions' weights in memory; None takes what the device computes fastest.
        backend: of `torch.compile`.
    """

    def __init__(
        self,
        method: Method,
        options: OptimOptions,
        precision: str = "fp32",
        compile: bool | str = False,
        ranks: Ranks | None = None,
        *,
        graph: bool | Recorder = False,
        recompute: bool = False,
        layout: torch.memory_format | None = None,
        backend: str = "inductor",
    ):
        if precision not in PRECISIONS:
            raise ValueError(f"run.precision must be auto, {', '.join(PRECISIONS)}, not {precision!r}")
        device = next(method.parameters()).device
        self.layout = layout or pick_layout(device, PRECISIONS[precision])
        if self.layout is torch.channels_last:
            channels_last(method)
        if recompute:
            recompute_blocks(method)
        accumulate.check_parts(method, options.accumulate)
        self.method = method
        self.ranks = ranks or Ranks()
        if self.ranks.world > 1:
            method.share_keys(self.ranks.others)
        self.options = options
        betas = (options.beta1, options.beta2)
        self.groups = {
            name: ParameterGroup(group.modules, group.lr or options.lr, group.betas or betas)
            for name, group in method.groups().items()
        }
        self.phases = method.phases()
        self._early = [self.groups[name] for name in early_groups(self.phases)]
        self._with_state = [*method.networks().values(), *method.extra_state_modules().values()]
        self.generate: Callable[[Batch, Draws], Outputs] = method.generate
        self.device_type, self.dtype = device.type, PRECISIONS[precision]
        self.weights_at_once = True
        """Convert a network's weights to 16 bits in one call; False leaves each to autocast, with equal numbers."""
        self.loss_scale = LossScale(device) if precision == "fp16" else None
        self.bad_steps = torch.zeros((), device=device)
        """() float32: steps up to now, in a row, in which a gradient was not finite."""
        generators = method.generators()
        self._generators = list(generators.values())
        self._discriminators = list(method.discriminators().values())
        self.averages = (
            {name: WeightAverage(net, options.ema) for name, net in generators.items()} if options.ema else {}
        )
        self._made_by = {id(p) for net in self._generators for p in net.parameters()}
        self.whole = CompiledWhole.of(self, backend) if compile == "whole" else None
        if compile:
            self.generate = Compiled(method.generate, backend)
            self.phases = tuple(phase._replace(loss=Compiled(phase.loss, backend)) for phase in self.phases)
        recorder = CudaRecorder(device) if graph is True else graph
        self._buffers = [module._buffers for module in method.modules() if module._buffers]
        self.graphs = Graphs(self.compute, recorder, self._settings, self._places, self.layout) if recorder else None

    @property
    def compile_seconds(self) -> float:
        """What the first calls of compiled parts took; 0 where nothing is compiled."""
        parts: list[Any] = [self.whole, self.generate, *(phase.loss for phase in self.phases)]
        return sum(part.seconds for part in parts if isinstance(part, Compiled | CompiledWhole))

    def set_learning_rate(self, factor: float) -> None:
        for group in self.groups.values():
            group.set_factor(factor)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32)

    def _settings(self) -> Hashable:
        """What a recorded step takes for granted of how it is computed."""
        return self.method.training, library_settings()

    def _places(self) -> Hashable:
        """Where lies what a recorded step reads and writes: about 0.1 us a tensor, at every step.

        Of Adam's moments the first stands for all three of a parameter: they are replaced together.
        """
        tensors = [self.bad_steps]
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

    def run(self, batch: Batch, draws: Draws) -> Losses:
        """Update every network once, or nothing where a gradient is not finite; returns the losses, on the device,
        without waiting for them.

        The next step may write into the same tensors: whoever keeps losses over steps keeps copies.
        """
        return self.compute(batch, draws) if self.graphs is None else self.graphs.run(batch, draws)

    def compute(self, batch: Batch, draws: Draws) -> Losses:
        """`run`, launch by launch: what is recorded. Nothing in here waits for the device or asks it."""
        batch = Batch(*(pictures.contiguous(memory_format=self.layout) for pictures in batch))
        self.method.prepare(batch)
        kept = Kept(self._changed_early())
        if self.whole is not None and self.whole.usable:
            losses, bad = self.whole(batch, draws)
        elif self.options.accumulate > 1:
            losses, bad = self._in_parts(batch, draws)
        else:
            losses, bad = self._at_once(batch, draws)
        kept.put_back(bad)
        self.bad_steps.add_(1).mul_(bad)
        if self.loss_scale is not None:
            self.loss_scale.update(bad)
        for average in self.averages.values():
            average.update(bad)
        return losses

    def _changed_early(self) -> list[Tensor]:
        """What a step changes before its last gradient is known; pools may have been made since the last step."""
        buffers = {id(b): b for module in self._with_state for b in module.buffers() if b.numel()}
        return [*buffers.values(), *(t for group in self._early for t in group.changes())]

    def updates(self, update: Callable[..., None] = ParameterGroup.update) -> Updates:
        scale = None if self.loss_scale is None else self.loss_scale.scale
        return Updates(self.groups, scale, self.bad_steps, update)

    def _weights(self, networks: Sequence[nn.Module]) -> AbstractContextManager:
        """Within: these networks hold their weights in the dtype that autocast computes in."""
        if self.dtype == torch.float32 or not self.weights_at_once:
            return nullcontext()
        return converted_weights(networks, self.dtype)

    def _trains_generators(self, phase: Phase) -> bool:
        return any(id(p) in self._made_by for name in phase.groups for p in self.groups[name].parameters)

    def _generate(self, batch: Batch, draws: Draws) -> Outputs:
        with self._weights(self._generators), self.autocast():
            return self.generate(batch, draws)

    def _at_once(self, batch: Batch, draws: Draws) -> tuple[Losses, Tensor]:
        losses: Losses = {}
        updates = self.updates()
        outputs = self._generate(batch, draws)
        for phase in self.phases:
            updates.before(phase)
            gradients, logged = self._differentiate(phase, batch, outputs, draws)
            updates.add(phase, self._average(phase, gradients))
            losses |= {name: value.detach() for name, value in logged.items()}
        return losses, updates.apply()

    def _in_parts(self, batch: Batch, draws: Draws) -> tuple[Losses, Tensor]:
        """Each phase over all parts, one after another, then its update.

        A phase that does not train the generators takes the pictures without their graph. One that does makes them
        again with it; the phases before have not changed what makes them, and those after get what it made.
        """
        losses: Losses = {}
        updates = self.updates()
        parts = accumulate.split(batch, draws, self.options.accumulate)
        made: list[Outputs | None] = [None] * len(parts)
        for phase in self.phases:
            updates.before(phase)
            mean = accumulate.Mean(len(parts))
            trains = self._trains_generators(phase)
            for i, (part, drawn) in enumerate(parts):
                outputs = made[i]
                if trains or outputs is None:
                    with torch.set_grad_enabled(trains):
                        outputs = self._generate(part, drawn)
                mean.add(*self._differentiate(phase, part, outputs, drawn))
                if trains and phase is not self.phases[-1]:
                    made[i] = accumulate.detached(outputs)
            assert mean.gradients is not None
            updates.add(phase, self._average(phase, tuple(mean.gradients)))
            losses |= mean.losses
        return losses, updates.apply()

    def _differentiate(
        self, phase: Phase, batch: Batch, outputs: Outputs, draws: Draws
    ) -> tuple[tuple[Tensor | None, ...], Losses]:
        """Gradients of a phase's loss with respect to the parameters of its groups, and what it logs."""
        # a compiled loss would compute gradients of the networks that it merely passes through
        resting = [p for name, g in self.groups.items() if name not in phase.groups for p in g.parameters]
        used = self._discriminators
        if self._trains_generators(phase):
            used = self._generators + used
        for parameter in resting:
            parameter.requires_grad_(False)
        try:
            with self._weights(used):  # in the backward too, where blocks may be computed again
                with self.autocast():
                    loss, logged = phase.loss(batch, outputs, draws)
                if self.loss_scale is not None:
                    loss = loss * self.loss_scale.scale
                parameters = [p for name in phase.groups for p in self.groups[name].parameters]
                return torch.autograd.grad(loss, parameters, allow_unused=True), logged
        finally:
            for parameter in resting:
                parameter.requires_grad_(True)

    def _average(self, phase: Phase, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Over ranks, all of which then agree on whether the step is bad."""
        return self.ranks.average(gradients, [p for name in phase.groups for p in self.groups[name].parameters])

    def close(self) -> None:
        """Let go of recorded graphs: before the processes part, and before anything they hold is replaced."""
        if self.graphs is not None:
            self.graphs.reset()

    def generator_weights(self) -> dict[str, Tensor]:
        """The generators' weights as "G/model.1.weight": the averaged ones if the run keeps an average."""
        return {
            f"{name}/{key}": tensor
            for name, network in self.method.generators().items()
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
        """What `state` returned.

        Raises:
            ValueError: a tensor is missing, is of something else, or has another shape or dtype. Nothing is changed.
        """
        for group in self.groups.values():
            group.prepare()
        check_state(self.state(), tensors)
        self.close()  # pools of pictures may get another place

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
        self.bad_steps.copy_(tensors["bad_steps"])


def check_state(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """ValueError where tensors of a checkpoint are not those that a run has: nothing is left out, cast or broadcast.

    A loss scale may be there or not, as `run.precision` may change; pools of pictures have the size of their pictures.
    Earlier versions kept no moments of biases without a gradient: those of a bias may be missing, all or none.
    """
    with_moments = {key.rpartition("/")[0] for key in found if key.startswith("adam/")}

    def free(key: str) -> bool:
        parameter = key.rpartition("/")[0]
        bias = key.startswith("adam/") and parameter.endswith(".bias") and parameter not in with_moments
        return key.startswith("loss_scale/") or bias

    def kind(key: str, tensor: Tensor) -> str:
        return f"{tensor.dtype}" if key.startswith("extra/") else f"{tensor.dtype} {tuple(tensor.shape)}"

    problems = [f"{key} is missing" for key in wanted if key not in found and not free(key)]
    problems += [f"{key} belongs to nothing here" for key in found if key not in wanted and not free(key)]
    problems += [
        f"{key} is {kind(key, found[key])}, this run has {kind(key, tensor)}"
        for key, tensor in wanted.items()
        if key in found and kind(key, found[key]) != kind(key, tensor)
    ]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"training.safetensors does not fit: {'; '.join(problems[:4])}{more}")
