"""Last convolutions in unusual cases: no images, autocast around a second derivative, weights of 16 bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from fastnce.networks import fused_last
from fastnce.networks.layers import LastConvolution
from tests.kernels.test_few_outputs import parameters
from tests.maps import DEVICE, error, random_map


def test_no_images():
    x = random_map(0, 16, 5, 6, dtype=torch.bfloat16).requires_grad_()
    leaves = [x, *(t.requires_grad_() for t in parameters(3, 16, 3))]
    y = fused_last.few_outputs_convolution(*leaves)
    assert y.shape == (0, 3, 3, 4)
    found = torch.autograd.grad(y.sum(), leaves)
    assert [g.shape for g in found] == [leaf.shape for leaf in leaves]
    assert not any(g.any() for g in found)


def test_a_second_derivative_taken_under_autocast():
    x, (weight, bias) = random_map(1, 4, 6, 5), parameters(3, 4, 3)
    found = []
    for function, leaves in (
        (fused_last.few_outputs_convolution, [x, weight, bias]),
        (F.conv2d, [t.double().cpu() for t in (x, weight, bias)]),
    ):
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        y = function(*leaves)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=y.dtype == torch.float32):
            found.append(torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True))
    for ours, theirs in zip(*found, strict=True):
        assert error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_result_is_float32(implementation, weights, dtype):
    layer, x = LastConvolution(8, 3, 3).to(DEVICE, weights), random_map(1, 8, 6, 7, dtype=dtype)
    layer.implementation = implementation
    y = layer(x)
    assert y.dtype == torch.float32
    assert error(y, F.conv2d(*(t.detach().double().cpu() for t in (x, layer.weight, layer.bias)))) <= 1e-5


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_a_parametrized_weight_is_computed_once(implementation):
    class Counting(nn.Module):
        calls = 0

        def forward(self, weight):
            Counting.calls += 1
            return 2 * weight

    layer, x = LastConvolution(4, 3, 3).to(DEVICE), random_map(1, 4, 6, 6)
    layer.implementation = implementation
    plain = layer(x)
    parametrize.register_parametrization(layer, "weight", Counting())
    Counting.calls = 0
    assert error(layer(x) - layer.bias[:, None, None], 2.0 * (plain - layer.bias[:, None, None]).double()) <= 1e-5
    assert Counting.calls == 1
