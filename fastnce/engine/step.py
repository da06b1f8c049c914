"""One training step: generate, then each phase's loss, gradients and update, in the paper's order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..common import first_use
from ..common.beside import CudaStreams, Streams, join, streaming
from ..methods.base import Batch, Draws, Losses, Method, Outputs, Phase
from ..methods.contract import check_loss
from ..networks import channels_last
from ..networks.spectral import once_per_step
from . import accumulate
from .bad_steps import Gradients, Updates, early_groups, run_phases
from .choices import PRECISIONS, pick_layout
from .compiled import Compiled, CompiledWhole, whole_obstacle
from .cudagraph import CudaRecorder, Graphs, Recorder, library_settings
from .distributed import Ranks
from .live_check import Disagreement, LiveCheck
from .optim import LossScale, WeightAverage
from .options import OptimOptions
from .recompute import recompute_blocks
from .rehearsal import rehearse
from .schedule import Plateau
from .snapshot import Snapshot
from .trained import make_groups, trained_by
from .training_state import TrainingState
from .weights import SharedCopies, converted_weights


class Step:
    """The training step of a method, with the state that it changes: networks, optimisers, averaged weights.

    A step in which a gradient is not finite changes only `bad_steps` and the loss scale (see the module `bad_steps`).

    Args:
        method: on its device.
        options: learning rate and other settings of the updates.
        precision: "fp32", "bf16" or "fp16". The last two run forward passes in 16 bits under autocast; weights, losses
            and updates stay in float32. "fp16" uses a loss scale.
        compile: True compiles `generate` and each phase's loss (see `Compiled`); "whole" compiles the step as one
            graph.
        ranks: the processes that share the batch.
        graph: record the step in CUDA graphs (see the module `cudagraph`); or a recorder to use.
        recompute: recompute the generators' residual blocks in the backward pass, to save memory.
        layout: memory format of images, maps and convolution weights; None takes the fastest one for the device.
        backend: of `torch.compile`.
        streams: compute independent work at the same time on a CUDA device (see `fastnce.common.beside`); or streams to
            use. Compiled parts do not.
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
        streams: bool | Streams = False,
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
        self._own_method = not type(method).__module__.startswith("fastnce.")
        self.ranks = ranks or Ranks()
        if self.ranks.world > 1:
            method.share_keys(self.ranks.others)
            method.share_draws(self.ranks.rank, self.ranks.world)
        self.options = options
        self.groups = make_groups(method, options)
        self.plateau = Plateau(options.lr, device) if options.schedule == "plateau" else None
        self.phases = self._uncompiled = method.phases()
        self._early = [self.groups[name] for name in early_groups(self.phases)]
        self._with_state = [*method.networks().values(), *method.extra_state_modules().values()]
        self.generate: Callable[[Batch, Draws], Outputs] = method.generate
        self.device_type, self.dtype = device.type, PRECISIONS[precision]
        self.weights_at_once = True
        """Convert a network's weights to 16 bits in one call. False leaves it to autocast, with the same results."""
        self.loss_scale = LossScale(device) if precision == "fp16" else None
        self.bad_steps = torch.zeros((), device=device)
        """() float32: the number of consecutive steps, up to now, in which a gradient was not finite."""
        self._one = torch.ones((), device=device)
        self._finishes = type(method).finish is not Method.finish
        generators = method.generators()
        self._generators = list(generators.values())
        self._discriminators = list(method.discriminators().values())
        self._copies = SharedCopies(self._generators, self.dtype)
        self._projectors = list(method.projectors().values())
        self._spectral = once_per_step(self._discriminators)
        self.averages = (
            {name: WeightAverage(net, options.ema) for name, net in generators.items()} if options.ema else {}
        )
        self._trained = trained_by(self.phases, self.groups, self._generators, follow=self.plateau is not None)
        self._objectives = [trained.objective for trained in self._trained.values() if trained.objective]
        schedule = None if self.plateau is None else self.plateau.tensors
        self._tensors = TrainingState(method, self.groups, self.averages, self.loss_scale, self.bad_steps, schedule)
        self.whole = self._compile_whole(backend) if compile == "whole" else None
        if compile:
            self.generate = Compiled(method.generate, backend)
            self.phases = tuple(phase._replace(loss=Compiled(phase.loss, backend)) for phase in self.phases)
        self.streams = CudaStreams(device) if streams is True else streams or None
        recorder = CudaRecorder(device) if graph is True else graph
        self._kernels_known = not first_use.may_check(device)
        self._compiles = bool(compile)
        self.graphs = Graphs(self.compute, recorder, self._settings, self._places, self.layout) if recorder else None

    def _compile_whole(self, backend: str) -> CompiledWhole | None:
        """The step compiled as one graph; None, and one warning, if it cannot be."""
        if reason := whole_obstacle(self.ranks.world, self.options.accumulate):
            warnings.warn(f"the step is compiled in parts, not whole: {reason}", stacklevel=3)
            return None
        for group in self.groups.values():
            group.prepare()
        return CompiledWhole(self._traced, self._at_once, backend)

    @property
    def compile_seconds(self) -> float:
        """Duration of the first calls of the compiled parts; 0 if nothing is compiled."""
        parts: list[Any] = [self.whole, self.generate, *(phase.loss for phase in self.phases)]
        return sum(part.seconds for part in parts if isinstance(part, Compiled | CompiledWhole))

    def set_learning_rate(self, factor: float) -> None:
        """Multiply each group's base learning rate by the schedule's factor."""
        for group in self.groups.values():
            group.set_factor(factor)

    def autocast(self) -> torch.autocast:
        """Within: forward passes in the precision of the step."""
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32)

    def _settings(self) -> Hashable:
        """The settings that a recorded step depends on."""
        return self.method.training, library_settings()

    def _places(self) -> Hashable:
        """The addresses that a recorded step reads and writes."""
        return self.bad_steps.data_ptr(), self._tensors.places()

    def run(self, batch: Batch, draws: Draws) -> Losses:
        """Update every network once, or nothing if a gradient is not finite; does not wait for the device.

        Returns:
            the losses, on the device. The next step may overwrite these tensors: copy them to keep them.
        """
        if self._compiles and not self._kernels_known:
            self.check_kernels(batch, draws)
        return self.compute(batch, draws) if self.graphs is None else self.graphs.run(batch, draws)

    def check_kernels(self, batch: Batch, draws: Draws) -> None:
        """Check the kernels of the step at their first use, which compiled code cannot do; changes nothing else."""
        if not self._kernels_known:
            self._kernels_known = True
            rehearse(self, batch, draws)

    def compare(self, batch: Batch, draws: Draws) -> Disagreement | None:
        """Compare the kernels of the next step with plain PyTorch on its data; changes nothing (see `live_check`)."""
        self.check_kernels(batch, draws)
        with LiveCheck() as live:
            rehearse(self, batch, draws)
        return live.found

    def compute(self, batch: Batch, draws: Draws) -> Losses:
        """`run` without graphs. It may be recorded, so nothing in it reads from the device or waits for it."""
        batch = Batch(*(pictures.contiguous(memory_format=self.layout) for pictures in batch))
        self.method.prepare(batch)
        before = Snapshot(self._changed_early())
        self._spectral.run()
        if self.whole is not None and self.whole.usable:
            losses, bad = self.whole(batch, draws)
        else:
            compute = self._in_parts if self.options.accumulate > 1 else self._at_once
            with self._copies, streaming(self.streams):
                losses, bad = compute(batch, draws)
        before.restore(bad)
        if self._finishes:
            self.method.finish(bad.bool())
        torch.addcmul(bad, self.bad_steps, bad, out=self.bad_steps)  # (bad_steps + 1) * bad
        if self.loss_scale is not None:
            self.loss_scale.update(bad)
        for average in self.averages.values():
            average.update(bad)
        if self.plateau is not None:
            self.plateau.add([losses[name] for name in self._objectives], bad)
            losses = {name: loss for name, loss in losses.items() if name not in self._objectives}
        return losses

    def _changed_early(self) -> list[Tensor]:
        """The tensors that a step changes before its last gradient is known. Pools may be new since the last step."""
        buffers = {id(b): b for module in self._with_state for b in module.buffers() if b.numel()}
        return [*buffers.values(), *(t for group in self._early for t in group.changes())]

    def updates(self, traced: bool = False) -> Updates:
        """The updates of one step; `traced`: in operations that a compiler can trace."""
        scale = None if self.loss_scale is None else self.loss_scale.scale
        return Updates(self.groups, scale, self._one, traced)

    def weights(self, networks: Sequence[nn.Module], projectors: Sequence[nn.Module] = ()) -> AbstractContextManager:
        """Within: the weights of these networks are in the dtype of autocast, and those of projectors beside them."""
        if not self._converts:
            return nullcontext()
        return converted_weights(networks, self.dtype, () if self._compiles else projectors)

    @property
    def _converts(self) -> bool:
        return self.weights_at_once and self.dtype != torch.float32

    def _generate(self, batch: Batch, draws: Draws) -> Outputs:
        with self._copies.used(anew=True) if self._converts else nullcontext(), self.autocast():
            return self.generate(batch, draws)

    def _at_once(self, batch: Batch, draws: Draws) -> tuple[Losses, Tensor]:
        """Update every network; returns the losses, and 1 if a gradient was not finite, else 0, () float32."""
        updates = self.updates()
        outputs = self._generate(batch, draws)

        def differentiate(phase: Phase) -> tuple[Gradients, Losses]:
            return self._average(phase, *self._differentiate(phase, batch, outputs, draws))

        return run_phases(self.phases, updates, differentiate)

    def _traced(self, batch: Batch, draws: Draws) -> tuple[Losses, Tensor]:
        """`_at_once` in operations that a compiler can trace as one graph. It changes the same tensors."""
        updates = self.updates(traced=True)
        with self.autocast():
            outputs = self.method.generate(batch, draws)
        return run_phases(self._uncompiled, updates, lambda phase: self._gradients(phase, batch, outputs, draws))

    def _in_parts(self, batch: Batch, draws: Draws) -> tuple[Losses, Tensor]:
        """As `_at_once`, with each phase computed over all parts of the batch, one after another.

        A phase that does not train the generators uses the generated images without their autograd graph. A phase that
        does generates them again with it; earlier phases have not changed the generators. Later phases use its images.
        """
        updates = self.updates()
        parts = accumulate.split(batch, draws, self.options.accumulate)
        made: list[Outputs | None] = [None] * len(parts)

        def differentiate(phase: Phase) -> tuple[Gradients, Losses]:
            mean = accumulate.Mean(len(parts))
            trains = self._trained[phase.groups].generators
            for i, (part, drawn) in enumerate(parts):
                outputs = made[i]
                if trains or outputs is None:
                    with torch.set_grad_enabled(trains):
                        outputs = self._generate(part, drawn)
                mean.add(*self._differentiate(phase, part, outputs, drawn))
                if trains and phase is not self.phases[-1]:
                    made[i] = accumulate.detached(outputs)
            assert mean.gradients is not None
            return self._average(phase, tuple(mean.gradients), mean.losses)

        return run_phases(self.phases, updates, differentiate)

    def _gradients(self, phase: Phase, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Gradients, Losses]:
        """The gradients of a phase's loss with respect to the parameters of its groups, and its logged losses."""
        with self.autocast():
            result = phase.loss(batch, outputs, draws)
        loss, logged = check_loss(result, phase) if self._own_method else result
        if objective := self._trained[phase.groups].objective:
            logged = {**logged, objective: loss.detach()}
        # the gradient of scale * loss with respect to loss
        seed = self._one if self.loss_scale is None else self.loss_scale.scale
        if loss.dtype != seed.dtype or loss.shape:
            loss = loss.to(seed.dtype).sum()
        gradients = torch.autograd.grad(loss, self._trained[phase.groups].own, seed, allow_unused=True)
        join()
        return gradients, logged

    def _differentiate(self, phase: Phase, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Gradients, Losses]:
        """`_gradients`, with weights converted at once, and with the other groups' parameters frozen."""
        trained = self._trained[phase.groups]
        for parameter in trained.others:  # a compiled loss would compute their gradients too
            parameter.requires_grad_(False)
        try:
            made = self._copies.used() if trained.generators and self._converts else nullcontext()
            projectors = self._projectors if trained.generators else ()
            with made, self.weights(self._discriminators, projectors):  # also for the backward
                return self._gradients(phase, batch, outputs, draws)
        finally:
            for parameter in trained.others:
                parameter.requires_grad_(True)

    def _average(self, phase: Phase, gradients: Gradients, logged: Losses) -> tuple[Gradients, Losses]:
        """The mean of the gradients over ranks, which then agree on whether the step is bad, and the losses to log.

        The loss that the learning rate follows is averaged with them: each rank follows the same one.
        """
        trained = self._trained[phase.groups]
        if not trained.objective:
            return self.ranks.average(gradients, trained.own), logged
        loss = logged[trained.objective]
        *averaged, mean = self.ranks.average((*gradients, loss), (*trained.own, loss))
        assert mean is not None
        return tuple(averaged), {**logged, trained.objective: mean}

    def close(self) -> None:
        """Free recorded graphs. Call it before the processes disconnect and before state tensors are replaced."""
        if self.graphs is not None:
            self.graphs.reset()

    def generator_weights(self) -> dict[str, Tensor]:
        """The generators' weights as "G/model.1.weight": the averaged ones if the run keeps an average."""
        return self._tensors.generator_weights()

    def averaged(self) -> AbstractContextManager[None]:
        """Within: the generators compute with their averaged weights if the run keeps an average."""
        return self._tensors.averaged()

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, by a flat name."""
        return self._tensors.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: a tensor is missing or unknown, or has another shape or dtype. Nothing is changed.
        """
        self._tensors.check(tensors)
        self.close()  # pools of images may be replaced
        self._tensors.load(tensors)
