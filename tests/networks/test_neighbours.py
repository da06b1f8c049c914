"""Layers that one kernel computes together: blurs, pads and residuals behind norms, and biases before blurs."""

from __future__ import annotations

import pytest
import torch
from fastnce.kernels import common
from torch import Tensor, nn

from fastnce.engine.recompute import recompute_blocks
from fastnce.methods import CUT, CUTOptions, NetworkOptions
from fastnce.networks import (
    MUNITGenerator,
    PatchGAN,
    ResnetGenerator,
    TilePatchGAN,
    fuse_neighbours,
    set_implementation,
)
from fastnce.networks.layers import BlurDown, BlurUp, ReflectionPad
from fastnce.networks.resnet import ResnetBlock
from tests.maps import DEVICE, error, launches, random_map

FIRST = 12
"""The first residual block of a generator with blurs."""


@pytest.fixture(autouse=True)
def exact_products():
    """Disable TF32, in which cuDNN's convolutions round to 10 bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def resnet(**options) -> nn.Module:
    torch.manual_seed(3)
    return ResnetGenerator(width=4, **{"blocks": 3} | options).to(DEVICE)


def results(network: nn.Module, x: Tensor, **options) -> list[Tensor]:
    """Outputs, features, and all gradients that there are."""
    torch.manual_seed(7)
    found = network(x, **options)
    outputs = [found] if isinstance(found, Tensor) else found if isinstance(found, list) else [found[0], *found[1]]
    loss = torch.stack([(y * torch.randn(y.shape).to(y)).sum() / y.numel() ** 0.5 for y in outputs]).sum()
    gradients = torch.autograd.grad(loss, [x, *network.parameters()], allow_unused=True)
    return [*(y.detach() for y in outputs), *(g for g in gradients if g is not None)]


def agree(network: nn.Module, x: Tensor, gate: float = 2e-5, **options) -> None:
    """The kernels have the numbers of the eager network in float64, with neighbours and without."""
    set_implementation(network, "eager")
    network.double()
    truth = results(network, x.detach().double().requires_grad_(), **options)
    network.float()
    set_implementation(network, "triton")
    for fuse in (True, False):
        fuse_neighbours(network, fuse)
        found = results(network, x.detach().requires_grad_(), **options)
        assert len(found) == len(truth)
        for ours, exact in zip(found, truth, strict=True):
            assert ours.shape == exact.shape
            assert error(ours, exact) <= gate
    fuse_neighbours(network)


NETWORKS = {
    "resnet": (lambda: resnet(), (2, 16, 16), {}),
    "resnet, tapped": (lambda: resnet(), (1, 16, 20), {"layers": [0, 4, 8, 12, 13]}),
    "resnet, last block tapped": (lambda: resnet(), (1, 16, 16), {"layers": [6, 11, 14, 15]}),
    "resnet, dropout": (lambda: resnet(dropout=True, blocks=2).eval(), (1, 16, 16), {}),
    "resnet, transposed convolutions": (lambda: resnet(antialias_up=False), (1, 16, 16), {"layers": [12, 14]}),
    "resnet, strided": (lambda: resnet(antialias=False), (1, 16, 16), {"layers": [10, 12]}),
    "munit": (lambda: MUNITGenerator(width=2, blocks=2).to(DEVICE), (1, 16, 16), {"layers": [0, 2, 3]}),
    "patchgan": (lambda: PatchGAN(width=4).to(DEVICE), (2, 35, 38), {}),
    "patchgan, batch norm": (lambda: PatchGAN(width=4, layers=1, norm="batch").to(DEVICE), (2, 12, 12), {}),
    "patchgan, no norm": (lambda: PatchGAN(width=4, layers=2, norm="none").to(DEVICE), (1, 20, 20), {}),
    "tiles": (lambda: TilePatchGAN(width=2).to(DEVICE), (1, 16, 32), {}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_float64(name):
    build, (images, height, width), options = NETWORKS[name]
    torch.manual_seed(2)
    agree(build(), random_map(images, 3, height, width, spread=1.0, centre=0.0), **options)


def test_maps_that_are_not_channels_last():
    agree(resnet(blocks=2), random_map(1, 3, 16, 16, layout="contiguous", spread=1.0), layers=[4, 12])


@pytest.mark.parametrize("stop", range(9, 16))
def test_encoders(stop):
    """The last feature is the output of its module, and nothing after it is computed."""
    x = random_map(1, 3, 16, 16, spread=1.0)
    agree(resnet(blocks=2), x, layers=[8, stop], encode_only=True)


def test_launches_of_a_generator(monkeypatch):
    """Beside convolutions: two pads and a norm each; the pad of the first block follows a blur, as the image's does."""
    names, network = launches(monkeypatch), resnet()
    set_implementation(network, "triton")
    x = random_map(1, 3, 16, 16, spread=1.0).requires_grad_()
    norms = 3 + 2 * 3 + 2
    features = network(x, [8, 12, 13])
    forward = [name for name in names if "few" not in name and "weight" not in name]
    ups = ["moments_kernel", "normalise_kernel"]
    assert forward == [
        "reflect_pad_kernel", *["whole_norm_kernel"] * 3, "reflect_pad_kernel", *["whole_norm_kernel"] * 5,
        *ups, *ups, "whole_norm_kernel",
    ]  # fmt: skip
    assert forward.count("whole_norm_kernel") + 2 == norms
    del names[:]
    torch.autograd.grad(features[0].sum() + features[1][1].sum() + features[1][2].sum(), x)
    assert sum("gradient_kernel" in name and "whole" in name for name in names) == norms - 2
    assert names.count("reflect_pad_backward_kernel") == 2
    assert "blur_kernel" not in names
    fuse_neighbours(network, False)
    del names[:]
    network(x, [8, 12, 13])
    assert names.count("blur_kernel") == 4
    assert names.count("reflect_pad_kernel") == 4


def test_launches_of_a_discriminator(monkeypatch):
    """The first layer's bias, activation and blur are one kernel, and its gradient one more for the bias."""
    names, network = launches(monkeypatch), PatchGAN(width=4, layers=2).to(DEVICE)
    set_implementation(network, "triton")
    x = random_map(1, 3, 16, 16).requires_grad_()
    y = network(x)
    assert names == ["activate_kernel", "whole_norm_kernel", "whole_norm_kernel"]
    del names[:]
    torch.autograd.grad(y.sum(), [x, *network.parameters()], allow_unused=True)
    assert names == ["whole_gradient_kernel", "whole_gradient_kernel", "activate_gradient_kernel", "bias_kernel"]
    fuse_neighbours(network, False)
    del names[:]
    network(x)
    assert names == ["blur_kernel", "whole_norm_kernel", "blur_kernel", "whole_norm_kernel"]


def test_features_are_views_of_what_the_next_block_reads():
    network = resnet()
    set_implementation(network, "triton")
    x = random_map(1, 3, 16, 16, spread=1.0)
    _, features = network(x, [12, 13, 14])
    assert [f.is_contiguous(memory_format=torch.channels_last) for f in features] == [False, False, True]
    assert all(f.shape == (1, 16, 4, 4) and f.stride(1) == 1 for f in features)
    assert features[0].stride(2) == 16 * (4 + 2)


def saved_bytes(network: nn.Module, x: Tensor) -> int:
    """The memory of the maps that a forward pass keeps, each storage once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.dim() == 4:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = network(x)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("build", [resnet, lambda: PatchGAN(width=4).to(DEVICE)], ids=["resnet", "patchgan"])
def test_no_more_memory_is_kept(build):
    network, x = build(), random_map(1, 3, 32, 32)
    set_implementation(network, "triton")
    together = saved_bytes(network, x)
    fuse_neighbours(network, False)
    assert together <= saved_bytes(network, x)


# Modules that are not ours alone


class Louder(ResnetBlock):
    def forward(self, x):
        return 2 * super().forward(x)


def note(module, *arguments):
    """A hook that changes nothing."""


def louder(network):
    network.model[FIRST + 1].__class__ = Louder


def replaced(network):
    block = network.model[FIRST + 1]
    forward = block.forward
    block.forward = lambda x: 3 * forward(x)


def another_norm(network):
    network.model[FIRST + 1].conv_block[-1] = nn.InstanceNorm2d(16)


CHANGES = {
    "a subclass": louder,
    "its own forward": replaced,
    "another norm": another_norm,
    "a hook of the block": lambda network: network.model[FIRST + 1].register_forward_hook(note),
    "a hook before the block": lambda network: network.model[FIRST + 1].register_forward_pre_hook(note),
    "a backward hook": lambda network: network.model[FIRST + 1].register_full_backward_hook(note),
    "a hook of its pad": lambda network: network.model[FIRST + 1].conv_block[0].register_forward_hook(note),
    "a hook of its norm": lambda network: network.model[FIRST + 1].conv_block[-1].register_forward_hook(note),
    "a hook of all layers": lambda network: network.model[FIRST + 1].conv_block.register_forward_hook(note),
    "a hook of the blur": lambda network: network.model[FIRST + 3].register_forward_pre_hook(note),
    "an eager blur": lambda network: set_implementation(network.model[FIRST + 3], "eager"),
    "eager blocks": lambda network: set_implementation(network.model[FIRST + 1], "eager"),
    "compiled by itself": lambda network: network.model[FIRST + 1].compile(backend="eager"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_modules_are_called(name):
    """A block or blur that someone has changed gets its own input and computes its own output."""
    network = resnet()
    x = random_map(1, 3, 16, 16, spread=1.0)
    set_implementation(network, "triton")
    CHANGES[name](network)
    called: list[tuple[int, ...]] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: called.append(tuple(inputs[0].shape)))
        for module in network.model
    ]
    with torch.no_grad():
        exact = network(x)  # every module is called
    assert len(called) == len(network.model)
    for handle in handles:
        handle.remove()
    assert error(network(x), exact.double()) <= 2e-5


def test_hooks_of_blocks_see_their_maps():
    network, seen = resnet(), []
    set_implementation(network, "triton")
    network.model[FIRST + 1].register_forward_hook(lambda module, inputs, y: seen.append((inputs[0], y)))
    x = random_map(1, 3, 16, 16, spread=1.0)
    features = network(x, [FIRST, FIRST + 1])[1]
    assert torch.equal(seen[0][0], features[0])
    assert torch.equal(seen[0][1], features[1])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_hooks_in_a_discriminator(place, monkeypatch):
    network, seen = PatchGAN(width=4, layers=1).to(DEVICE), []
    set_implementation(network, "triton")
    x = random_map(1, 3, 12, 12)
    expected = network(x)
    network.model[place].register_forward_hook(lambda module, inputs, y: seen.append(y))
    names = launches(monkeypatch)
    assert error(network(x), expected.double()) <= 1e-5
    assert len(seen) == 1
    assert "activate_kernel" not in names


def test_recomputed_blocks():
    """A block that is computed again in the backward pass stays apart, with the same numbers."""
    options = NetworkOptions(generator="resnet_4blocks", discriminator="n_layers", width=2, discriminator_width=2)
    torch.manual_seed(0)
    method = CUT(CUTOptions(nce_layers=[0, 12, 14], patches=4, projection=4), options).to(DEVICE)
    network, x = method.generator, random_map(1, 3, 16, 16, spread=1.0).requires_grad_()
    set_implementation(network, "triton")
    plain = results(network, x, layers=[0, 12, 14])
    assert recompute_blocks(method) == 4
    for ours, theirs in zip(results(network, x, layers=[0, 12, 14]), plain, strict=True):
        assert error(ours, theirs.double()) <= 1e-5


def test_runs_repeat_to_the_bit():
    network, x = resnet(), random_map(2, 3, 16, 16, spread=1.0).requires_grad_()
    set_implementation(network, "triton")
    for one, other in zip(*(results(network, x, layers=[4, 12, 13]) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("build", [resnet, lambda: PatchGAN(width=4).to(DEVICE)], ids=["resnet", "patchgan"])
def test_autocast(build):
    """In bfloat16 the numbers are as close to float32 as with each layer on its own, and the dtypes are the same."""
    network, x = build(), random_map(1, 3, 32, 32, spread=1.0)
    set_implementation(network, "triton")
    exact = network(x).detach().double()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        together = network(x)
        fuse_neighbours(network, False)
        apart = network(x)
    assert together.dtype == apart.dtype
    assert error(together, exact) <= 1.2 * error(apart, exact)


def test_without_kernels_nothing_changes(monkeypatch):
    """On a CPU plain PyTorch computes each layer, as before."""
    monkeypatch.setattr(common.INTERPRET, "value", False)
    network = resnet().cpu()
    x = torch.randn(1, 3, 16, 16)
    expected = x
    for module in network.model:
        expected = module(expected)
    assert error(network(x), expected.double()) <= 1e-5


class NearestUp(BlurUp):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


class EveryOther(BlurDown):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::2, ::2]


class ZeroPad(ReflectionPad):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (self.margin,) * 4)


class Capped(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0.0, 0.5)


@pytest.mark.parametrize("kind", [NearestUp, EveryOther, ZeroPad, Capped])
def test_subclasses_with_a_forward_of_their_own_are_called(kind):
    for place in range(2):
        network = resnet()
        owners = [network.model, *(m.conv_block for m in network.model if type(m) is ResnetBlock)]
        found = [m for owner in owners for m in owner if type(m) is kind.__mro__[1]]
        found[place].__class__ = kind
        agree(network, random_map(1, 3, 16, 16, spread=1.0))


def test_a_hook_of_every_module_sees_blocks():
    network, seen = resnet(), []
    set_implementation(network, "triton")
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, y: seen.append(type(module)))
    try:
        network(random_map(1, 3, 16, 16))
    finally:
        handle.remove()
    assert seen.count(ResnetBlock) == 3
