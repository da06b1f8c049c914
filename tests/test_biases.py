"""Biases that an instance norm takes away: left out without changing anything else, and where they stay."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastnce.engine.accumulate import Mean
from fastnce.engine.optim import OptimOptions, ParameterGroup
from fastnce.engine.step import Step
from fastnce.methods import PRESETS, Draws
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
from fastnce.networks.layers import run_all
from tests.maps import DEVICE
from tests.oracle import error
from tests.test_engine import random_batch, small_method
from tests.test_methods_more import build, pictures

aten = torch.ops.aten


def resnet_biases(*positions: int, blocks: int = 1, first: int = 12) -> set[str]:
    """Those at `positions` in `model`, and both of every residual block."""
    inner = {f"model.{first + i}.conv_block.{j}.bias" for i in range(blocks) for j in (1, 5)}
    return {f"model.{position}.bias" for position in positions} | inner


UNET_LEFT_OUT = {
    f"model.model.1.model.{'3.model.' * depth}{position}.bias"
    for depth, position in [*((d, p) for d in range(3) for p in (1, 5)), (3, 3)]
}
"""Down and up of three levels, and up from the innermost, which has no norm on the way down."""

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
    """Outputs, features and the input's gradient; the gradients of the parameters by name."""
    torch.manual_seed(7)
    result = network(x, **options)
    outputs = [result] if isinstance(result, Tensor) else [result[0], *result[1]]
    loss = torch.stack([(y * torch.randn(y.shape).to(y)).sum() / y.numel() ** 0.5 for y in outputs]).sum()
    names, parameters = zip(*network.named_parameters(), strict=True)
    slope, *slopes = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)
    return [*outputs, slope], dict(zip(names, slopes, strict=True))


class Convolutions(TorchDispatchMode):
    """Counts convolutions that add a bias, and backward passes that reduce to a bias's gradient."""

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
    """Outputs, features and all other gradients to rounding; every other bias has its gradient."""
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
            assert float(theirs[key].abs().max()) <= 1e-12  # what was computed before is noise
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
    """A hook that only looks."""


def replace_forward(conv, norm):
    conv.forward = lambda x: x


HOOKS = {
    "forward hook": lambda conv, norm: conv.register_forward_hook(note),
    "forward pre-hook": lambda conv, norm: conv.register_forward_pre_hook(note),
    "backward hook": lambda conv, norm: conv.register_full_backward_hook(note),
    "backward pre-hook": lambda conv, norm: conv.register_full_backward_pre_hook(note),
    "pre-hook of the norm": lambda conv, norm: norm.register_forward_pre_hook(note),
    "hook of the norm": lambda conv, norm: norm.register_forward_hook(note),
    "its own forward": replace_forward,
}


@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("hook", HOOKS)
def test_whoever_looks_at_a_convolution_sees_its_bias(hook, implementation):
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


def test_what_a_hook_of_the_norm_is_given():
    network = nn.Sequential(nn.Conv2d(2, 2, 1), InstanceNorm(2)).to(DEVICE)
    x, seen = torch.randn(1, 2, 4, 4, device=DEVICE), []
    network[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    run_all(network, x)
    assert torch.equal(seen[0], network[0](x))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2, affine=True), nn.ReLU()])
def test_other_layers_take_nothing_away(norm):
    network = nn.Sequential(nn.Conv2d(2, 2, 1), norm)
    with Convolutions() as count:
        torch.testing.assert_close(run_all(network, torch.ones(1, 2, 3, 4)), network(torch.ones(1, 2, 3, 4)))
    assert count.added == 2


def test_a_subclass_of_a_convolution_computes_as_it_likes():
    network = nn.Sequential(Louder(2, 2, 1), InstanceNorm(2))
    x = 1e-2 * torch.randn(1, 2, 4, 4)  # so small that the norm's eps shows the factor
    assert torch.equal(run_all(network, x), network(x))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, padding="same", dilation=2),
        nn.ConvTranspose2d(4, 6, 3, stride=3, padding=2, output_padding=1, groups=2, dilation=2),
    ],
)
def test_everything_else_that_a_convolution_is_told(conv):
    network = nn.Sequential(conv, InstanceNorm(6)).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(run_all(network, x), network(x), rtol=1e-10, atol=1e-10)


# In a step

TAPPED = {"G/model.4.bias", "G/model.8.bias"}


def left_out_in_cut(step: Step) -> set[str]:
    """Names in `Step.state` of the biases that `small_method` leaves out."""
    generator = {f"G/{name}" for name in resnet_biases(1, 17, 21, blocks=4)}
    return generator | {f"D/model.{i}.bias" for i in (3, 7, 11)}


FORMS = {
    "at once": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "in parts": {"options": OptimOptions(accumulate=2)},
    "blocks computed again": {"recompute": True},
    "compiled": {"compile": True, "backend": "aot_eager"},
    "one graph": {"compile": "whole", "backend": "aot_eager"},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_optimiser_leaves_them_where_they_are(form):
    """Also a weight average; every other bias moves."""
    torch._dynamo.reset()
    options = {"options": OptimOptions(), **FORMS[form]}
    options["options"].ema = 0.5
    step = Step(with_large_biases(small_method()), **options)
    if step.loss_scale is not None:
        step.loss_scale.scale.fill_(256.0)
    before = {key: tensor.clone() for key, tensor in step.state().items()}
    for _ in range(2):
        losses = step.run(random_batch(2), Draws())
        assert all(torch.isfinite(loss) for loss in losses.values())
    assert step.whole is None or step.whole.usable
    after, left_out = step.state(), left_out_in_cut(step)
    biases = {k.removeprefix("network/") for k in before if k.startswith(("network/G", "network/D")) and "bias" in k}
    assert left_out | TAPPED < biases
    for name in biases:
        stays = name in left_out
        assert torch.equal(after[f"network/{name}"], before[f"network/{name}"]) == stays, name
        group, key = name.split("/")
        moments = [after[f"adam/{group}/0.{key}/{part}"] for part in ("step", "exp_avg", "exp_avg_sq")]
        assert [bool(moment.any()) for moment in moments] == [not stays] * 3, name
        if group == "G":
            assert torch.equal(after[f"average/{name}"], before[f"average/{name}"]) == stays, name


@pytest.mark.parametrize("preset", ["cut", "fastcut", "cyclegan", "dclgan", "simdcl", "dcdgan-released", "dcdgan"])
def test_every_method_learns_the_same(preset):
    """Weights after two steps with and without, in float64, to 1e-5 of the learning rate.

    Not the biases that are left out, which stay: noise of 1e-14 beside Adam's eps of 1e-8 moves those that are not.
    """
    methods = [build(preset), build(preset)]
    methods[1].load_state_dict(methods[0].state_dict())
    leave_out_biases(methods[1], False)
    steps = [Step(method, OptimOptions()) for method in methods]
    start = {key: tensor.clone() for key, tensor in steps[0].state().items()}
    for i in range(2):
        batch, draws = pictures(), methods[0].draw(random.Random(i))
        for step in steps:
            torch.manual_seed(i)
            random.seed(i)
            step.run(batch, draws)
    one, other = (step.state() for step in steps)
    assert one.keys() == other.keys()
    unmoved = {id(p) for g in steps[0].groups.values() for p in g.parameters if not g.adam.state[p]["step"]}
    found = 0
    for name, network in methods[0].networks().items():
        for key, parameter in network.named_parameters():
            entry = f"network/{name}/{key}"
            if id(parameter) in unmoved and key.endswith("bias"):
                assert torch.equal(parameter, start[entry])
                found += 1
            else:
                torch.testing.assert_close(other[entry], one[entry], rtol=0, atol=2e-9, msg=entry)
    assert found >= 14


def test_no_kernel_is_launched_for_them():
    """CUT: of 2 passes of G, 1 of its encoder and 2 of D, only what nothing cancels adds a bias."""
    step = Step(small_method(), OptimOptions())
    step.run(random_batch(), Draws())
    with Convolutions() as count:
        step.run(random_batch(), Draws())
    # D's first and last, twice; G's last and both tapped ones; the tapped ones of the encoder's pass
    assert (count.added, count.reduced) == (2 * 2 + 3 + 2, 2 + 3 + 2)
    leave_out_biases(step.method, False)
    with Convolutions() as count:
        step.run(random_batch(), Draws())
    assert count.added == count.convolutions - step_blurs(step)


def step_blurs(step: Step) -> int:
    """Convolutions that have no bias: blurs of G (2 on the way down), of its encoder, and of D, twice."""
    return 2 + 2 + 2 * 3


def test_checkpoints_of_both_kinds_resume():
    """One written with biases in use resumes without, and the other way round: the same weights, moments kept."""
    methods = [small_method().double() for _ in range(4)]
    for method in methods[1:]:
        method.load_state_dict(methods[0].state_dict())
    steps = [Step(method, OptimOptions()) for method in methods]
    old, new, old_to_new, new_to_old = steps
    for step in (old, new_to_old):
        leave_out_biases(step.method, False)
    batches = [random_batch(dtype=torch.float64) for _ in range(4)]

    def run(step, batch_numbers):
        for i in batch_numbers:
            torch.manual_seed(i)
            step.run(batches[i], Draws())

    for step in (old, new):
        run(step, (0, 1))
    kept = {key: tensor.clone() for key, tensor in old.state().items()}
    assert kept.keys() == new.state().keys()
    old_to_new.load_state(kept)
    new_to_old.load_state(new.state())
    for step in steps:
        run(step, (2, 3))
    left_out = left_out_in_cut(old)
    for step in steps[1:]:
        for key, tensor in step.state().items():
            if key.startswith("network/") and key.removeprefix("network/") not in left_out:  # they drift on noise
                torch.testing.assert_close(tensor, old.state()[key], rtol=0, atol=2e-9, msg=key)
    for name in left_out:
        assert torch.equal(old_to_new.state()[f"network/{name}"], kept[f"network/{name}"])
        group, key = name.split("/")
        for part in ("step", "exp_avg", "exp_avg_sq"):
            entry = f"adam/{group}/0.{key}/{part}"
            assert torch.equal(old_to_new.state()[entry], kept[entry])
            assert (part != "step") or (kept[entry] == 2 and new_to_old.state()[entry] == 2)


def test_a_checkpoint_without_their_moments_resumes():
    """Moments are made for what a checkpoint lacks once it has a gradient."""
    step, other = Step(small_method(), OptimOptions()), Step(small_method(), OptimOptions())
    step.run(random_batch(), Draws())
    names = {name.split("/")[1] for name in left_out_in_cut(step)}
    other.load_state({k: t for k, t in step.state().items() if not any(f"/0.{name}/" in k for name in names)})
    other.run(random_batch(), Draws())
    leave_out_biases(other.method, False)
    other.run(random_batch(), Draws())
    assert other.state()["adam/G/0.model.1.bias/step"] == 1


def test_parameters_without_gradient_cost_the_optimiser_nothing():
    modules = (nn.Linear(3, 3), nn.Linear(3, 3))
    group = ParameterGroup(modules, 1e-3, (0.5, 0.999))
    slopes = (torch.ones(3, 3), None, torch.ones(3, 3), torch.ones(3))
    mean = Mean(2)
    for _ in range(2):
        mean.add(slopes, {})
    seen: list[int] = []

    class Adams(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is aten._fused_adam_.tensor_lr:
                seen.append(len(args[0]))
            return function(*args, **(kwargs or {}))

    before = modules[0].bias.detach().clone()
    assert mean.gradients is not None
    with Adams():
        group.update(tuple(mean.gradients))
    assert seen == [3]
    assert torch.equal(modules[0].bias, before)
    assert group.state().keys() == {f"{n}/{k}" for n in group.names for k in ("step", "exp_avg", "exp_avg_sq")}
    assert not any(group.state()[f"0.bias/{key}"].any() for key in ("step", "exp_avg", "exp_avg_sq"))


def test_the_presets_use_it():
    """Nobody has to switch it on."""
    for preset in PRESETS:
        assert all(m.leaves_out_biases for m in build(preset).modules() if isinstance(m, InstanceNorm))
