"""Norms with what surrounds them, in one launch and in two, and layers without a norm, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastnce.kernels import activate, configs, instance_norm, instance_norm_backward, norm_tiles
from fastnce.kernels.planned import forget_plans

from tests.maps import DEVICE, GATE, arrange, error, filter_truth, launches, random_map

WHOLE = ["whole_norm_kernel", "whole_gradient_kernel"]
PARTS = ["moments_kernel", "normalise_kernel", "sums_kernel", "gradient_kernel"]
FORMS = {
    # margin, blur
    "plain": (0, 0),
    "pad 1": (1, 0),
    "pad 3": (3, 0),
    "down": (0, 1),
    "up": (0, 2),
}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that has not been written is NaN."""
    empty = torch.empty

    def poisoned(*args, **options):
        x = empty(*args, **options)
        return x.fill_(torch.nan) if x.is_floating_point() and x.device.type != "meta" else x

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def in_parts(monkeypatch):
    """Every plane takes two launches, several programs and several parts."""
    monkeypatch.setattr(norm_tiles, "whole_tile", lambda *_: None)
    monkeypatch.setattr(norm_tiles, "norm_tile", lambda arch, channels, *_: configs.Tile(16, 32, 4, 1))
    monkeypatch.setattr(norm_tiles, "norm_splits", lambda arch, programs, tiles, reduction: min(tiles, 3))
    forget_plans()
    yield
    forget_plans()


def blurred(y: torch.Tensor, blur: int) -> torch.Tensor:
    return filter_truth({1: "blur_down", 2: "blur_up"}[blur], y) if blur else y


def truth(x, residual, slope, margin, blur, upstream, inner):
    """Output, and the gradients of x and y, in float64 by the formula."""
    leaf = x.double().cpu().requires_grad_()
    apart = leaf - leaf.mean(dim=(2, 3), keepdim=True)
    y = apart / torch.sqrt(apart.square().mean(dim=(2, 3), keepdim=True) + 1e-5)
    y = torch.where(y > 0, y, slope * y)
    y = y if residual is None else y + residual.double().cpu()
    out = F.pad(y, (margin,) * 4, mode="reflect") if margin else blurred(y, blur)
    total = (out * upstream.double().cpu()).sum()
    total = total if inner is None else total + (y * inner.double().cpu()).sum()
    return out.detach(), *torch.autograd.grad(total, (leaf, y))


def check(
    shape, form, dtype=torch.float32, layout="channels_last", other="inside", slope=0.2, residual=True, inner=True,
    total=True, gate=None,
):  # fmt: skip
    """Forward and backward; the results."""
    margin, blur = FORMS[form]
    x = random_map(*shape, dtype=dtype, layout=layout)
    added = random_map(*shape, dtype=dtype, layout=other) if residual else None
    more = random_map(*shape, dtype=dtype, layout=other, centre=0.3) if inner else None
    y, statistics = instance_norm.instance_norm(x, added, 1e-5, slope, margin, blur)
    upstream = random_map(*y.shape, dtype=dtype, layout=other, centre=0.3)
    d_x, d_total = instance_norm_backward.instance_norm_backward(
        upstream, more, x, statistics, slope, margin, blur, total
    )
    y_truth, d_truth, total_truth = truth(x, added, slope, margin, blur, upstream, more)
    gate = gate or GATE[dtype]
    assert y.dtype == d_x.dtype == d_total.dtype == dtype
    assert error(y, y_truth) <= gate
    assert error(d_x, d_truth) <= gate
    if total:
        assert error(d_total, total_truth) <= gate
    else:
        assert d_total.numel() == 0
    return y, d_x, d_total


@pytest.mark.parametrize("dtype", GATE)
@pytest.mark.parametrize("form", FORMS)
def test_a_plane_in_one_launch(form, dtype, monkeypatch):
    names = launches(monkeypatch)
    check((2, 20, 6, 9), form, dtype)
    check((1, 7, 5, 4), form, dtype, layout="contiguous", residual=False, inner=False, total=False, slope=0.0)
    assert sorted(set(names)) == sorted(WHOLE if form != "up" else PARTS)


@pytest.mark.parametrize("dtype", GATE)
@pytest.mark.parametrize("form", FORMS)
def test_a_plane_in_two_launches(form, dtype, in_parts, monkeypatch):
    names = launches(monkeypatch)
    check((2, 20, 6, 9), form, dtype)
    check((1, 35, 7, 11), form, dtype, layout="contiguous", residual=False, inner=False, total=False, slope=0.0)
    assert names == 2 * PARTS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_each_part_alone(form, wanted, monkeypatch):
    residual, inner, total = wanted
    check((1, 3, 5, 7), form, residual=residual, inner=inner, total=total)
    monkeypatch.setattr(norm_tiles, "whole_tile", lambda *_: None)
    forget_plans()
    check((1, 3, 5, 7), form, residual=residual, inner=inner, total=total)
    forget_plans()


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "inside", "transposed"])
@pytest.mark.parametrize("form", FORMS)
def test_every_layout(form, layout):
    check((2, 6, 5, 7), form, layout=layout, other="contiguous")
    check((2, 6, 5, 7), form, layout=layout, other="transposed")


@pytest.mark.parametrize("size", [(4, 4), (4, 13), (64, 64), (8, 5)], ids=str)
@pytest.mark.parametrize("form", ["pad 1", "pad 3", "down"])
def test_sizes_of_whole_planes(form, size):
    """Pads of 3 reach across the smallest plane, and 64x64 pixels fill the largest tile."""
    check((1, 1 if size == (64, 64) else 5, *size), form, slope=0.0)


def test_one_pixel_and_one_channel():
    y, d_x, _ = check((2, 1, 1, 5), "plain")
    assert y.shape == d_x.shape == (2, 1, 1, 5)
    x = random_map(2, 3, 1, 1)
    y, statistics = instance_norm.instance_norm(x, None, 1e-5, 1.0, 0)
    assert torch.equal(y, torch.zeros_like(y))
    d_x, _ = instance_norm_backward.instance_norm_backward(x, None, x, statistics, 1.0, 0)
    assert torch.equal(d_x, torch.zeros_like(d_x))


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_again(form, in_parts):
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(check((2, 20, 6, 9), form))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_moments_do_not_depend_on_the_number_of_launches(monkeypatch):
    x = random_map(2, 5, 9, 7, centre=30.0)
    _, whole = instance_norm.instance_norm(x, None, 1e-5, 0.0, 1)
    monkeypatch.setattr(norm_tiles, "whole_tile", lambda *_: None)
    forget_plans()
    _, parts = instance_norm.instance_norm(x, None, 1e-5, 0.0, 1)
    forget_plans()
    wide = x.double().cpu()
    spread = torch.rsqrt(wide.var(dim=(2, 3), correction=0) + 1e-5)
    for found in (whole, parts):
        assert found.dtype == torch.float32
        assert error(found, torch.stack([wide.mean((2, 3)), spread], 1)) <= 1e-6


def test_a_flat_whole_plane_keeps_its_digits():
    """Mean 3, deviation 0.01: sums of squares in float32 would lose every digit."""
    x = random_map(1, 2, 60, 60, spread=0.01, centre=3.0)
    x[0, 0, 5, 7] = 200.0
    y, statistics = instance_norm.instance_norm(x, None, 1e-5, 1.0, 0)
    wide = x.double().cpu()
    spread = torch.rsqrt(wide.var(dim=(2, 3), correction=0) + 1e-5)
    assert error(statistics[:, 1], spread) <= 2e-6
    assert error(y, (wide - wide.mean((2, 3), keepdim=True)) * spread[..., None, None]) <= 5e-5


@pytest.mark.parametrize("launched", ["once", "twice"])
def test_nan_stays_in_its_plane(launched, monkeypatch):
    if launched == "twice":
        monkeypatch.setattr(norm_tiles, "whole_tile", lambda *_: None)
    forget_plans()
    x = random_map(1, 3, 6, 6)
    x[0, 1, 2, 2] = torch.nan
    y, statistics = instance_norm.instance_norm(x, None, 1e-5, 0.0, 1)
    d_x, _ = instance_norm_backward.instance_norm_backward(torch.ones_like(y), None, x, statistics, 0.0, 1)
    forget_plans()
    for result in (y, d_x):
        assert result[:, 1].isnan().all()
        assert result[:, [0, 2]].isfinite().all()


def test_a_residual_inside_a_padded_map():
    """The interior of the padded map of the block before: a view with its strides."""
    padded = arrange(torch.randn(2, 16, 8, 8).to(DEVICE), "channels_last")
    x, residual = random_map(2, 16, 6, 6), padded[:, :, 1:-1, 1:-1]
    y, _ = instance_norm.instance_norm(x, residual, 1e-5, 1.0, 1)
    expected, *_ = truth(x, residual, 1.0, 1, 0, torch.zeros_like(y), None)
    assert error(y, expected) <= GATE[torch.float32]


def test_refused_forms():
    x = random_map(1, 2, 6, 6)
    with pytest.raises(ValueError, match="0 with a margin: blur 1, margin 1"):
        instance_norm.instance_norm(x, None, 1e-5, 1.0, 1, 1)
    with pytest.raises(ValueError, match=r"blur is 0, 1 \(down\) or 2 \(up\)"):
        activate.activate(x, None, 0.2, 3)


# Layers without a norm


@pytest.mark.parametrize("dtype", GATE)
@pytest.mark.parametrize("blur", [0, 1, 2])
@pytest.mark.parametrize("biased", [True, False])
def test_bias_activation_and_blur(biased, blur, dtype, monkeypatch):
    names = launches(monkeypatch)
    for shape, layout in (((2, 20, 6, 9), "channels_last"), ((1, 3, 7, 5), "contiguous"), ((1, 1, 2, 2), "inside")):
        x = random_map(*shape, dtype=dtype, layout=layout)
        bias = torch.randn(shape[1], device=DEVICE) if biased else None
        y = activate.activate(x, bias, 0.2, blur)
        upstream = random_map(*y.shape, dtype=dtype, layout=layout, centre=0.3)
        d_x, d_bias = activate.activate_backward(upstream, x, bias, 0.2, blur)
        leaf = x.double().cpu().requires_grad_()
        shift = (torch.zeros(shape[1]) if bias is None else bias.cpu()).double().requires_grad_()
        expected = blurred(F.leaky_relu(leaf + shift[:, None, None], 0.2), blur)
        d_truth = torch.autograd.grad(expected, (leaf, shift), upstream.double().cpu())
        assert y.dtype == d_x.dtype == dtype
        assert d_bias.dtype == torch.float32
        assert error(y, expected) <= GATE[dtype]
        assert error(d_x, d_truth[0]) <= GATE[dtype]
        assert error(d_bias, d_truth[1]) <= 1e-5 if biased else d_bias.numel() == 0
    each = ["activate_kernel", "activate_gradient_kernel", *["bias_kernel"] * biased]
    assert names == 3 * each


def test_the_gradient_of_a_bias_in_many_parts(in_parts):
    x, bias = random_map(3, 40, 9, 14), torch.randn(40, device=DEVICE).bfloat16()
    upstream = random_map(3, 40, 5, 7)
    results = [activate.activate_backward(upstream, x, bias, 0.0, 1) for _ in range(2)]
    leaf, shift = x.double().cpu().requires_grad_(), bias.double().cpu().requires_grad_()
    expected = blurred(F.relu(leaf + shift[:, None, None]), 1)
    d_truth = torch.autograd.grad(expected, (leaf, shift), upstream.double().cpu())
    for found, again, wanted in zip(*results, d_truth, strict=True):
        assert torch.equal(found, again)
        assert error(found, wanted) <= 5e-6
