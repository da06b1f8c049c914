"""Convolutions that give their weight gradients to a collector compute what PyTorch's layers compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastnce.engine.weights import ConvertedWeights, converted_weights
from fastnce.networks.convolution import convolve
from fastnce.networks.runs import run_all

BF16 = torch.bfloat16
LAYERS = [
    lambda: nn.Conv2d(4, 6, 3, padding=1),
    lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
    lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    lambda: nn.Conv2d(4, 6, 3, padding="same"),
]


def gradients(layer: nn.Module, x: Tensor, apply, uses: int = 1) -> list[Tensor]:
    """The output, and the gradients of x and the parameters, of the sum over uses."""
    x, parameters = x.clone().requires_grad_(), list(layer.parameters())
    with torch.autocast("cpu", BF16), converted_weights([layer], BF16):
        total = sum(apply(layer, x * (i + 1)).float().square().sum() for i in range(uses))
        return [total.detach(), *torch.autograd.grad(total, [x, *parameters])]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("uses", [1, 2, 3])
def test_the_gradients_are_those_of_the_layer(make, uses):
    layer, x = make(), torch.randn(2, 4, 9, 9)
    expected = gradients(layer, x, lambda layer, x: layer(x), uses)
    found = gradients(layer, x, lambda layer, x: convolve(layer, x, layer.bias), uses)
    assert len(found) == 2 + len(list(layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_parts_are_added_in_float32_and_uses_of_a_part_in_16_bits():
    """2048 + 3 + 3: bfloat16 has steps of 16 there, so the small terms only count if they are added otherwise."""
    layer = nn.Conv2d(1, 1, 1, bias=False)
    found = {}
    for shared in (True, False):
        with torch.autocast("cpu", BF16):
            weights, outputs = ConvertedWeights([layer], BF16), []
            with weights.used():
                outputs.append(convolve(layer, torch.full((1, 1, 1, 1), 2048.0), None))
                if shared:
                    outputs.append(convolve(layer, torch.full((1, 1, 1, 1), 3.0), None))
            with weights.used():
                if not shared:
                    outputs.append(convolve(layer, torch.full((1, 1, 1, 1), 3.0), None))
        (gradient,) = torch.autograd.grad(torch.stack(outputs).float().sum(), layer.weight)
        found[shared] = gradient.item()
    assert found == {True: 2048.0, False: 2051.0}


def test_a_gradient_on_the_way_leaves_the_weights_alone():
    """A loss may differentiate with respect to an image, as an attack does; the weights' gradients are the loss's."""
    layer, x = nn.Conv2d(3, 3, 3, padding=1), torch.randn(1, 3, 5, 5, requires_grad=True)
    weights = list(layer.parameters())
    with torch.autocast("cpu", BF16), converted_weights([layer], BF16):
        y = convolve(layer, x, layer.bias).float()
        (of_image,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        found = torch.autograd.grad(y.sum(), weights, retain_graph=True)
        (of_copy,) = torch.autograd.grad(y.sum(), layer.weight)
    with torch.autocast("cpu", BF16), converted_weights([layer], BF16):
        expected = torch.autograd.grad(layer(x).float().sum(), weights)
    assert of_image.abs().sum() > 0
    assert torch.equal(of_copy.float(), expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_penalty_differentiates_twice():
    found = []
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 3, 3, padding=1), torch.randn(1, 3, 5, 5, requires_grad=True)
    weights = list(layer.parameters())
    for apply in (lambda: convolve(layer, x, layer.bias), lambda: layer(x)):
        with torch.autocast("cpu", BF16), converted_weights([layer], BF16):
            y = apply().float()
            (slope,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            found.append(torch.autograd.grad(slope.square().sum() + y.sum(), weights))
    for own, library in zip(*found, strict=True):
        torch.testing.assert_close(own, library, rtol=2e-2, atol=0.1)
    assert found[0][0].abs().max() > 1


def test_layers_that_are_watched_or_frozen_run_themselves():
    layer, x = nn.Conv2d(3, 3, 1), torch.randn(1, 3, 4, 4)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    with torch.autocast("cpu", BF16), converted_weights([layer], BF16):
        assert run_all([layer], x).requires_grad
    assert seen == [1]
    plain = nn.Conv2d(3, 3, 1).requires_grad_(False)
    with torch.autocast("cpu", BF16), converted_weights([plain], BF16):
        assert not run_all([plain], x).requires_grad


def test_copies_are_made_again_after_an_update_or_a_freeze():
    layer = nn.Conv2d(2, 2, 1)
    weights = ConvertedWeights([layer], BF16)
    assert weights.current
    layer.weight.requires_grad_(False)
    assert not weights.current
    layer.weight.requires_grad_(True)
    assert weights.current
    with torch.no_grad():
        assert not weights.current
        layer.weight.add_(1.0)
    assert not weights.current
