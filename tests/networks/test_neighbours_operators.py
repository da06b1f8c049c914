"""Operators of layers that are computed together: derivatives, checks at the first use, and the eager layers."""

from __future__ import annotations

import pytest
import torch
from fastnce.kernels import instance_norm_backward as backward
from fastnce.kernels.planned import forget_plans
from torch import Tensor

from fastnce.networks import InstanceNorm, fused
from fastnce.networks.uses import LayerUse, formula
from tests.maps import DEVICE, error, random_map


def pair(t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return fused.instance_norm_and_inner(t, 1e-5, 0.2, 1, r)


FORMS = {
    "residual and pad": (lambda t, r: (fused.instance_norm(t, slope=0.2, margin=1, residual=r),), (0.2, 1, 0, False)),
    "residual and blur up": (lambda t, r: (fused.instance_norm(t, residual=r, blur=2),), (1.0, 0, 2, False)),
    "residual and blur down": (lambda t, r: (fused.instance_norm(t, residual=r, blur=1),), (1.0, 0, 1, False)),
    "with the inner map": (pair, (0.2, 1, 0, True)),
    "the inner map alone": (lambda t, r: pair(t, r)[1:], (0.2, 0, 0, False)),
}


@pytest.mark.parametrize("name", FORMS)
def test_derivatives_of_norms(name):
    """First and second derivatives, with respect to the map and the residual."""
    function, options = FORMS[name]
    found = []
    for x, residual, of in (
        (random_map(1, 2, 5, 4, layout="inside"), random_map(1, 2, 5, 4), function),
        (None, None, lambda t, r: formula("instance_norm", [t, r], (1e-5, *options))),
    ):
        if x is None:
            x, residual = (t.detach().double().cpu() for t in found[0][0])
        leaves = [x.detach().clone().requires_grad_(), residual.detach().clone().requires_grad_()]
        loss = torch.stack([(i + 1) * y.pow(3).sum() for i, y in enumerate(of(*leaves))]).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        plain = torch.autograd.grad(sum((i + 1) * y.pow(3).sum() for i, y in enumerate(of(*leaves))), leaves)
        found.append((leaves, [*first, *second, *plain]))
    for ours, truth in zip(found[0][1], found[1][1], strict=True):
        assert error(ours, truth) <= 1e-5


@pytest.mark.parametrize("blur", [0, 1, 2])
@pytest.mark.parametrize("biased", [True, False])
def test_derivatives_of_activations(blur, biased):
    x, bias = random_map(2, 3, 5, 4), torch.linspace(-1, 1, 3).to(DEVICE)
    found = []
    for of, wide in ((fused.activate, torch.float32), (None, torch.float64)):
        leaves = [t.detach().to(wide).requires_grad_() for t in ([x, bias] if biased else [x])]
        if of is None:
            (y,) = formula("activate", leaves, (0.2, blur))
        else:
            y = of(leaves[0], leaves[1] if biased else None, 0.2, blur)
        first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves[0])
        found.append([y, *first, *second])
    for ours, truth in zip(*found, strict=True):
        assert error(ours, truth) <= 1e-5


def test_functional_gradient():
    x, residual = random_map(1, 2, 5, 4), random_map(1, 2, 5, 4)
    ours = torch.func.grad(lambda t: sum(y.pow(3).sum() for y in pair(t, residual)))(x)
    leaf = x.double().cpu().requires_grad_()
    truth = sum(y.pow(3).sum() for y in formula("instance_norm", [leaf, residual.double()], (1e-5, 0.2, 1, 0, True)))
    assert error(ours, torch.autograd.grad(truth, leaf)[0]) <= 1e-5


USES = {
    "norm, residual, pad, inner": ("instance_norm", (1e-5, 1.0, 1, 0, True), True),
    "norm, residual, blur up": ("instance_norm", (1e-5, 1.0, 0, 2, False), True),
    "norm, ReLU, blur down": ("instance_norm", (1e-5, 0.0, 0, 1, False), False),
    "bias, leaky ReLU, blur down": ("activate", (0.2, 1), True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", USES)
def test_first_uses(name, dtype, monkeypatch):
    """The check at the first use passes. It fails where the gradient of the output without its pad gets lost."""
    family, options, more = USES[name]
    shape = (1, 8, 12, 10)
    others = (((8,) if family == "activate" else shape, dtype),) if more else ()
    use = LayerUse(family, shape, True, options, others)
    assert all(check.ok for check in use.measure(DEVICE, dtype))
    right = backward.norm_whole.backward

    def forgetful(tile, gradient, inner, *arguments):
        form = arguments[-2]
        right(tile, gradient, inner, *arguments[:-2], form | {"INNER": False}, arguments[-1])

    monkeypatch.setattr(backward.norm_whole, "backward", forgetful)
    forget_plans()  # they have recorded what was right
    assert all(check.ok for check in use.measure(DEVICE, dtype)) == (not options[-1] or family == "activate")


def test_small_maps_are_refused():
    x = random_map(1, 2, 3, 1)
    with pytest.raises(ValueError, match="too small for a reflection of 1 pixels"):
        fused.instance_norm(x, blur=1)
    with pytest.raises(ValueError, match="too small for a reflection of 1 pixels"):
        fused.activate(x, None, 0.2, 1)
    with pytest.raises(ValueError, match="shape and dtype"):
        fused.instance_norm_and_inner(random_map(1, 2, 4, 4), 1e-5, 0.0, 1, x)


def test_eager_layers_have_the_same_arguments():
    """Where the kernels turn out to be wrong, the norm computes what was asked for in plain PyTorch."""
    x, residual, norm = random_map(1, 4, 6, 5), random_map(1, 4, 6, 5), InstanceNorm(4)
    for arguments in ((0.0, 0, None, 1), (0.2, 0, residual, 2)):
        norm.implementation = "triton"
        ours = norm(x, *arguments)
        norm.implementation = "eager"
        assert error(ours, norm(x, *arguments).double()) <= 1e-5
    norm.implementation = "triton"
    ours = norm.with_inner(x, 0.2, 1, residual)
    norm.implementation = "eager"
    for one, other in zip(ours, norm.with_inner(x, 0.2, 1, residual), strict=True):
        assert error(one, other.double()) <= 1e-5
