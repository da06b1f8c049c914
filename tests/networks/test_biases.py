"""Biases before an instance norm have no effect: networks omit them, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastnce.networks import (
    InstanceNorm,
    PatchGAN,
    PixelGAN,
    ResnetGenerator,
    Restorer,
    UnetGenerator,
    leave_out_biases,
    set_implementation,
)
from fastnce.networks.runs import run_all
from tests.maps import DEVICE
from tests.oracle import error

aten = torch.ops.aten


def resnet_biases(*positions: int, blocks: int = 1, first: int = 12) -> set[str]:
    """Names of the biases at `positions` in `model`, and of both biases of every residual block."""
    inner = {f"model.{first + i}.conv_block.{j}.bias" for i in range(blocks) for j in (1, 5)}
    return {f"model.{position}.bias" for position in positions} | inner


UNET_LEFT_OUT = {
    f"model.model.1.model.{'3.model.' * depth}{position}.bias"
    for depth, position in [*((d, p) for d in range(3) for p in (1, 5)), (3, 3)]
}
"""Down and up of three levels, and up from the innermost level, which has no norm in the down path."""

NETWORKS = {
    "resnet": (lambda: ResnetGenerator(width=4, blocks=1), 16, {}, resnet_biases(1, 4, 8, 14, 18)),
    "resnet, tapped": (
        lambda: ResnetGenerator(width=4, blocks=1), 16, {"layers": [0, 4, 8, 12]}, resnet_biases(1, 14, 18),
    ),
    "resnet, norms tapped": (
        lambda: ResnetGenerator(width=4, blocks=1), 16, {"layers": [2, 6, 9]}, resnet_biases(1, 4, 8, 14, 18),
    ),
    "resnet, strided": (
        lambda: ResnetGenerator(width=4, blocks=1, antialias=False), 16, {"layers": [0, 4, 10]},
        resnet_biases(1, 7, 11, 14, first=10),
    ),
    "resnet, batch norm": (lambda: ResnetGenerator(width=4, blocks=1, norm="batch"), 16, {}, set()),
    "resnet, no norm": (lambda: ResnetGenerator(width=4, blocks=1, norm="none"), 16, {}, set()),
    "resnet, affine norm": (
        lambda: ResnetGenerator(width=4, blocks=1, norm_affine=True), 16, {"layers": [0, 4, 9]},
        resnet_biases(1, 8, 14, 18),
    ),
    "unet": (lambda: UnetGenerator(downs=5, width=2), 64, {}, UNET_LEFT_OUT),
    "unet, tapped": (
        lambda: UnetGenerator(downs=5, width=2), 64, {"layers": [0, 1, 3]},
        UNET_LEFT_OUT - {"model.model.1.model.3.model.1.bias"},
    ),
    "patchgan": (lambda: PatchGAN(width=4, layers=2), 16, {}, {"model.3.bias", "model.7.bias"}),
    "patchgan, strided": (
        lambda: PatchGAN(width=4, layers=2, antialias=False), 16, {}, {"model.2.bias", "model.5.bias"},
    ),
    "patchgan, batch norm": (lambda: PatchGAN(width=4, layers=2, norm="batch"), 16, {}, set()),
    "pixelgan": (lambda: PixelGAN(width=4), 6, {}, {"net.2.bias"}),
    "restorer": (lambda: Restorer(width=4, middle=1), 16, {"layers": [0, 4, 8]}, set()),
}  # fmt: skip


def with_large_biases(network: nn.Module) -> nn.Module:
    for name, parameter in network.named_parameters():
        if name.endswith("bias") or not parameter.any():  # the restorer's gates start at 0
            nn.init.normal_(parameter)
    return network


def outputs_and_gradients(network, x: Tensor, **options) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Return (outputs, features and the input's gradient) and the parameters' gradients by name."""
    torch.manual_seed(7)
    result = network(x, **options)
    outputs = [result] if isinstance(result, Tensor) else [result[0], *result[1]]
    loss = torch.stack([(y * torch.randn(y.shape).to(y)).sum() / y.numel() ** 0.5 for y in outputs]).sum()
    names, parameters = zip(*network.named_parameters(), strict=True)
    slope, *slopes = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)
    return [*outputs, slope], dict(zip(names, slopes, strict=True))


class Convolutions(TorchDispatchMode):
    """Count convolutions that add a bias, and backward passes that compute a bias's gradient."""

    def __init__(self):
        super().__init__()
        self.convolutions = self.added = self.reduced = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is aten.convolution.default:
            self.convolutions += 1
            self.added += args[2] is not None
        if function is aten.convolution_backward.default:
            self.reduced += args[-1][2]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_else_changes(name):
    """Outputs, features and all other gradients agree up to rounding. All other biases have gradients."""
    make, side, options, left_out = NETWORKS[name]
    network = with_large_biases(make().double())
    x = torch.randn(2, 3, side, side, dtype=torch.float64).requires_grad_()
    leave_out_biases(network, False)
    with Convolutions() as before:
        expected, theirs = outputs_and_gradients(network, x, **options)
    leave_out_biases(network)
    with Convolutions() as count:
        found, ours = outputs_and_gradients(network, x, **options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    assert {key for key, slope in ours.items() if slope is None} == left_out
    for key, slope in ours.items():
        if slope is None:
            assert float(theirs[key].abs().max()) <= 1e-12  # rounding noise
        else:
            assert float(slope.abs().max()) > 1e-6
            torch.testing.assert_close(slope, theirs[key], rtol=1e-8, atol=1e-9)
    assert count.convolutions == before.convolutions
    assert before.added - count.added == before.reduced - count.reduced == len(left_out)


@pytest.mark.parametrize("name", ["resnet, tapped", "resnet, strided", "unet, tapped", "patchgan", "pixelgan"])
def test_with_kernels_too(name):
    make, side, options, left_out = NETWORKS[name]
    network = with_large_biases(make()).to(DEVICE)
    x = torch.randn(1, 3, side, side, device=DEVICE).requires_grad_()
    results = []
    for implementation, leave_out in (("triton", True), ("eager", False)):
        set_implementation(network, implementation)
        leave_out_biases(network, leave_out)
        results.append(outputs_and_gradients(network, x, **options))
    (found, ours), (expected, theirs) = results
    assert {key for key, slope in ours.items() if slope is None} == left_out
    kept = [key for key, slope in ours.items() if slope is not None]
    pairs = [*zip(found, expected, strict=True), *((ours[key], theirs[key]) for key in kept)]
    assert all(error(one, other) <= 2e-5 for one, other in pairs)


class Louder(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def note(module, *arguments):
    """A hook that changes nothing."""


def replace_forward(conv, norm):
    conv.forward = lambda x: x


class Undo:
    """Has the interface of a hook's handle."""

    def __init__(self, remove):
        self.remove = remove


def own_forward_of_the_norm(conv, norm):
    norm.forward = lambda x, *args: 2 * x
    return Undo(lambda: norm.__dict__.pop("forward"))


def compiled_by_itself(conv, norm):
    conv.compile(backend="eager")
    return Undo(lambda: setattr(conv, "_compiled_call_impl", None))


class OtherNorm(InstanceNorm):
    """A subclass, which may compute anything."""


def another_norm(conv, norm):
    norm.__class__ = OtherNorm
    return Undo(lambda: setattr(norm, "__class__", InstanceNorm))


HOOKS = {
    "forward hook": lambda conv, norm: conv.register_forward_hook(note),
    "forward pre-hook": lambda conv, norm: conv.register_forward_pre_hook(note),
    "backward hook": lambda conv, norm: conv.register_full_backward_hook(note),
    "backward pre-hook": lambda conv, norm: conv.register_full_backward_pre_hook(note),
    "pre-hook of the norm": lambda conv, norm: norm.register_forward_pre_hook(note),
    "hook of the norm": lambda conv, norm: norm.register_forward_hook(note),
    "its own forward": replace_forward,
    "compiled by itself": compiled_by_itself,
    "the norm's own forward": own_forward_of_the_norm,
    "another norm": another_norm,
}


@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_a_convolution_see_its_bias(hook, implementation):
    network = nn.Sequential(nn.Conv2d(2, 2, 1), InstanceNorm(2), nn.ReLU()).to(DEVICE)
    set_implementation(network, implementation)
    x = torch.randn(1, 2, 4, 4, device=DEVICE)
    with Convolutions() as before:
        run_all(network, x)
    assert (before.convolutions, before.added) == (1, 0)
    handle = HOOKS[hook](network[0], network[1])
    with Convolutions() as during:
        run_all(network, x)
    assert during.added == during.convolutions == (0 if handle is None else 1)
    if handle is not None:
        handle.remove()
        with Convolutions() as after:
            run_all(network, x)
        assert after.added == 0


def test_a_hook_of_the_norm_gets_the_input_with_bias():
    network = nn.Sequential(nn.Conv2d(2, 2, 1), InstanceNorm(2)).to(DEVICE)
    x, seen = torch.randn(1, 2, 4, 4, device=DEVICE), []
    network[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    run_all(network, x)
    assert torch.equal(seen[0], network[0](x))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2, affine=True), nn.ReLU()])
def test_biases_before_other_layers_are_kept(norm):
    network = nn.Sequential(nn.Conv2d(2, 2, 1), norm)
    with Convolutions() as count:
        torch.testing.assert_close(run_all(network, torch.ones(1, 2, 3, 4)), network(torch.ones(1, 2, 3, 4)))
    assert count.added == 2


def test_a_subclass_of_a_convolution_is_called_unchanged():
    network = nn.Sequential(Louder(2, 2, 1), InstanceNorm(2))
    x = 1e-2 * torch.randn(1, 2, 4, 4)  # small, so that the norm's eps makes the factor visible
    assert torch.equal(run_all(network, x), network(x))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, padding="same", dilation=2),
        nn.ConvTranspose2d(4, 6, 3, stride=3, padding=2, output_padding=1, groups=2, dilation=2),
    ],
)
def test_other_arguments_of_a_convolution(conv):
    network = nn.Sequential(conv, InstanceNorm(6)).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(run_all(network, x), network(x), rtol=1e-10, atol=1e-10)
