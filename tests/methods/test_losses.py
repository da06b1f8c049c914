"""GAN objectives, penalties and cycle distances against plain formulas and cases computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnce.methods.losses import (
    GAN_MODES,
    channel_cycle_loss,
    frequency_cycle_loss,
    gan_loss,
    gradient_penalty,
    r1_penalty,
)


def picture(*rows):
    return torch.tensor(rows, dtype=torch.float64)[None, None]


@pytest.mark.parametrize("real", [True, False])
def test_gan_loss_formulas(real):
    x = torch.randn(3, 1, 4, 5, dtype=torch.float64)
    target = torch.full_like(x, float(real))
    sign = -1.0 if real else 1.0
    plain = {
        "lsgan": (x - target).square().mean(),
        "vanilla": F.binary_cross_entropy_with_logits(x, target),
        "wgangp": sign * x.mean(),
        "nonsaturating": torch.log1p((sign * x).exp()).mean(),
        "hinge": -torch.minimum(-sign * x - 1, torch.zeros_like(x)).mean(),
    }
    assert set(plain) == set(GAN_MODES)
    for mode, value in plain.items():
        torch.testing.assert_close(gan_loss(x, real, mode), value, rtol=1e-12, atol=1e-12)


def test_hinge_for_the_generator_does_not_saturate():
    confident = torch.full((1, 1, 2, 2), 3.0, requires_grad=True)
    assert torch.autograd.grad(gan_loss(confident, True, "hinge"), confident)[0].abs().max() == 0
    slope = torch.autograd.grad(gan_loss(confident, True, "hinge", for_generator=True), confident)[0]
    torch.testing.assert_close(slope, torch.full_like(confident, -0.25))


def test_unknown_gan_mode_is_named():
    with pytest.raises(ValueError, match="gan_mode must be one of lsgan, .*not 'wasserstein'"):
        gan_loss(torch.zeros(1), True, "wasserstein")  # type: ignore[arg-type]


def test_r1_of_a_quadratic():
    # D(y) = a * sum(y^2): the gradient is 2 a y, its squared norm 4 a^2 |y|^2, whose derivative by a is 8 a |y|^2
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty(a * y.square().flatten(1).sum(1), y)
    lengths = y.detach().square().flatten(1).sum(1).mean()
    torch.testing.assert_close(penalty.detach(), 4 * 0.49 * lengths)
    torch.testing.assert_close(torch.autograd.grad(penalty, a)[0], 8 * 0.7 * lengths)


def test_gradient_penalty_of_a_linear_critic():
    critic = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).double()
    real, fake = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64)
    penalty = gradient_penalty(critic, real, fake)
    length = critic[1].weight.norm()
    torch.testing.assert_close(penalty, (length - 1).square())
    assert torch.autograd.grad(penalty, critic[1].weight)[0].abs().max() > 0


def test_gradient_penalty_lies_between_real_and_fake():
    seen = []

    def critic(x):
        seen.append(x.detach())
        return x.square().sum((1, 2, 3))

    real, fake = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    penalty = gradient_penalty(critic, real, fake, mix=torch.tensor([0.25, 1.0]))  # type: ignore[arg-type]
    assert seen[0][:, 0, 0, 0].tolist() == [0.25, 1.0]
    # the gradient of sum(x^2) is 2x, with norms 2 * 0.25 * 2 = 1 and 2 * 1 * 2 = 4
    torch.testing.assert_close(penalty, torch.tensor(((1 - 1) ** 2 + (4 - 1) ** 2) / 2))


def test_channel_cycle_by_hand():
    x = torch.zeros(1, 3, 1, 2, dtype=torch.float64)
    y = torch.tensor([[[[1.0, 3.0]], [[0.0, -1.0]], [[0.5, 0.5]]]], dtype=torch.float64)
    # per channel: (1 + 3) / 2, (0 + 1) / 2, (0.5 + 0.5) / 2
    assert channel_cycle_loss(x, y).item() == pytest.approx(2.0 + 0.5 + 0.5, abs=1e-15)


def test_channels_do_not_weigh_each_other():
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    y = torch.zeros(1, 3, 2, 2)
    y[:, 0] = 0.001  # a small error in one channel
    y[:, 2] = -1.0  # beside a large one
    slope = torch.autograd.grad(channel_cycle_loss(x, y), x)[0]
    torch.testing.assert_close(slope[:, 0], torch.full((1, 2, 2), -0.25))
    torch.testing.assert_close(slope[:, 2], torch.full((1, 2, 2), 0.25))


def test_frequency_cycle_by_hand():
    # 2x2 pictures, unitary transform: X = (a+b+c+d, a-b+c-d, a+b-c-d, a-b-c+d) / 2
    x, y = picture([2.0, 0.0], [0.0, 0.0]), picture([0.0, 2.0], [0.0, 0.0])
    # X = (1, 1, 1, 1), Y = (1, -1, 1, -1): the amplitudes agree, two of four values differ by 2
    assert frequency_cycle_loss(x, y).item() == pytest.approx(0.0 + (0 + 2 + 0 + 2) / 4, abs=1e-14)
    zero = torch.zeros_like(x)
    # against a black image, both terms are the mean amplitude
    assert frequency_cycle_loss(x, zero).item() == pytest.approx(1.0 + 1.0, abs=1e-14)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 3), (6, 7), (7, 6), (3, 2)])
def test_frequency_cycle_is_the_mean_over_the_whole_spectrum(size):
    x, y = torch.randn(2, 2, 3, *size, dtype=torch.float64)
    x.requires_grad_()
    fx, fy = torch.fft.fft2(x, norm="ortho"), torch.fft.fft2(y, norm="ortho")
    plain = (fx.abs() - fy.abs()).abs().mean() + (fx - fy).abs().mean()
    ours = frequency_cycle_loss(x, y)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(loss, x)[0] for loss in (ours, plain)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-12)


def test_frequency_cycle_is_no_multiple_of_a_pixel_loss():
    black = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    flat = torch.full_like(black, 0.125)  # one frequency
    dot = torch.zeros_like(black)
    dot[0, 0, 3, 5] = 8.0  # every frequency
    assert F.l1_loss(flat, black) == F.l1_loss(dot, black)
    assert frequency_cycle_loss(dot, black) > 7.9 * frequency_cycle_loss(flat, black)
    same_squares = torch.full_like(black, 1.0)
    assert F.mse_loss(same_squares, black) == F.mse_loss(dot, black)
    # by Parseval, squared distances agree in both domains; L1 distances do not
    assert frequency_cycle_loss(dot, black) > 7.9 * frequency_cycle_loss(same_squares, black)


def test_frequency_cycle_has_a_gradient_where_pictures_agree():
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    slope = torch.autograd.grad(frequency_cycle_loss(x, x.detach()), x)[0]
    assert slope.isfinite().all()
    assert slope.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequency_cycle_of_16_bits_is_computed_in_float32(dtype):
    x, y = (torch.rand(2, 1, 3, 16, 16) * 2 - 1).to(dtype)
    loss = frequency_cycle_loss(x, y)
    assert loss.dtype == torch.float32
    assert math.isclose(loss.item(), frequency_cycle_loss(x.float(), y.float()).item(), rel_tol=1e-6)
