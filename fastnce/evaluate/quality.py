"""PSNR and SSIM as the deraining papers count them.

::

    metrics = DerainingMetrics()
    metrics.update(output, truth)  # (B, 3, H, W), float in [-1, 1], uint8 or uint16
    metrics.compute()              # {"psnr_y": 31.8, "ssim_y": 0.94, "psnr_rgb": 30.2, "ssim_rgb": 0.93}

Pictures are rounded to 8 bits first, as if they had been written to a file. Y is MATLAB's
``rgb2ycbcr(im2double(picture))``, which the evaluation scripts of the field use: from 16 to 235 and *not* rounded.
(``rgb2ycbcr`` of a uint8 picture rounds Y; the rainy inputs of Rain100L then have 26.898 dB and 0.83822 instead of
26.901 dB and 0.83837.) The peak is 255 although Y spans 219 levels, as in those scripts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
KEYS = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")
WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def to_levels(pictures: Tensor, value_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """Pictures to what an 8-bit file would hold: float64 of whole numbers from 0 to 255.

    Args:
        pictures: float in `value_range` (values somewhat outside are clipped), uint8 (0 to 255) or uint16 (0 to 65535).

    Raises:
        ValueError: another dtype, or floats too far outside to be pictures in this range.
    """
    if pictures.dtype == torch.uint8:
        return pictures.double()
    if pictures.dtype == torch.uint16:
        return pictures.double().div(257).round()
    low, high = value_range
    check_range(pictures, value_range)
    return pictures.double().sub(low).mul(255 / (high - low)).round().clamp(0, 255)


def check_range(pictures: Tensor, value_range: tuple[float, float] = (-1.0, 1.0)) -> None:
    """ValueError where pictures are no floats in this range. They may go beyond it by half its width; NaN passes."""
    low, high = value_range
    if pictures.dtype not in FLOATS:
        raise ValueError(f"pictures must be floats from {low:g} to {high:g}, uint8 or uint16, not {pictures.dtype}")
    numbers = pictures[pictures == pictures]  # NaN would hide the range
    least, most = (limit.item() for limit in numbers.aminmax()) if numbers.numel() else value_range
    beyond = (high - low) / 2
    if least < low - beyond or most > high + beyond:
        raise ValueError(f"float pictures must lie in [{low:g}, {high:g}]; these reach from {least:g} to {most:g}")


def luma(levels: Tensor) -> Tensor:
    """Y of YCbCr (ITU-R 601, 16 to 235), not rounded.

    Args:
        levels: (images, 3, height, width), 0 to 255.

    Returns:
        (images, 1, height, width) of the same dtype; float64 for integers and for floats of 16 bits.
    """
    (levels,) = _measurable(levels)
    if levels.shape[1] != 3:
        raise ValueError(f"luma is of 3 channels, not {levels.shape[1]}")
    weight = torch.tensor([65.481, 128.553, 24.966], dtype=levels.dtype, device=levels.device) / 255
    return 16 + torch.einsum("bchw,c->bhw", levels, weight)[:, None]


def _measurable(*pictures: Tensor) -> list[Tensor]:
    """Levels in a dtype that squares them without overflow."""
    for levels in pictures:
        if not isinstance(levels, Tensor) or levels.dim() != 4:
            found = tuple(levels.shape) if isinstance(levels, Tensor) else type(levels).__name__
            raise ValueError(f"levels must be a tensor (images, channels, height, width), not {found}")
    if len({tuple(levels.shape) for levels in pictures}) > 1:
        raise ValueError(f"output {tuple(pictures[0].shape)} and truth {tuple(pictures[1].shape)} must have one shape")
    for levels in pictures:
        if levels.dtype == torch.bool or levels.is_complex():
            raise ValueError(f"levels must be numbers from 0 to 255, not {levels.dtype}")
    numbers = [x if x.dtype in (torch.float32, torch.float64) else x.double() for x in pictures]
    for levels in numbers:
        if levels.numel() and levels.min() < 0:
            raise ValueError(f"levels go from 0 to 255, these begin at {levels.min().item():g}: see DerainingMetrics")
    return numbers


def psnr(output: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB with peak 255, over all channels; infinite for equal pictures.

    Args:
        output, truth: (images, channels, height, width), 0 to 255.

    Returns:
        (images,)

    Raises:
        ValueError: two shapes, no such tensors, or values below 0, which are no levels.
    """
    output, truth = _measurable(output, truth)
    error = (output - truth).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error)


def ssim(output: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each channel (Wang et al., TIP 2004, equation 13, as in the authors' ssim_index.m).

    Gaussian window 11x11 of sigma 1.5, K1 = 0.01, K2 = 0.03, L = 255, mean over the windows that lie inside the
    picture.

    Args:
        output, truth: (images, channels, height, width), 0 to 255, sides of at least 11.

    Returns:
        (images, channels)

    Raises:
        ValueError: smaller pictures, two shapes, or values below 0, which are no levels.
    """
    output, truth = _measurable(output, truth)
    if min(output.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW}x{WINDOW}, not {tuple(output.shape[2:])}")
    return torch.stack([_ssim(x, y) for x, y in zip(output.unbind(1), truth.unbind(1), strict=True)], dim=1)


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """One channel, (images, height, width) to (images,): a CPU's cache holds what belongs to it."""
    mean_x, mean_y, energy, xy = (_blur(m) for m in (x, y, x * x + y * y, x * y))
    product, squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    similar = (2 * product + C1) * (2 * (xy - product) + C2)
    return (similar / ((squares + C1) * (energy - squares + C2))).mean(dim=(-2, -1))


def _blur(x: Tensor) -> Tensor:
    """The Gaussian window along the last two dimensions, valid region only.

    Shifted sums: for a float64 picture on a CPU about eight times as fast as a convolution.
    """
    taps = [math.exp(-((i - WINDOW // 2) ** 2) / (2 * SIGMA**2)) for i in range(WINDOW)]
    taps = [tap / sum(taps) for tap in taps]
    for dim in (-1, -2):
        size = x.shape[dim] - WINDOW + 1
        total = x.narrow(dim, 0, size) * taps[0]
        for start, tap in enumerate(taps[1:], 1):
            total.add_(x.narrow(dim, start, size), alpha=tap)
        x = total
    return x


class DerainingMetrics:
    """PSNR and SSIM on Y and on RGB, for each picture and in the mean.

    On RGB, PSNR is over all channels at once and SSIM the mean of the three. Grey pictures count as R = G = B.

    Args:
        value_range: what black and white are in float pictures; uint8 (0 to 255) and uint16 (0 to 65535) need none.
    """

    def __init__(self, value_range: tuple[float, float] = (-1.0, 1.0)):
        low, high = value_range
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"value_range must be (black, white), finite and in ascending order, not {value_range}")
        self.value_range = value_range
        self.pictures: list[dict[str, float]] = []

    @torch.no_grad()
    def update(self, output: Tensor, truth: Tensor) -> list[dict[str, float]]:
        """Count pictures; returns the measures of these.

        Args:
            output, truth: (images, 1 or 3, height, width) or without the first dimension; as `to_levels` takes them;
                any device; sides of at least 11.

        Raises:
            ValueError: shapes that differ or do not fit, other dtypes, and floats far outside `value_range`.
        """
        for pictures in (output, truth):
            if not isinstance(pictures, Tensor):
                raise ValueError(f"output and truth must be tensors, not {type(pictures).__name__}")
        if output.shape != truth.shape:
            raise ValueError(f"output {tuple(output.shape)} and truth {tuple(truth.shape)} must have one shape")
        if output.dim() not in (3, 4) or output.shape[-3] not in (1, 3):
            raise ValueError(f"pictures must be (images, 1 or 3, height, width), not {tuple(output.shape)}")
        if output.device.type == "mps":  # has no float64
            output, truth = output.cpu(), truth.cpu()
        both = []
        for pictures in (output, truth):
            levels = to_levels(pictures, self.value_range).reshape(-1, *pictures.shape[-3:]).expand(-1, 3, -1, -1)
            both.append(torch.cat([levels, luma(levels)], dim=1))  # (B, 4, H, W): R, G, B, Y
        x, y = both
        similarity = ssim(x, y)  # (B, 4)
        columns = (psnr(x[:, 3:], y[:, 3:]), similarity[:, 3], psnr(x[:, :3], y[:, :3]), similarity[:, :3].mean(1))
        rows = torch.stack(columns, dim=1).tolist()
        measured = [dict(zip(KEYS, row, strict=True)) for row in rows]
        self.pictures += measured
        return measured

    def compute(self) -> dict[str, float]:
        """The means over all pictures so far; ValueError where there are none."""
        if not self.pictures:
            raise ValueError("nothing was measured yet: call update(output, truth) first")
        return {key: math.fsum(p[key] for p in self.pictures) / len(self.pictures) for key in KEYS}

    def reset(self) -> None:
        """Forget all pictures."""
        self.pictures.clear()
