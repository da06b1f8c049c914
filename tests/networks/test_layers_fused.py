"""The layers' kernels in networks and as PyTorch operators, compared with the eager layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastnce.kernels import common
from torch import Tensor

from fastnce.methods.losses import gradient_penalty, r1_penalty
from fastnce.networks import (
    BlurDown,
    BlurUp,
    InstanceNorm,
    PatchGAN,
    PixelGAN,
    ResnetGenerator,
    UnetGenerator,
    fused,
    set_implementation,
)
from fastnce.networks.layers import FusedLayer, ReflectionPad
from fastnce.networks.resnet import ResnetBlock
from fastnce.networks.runs import run_all, run_from
from tests.maps import DEVICE, check_a_deterministic_step, error, filter_truth, launches, random_map


@pytest.fixture(autouse=True)
def exact_products():
    """Disable TF32, in which cuDNN's convolutions round to 10 bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def test_launches_of_a_block(monkeypatch):
    """Pad; norm, ReLU and pad; norm and sum: three launches apart from the convolutions, and three backward."""
    names, block = launches(monkeypatch), ResnetBlock(4).to(DEVICE)
    set_implementation(block, "triton")
    x = random_map(1, 4, 64, 64).requires_grad_()
    y = block(x)
    assert names == ["reflect_pad_kernel", "whole_norm_kernel", "whole_norm_kernel"]
    del names[:]
    torch.autograd.grad(y.sum(), x)
    assert names == ["whole_gradient_kernel", "whole_gradient_kernel", "reflect_pad_backward_kernel"]


# In networks


def outputs_and_gradients(network, x, **options) -> list[Tensor]:
    torch.manual_seed(7)
    result = network(x, **options)
    outputs = [result] if isinstance(result, Tensor) else [result[0], *result[1]]
    loss = torch.stack([(y * torch.randn(y.shape).to(y)).sum() / y.numel() ** 0.5 for y in outputs]).sum()
    gradients = torch.autograd.grad(loss, [x, *network.parameters()], allow_unused=True)
    return [*outputs, *(g for g in gradients if g is not None)]


NETWORKS = {
    "resnet": (lambda: ResnetGenerator(width=4, blocks=1), 16, {"layers": [0, 2, 5, 6, 8, 12, 14]}),
    "resnet, dropout, no antialias": (
        lambda: ResnetGenerator(width=4, blocks=1, dropout=True, antialias=False), 16, {}
    ),
    "resnet, batch norm": (lambda: ResnetGenerator(width=4, blocks=1, norm="batch"), 16, {}),
    "patchgan": (lambda: PatchGAN(width=4, layers=2), 16, {}),
    "pixelgan": (lambda: PixelGAN(width=4), 6, {}),
    "unet": (lambda: UnetGenerator(downs=5, width=2), 64, {"layers": [1, 3]}),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_with_kernels_equal_eager_ones(name):
    build, side, options = NETWORKS[name]
    network = build().to(DEVICE)
    x = random_map(2, 3, side, side, spread=1.0, centre=0.0).requires_grad_()
    results = []
    for implementation in ("eager", "triton"):
        set_implementation(network, implementation)
        results.append(outputs_and_gradients(network, x, **options))
    for theirs, ours in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert error(ours, theirs.double()) <= 2e-5


@pytest.mark.parametrize("stop", [2, 5, 6, 12])
def test_encoders_with_kernels_equal_eager_ones(stop):
    """The feature of a norm is taken after its ReLU, unless the norm is the last layer."""
    network = ResnetGenerator(width=4, blocks=1).to(DEVICE)
    x = random_map(1, 3, 16, 16)
    results = []
    for implementation in ("eager", "triton"):
        set_implementation(network, implementation)
        results.append(network(x, [1, stop] if stop < 3 else [2, stop], encode_only=True))
    assert len(results[0]) == len(results[1]) == 2
    for theirs, ours in zip(*results, strict=True):
        assert error(ours, theirs.double()) <= 5e-6


def test_runs_of_modules(monkeypatch):
    """Which modules are fused with a norm. A module with hooks is not fused."""
    names = launches(monkeypatch)
    modules = [InstanceNorm(4), torch.nn.LeakyReLU(0.2), ReflectionPad(1), torch.nn.Identity(), InstanceNorm(4)]
    network = torch.nn.Sequential(*modules)
    set_implementation(network, "triton")
    x = random_map(1, 4, 6, 6)
    separate = network(x)
    del names[:]
    assert run_from(modules, 0, x) == (3, 0.2, 1, 0)
    assert run_from(modules, 0, x, kept=[1]) == (2, 0.2, 0, 0)
    assert run_from(modules, 0, x, kept=[0]) == (1, 1.0, 0, 0)
    assert run_from(modules, 3, x) is None
    assert run_from(modules, 4, x) == (1, 1.0, 0, 0)
    assert error(run_all(modules, x), separate.double()) <= 5e-6
    assert names.count("whole_norm_kernel") == 2
    assert "reflect_pad_kernel" not in names
    seen: list[Tensor] = []
    for hooked, expected in ((modules[1], separate), (modules[2], separate), (modules[0], separate)):
        del names[:]
        handle = hooked.register_forward_hook(lambda module, inputs, output: seen.append(output))
        assert error(run_all(modules, x), expected.double()) <= 5e-6
        handle.remove()
        assert "reflect_pad_kernel" in names
    assert [tuple(s.shape[2:]) for s in seen] == [(6, 6), (8, 8), (6, 6)]
    before: list[Tensor] = []
    handle = modules[0].register_forward_pre_hook(lambda module, inputs: before.append(inputs[0]))
    run_all(modules, x)
    handle.remove()
    assert torch.equal(before[0], x)
    modules[2].implementation = "eager"
    assert run_from(modules, 0, x) == (2, 0.2, 0, 0)
    assert error(run_all(modules, x), separate.double()) <= 5e-6


def test_the_eager_layers_equal_the_kernels():
    """Every layer has both implementations, and `InstanceNorm`'s extra arguments mean the same in both."""
    layers: list[tuple[FusedLayer, dict]] = [
        (InstanceNorm(4), {"slope": 0.2, "margin": 2}),
        (InstanceNorm(4), {"residual": random_map(2, 4, 6, 5)}),
        (ReflectionPad(2), {}),
        (BlurDown(4).to(DEVICE), {}),
        (BlurUp(4).to(DEVICE), {}),
    ]
    x = random_map(2, 4, 6, 5).requires_grad_()
    for layer, options in layers:
        results = []
        for layer.implementation in ("eager", "triton"):
            y = layer(x, **options)
            results.append((y, *torch.autograd.grad(y.square().sum(), x)))
        for theirs, ours in zip(*results, strict=True):
            assert error(ours, theirs.double()) <= 5e-6


# As PyTorch operators


def test_opcheck():
    operators = torch.ops.fastnce
    for layout in ("channels_last", "contiguous"):
        x = random_map(2, 3, 6, 5, layout=layout)
        y, statistics = operators.instance_norm(x, None, 1e-5, 0.0, 1, 0)
        small = operators.blur_down(x, 3, 3)
        for operator, arguments in (
            (operators.instance_norm, (x, None, 1e-5, 0.0, 1, 0)),
            (operators.instance_norm, (x, x.flip(0), 1e-5, 1.0, 0, 2)),
            (operators.instance_norm_backward, (y, None, x, statistics, 0.0, 1, 0, False)),
            (operators.instance_norm_backward, (small, x, x, statistics, 0.0, 0, 1, True)),
            (operators.activate, (x, x[0, :, 0, 0], 0.2, 1)),
            (operators.activate_backward, (small, x, x[0, :, 0, 0], 0.2, 1)),
            (operators.reflect_pad, (x, 10, 9)),
            (operators.reflect_pad_backward, (x, 2, 1)),
            (operators.blur_down, (x, 3, 3)),
            (operators.blur_down_backward, (x, 11, 10)),
            (operators.blur_up, (x, 12, 10)),
            (operators.blur_up_backward, (random_map(2, 3, 6, 8, layout=layout), 3, 4)),
        ):
            torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(operators.instance_norm.default, (x, None, 1e-5, 0.0, 0, 1))
    torch.library.opcheck(operators.blur_down.default, (x, 3, 3))


def test_compiles_without_a_break():
    network = ResnetGenerator(width=2, blocks=1).to(DEVICE)
    set_implementation(network, "triton")
    x = random_map(1, 3, 8, 12, spread=1.0).requires_grad_()
    compiled = torch.compile(lambda x: network(x, [0, 6, 12]), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        outputs_and_gradients_of(compiled, network, x),
        outputs_and_gradients_of(lambda x: network(x, [0, 6, 12]), network, x),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def outputs_and_gradients_of(function, network, x):
    y, features = function(x)
    loss = y.square().mean() + sum(f.square().mean() for f in features)
    return [y, *features, *torch.autograd.grad(loss, [x, *(p for p in network.parameters() if p.dim() == 4)])]


@pytest.mark.parametrize("penalty", ["r1", "wgangp"])
def test_gradients_of_gradients(penalty):
    """R1 and WGAN-GP differentiate the discriminator twice."""
    network = PatchGAN(width=4, layers=1).to(DEVICE)
    real, fake = (random_map(2, 3, 12, 12, spread=1.0) for _ in range(2))
    results = []
    for implementation in ("eager", "triton"):
        set_implementation(network, implementation)
        if penalty == "r1":
            leaf = real.detach().requires_grad_()
            loss = 1e3 * r1_penalty(network(leaf), leaf)
        else:
            loss = gradient_penalty(network, real, fake, torch.tensor([0.2, 0.7], device=DEVICE))
        weights = [p for p in network.parameters() if p.dim() == 4]
        results.append((loss, *torch.autograd.grad(loss, weights)))
    for theirs, ours in zip(*results, strict=True):
        assert error(ours, theirs.double()) <= 2e-5


def test_second_derivatives_of_every_layer():
    x = random_map(1, 2, 5, 4)
    layers = (
        lambda t: fused.instance_norm(t, slope=0.2, margin=1),
        lambda t: fused.reflection_pad(t, 2),
        fused.blur_down,
        fused.blur_up,
    )
    truths = (
        lambda t: F.pad(F.leaky_relu(fused.instance_norm_formula(t, 1e-5, 1.0, 0), 0.2), (1,) * 4, mode="reflect"),
        lambda t: F.pad(t, (2,) * 4, mode="reflect"),
        lambda t: filter_truth("blur_down", t),
        lambda t: filter_truth("blur_up", t),
    )
    for layer, truth in zip(layers, truths, strict=True):
        second = []
        for function, leaf in ((layer, x.clone()), (truth, x.double().cpu())):
            leaf.requires_grad_()
            (slope,) = torch.autograd.grad(function(leaf).pow(3).sum(), leaf, create_graph=True)
            second.append(torch.autograd.grad(slope.square().sum(), leaf)[0])
        assert error(*second) <= 1e-5


def test_functional_gradient():
    x = random_map(1, 2, 5, 4)
    ours = torch.func.grad(lambda t: fused.instance_norm(fused.blur_up(t), slope=0.0).pow(3).sum())(x)
    leaf = x.double().cpu().requires_grad_()
    truth = fused.instance_norm_formula(filter_truth("blur_up", leaf), 1e-5, 0.0, 0).pow(3).sum()
    assert error(ours, torch.autograd.grad(truth, leaf)[0]) <= 1e-5


def test_autocast_leaves_the_dtype():
    x = random_map(1, 4, 6, 6, dtype=torch.bfloat16).requires_grad_()
    network = torch.nn.Sequential(InstanceNorm(4), ReflectionPad(1), BlurDown(4), BlurUp(4)).to(DEVICE)
    set_implementation(network, "triton")
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = network(x)
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.bfloat16


def test_the_choice_of_the_implementation(monkeypatch):
    network = torch.nn.Sequential(InstanceNorm(2), torch.nn.ReLU())
    set_implementation(network, "triton")
    assert network[0].implementation == "triton"
    with pytest.raises(ValueError, match="float64"):
        network(torch.ones(1, 2, 3, 3, dtype=torch.float64, device=DEVICE))
    assert network(torch.ones(1, 2, 3, 3, device="meta")).shape == (1, 2, 3, 3)
    with pytest.raises(ValueError, match="implementation must be"):
        set_implementation(network, "fast")
    network[0].implementation = "fast"
    with pytest.raises(ValueError, match="implementation must be"):
        network(torch.ones(1, 2, 3, 3))
    set_implementation(network, "triton")
    monkeypatch.setattr(common.INTERPRET, "value", False)
    with pytest.raises(ValueError, match="on the CPU"):
        network(torch.ones(1, 2, 3, 3))
    names = launches(monkeypatch)
    set_implementation(network, None)
    network(torch.ones(1, 2, 3, 3))
    assert not names


def test_invalid_arguments():
    x = random_map(1, 2, 3, 3)
    with pytest.raises(ValueError, match="too small for a reflection of 3 pixels"):
        fused.reflection_pad(x, 3)
    with pytest.raises(ValueError, match="too small for a reflection of 1"):
        fused.blur_down(x[:, :, :1])
    with pytest.raises(ValueError, match="a pad or a blur, not both: margin 1, blur 2"):
        fused.instance_norm(x, margin=1, blur=2)
    with pytest.raises(ValueError, match="shape and dtype"):
        fused.instance_norm(x, residual=x.bfloat16())


def test_a_deterministic_step_equals_the_eager_one():
    """With deterministic algorithms, which only the kernels provide."""
    if DEVICE.type != "cpu":
        pytest.skip("on a device: test_layers_gpu.py, in a process with deterministic matrix products")
    check_a_deterministic_step(repeat=False)
