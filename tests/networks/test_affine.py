"""Instance norm with a learned weight and bias: PyTorch's own layer, in every network, by kernels, in files."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastnce.common.initialise import init_weights
from fastnce.methods import NetworkOptions
from fastnce.networks import (
    AffineInstanceNorm,
    InstanceNorm,
    PatchGAN,
    PixelGAN,
    ResnetGenerator,
    TilePatchGAN,
    UnetGenerator,
    build_discriminator,
    build_generator,
    set_implementation,
)
from fastnce.networks.published import load_weights, network_from_weights, read_weights, save_published
from fastnce.networks.resnet import ResnetBlock
from tests.maps import DEVICE, GATE, error, launches, random_map


def drawn(network: nn.Module) -> nn.Module:
    """Draw weights that differ from those at the start, which would hide a norm that ignores them."""
    init_weights(network, "normal", 0.3)
    for module in network.modules():
        if isinstance(module, AffineInstanceNorm | nn.InstanceNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return network


def strided_generator(width: int, blocks: int) -> nn.Sequential:
    """The ResNet generator of PyTorch's own modules. A block's sum is `Block`'s."""

    def norm(channels: int) -> nn.Module:
        return nn.InstanceNorm2d(channels, affine=True)

    layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), norm(width), nn.ReLU()]
    for c in (width, 2 * width):
        layers += [nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), norm(2 * c), nn.ReLU()]
    layers += [Block(4 * width) for _ in range(blocks)]
    for c in (4 * width, 2 * width):
        layers += [nn.ConvTranspose2d(c, c // 2, 3, 2, padding=1, output_padding=1), norm(c // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        half: Callable[[], list[nn.Module]] = lambda: [  # noqa: E731
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels, affine=True)
        ]  # fmt: skip
        self.block = nn.Sequential(*half(), nn.ReLU(), *half())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def strided_judge(width: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for c, stride in ((width, 2), (2 * width, 1)):
        layers += [nn.Conv2d(c, 2 * c, 4, stride, 1), nn.InstanceNorm2d(2 * c, affine=True), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 4, 1, 1))


def outcome(network: nn.Module, x: Tensor, **options) -> list[Tensor]:
    """Output, features, and the gradients of the image and of every parameter that matters, by name."""
    x = x.clone().requires_grad_()
    result = network(x, **options)
    outputs = [result] if isinstance(result, Tensor) else [result[0], *result[1]]
    torch.manual_seed(7)
    loss = torch.stack([(y * torch.randn(y.shape).to(y)).sum() / y.numel() ** 0.5 for y in outputs]).sum()
    named = dict(sorted(network.named_parameters()))
    slopes = torch.autograd.grad(loss, [x, *named.values()], allow_unused=True)
    return [*outputs, *(slope for slope in slopes if slope is not None and slope.abs().max() > 1e-12)]


def assert_equal(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-10) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["resnet", "patchgan"])
def test_networks_equal_those_of_pytorchs_own_modules(kind):
    """Read from the other network's weights, whose blocks may be named `block`."""
    theirs = drawn(strided_generator(3, 2) if kind == "resnet" else strided_judge(3)).double()
    state = {f"model.{key}": tensor for key, tensor in theirs.state_dict().items()}
    ours = network_from_weights(state).double()
    load_weights(ours, state)
    assert type(ours) is (ResnetGenerator if kind == "resnet" else PatchGAN)
    x = torch.rand(2, 3, 20, 24, dtype=torch.float64) * 2 - 1
    assert_equal(outcome(ours, x), outcome(theirs, x))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, dict]] = {
    "resnet": (lambda: ResnetGenerator(width=4, blocks=1, norm_affine=True), 16, {"layers": [0, 2, 5, 6, 8, 12, 14]}),
    "resnet, dropout off": (
        lambda: ResnetGenerator(width=3, blocks=1, norm_affine=True, antialias_up=False).eval(), 16, {"layers": [1, 4]}
    ),
    "unet": (lambda: UnetGenerator(downs=5, width=2, norm_affine=True), 64, {"layers": [1, 3]}),
    "patchgan": (lambda: PatchGAN(width=4, layers=2, norm_affine=True), 16, {}),
    "patch": (lambda: TilePatchGAN(width=2, norm_affine=True), 32, {}),
    "pixel": (lambda: PixelGAN(width=4, norm_affine=True), 6, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_each_norm_is_pytorchs_own(name):
    """Outputs, features and gradients stay the same when `nn.InstanceNorm2d(affine=True)` takes the norms' places."""
    build, side, options = NETWORKS[name]
    network = drawn(build()).double()
    other = copy.deepcopy(network)
    for module in list(other.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, InstanceNorm):
                assert type(child) is AffineInstanceNorm
                own = nn.InstanceNorm2d(child.channels, affine=True).double()
                own.load_state_dict(child.state_dict())
                setattr(module, key, own)
    x = torch.rand(2, 3, side, side, dtype=torch.float64) * 2 - 1
    assert_equal(outcome(network, x, **options), outcome(other, x, **options))


@pytest.mark.parametrize("name", ["resnet", "unet", "patchgan", "pixel"])
def test_kernels_compute_the_same(name):
    build, side, options = NETWORKS[name]
    network = drawn(build()).to(DEVICE)
    x = random_map(2, 3, side, side, spread=1.0, centre=0.0)
    results = []
    for implementation in ("eager", "triton"):
        set_implementation(network, implementation)
        results.append(outcome(network, x, **options))
    assert len(results[0]) == len(results[1])
    for theirs, ours in zip(*results, strict=True):
        assert error(ours, theirs.double()) <= 2e-5


class Operators(TorchDispatchMode):
    """The operators of a block besides its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        if name in ("reflection_pad2d", "native_group_norm", "addcmul", "_to_copy", "relu_", "add"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_of_a_block(dtype, monkeypatch):
    """Eight and, in 16 bits, ten besides the convolutions, as docs/methods.md says: kernels replace pads and norms."""
    names, block = launches(monkeypatch), ResnetBlock(4, norm_affine=True).to(DEVICE)
    for convolution in (block.conv_block[1], block.conv_block[5]):
        convolution.to(dtype)
    x = random_map(1, 4, 16, 16, dtype=dtype, layout="contiguous")
    set_implementation(block, "triton")
    block(x)
    assert names == ["reflect_pad_kernel", "whole_norm_kernel"] * 2
    set_implementation(block, "eager")
    with Operators() as found:
        block(x)
    norm = ["reflection_pad2d", "native_group_norm", "addcmul", *["_to_copy"] * (dtype == torch.bfloat16)]
    assert found.names == [*norm, "relu_", *norm, "add"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", GATE)
def test_the_layer_in_every_precision(dtype, layout):
    """Weights of float32 behind maps of 16 bits: the map keeps its dtype and layout, the gradients are float32."""
    layer = drawn(AffineInstanceNorm(5)).to(DEVICE)
    x = random_map(2, 5, 9, 8, dtype=dtype, layout=layout).requires_grad_()
    upstream = random_map(2, 5, 9, 8, dtype=dtype, layout=layout)
    exact = nn.InstanceNorm2d(5, affine=True).double()
    exact.load_state_dict(layer.state_dict())
    leaf = x.detach().double().cpu().requires_grad_()
    wanted = exact(leaf)
    truth = [wanted, *torch.autograd.grad(wanted, [leaf, *exact.parameters()], upstream.double().cpu())]
    for implementation in ("eager", "triton"):
        layer.implementation = implementation
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer(x)
        assert (y.dtype, y.stride()) == (dtype, x.stride())
        d_x, *slopes = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
        assert [slope.dtype for slope in slopes] == [torch.float32] * 2
        for found, expected in zip([y, d_x, *slopes], truth, strict=True):
            assert error(found, expected) <= 2 * GATE[dtype]  # the normalised map is rounded too


def test_arguments_mean_what_they_mean_without_weights():
    """With weight 1 and bias 0, the layer is `InstanceNorm` with the same activation, residual, pad and blur."""
    ours, plain = AffineInstanceNorm(4), InstanceNorm(4)
    x, residual = torch.randn(2, 2, 4, 6, 8)
    for options in ({"slope": 0.2, "margin": 2}, {"residual": residual, "blur": 1}, {"slope": 0.0, "blur": 2}):
        assert torch.equal(ours(x, **options), plain(x, **options))
    for one, other in zip(ours.with_inner(x, 0.0, 1, residual), plain.with_inner(x, 0.0, 1, residual), strict=True):
        assert torch.equal(one, other)


def test_second_derivatives():
    layer = drawn(AffineInstanceNorm(2)).double()
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, [x])


def test_a_network_compiles():
    network = drawn(PixelGAN(width=2, norm_affine=True))
    x = torch.rand(1, 3, 6, 6)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init_type", ["normal", "xavier", "kaiming", "orthogonal"])
def test_the_initialisation_leaves_them_at_one_and_zero(init_type):
    """The published function draws weights of batch norm only."""
    network = build_generator("resnet_4blocks", width=2, norm_affine=True, init_type=init_type)
    norms = [module for module in network.modules() if isinstance(module, AffineInstanceNorm)]
    assert len(norms) == 13
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in norms)
    assert not any(norm.bias.any() for norm in norms)


@torch.no_grad()
def test_files_show_that_norms_have_weights(tmp_path):
    generators = {"resnet_4blocks": 16, "unet_128": 128}
    networks = {name: build_generator(name, width=2, norm_affine=True) for name in generators}
    networks |= {name: build_discriminator(name, width=2, norm_affine=True) for name in ("basic", "pixel")}
    networks["n_layers"] = build_discriminator("n_layers", 3, 2, layers=1, norm_affine=True, spectral_norm=True)
    paths = save_published({name: drawn(network) for name, network in networks.items()}, tmp_path)
    for path, (name, network) in zip(paths, networks.items(), strict=True):
        x = torch.rand(2, 3, *[generators.get(name, 48)] * 2)
        found = network_from_weights(read_weights(path), str(path))
        torch.testing.assert_close(found(x), network.eval()(x), rtol=1e-5, atol=1e-6)
        if name != "n_layers":
            assert torch.equal(found(x), network(x))
            assert found.state_dict().keys() == network.state_dict().keys()


def test_old_statistics_beside_weights_are_dropped():
    """Some versions of PyTorch wrote running statistics of instance norms, which no network uses."""
    state = {f"model.{key}": tensor for key, tensor in drawn(strided_judge(2)).state_dict().items()}
    found = network_from_weights(state)
    load_weights(found, {**state, "model.3.running_mean": torch.ones(4), "model.3.num_batches_tracked": torch.ones(1)})


def test_files_of_the_other_kind_are_refused_with_the_option():
    plain, affine = (ResnetGenerator(width=2, blocks=1, norm_affine=affine) for affine in (False, True))
    with pytest.raises(ValueError, match=r"not in this network.* have a weight .*network\.norm_affine=true fits"):
        load_weights(plain, affine.state_dict())
    with pytest.raises(ValueError, match=r"is missing.* have no weight .*network\.norm_affine=false fits"):
        load_weights(affine, plain.state_dict())
    with pytest.raises(ValueError, match=r"does not fit(?!.*norm_affine)"):
        load_weights(affine, ResnetGenerator(width=3, blocks=1, norm_affine=True).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, "is for instance norm, not for norm=batch"),
        ({"norm": "none"}, "is for instance norm, not for norm=none"),
        ({"generator": "unet_128", "norm": "batch"}, "is for instance norm, not for norm=batch"),
        ({"generator": "stylegan2"}, "does not fit network.generator=stylegan2, which has no instance norm with"),
        ({"generator": "smallstylegan2"}, "does not fit network.generator=smallstylegan2"),
        ({"generator": "restorer"}, "does not fit network.generator=restorer"),
        ({"generator": "resnet_cat"}, "does not fit network.generator=resnet_cat"),
    ],
)
def test_where_it_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        NetworkOptions(width=2, norm_affine=True, **options).build_generator()


def test_discriminators_without_instance_norm_stay_as_they_are():
    def norms(**options) -> int:
        network = NetworkOptions(norm_affine=True, discriminator_width=2, **options).build_discriminator(3)
        return sum(isinstance(module, AffineInstanceNorm) for module in network.modules())

    assert norms() == 3
    assert norms(discriminator="pixel") == 1
    assert norms(discriminator="patch") == 2
    assert norms(discriminator_norm="batch") == norms(discriminator_norm="none") == 0
    assert norms(discriminator="stylegan2") == 0
    with pytest.raises(ValueError, match=r"does not fit network\.discriminator=stylegan2"):
        build_discriminator("stylegan2", norm_affine=True)
