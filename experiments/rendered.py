"""The restorer trained on rendered pairs alone: photographs without rain, and rain that is rendered on them.

python -m fastnce train experiments/rendered.py:Rendered --data PHOTOS --out RUN data.rain=1 ...

`experiments/photographs.py` makes PHOTOS. This is how the shipped model `derain` was trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.photographs import RAIN
from fastnce.common.options import option
from fastnce.data.rain import parse_kinds, render_rain
from fastnce.methods import Batch, Draws, Group, Method, NetworkOptions, Phase
from fastnce.methods.base import WEIGHT, Losses, Outputs

ADAM = (0.9, 0.99)


@dataclass
class RenderedOptions:
    """Weights of the loss, and the rain."""

    lambda_l1: float = option(1.0, "weight of the mean absolute difference", **WEIGHT)
    lambda_frequency: float = option(0.05, "weight of the mean absolute difference of the spectra", **WEIGHT)
    lambda_ssim: float = option(0.0, "weight of 1 - SSIM", **WEIGHT)
    rain: str = option(";".join(RAIN), "kinds of rain, separated by semicolons", anything=True)
    dry: float = option(0.1, "share of the images without rain", low=0, high=1)
    side: int = option(400, "shorter side in pixels that scales the streaks", low=1)


class Rendered(Method):
    """Trains one generator to restore clean images from images with rendered rain."""

    Options = RenderedOptions

    def __init__(self, options: RenderedOptions, network: NetworkOptions):
        super().__init__()
        self.options = options
        self.generator = network.build_generator()
        self.kinds = parse_kinds("loss.rain", options.rain)

    def generators(self):
        return {"G": self.generator}

    def groups(self):
        return {"G": Group((self.generator,), betas=ADAM)}

    def phases(self):
        return (Phase(self.loss, ("G",)),)

    def generate(self, batch: Batch, draws: Draws) -> Outputs:
        clean = torch.cat([varied(image) for image in batch.b.split(1)])
        rainy = torch.cat([self.rained(image) for image in clean.split(1)])
        rainy = rainy.contiguous(memory_format=torch.channels_last)
        return {"clean": clean, "rainy": rainy, "restored": self.generator(rainy)}

    @torch.no_grad()
    def rained(self, image: Tensor) -> Tensor:
        dry, scale = torch.rand(2).tolist()
        if dry < self.options.dry:
            return image
        side = round(self.options.side * 2 ** (2 * scale - 1))  # half to twice as large
        rainy = render_rain(image, self.kinds, side=side)
        return rainy.add(1).mul(127.5).round().div(127.5).sub(1)  # as in a file of 8 bits

    def loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        options, restored, clean = self.options, outputs["restored"], outputs["clean"]
        losses = {"L1": F.l1_loss(restored, clean)}
        total = options.lambda_l1 * losses["L1"]
        if options.lambda_frequency > 0:
            difference = torch.view_as_real(torch.fft.rfft2((restored - clean).float(), norm="ortho"))
            losses["frequency"] = difference.abs().mean()
            total = total + options.lambda_frequency * losses["frequency"]
        if options.lambda_ssim > 0:
            losses["SSIM"] = ssim(restored.float(), clean)
            total = total + options.lambda_ssim * (1 - losses["SSIM"])
        return total, losses

    def translate(self, a: Tensor) -> Tensor:
        return self.generator(a)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        rainy = torch.cat([self.rained(image) for image in batch.b.split(1)])
        return {"rainy": rainy, "restored": self.generator(rainy), "clean": batch.b}


@torch.no_grad()
def varied(image: Tensor) -> Tensor:
    """Turn, mirror and recolour an image, (1, 3, height, width) with equal sides."""
    turn, mirror, swap, grey, bright, *gammas = torch.rand(8).tolist()
    if turn < 0.5:
        image = image.transpose(2, 3)
    if mirror < 0.5:
        image = image.flip(2)
    light = image.add(1).div(2)
    if swap < 0.5:
        light = light[:, torch.randperm(3)]
    if grey < 0.2:
        light = light + torch.rand(()) * (light.mean(1, keepdim=True) - light)
    powers = torch.tensor([2 ** (1.2 * (bright - 0.5) + 0.4 * (gamma - 0.5)) for gamma in gammas])
    return light.clamp(0, 1).pow(powers[:, None, None]).mul(2).sub(1)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Mean SSIM of images in [-1, 1], with a Gaussian window of 11x11 and sigma 1.5 (Wang et al., TIP 2004)."""
    offsets = torch.arange(11, dtype=x.dtype) - 5
    window = torch.exp(-(offsets**2) / 4.5)
    window = (window / window.sum()).repeat(x.shape[1], 1, 1, 1)

    def blur(maps: Tensor) -> Tensor:
        groups = maps.shape[1]
        maps = F.conv2d(maps, window.transpose(2, 3).repeat(groups // x.shape[1], 1, 1, 1), groups=groups)
        return F.conv2d(maps, window.repeat(groups // x.shape[1], 1, 1, 1), groups=groups)

    mx, my, xx, yy, xy = blur(torch.cat([x, y, x * x, y * y, x * y], 1)).chunk(5, 1)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # values span 2; SSIM is of differences and means from black
    mx1, my1 = mx + 1, my + 1
    similar = (2 * mx1 * my1 + c1) * (2 * (xy - mx * my) + c2)
    return (similar / ((mx1**2 + my1**2 + c1) * (xx - mx**2 + yy - my**2 + c2))).mean()
