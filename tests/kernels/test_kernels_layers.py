"""The layer kernels against float64 formulas. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from fastnce.kernels import blur, chosen, configs, instance_norm, instance_norm_backward, norm_tiles, planes
from fastnce.kernels.planned import forget_plans

from tests.maps import DEVICE, FILTERS, GATE, error, filter_truth, norm_truth, random_map


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that has not been written is NaN, except for the gigabytes of one test."""
    empty = torch.empty

    def poisoned(*args, **options):
        x = empty(*args, **options)
        small = x.device.type != "meta" and x.numel() < 2**31
        return x.fill_(torch.nan) if x.is_floating_point() and small else x

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that every map takes several programs, and a reduction several parts."""
    monkeypatch.setattr(chosen, "layer_tile", lambda arch, channels, *_, **__: configs.Tile(16, 32, 4, 1))
    monkeypatch.setattr(norm_tiles, "norm_splits", lambda arch, programs, tiles, reduction: min(tiles, 5))
    monkeypatch.setattr(norm_tiles, "whole_tile", lambda *_: None)
    forget_plans()
    yield
    forget_plans()


NORM_CASES = (
    # images, channels, height, width, slope, margin, residual
    (1, 64, 9, 7, 0.0, 1, False),
    (3, 20, 5, 11, 0.2, 0, False),
    (2, 3, 4, 6, 0.0, 3, False),
    (1, 130, 8, 8, 1.0, 0, True),
    (2, 1, 7, 5, 1.0, 2, False),
    (1, 5, 1, 9, 1.0, 0, False),
)


def gradient_of_x(gradient, x, statistics, slope, margin):
    return instance_norm_backward.instance_norm_backward(gradient, None, x, statistics, slope, margin)[0]


def check_norm(case, dtype, layout="channels_last", upstream_layout="channels_last"):
    images, channels, height, width, slope, margin, with_residual = case
    x = random_map(images, channels, height, width, dtype=dtype, layout=layout)
    residual = torch.randn_like(x) if with_residual else None
    upstream = random_map(
        images, channels, height + 2 * margin, width + 2 * margin, dtype=dtype, layout=upstream_layout, centre=0.3
    )
    y, statistics = instance_norm.instance_norm(x, residual, 1e-5, slope, margin)
    d_x = gradient_of_x(upstream, x, statistics, slope, margin)
    truth, d_truth = norm_truth(x, slope, margin, residual, upstream)
    assert y.dtype == d_x.dtype == dtype
    if channels > 1:
        for result in (y, d_x):
            assert result.is_contiguous(memory_format=torch.channels_last) == (layout in ("channels_last", "inside"))
    assert error(y, truth) <= GATE[dtype]
    assert error(d_x, d_truth) <= GATE[dtype]
    return y, d_x


@pytest.mark.parametrize("dtype", GATE)
@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_instance_norm(case, dtype):
    check_norm(case, dtype)


@pytest.mark.parametrize("case", [(1, 40, 9, 7, 0.0, 1, False), (2, 20, 6, 8, 1.0, 0, True)], ids=str)
def test_instance_norm_in_many_parts(case, small_tiles):
    once, again = [], []
    for results in (once, again):
        torch.manual_seed(3)
        results += check_norm(case, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize(
    "layouts", [("contiguous", "contiguous"), ("inside", "contiguous"), ("contiguous", "inside"), ("transposed",) * 2]
)
def test_instance_norm_in_every_layout(layouts):
    check_norm((2, 6, 5, 7, 0.0, 1, False), torch.float32, *layouts)
    check_norm((1, 6, 5, 7, 1.0, 0, True), torch.float32, *layouts)


def test_instance_norm_of_an_expanded_gradient():
    """As a mean returns it: all elements share one memory location."""
    x = random_map(2, 8, 6, 6)
    y, statistics = instance_norm.instance_norm(x, None, 1e-5, 0.0, 0)
    upstream = torch.tensor(0.5, device=DEVICE).expand(y.shape)
    d_x = gradient_of_x(upstream, x, statistics, 0.0, 0)
    assert error(d_x, norm_truth(x, 0.0, 0, None, upstream)[1]) <= 5e-6


def test_instance_norm_of_a_large_flat_image():
    """Mean 3, deviation 0.01: sums of squares in float32 would lose every digit."""
    x = random_map(1, 2, 600, 800, spread=0.01, centre=3.0)
    x[0, 0, 5, 7] = 200.0  # an outlier, so that shifting by the first value is not enough
    upstream = torch.randn_like(x)
    y, statistics = instance_norm.instance_norm(x, None, 1e-5, 1.0, 0)
    d_x = gradient_of_x(upstream, x, statistics, 1.0, 0)
    truth, d_truth = norm_truth(x, 1.0, 0, None, upstream)
    assert error(y[:, 1:], truth[:, 1:]) <= 5e-5  # mostly the rounding of x - 3
    assert error(y[:, :1], truth[:, :1]) <= 5e-5
    assert error(d_x, d_truth) <= 5e-5
    spread = x.double().cpu().var(dim=(2, 3), correction=0)
    assert error(statistics[:, 1], torch.rsqrt(spread + 1e-5)) <= 2e-6


@pytest.mark.parametrize("size", [(2, 2), (5, 7), (8, 6), (4, 13)], ids=str)
@pytest.mark.parametrize("name", FILTERS)
def test_pads_and_blurs(name, size):
    forward, backward = FILTERS[name]
    if name == "reflect_pad" and min(size) <= 3:
        size = (4, 4)  # the smallest supported
    for (channels, layout), dtype in zip(
        [(20, "channels_last"), (3, "contiguous"), (1, "channels_last"), (64, "inside")],
        [torch.float32, torch.float32, torch.float16, torch.bfloat16],
        strict=True,
    ):
        x = random_map(2, channels, *size, dtype=dtype, layout=layout)
        leaf = x.double().cpu().requires_grad_()
        truth = filter_truth(name, leaf)
        upstream = random_map(*truth.shape, dtype=dtype, layout=layout)
        (d_truth,) = torch.autograd.grad(truth, leaf, upstream.double().cpu())
        y, d_x = forward(x, *truth.shape[2:]), backward(upstream, *size)
        assert y.dtype == d_x.dtype == dtype
        assert error(y, truth) <= GATE[dtype]
        assert error(d_x, d_truth) <= GATE[dtype]


@pytest.mark.parametrize("name", FILTERS)
def test_pads_and_blurs_in_many_programs(name, small_tiles):
    forward, backward = FILTERS[name]
    for shape in ((1, 40, 7, 9), (1, 5, 4, 43)):  # tiles of several rows, and rows of several tiles
        x = random_map(*shape)
        leaf = x.double().cpu().requires_grad_()
        truth = filter_truth(name, leaf)
        upstream = random_map(*truth.shape)
        assert error(forward(x, *truth.shape[2:]), truth) <= 1e-6
        d_truth = torch.autograd.grad(truth, leaf, upstream.double().cpu())[0]
        assert error(backward(upstream, *shape[2:]), d_truth) <= 1e-6


def test_offsets_beyond_32_bits():
    """The third image or row is 2^31 elements after the first; few elements are touched."""
    far = 2**30 + 32
    room = torch.empty(2 * far + 1536, dtype=torch.float16, device=DEVICE)  # untouched pages take no memory
    values = (3 * torch.randn(3, 2, 3, 40)).half()
    for image, row in ((far, 128), (512, far)):
        x = room.as_strided(values.shape, (image, 1, row, 3))
        x.copy_(values)
        y, statistics = instance_norm.instance_norm(x, None, 1e-5, 1.0, 0)
        upstream = random_map(*values.shape, dtype=torch.float16)
        truth, d_truth = norm_truth(values, 1.0, 0, None, upstream)
        assert error(y, truth) <= 5e-4
        assert error(gradient_of_x(upstream, x, statistics, 1.0, 0), d_truth) <= 5e-4
        assert error(blur.blur_up(x, 6, 80), filter_truth("blur_up", values.double())) <= 5e-4


def test_a_plane_too_large_is_refused():
    with pytest.raises(ValueError, match="too large for the kernels"):
        planes.check_plane(torch.empty(1, 1, 2**16, 2**15, device="meta"))
