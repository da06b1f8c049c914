"""PSNR and SSIM as the deraining papers compute them.

::

    metrics = DerainingMetrics()
    metrics.update(output, truth)  # (B, 3, H, W), float in [-1, 1], uint8 or uint16
    metrics.compute()              # {"psnr_y": 31.8, "ssim_y": 0.94, "psnr_rgb": 30.2, "ssim_rgb": 0.93}

Images are first rounded to 8 bits, as in a file. Y is MATLAB's ``rgb2ycbcr(im2double(image))``, as in the evaluation
scripts of the field: from 16 to 235 and *not* rounded. (``rgb2ycbcr`` of a uint8 image rounds Y; the rainy inputs of
Rain100L then have 26.898 dB and 0.83822 instead of 26.901 dB and 0.83837.) The peak is 255 although Y spans 219 levels,
as in those scripts.
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
    """Convert images to the levels of an 8-bit file: whole numbers from 0 to 255 as float64.

    Args:
        pictures: float in `value_range` (values slightly outside are clipped), uint8 (0 to 255) or uint16 (0 to 65535).
        value_range: (black, white) of floats.

    Raises:
        ValueError: the dtype is another one, or floats are far outside `value_range`.
    """
    if pictures.dtype == torch.uint8:
        return pictures.double()
    if pictures.dtype == torch.uint16:
        return pictures.double().div(257).round()
    low, high = value_range
    check_range(pictures, value_range)
    return pictures.double().sub(low).mul(255 / (high - low)).round().clamp(0, 255)


def check_range(pictures: Tensor, value_range: tuple[float, float] = (-1.0, 1.0)) -> None:
    """Raise ValueError unless images are floats in this range, or beyond it by at most half its width. NaN passes."""
    low, high = value_range
    if pictures.dtype not in FLOATS:
        raise ValueError(f"pictures must be floats from {low:g} to {high:g}, uint8 or uint16, not {pictures.dtype}")
    least, most = _range(pictures, value_range)
    if math.isnan(least):  # NaN hides the range; selecting the others takes ten times as long as the extremes
        least, most = _range(pictures[pictures == pictures], value_range)
    beyond = (high - low) / 2
    if least < low - beyond or most > high + beyond:
        raise ValueError(f"float pictures must lie in [{low:g}, {high:g}]; these reach from {least:g} to {most:g}")


def check_value_range(value_range: tuple[float, float]) -> None:
    """Raise ValueError unless a range is (black, white), finite and in ascending order."""
    low, high = value_range
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"value_range must be (black, white), finite and in ascending order, not {value_range}")


def _range(numbers: Tensor, of_none: tuple[float, float]) -> tuple[float, float]:
    """Return the least and the greatest number (NaN if there is one), or `of_none` if there are none."""
    if not numbers.numel():
        return of_none
    least, most = numbers.aminmax()
    return least.item(), most.item()


def luma(levels: Tensor) -> Tensor:
    """Compute Y of YCbCr (ITU-R 601, 16 to 235), not rounded.

    Args:
        levels: (images, 3, height, width), 0 to 255.

    Returns:
        (images, 1, height, width) of the same dtype; float64 for integers and 16-bit floats.
    """
    (levels,) = _measurable(levels)
    if levels.shape[1] != 3:
        raise ValueError(f"luma needs 3 channels, not {levels.shape[1]}")
    weight = torch.tensor([65.481, 128.553, 24.966], dtype=levels.dtype, device=levels.device) / 255
    return 16 + torch.einsum("bchw,c->bhw", levels, weight)[:, None]


def _measurable(*pictures: Tensor) -> list[Tensor]:
    """Check levels, and convert them to a dtype whose squares do not overflow."""
    for levels in pictures:
        if not isinstance(levels, Tensor) or levels.dim() != 4:
            found = tuple(levels.shape) if isinstance(levels, Tensor) else type(levels).__name__
            raise ValueError(f"levels must be a tensor (images, channels, height, width), not {found}")
    if len({tuple(levels.shape) for levels in pictures}) > 1:
        raise ValueError(
            f"output {tuple(pictures[0].shape)} and truth {tuple(pictures[1].shape)} must have the same shape"
        )
    for levels in pictures:
        if levels.dtype == torch.bool or levels.is_complex():
            raise ValueError(f"levels must be numbers from 0 to 255, not {levels.dtype}")
    numbers = [x if x.dtype in (torch.float32, torch.float64) else x.double() for x in pictures]
    for levels in numbers:
        if levels.numel() and levels.min() < 0:
            raise ValueError(
                f"levels must be from 0 to 255, but their minimum is {levels.min().item():g}: DerainingMetrics takes "
                f"images in another range"
            )
    return numbers


def psnr(output: Tensor, truth: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio in dB with peak 255, over all channels; infinite for equal images.

    Args:
        output, truth: (images, channels, height, width), 0 to 255.

    Returns:
        (images,)

    Raises:
        ValueError: the shapes differ, the arguments are not such tensors, or values are negative.
    """
    output, truth = _measurable(output, truth)
    error = (output - truth).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error)


def ssim(output: Tensor, truth: Tensor) -> Tensor:
    """Compute the structural similarity per channel (Wang et al., TIP 2004, equation 13, as in their ssim_index.m).

    Gaussian window 11x11 of sigma 1.5, K1 = 0.01, K2 = 0.03, L = 255, mean over the windows inside the image.

    Args:
        output, truth: (images, channels, height, width), 0 to 255, sides of at least 11.

    Returns:
        (images, channels)

    Raises:
        ValueError: the images are smaller, the shapes differ, or values are negative.
    """
    output, truth = _measurable(output, truth)
    if min(output.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW}x{WINDOW}, not {tuple(output.shape[2:])}")
    return torch.stack([_ssim(x, y) for x, y in zip(output.unbind(1), truth.unbind(1), strict=True)], dim=1)


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of one channel, (images, height, width) to (images,). One channel's data fits into a CPU's cache."""
    mean_x, mean_y, energy, xy = (_blur(m) for m in (x, y, x * x + y * y, x * y))
    product, squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    similar = (2 * product + C1) * (2 * (xy - product) + C2)
    return (similar / ((squares + C1) * (energy - squares + C2))).mean(dim=(-2, -1))


def _blur(x: Tensor) -> Tensor:
    """Apply the Gaussian window along the last two dimensions, valid region only.

    It adds shifted copies: for a float64 image on a CPU, this is about eight times as fast as a convolution.
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
    """PSNR and SSIM on Y and on RGB, per image and as means.

    On RGB, PSNR is over all channels at once and SSIM is the mean of the three channels. Grey images count as
    R = G = B.

    Args:
        value_range: (black, white) of float images. uint8 (0 to 255) and uint16 (0 to 65535) do not use it.
    """

    def __init__(self, value_range: tuple[float, float] = (-1.0, 1.0)):
        check_value_range(value_range)
        self.value_range = value_range
        self.pictures: list[dict[str, float]] = []

    @torch.no_grad()
    def update(self, output: Tensor, truth: Tensor) -> list[dict[str, float]]:
        """Measure and count images; return their measures.

        Args:
            output, truth: (images, 1 or 3, height, width) or without the first dimension; dtypes as for `to_levels`;
                any device; sides of at least 11.

        Raises:
            ValueError: shapes differ or do not fit, a dtype is another one, or floats are far outside `value_range`.
        """
        for pictures in (output, truth):
            if not isinstance(pictures, Tensor):
                raise ValueError(f"output and truth must be tensors, not {type(pictures).__name__}")
        if output.shape != truth.shape:
            raise ValueError(f"output {tuple(output.shape)} and truth {tuple(truth.shape)} must have the same shape")
        if output.dim() not in (3, 4) or output.shape[-3] not in (1, 3):
            raise ValueError(f"output must be (images, 1 or 3, height, width), not {tuple(output.shape)}")
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
        """Return the means over all images so far; raise ValueError if there are none."""
        if not self.pictures:
            raise ValueError("nothing was measured yet: call update(output, truth) first")
        return {key: math.fsum(p[key] for p in self.pictures) / len(self.pictures) for key in KEYS}

    def reset(self) -> None:
        """Forget all images."""
        self.pictures.clear()
