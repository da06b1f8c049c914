"""What the tests of the layers share: maps in every layout, float64 formulas, error gates, one step of CUT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fastnce.kernels import blur, common, reflect_pad
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastnce.engine.options import OptimOptions
from fastnce.engine.step import Step
from fastnce.methods import CUT, Batch, CUTOptions, Draws, NetworkOptions
from fastnce.networks import set_implementation
from tests.oracle import count_launches

DEVICE = torch.device("cpu" if common.INTERPRET.value else torch.accelerator.current_accelerator() or "cpu")
GATE = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Relative norm of the error against float64 on the same rounded inputs."""


def error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.detach().double().cpu() - truth.detach().cpu()).norm() / truth.detach().cpu().norm()).item()


def arrange(x: Tensor, layout: str) -> Tensor:
    """The same values, otherwise in memory."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "inside":  # of a larger channels-last map, with an odd address
        wide = F.pad(x, (1, 2, 3, 0)).contiguous(memory_format=torch.channels_last)
        return wide[:, :, 3:, 1:-2]
    return x.contiguous()


def random_map(*shape: int, dtype=torch.float32, layout="channels_last", spread=3.0, centre=1.0) -> Tensor:
    return arrange((spread * torch.randn(*shape) + centre).to(dtype).to(DEVICE), layout)


def norm_truth(
    x: Tensor, slope: float, margin: int, residual: Tensor | None, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and gradient of x in float64 by the formula."""
    leaf = x.detach().double().cpu().requires_grad_()
    apart = leaf - leaf.mean(dim=(2, 3), keepdim=True)
    y = apart / torch.sqrt(apart.square().mean(dim=(2, 3), keepdim=True) + 1e-5)
    y = torch.where(y > 0, y, slope * y)
    y = F.pad(y, (margin,) * 4, mode="reflect") if margin else y
    y = y if residual is None else y + residual.double().cpu()
    return y.detach(), torch.autograd.grad(y, leaf, upstream.double().cpu())[0]


def filter_truth(name: str, x: Tensor) -> Tensor:
    """Pads and blurs written with plain indices."""
    if name == "reflect_pad":
        return F.pad(x, (3, 3, 3, 3), mode="reflect")
    if name == "blur_up":
        rows = torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)
        even, odd = 0.25 * rows[:, :, :-2] + 0.75 * x, 0.75 * x + 0.25 * rows[:, :, 2:]
        tall = torch.stack([even, odd], dim=3).flatten(2, 3)
        columns = torch.cat([tall[..., :1], tall, tall[..., -1:]], dim=3)
        left, right = 0.25 * columns[..., :-2] + 0.75 * tall, 0.75 * tall + 0.25 * columns[..., 2:]
        return torch.stack([left, right], dim=4).flatten(3, 4)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    rows = (padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:])[:, :, ::2] / 4
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:])[..., ::2] / 4


FILTERS = {
    "blur_down": (blur.blur_down, blur.blur_down_backward),
    "blur_up": (blur.blur_up, blur.blur_up_backward),
    "reflect_pad": (reflect_pad.reflect_pad, reflect_pad.reflect_pad_backward),
}


def launches(monkeypatch) -> list[str]:
    """A list that gets the names of the kernels that a test launches."""
    names: list[str] = []
    count_launches(monkeypatch, names)
    return names


def one_step(implementation, device=DEVICE) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses of a CUT step from fixed weights, pictures and patch ids, and its gradients (as Adam's first moments)."""
    torch.manual_seed(5)
    network = NetworkOptions(
        generator="resnet_4blocks", discriminator="n_layers", width=4, discriminator_width=4, discriminator_layers=1
    )
    method = CUT(CUTOptions(nce_layers=[0, 4, 8, 12], patches=12, projection=8), network)
    method.generator.model = torch.nn.Sequential(
        *(m for i, m in enumerate(method.generator.model) if i not in (13, 14))
    )
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = Batch(*(torch.rand(1, 3, 16, 16).to(device) * 2 - 1 for _ in range(2)))
    ids = [[torch.randperm(n)[:12].to(device) for n in (22 * 22, 256, 64, 16)] for _ in range(2)]
    method.to(device)
    set_implementation(method, implementation)
    method.head.implementation = implementation
    step = Step(method, OptimOptions())
    losses = step.run(batch, Draws(patch_ids=ids))
    moments = {
        f"{name}/{key}": value
        for name, group in step.groups.items()
        for key, value in group.state().items()
        if key.endswith("exp_avg") and value.dim() > 1
    }
    return losses, moments


class Operators(TorchDispatchMode):
    """Within: notes the names of the library's operators."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func).removeprefix("aten.").split(".")[0])
        return func(*args, **(kwargs or {}))


def check_a_deterministic_step(repeat: bool) -> None:
    """A step through the kernels has eager's numbers, uses none of the library's layers, and may be repeated."""
    theirs = one_step("eager")
    torch.use_deterministic_algorithms(True)
    try:
        with Operators() as operators:
            ours = one_step("triton")
        again = one_step("triton") if repeat else ours
    finally:
        torch.use_deterministic_algorithms(False)
    layers = ("group_norm", "batch_norm", "upsample", "interpolate", "_pad")
    assert not [name for name in operators.names if any(layer in name for layer in layers)]
    assert {"convolution", "convolution_backward"} <= operators.names
    assert len(ours[1]) > 15
    for tensors, expected, repeated in zip(ours, theirs, again, strict=True):
        assert tensors.keys() == expected.keys()
        for name, value in tensors.items():
            assert torch.equal(value, repeated[name]), name
            assert error(value, expected[name].double()) <= 5e-5, name
