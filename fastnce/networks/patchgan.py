"""PatchGAN discriminators (Isola et al., CVPR 2017).

Published `NLayerDiscriminator`, `PatchDiscriminator` and `PixelDiscriminator`.
"""

from __future__ import annotations

from torch import Tensor, nn

from .layers import BlurDown, Norm
from .norms import norm_layer
from .runs import run_all


class PatchGAN(nn.Module):
    """Score overlapping patches: (images, channels, height, width) to one logit per patch, (images, 1, h, w).

    Args:
        in_channels: of the images.
        width: channels after the first convolution (published `ndf`).
        layers: number of halvings. With 3, the patches have 70x70 pixels (published "basic").
        norm: "instance", "batch" or "none".
        antialias: use stride-1 convolutions and blur-down instead of strided convolutions.
        norm_affine: learn a weight and a bias in every instance norm.
    """

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 64,
        layers: int = 3,
        norm: Norm = "instance",
        antialias: bool = True,
        norm_affine: bool = False,
    ):
        super().__init__()
        if layers < 1:
            raise ValueError(f"a PatchGAN has at least 1 layer, not {layers}")
        stride = 1 if antialias else 2
        channels = width
        model: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=stride, padding=1), nn.LeakyReLU(0.2, True)]
        for i in range(1, layers + 1):
            if antialias:
                model.append(BlurDown(channels))
            last = i == layers
            wider = min(2**i, 8) * width
            model += [
                nn.Conv2d(channels, wider, 4, stride=1 if last else stride, padding=1, bias=norm == "instance"),
                norm_layer(norm, wider, norm_affine),
                nn.LeakyReLU(0.2, True),
            ]
            channels = wider
        model.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.model = nn.Sequential(*model)
        # One pass over fake and real images together gives the same logits as two passes.
        self.pictures_independent = norm != "batch"

    def forward(self, x: Tensor) -> Tensor:
        return run_all(list(self.model), x)


class TilePatchGAN(PatchGAN):
    """Cut images into tiles of 16x16 pixels, and score each tile on its own: (images, 1, height / 8, width / 8).

    Each tile gets 2x2 scores, which lie where the tile lies. Instance norm takes its statistics over a tile. A PatchGAN
    of 2 layers judges the tiles, and has the same `state_dict` keys. The published class returns the tiles as images,
    in the same order, so the mean of the scores is the same.
    """

    factor = 16
    """Height and width of an image must be multiples of this: the side of a tile."""

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 64,
        norm: Norm = "instance",
        antialias: bool = True,
        norm_affine: bool = False,
    ):
        super().__init__(in_channels, width, 2, norm, antialias, norm_affine)

    def forward(self, x: Tensor) -> Tensor:
        images, channels, height, width = x.shape
        side = self.factor
        if height % side or width % side:
            raise ValueError(
                f"this discriminator cuts images into tiles of {side}x{side}: {height}x{width} does not fit"
            )
        rows, columns = height // side, width // side
        tiles = x.reshape(images, channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        scores = super().forward(tiles.reshape(-1, channels, side, side))
        scores = scores.reshape(images, rows, columns, *scores.shape[2:])  # height and width of a tile's scores last
        return scores.permute(0, 1, 3, 2, 4).flatten(1, 2).flatten(2)[:, None]


class PixelGAN(nn.Module):
    """Score each pixel with 1x1 convolutions: one logit per pixel, (images, 1, height, width)."""

    def __init__(self, in_channels: int = 3, width: int = 64, norm: Norm = "instance", norm_affine: bool = False):
        super().__init__()
        bias = norm == "instance"
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, width, 1),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(width, 2 * width, 1, bias=bias),
            norm_layer(norm, 2 * width, norm_affine),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(2 * width, 1, 1, bias=bias),
        )
        self.pictures_independent = norm != "batch"

    def forward(self, x: Tensor) -> Tensor:
        return run_all(list(self.net), x)
