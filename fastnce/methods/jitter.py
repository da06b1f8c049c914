"""Changes of colour on the device, drawn for each image: brightness, contrast, saturation, hue."""

from __future__ import annotations

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.5, 0.5, 0.5, 0.3
"""Strengths: factors are drawn from 1 - x to 1 + x, the hue is turned by up to so many turns (F-LSeSim's)."""
GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R 601)."""


def color_jitter(pictures: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Change brightness, contrast, saturation and hue of each image, in this order, as torchvision's ColorJitter does.

    Torchvision draws the order too. Nothing is read from the device, so steps that do this can be recorded.

    Args:
        pictures: (images, 1 or 3, height, width) in [-1, 1]; of one channel, only the first two change.
        uniform: (images, 4) in [0, 1), the place of each change in its range; drawn if None.

    Returns:
        images of the same shape and dtype in [-1, 1], without gradient.
    """
    if uniform is None:
        uniform = torch.rand(len(pictures), 4, device=pictures.device)
    with torch.no_grad():
        uniform = uniform.to(pictures.dtype)
        x = (pictures + 1) * 0.5
        strengths = BRIGHTNESS, CONTRAST, SATURATION, HUE
        amounts = [(2 * u.view(-1, 1, 1, 1) - 1) * s for u, s in zip(uniform.unbind(1), strengths, strict=True)]
        x = (x * (1 + amounts[0])).clamp(0, 1)
        mean = _grey(x).mean((2, 3), keepdim=True)
        x = torch.lerp(mean, x, 1 + amounts[1]).clamp(0, 1)
        if x.shape[1] == 3:
            x = torch.lerp(_grey(x), x, 1 + amounts[2]).clamp(0, 1)
            x = _turned(x, amounts[3])
        return x * 2 - 1


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x
    red, green, blue = x.split(1, dim=1)
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of images in [0, 1]; value and saturation stay."""
    value, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    range_ = value - least
    safe = torch.where(range_ > 0, range_, torch.ones_like(range_))
    red, green, blue = x.split(1, dim=1)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = sector / 6 + turns
    # a channel is `value` within a sixth of a turn of its own hue, and `least` beyond two sixths
    channels = []
    for own in (0.0, 1 / 3, 2 / 3):
        away = (hue - own + 0.5).remainder(1.0) - 0.5
        channels.append(value - range_ * (6 * away.abs() - 1).clamp(0, 1))
    return torch.cat(channels, dim=1)
