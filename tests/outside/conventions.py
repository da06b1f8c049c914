"""Other conventions of PSNR and SSIM on the outputs of PReNet: how far each is from its published figures.

::

    python -m tests.outside.conventions CHECKOUT RAIN100L [PAIRS]
"""

from __future__ import annotations

import sys
from math import log10
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor

from fastnce.evaluate import luma, psnr, ssim
from fastnce.evaluate.pairs import find_pairs
from fastnce.evaluate.quality import WINDOW, to_levels

from .prenet import derain, load_weights


def padded(levels: Tensor, mode: str) -> Tensor:
    return F.pad(levels, (WINDOW // 2,) * 4, mode=mode)


def conventions(output: Tensor, truth: Tensor) -> dict[str, tuple[Tensor | float | None, Tensor | float | None]]:
    """Return (PSNR, SSIM) of two pictures by each convention, None where it does not concern one of them.

    Args:
        output, truth: levels from 0 to 255, float64 (1, 3, height, width).
    """
    x, y = luma(output), luma(truth)
    full = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    jpeg = [(picture * full).sum(1, keepdim=True) for picture in (output, truth)]
    smaller_peak = psnr(x * (255 / 219), y * (255 / 219))
    box = structural_similarity(x[0, 0].numpy(), y[0, 0].numpy(), data_range=255)
    return {
        "as DerainingMetrics": (psnr(x, y), ssim(x, y)),
        "Y rounded to whole levels": (psnr(x.round(), y.round()), ssim(x.round(), y.round())),
        "Y from 0 to 255": (psnr(*jpeg), ssim(*jpeg)),
        "peak 219": (smaller_peak, None),
        "RGB": (psnr(output, truth), ssim(output, truth).mean()),
        "SSIM, zeros around": (None, ssim(padded(x, "constant"), padded(y, "constant"))),
        "SSIM, border repeated": (None, ssim(padded(x, "replicate"), padded(y, "replicate"))),
        "SSIM, scikit-image's box": (None, box),
    }


def main(checkout: str, data: str, count: str = "0") -> None:
    """Print the means over the pairs, or over the first `count`."""
    weights = load_weights(Path(checkout), "PReNet")
    found: dict[str, list] = {}
    errors = []
    for pair in find_pairs(Path(data))[: int(count) or None]:
        rainy, truth = (to_levels(picture[None]) for picture in pair.load())
        output = (derain(weights, rainy.float() / 255).clamp(0, 1) * 255).floor().double()
        for name, measured in conventions(output, truth).items():
            found.setdefault(name, []).append([None if one is None else float(one) for one in measured])
        errors.append(float((luma(output) - luma(truth)).square().mean()))
    for name, rows in found.items():
        means = ("" if column[0] is None else f"{fmean(column):.4f}" for column in zip(*rows, strict=True))
        print(f"{name:26s} {' '.join(f'{text:>8s}' for text in means)}")
    print(f"{'PSNR of the mean error':26s} {10 * log10(255**2 / fmean(errors)):8.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
