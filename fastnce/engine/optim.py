"""Adam with a learning rate on the device, whose updates can skip themselves; the published schedule; averages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .snapshot import Snapshot


def schedule(epoch: int, n_epochs: int, n_epochs_decay: int) -> float:
    """Factor of the learning rate in an epoch counted from 0 (published `lambda_rule`)."""
    return 1.0 - max(0, epoch + 1 - n_epochs) / (n_epochs_decay + 1)


class ParameterGroup:
    """The parameters that one Adam updates, from gradients given rather than accumulated.

    A parameter whose gradient is None keeps its value, its moments and its count, and nothing is launched for it.

    Args:
        modules: whose parameters to update.
        lr: base learning rate, multiplied by the schedule.
        betas: Adam's.
    """

    def __init__(self, modules: tuple[nn.Module, ...], lr: float, betas: tuple[float, float]):
        # The same tensor may be reached twice (shared networks); the order is that of the modules.
        named = [(f"{i}.{name}", p) for i, module in enumerate(modules) for name, p in module.named_parameters()]
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        if not self.parameters:
            raise ValueError("a parameter group without parameters: projectors must be built before the optimiser")
        first = self.parameters[0]
        self.base_lr = lr
        # CUDA's fused Adam reads a float32 rate; the CPU's takes the parameters' own precision.
        dtype = first.dtype if first.device.type == "cpu" else torch.float32
        self.lr = torch.tensor(lr, dtype=dtype, device=first.device)
        on_cuda = first.device.type == "cuda"  # where the step may be recorded in a CUDA graph
        self.adam = torch.optim.Adam(self.parameters, lr=lr, betas=betas, fused=True, capturable=on_cuda)
        for group in self.adam.param_groups:
            group["lr"] = self.lr  # only now: Adam looks whether its rate is positive, and would wait for the device
        self.adam._warned_capturable_if_run_uncaptured = True  # and may not: no matter

    def set_factor(self, factor: float) -> None:
        self.lr.fill_(self.base_lr * factor)

    def changes(self) -> list[Tensor]:
        """What an update changes: weights, moments and counts."""
        if len(self.adam.state) < len(self.parameters):
            self.prepare()
        return self.parameters + [t for p in self.parameters for t in self.adam.state[p].values()]

    def update(self, gradients: tuple[Tensor | None, ...], bad: Tensor, scale: Tensor | None = None) -> None:
        """One Adam step, or none where `bad`, () bool, is true.

        Nothing is read back: Adam itself leaves weights, moments and its count alone when its `found_inf` is 1, and
        divides gradients by `scale`, the factor of the loss that they come from.
        """
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            # fused Adam walks memory, not strides: both must lie alike
            if gradient is not None and gradient.stride() != parameter.stride():
                gradient = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
            parameter.grad = gradient
        if not self.adam.state:
            self.prepare()  # of every parameter: what a checkpoint holds does not depend on which have a gradient
        self.adam.grad_scale, self.adam.found_inf = scale, bad.float()  # type: ignore[attr-defined]
        try:
            self.adam.step()
        finally:
            self.adam.grad_scale = self.adam.found_inf = None  # type: ignore[attr-defined]
            for parameter in self.parameters:
                parameter.grad = None

    def prepare(self) -> None:
        """Make the moments that Adam itself would make at its first step; `update_traced` changes them in place."""
        for parameter in self.parameters:
            if not self.adam.state[parameter]:
                self.adam.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }

    def update_traced(self, gradients: tuple[Tensor | None, ...], bad: Tensor, scale: Tensor | None = None) -> None:
        """`update` in plain operations on the same state, for a compiler to trace; `prepare` must have been called.

        All parameters of a group that have a gradient have taken the same number of steps: one count serves them all.
        """
        found = [(p, g) for p, g in zip(self.parameters, gradients, strict=True) if g is not None]
        weights: list[Tensor] = [p for p, _ in found]
        slopes = [g for _, g in found]
        state = [self.adam.state[p] for p in weights]
        steps, means, squares = ([s[key] for s in state] for key in ("step", "exp_avg", "exp_avg_sq"))
        settings = self.adam.param_groups[0]
        (beta1, beta2), eps = settings["betas"], settings["eps"]
        with torch.no_grad():
            keep = bad.logical_not().to(self.lr.dtype)
            if scale is not None:
                slopes = list(torch._foreach_mul(slopes, scale.reciprocal()))
            # what is not finite must not reach the moments, not even times 0
            slopes = [torch.where(bad, torch.zeros_like(g), g) for g in slopes]
            # one a step count: a lone tensor of one element would be read as a number, which waits for the device
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
        """Adam's moments and counts by parameter name."""
        tensors = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for key, value in self.adam.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """What `state` returned, bit for bit."""
        for name, parameter in zip(self.names, self.parameters, strict=True):
            entries = {key.rsplit("/", 1)[1]: t for key, t in tensors.items() if key.rsplit("/", 1)[0] == name}
            if entries:
                self.adam.state[parameter] = {
                    key: t.to(parameter.device, torch.float32).clone()
                    if key == "step"
                    else torch.empty_like(parameter, requires_grad=False).copy_(t)
                    for key, t in entries.items()
                }


class LossScale:
    """The factor that keeps float16 gradients out of the subnormal range (Micikevicius et al., ICLR 2018).

    Halved after a step that was not finite, doubled after `interval` good ones. It lives on the device.
    """

    def __init__(self, device: torch.device, start: float = 2.0**16, interval: int = 2000):
        self.scale = torch.full((), start, device=device)
        self.good = torch.zeros((), device=device)
        self.interval = interval

    def update(self, bad: Tensor) -> None:
        """`bad`, () bool: whether a gradient of the step was not finite."""
        self.good.add_(1.0).mul_(bad.logical_not())
        grown = self.good >= self.interval
        self.scale.mul_(torch.where(bad, 0.5, torch.where(grown, 2.0, 1.0)).to(self.scale))
        self.good.mul_(grown.logical_not())


class WeightAverage:
    """Exponential moving average of a network's parameters; buffers are copied."""

    def __init__(self, network: nn.Module, decay: float):
        if not 0.0 < decay < 1.0:
            raise ValueError(f"optim.ema must lie between 0 and 1, not {decay}")
        self.network = network
        self.decay = decay
        self.average = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def update(self, bad: Tensor) -> None:
        """After a step; where `bad`, () bool, is true, the average stays as it is."""
        before = Snapshot(list(self.average.values()))
        state = self.network.state_dict()
        smooth = [name for name, tensor in state.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.average[n] for n in smooth], [state[n] for n in smooth], 1.0 - self.decay)
        for name in state.keys() - set(smooth):
            self.average[name].copy_(state[name])
        before.restore(bad)
