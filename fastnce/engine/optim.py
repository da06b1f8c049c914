"""Adam and AdamW with a rate on the device and updates that can be skipped there; loss scale; averaged weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nce.temperature import LearnedTemperature
from .snapshot import Snapshot


class ParameterGroup:
    """The parameters that one Adam updates, from gradients that are passed instead of accumulated.

    A parameter whose gradient is None keeps its value, its moments and its step count, and costs no launch.

    Args:
        modules: the modules whose parameters are updated.
        lr: base learning rate, which the schedule multiplies.
        betas: Adam's.
        weight_decay: of all parameters but those of a `LearnedTemperature`, which would move towards T = 1. Without
            `decoupled`, `weight_decay` times the weight is added to its gradient, as `torch.optim.Adam` does.
        decoupled: AdamW (Loshchilov & Hutter 2019): a step also subtracts the learning rate times `weight_decay` times
            the weight, apart from the moments.
    """

    def __init__(
        self,
        modules: tuple[nn.Module, ...],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ):
        # a parameter that modules share is listed more than once
        named = [
            (f"{i}.{name}", p)
            for i, module in enumerate(modules)
            for name, p in module.named_parameters()
            if p.requires_grad  # others stay as they are
        ]
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        if not self.parameters:
            raise ValueError("a group has no parameters to train: all are frozen, or its projectors are not built yet")
        first = self.parameters[0]
        self.base_lr = lr
        # CUDA's fused Adam reads a float32 rate; the CPU's reads one in the precision of the parameters.
        dtype = first.dtype if first.device.type == "cpu" else torch.float32
        self.lr = torch.tensor(lr, dtype=dtype, device=first.device)
        on_cuda = first.device.type == "cuda"  # the step may be recorded in a CUDA graph
        self.weight_decay, self.decoupled = weight_decay, decoupled
        optimizer = torch.optim.AdamW if decoupled else torch.optim.Adam
        kept = _without_decay(modules) if weight_decay else set()  # a second group would be more launches
        self._decays = [weight_decay > 0 and id(p) not in kept for p in self.parameters]
        parts: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters if id(p) not in kept]},
            {"params": [p for p in self.parameters if id(p) in kept], "weight_decay": 0.0},
        ]
        self.adam: torch.optim.Adam = optimizer(
            [part for part in parts if part["params"]],
            lr=lr, betas=betas, weight_decay=weight_decay, fused=True, capturable=on_cuda,
        )  # fmt: skip
        for group in self.adam.param_groups:
            group["lr"] = self.lr  # set late: the constructor compares it with 0, which would wait
        self.adam._warned_capturable_if_run_uncaptured = True  # no warning: running uncaptured is intended

    def set_factor(self, factor: float) -> None:
        self.lr.fill_(self.base_lr * factor)

    def changes(self) -> list[Tensor]:
        """The tensors that an update changes: weights, moments and step counts."""
        if len(self.adam.state) < len(self.parameters):
            self.prepare()
        return self.parameters + [t for p in self.parameters for t in self.adam.state[p].values()]

    def update(self, gradients: tuple[Tensor | None, ...], bad: Tensor, scale: Tensor | None = None) -> None:
        """Take one Adam step, or none if `bad`, () bool, is true.

        Nothing is read back: fused Adam changes nothing if its `found_inf` is 1. It divides the gradients by `scale`,
        by which the loss was multiplied.
        """
        update_groups([(self, gradients)], bad.float(), scale)

    def prepare(self) -> None:
        """Make the moments that Adam would make at its first step. `update_traced` changes them in place."""
        for parameter in self.parameters:
            if not self.adam.state[parameter]:
                self.adam.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }

    def update_traced(self, gradients: tuple[Tensor | None, ...], bad: Tensor, scale: Tensor | None = None) -> None:
        """`update` in plain operations on the same state, for a compiler. Call `prepare` first.

        All parameters of a group that have a gradient have taken the same number of steps, so one count serves all.
        """
        found = [t for t in zip(self.parameters, gradients, self._decays, strict=True) if t[1] is not None]
        weights: list[Tensor] = [p for p, _, _ in found]
        slopes: list[Tensor] = [g for _, g, _ in found if g is not None]
        state = [self.adam.state[p] for p in weights]
        steps, means, squares = ([s[key] for s in state] for key in ("step", "exp_avg", "exp_avg_sq"))
        settings = self.adam.param_groups[0]
        (beta1, beta2), eps, decay = settings["betas"], settings["eps"], self.weight_decay
        decaying = [i for i, (_, _, decays) in enumerate(found) if decays]
        with torch.no_grad():
            keep = bad.logical_not().to(self.lr.dtype)
            if scale is not None:
                slopes = list(torch._foreach_mul(slopes, scale.reciprocal()))
            # values that are not finite must not reach the moments, not even times 0
            slopes = [torch.where(bad, torch.zeros_like(g), g) for g in slopes]
            if decaying:
                shrunk = [weights[i] for i in decaying]
                if self.decoupled:
                    torch._foreach_sub_(shrunk, torch._foreach_mul(shrunk, (self.lr * keep) * decay))
                else:
                    added = torch._foreach_add([slopes[i] for i in decaying], shrunk, alpha=decay)
                    for i, slope in zip(decaying, added, strict=True):
                        slopes[i] = slope
            # a list: a single tensor of one element would be read as a number, which waits for the device
            torch._foreach_add_(steps, [keep.float()] * len(steps))
            count = steps[0].clamp_min(1.0).double()
            towards = torch._foreach_sub(slopes, means)
            torch._foreach_mul_(towards, keep * (1.0 - beta1))
            torch._foreach_add_(means, towards)
            towards = torch._foreach_sub(torch._foreach_mul(slopes, slopes), squares)
            torch._foreach_mul_(towards, keep * (1.0 - beta2))
            torch._foreach_add_(squares, towards)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_mul_(roots, (1.0 - beta2**count).rsqrt().to(self.lr.dtype))
            torch._foreach_add_(roots, eps)
            changes = list(torch._foreach_div(means, roots))
            torch._foreach_mul_(changes, (self.lr / (1.0 - beta1**count) * -keep).to(self.lr.dtype))
            torch._foreach_add_(weights, changes)

    def state(self) -> dict[str, Tensor]:
        """Adam's moments and step counts by parameter name."""
        tensors = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for key, value in self.adam.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Copy what `state` returned into place, bit for bit."""
        for name, parameter in zip(self.names, self.parameters, strict=True):
            entries = {key.rsplit("/", 1)[1]: t for key, t in tensors.items() if key.rsplit("/", 1)[0] == name}
            if entries:
                self.adam.state[parameter] = {
                    key: t.to(parameter.device, torch.float32).clone()
                    if key == "step"
                    else torch.empty_like(parameter, requires_grad=False).copy_(t)
                    for key, t in entries.items()
                }


def update_groups(
    updates: Sequence[tuple[ParameterGroup, tuple[Tensor | None, ...]]], bad: Tensor, scale: Tensor | None = None
) -> None:
    """Take one Adam step of several groups, or none if `bad`, () float32, is 1: see `ParameterGroup.update`.

    These are the operations of `torch.optim.Adam` with `fused=True`, with one launch for the step counts of all groups.
    """
    counts: list[Tensor] = []
    calls: list[tuple[ParameterGroup, dict[str, Any], list[tuple[nn.Parameter, Tensor]]]] = []
    for group, gradients in updates:
        if not group.adam.state:
            group.prepare()  # for all parameters, so that checkpoints do not depend on which have a gradient
        by_id = dict(zip(map(id, group.parameters), gradients, strict=True))
        for settings in group.adam.param_groups:
            found = [(p, g) for p in settings["params"] if (g := by_id[id(p)]) is not None]
            if found:
                calls.append((group, settings, found))
                counts += [group.adam.state[p]["step"] for p, _ in found]
    if not calls:
        return
    with torch.no_grad():
        good = 1.0 - bad
        torch._foreach_add_(counts, [good] * len(counts))
        for group, settings, found in calls:
            state = [group.adam.state[p] for p, _ in found]
            update = torch._fused_adamw_ if group.decoupled else torch._fused_adam_
            # fused Adam ignores strides, so weights and gradients must have the same
            slopes = [
                g if g.stride() == p.stride() else torch.empty_like(p, requires_grad=False).copy_(g) for p, g in found
            ]
            update(
                [p for p, _ in found],
                slopes,
                [s["exp_avg"] for s in state],
                [s["exp_avg_sq"] for s in state],
                [],
                [s["step"] for s in state],
                lr=group.lr,
                beta1=settings["betas"][0],
                beta2=settings["betas"][1],
                weight_decay=settings["weight_decay"],
                eps=settings["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
                found_inf=bad,
            )


def _without_decay(modules: Sequence[nn.Module]) -> set[int]:
    """The ids of the parameters of learned temperatures."""
    learned = [m for module in modules for m in module.modules() if isinstance(m, LearnedTemperature)]
    return {id(p) for module in learned for p in module.parameters()}


class LossScale:
    """A factor, on the device, that keeps float16 gradients in the normal range (Micikevicius et al., ICLR 2018).

    It is halved after a bad step and doubled after `interval` good ones.
    """

    def __init__(self, device: torch.device, start: float = 2.0**16, interval: int = 2000):
        self.scale = torch.full((), start, device=device)
        self.good = torch.zeros((), device=device)
        self.interval = interval

    def update(self, bad: Tensor) -> None:
        """Adjust the factor after a step; `bad`, (), is 1 if a gradient was not finite, else 0."""
        bad = bad.bool()
        self.good.add_(1.0).mul_(bad.logical_not())
        grown = self.good >= self.interval
        self.scale.mul_(torch.where(bad, 0.5, torch.where(grown, 2.0, 1.0)).to(self.scale))
        self.good.mul_(grown.logical_not())


class WeightAverage:
    """Exponential moving average of a network's parameters and floating-point buffers. Other buffers are copied."""

    def __init__(self, network: nn.Module, decay: float):
        if not 0.0 < decay < 1.0:
            raise ValueError(f"optim.ema must lie between 0 and 1, not {decay}")
        self.network = network
        self.decay = decay
        self.average = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def update(self, bad: Tensor) -> None:
        """Update the average after a step, unless `bad`, (), is true or 1."""
        before = Snapshot(list(self.average.values()))
        state = self.network.state_dict()
        smooth = [name for name, tensor in state.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.average[n] for n in smooth], [state[n] for n in smooth], 1.0 - self.decay)
        for name in state.keys() - set(smooth):
            self.average[name].copy_(state[name])
        before.restore(bad)
